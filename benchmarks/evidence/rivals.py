"""What short trainings say in place of a score, and what they cost: rows for the table of scores.

Every checkpoint is trained as in ``downstream.py``, but within the pool and for a sixth and a third of the iterations: on 8 cases
of one half of its patients, tested on the other half. Encoder frozen, it is a decoder probe; free, a short fine-tuning. So no test
patient is seen, as little as by a score. Rows that the table has already are not computed again.

    python benchmarks/evidence/rivals.py -raw nnUNet_raw -runs runs/* -work work -o rivals.csv -num_proc 2
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TextIO

import numpy as np
from downstream import (
    RATE,
    Job,
    add_common_options,
    made_with,
    network_of,
    opened,
    scheme_of,
    test,
    train,
)
from joblib import Parallel, delayed
from targets import SPLIT_SEED, Target, prepared, read, training_slices

from mtl_nnunet.checkpoints import find_checkpoints
from mtl_nnunet.curves import STATES

LENGTHS = (40, 80)
# other seeds than those that are judged by
FIRST_SEED = 10_000
COLUMNS = ("dataset", "encoder", "scheme", "run", "epoch", "score", "value", "draw", "seconds", "made_with")
KEY = ("dataset", "run", "epoch", "score", "draw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("-state", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("-epochs", nargs="+", help="of each run; default all")
    parser.add_argument("-iterations", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("-draw", type=int, default=0, help="which half of the pool trains, on which cases")
    args = parser.parse_args()
    files = {name: prepared(name, args.raw, args.work) for name in args.d}
    file, done = opened(args.o, COLUMNS, KEY)
    seed = FIRST_SEED + args.draw
    runs = {folder: find_checkpoints([folder]) for folder in args.runs}
    jobs = [
        (
            length,
            Job(d, str(c.architecture), scheme_of(folder), folder.name, state, str(c.epoch), seed, "", (c.path,)),
            args.draw,
        )
        for length, d, state, (folder, found) in product(args.iterations, args.d, args.state, runs.items())
        for c in found
        if str(c.epoch) in (args.epochs or [str(c.epoch)])
        and (d, folder.name, str(c.epoch), name_of(length, state), str(args.draw)) not in done
    ]
    print(f"{len(jobs)} trainings to go", flush=True)
    with file:
        train_all(jobs, files, file, made_with(), args.num_proc, args.device)


def train_all(
    trainings: Sequence[tuple[int, Job, int]],
    files: Mapping[str, Path],
    file: TextIO,
    version: str,
    num_proc: int,
    device: str,
) -> list[float]:
    """Dice of short trainings (iterations, what, draw), each written as a row of the table when it is there."""
    started = time.monotonic()
    results = Parallel(n_jobs=num_proc, batch_size=1, return_as="generator")(
        delayed(short_training)(job, files[job.dataset], length, draw, device) for length, job, draw in trainings
    )
    found = []
    writer = csv.writer(file, lineterminator="\n")
    for (length, job, draw), (dice, seconds) in zip(trainings, results, strict=True):
        known = (job.dataset, job.encoder, job.scheme, job.run, job.epoch, name_of(length, job.state))
        writer.writerow([*known, f"{dice:.5f}", draw, f"{seconds:.2f}", version])
        file.flush()
        found.append(dice)
        if len(found) % 20 == 0:
            print(f"{len(found)} of {len(trainings)}, {time.monotonic() - started:.0f} s", flush=True)
    return found


def name_of(iterations: int, state: str) -> str:
    return f"training:iterations={iterations},state={state}"


def short_training(job: Job, file: Path, iterations: int, draw: int, device: str) -> tuple[float, float]:
    """Dice on the other half of the pool, and the seconds that it took."""
    started = time.monotonic()
    target = halved(read(file), draw)
    network, how = network_of(job, target, RATE, device)
    train(network, target, training_slices(target, job.seed), how, iterations, job.seed, device)
    dice, _ = test(network, target, device)
    return dice, time.monotonic() - started


def halved(target: Target, draw: int) -> Target:
    """The pool alone: half of its patients, drawn at random, as test patients."""
    pool = ~target.is_test
    patients = np.unique(target.patients[pool])
    shuffled = np.random.default_rng([SPLIT_SEED, 1, draw]).permutation(patients)
    return replace(
        target,
        images=target.images[pool],
        labels=target.labels[pool],
        patients=target.patients[pool],
        cases=target.cases[pool],
        is_test=np.isin(target.patients[pool], shuffled[: len(patients) // 2]),
    )


if __name__ == "__main__":
    # workers import functions, and what these keep, by the name of their module
    import rivals

    rivals.main()

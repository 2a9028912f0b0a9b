"""Successive halving on short trainings: does a race that gives the longest trainings to the best few choose a checkpoint?

Trainings within the pool, as in ``rivals.py``, in rungs: all candidates are trained for a third of the iterations, the best three for all
of them, the best two of these once more on another draw of the pool's halves. So no test patient is seen. Encoder frozen, these are
decoder probes. Trainings that ``-o`` or ``-known`` has already are not run again; with ``-downstream`` the choice after every rung is
judged by the Dice of the test patients, beside how long the race trained.

    python benchmarks/evidence/halving.py -raw nnUNet_raw -runs runs/*-0 -work work -known rivals.csv -o halving.csv -epochs 1 2 4 8 16 -downstream balanced.csv -num_proc 2
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from downstream import ITERATIONS, Job, add_common_options, made_with, opened, scheme_of
from rivals import COLUMNS, FIRST_SEED, KEY, name_of, train_all
from targets import prepared
from trainings import CURVE, by_training, read_trainings, told

from mtl_nnunet.checkpoints import find_checkpoints
from mtl_nnunet.curves import STATES


class Rung(NamedTuple):
    """Those who are left are trained this long on these draws, and by the mean of these the best stay."""

    iterations: int
    draws: tuple[int, ...]
    stay: int


RUNGS = (Rung(ITERATIONS // 3, (0,), 3), Rung(ITERATIONS, (0,), 2), Rung(ITERATIONS, (0, 1), 1))


class Race(NamedTuple):
    """One run on one target in one state, as a ``Job`` begins, and the epochs that race, ascending."""

    dataset: str
    encoder: str
    scheme: str
    run: str
    state: str
    epochs: tuple[str, ...]


# Dice on the other half of the pool by dataset, run, epoch, name and draw
Known = Mapping[tuple[str, ...], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("-state", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("-epochs", nargs="+", required=True, help="that race, of each run")
    parser.add_argument("-known", type=Path, nargs="+", default=[], help="tables of rivals.py")
    parser.add_argument("-downstream", type=Path, help="table of balanced.py to judge by")
    args = parser.parse_args()
    files = {name: prepared(name, args.raw, args.work) for name in args.d}
    found = {f.name: {str(c.epoch): c for c in find_checkpoints([f])} for f in args.runs}
    epochs = tuple(sorted(args.epochs, key=int))
    races = [
        Race(d, str(found[f.name][epochs[0]].architecture), scheme_of(f), f.name, state, epochs)
        for state, d, f in product(args.state, args.d, args.runs)
    ]
    file, _ = opened(args.o, COLUMNS, KEY)
    known = trainings_of([*args.known, args.o])
    version = made_with()
    with file:
        for number, rung in enumerate(RUNGS):
            jobs = [(race, *job) for race in races for job in missing(race, known, number)]
            print(f"rung {number + 1}: {len(jobs)} trainings to go", flush=True)
            trainings = [
                (rung.iterations, Job(*race[:5], e, FIRST_SEED + draw, "", (found[race.run][e].path,)), draw)
                for race, e, draw in jobs
            ]
            dice = train_all(trainings, files, file, version, args.num_proc, args.device)
            known |= {key_of(race, e, rung.iterations, draw): d for (race, e, draw), d in zip(jobs, dice, strict=True)}
    if args.downstream:
        report(races, known, read_trainings(args.downstream))


def trainings_of(tables: Sequence[Path]) -> dict[tuple[str, ...], float]:
    known = {}
    for path in tables:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                known[tuple(row[c] for c in KEY)] = float(row["value"])
    return known


def key_of(race: Race, epoch: str, iterations: int, draw: int) -> tuple[str, ...]:
    return race.dataset, race.run, epoch, name_of(iterations, race.state), str(draw)


def left_after(race: Race, known: Known, number: int) -> tuple[str, ...]:
    """Epochs, ascending, that stay after so many rungs; of equals the later stays.

    Raises:
        KeyError: A training that has not been run.
    """
    left = race.epochs
    for rung in RUNGS[:number]:
        best = by_dice(race, left, known, rung)[-rung.stay :]
        left = tuple(e for e in left if e in best)
    return left


def by_dice(race: Race, epochs: Sequence[str], known: Known, rung: Rung) -> list[str]:
    """Epochs from the worst to the best by a rung; of equals the earlier first."""
    dice = [np.mean([known[key_of(race, e, rung.iterations, d)] for d in rung.draws]) for e in epochs]
    return [epochs[i] for i in np.argsort(dice, kind="stable")]


def missing(race: Race, known: Known, number: int) -> list[tuple[str, int]]:
    """Epochs and draws of a rung that have not been trained, all earlier rungs having been."""
    rung = RUNGS[number]
    return [
        (epoch, draw)
        for epoch, draw in product(left_after(race, known, number), rung.draws)
        if key_of(race, epoch, rung.iterations, draw) not in known
    ]


def iterations_of(race: Race, known: Known, number: int) -> int:
    """How long the race trained until so many rungs were over."""
    run = {
        (epoch, rung.iterations, draw)
        for i, rung in enumerate(RUNGS[:number])
        for epoch, draw in product(left_after(race, known, i), rung.draws)
    }
    return sum(iterations for _, iterations, _ in run)


def report(races: Sequence[Race], known: Known, trainings: pd.DataFrame) -> None:
    """Gain on the last epoch of what leads after each rung, in Dice points, and seconds."""
    for state in dict.fromkeys(r.state for r in races):
        own = [r for r in races if r.state == state]
        table = by_training(trainings[trainings["state"] == state], with_scratch=False).groupby(level=CURVE).mean()
        curves = pd.MultiIndex.from_tuples([race[:4] for race in own], names=CURVE)
        dice = table.loc[curves]
        print(f"\n## encoder {state}: {len(own)} curves\n")
        for number, rung in enumerate(RUNGS, start=1):
            chosen = [leader(race, known, number) for race in own]
            gain = pd.Series(
                [100 * (row[e] - row.iloc[-1]) for (_, row), e in zip(dice.iterrows(), chosen, strict=True)],
                index=curves,
            )
            share = np.mean([int(e) / int(r.epochs[-1]) for e, r in zip(chosen, own, strict=True)])
            trained = np.mean([iterations_of(race, known, number) for race in own])
            print(
                f"after rung {number} ({rung.iterations} iterations, {len(rung.draws)} draws): {told(gain)} on the last epoch, share "
                f"{share:.2f}, {trained:.0f} iterations a race"
            )


def leader(race: Race, known: Known, number: int) -> str:
    """The best of those who ran a rung, by that rung."""
    return by_dice(race, left_after(race, known, number - 1), known, RUNGS[number - 1])[-1]


if __name__ == "__main__":
    # workers import functions, and what these keep, by the name of their module
    import halving

    halving.main()

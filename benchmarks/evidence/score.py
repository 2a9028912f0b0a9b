"""Every score, at every level and view strength, of every kept checkpoint on the pool patients of every target.

The scorer sees what ``targets.py`` fixes: slices of the pool, with their labels for the scores that read them, and no test
patient. Levels are counted from the deepest, so that encoders of four and five levels can be compared. Rows that the table
has already are not computed again. With ``-pixels boundary`` scores that read labels see those pixels only where classes border on
each other.

    python benchmarks/evidence/score.py -raw nnUNet_raw -runs runs/* -work work -o scores.csv -num_proc 2
    python benchmarks/evidence/score.py ... -o boundary.csv -pixels boundary
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import spanning_tree
import torch
from downstream import add_common_options, made_with, opened, scheme_of
from joblib import Parallel, delayed
from targets import Target, prepared, read
from torch import Tensor

from mtl_nnunet.checkpoints import Checkpoint, find_checkpoints, read_contents
from mtl_nnunet.curves import RANDOM
from mtl_nnunet.embedding import Target as Seen
from mtl_nnunet.embedding import embed, make_target
from mtl_nnunet.encoder import random_encoder
from mtl_nnunet.errors import NoScoreError
from mtl_nnunet.pixels import borders
from mtl_nnunet.scores import SCORES, Score, parse_score
from mtl_nnunet.slices import Slices

COLUMNS = (
    "dataset",
    "encoder",
    "scheme",
    "run",
    "epoch",
    "score",
    "value",
    "higher_is_better",
    "num_cases",
    "draw",
    "made_with",
)
# which views and strengths the scores of views are tried with, beside their own
STRENGTHS = (("scanner", 0.5), ("scanner", 2.0), ("paper", 1.0), ("paper", 2.0))
VARIANTS = {
    # beside its own, cosine and 0.5
    "robustness": [
        *(f"distance=cosine,margin={m}" for m in (0, 1)),
        *(f"distance={d},margin={m}" for d in ("l2", "pearson") for m in (0, 0.5, 1)),
    ],
    "dse": ["part=separability", "part=rank"],
    "dse_labels": ["part=separability"],
}
TREE = replace(
    SCORES["ccfv"],
    name="tree",
    prepare=spanning_tree.statistic,
    joins_levels=True,
    parameters={"level": "all", "pooled": False},
)
EVERYWHERE, BOUNDARY = "all", "boundary"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("-epochs", nargs="+", help="of each run; default all")
    parser.add_argument("-num_cases", type=int, help="of the pool; default all of it")
    parser.add_argument("-draw", type=int, default=0, help="which random draw of that many cases")
    parser.add_argument(
        "-score", nargs="+", metavar="NAME", help="some of the scores, as the table names them without a level"
    )
    parser.add_argument("-pixels", choices=(EVERYWHERE, BOUNDARY), default=EVERYWHERE, help="which have labels")
    args = parser.parse_args()
    names = tuple(args.score or [n for n, s in scores_to_try() if s.labels or args.pixels == EVERYWHERE])
    if args.pixels == BOUNDARY and (blind := [n for n, s in chosen_scores(names) if not s.labels]):
        raise SystemExit(f"-score {blind[0]} reads no labels, so it knows no boundary. Leave out -pixels {BOUNDARY}.")
    files = {name: prepared(name, args.raw, args.work) for name in args.d}
    cases = "all" if args.num_cases is None else str(args.num_cases)
    refuse_other_scores(args.o, names, args.pixels)
    file, done = opened(args.o, COLUMNS, ("dataset", "run", "epoch", "num_cases", "draw"))
    runs = {folder: find_checkpoints([folder]) for folder in args.runs}
    encoders = {folder: str(found[0].architecture) for folder, found in runs.items()}
    jobs = [
        (dataset, folder, checkpoint)
        for folder, found in runs.items()
        for dataset in args.d
        for checkpoint in (*found, None)
        if checkpoint is None or str(checkpoint.epoch) in (args.epochs or [str(checkpoint.epoch)])
        if (dataset, folder.name, RANDOM if checkpoint is None else str(checkpoint.epoch), cases, str(args.draw))
        not in done
    ]
    print(f"{len(jobs)} checkpoints to go", flush=True)
    version = made_with()
    started = time.monotonic()
    results = Parallel(n_jobs=args.num_proc, batch_size=1, return_as="generator")(
        delayed(values_of)(files[d], encoders[f], c, names, args.num_cases, args.draw, args.pixels, args.device)
        for d, f, c in jobs
    )
    with file:
        for i, ((dataset, folder, checkpoint), values) in enumerate(zip(jobs, results, strict=True), start=1):
            epoch = RANDOM if checkpoint is None else checkpoint.epoch
            known = (dataset, encoders[folder], scheme_of(folder), folder.name, epoch)
            block = io.StringIO()
            writer = csv.writer(block, lineterminator="\n")
            writer.writerows([*known, name, f"{v:.6g}", int(up), cases, args.draw, version] for name, v, up in values)
            # all at once, so that a kill leaves all rows of a checkpoint, or none, or a line cut off
            file.write(block.getvalue())
            file.flush()
            if i % 20 == 0:
                print(f"{i} of {len(jobs)}, {time.monotonic() - started:.0f} s", flush=True)


def scores_to_try() -> list[tuple[str, Score]]:
    """Names and scores; each is computed at all levels at once, which gives its value at every one of them."""
    tried = [("tree", TREE)]
    for name, score in SCORES.items():
        tried += [(f"{name}", parse_score(f"{name}:level=all"))]
        tried += [(f"{name}:{v}", parse_score(f"{name}:level=all,{v}")) for v in VARIANTS.get(name, [])]
        if score.views != "plain":
            tried += [
                (f"{name}:views={views},strength={strength:g}", parse_score(f"{name}:level=all", views, strength))
                for views, strength in STRENGTHS
            ]
    return tried


def chosen_scores(names: tuple[str, ...]) -> list[tuple[str, Score]]:
    """Those of the scores to try that are named."""
    scores = dict(scores_to_try())
    if unknown := set(names) - set(scores):
        raise SystemExit(f"-score {min(unknown)}: expected some of {', '.join(scores)}")
    return [(name, scores[name]) for name in names]


def values_of(
    file: Path,
    encoder_name: str,
    checkpoint: Checkpoint | None,
    names: tuple[str, ...],
    num_cases: int | None,
    draw: int,
    where: str,
    device: str,
) -> list[tuple[str, float, bool]]:
    """Scores of one checkpoint, None for random weights, at every level and at all of them."""
    if device == "cpu":
        torch.set_num_threads(1)
    seen, scores = target_seen(file, names, num_cases, draw, where), chosen_scores(names)
    encoder = random_encoder(encoder_name, seen.input_channels, draw)
    if checkpoint is not None:
        encoder.load_weights(read_contents(checkpoint.path).weights, str(checkpoint.path))
    features = embed(encoder, seen, [score for _, score in scores], device)
    everyone = np.ones((1, features.patients.max() + 1))
    values = []
    for name, score in scores:
        try:
            statistic, by_level = score.statistic(features)
        except NoScoreError:
            continue
        start = prefix(name, where)
        values.append((f"{start}all", float(statistic(everyone)[0]), score.higher_is_better))
        values += [
            (f"{start}{level - max(by_level) - 1}", value, score.higher_is_better) for level, value in by_level.items()
        ]
    # what is not finite is no score, as in a ranking
    return [value for value in values if np.isfinite(value[1])]


def prefix(name: str, where: str) -> str:
    """What the table's names of a score begin with; the level follows."""
    place = "" if where == EVERYWHERE else f"pixels={where},"
    return f"{name}{',' if ':' in name else ':'}{place}level="


def refuse_other_scores(table: Path, names: tuple[str, ...], where: str) -> None:
    """A checkpoint that is in the table is not scored again, so a table is of one set of scores."""
    if not table.exists():
        return
    with table.open(newline="") as file:
        there = {row["score"].rpartition("level=")[0] + "level=" for row in csv.DictReader(file) if row["score"]}
    if others := there - {prefix(name, where) for name in names}:
        raise SystemExit(f"{table} is of other scores ({min(others)}...). Write to another table.")


@cache
def target_seen(file: Path, names: tuple[str, ...], num_cases: int | None, draw: int, where: str) -> Seen:
    """Views and pixels of the slices that the scorer sees, the same for all checkpoints."""
    slices = pool_slices(read(file), num_cases, draw)
    if where == BOUNDARY:
        slices = replace(slices, labels=only_borders(slices.labels))
    return make_target(slices, [s for _, s in chosen_scores(names)], draw)


def only_borders(labels: Tensor) -> Tensor:
    """Labels (N, H, W) where classes meet, -1 everywhere else."""
    return torch.stack([torch.where(torch.from_numpy(borders(plane.numpy())), plane, -1) for plane in labels])


def pool_slices(target: Target, num_cases: int | None, draw: int) -> Slices:
    """The slices that the scorer sees: the pool's, or those of some of its cases drawn at random."""
    chosen = ~target.is_test
    if num_cases is not None:
        cases = np.unique(target.cases[chosen])
        drawn = np.random.default_rng([draw, num_cases]).choice(cases, min(num_cases, len(cases)), replace=False)
        chosen &= np.isin(target.cases, drawn)
    _, patients = np.unique(target.patients[chosen], return_inverse=True)
    return Slices(
        images=target.images[chosen],
        patients=patients,
        cases=tuple(target.cases[chosen]),
        positions=(0,) * int(chosen.sum()),
        axis=0,
        spacing=(1.0, 1.0),
        normalization=(),
        use_mask_for_norm=False,
        intensities={},
        used=(),
        labels=target.labels[chosen].to(torch.int16),
    )


if __name__ == "__main__":
    # workers import functions, and what these keep, by the name of their module
    import score

    score.main()

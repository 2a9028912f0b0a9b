"""Does what is seen along one pretraining hold in its repeat, from another seed?

Runs are named by their pretraining seed. Curves of the same target, network and scheme are compared: Dice below the last epoch by
each pretraining seed; how the two agree beyond the course that all curves share, beside how a curve agrees with itself by other
trainings (each by half of the training seeds and the other half, so that no draw of training cases stands on both sides); and what
it loses to start in the repeat from the epoch that was best before. With a table of scores: what choosing by each score loses in the
first runs and in their repeat, and what the score that was best in the first loses in the repeat. Errors are of means over targets.

    python benchmarks/evidence/repeat.py balanced.csv scores.csv.gz
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from mtl_nnunet.curves import SCRATCH
from mtl_nnunet.evaluation import argbest

CURVE = ["dataset", "encoder", "scheme"]
FIRST, REPEAT = "0", "1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("scores", type=Path, nargs="*")
    args = parser.parse_args()
    table = pd.read_csv(args.table, dtype={"epoch": str})
    scores = pd.concat([pd.read_csv(path, dtype={"epoch": str}) for path in args.scores]) if args.scores else None
    for state, rows in table.groupby("state"):
        both = [rows[(seed_of(rows) == s) | (rows["epoch"] == SCRATCH)] for s in (FIRST, REPEAT)]
        shared = set.intersection(*(set(part.loc[part["epoch"] != SCRATCH, "seed"]) for part in both))
        if not shared:
            continue
        both = [part[part["seed"].isin(shared)] for part in both]
        first, repeat = (curves_of(part) for part in both)
        curves = first.index.intersection(repeat.index)
        first, repeat = first.loc[curves], repeat.loc[curves]
        print(
            f"\n{len(curves)} curves, encoder {state}, training seeds {', '.join(map(str, sorted(shared)))}: Dice points below the "
            "last epoch, mean and standard error over targets"
        )
        report_courses(first, repeat)
        report_agreement(both, curves)
        if scores is not None:
            report_scores(first, repeat, scores)


def seed_of(rows: pd.DataFrame) -> pd.Series:
    """The pretraining seed that ends a run's name; random weights have none."""
    return rows["run"].fillna("").str.rsplit("-", n=1).str[-1]


def report_courses(first: pd.DataFrame, repeat: pd.DataFrame) -> None:
    for name, table in (("first", first), ("repeat", repeat)):
        below = 100 * table.rsub(table.iloc[:, -1], axis=0)
        print(f"{name}: " + ", ".join(f"{epoch} {mean_and_error(below[epoch])}" for epoch in below))
    epochs = epochs_of(first)
    best = first[epochs].idxmax(axis=1)
    taken = pd.Series([repeat.loc[c, e] for c, e in best.items()], index=first.index)
    below = mean_and_error(100 * (repeat[epochs[-1]] - taken))
    print(f"the best epoch of the first, in the repeat: {below} below the last")


def report_agreement(both: list[pd.DataFrame], curves: pd.Index) -> None:
    """Correlations beyond the common course, of means over disjoint halves of the training seeds."""
    seeds = sorted(set(both[0].loc[both[0]["epoch"] != SCRATCH, "seed"]))
    if len(seeds) < 2:
        return
    with_itself, with_repeat = [], []
    for half in combinations(seeds, len(seeds) // 2):
        (a, b), (c, d) = (
            [
                centred(by_epoch(part[part["seed"].isin(half) == inside]).loc[curves].to_numpy())
                for inside in (True, False)
            ]
            for part in both
        )
        with_itself += [correlation(a, b), correlation(c, d)]
        with_repeat += [correlation(a, d), correlation(c, b)]
    print(
        "correlation beyond the common course, half of the training seeds with the others: of the same run "
        f"{np.mean(with_itself):.2f}, of a run with its repeat {np.mean(with_repeat):.2f}"
    )


def report_scores(first: pd.DataFrame, repeat: pd.DataFrame, scores: pd.DataFrame) -> None:
    """What each score's choice gains on the last epoch, here and there; points of Dice."""
    gained = pd.DataFrame({
        name: gains(table, scores[seed_of(scores) == seed])
        for name, table, seed in (("first", first, FIRST), ("repeat", repeat, REPEAT))
    }).dropna()  # fmt: skip
    means = gained.map(lambda by_curve: by_curve.mean())
    if means.empty:
        return
    order = means["first"].corr(means["repeat"], method="spearman")
    print(f"{len(means)} scores on all curves; their mean gains in the first and in the repeat: Spearman {order:.2f}")
    top = means["first"].idxmax()
    print(
        f"best in the first: {top}, {mean_and_error(gained.loc[top, 'first'])} over the last epoch there, "
        f"{mean_and_error(gained.loc[top, 'repeat'])} in the repeat"
    )
    ahead = (means > 0).sum()
    print(f"scores ahead of the last epoch: {ahead['first']} in the first, {ahead['repeat']} in the repeat, "
          f"{int((means > 0).all(axis=1).sum())} in both")  # fmt: skip


def gains(table: pd.DataFrame, scores: pd.DataFrame) -> pd.Series:
    """By score that all curves have: Dice points of its choice above the last epoch, a value a curve."""
    epochs = epochs_of(table)
    oriented = scores["value"].where(scores["higher_is_better"] == 1, -scores["value"])
    values = scores.assign(value=oriented).pivot_table(index=["score", *CURVE], columns="epoch", values="value")
    values = values.reindex(columns=epochs).dropna()
    result = {}
    for name, of_score in values.groupby(level="score"):
        of_score = of_score.droplevel("score")
        if table.index.isin(of_score.index).all():
            chosen = [argbest(row) for row in of_score.loc[table.index].to_numpy()]
            dice = table[epochs].to_numpy()
            result[name] = pd.Series(100 * (dice[np.arange(len(dice)), chosen] - dice[:, -1]), index=table.index)
    return pd.Series(result, dtype=object)


def curves_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice over seeds, a row a curve; random weights first, then epochs in their order."""
    curves = by_epoch(rows)
    scratch = rows[rows["epoch"] == SCRATCH].groupby(["dataset", "encoder"])["dice"].mean()
    curves.insert(0, SCRATCH, [scratch[d, e] for d, e, _ in curves.index])
    return curves


def by_epoch(rows: pd.DataFrame, curve: list[str] = CURVE) -> pd.DataFrame:
    """Mean Dice over seeds of curves that have all epochs, in their order."""
    table = rows[rows["epoch"] != SCRATCH].pivot_table(index=curve, columns="epoch", values="dice")
    return table[sorted(table, key=int)].dropna()


def epochs_of(table: pd.DataFrame) -> list[str]:
    return [e for e in table if e != SCRATCH]


def centred(dice: np.ndarray) -> np.ndarray:
    """Without the level of each curve and without what all curves share."""
    level = dice - dice.mean(1, keepdims=True)
    result: np.ndarray = level - level.mean(0)
    return result


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def mean_and_error(values: pd.Series) -> str:
    """Of means over targets."""
    means = values.groupby(level="dataset").mean()
    # no -0.00
    return f"{round(means.mean(), 2) + 0:.2f} ± {means.std() / len(means) ** 0.5:.2f}"


if __name__ == "__main__":
    main()

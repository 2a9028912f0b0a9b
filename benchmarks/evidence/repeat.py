"""Does what is seen along one pretraining hold in its repeat, from another pretraining seed?

Curves of the same target, network and scheme are compared, of the training seeds that both tables have: Dice below the last epoch;
how curves agree beyond the course that all share; and what it loses to start in one from the epoch that was best in the other. Where a
choice or a correlation goes by Dice, it goes by half of the training seeds and is judged on the others, over all halves and both ways, so
that no draw of training cases stands on both sides. (Random weights are the same trainings in both tables.)

With tables of scores: what choosing by each loses against the last epoch in both; how many score better, beside how many would if the
scores belonged to other curves; and what the score that was best in the one gains in the other. Intervals are of 95 %, over targets.

    python benchmarks/evidence/repeat.py balanced.csv second_seed.csv -scores scores.csv.gz second_scores.csv.gz
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from trainings import below_last, by_training, epochs_of, read_scores, read_trainings, told

from mtl_nnunet.evaluation import argbest

CURVE = ["dataset", "encoder", "scheme"]
SHUFFLES = 1000
# which are shown however they do, each at the level that it has where none is named
SHOWN = (
    "contrastive:level=-1",
    "robustness:level=-2",
    "infonce:level=-1",
    "ccfv:level=all",
    "probe:level=all",
    "knn:level=-1",
    "rankme:level=-1",
    "tree:level=all",
    "tree:pixels=boundary,level=all",
    "knn:pixels=boundary,level=all",
    "ccfv:pixels=boundary,level=all",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("repeat", type=Path)
    parser.add_argument("-scores", type=Path, nargs="+", default=[], help="of the runs of both tables")
    args = parser.parse_args()
    tables = [read_trainings(path) for path in (args.first, args.repeat)]
    scores = read_scores(args.scores) if args.scores else None
    for state in sorted(set(tables[0]["state"]) & set(tables[1]["state"])):
        first, repeat = (by_training(t[t["state"] == state]) for t in tables)
        runs = [set(t.index.unique("run")) for t in (first, repeat)]
        first, repeat = (t.droplevel("run") for t in (first, repeat))
        shared = first.index.intersection(repeat.index)
        first, repeat = first.loc[shared].sort_index(), repeat.loc[shared].sort_index()
        if first.empty:
            raise SystemExit(f"encoder {state}: the tables share no curve and training seed")
        seeds = ", ".join(map(str, first.index.unique("seed")))
        print(f"\n## encoder {state}: {first.groupby(level=CURVE).ngroups} curves, training seeds {seeds}\n")
        report_courses(first, repeat)
        report_agreement(first, repeat)
        if scores is not None:
            report_scores(first, repeat, *(scores[scores["run"].isin(names)] for names in runs))


def report_courses(first: pd.DataFrame, repeat: pd.DataFrame) -> None:
    """Dice points below the last epoch."""
    below = [below_last(t) for t in (first, repeat)]
    for name, table in (("first", below[0]), ("repeat", below[1]), ("repeat less first", below[1] - below[0])):
        print(f"{name}: " + ", ".join(f"{epoch} {told(table[epoch])}" for epoch in table.columns[:-1]))


def report_agreement(first: pd.DataFrame, repeat: pd.DataFrame) -> None:
    """Correlations beyond the common course, and what the best epoch of the one loses in the other."""
    same, other, lost_in_same, lost_in_other = [], [], [], []
    for a, b in halves(first):
        for one, two in ((first, repeat), (repeat, first)):
            chosen, itself, again = of_seeds(one, a), of_seeds(one, b), of_seeds(two, b)
            same.append(correlation(chosen, itself))
            other.append(correlation(chosen, again))
            lost_in_same.append(lost_by_best(chosen, itself))
            lost_in_other.append(lost_by_best(chosen, again))
    if not same:
        print("one training seed is shared, so nothing can be chosen on some and judged on others")
        return
    print(
        f"correlation beyond the common course, of a run with itself by other trainings {np.mean(same):.2f}, with its repeat "
        f"{np.mean(other):.2f}"
    )
    for where, lost in (("the same run", lost_in_same), ("the repeat", lost_in_other)):
        print(
            f"best by some trainings, in others of {where}: {told(pd.concat(lost, axis=1).mean(axis=1))} below the last epoch"
        )


def halves(table: pd.DataFrame) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every way to part the training seeds in two, the smaller part first."""
    seeds = list(table.index.unique("seed"))
    for some in combinations(seeds, len(seeds) // 2):
        if some:
            yield some, tuple(s for s in seeds if s not in some)


def of_seeds(table: pd.DataFrame, seeds: tuple[int, ...]) -> pd.DataFrame:
    """Mean Dice of these training seeds, a row a curve, a column an epoch."""
    chosen: pd.DataFrame = table.loc[table.index.isin(seeds, level="seed"), epochs_of(table)]
    return chosen.groupby(level=CURVE).mean()


def correlation(one: pd.DataFrame, other: pd.DataFrame) -> float:
    """Of two tables, each without the level of its curves and without what they all share."""

    def beyond(table: pd.DataFrame) -> np.ndarray:
        level = table.sub(table.mean(axis=1), axis=0)
        return (level - level.mean()).to_numpy().ravel()

    return float(np.corrcoef(beyond(one), beyond(other))[0, 1])


def lost_by_best(chosen: pd.DataFrame, judged: pd.DataFrame) -> pd.Series:
    """Dice points that the best epoch of the one lies below the last in the other, by curve."""
    best = [argbest(row) for row in chosen.to_numpy()]
    dice = judged.to_numpy()
    return pd.Series(100 * (dice[:, -1] - dice[np.arange(len(dice)), best]), index=judged.index)


def report_scores(first: pd.DataFrame, repeat: pd.DataFrame, of_first: pd.DataFrame, of_repeat: pd.DataFrame) -> None:
    """What each score's choice gains on the last epoch, in Dice points."""
    everything = [of_seeds(t, tuple(t.index.unique("seed"))) for t in (first, repeat)]
    choices = [choices_of(s, t) for s, t in zip((of_first, of_repeat), everything, strict=True)]
    names = choices[0].index.intersection(choices[1].index)
    left = choices[0].index.symmetric_difference(choices[1].index)
    choices = [c.loc[names] for c in choices]
    gains = [gained(c, t) for c, t in zip(choices, everything, strict=True)]
    print(f"{len(names)} scores on all curves of both" + (f"; left out: {', '.join(left)}" if len(left) else ""))
    for name in (n for n in SHOWN if n in names):
        print(
            f"gain of `{name}` on the last epoch: first {told(gains[0].loc[name])}, repeat {told(gains[1].loc[name])}"
        )
    for where, choice, table, gain in zip(("first", "repeat"), choices, everything, gains, strict=True):
        best, ahead = by_luck(choice, table)
        means = gain.mean(axis=1)
        print(
            f"{where}: best of all {means.max():.2f} ({means.idxmax()}), {int((means > 0).sum())} above the last epoch; with scores of "
            f"other curves {best.mean():.2f} [{np.quantile(best, 0.025):.2f}, {np.quantile(best, 0.975):.2f}] and {ahead.mean():.0f} "
            f"[{np.quantile(ahead, 0.025):.0f}, {np.quantile(ahead, 0.975):.0f}]"
        )
    order = gains[0].mean(axis=1).corr(gains[1].mean(axis=1), method="spearman")
    print(f"mean gains of scores in both: Spearman {order:.2f}")
    there = []
    for a, b in halves(first):
        for one, two, table, other in ((0, 1, first, repeat), (1, 0, repeat, first)):
            top = gained(choices[one], of_seeds(table, a)).mean(axis=1).idxmax()
            there.append(gained(choices[two].loc[[top]], of_seeds(other, b)).loc[top])
    if there:
        print(f"the score that is best in one, in the other: {told(pd.concat(there, axis=1).mean(axis=1))}")


def choices_of(scores: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Index of the epoch that each score takes, a row a score that all curves have, a column a curve."""
    values = scores.pivot_table(index=["score", *CURVE], columns="epoch", values="value")
    values = values.reindex(columns=list(curves)).dropna()
    result = {}
    for name, table in values.groupby(level="score"):
        table = table.droplevel("score")
        if curves.index.isin(table.index).all():
            result[name] = [argbest(row) for row in table.loc[curves.index].to_numpy()]
    return pd.DataFrame(result, index=curves.index).T


def gained(choices: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Dice points of the choices above the last epoch, a row a score, a column a curve."""
    dice = curves.to_numpy()
    found = 100 * (dice[np.arange(len(dice)), choices.to_numpy()] - dice[:, -1])
    return pd.DataFrame(found, index=choices.index, columns=choices.columns)


def by_luck(choices: pd.DataFrame, curves: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Gain of the best score and number above the last epoch, when each curve gets the scores of another drawn at random."""
    gain = 100 * (curves.to_numpy() - curves.to_numpy()[:, -1:])
    chosen, rng = choices.to_numpy(), np.random.default_rng(0)
    means = np.stack([gain[rng.permutation(len(gain)), chosen].mean(axis=1) for _ in range(SHUFFLES)])
    return means.max(axis=1), (means > 0).sum(axis=1)


if __name__ == "__main__":
    main()

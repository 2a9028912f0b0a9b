"""How Dice runs along a pretraining, how much curves differ in it beyond luck, and what the schedule does.

Of each state: Dice points below the last epoch, mean of the curves and standard error over targets, and target by target; how much
curves differ in that (their variance less that of the mean of the seeds) beside the noise of a single training; in how many curves
epochs differ, by an F test (checkpoint + seed, 5 %), by best and worst two standard errors apart, and by an earlier epoch two standard
errors above the last; and Dice by the one schedule less that by the other. With a table of shorter trainings, how well the orders of
checkpoints agree; with one that has trainings from averaged weights, what these gain on the last epoch, seed by seed.

    python benchmarks/evidence/courses.py balanced.csv -shorter downstream_80.csv -averages downstream.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from repeat import by_epoch, epochs_of, mean_and_error
from scipy import stats

from mtl_nnunet.curves import AVERAGE, SCRATCH

CURVE = ["dataset", "encoder", "scheme", "run"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-shorter", type=Path, help="table of shorter trainings of the same curves")
    parser.add_argument("-averages", type=Path, help="table with trainings from averaged weights")
    args = parser.parse_args()
    table, shorter, averages = (
        None if path is None else pd.read_csv(path, dtype={"epoch": str})
        for path in (args.table, args.shorter, args.averages)
    )
    for state, rows in table.groupby("state"):
        dice = by_training(rows)
        curves, seeds = dice.groupby(level=CURVE).ngroups, dice.index.unique("seed")
        print(f"\n## encoder {state}: {curves} curves, {len(seeds)} seeds\n")
        below = 100 * dice.rsub(dice.iloc[:, -1], axis=0)
        report_course(below)
        if len(seeds) > 1:
            print(f"\n| | {' | '.join(below.columns[:-1])} |\n{'|---' * below.shape[1]}|")
            parts = [variation(below[epoch].unstack("seed")) for epoch in below.columns[:-1]]
            print("| curves differ by (standard deviation) | " + " | ".join(f"{own:.1f}" for own, _ in parts) + " |")
            print("| noise of one training | " + " | ".join(f"{noise:.1f}" for _, noise in parts) + " |\n")
            report_tests(dice[epochs_of(dice)])
        report_schedules(dice[epochs_of(dice)])
        if shorter is not None:
            report_orders(rows, shorter[shorter["state"] == state])
        if averages is not None:
            report_averages(averages[averages["state"] == state])


def by_training(rows: pd.DataFrame) -> pd.DataFrame:
    """Dice, a row a curve and seed; random weights of the same target, network and seed first, then epochs in their order."""
    of_runs = rows[rows["epoch"] != SCRATCH].pivot_table(index=[*CURVE, "seed"], columns="epoch", values="dice")
    of_runs = of_runs[sorted(of_runs, key=int)].dropna()
    scratch = rows[rows["epoch"] == SCRATCH].set_index(["dataset", "encoder", "seed"])["dice"]
    of_runs.insert(0, SCRATCH, [scratch[dataset, encoder, seed] for dataset, encoder, *_, seed in of_runs.index])
    return of_runs


def report_course(below: pd.DataFrame) -> None:
    columns = below.columns[:-1]
    print(f"| below the last epoch | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    print("| mean | " + " | ".join(mean_and_error(below[epoch]) for epoch in columns) + " |")
    for target, part in below.groupby(level="dataset"):
        print(f"| {target} | " + " | ".join(f"{part[epoch].mean():.1f}" for epoch in columns) + " |")


def variation(by_seed: pd.DataFrame) -> tuple[float, float]:
    """Standard deviations of what curves (rows) are whatever the seed (columns), and of one seed about that.

    Examples:
        >>> variation(pd.DataFrame([[1.0, 3.0], [5.0, 7.0]]))
        (2.6457513110645907, 1.4142135623730951)
    """
    noise = float(by_seed.var(axis=1, ddof=1).mean())
    own = float(by_seed.mean(axis=1).var(ddof=1)) - noise / by_seed.shape[1]
    return max(own, 0.0) ** 0.5, noise**0.5


def report_tests(dice: pd.DataFrame) -> None:
    found = np.array([differ(100 * curve.to_numpy()) for _, curve in dice.groupby(level=CURVE)])
    differing, apart, ahead = (int(n) for n in found.sum(axis=0))
    print(
        f"epochs differ: by the F test in {differing} of {len(found)} curves, best and worst by two standard errors in {apart}; "
        f"an earlier one beats the last by two in {ahead}"
    )


def differ(dice: np.ndarray) -> tuple[bool, bool, bool]:
    """Whether epochs differ by the F test, best and worst by two standard errors, and the best from the last; shape (S, K)."""
    seeds, epochs = dice.shape
    mean = dice.mean(0)
    rest = dice - mean - dice.mean(1, keepdims=True) + dice.mean()
    noise = (rest**2).sum() / ((seeds - 1) * (epochs - 1))
    ratio = seeds * mean.var(ddof=1) / noise
    error = (2 * noise / seeds) ** 0.5
    return (
        bool(stats.f.sf(ratio, epochs - 1, (seeds - 1) * (epochs - 1)) < 0.05),
        bool(mean.max() - mean.min() > 2 * error),
        bool(mean.max() - mean[-1] > 2 * error),
    )


def report_schedules(dice: pd.DataFrame) -> None:
    first, second = sorted(dice.index.unique("scheme"))[:2]
    means = 100 * dice.groupby(level=["dataset", "encoder", "scheme"]).mean()
    gain = means.xs(first, level="scheme") - means.xs(second, level="scheme")
    print(f"{first} less {second}: " + ", ".join(f"{epoch} {mean_and_error(gain[epoch])}" for epoch in gain))


def report_orders(rows: pd.DataFrame, shorter: pd.DataFrame) -> None:
    """Mean Spearman correlation over curves of the seed of the shorter trainings with the other seeds of the longer ones."""
    seed = shorter["seed"].mode()[0]
    one = by_epoch(shorter[(shorter["seed"] == seed) & shorter["epoch"].isin(rows["epoch"])], CURVE)
    same, others = (by_epoch(rows[(rows["seed"] == seed) == is_same], CURVE) for is_same in (True, False))
    for name, table in (("of one seed", same), ("shorter", one)):
        shared = table.index.intersection(others.index)
        order = [table.loc[c].corr(others.loc[c, table.columns], method="spearman") for c in shared]
        print(
            f"order of epochs by trainings {name} and by those of other seeds, {len(shared)} curves: Spearman {np.mean(order):.2f}"
        )


def report_averages(rows: pd.DataFrame) -> None:
    """Dice points over the last epoch, by pairs of the same seed; each schedule."""
    dice = 100 * rows[rows["epoch"] != SCRATCH].pivot_table(index=[*CURVE, "seed"], columns="epoch", values="dice")
    averages = [epoch for epoch in dice if epoch.startswith(AVERAGE)]
    last = max((epoch for epoch in dice if epoch not in averages), key=int)
    for name in averages:
        gain = (dice[name] - dice[last]).dropna()
        by_scheme = ", ".join(f"{scheme} {mean_and_error(part)}" for scheme, part in gain.groupby(level="scheme"))
        curves, seeds = gain.groupby(level=CURVE).ngroups, gain.index.unique("seed")
        print(f"{name} less the last epoch, {curves} curves, {len(seeds)} seeds: {mean_and_error(gain)}; {by_scheme}")


if __name__ == "__main__":
    main()

"""How Dice runs along a pretraining, how much curves differ in it beyond luck, and what the schedule does.

Of each state: Dice points below the last epoch, over targets and target by target; how much curves differ in that (their variance less
that of the mean of the seeds) beside the noise of a single training; in how many curves epochs differ, by an F test (checkpoint + seed,
5 %), by best and worst two standard errors apart, and by an earlier epoch two standard errors above the last; what the last epoch seems to
lose against the best; each beside what luck alone would give if all curves of a target had one course; Dice by the one schedule less that by
the other; and how well one training agrees with the others on the order of epochs, beside the epochs themselves. With a table of
shorter trainings, how well those agree; with one of averaged weights, what these gain on the last epoch, seed by seed; with one of
random weights by another recipe, what every epoch gains on those; with one of pretrained weights by another recipe, what these gain
by it and on random weights, and how they run by it. Intervals are of 95 %, over targets.

    python benchmarks/evidence/courses.py balanced.csv -shorter downstream_80.csv -averages downstream.csv -scratch layer_decay.csv -recipe no_layer_decay.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from trainings import CURVE, below_last, by_training, epochs_of, read_trainings, told

from mtl_nnunet.chooser_fit import seed_residuals
from mtl_nnunet.curves import AVERAGE, SCRATCH

DRAWS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-shorter", type=Path, help="table of shorter trainings of the same curves")
    parser.add_argument("-averages", type=Path, help="table with trainings from averaged weights")
    parser.add_argument("-scratch", type=Path, help="table with trainings from random weights by another recipe")
    parser.add_argument("-recipe", type=Path, help="table with trainings from pretrained weights by another recipe")
    args = parser.parse_args()
    table, shorter, averages, scratch, recipe = (
        None if path is None else read_trainings(path)
        for path in (args.table, args.shorter, args.averages, args.scratch, args.recipe)
    )
    for state, rows in table.groupby("state"):
        dice = by_training(rows)
        curves, seeds = dice.groupby(level=CURVE).ngroups, dice.index.unique("seed")
        print(f"\n## encoder {state}: {curves} curves, {len(seeds)} seeds\n")
        below = below_last(dice)
        report_course(below)
        dice = 100 * dice[epochs_of(dice)]
        if len(seeds) > 1:
            report_variation(below)
            report_luck(dice)
            report_orders(dice)
        report_schedules(dice)
        if shorter is not None:
            report_shorter(dice, by_training(whole_seed(shorter[shorter["state"] == state]), with_scratch=False))
        if averages is not None:
            report_averages(averages[averages["state"] == state])
        if scratch is not None and state in set(scratch["state"]):
            report_scratch(rows, scratch[scratch["state"] == state])
        if recipe is not None and state in set(recipe["state"]):
            report_recipe(rows, recipe[recipe["state"] == state])


def report_course(below: pd.DataFrame) -> None:
    columns = below.columns[:-1]
    print(f"| below the last epoch | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    print("| mean | " + " | ".join(told(below[epoch]) for epoch in columns) + " |")
    for target, part in below.groupby(level="dataset"):
        print(f"| {target} | " + " | ".join(f"{part[epoch].mean():.1f}" for epoch in columns) + " |")


def report_variation(below: pd.DataFrame) -> None:
    columns = below.columns[:-1]
    tables = [below[epoch].unstack("seed") for epoch in columns]
    found = [variation(table) for table in tables]
    print(f"\n| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    own = (
        f"{deviation:.1f} [{', '.join(f'{x:.1f}' for x in own_interval(table))}]"
        for (deviation, _), table in zip(found, tables, strict=True)
    )
    print(f"| curves differ by (standard deviation) | {' | '.join(own)} |")
    print(f"| noise of one training | {' | '.join(f'{noise:.1f}' for _, noise in found)} |\n")


def variation(by_seed: pd.DataFrame) -> tuple[float, float]:
    """Standard deviations of what curves (rows) are whatever the seed (columns), and of one seed about that.

    Examples:
        >>> variation(pd.DataFrame([[1.0, 3.0], [5.0, 7.0]]))
        (2.6457513110645907, 1.4142135623730951)
    """
    noise = float(by_seed.var(axis=1, ddof=1).mean())
    own = float(by_seed.mean(axis=1).var(ddof=1)) - noise / by_seed.shape[1]
    return max(own, 0.0) ** 0.5, noise**0.5


def own_interval(by_seed: pd.DataFrame) -> tuple[float, float]:
    """95 % bootstrap interval of the first of ``variation``; targets are drawn."""
    parts = [part for _, part in by_seed.groupby(level="dataset")]
    rng = np.random.default_rng(0)
    drawn = (pd.concat([parts[i] for i in rng.integers(0, len(parts), len(parts))]) for _ in range(DRAWS))
    low, high = np.quantile([variation(table)[0] for table in drawn], [0.025, 0.975])
    return float(low), float(high)


def report_luck(dice: pd.DataFrame) -> None:
    """Counts of curves whose epochs differ, and what the last seems to lose, beside what luck alone gives."""
    curves = [curve.to_numpy() for _, curve in dice.groupby(level=CURVE)]
    names = [name[0] for name, _ in dice.groupby(level=CURVE)]
    found, lucky = np.mean([looks(c) for c in curves], axis=0), by_luck(curves, names)
    low, high = np.quantile(lucky, [0.025, 0.975], axis=0)
    words = (
        "epochs differ by the F test",
        "best and worst are two standard errors apart",
        "an earlier epoch is two standard errors above the last",
    )
    n = len(curves)
    for i, name in enumerate(words):
        print(
            f"{name}: {n * found[i]:.0f} of {n} curves; by luck {n * lucky[:, i].mean():.1f} [{n * low[i]:.0f}, {n * high[i]:.0f}]"
        )
    print(
        f"the last epoch seems to lose against the best {found[3]:.2f}; by luck {lucky[:, 3].mean():.2f} [{low[3]:.2f}, {high[3]:.2f}]"
    )


def looks(dice: np.ndarray) -> tuple[bool, bool, bool, float]:
    """Whether epochs differ by the F test, best and worst by two standard errors, and the best from the last; what the last loses.

    Args:
        dice: Shape (S, K).
    """
    seeds, epochs = dice.shape
    mean, noise = dice.mean(0), residual_variance(dice)
    error = (2 * noise / seeds) ** 0.5
    ratio = seeds * mean.var(ddof=1) / noise
    return (
        bool(stats.f.sf(ratio, epochs - 1, (seeds - 1) * (epochs - 1)) < 0.05),
        bool(mean.max() - mean.min() > 2 * error),
        bool(mean.max() - mean[-1] > 2 * error),
        float(mean.max() - mean[-1]),
    )


def residual_variance(dice: np.ndarray) -> float:
    """Of Dice = checkpoint + seed + rest, the variance of the rest, shape (S, K)."""
    seeds, epochs = dice.shape
    return float((seed_residuals(dice) ** 2).sum() / ((seeds - 1) * (epochs - 1)))


def noise_shape(curves: list[np.ndarray]) -> np.ndarray:
    """Covariance of the seeds over the epochs, of all curves scaled to one variance, without the level, shape (K, K).

    Examples:
        >>> noise_shape([np.array([[0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])]).round(2)
        array([[ 0.33,  0.33, -0.67],
               [ 0.33,  0.33, -0.67],
               [-0.67, -0.67,  1.33]])
    """
    shapes = [seed_residuals(c).T @ seed_residuals(c) / (len(c) - 1) / residual_variance(c) for c in curves]
    mean: np.ndarray = np.mean(shapes, axis=0)
    return mean


def by_luck(curves: list[np.ndarray], targets: list[str]) -> np.ndarray:
    """Means of ``looks`` over simulated curves that have the mean course of their target and their own noise, shape (DRAWS, 4).

    Noise has each curve's own size and one covariance over the epochs, that of all curves' seeds: a draw of training cases that
    suits one epoch suits its neighbours, so that these are closer, and the ends further apart, than independent noise would put
    them. Curves are drawn one by one, though those of a target share their draws of cases.
    """
    rng = np.random.default_rng(0)
    courses = {
        t: np.mean([c.mean(0) for c, name in zip(curves, targets, strict=True) if name == t], axis=0) for t in targets
    }
    shape = noise_shape(curves)
    simulated = [
        courses[t] + residual_variance(c) ** 0.5 * rng.multivariate_normal(np.zeros(len(shape)), shape, (DRAWS, len(c)))
        for c, t in zip(curves, targets, strict=True)
    ]
    return np.array([np.mean([looks(c[draw]) for c in simulated], axis=0) for draw in range(DRAWS)])


def report_orders(dice: pd.DataFrame) -> None:
    """Mean Spearman correlation over curves of one seed, and of the epochs, with the mean of the other seeds."""
    seeds = dice.index.unique("seed")
    of_one, of_epochs = [], []
    for seed in seeds:
        is_one = dice.index.get_level_values("seed") == seed
        others = dice[~is_one].groupby(level=CURVE).mean()
        of_one.append(rank_agreement(dice[is_one].droplevel("seed"), others))
        of_epochs.append(rank_agreement(others * 0 + np.arange(dice.shape[1]), others))
    print(
        f"order of epochs: one training agrees with {len(seeds) - 1} others by a Spearman correlation of "
        f"{told(pd.concat(of_one, axis=1).mean(axis=1))}, the epochs themselves by {told(pd.concat(of_epochs, axis=1).mean(axis=1))}"
    )


def rank_agreement(one: pd.DataFrame, other: pd.DataFrame) -> pd.Series:
    """Spearman correlation of each curve that both tables have."""
    shared = one.index.intersection(other.index)
    return pd.Series([one.loc[c].corr(other.loc[c, one.columns], method="spearman") for c in shared], index=shared)


def report_schedules(dice: pd.DataFrame) -> None:
    schemes = sorted(dice.index.unique("scheme"))
    if len(schemes) < 2:
        return
    means = dice.groupby(level=["dataset", "encoder", "scheme", "seed"]).mean()
    gain = means.xs(schemes[0], level="scheme") - means.xs(schemes[1], level="scheme")
    print(f"{schemes[0]} less {schemes[1]}: " + ", ".join(f"{epoch} {told(gain[epoch])}" for epoch in gain))


def whole_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """The trainings of the seed that has most of them."""
    return rows[rows["seed"] == rows["seed"].mode()[0]]


def report_shorter(dice: pd.DataFrame, shorter: pd.DataFrame) -> None:
    """How well shorter trainings of one seed agree with the longer ones of the other seeds."""
    (seed,) = shorter.index.unique("seed")
    others = dice[dice.index.get_level_values("seed") != seed].groupby(level=CURVE).mean()
    if others.empty:
        return
    one = shorter.droplevel("seed")[list(others)]
    print(
        f"order of epochs: shorter trainings of seed {seed} agree with longer ones of others by {told(rank_agreement(one, others))}"
    )


def report_averages(rows: pd.DataFrame) -> None:
    """Dice points over the last epoch, by pairs of the same seed; of the seeds that all targets have."""
    dice = 100 * rows[rows["epoch"] != SCRATCH].pivot_table(index=[*CURVE, "seed"], columns="epoch", values="dice")
    last = max((epoch for epoch in dice if not epoch.startswith(AVERAGE)), key=int)
    for name in (epoch for epoch in dice if epoch.startswith(AVERAGE)):
        gain = (dice[name] - dice[last]).dropna()
        whole = gain.groupby(level="seed").transform("size") == gain.groupby(level="seed").size().max()
        if gain[whole].index.unique("dataset").size < rows["dataset"].nunique():
            continue
        gain = gain[whole]
        by_scheme = ", ".join(f"{scheme} {told(part)}" for scheme, part in gain.groupby(level="scheme"))
        curves, seeds = gain.groupby(level=CURVE).ngroups, gain.index.unique("seed")
        print(f"{name} less the last epoch, {curves} curves, {len(seeds)} seeds: {told(gain)}; {by_scheme}")


def report_scratch(rows: pd.DataFrame, scratch: pd.DataFrame) -> None:
    """What random weights by their own recipe, and every epoch, gain on random weights by the other; by pairs of the same seed."""
    by = ["dataset", "encoder", "seed"]
    other = scratch[scratch["epoch"] == SCRATCH].set_index(by)["dice"]
    dice = rows.pivot_table(index=by, columns="epoch", values="dice").loc[other.index]
    gain = 100 * dice[[SCRATCH, *sorted(epochs_of(dice), key=int)]].sub(other, axis=0)
    print("gain on random weights by the other recipe: " + ", ".join(f"{epoch} {told(gain[epoch])}" for epoch in gain))


def report_recipe(rows: pd.DataFrame, recipe: pd.DataFrame) -> None:
    """What pretrained weights gain by another recipe, and what they then gain on random weights; by pairs of the same seed."""
    dice = by_training(recipe, with_scratch=False)
    usual = by_training(rows).loc[dice.index]
    curves, seeds = dice.groupby(level=CURVE).ngroups, dice.index.unique("seed")
    print(f"by another recipe, {curves} curves, {len(seeds)} seeds:")
    print("gain by it: " + ", ".join(f"{e} {told(100 * (dice[e] - usual[e]))}" for e in dice))
    gain = 100 * dice.sub(usual[SCRATCH], axis=0)
    print("gain on random weights by their own: " + ", ".join(f"{e} {told(gain[e])}" for e in gain))
    for name, table in (("by it", dice), ("by the usual one, same seeds", usual[list(dice)])):
        below = below_last(table)
        print(f"below the last epoch {name}: " + ", ".join(f"{e} {told(below[e])}" for e in below.columns[:-1]))


if __name__ == "__main__":
    main()

"""Which network or recipe to start from: the last checkpoints of several runs, chosen among by a score.

For each state and target the candidates are the ends of all runs; what is lost is Dice against the best of them, means over seeds.
A score chooses by its value alone, as ``-rule best`` does among published weights, so its values have to be comparable between networks.
Beside it: any candidate, the one that is best on the other targets, the best logged accuracy, and the score that loses least
on the other targets. Intervals resample targets.

    python benchmarks/evidence/across_runs.py balanced.csv scores.csv.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from mtl_nnunet.curves import SCRATCH

DRAWS = 10_000
# each at the level that it has where none is named
SHOWN = (
    *(f"{name}:level=-1" for name in ("contrastive", "infonce", "rankme", "alignment")),
    "robustness:level=-2",
    *(f"{name}:level=all" for name in ("ccfv", "logme", "hscore", "knn", "probe", "gbc")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("downstream", type=Path)
    parser.add_argument("scores", type=Path)
    args = parser.parse_args()
    downstream = pd.read_csv(args.downstream)
    downstream = downstream[downstream["epoch"] != SCRATCH].astype({"epoch": int})
    last = downstream[downstream["epoch"] == downstream["epoch"].max()]
    scores = pd.read_csv(args.scores)
    scores = scores[scores["epoch"].astype(str) == str(last["epoch"].iloc[0])]
    values = np.where(scores["higher_is_better"] == 1, scores["value"], -scores["value"])
    by_score = {
        name: part.pivot(index="dataset", columns="run", values="oriented")
        for name, part in scores.assign(oriented=values).groupby("score")
    }
    for state, rows in last.groupby("state"):
        dice = 100 * rows.pivot_table(index="dataset", columns="run", values="dice")
        accuracy = rows.pivot_table(index="dataset", columns="run", values="accuracy")
        seeds = rows["seed"].nunique()
        print(f"\n## encoder {state}: {dice.shape[1]} runs, {dice.shape[0]} targets, {seeds} seeds\n")
        print(f"noise of a mean of {seeds} seeds: {noise(rows):.1f} points; best minus worst run: {spread(dice):.1f}\n")
        report(dice, accuracy, {n: v.loc[dice.index, dice.columns] for n, v in by_score.items() if set(dice) <= set(v)})


def report(dice: pd.DataFrame, accuracy: pd.DataFrame, by_score: dict[str, pd.DataFrame]) -> None:
    """One row a way of choosing: mean loss in Dice points, and its interval."""
    best = dice.max(axis=1)
    others = {t: dice.drop(index=t).mean().idxmax() for t in dice.index}
    losses = {
        "any run": best - dice.mean(axis=1),
        "the run that is best on the other targets": best - pd.Series({t: dice.loc[t, r] for t, r in others.items()}),
        "best ImageNet accuracy": lost(dice, accuracy),
    }
    whole = {name: lost(dice, v) for name, v in by_score.items() if not v.isna().any(axis=None)}
    table = pd.DataFrame(whole)
    chosen = {t: table.drop(index=t).mean().idxmin() for t in table.index}
    losses["score that is best on the other targets"] = pd.Series({t: table.loc[t, s] for t, s in chosen.items()})
    for name in SHOWN:
        losses[f"`{name}`"] = table[name]
    losses[f"best of {table.shape[1]} in hindsight: `{table.mean().idxmin()}`"] = table[table.mean().idxmin()]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(best), (DRAWS, len(best)))
    print("| chosen by | mean loss |\n|---|---|")
    for name, loss in losses.items():
        low, high = np.percentile(loss.to_numpy()[draws].mean(axis=1), [2.5, 97.5])
        print(f"| {name} | {loss.mean():.2f} [{low:.2f}, {high:.2f}] |")
    better = (table.mean() < losses["any run"].mean()).sum()
    print(f"\n{better} of {table.shape[1]} variants lose less than any run does on average.")


def lost(dice: pd.DataFrame, values: pd.DataFrame) -> pd.Series:
    """What the candidate of the largest value loses on each target; of equals the mean."""
    is_top = values.eq(values.max(axis=1), axis=0)
    return dice.max(axis=1) - dice.where(is_top).mean(axis=1)


def noise(rows: pd.DataFrame) -> float:
    """Standard error of the mean of a run's seeds, what all runs share in a seed taken off."""
    table = 100 * rows.pivot_table(index=["dataset", "run"], columns="seed", values="dice")
    rest = table.sub(table.mean(axis=1), axis=0)
    rest -= rest.groupby("dataset").transform("mean")
    runs, seeds = rows["run"].nunique(), table.shape[1]
    freedom = rows["dataset"].nunique() * (runs - 1) * (seeds - 1)
    return float(np.sqrt((rest**2).to_numpy().sum() / freedom / seeds))


def spread(dice: pd.DataFrame) -> float:
    return float((dice.max(axis=1) - dice.min(axis=1)).mean())


if __name__ == "__main__":
    main()

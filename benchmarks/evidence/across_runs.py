"""Which network or recipe to start from: the last checkpoints of several runs, chosen among by a score.

For each state and target the candidates are the ends of the runs of one pretraining seed; what is lost is Dice against the best of
them, means over training seeds. A score chooses by its value alone, as ``-rule best`` does among published weights, so its values have
to be comparable between networks; each is tried too less its value on random weights of the network. Beside it: any candidate, the one
that is best on the other targets, the best logged accuracy, and the score that loses least on the other targets. Of a second pretraining
seed also the score and the network that were best in the first. Intervals resample targets.

    python benchmarks/evidence/across_runs.py balanced.csv scores.csv.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from repeat import FIRST, seed_of

from mtl_nnunet.curves import RANDOM, SCRATCH

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
    parser.add_argument("scores", type=Path, nargs="+")
    args = parser.parse_args()
    downstream = pd.read_csv(args.downstream)
    downstream = downstream[downstream["epoch"] != SCRATCH].astype({"epoch": int})
    last = downstream[downstream["epoch"] == downstream["epoch"].max()]
    scores = pd.concat(pd.read_csv(path, dtype={"epoch": str}) for path in args.scores)
    for state, of_state in last.groupby("state"):
        losses = {}
        for seed, rows in of_state.groupby(seed_of(of_state)):
            # the same names in both pretraining seeds
            rows = rows.assign(run=rows["encoder"] + " " + rows["scheme"])
            dice = 100 * rows.pivot_table(index="dataset", columns="run", values="dice")
            accuracy = rows.pivot_table(index="dataset", columns="run", values="accuracy")
            seeds = rows["seed"].nunique()
            print(
                f"\n## encoder {state}, pretraining seed {seed}: {dice.shape[1]} runs, {dice.shape[0]} targets, {seeds} seeds\n"
            )
            if seeds > 1:
                print(
                    f"noise of a mean of {seeds} seeds: {noise(rows):.1f} points; best minus worst run: {spread(dice):.1f}\n"
                )
            by_score = values_at_end(scores[seed_of(scores) == seed], str(last["epoch"].iloc[0]), dice)
            losses[seed] = (dice, report(dice, accuracy, by_score, losses.get(FIRST)))


def values_at_end(scores: pd.DataFrame, epoch: str, dice: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By score that all candidates have, higher is better: a row a target, a column a run; as it is and less random weights'."""
    oriented = scores["value"].where(scores["higher_is_better"] == 1, -scores["value"])
    scores = scores.assign(value=oriented, run=scores["encoder"] + " " + scores["scheme"])
    end, random = (
        scores[scores["epoch"] == e].pivot_table(index=["score", "dataset"], columns="run", values="value")
        for e in (epoch, RANDOM)
    )
    tables = {}
    for values, of_what in ((end, "{}"), (end - random, "{} less random weights")):
        for name, table in values.groupby(level="score"):
            table = table.droplevel("score").reindex(index=dice.index, columns=dice.columns)
            if not table.isna().any(axis=None):
                tables[of_what.format(name)] = table
    return tables


def report(
    dice: pd.DataFrame,
    accuracy: pd.DataFrame,
    by_score: dict[str, pd.DataFrame],
    first: tuple[pd.DataFrame, pd.DataFrame] | None,
) -> pd.DataFrame:
    """One row a way of choosing: mean loss in Dice points, and its interval; returns what each score loses on each target.

    Args:
        dice: A row a target, a column a run.
        accuracy: The same.
        by_score: The same of each score.
        first: Dice and losses by score of the runs of another pretraining seed.
    """
    best = dice.max(axis=1)
    others = {t: dice.drop(index=t).mean().idxmax() for t in dice.index}
    table = pd.DataFrame({name: lost(dice, values) for name, values in by_score.items()})
    losses = {
        "any run": best - dice.mean(axis=1),
        "the run that is best on the other targets": best - pd.Series({t: dice.loc[t, r] for t, r in others.items()}),
        "best ImageNet accuracy": lost(dice, accuracy),
    }
    if first is not None:
        of_first, by_first = first
        losses["the run of the network and schedule that were best on this target in the first seed"] = (
            best - pd.Series({t: dice.loc[t, of_first.loc[t].idxmax()] for t in dice.index})
        )
        losses["the network and schedule that were best on all targets there"] = best - dice[of_first.mean().idxmax()]
        top = by_first.mean().idxmin()
        if top in table:
            losses[f"the score that was best there: `{top}`"] = table[top]
    if not table.empty:
        chosen = {t: table.drop(index=t).mean().idxmin() for t in table.index}
        losses["score that is best on the other targets"] = pd.Series({t: table.loc[t, s] for t, s in chosen.items()})
        for name in SHOWN:
            losses |= {f"`{n}`": table[n] for n in (name, f"{name} less random weights") if n in table}
        losses[f"best of {table.shape[1]} in hindsight: `{table.mean().idxmin()}`"] = table[table.mean().idxmin()]
    draws = np.random.default_rng(0).integers(0, len(best), (DRAWS, len(best)))
    print("| chosen by | mean loss |\n|---|---|")
    for name, loss in losses.items():
        low, high = np.percentile(loss.to_numpy()[draws].mean(axis=1), [2.5, 97.5])
        print(f"| {name} | {loss.mean():.2f} [{low:.2f}, {high:.2f}] |")
    better = (table.mean() < losses["any run"].mean()).sum()
    print(f"\n{better} of {table.shape[1]} variants lose less than any run does on average.")
    if first is not None and not table.empty:
        both = pd.DataFrame({"first": first[1].mean(), "second": table.mean()}).dropna()
        print(
            f"mean losses of {len(both)} variants in both seeds: Spearman {both.corr(method='spearman').iloc[0, 1]:.2f}."
        )
    return table


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

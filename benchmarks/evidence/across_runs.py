"""Which network or recipe to start from: the last checkpoints of several runs, chosen among by a score.

For each state and target the candidates are the ends of all runs of a table; what is lost is Dice against the best of them, means over
training seeds, and against a run taken at random. A score chooses by its value alone, as ``-rule best`` does among published weights, so its
values have to be comparable between networks; each is tried too less its value on random weights of the network (one draw of them).
Beside it: the run that is best on the other targets, the best logged accuracy, and the score that loses least on the other targets. With a
second table, of another pretraining seed, also what was best in the first. Intervals are of 95 %, over targets.

    python benchmarks/evidence/across_runs.py balanced.csv second_seed.csv -scores scores.csv.gz second_scores.csv.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from courses import residual_variance
from trainings import by_training, epochs_of, read_scores, read_trainings, told

from mtl_nnunet.curves import RANDOM

DRAWS = 10_000
# each at the level that it has where none is named
SHOWN = (
    *(f"{name}:level=-1" for name in ("contrastive", "infonce", "rankme", "alignment")),
    "robustness:level=-2",
    *(f"{name}:level=all" for name in ("ccfv", "logme", "hscore", "knn", "probe", "gbc")),
    "probe:level=-4",
    "knn:level=-4",
    "tree:level=all",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("downstream", type=Path, nargs="+")
    parser.add_argument("-scores", type=Path, nargs="+", required=True)
    parser.add_argument(
        "-without", nargs=2, action="append", default=[], metavar=("TARGET", "SEED"), help="a seed of a target"
    )
    args = parser.parse_args()
    tables = [read_trainings(path) for path in args.downstream]
    scores = read_scores(args.scores)
    for state in sorted(set.intersection(*(set(t["state"]) for t in tables))):
        first = None
        for path, table in zip(args.downstream, tables, strict=True):
            of_state = table[table["state"] == state]
            trained = by_training(of_state, with_scratch=False)
            epoch = epochs_of(trained)[-1]
            rows = (100 * trained[epoch]).rename("dice").reset_index()
            for target, seed in args.without:
                rows = rows[(rows["dataset"] != target) | (rows["seed"] != int(seed))]
            rows = rows.assign(run=rows["encoder"] + " " + rows["scheme"])
            dice = rows.pivot_table(index="dataset", columns="run", values="dice")
            logged = of_state[of_state["epoch"] == epoch]
            accuracy = logged.assign(run=logged["encoder"] + " " + logged["scheme"]).pivot_table(
                index="dataset", columns="run", values="accuracy"
            )
            print(
                f"\n## encoder {state}, {path.name}: {dice.shape[1]} runs, {dice.shape[0]} targets, {rows['seed'].nunique()} seeds\n"
            )
            if rows["seed"].nunique() > 1:
                report_noise(rows, dice)
            own = scores[scores["run"].isin(trained.index.unique("run"))]
            first = (dice, report(dice, accuracy, values_at_end(own, epoch, dice), first))


def report_noise(rows: pd.DataFrame, dice: pd.DataFrame) -> None:
    """How far best and worst run lie apart, and how far they would if all runs were equal."""
    by_target = {target: noise(part) for target, part in rows.groupby("dataset")}
    apart = dice.max(axis=1) - dice.min(axis=1)
    rng = np.random.default_rng(0)
    width = float(np.ptp(rng.standard_normal((DRAWS, dice.shape[1])), axis=1).mean())
    print("noise of a mean: " + ", ".join(f"{target} {error:.1f}" for target, error in by_target.items()))
    print(f"best minus worst run: {apart.mean():.1f}; by noise alone {width * np.mean(list(by_target.values())):.1f}\n")


def values_at_end(scores: pd.DataFrame, epoch: str, dice: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By score that all candidates have, higher is better: a row a target, a column a run; as it is and less random weights'."""
    scores = scores.assign(run=scores["encoder"] + " " + scores["scheme"])
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
    print("| chosen by | mean loss | less than any run |\n|---|---|---|")
    for name, loss in losses.items():
        print(
            f"| {name} | {told(loss.rename_axis('dataset'))} | {told((losses['any run'] - loss).rename_axis('dataset'))} |"
        )
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
    """Standard error of the mean of a run's seeds on one target, what all runs share in a seed taken off."""
    table = rows.pivot_table(index="seed", columns="run", values="dice").to_numpy()
    return float((residual_variance(table) / len(table)) ** 0.5)


if __name__ == "__main__":
    main()

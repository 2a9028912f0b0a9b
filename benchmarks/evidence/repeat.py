"""Does what is seen along one pretraining hold in its repeat, from another seed?

Curves of the same target, network and scheme are compared: Dice below the last epoch in each table, how the two agree beyond the
course that all curves share, and what it loses to start in the repeat from the epoch that was best before. Errors are of means over
targets.

    python benchmarks/evidence/repeat.py balanced.csv second_seed.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from mtl_nnunet.curves import SCRATCH

CURVE = ["dataset", "encoder", "scheme"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("repeat", type=Path)
    parser.add_argument("-state", default="free")
    args = parser.parse_args()
    first, repeat = (curves_of(pd.read_csv(t, dtype={"epoch": str}), args.state) for t in (args.first, args.repeat))
    curves = first.index.intersection(repeat.index)
    first, repeat = first.loc[curves], repeat.loc[curves]
    print(
        f"{len(curves)} curves, encoder {args.state}: Dice points below the last epoch, mean and standard error over targets"
    )
    for name, table in (("first", first), ("repeat", repeat)):
        below = 100 * table.rsub(table.iloc[:, -1], axis=0)
        print(f"{name}: " + ", ".join(f"{epoch} {mean_and_error(below[epoch])}" for epoch in below))
    epochs = [e for e in first if e != SCRATCH]
    beyond = [centred(t[epochs].to_numpy()) for t in (first, repeat)]
    print(f"correlation beyond the common course: {np.corrcoef(*(b.ravel() for b in beyond))[0, 1]:.2f}")
    best = first[epochs].idxmax(axis=1)
    taken = pd.Series([repeat.loc[c, e] for c, e in best.items()], index=curves)
    print(
        f"the best epoch of the first, in the repeat: {mean_and_error(100 * (repeat[epochs[-1]] - taken))} below the last"
    )


def curves_of(table: pd.DataFrame, state: str) -> pd.DataFrame:
    """Mean Dice over seeds, a row a curve; random weights first, then epochs in their order."""
    rows = table[table["state"] == state]
    of_runs = rows[rows["epoch"] != SCRATCH].pivot_table(index=CURVE, columns="epoch", values="dice")
    of_runs = of_runs[sorted(of_runs, key=int)].dropna()
    seeds = set(rows.loc[rows["epoch"] != SCRATCH, "seed"])
    scratch = rows[(rows["epoch"] == SCRATCH) & rows["seed"].isin(seeds)].groupby(["dataset", "encoder"])["dice"].mean()
    of_runs.insert(0, SCRATCH, [scratch[d, e] for d, e, _ in of_runs.index])
    return of_runs


def centred(dice: np.ndarray) -> np.ndarray:
    """Without the level of each curve and without what all curves share."""
    level = dice - dice.mean(1, keepdims=True)
    result: np.ndarray = level - level.mean(0)
    return result


def mean_and_error(values: pd.Series) -> str:
    """Of means over targets."""
    means = values.groupby(level="dataset").mean()
    # no -0.00
    return f"{round(means.mean(), 2) + 0:.2f} ± {means.std() / len(means) ** 0.5:.2f}"


if __name__ == "__main__":
    main()

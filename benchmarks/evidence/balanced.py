"""The part of a table of downstream results in which every checkpoint has the same seeds.

Seeds draw training cases, and an easy draw lifts every checkpoint that it was trained with: means over different seeds do not
compare checkpoints. This keeps the epochs named and random weights, and of each state the seeds that every target, network and run
of the table has at all of them.

    python benchmarks/evidence/balanced.py downstream.csv balanced.csv -epochs 1 2 4 8 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from trainings import KEY

from mtl_nnunet.curves import SCRATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("-epochs", nargs="+", required=True)
    parser.add_argument("-runs", nargs="+", help="only of these runs; default all")
    args = parser.parse_args()
    table = pd.read_csv(args.table, dtype=str, keep_default_na=False)
    if args.runs is not None:
        if missing := set(args.runs) - set(table["run"]):
            raise SystemExit(f"{args.table} has no run {min(missing)}")
        table = table[table["run"].isin([*args.runs, ""])]
    kept = balanced(table, args.epochs)
    kept.to_csv(args.output, index=False, lineterminator="\n")
    for state, rows in table.groupby("state"):
        seeds = sorted(set(kept.loc[kept["state"] == state, "seed"]), key=int)
        left = sorted(set(rows["seed"]) - set(seeds), key=int)
        curves = kept.loc[(kept["state"] == state) & (kept["run"] != ""), ["dataset", "run"]].drop_duplicates()
        print(
            f"{state}: {len(curves)} curves of {len(args.epochs)} epochs, seeds {', '.join(seeds) or 'none'}"
            f"{'; not complete: ' + ', '.join(left) if left else ''}"
        )
    if set(kept["state"]) != set(table["state"]):
        raise SystemExit("no seed is complete in one of the states")


def balanced(table: pd.DataFrame, epochs: list[str]) -> pd.DataFrame:
    """Rows of these epochs and of random weights, of the seeds that are complete in their state.

    Complete: every target with every run at every epoch, and with every network at random weights.

    Raises:
        SystemExit: A training stands there twice.
    """
    table = table[table["epoch"].isin([*epochs, SCRATCH])]
    if table.duplicated(KEY).any():
        raise SystemExit(f"{int(table.duplicated(KEY).sum())} trainings stand in the table twice")
    targets, runs = table["dataset"].nunique(), table.loc[table["run"] != "", "run"].nunique()
    whole = targets * (runs * len(epochs) + table["encoder"].nunique())
    counts = table.groupby(["state", "seed"])["dice"].transform("size")
    return table[counts == whole].sort_values("state", kind="stable")


if __name__ == "__main__":
    main()

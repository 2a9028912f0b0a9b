"""The part of a table of downstream results in which every checkpoint has the same seeds.

Seeds draw training cases, and an easy draw lifts every checkpoint that it was trained with: means over different seeds do not
compare checkpoints. Where some epochs were trained with more seeds than others, this keeps the epochs named, and of each state
the seeds that all of its curves have at all of them.

    python benchmarks/evidence/balanced.py downstream.csv balanced.csv -epochs 1 2 4 8 16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mtl_nnunet.curves import SCRATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("-epochs", nargs="+", required=True)
    args = parser.parse_args()
    kept = balanced(pd.read_csv(args.table, dtype=str, keep_default_na=False), args.epochs)
    kept.to_csv(args.output, index=False, lineterminator="\n")
    for state, rows in kept.groupby("state"):
        curves = rows.loc[rows["run"] != "", ["dataset", "run"]].drop_duplicates()
        print(
            f"{state}: {len(curves)} curves of {len(args.epochs)} epochs, seeds {', '.join(sorted(set(rows['seed'])))}"
        )


def balanced(table: pd.DataFrame, epochs: list[str]) -> pd.DataFrame:
    """Rows of these epochs and of random weights, of the seeds that all curves of their state have."""
    table = table[table["epoch"].isin([*epochs, SCRATCH])]
    parts = []
    for _, rows in table.groupby("state"):
        # a curve is one dataset and run; random weights have neither run nor scheme
        cells = rows[["dataset", "encoder", "run", "epoch"]].drop_duplicates()
        counts = rows.groupby("seed").size()
        parts.append(rows[rows["seed"].isin(counts.index[counts == len(cells)])])
    return pd.concat(parts)


if __name__ == "__main__":
    main()

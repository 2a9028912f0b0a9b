"""How many cases a score needs: how the order of checkpoints by a few cases agrees with the order by the whole pool.

Reads what ``score.py`` wrote with ``-num_cases N -draw K`` and without; a score is compared at each of its levels, and the default
level stands for itself. The loss is what the checkpoint that few cases choose scores below the best by all, as a share of what that best
gains over random weights.

    python benchmarks/evidence/amount.py few.csv scores.csv.gz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from mtl_nnunet.curves import RANDOM
from mtl_nnunet.evaluation import agreement, argbest

RUN = ["dataset", "run", "score"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("few", type=Path, help="scores on some cases")
    parser.add_argument("all", type=Path, help="scores on all of them")
    parser.add_argument("-score", nargs="+", help="as the tables name them; default all there are")
    args = parser.parse_args()
    found = agreements(pd.read_csv(args.few), pd.read_csv(args.all))
    if args.score:
        found = found[found["score"].isin(args.score)]
    table = found.groupby(["dataset", "score", "num_cases"])[["spearman", "weighted_tau", "loss", "same"]].mean()
    worst = found.groupby(["dataset", "score", "num_cases"])["spearman"].min().rename("worst spearman")
    print(table.join(worst).round(2).to_string())


def agreements(few: pd.DataFrame, whole: pd.DataFrame) -> pd.DataFrame:
    """One row a dataset, run, score, number of cases and draw."""
    few, whole = (t.assign(value=t["value"].where(t["higher_is_better"] == 1, -t["value"])) for t in (few, whole))
    truths = {key: rows.set_index("epoch")["value"] for key, rows in whole.groupby(RUN)}
    found = []
    for (dataset, run, score, num_cases, draw), rows in few.groupby([*RUN, "num_cases", "draw"]):
        truth = truths[dataset, run, score]
        best_over_random = truth.drop(RANDOM).max() - truth[RANDOM]
        truth = truth.drop(RANDOM)
        values = rows.set_index("epoch")["value"].reindex(truth.index)
        chosen, best = argbest(values.to_numpy()), argbest(truth.to_numpy())
        found.append({
            "dataset": dataset,
            "run": run,
            "score": score,
            "num_cases": num_cases,
            "draw": draw,
            **agreement(values.to_numpy(), truth.to_numpy()),
            "loss": (truth.iloc[best] - truth.iloc[chosen]) / abs(best_over_random),
            "same": chosen == best,
        })  # fmt: skip
    return pd.DataFrame(found)


if __name__ == "__main__":
    main()

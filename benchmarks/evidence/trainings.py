"""Tables of trainings as the analyses read them: every curve with the same seeds at every epoch, and intervals over targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mtl_nnunet.curves import AVERAGE, SCRATCH

CURVE = ["dataset", "encoder", "scheme", "run"]
KEY = [*CURVE, "state", "epoch", "seed"]
# fewer say nothing of how targets differ
FEWEST_TARGETS = 3
# an empty or numeric column of them is read as text all the same
TEXT = {"epoch": str, "scheme": str, "run": str}


def read_trainings(path: Path) -> pd.DataFrame:
    """All rows; random weights have neither scheme nor run.

    Raises:
        SystemExit: A training stands there twice.
    """
    table = pd.read_csv(path, dtype=TEXT).fillna({"scheme": "", "run": ""})
    twice = table.duplicated(KEY)
    if twice.any():
        said = ", ".join(f"{k} {v}" for k, v in table.loc[twice, KEY].iloc[0].items() if v != "")
        raise SystemExit(f"{path}: {int(twice.sum())} trainings stand there twice, the first is {said}")
    return table


def read_scores(paths: Sequence[Path]) -> pd.DataFrame:
    """Tables of scores one after the other, values such that higher is better."""
    scores = pd.concat([pd.read_csv(path, dtype=TEXT) for path in paths])
    return scores.assign(value=scores["value"].where(scores["higher_is_better"] == 1, -scores["value"]))


def by_training(rows: pd.DataFrame, with_scratch: bool = True) -> pd.DataFrame:
    """Dice of one state, a row a curve and seed; random weights of that target, network and seed first, then epochs in their order.

    Raises:
        SystemExit: Curves with other seeds or epochs than the rest, whose means do not compare.
    """
    of_runs = rows[(rows["epoch"] != SCRATCH) & ~rows["epoch"].str.startswith(AVERAGE)]
    table = of_runs.pivot_table(index=[*CURVE, "seed"], columns="epoch", values="dice")
    table = table[sorted(table, key=int)]
    curves = table.groupby(level=CURVE).ngroups
    if table.isna().any(axis=None) or len(table) != curves * len(table.index.unique("seed")):
        raise SystemExit(
            "curves have different seeds or epochs, so their means do not compare. Pass a table of balanced.py."
        )
    if with_scratch:
        scratch = rows[rows["epoch"] == SCRATCH].set_index(["dataset", "encoder", "seed"])["dice"]
        table.insert(0, SCRATCH, [scratch.get((d, e, s), np.nan) for d, e, *_, s in table.index])
    return table


def below_last(table: pd.DataFrame) -> pd.DataFrame:
    """Dice points that each column lies below the last one."""
    return 100 * table.rsub(table.iloc[:, -1], axis=0)


def epochs_of(table: pd.DataFrame) -> list[str]:
    return [epoch for epoch in table if epoch != SCRATCH]


def over_targets(values: pd.Series) -> tuple[float, float, float]:
    """Mean of the means of targets, and its 95 % interval by Student's t; of few targets NaN.

    Examples:
        >>> v = pd.Series([1.0, 3.0, 5.0, 6.0, 6.0], index=pd.Index(["a", "a", "b", "c", "c"], name="dataset"))
        >>> [round(x, 2) for x in over_targets(v)]
        [4.33, -0.84, 9.5]
    """
    means = values.groupby(level="dataset").mean()
    middle = float(means.mean())
    if len(means) < FEWEST_TARGETS:
        return middle, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(means) - 1) * means.sem())
    return middle, middle - half, middle + half


def told(values: pd.Series) -> str:
    """``over_targets`` in words."""
    # no -0.00
    middle, low, high = (round(x, 2) + 0 for x in over_targets(values))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"

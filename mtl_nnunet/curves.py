"""Tables of downstream results and of scores -> curves: Dice and scores over the epochs of one pretraining."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mtl_nnunet.errors import LeftOutWarning, UserError, listed

if TYPE_CHECKING:
    import pandas as pd

SCRATCH = "scratch"
RANDOM = "random"
AVERAGE = "average-"
STATES = ("free", "frozen")
RUN = ["dataset", "encoder", "scheme", "run"]
CURVE = [*RUN, "state"]

PUBLISHED_DOWNSTREAM = {
    "model": "encoder",
    "dataset": "dataset",
    "pretraining scheme": "scheme",
    "freeze encoder": "state",
    "pretraining length": "epoch",
    "seed": "seed",
    "ImageNet accuracy": "accuracy",
}
PUBLISHED_SCORES = {
    "dataset": "dataset",
    "encoder": "encoder",
    "pretraining_scheme": "scheme",
    "pretraining_length": "epoch",
    "robustness": "value",
}
# both published tables name one thing in two ways
PUBLISHED_NAMES = {
    "ResNet50 Attention U-Net": "resnet50",
    "Swin U-Net": "swin_transformer",
    "basic U-Net": "u-net_encoder",
    "COVIDQUDataset": "COVID-QU",
    "advanced_training": "advanced",
    "simple_training": "simple",
    "False": "free",
    "True": "frozen",
}
PUBLISHED_DISTANCES = {"cosine_distance": "cosine", "l2_loss": "l2", "inv_pearson_corr": "pearson"}
PUBLISHED_RUN = "published"


@dataclass(frozen=True, eq=False)
class Curve:
    """Downstream Dice along the checkpoints of one pretraining run, on one target.

    Attributes:
        dataset: The target.
        encoder: Architecture.
        scheme: Pretraining scheme.
        run: Name of the pretraining run; tells apart seeds of one scheme.
        state: ``free`` or ``frozen``: whether the encoder was trained on the target.
        epochs: Pretraining epoch of each checkpoint, ascending, shape (K,).
        dice: Dice of each training from each checkpoint, shape (K, S); NaN where a seed is missing.
        seeds: Names of the S seeds.
        scratch: Dice of trainings from random weights, shape (S0,); may be empty.
        accuracy: Logged accuracy of each checkpoint on the pretraining task, shape (K,); NaN where unknown.
        scores: By score, its value at each checkpoint, HIGHER IS BETTER, shape (K,); NaN where there is none.
        random_scores: By score, its value at random initialisation, with the same sign; may be empty.
        averages: By k, Dice of trainings from the averaged weights of the last k checkpoints, shape (S,); may be empty.
    """

    dataset: str
    encoder: str
    scheme: str
    run: str
    state: str
    epochs: np.ndarray
    dice: np.ndarray
    seeds: tuple[str, ...]
    scratch: np.ndarray
    accuracy: np.ndarray
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    random_scores: dict[str, float] = field(default_factory=dict)
    averages: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def mean_dice(self) -> np.ndarray:
        """Mean Dice over the seeds there are, shape (K,)."""
        means: np.ndarray = np.nanmean(self.dice, axis=1)
        return means

    @property
    def label(self) -> str:
        """What to call it in a table or message."""
        return "/".join(filter(None, (self.dataset, self.encoder, self.scheme, self.run, self.state)))


def read_curves(downstream: Path, scores: Path | None = None) -> list[Curve]:
    """Curves from a table of downstream results and, if given, a table of scores.

    Our downstream table has the columns dataset, encoder, scheme, run, state, epoch, seed, dice and, if wanted,
    accuracy; ``epoch`` is a number, ``scratch`` (random weights: where scheme or run is empty, for all of them) or
    ``average-K`` (weights averaged over the last K checkpoints). Our score table has dataset, encoder, scheme, run,
    epoch, score, value and, if wanted, higher_is_better (1 or 0); ``epoch`` is a number or ``random``. The published tables
    of arXiv:2410.18677 are known by their columns; of their scores those of pretraining length 0 are left out, since on
    two of the three targets they repeat those of length 300.

    Args:
        downstream: CSV file of downstream results.
        scores: CSV file of scores; epochs without downstream results are left out.

    Returns:
        One curve a dataset, encoder, scheme, run and state, sorted by them.

    Warns:
        LeftOutWarning: Rows that belong to no curve: scores of runs without results, averages or trainings from random weights
            beside no checkpoint.

    Raises:
        UserError: A file that cannot be read, a missing column, a cell that is not what its column holds, a row twice,
            a curve of fewer than two epochs, or scores that belong to no curve.
    """
    results = _read_downstream(Path(downstream))
    score_table = None if scores is None else _read_scores(Path(scores))
    numbered = results[results["epoch"].str.isdecimal()]
    rest = results.drop(numbered.index)
    numbered = numbered.assign(epoch=numbered["epoch"].astype(int))
    if numbered.empty:
        raise UserError(f"{downstream} holds no training from a checkpoint: no row has a number in column 'epoch'.")
    unscored = {} if score_table is None else {key: rows for key, rows in score_table.groupby(RUN, sort=True)}
    curves = []
    for key, rows in numbered.groupby(CURVE, sort=True):
        curve = _curve(key, rows, _belonging(rest, key), downstream)
        curves.append(curve if score_table is None else _with_scores(curve, unscored.get(key[:-1])))
    lost = {k for k, v in unscored.items() if not v.empty} - {(c.dataset, c.encoder, c.scheme, c.run) for c in curves}
    if score_table is not None and not any(c.scores for c in curves):
        ours = listed(sorted({c.label for c in curves}), 3)
        theirs = listed(sorted("/".join(key) for key in lost or unscored), 3)
        raise UserError(
            f"no score in {scores} belongs to a checkpoint in {downstream}: the scores are of {theirs}, the results of "
            f"{ours}. Columns dataset, encoder, scheme, run and epoch must say the same in both."
        )
    used = {i for curve in curves for i in _belonging(rest, [getattr(curve, name) for name in CURVE]).index}
    _warn_of_lost([*rest.index.difference(list(used))], lost, downstream, scores)
    return curves


def _warn_of_lost(rows: list[int], lost: set[tuple[str, ...]], downstream: Path, scores: Path | None) -> None:
    if rows:
        warnings.warn(
            f"{downstream}: rows of averaged or random weights are left out, since no checkpoint has their dataset, encoder and "
            f"state ({len(rows)}, the first in line {_line(rows[0])}).",
            LeftOutWarning,
            stacklevel=3,
        )
    if lost:
        warnings.warn(
            f"{scores}: scores that no result belongs to are left out: {listed(sorted('/'.join(key) for key in lost), 3)}.",
            LeftOutWarning,
            stacklevel=3,
        )


def _curve(key: Sequence[str], rows: pd.DataFrame, rest: pd.DataFrame, path: Path) -> Curve:
    dice = rows.pivot(index="epoch", columns="seed", values="dice")
    name = "/".join(filter(None, key))
    if len(dice) < 2:
        raise UserError(
            f"{path}: curve {name} has one epoch only ({dice.index[0]}). A curve needs two epochs to choose between: add "
            "results of another checkpoint, or leave these rows out."
        )
    accuracy = rows.groupby("epoch")["accuracy"].agg(["min", "max", "mean"])
    if (contradicting := accuracy[accuracy["max"] > accuracy["min"]]).size:
        raise UserError(
            f"{path}: curve {name} has several accuracies at epoch {contradicting.index[0]}. Column 'accuracy' is that of "
            "the checkpoint: it must be the same for all seeds."
        )
    averaged = rest[rest["epoch"] != SCRATCH]
    # an average may have been trained with seeds that no checkpoint was
    dice = dice.reindex(columns=sorted({*dice.columns, *averaged["seed"]}))
    averages = {
        int(epoch.removeprefix(AVERAGE)): of_epoch.set_index("seed")["dice"].reindex(dice.columns).to_numpy()
        for epoch, of_epoch in averaged.groupby("epoch")
    }
    dataset, encoder, scheme, run, state = key
    return Curve(
        dataset,
        encoder,
        scheme,
        run,
        state,
        epochs=dice.index.to_numpy(),
        dice=dice.to_numpy(),
        seeds=tuple(dice.columns),
        scratch=rest.loc[rest["epoch"] == SCRATCH, "dice"].to_numpy(),
        accuracy=accuracy["mean"].to_numpy(),
        averages=averages,
    )


def _belonging(rest: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    dataset, encoder, scheme, run, state = key
    same = (rest["dataset"] == dataset) & (rest["encoder"] == encoder) & (rest["state"] == state)
    of_all = rest["epoch"] == SCRATCH
    for column, value in (("scheme", scheme), ("run", run)):
        same &= (rest[column] == value) | (of_all & (rest[column] == ""))
    return rest[same]


def _with_scores(curve: Curve, rows: pd.DataFrame | None) -> Curve:
    if rows is None:
        return curve
    table = rows.pivot(index="epoch", columns="score", values="value")
    at_random = table.loc[RANDOM].dropna().to_dict() if RANDOM in table.index else {}
    values = table.reindex([str(epoch) for epoch in curve.epochs]).dropna(axis=1, how="all")
    scores = {name: values[name].to_numpy() for name in values}
    return replace(curve, scores=scores, random_scores={k: v for k, v in at_random.items() if k in scores})


def _read_downstream(path: Path) -> pd.DataFrame:
    table = _read(path)
    if {*PUBLISHED_DOWNSTREAM, "dice index", "mean dice index"} <= set(table):
        table["dice"] = table["mean dice index"].where(table["mean dice index"] != "", table["dice index"])
        # the table's own column 'accuracy' is that of pixels
        table = table[[*PUBLISHED_DOWNSTREAM, "dice"]].rename(columns=PUBLISHED_DOWNSTREAM).replace(PUBLISHED_NAMES)
        # two trainings stand there twice, line for line
        table = table.drop_duplicates()
        table["epoch"] = table["epoch"].replace("0", SCRATCH)
        table["run"] = PUBLISHED_RUN
        table.loc[table["epoch"] == SCRATCH, ["scheme", "run", "accuracy"]] = ""
    table = _with_columns(table, path, [*CURVE, "epoch", "seed", "dice"], {"accuracy": ""})
    _refuse_empty(table, path, ["dataset", "encoder", "state", "seed"])
    _refuse(table, path, "state", ~table["state"].isin(STATES), "free or frozen")
    average = table["epoch"].str.fullmatch(AVERAGE + r"[1-9]\d{0,8}")
    table["epoch"] = _epochs(table["epoch"], path, average | (table["epoch"] == SCRATCH), f"{SCRATCH} or {AVERAGE}3")
    _refuse_empty(table[table["epoch"] != SCRATCH], path, ["scheme", "run"])
    table["dice"] = _numbers(table, path, "dice", "a number from 0 to 1; leave out the row of a training that failed")
    _refuse(table, path, "dice", ~table["dice"].between(0, 1), "a number from 0 to 1 (not per cent)")
    table["accuracy"] = _numbers(table, path, "accuracy", "a number, or nothing where it is unknown", may_lack=True)
    _refuse_twice(table, path, [*CURVE, "epoch", "seed"])
    return table


def _read_scores(path: Path) -> pd.DataFrame:
    table = _read(path)
    parameters = ["level", "pooled", "metric", "margin"]
    if {*PUBLISHED_SCORES, *parameters} <= set(table):
        table = table[table["pretraining_length"] != "0"].rename(columns=PUBLISHED_SCORES)
        table = table.replace({column: PUBLISHED_NAMES for column in ("dataset", "encoder", "scheme")})
        table["run"] = PUBLISHED_RUN
        table["score"] = [
            published_score(int(level), pooled == "True", PUBLISHED_DISTANCES[metric], float(margin))
            for level, pooled, metric, margin in table[parameters].itertuples(index=False)
        ]
        table["higher_is_better"] = "0"
    table = _with_columns(table, path, [*RUN, "epoch", "score", "value"], {"higher_is_better": "1"})
    _refuse_empty(table, path, [*RUN, "score"])
    table["epoch"] = _epochs(table["epoch"], path, table["epoch"] == RANDOM, RANDOM)
    table["value"] = _numbers(
        table, path, "value", "a number, or nothing where the score does not exist", may_lack=True
    )
    _refuse(table, path, "higher_is_better", ~table["higher_is_better"].isin(["0", "1"]), "1 or 0")
    directions = table.groupby("score")["higher_is_better"].nunique()
    if (directions > 1).any():
        raise UserError(
            f"{path}: score '{directions.idxmax()}' has both 0 and 1 in column 'higher_is_better'. A score has one direction."
        )
    _refuse_twice(table, path, [*RUN, "epoch", "score"])
    table["value"] *= table["higher_is_better"].map({"0": -1.0, "1": 1.0})
    return table


def published_score(level: int, pooled: bool, distance: str, margin: float) -> str:
    """The published score as a user types it.

    Examples:
        >>> published_score(4, True, "cosine", 0.5)
        'robustness:level=4,pooled=yes,distance=cosine,margin=0.5'
    """
    return f"robustness:level={level},pooled={'yes' if pooled else 'no'},distance={distance},margin={margin}"


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        with warnings.catch_warnings():
            # a row with more cells than columns would be cut short with no more than a warning
            warnings.simplefilter("error", pd.errors.ParserWarning)
            # without a header, since pandas would rename a column that stands there twice
            table = pd.read_csv(
                path,
                header=None,
                dtype=str,
                keep_default_na=False,
                index_col=False,
                encoding="utf-8-sig",
                skip_blank_lines=False,
            )
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}. Pass a CSV file.") from error
    except (UnicodeDecodeError, ValueError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path} is no CSV table: {error}. Pass a file with a line of column names first.") from error
    table = table.fillna("").apply(lambda column: column.str.strip())
    names, table = table.iloc[0], table.iloc[1:].reset_index(drop=True)
    if (twice := names.duplicated()).any():
        raise UserError(f"{path} has the column '{names[twice].iloc[0]}' twice. Leave one out.")
    # the index keeps counting lines
    table = table.set_axis(list(names), axis=1)[(table != "").any(axis=1)]
    if table.empty:
        raise UserError(f"{path} has no rows. Pass a table with at least two epochs of one curve.")
    return table


def _with_columns(table: pd.DataFrame, path: Path, needed: list[str], defaults: Mapping[str, str]) -> pd.DataFrame:
    missing = [column for column in needed if column not in table]
    if missing:
        raise UserError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}. It has {listed(list(table), 10)}; "
            f"expected {', '.join([*needed, *defaults])} (the last may be left out)."
        )
    return table.assign(**{k: v for k, v in defaults.items() if k not in table})[[*needed, *defaults]].copy()


def _epochs(column: pd.Series[str], path: Path, is_word: pd.Series[bool], words: str) -> pd.Series[str]:
    number = column.str.fullmatch(r"\d{1,9}(\.0*)?")
    _refuse(column.to_frame("epoch"), path, "epoch", ~(number | is_word), f"a whole number, {words}")
    # so that 5, 05 and 5.0 are one epoch
    return column.where(~number, column.where(number, "0").astype(float).astype(int).astype(str))


def _numbers(table: pd.DataFrame, path: Path, column: str, expected: str, may_lack: bool = False) -> pd.Series[float]:
    import pandas as pd

    numbers = pd.to_numeric(table[column], errors="coerce")
    lacking = table[column].str.lower().isin(["", "nan"]) if may_lack else False
    _refuse(table, path, column, ~(np.isfinite(numbers) | lacking), expected)
    return numbers.astype(float)


def _refuse(table: pd.DataFrame, path: Path, column: str, wrong: pd.Series[bool], expected: str) -> None:
    if wrong.any():
        row = wrong.idxmax()
        more = f" and {wrong.sum() - 1} more such rows" if wrong.sum() > 1 else ""
        raise UserError(
            f"{path}, line {_line(row)}: {column} is '{table.loc[row, column]}'{more}; expected {expected}."
        )


def _refuse_empty(table: pd.DataFrame, path: Path, columns: list[str]) -> None:
    for column in columns:
        _refuse(table, path, column, table[column] == "", "a name")


def _refuse_twice(table: pd.DataFrame, path: Path, columns: list[str]) -> None:
    again = table.duplicated(columns)
    if again.any():
        row = again.idxmax()
        first = (table[columns] == table.loc[row, columns]).all(axis=1).idxmax()
        raise UserError(
            f"{path}, lines {_line(first)} and {_line(row)}: the same {', '.join(columns)} twice. Leave one out."
        )


def _line(row: int) -> int:
    return row + 2

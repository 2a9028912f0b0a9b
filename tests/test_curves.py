"""Tables to curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_nnunet.curves import Curve, read_curves
from mtl_nnunet.errors import LeftOutWarning, UserError

pytestmark = pytest.mark.filterwarnings("ignore::mtl_nnunet.errors.LeftOutWarning")

HEADER = "dataset,encoder,scheme,run,state,epoch,seed,dice,accuracy"
ROWS = [
    "heart,resnet18,plain,r1,free,10,0,0.70,0.60",
    "heart,resnet18,plain,r1,free,2,0,0.50,0.30",
    "heart,resnet18,plain,r1,free,2,1,0.60,0.30",
    "heart,resnet18,plain,r1,free,average-3,1,0.75,",
    "heart,resnet18,,,free,scratch,7,0.40,",
    "heart,resnet18,other,r9,free,scratch,7,0.10,",
]
SCORE_HEADER = "dataset,encoder,scheme,run,epoch,score,value,higher_is_better"
SCORE_ROWS = [
    "heart,resnet18,plain,r1,2,probe,0.2,1",
    "heart,resnet18,plain,r1,10,probe,0.3,1",
    "heart,resnet18,plain,r1,random,probe,0.1,1",
    "heart,resnet18,plain,r1,2,robustness,0.5,0",
    "heart,resnet18,plain,r1,20,robustness,0.5,0",
    "lung,resnet18,plain,r1,2,probe,0.2,1",
]


def write(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def downstream(folder: Path, rows: list[str] = ROWS, header: str = HEADER) -> Path:
    return write(folder / "downstream.csv", header, rows)


def scores(folder: Path, rows: list[str] = SCORE_ROWS, header: str = SCORE_HEADER) -> Path:
    return write(folder / "scores.csv", header, rows)


def assert_equal(one: Curve, other: Curve) -> None:
    for name, value in vars(one).items():
        np.testing.assert_equal(value, getattr(other, name), err_msg=name)


def test_a_curve_by_hand(tmp_path: Path) -> None:
    with pytest.warns(LeftOutWarning) as told:
        (curve,) = read_curves(downstream(tmp_path), scores(tmp_path))
    # pandas 1.5 uses what NumPy 1.26 calls deprecated
    rows, lost = (str(w.message) for w in told if w.category is LeftOutWarning)
    assert "line 7" in rows, "the run r9 has no checkpoint"
    assert "lung/resnet18/plain/r1" in lost
    assert curve.label == "heart/resnet18/plain/r1/free"
    assert curve.epochs.tolist() == [2, 10]
    assert curve.seeds == ("0", "1")
    np.testing.assert_equal(curve.dice, [[0.5, 0.6], [0.7, np.nan]])
    np.testing.assert_allclose(curve.mean_dice, [0.55, 0.7])
    assert curve.scratch.tolist() == [0.4], "that of another scheme does not belong here"
    assert curve.accuracy.tolist() == [0.3, 0.6]
    np.testing.assert_equal(curve.averages, {3: np.array([np.nan, 0.75])})
    np.testing.assert_equal(
        curve.scores, {"probe": np.array([0.2, 0.3]), "robustness": np.array([-0.5, np.nan])}, "higher is better"
    )
    assert curve.random_scores == {"probe": 0.1}


def test_the_order_of_rows_and_columns_does_not_matter(tmp_path: Path) -> None:
    (expected,) = read_curves(downstream(tmp_path), scores(tmp_path))
    reversed_columns = [",".join(reversed(line.split(","))) for line in [HEADER, *reversed(ROWS)]]
    shuffled = downstream(tmp_path, reversed_columns[1:], reversed_columns[0])
    (curve,) = read_curves(shuffled, scores(tmp_path, SCORE_ROWS[::-1]))
    assert_equal(curve, expected)


def test_accuracy_and_direction_may_be_left_out(tmp_path: Path) -> None:
    table = downstream(tmp_path, [r.rpartition(",")[0] for r in ROWS], HEADER.rpartition(",")[0])
    (curve,) = read_curves(table, scores(tmp_path, ["heart,resnet18,plain,r1,2,probe,0.2"], SCORE_HEADER[:-17]))
    assert np.isnan(curve.accuracy).all()
    assert curve.scores["probe"][0] == 0.2


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "no rows"),
        (["heart,resnet18,plain,r1,free,2,0,high,"], "line 8: dice is 'high'; expected a number from 0 to 1"),
        (["heart,resnet18,plain,r1,free,2,5,,"], "leave out the row of a training that failed"),
        (["heart,resnet18,plain,r1,free,2,5,85.2,"], "not per cent"),
        (["heart,resnet18,plain,r1,free,2,5,inf,"], "dice is 'inf'"),
        (["heart,resnet18,plain,r1,thawed,2,5,0.5,"], "expected free or frozen"),
        (["heart,resnet18,plain,r1,free,two,5,0.5,"], "a whole number, scratch or average-3"),
        (["heart,resnet18,plain,r1,free,-2,5,0.5,"], "epoch is '-2'"),
        ([f"heart,resnet18,plain,r1,free,{'9' * 400},5,0.5,"], "epoch is '999"),
        (["", "heart,resnet18,plain,r1,free,2,5,high,"], "line 9: dice is 'high'"),
        (["heart,resnet18,plain,r1,free,average-0,5,0.5,"], "epoch is 'average-0'"),
        (["heart,resnet18,,r1,free,2,5,0.5,"], "scheme is ''; expected a name"),
        ([",resnet18,plain,r1,free,2,5,0.5,"], "dataset is ''"),
        (["heart,resnet18,plain,r1,free,02,1,0.5,0.3"], "lines 4 and 8: the same dataset"),
        (["heart,resnet18,plain,r1,free,2,5,0.5,0.4"], "several accuracies at epoch 2"),
        (["heart,resnet18,plain,r2,free,2,5,0.5,0.4"], "r2/free has one epoch only"),
        (["heart,resnet18,plain,r1,free,2,5,0.5,0.3,0.1"], "no CSV table"),
    ],
)
def test_what_is_wrong_in_the_downstream_table_is_named(tmp_path: Path, rows: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_curves(downstream(tmp_path, [*ROWS, *rows] if rows else []))


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (["heart,resnet18,plain,r1,2,probe,0.3,1"], "lines 2 and 8: the same"),
        (["heart,resnet18,plain,r1,2,knn,inf,1"], "value is 'inf'"),
        (["heart,resnet18,plain,r1,scratch,knn,0.1,1"], "a whole number, random"),
        (["heart,resnet18,plain,r1,2,knn,0.1,yes"], "expected 1 or 0"),
        (["heart,resnet18,plain,r1,10,robustness,0.1,1"], "'robustness' has both 0 and 1"),
        (["heart,resnet18,plain,r1,2,,0.1,1"], "score is ''"),
    ],
)
def test_what_is_wrong_in_the_score_table_is_named(tmp_path: Path, rows: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read_curves(downstream(tmp_path), scores(tmp_path, [*SCORE_ROWS, *rows]))


def test_scores_of_other_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the scores are of lung/resnet18/plain/r1, the results of heart"):
        read_curves(downstream(tmp_path), scores(tmp_path, SCORE_ROWS[-1:]))


@pytest.mark.parametrize("column", ["state", "dice", "run"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    with pytest.raises(UserError, match=f"lacks the column {column}"):
        read_curves(downstream(tmp_path, header=HEADER.replace(column, "other")))


@pytest.mark.parametrize("name", ["dice", " dice"])
def test_a_column_twice_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="has the column 'dice' twice"):
        read_curves(downstream(tmp_path, header=HEADER.replace("accuracy", name)))


def test_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    (expected,) = read_curves(downstream(tmp_path))
    (curve,) = read_curves(downstream(tmp_path, ["", *ROWS, "", ",,,,,,,,"], "\ufeff" + HEADER))
    assert_equal(curve, expected)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not read"):
        read_curves(tmp_path / "nowhere.csv")
    (tmp_path / "image.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="no CSV table"):
        read_curves(tmp_path / "image.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="no CSV table"):
        read_curves(tmp_path / "empty.csv")
    with pytest.raises(UserError, match="no row has a number"):
        read_curves(downstream(tmp_path, ["heart,resnet18,,,free,scratch,7,0.40,"]))

"""Regret, agreement and intervals on small tables, against scipy, by hand and by properties."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mtl_nnunet.cli.main import main
from mtl_nnunet.curves import Curve, read_curves
from mtl_nnunet.errors import UserError
from mtl_nnunet.evaluation import (
    agreement,
    argbest,
    contrast,
    evaluate,
    fixed_shares,
    judge,
    noise_floor,
    resampled_means,
    same_budget,
    split_regret,
    split_seeds,
    two_way_weights,
)
from mtl_nnunet.evaluation_report import write_figure

EPOCHS = np.array([10, 20, 40])
DICE = np.array([[0.50, 0.52, 0.51], [0.60, 0.61, 0.65], [0.58, 0.62, 0.57]])


def curve(
    dice: np.ndarray = DICE,
    scores: dict[str, np.ndarray] | None = None,
    dataset: str = "heart",
    encoder: str = "resnet18",
    run: str = "r1",
    state: str = "free",
    averages: dict[int, np.ndarray] | None = None,
    scratch: tuple[float, ...] = (),
) -> Curve:
    return Curve(
        dataset,
        encoder,
        "plain",
        run,
        state,
        EPOCHS[: len(dice)],
        dice,
        tuple(str(s) for s in range(dice.shape[1])),
        np.array(scratch),
        np.array([0.3, 0.5, 0.4])[: len(dice)],
        scores or {},
        {},
        averages or {},
    )


def many(seed: int = 0) -> list[Curve]:
    rng = np.random.default_rng(seed)
    curves = []
    for dataset in ("a", "b", "c"):
        for run in ("r1", "r2"):
            for state in ("free", "frozen"):
                dice = np.clip(0.5 + 0.1 * rng.random((3, 1)) + 0.02 * rng.normal(size=(3, 5)), 0, 1)
                scores = {name: rng.normal(size=3) for name in ("one", "two", "three")}
                curves.append(
                    curve(dice, scores, dataset, encoder=f"e{run}", run=run, state=state, scratch=(0.4, 0.42))
                )
    return curves


def row(table: pd.DataFrame, rule: str, state: str = "free") -> pd.Series:
    rows = table[(table["rule"] == rule) & (table["state"] == state)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_one_curve_by_hand() -> None:
    # mean Dice .51, .62, .59
    table = evaluate([curve(scores={"early": np.array([3.0, 2.0, 1.0])}, scratch=(0.40, 0.44))]).curves
    early, last = row(table, "early"), row(table, "last epoch")
    assert (early["epoch"], early["budget"], early["best_epoch"]) == (10, 0.25, 20)
    assert early["regret"] == pytest.approx(0.11)
    assert last["regret"] == pytest.approx(0.03)
    assert row(table, "best accuracy")["regret"] == 0
    assert row(table, "random epoch")["regret"] == pytest.approx(0.62 - (0.51 + 0.62 + 0.59) / 3)
    assert row(table, "from scratch")["regret"] == pytest.approx(0.20)
    assert early["minus_last"] == pytest.approx(-0.08)
    assert early["minus_scratch"] == pytest.approx(0.09)
    # differences to the last, seed by seed: -.08, -.10, -.06: standard error .0115
    assert early["versus_last"] == -1
    assert early["minus_fixed"] == 0, "the fixed epoch of the same budget is the same epoch"
    assert early["versus_fixed"] == 0
    # one seed picks (20, 40, 20), the others judge
    gains = [0.63 - 0.515, 0.575 - 0.505, 0.605 - 0.51]
    assert early["split_regret"] == pytest.approx(np.mean(gains))
    half = row(table, "real trainings, half the seeds")
    # the second pick, 40, is .05 below the best of the seeds that judge it, the others are best there
    assert half["regret"] == pytest.approx((0.625 - 0.575) / 3)


def test_a_perfect_score_has_no_regret_and_agrees() -> None:
    curves = many()
    curves = [Curve(**{**vars(c), "scores": {"perfect": c.mean_dice, "inverted": -c.mean_dice}}) for c in curves]
    summary = evaluate(curves, draws=50).summary
    for state in ("free", "frozen", "all"):
        perfect = row(summary, "perfect", state)
        assert perfect["regret"] == perfect["worst"] == perfect["regret_high"] == 0
        assert perfect["weighted_tau"] == pytest.approx(1)
        assert perfect["spearman"] == pytest.approx(1)
        assert row(summary, "inverted", state)["kendall_tau"] == pytest.approx(-1)
        assert row(summary, "score chosen on other targets", state)["regret"] == 0


def test_what_is_chosen_elsewhere_is_judged_here() -> None:
    # 'one' is right on a and b, 'two' on c: left out, c gets 'one', and a and b a tie of one right each, 'one' by name
    right, wrong = np.array([1.0, 2.0, 0.0]), np.array([2.0, 1.0, 0.0])
    curves = [
        curve(scores={"one": wrong if d == "c" else right, "two": right if d == "c" else wrong}, dataset=d)
        for d in "abc"
    ]
    table = evaluate(curves, draws=20).curves
    chosen = table[table["rule"] == "score chosen on other targets"].set_index("dataset")
    assert chosen["score"].to_dict() == {"a": "one", "b": "one", "c": "one"}
    assert chosen["regret"].to_dict() == {"a": 0, "b": 0, "c": pytest.approx(0.11)}
    hindsight = table[table["rule"] == "best score"]
    assert set(hindsight["score"]) == {"one"}
    assert "score chosen on other encoders" not in set(table["rule"]), "there is one encoder"


def test_order_of_curves_seeds_and_scores_changes_nothing() -> None:
    curves = many()
    rng = np.random.default_rng(1)
    shuffled = []
    for i in rng.permutation(len(curves)):
        c = curves[i]
        order = rng.permutation(5)
        changed = {
            "dice": c.dice[:, order],
            "seeds": tuple(c.seeds[s] for s in order),
            "scores": dict(reversed(c.scores.items())),
        }
        shuffled.append(Curve(**{**vars(c), **changed}))
    one, other = evaluate(curves, draws=50), evaluate(shuffled, draws=50)
    pd.testing.assert_frame_equal(one.curves, other.curves)
    pd.testing.assert_frame_equal(one.summary, other.summary)


def test_summary_is_the_mean_over_the_curves_of_a_state() -> None:
    result = evaluate(many(), draws=50)
    for state, rows in (("free", result.curves[result.curves["state"] == "free"]), ("all", result.curves)):
        mean = rows[rows["rule"] == "two"].mean(numeric_only=True)
        summary = row(result.summary, "two", state)
        for column in ("regret", "split_regret", "epoch", "budget", "minus_fixed", "minus_scratch", "weighted_tau"):
            assert summary[column] == pytest.approx(mean[column])
        assert summary["curves"] == summary["wins_last"] + summary["ties_last"] + summary["losses_last"]
        assert summary["regret_low"] <= summary["regret"] <= summary["regret_high"]


def test_agreement_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9)
    found = agreement(np.append(x, np.nan), np.append(y, 0.5))
    assert found["weighted_tau"] == stats.weightedtau(x, y).statistic
    assert found["spearman"] == pytest.approx(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    pairs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in combinations(range(9), 2)]
    assert found["kendall_tau"] == pytest.approx(np.mean(pairs))
    assert agreement(np.ones(3), y[:3])["spearman"] == 0, "what is all equal orders nothing"


def test_contrasts_are_those_of_scipy() -> None:
    difference = np.array([1.0, -1.0, 0.0])
    value, error = contrast(DICE, difference)
    assert value / error == pytest.approx(stats.ttest_rel(DICE[0], DICE[1]).statistic)
    value, error = contrast(DICE, difference, paired=False)
    assert value / error == pytest.approx(stats.ttest_ind(DICE[0], DICE[1], equal_var=False).statistic)
    lacking = np.where(np.eye(3, dtype=bool)[:, ::-1], np.nan, DICE)
    value, error = contrast(lacking, difference)
    # one seed is left that both have, so they are compared as strangers
    expected = stats.ttest_ind(lacking[0], lacking[1], equal_var=False, nan_policy="omit")
    assert value / error == pytest.approx(expected.statistic)
    assert np.isnan(contrast(DICE[:, :1], difference)[1])


def test_split_seeds_the_slow_way() -> None:
    dice = np.random.default_rng(0).random((4, 5))
    first, second = split_seeds(dice)
    slow = [
        (dice[:, list(a)].mean(1), dice[:, [s for s in range(5) if s not in a]].mean(1))
        for a in combinations(range(5), 2)
    ]
    np.testing.assert_allclose(first, [a for a, _ in slow])
    np.testing.assert_allclose(second, [b for _, b in slow])
    assert split_seeds(dice[:, :2])[0].shape == (0, 4)
    assert split_seeds(np.zeros((2, 30)), most=7)[0].shape == (7, 2)


def test_unpaired_splits_use_every_seed_that_there_is() -> None:
    dice = np.array([[0.1, np.nan, 0.3, 0.5, 0.9], [0.2, 0.4, 0.6, 0.8, 1.0]])
    first, second = split_seeds(dice, paired=False)
    np.testing.assert_allclose(2 * first[:, 0] + 2 * second[:, 0], 1.8)
    np.testing.assert_allclose(2 * first[:, 1] + 3 * second[:, 1], 3.0)


def test_split_regret_is_unbiased_where_all_epochs_are_equal() -> None:
    # equal in truth: the plain regret of any epoch is luck, the split-seed regret is zero on average
    rng = np.random.default_rng(0)
    plain, split = [], []
    for _ in range(300):
        judged = judge(curve(0.5 + 0.05 * rng.normal(size=(3, 5))))
        plain.append(judged.means.max() - judged.means[2])
        split.append(split_regret(judged, judged.take(2)))
    assert np.mean(plain) > 0.01
    assert abs(np.mean(split)) < 3 * stats.sem(split)


def test_noise_floor_of_equal_epochs_is_the_expected_maximum() -> None:
    # three equal means with standard error s: the expected maximum of three normals is 0.8463 s
    spread = np.array([-1.0, 0.0, 1.0])
    dice = 0.5 + 0.01 * np.stack([spread, spread, spread])
    assert noise_floor(dice, paired=False, draws=200_000) == pytest.approx(0.8463 * 0.01 / np.sqrt(3), rel=0.02)
    assert noise_floor(dice) == pytest.approx(0, abs=1e-12), "the seeds move all epochs alike"
    assert np.isnan(noise_floor(dice[:, :1]))


def test_noise_floor_is_that_of_the_covariance_of_the_epochs() -> None:
    dice = np.random.default_rng(0).random((4, 5))
    means = dice.mean(1)
    drawn = np.random.default_rng(1).multivariate_normal(means, np.cov(dice) / 5, 200_000)
    expected = (drawn.max(1) - drawn[:, means.argmax()]).mean()
    assert noise_floor(dice, draws=200_000) == pytest.approx(expected, rel=0.03)


def test_an_average_of_other_seeds_leaves_the_other_rules_as_they_are(tmp_path: Path) -> None:
    lines = [f"heart,r,s,1,free,{e},{s},{0.4 + 0.1 * e + 0.01 * s}" for e in (1, 2) for s in range(3)]
    table = tmp_path / "downstream.csv"
    header = "dataset,encoder,scheme,run,state,epoch,seed,dice"
    table.write_text("\n".join([header, *lines]))
    expected = evaluate(read_curves(table), draws=20).curves.set_index("rule")
    table.write_text("\n".join([header, *lines, "heart,r,s,1,free,average-2,7,0.5"]))
    rules = evaluate(read_curves(table), draws=20).curves.set_index("rule")
    pd.testing.assert_frame_equal(rules.drop("average of the last 2")[list(expected)], expected)
    assert rules.loc["last epoch", "minus_average_2"] == pytest.approx(0.61 - 0.5)
    assert rules.loc["average of the last 2", "dice"] == 0.5


def test_fixed_epoch_of_the_same_budget() -> None:
    curves = [curve(), curve(DICE[:2])]
    # last epochs 40 and 20, first ones at 1/4 and 1/2 of it
    assert same_budget(curves, 0.75) == pytest.approx(0.75)
    assert same_budget(curves, 0.45) == pytest.approx(0.40), "the second curve has nothing before one half"
    for fraction in (0.5, 0.6, 1.0):
        assert fixed_shares(curves[0], fraction) @ EPOCHS == pytest.approx(40 * fraction)


def test_two_way_bootstrap() -> None:
    datasets, runs = ["a", "a", "b", "b", "c", "c"], ["r1", "r2"] * 3
    values = np.array([0.0, 0.0, 3.0, 3.0, 6.0, 6.0])[:, None]
    sample = resampled_means(values, two_way_weights(datasets, runs, 20_000, 0))[:, 0]
    # runs make no difference here, so it is the bootstrap of three numbers: 27 equally likely draws
    expected = [np.mean(draw) for draw in np.array(np.meshgrid(*[[0, 3, 6]] * 3)).reshape(3, -1).T]
    assert np.nanmean(sample) == pytest.approx(np.mean(expected), abs=0.05)
    assert np.nanstd(sample) == pytest.approx(np.std(expected), abs=0.05)
    one = resampled_means(values[:2] + 1, two_way_weights(["a", "a"], ["r", "r"], 50, 0))
    assert (one == 1).all(), "one target and one run: nothing to resample"
    only = resampled_means(np.array([[np.nan], [2.0]]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_equal(only, [[np.nan], [2.0]])


def test_one_target_and_one_run_have_no_interval() -> None:
    summary = evaluate([curve(), curve(state="frozen")], draws=20).summary
    assert summary[["regret_low", "regret_high", "minus_last_low"]].isna().all(axis=None)


def test_a_rule_of_ones_own_is_judged_like_any_other() -> None:
    rules = {"my last": lambda c: np.eye(3)[2], "half of each": lambda c: np.array([0.5, 0.5, 0.0])}
    summary = evaluate(many(), draws=50, rules=rules).summary
    mine, last = row(summary, "my last", "all"), row(summary, "last epoch", "all")
    for column in ("regret", "regret_low", "split_regret", "minus_random", "wins_scratch"):
        assert mine[column] == last[column]
    assert row(summary, "half of each", "all")["epoch"] == 15


def test_missing_scores_averages_and_single_seeds() -> None:
    partly = curve(scores={"one": np.array([np.nan, 1.0, 1.0])}, averages={3: np.array([0.70, 0.71, 0.72])})
    alone = curve(DICE[:, :1], dataset="lung")
    result = evaluate([partly, alone], draws=50)
    one = row(result.curves, "one")
    assert one["epoch"] == 40, "of equals the later"
    assert one["minus_average_3"] == pytest.approx(0.59 - 0.71)
    assert one["versus_average_3"] == -1
    assert row(result.curves, "average of the last 3")["regret"] == pytest.approx(-0.09)
    lung = result.curves[result.curves["dataset"] == "lung"].set_index("rule")
    assert np.isnan(lung.loc["random epoch", ["split_regret", "versus_last"]].astype(float)).all()
    assert argbest(np.array([1.0, np.nan])) == 0


def tables(folder: Path, curves: list[Curve]) -> list[str]:
    rows, scores = [], []
    for c in curves:
        base = {name: getattr(c, name) for name in ("dataset", "encoder", "scheme", "run")}
        for k, epoch in enumerate(c.epochs):
            for s, seed in enumerate(c.seeds):
                rows.append({**base, "state": c.state, "epoch": epoch, "seed": seed, "dice": c.dice[k, s]})
            if c.state == "free":
                scores += [{**base, "epoch": epoch, "score": n, "value": v[k]} for n, v in c.scores.items()]
    pd.DataFrame(rows).to_csv(folder / "downstream.csv", index=False)
    pd.DataFrame(scores).to_csv(folder / "scores.csv", index=False)
    return ["evaluate-scores", "-downstream", str(folder / "downstream.csv"), "-scores", str(folder / "scores.csv")]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tables(tmp_path, many()), "-o", str(tmp_path / "out"), "-draws", "50"]
    assert main([*command, "-drop", "dataset=a,run=r1", "-drop", "state=frozen,dataset=b"]) == 0
    printed = capsys.readouterr().out
    assert "free and frozen (curves: 8, targets: 3, pretraining runs: 2)" in printed
    assert "score chosen on other targets" in printed
    assert "rough" in printed
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "evaluation.csv",
        "evaluation.json",
        "evaluation.png",
        "summary.csv",
    ]
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(record["curves"]) == 8
    assert len(record["inputs"]["scores"]["sha256"]) == 64
    assert len(pd.read_csv(tmp_path / "out" / "summary.csv")) == len(record["summary"])
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    printed_json = capsys.readouterr()
    assert json.loads(printed_json.out) == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert "score chosen on other targets" in printed_json.err


def test_the_least_that_can_be_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "downstream.csv"
    table.write_text(
        "dataset,encoder,scheme,run,state,epoch,seed,dice\nheart,r,s,1,free,1,0,0.5\nheart,r,s,1,free,2,0,0.4\n"
    )
    assert main(["evaluate-scores", "-downstream", str(table), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "encoder free (curves: 1, targets: 1, pretraining runs: 1)" in printed
    (last,) = [line for line in printed.splitlines() if line.startswith("last epoch")]
    # no interval from one curve, no split and no comparison from one seed, but for that of the last with itself
    assert " ".join(last.split()) == "last epoch 1 10.00 [-, -] - 10.00 2 1.00 -1.00 +0.00 0/1/0 +0.00 0/1/0"
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())["summary"]
    assert summary[0]["regret_low"] is None


def test_a_score_may_not_be_called_like_a_baseline() -> None:
    for name in ("last epoch", "score chosen on other targets"):
        with pytest.raises(UserError, match="the name of another rule"):
            evaluate([curve(scores={name: np.arange(3.0)})], draws=5)


def test_a_folder_that_holds_the_tables_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = tables(tmp_path, many())
    assert main([*command, "-o", str(tmp_path), "--overwrite"]) == 1
    assert "would be replaced" in capsys.readouterr().err
    assert (tmp_path / "downstream.csv").is_file()


def test_only_an_evaluation_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "evaluation.csv").touch()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    command = [*tables(tmp_path, many()[:2]), "-draws", "5", "--overwrite", "-o"]
    assert main([*command, str(tmp_path / "thesis")]) == 1
    assert "holds other files than an evaluation's (chapter.tex)" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert main([*command, str(tmp_path / "thesis" / "chapter.tex")]) == 1
    assert "is no folder" in capsys.readouterr().err
    (tmp_path / "thesis" / "chapter.tex").rename(tmp_path / "thesis" / "._evaluation.csv")
    assert main([*command, str(tmp_path / "thesis")]) == 0


def test_odd_names_and_equal_dice_are_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    odd = curve(np.full((3, 2), 0.5), {r"$\foo$": np.arange(3.0)}, dataset=r"$\bar$")
    write_figure(evaluate([odd], draws=5), [odd], tmp_path / "figure.png")
    assert not [str(w.message) for w in recwarn if "ylims" in str(w.message)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["-drop", "dataset=z"], "names no curve. There is: dataset a, b, c"),
        (["-drop", "organ=a"], "expected KEY=VALUE"),
        (["-drop", "state=free", "-drop", "state=frozen"], "leaves no curve"),
        (["-score", "four"], "no score 'four'"),
        (["-draws", "0"], "at least one draw"),
    ],
)
def test_what_a_user_mistypes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    assert main([*tables(tmp_path, many()), "-o", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_it_needs_no_torch() -> None:
    program = "import sys, mtl_nnunet.evaluation_report, mtl_nnunet.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

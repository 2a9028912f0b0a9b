"""The chooser on simulated curves whose truth is known, against scikit-learn, and on the published tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA

from mtl_nnunet.chooser import (
    NUM_TRENDS,
    SHIPPED,
    Chooser,
    choose_by_expected_loss,
    covariance,
    draw_curves,
    features,
    log_time,
    read_chooser,
    restricted,
    trends,
    write_chooser,
)
from mtl_nnunet.chooser_fit import (
    fit_model,
    fit_state,
    hold_out,
    measured_losses,
    noise_variance,
    seed_covariances,
    stretch,
    verdict,
)
from mtl_nnunet.cli.main import main
from mtl_nnunet.curves import Curve, read_curves
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import sha256

EPOCHS = np.array([1, 5, 20, 50, 100, 150, 200, 250, 300])
TIME = log_time(EPOCHS.astype(float), 300.0)
LINE = (TIME - TIME.mean()) / np.linalg.norm(TIME - TIME.mean())
NUM_SEEDS, SEED_DEVIATION = 5, 0.002
EVIDENCE = Path(__file__).parents[1] / "benchmarks" / "evidence"
PUBLISHED = REAL_DATA.parent / "published"
SCORE = "robustness:level=-2,pooled=yes,distance=cosine,margin=0.5"


def simulated(
    number: int, seed: int, informative: bool = True, fall: float = 0.0
) -> tuple[list[Curve], list[np.ndarray]]:
    """Curves of unequal steepness, with the truth without seed noise; the score sees the deviation from the trend, or nothing."""
    own = covariance(np.array([0.8, 1.5, 0.5, 0.2, fall]), TIME)
    rng = np.random.default_rng(seed)
    curves, truths = [], []
    for i in range(number):
        steepness = np.exp(rng.normal(-4.2, 0.5))
        deviation = rng.multivariate_normal(np.zeros(9), own)
        shape = trends(TIME) @ [0.6, 1.5, -0.5] + deviation
        truth = 0.8 + steepness * (shape - shape.mean())
        dice = truth[:, None] + SEED_DEVIATION * rng.normal(size=(9, NUM_SEEDS))
        seen = 3 * trends(TIME)[:, 0] + (deviation if informative else 0) + 0.4 * rng.normal(size=9)
        scores = {"seen": np.exp(rng.normal(0, 0.3)) * seen, "noise": rng.normal(size=9)}
        names = (f"target{i % 6}", f"encoder{i % 3}", "simple", str(i), "free")
        seeds = tuple(str(s) for s in range(NUM_SEEDS))
        curves.append(Curve(*names, EPOCHS, dice, seeds, np.empty(0), np.full(9, np.nan), scores))
        truths.append(truth)
    return curves, truths


@pytest.fixture(scope="module")
def chooser() -> Chooser:
    return Chooser({"free": fit_state(simulated(48, 0)[0], ("seen", "noise"))}, {"of": "simulated curves"})


def test_an_informative_score_is_used_and_noise_is_not(chooser: Chooser) -> None:
    model = chooser.states["free"].evidence
    assert model is not None
    weights = np.linalg.solve(model.precision, model.moment)[2 * NUM_TRENDS :]
    deviations = np.sqrt(np.diag(np.linalg.inv(model.precision)))[2 * NUM_TRENDS :]
    assert weights[0] > 5 * deviations[0]
    assert abs(weights[1]) < 3 * deviations[1]
    assert abs(weights[1]) < 0.15 * weights[0]


def test_scores_lower_the_loss_on_new_curves_intervals_hold_and_expectations_are_met(chooser: Chooser) -> None:
    """The truth without seed noise, which no real table tells."""
    curves, truths = simulated(300, 1)
    by = {}
    for names in ((), ("seen", "noise")):
        losses, expected, held = [], [], []
        for curve, truth in zip(curves, truths, strict=True):
            choice = choose_by_expected_loss(chooser, EPOCHS, {n: curve.scores[n] for n in names}, "free")
            loss = (truth.max() - truth)[choice.index]
            losses.append(loss)
            expected.append(choice.expected_loss[choice.index])
            held.append(choice.low[choice.index] - 1e-9 <= loss <= choice.high[choice.index])
        by[names] = np.mean(losses)
        error = np.std(np.array(losses) - expected) / np.sqrt(len(losses))
        assert 0.85 <= np.mean(held) <= 0.95
        # 48 curves leave the prior itself uncertain by a tenth
        assert abs(np.mean(losses) - np.mean(expected)) < 3 * error + 0.1 * np.mean(losses)
    assert by["seen", "noise"] < 0.7 * by[()]


def test_draws_have_the_mean_and_covariance_of_a_gaussian_process_of_scikit_learn() -> None:
    """Kernel of trends, score and own deviation as one covariance over all curves, conditioned at once."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Kernel

    size, kernel = 0.3, np.array([0.7, 1.2, 0.5, 0.2, 0.8])
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 5, 7))
    y = rng.normal(size=(4, 5))
    noise = 0.1
    time = log_time(np.array([1.0, 3, 10, 30, 40]), 40.0)
    prior = np.diag(np.r_[np.full(6, 100.0), size**2])

    class Whole(Kernel):
        """Inputs: curve and checkpoint; curve 4 is the new one."""

        def __init__(self):  # type: ignore[no-untyped-def]
            pass

        def __call__(self, a, b=None, eval_gradient=False):  # type: ignore[no-untyped-def]
            b = a if b is None else b
            all_x = np.concatenate([x, new[None]])
            own = covariance(kernel, time)
            rows, columns = a.astype(int), b.astype(int)
            xa, xb = all_x[rows[:, 0], rows[:, 1]], all_x[columns[:, 0], columns[:, 1]]
            same = rows[:, :1] == columns[:, 0]
            return xa @ prior @ xb.T + same * own[rows[:, 1][:, None], columns[:, 1]]

        def diag(self, a):  # type: ignore[no-untyped-def]
            return np.diag(self(a))

        def is_stationary(self):  # type: ignore[no-untyped-def]
            return False

    score = rng.normal(size=5)
    new = features(time, 0.0, ((score - score.mean()) / score.std())[:, None])
    grid = np.array([(c, k) for c in range(5) for k in range(5)], float)
    inverse = np.linalg.inv(covariance(kernel, time) + noise * np.eye(5))
    precision = np.linalg.inv(prior) + sum(a.T @ inverse @ a for a in x)
    moment = sum(a.T @ inverse @ b for a, b in zip(x, y, strict=True))
    fitted = fit_model(simulated(8, 0)[0], ("seen",))
    # a known steepness of 1, and a score whose standardised values are all beyond the epoch
    sure = {"steepness": np.array([0.0, 1.0, 1e-9]), "steepness_precision": np.diag([1e18, 1e18])}
    model = replace(
        fitted,
        kernel=kernel,
        precision=precision,
        moment=moment,
        steepness_moment=np.zeros(2),
        score_trends=np.zeros((3, 1)),
        **sure,
    )
    process = GaussianProcessRegressor(Whole(), alpha=noise, optimizer=None).fit(grid[:20], y.ravel())
    mean, total = process.predict(grid[20:], return_cov=True)
    draws = draw_curves(model, np.array([1.0, 3, 10, 30, 40]), {"seen": score})
    scale = np.sqrt(np.diag(total))
    assert np.abs((draws.mean(0) - mean) / scale).max() < 5 / np.sqrt(len(draws))
    assert np.abs((np.cov(draws.T) - total) / np.outer(scale, scale)).max() < 0.1


def test_left_out_scores_are_as_if_never_fitted() -> None:
    curves = simulated(12, 4)[0]
    both = fit_model(curves, ("seen", "noise"))
    one = restricted(both, ("seen",))
    again = restricted(both, ("noise", "seen"))
    assert one.scores == ("seen",)
    assert np.allclose(one.precision, both.precision[:7, :7])
    assert np.allclose(restricted(again, ("seen",)).precision, one.precision)
    # a fit without it differs by the deviations' spread only, which is estimated anew
    alone = fit_model(curves, ("seen",))
    weight = [np.linalg.solve(m.precision, m.moment)[6] for m in (one, alone)]
    assert weight[0] == pytest.approx(weight[1], rel=0.2)


def test_the_order_of_checkpoints_changes_nothing(chooser: Chooser) -> None:
    curve = simulated(1, 5)[0][0]
    choice = choose_by_expected_loss(chooser, EPOCHS, curve.scores, "free", price=0.5)
    shuffle = np.random.default_rng(0).permutation(9)
    scores = {n: v[shuffle] for n, v in curve.scores.items()}
    again = choose_by_expected_loss(chooser, EPOCHS[shuffle], scores, "free", price=0.5)
    assert shuffle[again.index] == choice.index
    assert np.array_equal(again.expected_loss, choice.expected_loss[shuffle])
    assert np.array_equal(again.high, choice.high[shuffle])


def test_direction_and_unit_of_a_score_within_bounds(chooser: Chooser) -> None:
    curve = simulated(1, 5)[0][0]
    choice = choose_by_expected_loss(chooser, EPOCHS, curve.scores, "free")
    moved = {n: v + 7 for n, v in curve.scores.items()}
    assert np.allclose(choose_by_expected_loss(chooser, EPOCHS, moved, "free").expected_loss, choice.expected_loss)


def test_scores_that_say_nothing_leave_the_prior(chooser: Chooser) -> None:
    prior = choose_by_expected_loss(chooser, EPOCHS, None, "free")
    flat = choose_by_expected_loss(
        chooser, EPOCHS, {"seen": np.full(9, 0.3), "noise": np.full(9, np.nan), "unheard": EPOCHS}, "free"
    )
    assert np.array_equal(flat.expected_loss, prior.expected_loss)
    assert flat.index == prior.index
    assert flat.used == ()
    assert any("the same at every checkpoint" in w for w in flat.warnings)
    assert any("epochs alone" in w for w in prior.warnings)
    # learned from curves on which it was noise, a score moves next to nothing
    curves = simulated(48, 6, informative=False)[0]
    blind = Chooser({"free": fit_state(curves, ("noise",))}, {})
    told = choose_by_expected_loss(blind, EPOCHS, {"noise": curves[0].scores["noise"]}, "free")
    untold = choose_by_expected_loss(blind, EPOCHS, None, "free")
    assert told.index == untold.index
    assert np.abs(told.expected_loss - untold.expected_loss).max() < 0.3 * untold.expected_loss.max()


def test_the_dearer_the_pretraining_the_earlier_it_stops(chooser: Chooser) -> None:
    scores = simulated(1, 7)[0][0].scores
    chosen = [choose_by_expected_loss(chooser, EPOCHS, scores, "free", price=p).index for p in (0, 0.5, 2, 8, 1000)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 0


def test_runs_unlike_the_fitted_ones_are_told_and_most_others_are_not(chooser: Chooser) -> None:
    curves = simulated(100, 8)[0]
    usual = [choose_by_expected_loss(chooser, EPOCHS, c.scores, "free", encoder=c.encoder) for c in curves]
    assert np.mean([bool(c.warnings) for c in usual]) < 0.15
    assert not any(c.fell_back for c in usual)
    scores = curves[0].scores
    absurd = choose_by_expected_loss(chooser, EPOCHS, {**scores, "seen": 1e6 * scores["seen"]}, "free", price=5)
    assert absurd.fell_back
    assert absurd.index == 8
    assert any("'seen': its spread" in w for w in absurd.warnings)
    backwards = choose_by_expected_loss(chooser, EPOCHS, {**scores, "seen": -3 * TIME}, "free")
    assert any("departure from its usual course" in w for w in backwards.warnings)
    frozen = choose_by_expected_loss(chooser, EPOCHS, scores, "frozen")
    assert frozen.fell_back
    assert frozen.index == 8
    assert "frozen" in frozen.warnings[0]
    assert frozen.text == "expected loss against the best: unknown"
    other = choose_by_expected_loss(chooser, [2, 9], None, "free", encoder="vit")
    said = " ".join(other.warnings)
    assert all(part in said for part in ("2 checkpoints", "9 epochs", "'vit'"))


def test_two_and_one_checkpoint(chooser: Chooser) -> None:
    assert choose_by_expected_loss(chooser, [300, 1], None, "free").index == 0
    only = choose_by_expected_loss(chooser, [300], {"seen": [0.2]}, "free")
    assert only.index == 0
    assert only.expected_loss.tolist() == [0]
    assert only.text == "expected loss against the best: 0.00 Dice points, 90 % interval 0.00 to 0.00"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"epochs": []}, "at least one epoch"),
        ({"epochs": [-1, 2]}, "none below 0"),
        ({"price": -1.0}, "price -1"),
        ({"scores": {"seen": [1.0]}}, "1 values for 9"),
        ({"pretraining_epochs": 100}, "has no epoch 300"),
    ],
)
def test_what_cannot_be_is_refused(chooser: Chooser, options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        choose_by_expected_loss(chooser, **{"epochs": EPOCHS, "state": "free", **options})  # type: ignore[arg-type]


def test_a_file_says_the_same_again(chooser: Chooser, tmp_path: Path) -> None:
    write_chooser(chooser, tmp_path / "chooser.json")
    again = read_chooser(tmp_path / "chooser.json")
    assert again.provenance == chooser.provenance
    scores = simulated(1, 9)[0][0].scores
    a, b = (choose_by_expected_loss(c, EPOCHS, scores, "free", 0.3, "vit") for c in (chooser, again))
    assert (a.index, a.warnings) == (b.index, b.warnings)
    assert np.allclose(a.expected_loss, b.expected_loss, rtol=1e-6)


def test_a_damaged_file_is_named(chooser: Chooser, tmp_path: Path) -> None:
    path = tmp_path / "chooser.json"
    with pytest.raises(UserError, match="could not read"):
        read_chooser(path)
    write_chooser(chooser, path)
    text = path.read_text()
    content = json.loads(text)
    free = content["states"]["free"]
    damaged = [
        text[: len(text) // 2],
        "[]",
        json.dumps({**content, "format": "another"}),
        json.dumps({**content, "states": {"free": {**free, "evidence": {**free["evidence"], "moment": [1.0]}}}}),
        json.dumps({**content, "states": {"free": {**free, "prior": {**free["prior"], "precision": [0.0] * 36}}}}),
        json.dumps({**content, "states": {"free": {**free, "prior": {**free["prior"], "loss_factor": float("nan")}}}}),
        text.replace('"moment"', '"momentum"'),
    ]
    for broken in damaged:
        path.write_text(broken)
        with pytest.raises(UserError, match="is no chooser"):
            read_chooser(path)


def test_stretching_makes_nine_in_ten_hold() -> None:
    held = hold_out(simulated(24, 10)[0], (), "dataset")
    # told ten times too sure
    sure = [replace(h, losses=h.losses / 10) for h in held]
    assert stretch(sure) == pytest.approx(10 * max(1, stretch(held)), rel=0.35)
    assert stretch([]) == 1
    assert 0.8 <= verdict(sure).coverage <= 1


def test_curves_without_a_score_still_teach_the_prior() -> None:
    curves = simulated(24, 11)[0]
    some = [replace(c, scores={"seen": c.scores["seen"]} if i % 2 else {}) for i, c in enumerate(curves)]
    model = fit_model(some, ("seen",))
    assert model.scored.tolist() == [12]
    assert np.linalg.solve(model.precision, model.moment)[6] > 0.3


def write_tables(folder: Path, curves: list[Curve]) -> tuple[Path, Path]:
    downstream, scores = (
        ["dataset,encoder,scheme,run,state,epoch,seed,dice"],
        ["dataset,encoder,scheme,run,epoch,score,value"],
    )
    for c in curves:
        run = f"{c.dataset},{c.encoder},{c.scheme},{c.run}"
        for k, epoch in enumerate(c.epochs):
            downstream += [f"{run},{c.state},{epoch},{s},{d}" for s, d in zip(c.seeds, c.dice[k], strict=True)]
            scores += [f"{run},{epoch},{name},{v[k]}" for name, v in c.scores.items()]
    files = folder / "downstream.csv", folder / "scores.csv"
    for file, lines in zip(files, (downstream, scores), strict=True):
        file.write_text("\n".join(lines))
    return files


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downstream, scores = write_tables(tmp_path, simulated(12, 12)[0])
    output = tmp_path / "chooser.json"
    command = ["fit-chooser", "-downstream", str(downstream), "-scores", str(scores), "-o", str(output)]
    assert main([*command, "-use", "seen"]) == 0
    printed = capsys.readouterr().out
    assert "held in 90 %" in printed
    assert f"written: {output} (12 curves)" in printed
    chooser = read_chooser(output)
    assert set(chooser.provenance["tables"]) == {"downstream.csv", "scores.csv"}
    assert [h["left_out"] for h in chooser.provenance["held_out"]] == ["dataset"] * 2 + ["encoder"] * 2
    assert output.stat().st_size < 200_000
    assert main([*command, "-use", "seen", "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sha256"] == sha256(output)
    assert told["held_out"] == json.loads(output.read_text())["provenance"]["held_out"]
    for options, named in (
        (["-use", "seen"], "exists already"),
        (["--overwrite", "-use", "unheard"], "no score 'unheard'"),
        (["--overwrite", "-drop", "dataset=target0", "-drop", "dataset=target1", "-drop", "dataset=target2", "-drop",
          "dataset=target3"], "expected at least 6"),
    ):  # fmt: skip
        assert main([*command, *options]) == 1
        assert named in capsys.readouterr().err


def test_only_a_chooser_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downstream, scores = write_tables(tmp_path, simulated(6, 6)[0])
    other = tmp_path / "other.json"
    other.write_text('{"format": "of another program"}')
    command = ["fit-chooser", "-downstream", str(downstream), "-scores", str(scores), "--overwrite", "-o"]
    for file, named in (
        (downstream, "one of the tables"),
        (tmp_path / "." / "scores.csv", "one of the tables"),
        (other, "no chooser"),
    ):
        before = file.read_text()
        assert main([*command, str(file)]) == 1
        assert named in capsys.readouterr().err
        assert file.read_text() == before
    # one that is damaged, or of another version, is replaced
    other.write_text('{"format": "mtl-nnunet chooser 0"}')
    assert main([*command, str(other)]) == 0
    read_chooser(other)


def test_the_shipped_file_says_where_it_comes_from() -> None:
    shipped = read_chooser()
    assert SHIPPED.stat().st_size < 200_000
    assert sorted(shipped.states) == ["free", "frozen"]
    assert set(shipped.provenance) >= {
        "version",
        "date",
        "command",
        "tables",
        "curves",
        "datasets",
        "encoders",
        "held_out",
    }
    assert all(0.75 <= h["coverage"] <= 1 for h in shipped.provenance["held_out"])


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="MTL_TEST_DATA has no published tables beside it")
def test_published_tables() -> None:
    """No regret bound is claimed: on these 18 curves a score adds little; the intervals must hold."""
    curves = [
        c
        for c in read_curves(PUBLISHED / "downstream_scores.csv", PUBLISHED / "robustness_scores.csv")
        if c.state == "free"
    ]
    held = hold_out(curves, (SCORE,), "dataset")
    told = verdict(held)
    first = held[0].curve
    # the shipped file is what the command makes of these tables and of our own
    own = [c for c in read_curves(EVIDENCE / "balanced.csv") if c.state == "free"]
    shipped = read_chooser().states["free"]
    assert shipped.evidence is None, "no score was found to choose better than epochs do"
    drawn = [draw_curves(m, first.epochs.astype(float), {}) for m in (shipped.prior, fit_model([*curves, *own]))]
    assert np.allclose(*drawn, atol=1e-3)
    assert 0.8 <= told.coverage <= 1
    assert told.last == pytest.approx(0.0024, abs=2e-4)
    assert told.free_regret <= 1.2 * told.last


def test_deviations_are_those_of_scikit_learn_and_fall_towards_the_end() -> None:
    from sklearn.gaussian_process.kernels import RBF

    share = np.exp(TIME)
    smooth = RBF([1.5, 0.5])(np.stack([TIME, share], axis=1))
    assert covariance(np.array([0.8, 1.5, 0.5, 0.2, 0.0]), TIME) == pytest.approx(0.64 * smooth + 0.04 * np.eye(9))
    steady, falling = (
        np.sqrt(np.diag(covariance(np.array([0.8, 1.5, 0.5, 0.2, fall]), np.log([0.25, 1.0])))) for fall in (0.0, 1.2)
    )
    assert falling / steady == pytest.approx([np.exp(0.6), 1.0])


def test_a_fall_of_deviations_is_found_where_there_is_one() -> None:
    assert fit_model(simulated(48, 0, fall=2.0)[0]).kernel[-1] == pytest.approx(2, abs=0.5)
    assert fit_model(simulated(48, 0)[0]).kernel[-1] == pytest.approx(0, abs=0.5)


def with_noise(curves: list[Curve], along: float, num_seeds: int, seed: int) -> list[Curve]:
    """Seeds that shift whole curves, tilt them along log time, and differ by 0.01 at every checkpoint."""
    rng = np.random.default_rng(seed)
    seeds = tuple(map(str, range(num_seeds)))
    return [
        replace(
            c,
            dice=c.mean_dice[:, None]
            + rng.normal(0, 0.2, num_seeds)
            + LINE[:, None] * rng.normal(0, along, num_seeds)
            + rng.normal(0, 0.01, (9, num_seeds)),
            seeds=seeds,
        )
        for c in curves
    ]


def test_what_a_seed_does_to_all_checkpoints_alike_is_no_noise() -> None:
    noisy = with_noise(simulated(12, 0)[0], 0.0, 40, 0)
    found = np.array(seed_covariances(noisy)) * 40
    alike = np.eye(9) - 1 / 9
    assert found == pytest.approx(np.broadcast_to(0.01**2 * alike, (12, 9, 9)), abs=0.2 * 0.01**2)
    # the same by hand: a table with equal numbers in each cell has (K - 1)(S - 1) degrees of freedom
    dice = noisy[0].dice
    residuals = dice - dice.mean(0) - dice.mean(1, keepdims=True) + dice.mean()
    assert noise_variance(found[0]) == pytest.approx((residuals**2).sum() / (8 * 39))
    gaps = np.where(np.random.default_rng(1).random(dice.shape) < 0.3, np.nan, dice)
    told = np.diag(seed_covariances([replace(noisy[0], dice=gaps)])[0]) * np.isfinite(gaps).sum(1)
    assert told == pytest.approx(0.01**2 * 8 / 9, rel=0.2)
    fewer = np.where(np.arange(40) < np.array([10, 40])[np.arange(9) % 2, None], dice, np.nan)
    told = np.diag(seed_covariances([replace(noisy[0], dice=fewer)])[0])
    assert told[::2].mean() == pytest.approx(4 * told[1::2].mean(), rel=0.05), "of a quarter of the seeds"


def test_a_seed_that_suits_early_checkpoints_suits_all_early_ones() -> None:
    noisy = with_noise(simulated(60, 0)[0], 0.03, 5, 0)
    found = 5 * np.mean(seed_covariances(noisy), axis=0)
    expected = 0.01**2 * (np.eye(9) - 1 / 9) + 0.03**2 * np.outer(LINE, LINE)
    scale = np.sqrt(np.diag(expected))
    assert np.abs((found - expected) / np.outer(scale, scale)).max() < 0.15
    # a seed that a table names and that trained from nothing tells nothing, and takes nothing away
    padded = [replace(c, dice=np.c_[c.dice, np.full(9, np.nan)], seeds=(*c.seeds, "x"), scores={}) for c in noisy]
    assert 5 * np.mean(seed_covariances(padded), axis=0) == pytest.approx(found)
    # what a curve of one seed borrows; two checkpoints, and one
    alone = replace(noisy[0], dice=noisy[0].dice[:, :1], seeds=("0",))
    assert noise_variance(seed_covariances([*noisy, alone])[-1]) == pytest.approx(noise_variance(found), rel=0.3)
    for left in (2, 1):
        short = replace(noisy[0], epochs=EPOCHS[:left], dice=noisy[0].dice[:left], accuracy=np.full(left, np.nan), scores={})  # fmt: skip
        of_few = seed_covariances([*noisy, short])[-1]
        assert of_few.shape == (left, left)
        assert np.isfinite(of_few).all()
        if left == 2:
            between = short.dice[0] - short.dice[1]
            assert of_few[0, 0] + of_few[1, 1] - 2 * of_few[0, 1] == pytest.approx(between.var(ddof=1) / 5)


def test_what_is_measured_has_the_noise_that_it_is_given() -> None:
    """Two checkpoints of equal truth, with noise that they share but for a tenth: a normal difference of variance 0.2."""
    losses = measured_losses(np.zeros((20_000, 2)), np.array([[1.0, 0.9], [0.9, 1.0]]))
    assert losses.min(1) == pytest.approx(0)
    assert losses.sum(1).mean() == pytest.approx(np.sqrt(2 / np.pi * 0.2), rel=0.03)
    assert (losses[:, 0] > 0).mean() == pytest.approx(0.5, abs=0.02)


def test_curves_that_are_all_alike_or_flat_are_fitted() -> None:
    curves = [replace(c, dice=np.tile(0.8 + 0.01 * TIME[:, None], 5)) for c in simulated(8, 0)[0]]
    for same in (curves, [replace(c, dice=np.full((9, 5), 0.8)) for c in curves]):
        expected = draw_curves(fit_model(same), EPOCHS.astype(float), {}).mean(0)
        assert np.isfinite(expected).all()
        assert np.ptp(expected) == pytest.approx(np.ptp(same[0].mean_dice), abs=0.005)


@pytest.mark.parametrize("state", ["free", "frozen"])
@pytest.mark.parametrize(
    "epochs", [range(100), range(16), range(1, 301), [1, 20, 50, 100, 150, 200, 250, 300], [296, 300]]
)
def test_the_shipped_chooser_takes_the_last_without_a_price(state: str, epochs: list[int]) -> None:
    shipped = read_chooser()
    for encoder in ("resnet50", "no_net"):
        assert choose_by_expected_loss(shipped, epochs, None, state, encoder=encoder).index == len(epochs) - 1
    if len(epochs) > 2:
        assert choose_by_expected_loss(shipped, epochs, None, state, price=20).index < len(epochs) - 1


def test_epochs_that_count_from_zero_are_one_more() -> None:
    said = [choose_by_expected_loss(read_chooser(), epochs, None).warnings for epochs in ([0, 7, 15], [1, 7, 15])]
    assert ["this pretraining has" in " ".join(w) for w in said] == [False, True]


def test_the_papers_own_network_is_among_the_published_curves() -> None:
    told = [
        choose_by_expected_loss(read_chooser(), [50, 100, 200, 300], None, "free", encoder=name).warnings
        for name in ("resnet50", "resnet50_padded_shortcut", "resnet50_padded_shortcut_droppath", "resnet101")
    ]
    assert [any("was not among the fitted ones" in w for w in warnings) for warnings in told] == [
        False,
        False,
        False,
        True,
    ]

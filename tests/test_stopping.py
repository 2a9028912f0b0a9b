"""When to stop: the rules on made curves whose answer is known, and what must hold for any input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chooser import SCORE, simulated

from mtl_nnunet.chooser import log_time, read_chooser, trends
from mtl_nnunet.errors import UserError
from mtl_nnunet.stopping import LEAST_SHARE, StopRule, carried_on, decide, expected_gain, last_improvement

CHOOSER = read_chooser()
EPOCHS = [1.0, 5.0, 20.0, 50.0, 100.0, 150.0, 200.0]
SEEN = [c.scores["seen"][: len(EPOCHS)] for c in simulated(2, 5)[0]]


def noisy(values: np.ndarray, noise: float = 0.01, draws: int = 400) -> np.ndarray:
    return values[:, None] + np.random.default_rng(0).normal(0, noise, (len(values), draws))


def test_with_no_price_no_epoch_but_the_last_is_a_stop() -> None:
    for state, seen in (("free", 290), ("frozen", 270)):
        late = decide(StopRule(state=state), range(seen), np.zeros(seen), np.zeros((seen, 1)), 20, {}, 299)
        assert not late.stop
        assert late.best == seen - 1


def test_with_no_price_going_on_is_worth_it_until_the_last_epoch() -> None:
    rule = StopRule("expected-gain")
    for seen in range(1, len(EPOCHS) + 1):
        advice = decide(rule, EPOCHS[:seen], np.zeros(seen), np.zeros((seen, 1)), 20, {}, 300)
        assert not advice.stop
        assert advice.gain is not None
        assert advice.gain.value > 0
        assert advice.gain.low < advice.gain.value < advice.gain.high
    over = decide(rule, [*EPOCHS, 300.0], np.zeros(8), np.zeros((8, 1)), 20, {}, 300)
    assert over.is_over
    assert over.stop


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.floats(0, 8), st.floats(0, 8), st.sampled_from(["free", "frozen"]), st.booleans())
def test_a_higher_price_never_stops_later(
    chooser_file: Path, seen: int, price: float, more: float, state: str, by_score: bool
) -> None:
    scores = {SCORE: SEEN[0][:seen]} if by_score else {}
    chooser = read_chooser(chooser_file) if by_score else CHOOSER
    cheap, dear = (expected_gain(chooser, EPOCHS[:seen], 300, scores, state, p) for p in (price, price + more))
    assert dear.value <= cheap.value + 1e-12
    assert dear.best == cheap.best


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(7)))
def test_the_order_of_files_does_not_matter(chooser_file: Path, order: list[int]) -> None:
    values = np.array([0.1, 0.4, 0.3, 0.6, 0.55, 0.5, 0.52])
    samples = noisy(values)
    for rule in (StopRule("expected-gain", price=1.0, chooser=chooser_file), StopRule("patience", patience=2)):
        straight = decide(rule, EPOCHS, values, samples, 30, {SCORE: values}, 300)
        shuffled = decide(
            rule, [EPOCHS[i] for i in order], values[order], samples[order], 30, {SCORE: values[order]}, 300
        )
        assert shuffled.stop == straight.stop
        assert EPOCHS[order[shuffled.best]] == EPOCHS[straight.best]
        assert shuffled.reason == straight.reason
        assert shuffled.gain is None or straight.gain is None or shuffled.gain.value == straight.gain.value


def test_scores_move_the_gain_once_they_tell_of_the_run(chooser_file: Path) -> None:
    chooser = read_chooser(chooser_file)
    alone = expected_gain(chooser, EPOCHS, 300)
    gains = [expected_gain(chooser, EPOCHS, 300, {SCORE: values}) for values in SEEN]
    assert [g.used for g in gains] == [(SCORE,), (SCORE,)]
    assert len({round(g.value, 6) for g in (alone, *gains)}) == 3
    # five checkpoints, and seven of less than a third of the run
    few = expected_gain(chooser, EPOCHS[:5], 300, {SCORE: SEEN[0][:5]})
    early = expected_gain(chooser, EPOCHS, 200 / LEAST_SHARE + 1, {SCORE: SEEN[0]})
    for gain, at, whole in ((few, EPOCHS[:5], 300), (early, EPOCHS, 200 / LEAST_SHARE + 1)):
        assert gain.used == ()
        assert "epochs alone decide" in gain.warnings[0]
        assert gain.value == expected_gain(chooser, at, whole).value
    # the shipped chooser reads none
    assert expected_gain(CHOOSER, EPOCHS, 300, {SCORE: SEEN[0]}).value == expected_gain(CHOOSER, EPOCHS, 300).value


def test_a_score_unlike_all_fitted_ones_is_left_out_with_a_warning(chooser_file: Path) -> None:
    chooser = read_chooser(chooser_file)
    gain = expected_gain(chooser, EPOCHS, 300, {SCORE: 1e6 * SEEN[0]})
    assert gain.used == ()
    assert any("unlike the fitted curves that scores are left out" in w for w in gain.warnings)
    assert gain.value == expected_gain(chooser, EPOCHS, 300).value
    said = " ".join(expected_gain(CHOOSER, EPOCHS[:2], 40 * 300, encoder="my_net").warnings)
    assert "those it was fitted on 16 to 300" in said
    assert "'my_net' was not among the fitted ones" in said


def test_a_trend_is_carried_on_as_by_ridge_regression() -> None:
    from sklearn.linear_model import Ridge

    epochs = np.array([*EPOCHS, 250.0, 300.0])
    values = np.random.default_rng(1).normal(size=7)
    trend = trends(log_time(epochs, 300.0))
    oracle = Ridge(alpha=1.0).fit(trend[:7], values).predict(trend[7:])
    carried = carried_on(values, epochs, 300.0)
    np.testing.assert_array_equal(carried[:7], values)
    np.testing.assert_allclose(carried[7:], oracle, rtol=1e-9)
    np.testing.assert_allclose(carried_on(1000 * values, epochs, 300.0), 1000 * carried, rtol=1e-9)


def test_patience_counts_checkpoints_since_an_improvement_beyond_the_noise() -> None:
    values = np.array([0.50, 0.60, 0.605, 0.61, 0.70, 0.69, 0.70])
    samples = noisy(values)
    assert last_improvement(values, samples, 50) == 4
    stops = [decide(StopRule("patience", patience=2), range(k), values[:k], samples[:k], 50).stop for k in range(1, 8)]
    # two checkpoints within the noise of 0.60; going on past that shows 0.70, which is beyond it
    assert stops == [False, False, False, True, False, False, True]
    for shorter, longer in ((1, 2), (2, 3)):
        first, second = (
            [decide(StopRule("patience", patience=p), range(k), values[:k], samples[:k], 50).stop for k in range(1, 8)]
            for p in (shorter, longer)
        )
        assert all(a or not b for a, b in zip(first, second, strict=True))


def test_slow_improvement_adds_up() -> None:
    # each step within the noise of the one before, all together far beyond it
    values = 0.5 + 0.01 * np.arange(10)
    advice = decide(StopRule("patience", patience=4), range(10), values, noisy(values), 50)
    assert not advice.stop
    assert advice.best > 5


def test_without_a_noise_any_increase_counts_and_a_warning_says_so() -> None:
    values = np.array([0.5, 0.51, 0.52])
    advice = decide(StopRule("patience", patience=1), [None, None, None], values, noisy(values), num_patients=3)
    assert not advice.stop
    assert advice.best == 2
    assert "noise is not known" in advice.warnings[0]


def test_auto_takes_patience_where_epochs_or_length_are_unknown() -> None:
    values = np.array([0.5, 0.6])
    rules = [
        decide(StopRule(), epochs, values, noisy(values), 20, None, last).rule
        for epochs, last in (([0, 1], 39), ([0, 1], None), ([None, 1], 39))
    ]
    assert rules == ["expected-gain", "patience", "patience"]
    for epochs, last, missing in (([0, 1], None, "pass -epochs N"), ([None, 1], 39, "not every checkpoint states")):
        told = decide(StopRule(), epochs, values, noisy(values), 20, None, last).warnings
        assert len(told) == 1
        assert "patience decides" in told[0]
        assert missing in told[0]
    assert not decide(StopRule("patience"), [0, 1], values, noisy(values), 20).warnings


@pytest.mark.parametrize(
    ("seen", "last", "by_the_score"),
    [
        ([-2.82, -1.65, -0.48, -0.36, 0.89, 1.28, 0.5], 300, (5, False)),
        ([-2.41, -1.67, -1.68, -0.54, -0.48, 0.19, 1.09], 210, (6, True)),
    ],
)
def test_without_a_price_an_encoder_that_was_not_fitted_goes_on_to_the_end(
    chooser_file: Path, seen: list[float], last: int, by_the_score: tuple[int, bool]
) -> None:
    def decided(encoder: str) -> tuple[int, bool]:
        rule = StopRule("expected-gain", chooser=chooser_file)
        advice = decide(rule, EPOCHS, seen, np.zeros((len(EPOCHS), 1)), 20, {SCORE: seen}, last, encoder)
        assert advice.gain is not None
        assert advice.gain.used == (SCORE,)
        return advice.best, advice.stop

    (fitted,) = read_chooser(chooser_file).states["free"].encoders[:1]
    assert decided(fitted) == by_the_score
    assert decided("not_fitted") == (len(EPOCHS) - 1, False)


@pytest.mark.parametrize(
    ("rule", "epochs", "last", "said"),
    [
        (StopRule("expected-gain"), [0, None], 39, "not every checkpoint states its epoch"),
        (StopRule("expected-gain"), [0, 1], None, "pass -epochs"),
        (StopRule(price=0.5), [0, 1], None, "pass -epochs N .*Or use -rule patience"),
        (StopRule(price=0.5), [0, None], 39, "not every checkpoint states its epoch. Or use -rule patience"),
        (StopRule(), [3, 3], 39, "given twice"),
        (StopRule(), [], 39, "no checkpoint"),
    ],
)
def test_what_cannot_be_decided_is_refused(
    rule: StopRule, epochs: list[int | None], last: int | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        decide(rule, epochs, np.zeros(len(epochs)), np.zeros((len(epochs), 1)), 20, None, last)


@pytest.mark.parametrize(
    "wrong", [{"name": "hope"}, {"price": -1.0}, {"price": float("nan")}, {"state": "warm"}, {"patience": 0}]
)
def test_rules_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        StopRule(**wrong)  # type: ignore[arg-type]


def test_a_run_beyond_its_plan_is_over_and_an_epoch_beyond_it_has_no_gain() -> None:
    assert decide(StopRule(), [0, 45], np.zeros(2), np.zeros((2, 1)), 20, None, 39).is_over
    with pytest.raises(UserError, match="beyond the last planned epoch, 39"):
        expected_gain(CHOOSER, [0, 45], 39)

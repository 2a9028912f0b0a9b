"""What is known of the published tables, measured again; numbers by hand from notes that predate this code."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from conftest import REAL_DATA

from mtl_nnunet.curves import Curve, published_score, read_curves
from mtl_nnunet.evaluation import (
    Evaluation,
    Judged,
    agreement,
    argbest,
    contrast,
    earliest_within,
    earliest_within_error,
    evaluate,
    judge,
    noise_floor,
    split_regret,
    verdict,
)
from mtl_nnunet.scores import parse_score

PUBLISHED = REAL_DATA.parent / "published"
DEFAULT = published_score(4, True, "cosine", 0.5)
STATES = ("free", "frozen")
pytestmark = pytest.mark.skipif(
    not (PUBLISHED / "downstream_scores.csv").is_file(),
    reason="MTL_TEST_DATA has no neighbour folder 'published' with the published tables",
)


@pytest.fixture(scope="module")
def curves() -> list[Curve]:
    return read_curves(PUBLISHED / "downstream_scores.csv", PUBLISHED / "robustness_scores.csv")


@pytest.fixture(scope="module")
def evaluation(curves: list[Curve]) -> Evaluation:
    return evaluate(curves, draws=100)


def of(curves: list[Curve], state: str, paired: bool = True) -> list[Judged]:
    return [judge(c, paired) for c in curves if c.state == state]


def row(evaluation: Evaluation, rule: str, state: str) -> dict[str, float]:
    summary = evaluation.summary
    (found,) = summary[(summary["rule"] == rule) & (summary["state"] == state)].to_dict("records")
    return found


def test_curves_are_those_that_were_published(curves: list[Curve]) -> None:
    assert len(curves) == 36
    for c in curves:
        assert c.epochs.tolist() == [1, 5, 20, 50, 100, 150, 200, 250, 300]
        assert c.dice.shape == (9, 5)
        assert len(c.scratch) == 5
        # a Swin has four levels, the others five; 3 distances, 5 margins, pooled or not
        assert len(c.scores) == (120 if c.encoder == "swin_transformer" else 150)
        assert not c.random_scores, "pretraining length 0 repeats length 300 on two of three targets"
    for name in curves[0].scores:
        assert parse_score(name).text == name


@pytest.mark.parametrize(
    ("rule", "state", "regret", "worst", "epoch"),
    [
        ("last epoch", "free", 0.0024, 0.0157, 300),
        ("fixed epoch 250", "free", 0.0032, 0.0188, 250),
        ("fixed epoch 200", "free", 0.0062, 0.0230, 200),
        ("fixed epoch 150", "free", 0.0067, 0.0233, 150),
        (DEFAULT, "free", 0.0062, 0.0273, 149),
        ("random epoch", "free", 0.0106, None, None),
        ("last epoch", "frozen", 0.0056, 0.0220, 300),
        ("fixed epoch 250", "frozen", 0.0057, 0.0264, 250),
        ("fixed epoch 200", "frozen", 0.0057, 0.0175, 200),
        ("fixed epoch 150", "frozen", 0.0096, 0.0278, 150),
        (DEFAULT, "frozen", 0.0070, 0.0536, 149),
    ],
)
def test_regret(
    evaluation: Evaluation, rule: str, state: str, regret: float, worst: float | None, epoch: float | None
) -> None:
    found = row(evaluation, rule, state)
    assert found["regret"] == pytest.approx(regret, abs=0.6e-4)
    if worst is not None and epoch is not None:
        assert found["worst"] == pytest.approx(worst, abs=0.6e-4)
        assert found["epoch"] == pytest.approx(epoch, abs=0.6)


@pytest.mark.parametrize(
    ("rule", "state", "measure", "value"),
    [
        ("last epoch", "free", "spearman", 0.63),
        ("last epoch", "frozen", "spearman", 0.56),
        (DEFAULT, "free", "spearman", 0.26),
        (DEFAULT, "frozen", "spearman", 0.45),
        ("last epoch", "free", "kendall_tau", 0.59),
        # 0.4846 by this code, 0.49 in the notes
        ("last epoch", "frozen", "kendall_tau", 0.485),
    ],
)
def test_rank_agreement(evaluation: Evaluation, rule: str, state: str, measure: str, value: float) -> None:
    assert row(evaluation, rule, state)[measure] == pytest.approx(value, abs=0.0051)


@pytest.mark.parametrize(("state", "wins", "paired_wins"), [("free", 2, 3), ("frozen", 9, 11)])
def test_how_often_the_best_beats_the_last(
    curves: list[Curve], evaluation: Evaluation, state: str, wins: int, paired_wins: int
) -> None:
    differences = [(j, j.take(j.best) - j.take(j.num_checkpoints - 1)) for j in of(curves, state)]
    assert sum(verdict(*contrast(j.dice, d, paired=False)) == 1 for j, d in differences) == wins
    # the seeds are shared, and paired by them the differences are surer
    assert row(evaluation, "best epoch", state)["wins_last"] == paired_wins


@pytest.mark.parametrize(("state", "epoch", "at_first"), [("free", 178, 5), ("frozen", 169, 0)])
def test_oracle_within_one_standard_error(curves: list[Curve], state: str, epoch: float, at_first: int) -> None:
    judged = of(curves, state)
    taken = [earliest_within_error(j, paired=False) for j in judged]
    assert np.mean([j.epochs[i] for j, i in zip(judged, taken, strict=True)]) == pytest.approx(epoch, abs=0.5)
    assert taken.count(0) == at_first


def test_earliest_within_half_a_point(curves: list[Curve], evaluation: Evaluation) -> None:
    assert np.median([j.epochs[earliest_within(j, 0.005)] for j in of(curves, "free")]) == 100
    assert row(evaluation, "earliest within 0.005 Dice", "free")["median_epoch"] == 100


@pytest.mark.parametrize(("state", "headroom", "kendall"), [("free", 0.10, 0.66), ("frozen", 0.46, 0.83)])
def test_headroom_and_ceiling_with_every_epoch_split_on_its_own(
    curves: list[Curve], state: str, headroom: float, kendall: float
) -> None:
    judged = of(curves, state, paired=False)
    gains = [split_regret(j, j.take(j.num_checkpoints - 1)) for j in judged]
    assert 100 * np.mean(gains) == pytest.approx(headroom, abs=0.02)
    taus = [
        agreement(a, b)["kendall_tau"]
        for j in judged
        for a, b in zip(j.picking, j.judging[:, : j.num_checkpoints], strict=True)
    ]
    assert np.mean(taus) == pytest.approx(kendall, abs=0.01)
    if state == "frozen":
        plain = [g for g, j in zip(gains, judged, strict=True) if j.curve.encoder == "u-net_encoder"]
        assert 100 * np.mean(plain) == pytest.approx(0.88, abs=0.02)


def test_seeds_that_stay_together_agree_better(evaluation: Evaluation) -> None:
    noise = evaluation.noise.set_index("state")
    assert noise.loc["free", "kendall_tau_of_halves"] == pytest.approx(0.69, abs=0.005)
    assert noise.loc["frozen", "kendall_tau_of_halves"] == pytest.approx(0.86, abs=0.005)
    assert 100 * row(evaluation, "last epoch", "free")["split_regret"] == pytest.approx(0.13, abs=0.005)
    assert 100 * row(evaluation, "last epoch", "frozen")["split_regret"] == pytest.approx(0.50, abs=0.005)


def test_noise_floor_and_real_trainings(curves: list[Curve], evaluation: Evaluation) -> None:
    free = of(curves, "free")
    assert np.mean([noise_floor(j.curve.dice, paired=False) for j in free]) == pytest.approx(0.0004, abs=0.5e-4)
    # what a seed does to all epochs alike is not noise of the choice
    assert evaluation.noise.set_index("state").loc["free", "noise_floor"] == pytest.approx(0.00025, abs=0.2e-4)
    assert row(evaluation, "real trainings, half the seeds", "free")["regret"] == pytest.approx(0.0012, abs=0.5e-4)


def first_argbest(values: np.ndarray) -> int:
    return int(np.nanargmax(values))


def regrets(curves: list[Curve], names: list[str], choose: object) -> np.ndarray:
    assert callable(choose)
    return np.array([[c.mean_dice.max() - c.mean_dice[choose(c.scores[n])] for c in curves] for n in names])


def left_out(curves: list[Curve], values: np.ndarray) -> float:
    datasets = np.array([c.dataset for c in curves])
    means = []
    for dataset in np.unique(datasets):
        best = values[:, datasets != dataset].mean(1).argmin()
        means.append(values[best, datasets == dataset].mean())
    return float(np.mean(means))


def test_the_variant_chosen_on_other_targets_depends_on_how_ties_are_broken(
    curves: list[Curve], evaluation: Evaluation
) -> None:
    free = [c for c in curves if c.state == "free"]
    names = [n for n in free[0].scores if all(n in c.scores for c in free)]
    assert len(names) == 120
    # of equal scores the earlier epoch: what the notes say, no better than a random epoch
    assert left_out(free, regrets(free, names, first_argbest)) == pytest.approx(0.0107, abs=0.6e-4)
    # of equal scores the later epoch: what this package does
    later = left_out(free, regrets(free, names, argbest))
    assert later == pytest.approx(0.0066, abs=0.6e-4)
    assert row(evaluation, "score chosen on other targets", "free")["regret"] == pytest.approx(later, abs=1e-3)


def test_the_variant_of_the_deepest_level_in_hindsight(curves: list[Curve], evaluation: Evaluation) -> None:
    name = published_score(5, False, "l2", 0.25)
    free = [c for c in curves if c.state == "free" and name in c.scores]
    assert len(free) == 12
    found = regrets(free, [name], first_argbest)[0]
    # 0.0028 in the notes, which count twice two trainings that stand in the table twice
    assert found.mean() == pytest.approx(0.0027, abs=0.6e-4)
    assert found.max() == pytest.approx(0.0167, abs=0.6e-4)
    assert np.mean([c.epochs[first_argbest(c.scores[name])] for c in free]) == pytest.approx(196, abs=0.6)
    assert row(evaluation, name, "free")["regret"] == pytest.approx(0.0025, abs=0.6e-4), "of equals the later"


@pytest.mark.parametrize("state", STATES)
def test_without_the_doubted_curves(curves: list[Curve], state: str) -> None:
    kept = [c for c in curves if (c.encoder, c.scheme) != ("resnet50", "advanced")]
    assert len(kept) == 30
    found = evaluate(kept, draws=100)
    slow = [c.mean_dice.max() - c.mean_dice[-1] for c in kept if c.state == state]
    assert row(found, "last epoch", state)["regret"] == pytest.approx(np.mean(slow))
    # what holds with them holds without: the default is about as good as always stopping at half time
    default, half_time = row(found, DEFAULT, state), row(found, "fixed epoch 150", state)
    assert abs(default["regret"] - half_time["regret"]) < 0.004
    assert default["regret"] > row(found, "last epoch", state)["regret"]


def test_names_of_all_variants(curves: list[Curve]) -> None:
    expected = {
        published_score(*v)
        for v in product(range(1, 6), (True, False), ("cosine", "l2", "pearson"), (0.0, 0.25, 0.5, 0.75, 1.0))
    }
    assert {n for c in curves for n in c.scores} == expected

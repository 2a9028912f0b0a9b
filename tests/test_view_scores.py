"""Scores of views against the formulas of their papers, written the slow way or with torch's own functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, pdist

from mtl_nnunet.bootstrap import bootstrap_draws
from mtl_nnunet.errors import UserError
from mtl_nnunet.scores import SCORES, Features, parse_score
from mtl_nnunet.scores.alignment import alignment
from mtl_nnunet.scores.alignment import statistic as alignment_statistic
from mtl_nnunet.scores.infonce import infonce
from mtl_nnunet.scores.infonce import statistic as infonce_statistic
from mtl_nnunet.scores.rankme import effective_rank
from mtl_nnunet.scores.rankme import statistic as rankme_statistic
from mtl_nnunet.scores.uniformity import statistic as uniformity_statistic
from mtl_nnunet.scores.uniformity import uniformity


def views(num_slices: int = 12, d: int = 5, num_views: int = 2, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    slices = torch.randn(num_slices, d, generator=generator)
    return slices + noise * torch.randn(num_views, num_slices, d, generator=generator)


def test_infonce_is_torchs_cross_entropy_less_the_logarithm_of_the_negatives() -> None:
    z = views(num_views=3)
    n, t = z.shape[1], 0.2
    unit = normalize(z.double(), dim=-1)
    losses = []
    for a in range(3):
        for b in range(3):
            if a != b:
                losses.append(cross_entropy(unit[a] @ unit[b].T / t, torch.arange(n)))
    expected = math.log(n - 1) - torch.stack(losses).mean().item()
    assert infonce(z, np.arange(n), t) == pytest.approx(expected, rel=1e-9)


def test_infonce_takes_negatives_of_other_patients_only() -> None:
    z, patients, t = views(), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]), 0.3
    unit = normalize(z.double(), dim=-1)
    terms = []
    for a, b in ((0, 1), (1, 0)):
        for i in range(12):
            others = [j for j in range(12) if patients[j] != patients[i]]
            positive = float(unit[a, i] @ unit[b, i]) / t
            negatives = [math.exp(float(unit[a, i] @ unit[b, j]) / t - positive) for j in others]
            terms.append(-math.log(1 / len(others) + np.mean(negatives)))
    assert infonce(z, patients, t) == pytest.approx(np.mean(terms), rel=1e-9)


def test_infonce_of_cold_temperatures_is_refused_and_of_low_ones_is_finite() -> None:
    z = views(noise=3.0)
    assert np.isfinite(infonce(z, np.arange(12), 0.005))
    with pytest.raises(ValueError, match="temperature"):
        infonce(z, np.arange(12), 0.001)


def test_alignment_and_uniformity_are_those_of_wang_and_isola() -> None:
    z = views()
    x, y = normalize(z.double(), dim=-1)
    assert alignment(z) == pytest.approx((x - y).norm(dim=1).pow(2).mean().item(), rel=1e-9)
    theirs = [pdist(v).pow(2).mul(-2).exp().mean().log().item() for v in (x, y)]
    for view, value in zip(z, theirs, strict=True):
        assert uniformity(view[None], np.arange(12)) == pytest.approx(value, rel=1e-9)


def test_rows_of_zeros_are_not_spread() -> None:
    assert uniformity(torch.zeros(1, 6, 4), np.arange(6)) == 0


@pytest.mark.parametrize(
    "statistic",
    [
        lambda z, p: alignment_statistic(z, p),
        lambda z, p: uniformity_statistic(z[:1], p, 2.0),
    ],
    ids=["alignment", "uniformity"],
)
def test_a_draw_is_the_score_of_the_slices_of_the_drawn_patients(statistic: object) -> None:
    z, patients = views(num_slices=20, seed=3), np.arange(20) // 2
    of_all = statistic(z, patients)  # type: ignore[operator]
    for out in range(10):
        kept = patients != out
        alone = statistic(z[:, kept], np.unique(patients[kept], return_inverse=True)[1])  # type: ignore[operator]
        multiplicities = np.ones((1, 10))
        multiplicities[0, out] = 0
        assert of_all(multiplicities)[0] == pytest.approx(alone(np.ones((1, 9)))[0], rel=1e-9)


def test_infonce_of_a_draw_keeps_the_number_of_negatives_that_all_patients_have() -> None:
    z, patients = views(num_slices=20, seed=3), np.arange(20)
    multiplicities = np.ones((1, 20))
    multiplicities[0, 4] = 0
    unit = normalize(z.double(), dim=-1)
    terms = []
    for a, b in ((0, 1), (1, 0)):
        for i in set(range(20)) - {4}:
            gaps = [float(unit[a, i] @ (unit[b, j] - unit[b, i])) for j in set(range(20)) - {4, i}]
            terms.append(-math.log(1 / 19 + np.mean(np.exp(np.array(gaps) / 0.1))))
    assert infonce_statistic(z, patients, 0.1)(multiplicities)[0] == pytest.approx(np.mean(terms), rel=1e-9)


@pytest.mark.parametrize(("per_patient", "d"), [(2, 300), (2, 60), (8, 30)])
def test_error_bars_of_rankme_are_those_of_new_patients(per_patient: int, d: int) -> None:
    # directions of falling strength, and patients that lie apart
    num_patients = 30
    patients = np.repeat(np.arange(num_patients), per_patient)
    strengths = torch.arange(1, d + 1, dtype=torch.float32).rsqrt()
    values, spreads = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(num_patients, d, generator=generator).repeat_interleave(per_patient, 0)
        x = (centres + 0.5 * torch.randn(len(patients), d, generator=generator)) * strengths
        statistic = rankme_statistic(x[None], patients)
        values.append(statistic(np.ones((1, num_patients)))[0])
        spreads.append(statistic(bootstrap_draws(num_patients, 500, seed)).std())
        assert values[-1] == pytest.approx(effective_rank(x), rel=1e-6)
    assert 0.7 < np.mean(spreads) / np.std(values) < 1.6


@pytest.mark.parametrize("name", [n for n, s in SCORES.items() if s.reads == "views"])
def test_collapsed_or_broken_embeddings_are_refused_and_not_ranked_first(name: str) -> None:
    score, n = parse_score(name), 12
    (level,) = score.resolved_levels(5, "resnet18")

    def at(embeddings: torch.Tensor) -> Features:
        return Features({(score.view_key, level, True): embeddings}, {}, np.arange(n), {}, 5, "checkpoint x.pth")

    good = views(n, num_views=3)
    assert np.isfinite(score.statistic(at(good))[0](np.ones((1, n))))
    rounding = 1 + 1e-8 * good
    for bad in (torch.zeros_like(good), torch.full_like(good, 3.0), rounding.float()):
        with pytest.raises(UserError, match=r"checkpoint x\.pth gives the same features"):
            score.statistic(at(bad))
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=r"checkpoint x\.pth gives NaN or infinite"):
            score.statistic(at(torch.where(torch.arange(5) == 2, value, good)))

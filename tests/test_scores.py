"""Scores against slow formulas, numbers worked out by hand, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_nnunet.errors import UserError
from mtl_nnunet.scores import SCORES, parse_score
from mtl_nnunet.scores.contrastive import contrastive, patient_pairs
from mtl_nnunet.scores.contrastive import statistic as contrastive_statistic
from mtl_nnunet.scores.distances import DISTANCES, pairwise
from mtl_nnunet.scores.robustness import negative_of, robustness, robustness_terms
from mtl_nnunet.scores.robustness import statistic as robustness_statistic


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_distance(name: str, x: list[float], y: list[float]) -> float:
    if name == "cosine":
        dot = sum(a * b for a, b in zip(x, y, strict=True))
        return 1 - dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    if name == "l2":
        return sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)
    return 1 - float(np.corrcoef(x, y)[0, 1])


def published_negatives(view: list[list[float]]) -> list[list[float]]:
    """The published construction, literally: reverse the list, then move its last two to the front."""
    reverse = [view[i - 1] for i in range(len(view), 0, -1)]
    return [reverse[-2], reverse[-1], *reverse[:-2]]


@pytest.mark.parametrize("n", range(2, 14))
def test_permutation_is_the_published_one(n: int) -> None:
    literal = [int(v[0]) for v in published_negatives([[float(i)] for i in range(n)])]
    assert negative_of(n).tolist() == literal
    assert sorted(literal) == list(range(n))


@pytest.mark.parametrize("n", range(2, 14))
def test_no_image_is_its_own_negative_once_the_odd_one_is_dropped(n: int) -> None:
    even = n - n % 2
    assert not (negative_of(even) == torch.arange(even)).any()
    # an image that were its own negative would have exactly the margin as its term
    a, b = embeddings(n, 5), embeddings(n, 5, seed=1)
    terms = robustness_terms(a, b, margin=0.7)
    assert len(terms) == even
    assert not (terms == 0.7).any()


@pytest.mark.parametrize("n", [3, 5, 7, 9, 11])
def test_published_permutation_has_the_fault_that_dropping_mends(n: int) -> None:
    assert (negative_of(n) == torch.arange(n)).sum() == 1


@pytest.mark.parametrize("distance", ["cosine", "l2", "pearson"])
@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("n", [2, 3, 8, 13])
def test_robustness_is_the_published_formula(distance: str, margin: float, n: int) -> None:
    a, b = embeddings(n, 6), embeddings(n, 6, seed=1)
    even = n - n % 2
    x, y = a[:even].tolist(), b[:even].tolist()
    terms = [
        max(0.0, slow_distance(distance, p, q) - slow_distance(distance, p, negative) + margin)
        for p, q, negative in zip(x, y, published_negatives(y), strict=True)
    ]
    assert robustness(a, b, margin, distance).item() == pytest.approx(sum(terms) / even, abs=1e-12)


def test_robustness_by_hand() -> None:
    # negatives of 4 images: 1, 0, 3, 2
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    half = 1 - 1 / math.sqrt(2)
    # positives: 0, 0, 1, half; negatives: d(a0, b1)=1, d(a1, b0)=1, d(a2, b3)=0, d(a3, b2)=half
    by_hand = [max(0, 0 - 1 + 0.5), max(0, 0 - 1 + 0.5), 1 - 0 + 0.5, half - half + 0.5]
    assert robustness_terms(a, b).tolist() == pytest.approx(by_hand)
    assert robustness(a, b).item() == pytest.approx((0 + 0 + 1.5 + 0.5) / 4)


def test_robustness_of_fewer_than_two_images_does_not_exist() -> None:
    with pytest.raises(ValueError, match="at least two"):
        robustness(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="one shape"):
        robustness(torch.zeros(4, 3), torch.zeros(4, 2))


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_pairwise_is_the_elementwise_distance_of_every_pair(distance: str) -> None:
    x, y = embeddings(7, 5), embeddings(4, 5, seed=1)
    assert torch.allclose(pairwise(distance, x, y), DISTANCES[distance](x[:, None], y[None]), atol=1e-12)


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_a_row_without_direction_is_no_evidence_and_no_nan(distance: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    assert torch.isfinite(DISTANCES[distance](x, x)).all()
    assert torch.isfinite(pairwise(distance, x, x)).all()


def slow_contrastive(views: Tensor, patients: list[int], distance: str, weights: list[float] | None = None) -> float:
    """Quadruple loop; ``weights`` are how often each patient was drawn."""
    v, n, _ = views.shape
    w = weights or [1.0] * (max(patients) + 1)
    won = made = 0.0
    for a in range(v):
        for b in range(v):
            for i in range(n):
                for j in range(n):
                    if a == b or patients[i] == patients[j]:
                        continue
                    positive = slow_distance(distance, views[a, i].tolist(), views[b, i].tolist())
                    negative = slow_distance(distance, views[a, i].tolist(), views[b, j].tolist())
                    trial = w[patients[i]] * w[patients[j]]
                    made += trial
                    won += trial * (1.0 if positive < negative else 0.5 if positive == negative else 0.0)
    return won / made


PATIENTS = np.array([0, 0, 1, 2, 2, 2, 3])


@pytest.mark.parametrize("distance", sorted(DISTANCES))
def test_contrastive_is_its_quadruple_loop(distance: str) -> None:
    views = embeddings(3, 7, 4)
    assert contrastive(views, PATIENTS, distance) == pytest.approx(slow_contrastive(views, PATIENTS.tolist(), distance))


def test_contrastive_does_not_depend_on_scale_rotation_or_order() -> None:
    views = embeddings(3, 7, 4)
    expected = contrastive(views, PATIENTS)
    rotation, _ = torch.linalg.qr(embeddings(4, 4, seed=2))
    assert contrastive(views * 1e-3, PATIENTS) == pytest.approx(expected)
    assert contrastive(views @ rotation, PATIENTS) == pytest.approx(expected)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    assert contrastive(views[:, order], PATIENTS[order.numpy()]) == pytest.approx(expected)
    assert contrastive(views.flip(0), PATIENTS) == pytest.approx(expected)
    assert contrastive(views, np.array([2, 0, 3, 1])[PATIENTS]) == pytest.approx(expected)


def test_contrastive_is_chance_where_nothing_differs_and_one_where_everything_does() -> None:
    assert contrastive(torch.full((3, 7, 4), 0.3), PATIENTS) == 0.5
    assert contrastive(torch.eye(7).expand(3, 7, 7), PATIENTS) == 1.0


def test_slices_of_one_patient_are_never_negatives() -> None:
    won, made = patient_pairs(embeddings(2, 7, 4), PATIENTS)
    assert not np.diag(won).any()
    assert not np.diag(made).any()
    # 2 ordered pairs of views, 2 slices of patient 0, 3 of patient 2
    assert made[0, 2] == 2 * 2 * 3


def test_contrastive_needs_two_views_and_two_patients() -> None:
    with pytest.raises(ValueError, match="two views"):
        contrastive(embeddings(1, 7, 4), PATIENTS)
    with pytest.raises(ValueError, match="two patients"):
        contrastive(embeddings(2, 7, 4), np.zeros(7, dtype=int))


def test_contrastive_on_resampled_patients_is_the_loop_with_their_multiplicities() -> None:
    views = embeddings(2, 7, 4)
    draws = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 3, 1], [0, 4, 0, 0]], dtype=float)
    values = contrastive_statistic(views, PATIENTS, "cosine")(draws)
    for value, draw in zip(values[:3], draws[:3], strict=True):
        assert value == pytest.approx(slow_contrastive(views, PATIENTS.tolist(), "cosine", draw.tolist()))
    assert np.isnan(values[3]), "one patient has no other patient's slices"


def test_robustness_on_resampled_patients_weighs_each_image_by_its_patient() -> None:
    views = embeddings(2, 7, 4)
    terms = robustness_terms(views[0], views[1]).numpy()
    draws = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 0, 0, 4]], dtype=float)
    values = robustness_statistic(views, PATIENTS, 0.5, "cosine")(draws)
    for value, draw in zip(values[:2], draws[:2], strict=True):
        copies = np.repeat(terms, draw[PATIENTS[:6]].astype(int))
        assert value == pytest.approx(copies.mean())
    assert np.isnan(values[2]), "the only image of patient 3 is the odd one that is dropped"


def test_score_by_name_keeps_what_the_paper_has_as_defaults() -> None:
    score = parse_score("robustness")
    assert score.parameters == {"level": -2, "pooled": True, "distance": "cosine", "margin": 0.5}
    assert not score.higher_is_better
    assert parse_score("contrastive").higher_is_better
    changed = parse_score("robustness:level=5,pooled=no,distance=pearson,margin=0")
    assert (changed.level, changed.pooled, changed.parameters["distance"], changed.parameters["margin"]) == (
        5,
        False,
        "pearson",
        0,
    )
    assert SCORES["robustness"].level == -2, "the default is left alone"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("robustnes", "alignment, ccfv, contrastive"),
        ("robustness:magin=1", "magin"),
        ("robustness:margin", "margin"),
        ("robustness:margin=wide", "margin=wide"),
        ("robustness:margin=nan", "margin=nan"),
        ("robustness:margin=-1", "margin=-1"),
        ("robustness:level=0", "level=0"),
        ("robustness:level=2.5", "level=2.5"),
        ("robustness:distance=taxi", "cosine, l2, pearson"),
        ("contrastive:pooled=perhaps", "yes or no"),
        ("", "alignment, ccfv, contrastive"),
    ],
)
def test_what_a_user_mistypes_is_named(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_score(text)

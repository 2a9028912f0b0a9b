"""The published contrastive robustness score, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.distances import DISTANCES
from mtl_nnunet.scores.resampling import Statistic, per_patient, ratio_of_sums


def negative_of(n: int) -> Tensor:
    """Which image is whose negative: the list reversed, then shifted by two.

    For even ``n`` no image is its own negative; for odd ``n`` of three or more one image is, which is why
    ``robustness_terms`` drops the last image of an odd number.

    Args:
        n: Number of images.

    Returns:
        Index of the negative of each image, shape (n,), a permutation.

    Examples:
        >>> negative_of(4).tolist()
        [1, 0, 3, 2]
        >>> negative_of(6).tolist()
        [1, 0, 5, 4, 3, 2]
    """
    return (n - 1 - (torch.arange(n) - 2) % n) if n else torch.arange(0)


def robustness_terms(view_a: Tensor, view_b: Tensor, margin: float = 0.5, distance: str = "cosine") -> Tensor:
    """Each image's share in the robustness score.

        t_i = max(0, d(a_i, b_i) - d(a_i, b_neg(i)) + margin)

    Args:
        view_a: Embeddings of the first view, shape (N, D), float.
        view_b: Embeddings of the second view, shape (N, D), float.
        margin: Hinge margin in units of the distance (cosine: 0 to 2).
        distance: ``cosine``, ``l2`` or ``pearson``.

    Returns:
        Shape (N,), or (N - 1,) when N is odd: the last image is dropped, so that no image is its own negative.

    Raises:
        ValueError: Fewer than two images, since no negative exists, or shapes that differ.

    Source: arXiv:2410.18677, its public code, commit ae4401a.

    Examples:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> robustness_terms(a, a, margin=1.5)
        tensor([0.5000, 0.5000])
    """
    if view_a.shape != view_b.shape or view_a.ndim != 2:
        raise ValueError(f"expected two embeddings of one shape (N, D), got {view_a.shape} and {view_b.shape}")
    n = len(view_a) - len(view_a) % 2
    if n < 2:
        raise ValueError(f"robustness needs at least two images to have a negative, got {len(view_a)}")
    a, b = view_a[:n], view_b[:n]
    d = DISTANCES[distance]
    return (d(a, b) - d(a, b[negative_of(n)]) + margin).clamp_min(0)


def robustness(view_a: Tensor, view_b: Tensor, margin: float = 0.5, distance: str = "cosine") -> Tensor:
    """How much closer two views of one image stay than views of different images; lower is more robust.

        s = mean_i max(0, d(a_i, b_i) - d(a_i, b_neg(i)) + margin)

    Args:
        view_a: Embeddings of the first view, shape (N, D), float.
        view_b: Embeddings of the second view, shape (N, D), float.
        margin: Hinge margin in units of the distance (cosine: 0 to 2).
        distance: ``cosine``, ``l2`` or ``pearson``.

    Returns:
        Scalar tensor; lower means more robust.

    Raises:
        ValueError: Fewer than two images, since no negative exists, or shapes that differ.

    Source: arXiv:2410.18677, its public code, commit ae4401a.

    Examples:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> robustness(a, a)
        tensor(0.)
        >>> robustness(a, a.flip(0))
        tensor(1.5000)
    """
    return robustness_terms(view_a, view_b, margin, distance).mean()


def table(
    view_a: Tensor, view_b: Tensor, margins: Sequence[float], distances: Sequence[str] = tuple(DISTANCES)
) -> dict[tuple[str, float], float]:
    """The score for every distance and margin, each distance computed once.

    Args:
        view_a: Embeddings of the first view, shape (N, D), float.
        view_b: Embeddings of the second view, shape (N, D), float.
        margins: Which margins.
        distances: Which distances.

    Returns:
        By distance and margin; equal to ``robustness`` called for each.

    Examples:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> table(a, a.flip(0), [0.0, 0.5], ["cosine"])
        {('cosine', 0.0): 1.0, ('cosine', 0.5): 1.5}
    """
    n = len(view_a) - len(view_a) % 2
    a, b = view_a[:n], view_b[:n]
    scores = {}
    for name in distances:
        d = DISTANCES[name]
        difference = d(a, b) - d(a, b[negative_of(n)])
        for margin in margins:
            scores[name, margin] = float((difference + margin).clamp_min(0).mean())
    return scores


def statistic(views: Tensor, patients: np.ndarray, margin: float, distance: str) -> Statistic:
    """The robustness score as a function of how often each patient was drawn.

    An image counts as often as its patient was drawn; which image is its negative stays as published.

    Args:
        views: Embeddings of two views, shape (2, N, D).
        patients: Patient index of each image, shape (N,), 0 to P - 1.
        margin: See ``robustness``.
        distance: See ``robustness``.

    Returns:
        Multiplicities (B, P) to scores (B,); NaN where no image was drawn.
    """
    terms = robustness_terms(views[0], views[1], margin, distance).double().cpu().numpy()
    num_patients = int(patients.max()) + 1
    patients = patients[: len(terms)]
    return ratio_of_sums(
        per_patient(terms, patients, num_patients), per_patient(np.ones(len(terms)), patients, num_patients)
    )

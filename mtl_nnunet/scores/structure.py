"""Structure of dense features: how separate their groups are, and how many directions they use."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.rankme import rank_influence
from mtl_nnunet.scores.resampling import Statistic, by_gradient, per_patient

PARTS = ("both", "separability", "rank")


def cluster(features: Tensor, num_clusters: int) -> np.ndarray:
    """Groups of features by k-means, the same for the same features; shape (N,)."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    num_clusters = min(num_clusters, len(features))
    # with another number of threads sums come in another order, and clusters could differ
    with threadpool_limits(1), warnings.catch_warnings():
        # equal features can make fewer clusters than asked for
        warnings.simplefilter("ignore")
        groups: np.ndarray = KMeans(num_clusters, n_init=1, random_state=0).fit_predict(features.numpy())
    return groups


def separability(features: Tensor, groups: np.ndarray, weights: Tensor | None = None) -> Tensor:
    """How far features lie from other groups' centres, less how far their own group extends.

        s = (mean_i min_{c != c(i)} |x_i - mu_c| - mean_c |X_c - mu_c|_* / sqrt(max(n_c, D))) / mean_i |x_i - mu|

    |.|_* is the nuclear norm; the division makes it free of scale. The first term grows with the distance between
    groups, the second with a group's radius and the number of directions that it fills.

    Args:
        features: Shape (N, D).
        groups: Class or cluster of each, shape (N,).
        weights: Weight of each, shape (N,); ones when None.

    Returns:
        Scalar; higher is better.

    Raises:
        ValueError: A single group.

    Source: Dai et al., NeurIPS 2025, arXiv:2510.17299 (M_inter - M_intra).

    Examples:
        >>> x = torch.tensor([[0.0], [0.0], [2.0], [2.0]])
        >>> separability(x, np.array([0, 0, 1, 1])).item()
        2.0
    """
    x = features.double()
    w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
    members = [torch.as_tensor(np.flatnonzero(groups == g)) for g in np.unique(groups)]
    if len(members) < 2:
        raise ValueError("separability needs at least two groups")

    def centre(rows: Tensor) -> Tensor:
        return (w[rows, None] * x[rows]).sum(0) / w[rows].sum()

    centres = torch.stack([centre(rows) for rows in members])
    tiny = torch.finfo(torch.float64).tiny
    # x.x - 2 x.c + c.c: a matrix product instead of a (N, groups, D) tensor
    squares = x.square().sum(1, keepdim=True) - 2 * x @ centres.T + centres.square().sum(1)
    own = torch.zeros_like(squares, dtype=torch.bool)
    for g, rows in enumerate(members):
        own[rows, g] = True
    nearest = squares.masked_fill(own, math.inf).min(1).values.clamp_min(1e-24).sqrt()
    inter = (w * nearest).sum() / w.sum()
    radii = []
    for rows, c in zip(members, centres, strict=True):
        centred = (x[rows] - c) * w[rows, None].sqrt()
        gram = centred @ centred.T if len(rows) <= x.shape[1] else centred.T @ centred
        # the square root's slope at zero is infinite; a floor far below the spectrum keeps it finite
        floor = 1e-12 * gram.diagonal().sum().detach().clamp_min(tiny)
        spectrum = torch.linalg.eigvalsh(gram)
        norm = torch.where(spectrum > floor, spectrum.clamp_min(floor).sqrt(), 0.0).sum()
        radii.append(norm / w[rows].sum().clamp_min(x.shape[1]).sqrt())
    intra = torch.stack(radii).mean()
    overall = (w[:, None] * x).sum(0) / w.sum()
    scale = (w * (x - overall).square().sum(1).clamp_min(tiny).sqrt()).sum() / w.sum()
    return (inter - intra) / scale.clamp_min(tiny)


def statistic(features: Tensor, groups: np.ndarray, patients: np.ndarray, part: str) -> Statistic:
    """Separability plus the share of directions used, as a function of how often each patient was drawn.

        s = separability + effective_rank / min(N, D)

    To first order in the patients' weights; clusters are kept.

    Args:
        features: Shape (N, D).
        groups: Class or cluster of each, shape (N,).
        patients: Patient of each, shape (N,).
        part: ``both``, ``separability`` or ``rank``.
    """
    num_patients = int(patients.max()) + 1
    owner = torch.as_tensor(patients)
    share, influence = rank_influence(features)
    most = min(features.shape)
    slope = torch.as_tensor(per_patient(influence, patients, num_patients)) / most

    def score(weights: Tensor) -> Tensor:
        rank = share / most + (slope * (weights - 1)).sum()
        if part == "rank":
            return rank
        separate = separability(features, groups, weights[owner])
        return separate if part == "separability" else separate + rank

    return by_gradient(score, num_patients)

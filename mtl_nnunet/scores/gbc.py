"""Gaussian Bhattacharyya coefficient: how much the classes overlap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.resampling import Statistic, by_gradient

MIN_VARIANCE = 1e-4


def reduced(features: Tensor, components: int) -> Tensor:
    """Features on their first principal axes, shape (N, min(components, D))."""
    x = features.double()
    x = x - x.mean(0)
    if components >= x.shape[1]:
        return x
    _, axes = torch.linalg.eigh(x.T @ x)
    projected: Tensor = x @ axes[:, -components:]
    return projected


def gbc(features: Tensor, labels: np.ndarray, gaussian: str = "spherical") -> Tensor:
    """Less the overlap of the classes' Gaussians; higher is better.

        s = -sum_{c != k} exp(-B(c, k))
        B = 1/8 (mu_c - mu_k)' S^-1 (mu_c - mu_k) + 1/2 log(det S / sqrt(det S_c det S_k)),  S = (S_c + S_k) / 2

    Args:
        features: Shape (N, D).
        labels: Class of each sample, shape (N,).
        gaussian: ``spherical`` (one variance a class) or ``diagonal`` (one a class and dimension).

    Returns:
        Scalar, -C (C - 1) to 0.

    Raises:
        ValueError: A single class.

    Source: Pándy et al. 2022, arXiv:2111.12780. The determinant of a spherical covariance is its variance to the power
    D; a public implementation takes the variance alone.

    Examples:
        >>> x = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])
        >>> round(gbc(x, np.array([0, 0, 1, 1])).item(), 4)  # -2 exp(-16 / 8)
        -0.2707
    """
    means, variances = [], []
    for c in np.unique(labels):
        # a copy of its own, also where the features are double already
        x = features[torch.as_tensor(np.flatnonzero(labels == c))].double()
        means.append(x.mean(0))
        # in place, which is faster than torch.var_mean along rows
        variances.append(x.sub_(means[-1]).square_().mean(0))
    return _separation(torch.stack(means), torch.stack(variances), gaussian)


def statistic(features: Tensor, labels: np.ndarray, patients: np.ndarray, components: int, gaussian: str) -> Statistic:
    """The score on the first principal axes as a function of how often each patient was drawn, to first order."""
    x = reduced(features, components)
    classes, number = np.unique(labels, return_inverse=True)
    shape = int(patients.max()) + 1, len(classes)
    index = torch.as_tensor(patients * shape[1] + number)
    # all that the score needs of a patient: how many pixels each class has, their sum and the sum of their squares
    counts = torch.bincount(index, minlength=shape[0] * shape[1]).double().reshape(shape)
    sums, squares = (
        torch.zeros(shape[0] * shape[1], x.shape[1], dtype=torch.float64).index_add_(0, index, v).reshape(*shape, -1)
        for v in (x, x.square())
    )

    def score(weights: Tensor) -> Tensor:
        totals = (weights @ counts)[:, None]
        means = torch.einsum("p,pcd->cd", weights, sums) / totals
        return _separation(means, torch.einsum("p,pcd->cd", weights, squares) / totals - means.square(), gaussian)

    return by_gradient(score, shape[0])


def _separation(means: Tensor, variances: Tensor, gaussian: str) -> Tensor:
    if len(means) < 2:
        raise ValueError("GBC needs at least two classes")
    variances = variances.clamp_min(MIN_VARIANCE)
    if gaussian == "spherical":
        variances = variances.mean(1, keepdim=True).expand_as(means)
    pooled = (variances[:, None] + variances[None]) / 2
    distances = (means[:, None] - means[None]).square().div(pooled).sum(-1) / 8
    logs = variances.log().sum(-1)
    distances = distances + (pooled.log().sum(-1) - (logs[:, None] + logs[None]) / 2) / 2
    others = ~torch.eye(len(means), dtype=torch.bool)
    return -(-distances[others]).exp().sum()

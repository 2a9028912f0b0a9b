"""H-score with a shrunk covariance."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.resampling import Statistic, by_gradient


def hscore(features: Tensor, labels: np.ndarray, weights: Tensor | None = None) -> Tensor:
    """How much of the features' variance is between classes, in the features' own metric; higher is better.

        s = tr(S_a^-1 (1 - a) S_z),  S_a = (1 - a) S + a tr(S)/D I

    S is the covariance of the features, S_z that of their class means, a Ledoit and Wolf's shrinkage. Without the
    shrinkage S cannot be inverted where samples are fewer than features.

    Args:
        features: Shape (N, D).
        labels: Class of each sample, shape (N,).
        weights: Weight of each sample, shape (N,); ones when None.

    Returns:
        Scalar, 0 to the number of classes less one.

    Raises:
        ValueError: A single class.

    Source: Bao et al. 2019, arXiv:2212.10082; shrinkage: Ibrahim et al. 2022, arXiv:2110.06893.

    Examples:
        >>> x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [4.0, 1.0], [4.0, -1.0]]).repeat(50, 1)
        >>> right, wrong = np.tile([0, 0, 1, 1], 50), np.tile([0, 1, 1, 0], 50)
        >>> [round(abs(hscore(x, y).item()), 2) for y in (right, wrong)]
        [0.99, 0.0]
    """
    x = features.double()
    w = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError("the H-score needs at least two classes")
    n, d = w.sum(), x.shape[1]
    x = x - (w[:, None] * x).sum(0) / n
    covariance = (x * w[:, None]).T @ x / n
    shrinkage = _ledoit_wolf(x, w, covariance)
    mean_variance = covariance.diagonal().sum() / d
    identity = torch.eye(d, dtype=torch.float64)
    shrunk = (1 - shrinkage) * covariance + shrinkage * mean_variance * identity
    # a jitter far below the spectrum, for features that are constant where nothing is shrunk
    factor = torch.linalg.cholesky(shrunk + 1e-10 * mean_variance.detach() * identity)
    indicator = torch.as_tensor(labels[:, None] == classes[None, :]).double() * w[:, None]
    totals = indicator.sum(0)
    means = indicator.T @ x / totals[:, None]
    between = torch.linalg.solve_triangular(factor, means.T, upper=False).square().sum(0)
    score: Tensor = (1 - shrinkage) * (totals / n * between).sum()
    return score


def statistic(features: Tensor, labels: np.ndarray, patients: np.ndarray) -> Statistic:
    """The score as a function of how often each patient was drawn, to first order."""
    owner = torch.as_tensor(patients)
    return by_gradient(lambda weights: hscore(features, labels, weights[owner]), int(patients.max()) + 1)


def _ledoit_wolf(x: Tensor, w: Tensor, covariance: Tensor) -> Tensor:
    n, d = w.sum(), x.shape[1]
    squares = covariance.square().sum()
    trace = covariance.diagonal().sum()
    fourth = (w * x.square().sum(1).square()).sum() / n
    noise = (fourth - squares) / (d * n)
    distance = (squares - trace.square() / d) / d
    shrinkage: Tensor = torch.minimum(noise, distance) / distance.clamp_min(torch.finfo(torch.float64).tiny)
    return shrinkage.clamp(0, 1)

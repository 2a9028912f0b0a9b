"""LogME: the evidence of the labels under a Bayesian linear model of the features."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.resampling import Statistic, linearised, per_patient

GRID, ZOOMS = 128, 5


def logme(features: Tensor, labels: np.ndarray) -> float:
    """Mean log evidence per sample of one-against-rest labels, maximised over both precisions; higher is better.

        s = mean_c 1/N max_{a, b} log p(y_c | F, a, b),  w ~ N(0, 1/a),  y_c ~ N(F w, 1/b)
        log p = D/2 log a + N/2 log(b / 2 pi) - b/2 |y - F m|^2 - a/2 |m|^2 - 1/2 log det(a I + b F'F)

    The determinant has D factors also where samples are fewer than features; leaving out the D - N factors of value a
    is what makes other implementations go wrong there.

    Args:
        features: F, shape (N, D).
        labels: Class of each sample, shape (N,).

    Returns:
        Higher is better; it has no upper bound.

    Raises:
        ValueError: A single class.

    Source: You et al. 2021, arXiv:2102.11005.

    Examples:
        >>> torch.manual_seed(0).initial_seed()
        0
        >>> x, y = torch.randn(200, 5), np.arange(200) % 2
        >>> logme(x, y) < logme(x + torch.as_tensor(y)[:, None], y)
        True
    """
    return _evidence(features, labels)[0]


def statistic(features: Tensor, labels: np.ndarray, patients: np.ndarray) -> Statistic:
    """The score as a function of how often each patient was drawn, to first order.

    At the optimum the evidence does not change with the precisions, so its derivative with respect to a sample's weight
    is the explicit one.
    """
    value, influence = _evidence(features, labels)
    return linearised(value, per_patient(influence, patients, int(patients.max()) + 1))


def _evidence(features: Tensor, labels: np.ndarray) -> tuple[float, np.ndarray]:
    x = features.double()
    n, d = x.shape
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError("LogME needs at least two classes")
    y = torch.as_tensor(labels[:, None] == classes[None, :]).double()
    if n <= d:
        squares, left = torch.linalg.eigh(x @ x.T)
    else:
        squares, right = torch.linalg.eigh(x.T @ x)
        left = (x @ right) / squares.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    kept = squares > squares.max() * 1e-13
    squares, left = squares[kept, None], left[:, kept]
    z = left.T @ y
    outside = (y.square().sum(0) - z.square().sum(0)).clamp_min(0)
    ratio = torch.stack([_best_ratio(squares[:, 0], z[:, c].square(), outside[c], n) for c in range(len(classes))])
    shrunk = squares / (ratio + squares)
    weight = (shrunk.square() * z.square() / squares).sum(0)
    residual = ((1 - shrunk).square() * z.square()).sum(0) + outside
    b = n / (residual + ratio * weight).clamp_min(1e-12)
    a = ratio * b
    log_determinant = (a + b * squares).log().sum(0) + (d - len(squares)) * a.log()
    evidence = (
        d / 2 * a.log()
        + n / 2 * (b.log() - math.log(2 * math.pi))
        - b / 2 * residual
        - a / 2 * weight
        - log_determinant / 2
    )
    errors = y - left @ (shrunk * z)
    leverage = left.square() @ shrunk
    of_sample = (b.log() - math.log(2 * math.pi)) / 2 - b / 2 * errors.square() - leverage / 2
    influence = ((of_sample - evidence / n) / n).mean(1)
    return float((evidence / n).mean()), influence.numpy()


def _best_ratio(squares: Tensor, z_squared: Tensor, outside: Tensor, n: int) -> Tensor:
    """a / b of the highest evidence, b at its optimum for each ratio.

    The evidence can have several maxima, and the usual fixed point stops at whichever is near its start; in one
    dimension they can all be looked at.
    """
    low, high = (float(s.log()) for s in (squares.min(), squares.max()))
    low, high = low - 14, high + 14
    for _ in range(ZOOMS):
        logs = torch.linspace(low, high, GRID, dtype=torch.float64)
        ratio = logs.exp()[:, None]
        # |y - F m|^2 + ratio |m|^2 at the ridge solution
        energy = (ratio / (ratio + squares) * z_squared).sum(1) + outside
        profile = -n / 2 * energy.clamp_min(1e-12).log() - (squares / ratio).log1p().sum(1) / 2
        best, step = float(logs[profile.argmax()]), (high - low) / (GRID - 1)
        low, high = best - step, best + step
    return torch.tensor(best, dtype=torch.float64).exp()

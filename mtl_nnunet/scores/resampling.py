"""How scores answer to resampled patients: exactly where that is cheap, by their gradient where it is not.

A ``Statistic`` takes how often each patient was drawn, shape (B, P), and gives the score of each resampled dataset,
shape (B,). Scores that are means over patients or over pairs of patients are recomputed exactly. Scores that need a
decomposition for every draw are linearised: their derivative with respect to each patient's weight is taken once, or
each patient is left out once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Statistic = Callable[[np.ndarray], np.ndarray]


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> Statistic:
    """A mean over patients: sum_p m_p n_p / sum_p m_p d_p.

    Args:
        numerators: Shape (P,).
        denominators: Shape (P,).

    Returns:
        Multiplicities (B, P) to (B,); NaN where nothing was drawn.

    Examples:
        >>> ratio_of_sums(np.array([1.0, 3.0]), np.array([1.0, 1.0]))(np.array([[1, 1], [2, 0]]))
        array([2., 1.])
    """

    def of(multiplicities: np.ndarray) -> np.ndarray:
        return _divided(multiplicities @ numerators, multiplicities @ denominators)

    return of


def ratio_over_pairs(numerators: np.ndarray, denominators: np.ndarray) -> Statistic:
    """A mean over pairs of patients: sum_pq m_p m_q n_pq / sum_pq m_p m_q d_pq.

    Args:
        numerators: Shape (P, P), zero on the diagonal: a patient drawn twice is no pair.
        denominators: Shape (P, P), zero on the diagonal.

    Returns:
        Multiplicities (B, P) to (B,); NaN where fewer than two patients were drawn.
    """

    def of(multiplicities: np.ndarray) -> np.ndarray:
        above = ((multiplicities @ numerators) * multiplicities).sum(1)
        below = ((multiplicities @ denominators) * multiplicities).sum(1)
        return _divided(above, below)

    return of


def linearised(value: float, influence: np.ndarray) -> Statistic:
    """The score to first order in the patients' weights: s(m) = s(1) + sum_p (m_p - 1) i_p, the mean of i taken away.

    Its spread over bootstrap draws is the infinitesimal jackknife's when i is the derivative, and the jackknife's when
    it comes from leaving patients out. Unlike the bootstrap itself neither is biased by patients drawn twice (a
    repeated patient adds no rank). The derivative's spread is too small where samples are not many times the features.

    Args:
        value: The score with every patient once.
        influence: i, what a little more of each patient adds, shape (P,).

    Source: Efron, "The Jackknife, the Bootstrap and Other Resampling Plans" (1982), chapter 6.

    Examples:
        >>> linearised(1.0, np.array([0.5, -0.5]))(np.array([[1, 1], [2, 0]]))
        array([1., 2.])
    """

    def of(multiplicities: np.ndarray) -> np.ndarray:
        drawn: np.ndarray = value + (multiplicities - 1) @ (influence - influence.mean())
        return drawn

    return of


def by_gradient(score: Callable[[Tensor], Tensor], num_patients: int) -> Statistic:
    """``linearised`` with the derivative by automatic differentiation.

    Args:
        score: Weight of each patient, shape (P,), float64, to a scalar tensor.
        num_patients: P.
    """
    weights = torch.ones(num_patients, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        value = score(weights)
        (gradient,) = torch.autograd.grad(value, weights)
    return linearised(float(value.detach()), gradient.cpu().numpy())


def by_deletion(score: Callable[[np.ndarray], float], patients: np.ndarray) -> Statistic:
    """``linearised`` by the jackknife: i_p = (1 - 1/P) (s - s without p).

    Args:
        score: Indices of the rows that stay, to the score.
        patients: Patient of each row, shape (N,), 0 to P - 1.

    Examples:
        >>> x = np.array([1.0, 2.0, 6.0])
        >>> by_deletion(lambda rows: x[rows].mean(), np.arange(3))(np.array([[1, 1, 1], [3, 0, 0]]))
        array([3., 1.])
    """
    num_patients = int(patients.max()) + 1
    value = score(np.arange(len(patients)))
    without = [score(np.flatnonzero(patients != p)) for p in range(num_patients)]
    return linearised(value, (1 - 1 / num_patients) * (value - np.array(without)))


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of several statistics of the same patients."""

    def of(multiplicities: np.ndarray) -> np.ndarray:
        mean: np.ndarray = np.mean([s(multiplicities) for s in statistics], axis=0)
        return mean

    return of


def per_patient(values: np.ndarray, patients: np.ndarray, num_patients: int) -> np.ndarray:
    """Sums of values by patient, shape (P,)."""
    return np.bincount(patients, weights=values, minlength=num_patients)


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)
    return quotient

"""CC-FV: features of one class agree between patients, while features as a whole vary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mtl_nnunet.scores.resampling import Statistic, ratio_over_pairs

# of the mean squared distance: keeps the inverse distance of equal features finite
EPSILON = 1e-3
# of the features' spread: what the distance of equal distributions counts as
SAME = 1e-6


def wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """2-Wasserstein distance of the Gaussians fitted to two samples.

        W^2 = |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)

    With centred samples X, Y scaled to unit weight the last trace is the nuclear norm of X Y', a matrix of n x m instead
    of a square root of D x D.

    Args:
        x: Shape (n, D), n >= 2.
        y: Shape (m, D), m >= 2.

    Returns:
        Scalar.

    Examples:
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> round(wasserstein(x, x + 3).item(), 4)
        3.0
    """
    x, y = x.double(), y.double()
    a, b = _scaled(x), _scaled(y)
    squared = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    distance: Tensor = (squared - 2 * torch.linalg.svdvals(a @ b.T).sum()).clamp_min(0).sqrt()
    return distance


def consistency_pairs(features: Tensor, labels: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wasserstein distances between patients' features of one foreground class, summed over classes, and their number.

    Args:
        features: Shape (N, D).
        labels: Class of each, shape (N,); 0 is background.
        patients: Patient of each, shape (N,).

    Returns:
        Sums and counts, both (P, P), symmetric, zero on the diagonal.
    """
    num_patients = int(patients.max()) + 1
    sums, counts = np.zeros((num_patients, num_patients)), np.zeros((num_patients, num_patients))
    x = features.double()
    for label in np.unique(labels[labels > 0]):
        rows = {p: np.flatnonzero((labels == label) & (patients == p)) for p in range(num_patients)}
        rows = {p: r for p, r in rows.items() if len(r) >= 2}
        if len(rows) < 2:
            continue
        samples = [x[torch.as_tensor(r)] for r in rows.values()]
        means = torch.stack([s.mean(0) for s in samples])
        longest = max(len(s) for s in samples)
        # rows of zeros change no singular value, and let all pairs go through one batched decomposition
        padded = torch.stack([torch.nn.functional.pad(_scaled(s), (0, 0, 0, longest - len(s))) for s in samples])
        traces = padded.square().sum((1, 2))
        for i in range(len(samples) - 1):
            nuclear = torch.linalg.svdvals(padded[i] @ padded[i + 1 :].transpose(1, 2)).sum(-1)
            squared = (means[i] - means[i + 1 :]).square().sum(-1) + traces[i] + traces[i + 1 :] - 2 * nuclear
            p, others = list(rows)[i], list(rows)[i + 1 :]
            sums[p, others] += squared.clamp_min(0).sqrt().numpy()
            counts[p, others] += 1
    return sums + sums.T, counts + counts.T


def energy_pairs(features: Tensor, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of inverse distances between features of different patients, and their number, both (P, P)."""
    # about their mean, so that the subtraction loses nothing; and then the mean squared distance is twice the mean square
    x = features.double() - features.double().mean(0)
    squares = x.square().sum(1)
    least = EPSILON * 2 * squares.mean()
    membership = one_hot(torch.as_tensor(patients), int(patients.max()) + 1).double()
    sums = torch.zeros(membership.shape[1], membership.shape[1], dtype=torch.float64)
    # a patient at a time, so that the distances stay in the processor's cache
    for patient in range(len(sums)):
        mine = torch.as_tensor(patients == patient)
        distances = torch.addmm(squares[mine, None] + squares, x[mine], x.T, alpha=-2)
        sums[patient] = distances.clamp_min_(0).add_(least).rsqrt_().sum(0) @ membership
    counts = membership.sum(0)[:, None] * membership.sum(0)
    sums.fill_diagonal_(0)
    counts.fill_diagonal_(0)
    return sums.numpy(), counts.numpy()


def ccfv(features: Tensor, labels: np.ndarray, patients: np.ndarray) -> float:
    """Feature variety over class consistency, as a logarithm; higher is better.

        s = log F - log C
        C = mean over foreground classes and pairs of patients of W(class features of p, class features of q)
        1 / F = mean over pairs of features i, j of different patients of 1 / sqrt(|x_i - x_j|^2 + 1e-3 m)

    with m the mean of |x_i - x_j|^2, so that the score does not depend on the features' scale; the paper's constant is
    absolute, and rewards features for being small.

    Args:
        features: Shape (N, D).
        labels: Class of each, shape (N,); 0 is background.
        patients: Patient of each, shape (N,).

    Returns:
        Higher is better; free of the features' scale.

    Raises:
        ValueError: No foreground class in two patients.

    Source: Yang et al., MICCAI 2023, arXiv:2307.11958. Its script adds where the paper divides and keeps the energy
    1 / F in place of F; this follows the paper.

    Examples:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 0.1], [1.0, 0.0], [0.0, 0.0], [0.0, 0.1], [1.0, 0.0]])
        >>> y, p = np.array([1, 1, 0, 1, 1, 0]), np.array([0, 0, 0, 1, 1, 1])
        >>> ccfv(x, y, p) > ccfv(x + torch.as_tensor(p)[:, None], y, p)
        True
    """
    return float(statistic(features, labels, patients)(np.ones((1, int(patients.max()) + 1)))[0])


def statistic(features: Tensor, labels: np.ndarray, patients: np.ndarray) -> Statistic:
    """The score as a function of how often each patient was drawn; exact."""
    sums, counts = consistency_pairs(features, labels, patients)
    if not counts.any():
        raise ValueError("CC-FV needs a foreground class in at least two patients")
    consistency = ratio_over_pairs(sums, counts)
    energy = ratio_over_pairs(*energy_pairs(features, patients))
    least = SAME * float((features.double() - features.double().mean(0)).square().sum(1).mean().sqrt())

    def of(multiplicities: np.ndarray) -> np.ndarray:
        scores: np.ndarray = -np.log(energy(multiplicities)) - np.log(np.maximum(consistency(multiplicities), least))
        return scores

    return of


def _scaled(sample: Tensor) -> Tensor:
    """Centred rows whose Gram matrix is the covariance."""
    rows: Tensor = (sample - sample.mean(0)) / (len(sample) - 1) ** 0.5
    return rows

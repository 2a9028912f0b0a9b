"""Dice of a ridge probe on frozen pixel features, cross-validated by patient, in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.dice import dice_statistic
from mtl_nnunet.scores.resampling import Statistic

FOLDS = 5


def predictions(features: Tensor, labels: np.ndarray, patients: np.ndarray, ridge: float = 0.1) -> np.ndarray:
    """The class that a ridge regression on other patients' pixels gives each pixel.

        W = argmin |Y - X W|^2 + ridge tr(X'X)/D |W|^2

    with X standardised and Y one-hot, both centred on the training patients of a fold. Patients are dealt to five folds
    in turn.

    Args:
        features: Shape (N, D).
        labels: Class of each pixel, shape (N,).
        patients: Patient of each pixel, shape (N,).
        ridge: Penalty, relative to the mean variance of the features.

    Returns:
        Shape (N,).

    Raises:
        ValueError: Pixels of one patient only.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [0.1], [0.9]])
        >>> predictions(x, np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]))
        array([0, 1, 0, 1])
    """
    present = np.unique(patients)
    if len(present) < 2:
        raise ValueError("a probe tested on other patients' pixels needs at least two patients")
    classes = np.unique(labels)
    fold_of = np.searchsorted(present, patients) % min(FOLDS, len(present))
    onehot = torch.as_tensor(labels[:, None] == classes[None, :]).float()
    predicted = np.empty(len(labels), dtype=labels.dtype)
    for fold in range(int(fold_of.max()) + 1):
        train, test = (torch.as_tensor(np.flatnonzero(rows)) for rows in (fold_of != fold, fold_of == fold))
        x = features[train].float()
        mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
        x = (x - mean) / std
        centre = onehot[train].mean(0)
        y = onehot[train] - centre
        held_out = (features[test].float() - mean) / std
        n, d = x.shape
        gram = x.T @ x if d <= n else x @ x.T
        gram.diagonal().add_(ridge * x.square().sum() / d)
        factor = torch.linalg.cholesky(gram)
        if d <= n:
            scores = held_out @ torch.cholesky_solve(x.T @ y, factor)
        else:
            scores = held_out @ (x.T @ torch.cholesky_solve(y, factor))
        predicted[test.numpy()] = classes[(scores + centre).argmax(1).numpy()]
    return predicted


def probe(features: Tensor, labels: np.ndarray, patients: np.ndarray, ridge: float = 0.1) -> float:
    """Mean foreground Dice of ``predictions`` on the pixels given; higher is better.

    Args:
        features: Shape (N, D).
        labels: Class of each pixel, shape (N,); 0 is background.
        patients: Patient of each pixel, shape (N,).
        ridge: Penalty, relative to the mean variance of the features.

    Returns:
        0 to 1.

    Raises:
        ValueError: Pixels of one patient only.

    Source: ridge regression on one-hot labels, the baseline that transferability scores should beat.

    Examples:
        >>> x = torch.tensor([[0.0], [1.0], [0.1], [0.9]])
        >>> probe(x, np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]))
        1.0
    """
    return float(statistic(features, labels, patients, ridge)(np.ones((1, int(patients.max()) + 1)))[0])


def statistic(features: Tensor, labels: np.ndarray, patients: np.ndarray, ridge: float) -> Statistic:
    """The score as a function of which patients' predictions were drawn; the probes stay."""
    return dice_statistic(predictions(features, labels, patients, ridge), labels, patients)

"""Dice of a nearest-neighbour vote on frozen pixel features, neighbours from other patients only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mtl_nnunet.scores.dice import dice_statistic
from mtl_nnunet.scores.resampling import Statistic

CHUNK = 1024


def vote(features: Tensor, labels: np.ndarray, patients: np.ndarray, k: int = 20) -> np.ndarray:
    """The class that most of the k nearest pixels of other patients have, by cosine similarity.

    Args:
        features: Shape (N, D).
        labels: Class of each pixel, shape (N,).
        patients: Patient of each pixel, shape (N,).
        k: How many neighbours vote; of equal votes the class with the nearer neighbours wins.

    Returns:
        Shape (N,).

    Raises:
        ValueError: Pixels of one patient only, or fewer of other patients than neighbours.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> vote(x, np.array([1, 1, 0, 0]), np.array([0, 1, 0, 1]), k=1)
        array([1, 1, 0, 0])
    """
    if len(np.unique(patients)) < 2:
        raise ValueError("a vote of other patients' pixels needs at least two patients")
    classes, targets = np.unique(labels, return_inverse=True)
    z = normalize(features, dim=1)
    owner, index = torch.as_tensor(patients), torch.as_tensor(targets)
    of_others = len(patients) - int(np.bincount(patients).max())
    if k > of_others:
        raise ValueError(f"{k} neighbours are asked for, and some pixels have only {of_others} of other patients")
    predicted = []
    for rows in torch.split(torch.arange(len(z)), CHUNK):
        similarity = (z[rows] @ z.T).masked_fill(owner[rows, None] == owner[None], -torch.inf)
        nearest = similarity.topk(k, dim=1)
        votes = torch.zeros(len(rows), len(classes), dtype=torch.float64)
        # a vote is worth one, and a little more the nearer it is, which only decides ties
        worth = 1 + nearest.values.double() * (0.25 / k)
        predicted.append(votes.scatter_add_(1, index[nearest.indices], worth).argmax(1))
    chosen: np.ndarray = classes[torch.cat(predicted).numpy()]
    return chosen


def knn(features: Tensor, labels: np.ndarray, patients: np.ndarray, k: int = 20) -> float:
    """Mean foreground Dice of ``vote`` on the pixels given; higher is better.

    Args:
        features: Shape (N, D).
        labels: Class of each pixel, shape (N,); 0 is background.
        patients: Patient of each pixel, shape (N,).
        k: How many neighbours vote.

    Returns:
        0 to 1.

    Raises:
        ValueError: Pixels of one patient only.

    Source: the parameter-free twin of a linear probe, e.g. Caron et al. 2021, arXiv:2104.14294.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> knn(x, np.array([1, 1, 0, 0]), np.array([0, 1, 0, 1]), k=1)
        1.0
    """
    return float(statistic(features, labels, patients, k)(np.ones((1, int(patients.max()) + 1)))[0])


def statistic(features: Tensor, labels: np.ndarray, patients: np.ndarray, k: int) -> Statistic:
    """The score as a function of which patients' predictions were drawn; neighbours stay."""
    return dice_statistic(vote(features, labels, patients, k), labels, patients)

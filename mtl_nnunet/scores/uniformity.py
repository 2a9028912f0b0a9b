"""Uniformity: how evenly slices of different patients spread over the sphere."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mtl_nnunet.scores.resampling import Statistic, ratio_over_pairs


def uniformity(views: Tensor, patients: np.ndarray, t: float = 2.0) -> float:
    """Logarithm of the mean Gaussian potential between slices of different patients; lower is better.

        s = log mean_{i, j of different patients} exp(-t |z_i - z_j|^2),  |z| = 1

    Args:
        views: Embeddings, shape (V, N, D); pairs are formed within a view.
        patients: Patient index of each slice, shape (N,).
        t: Sharpness of the potential.

    Returns:
        -4 t to 0; lower is better.

    Raises:
        ValueError: Slices of one patient only.

    Source: Wang and Isola 2020, arXiv:2005.10242.

    Examples:
        >>> uniformity(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), np.array([0, 1]))
        -8.0
    """
    prepared = statistic(views, patients, t)
    return float(prepared(np.ones((1, int(patients.max()) + 1)))[0])


def statistic(views: Tensor, patients: np.ndarray, t: float) -> Statistic:
    """The score as a function of how often each patient was drawn; exact."""
    z = normalize(views.double(), dim=-1)
    owner = torch.as_tensor(patients)
    membership = one_hot(owner, int(owner.max()) + 1).double()
    if (membership.sum(0) > 0).sum() < 2:
        raise ValueError("uniformity needs slices of at least two patients")
    # a row of zeros stays one: its length is not assumed
    lengths = z.square().sum(-1)
    potential = sum(
        (-t * (length[:, None] + length - 2 * x @ x.T).clamp_min(0)).exp() for x, length in zip(z, lengths, strict=True)
    )
    sums = membership.T @ potential @ membership
    counts = len(z) * membership.sum(0)[:, None] * membership.sum(0)
    sums.fill_diagonal_(0)
    counts.fill_diagonal_(0)
    mean = ratio_over_pairs(sums.numpy(), counts.numpy())
    return lambda multiplicities: np.log(mean(multiplicities))

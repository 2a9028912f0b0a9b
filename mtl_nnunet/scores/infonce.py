"""InfoNCE over views of slices, with negatives from other patients."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mtl_nnunet.scores.resampling import Statistic

CHUNK = 1 << 24
LOWEST_TEMPERATURE = 0.005


def _terms(views: Tensor, patients: np.ndarray, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of each anchor's negative terms by patient, relative to its positive; its patient; slices of each patient."""
    if not temperature >= LOWEST_TEMPERATURE:
        raise ValueError(f"temperature {temperature:g} is below {LOWEST_TEMPERATURE:g}, where exponentials overflow")
    z = normalize(views.double(), dim=-1)
    num_views = len(z)
    owner = torch.as_tensor(patients)
    membership = torch.nn.functional.one_hot(owner, int(owner.max()) + 1).double()
    if num_views < 2 or (membership.sum(0) > 0).sum() < 2:
        raise ValueError("InfoNCE needs two views of each slice, and slices of at least two patients")
    positives, negatives = [], []
    for a, b in permutations(range(num_views), 2):
        similarity = z[a] @ z[b].T / temperature
        # relative to the positive, so that the exponential stays in range
        positive = similarity.diagonal()
        negatives.append((similarity - positive[:, None]).exp() @ membership)
        positives.append(positive)
    ratios = torch.cat(negatives)
    owners = owner.repeat(len(positives))
    ratios[torch.arange(len(owners)), owners] = 0
    return ratios, owners, membership.sum(0)


def infonce(views: Tensor, patients: np.ndarray, temperature: float = 0.1) -> float:
    """How surely a slice's other view is picked among slices of other patients.

        s = -mean_{i, (a, b)} log(1 / K_i + mean_{j of other patients} exp((z_i^a . z_j^b - z_i^a . z_i^b) / t))

    with z of unit length and K_i slices of other patients. This is log K plus the mean log probability of the positive: a
    lower bound of the information that two views share, in nats.

    Args:
        views: Embeddings, shape (V, N, D), V >= 2.
        patients: Patient index of each slice, shape (N,).
        temperature: t, at least 0.005.

    Returns:
        At most log K; -log(1 + 1 / K) where nothing is told apart; higher is better.

    Raises:
        ValueError: One view, one patient, or a temperature that is too low.

    Source: van den Oord et al. 2018, arXiv:1807.03748.

    Examples:
        >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> round(infonce(torch.stack([z, z]), np.array([0, 1]), temperature=1.0), 4)  # K = 1: -log(1 + exp(-2))
        -0.1269
    """
    prepared = statistic(views, patients, temperature)
    return float(prepared(np.ones((1, int(patients.max()) + 1)))[0])


def statistic(views: Tensor, patients: np.ndarray, temperature: float) -> Statistic:
    """The score as a function of how often each patient was drawn; exact, with K that of all patients."""
    ratios, owners, counts = _terms(views, patients, temperature)
    one_of = 1 / (counts.sum() - counts)[owners]

    def of(multiplicities: np.ndarray) -> np.ndarray:
        scores = []
        step = max(1, CHUNK // len(owners))
        for start in range(0, len(multiplicities), step):
            m = torch.as_tensor(multiplicities[start : start + step], dtype=torch.float64)
            drawn = m * counts
            others = (drawn.sum(1)[:, None] - drawn)[:, owners]
            losses = torch.log(one_of + (m @ ratios.T) / others.clamp_min(1e-300))
            weights = m[:, owners] * (others > 0)
            total = weights.sum(1)
            scores.append(torch.where(total > 0, -(losses * weights).sum(1) / total, torch.nan))
        return torch.cat(scores).numpy()

    return of

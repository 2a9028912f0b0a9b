"""Our contrastive score: scale-free, over several views, with negatives from other patients only."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.distances import pairwise
from mtl_nnunet.scores.resampling import Statistic, ratio_over_pairs


def patient_pairs(views: Tensor, patients: np.ndarray, distance: str = "cosine") -> tuple[np.ndarray, np.ndarray]:
    """How often a slice's other view is nearer than slices of another patient, per pair of patients.

    For each slice i of patient p, each ordered pair of views (a, b) and each slice j of patient q != p, a trial is
    won when d(z_i^a, z_i^b) < d(z_i^a, z_j^b), half won on a tie.

    Args:
        views: Embeddings, shape (V, N, D), V >= 2.
        patients: Patient index of each slice, shape (N,), 0 to P - 1.
        distance: ``cosine``, ``l2`` or ``pearson``.

    Returns:
        Trials won and trials made, both of shape (P, P), float64, zero on the diagonal.

    Raises:
        ValueError: One view, or one patient: neither positives nor negatives would exist.
    """
    num_views, n, _ = views.shape
    num_patients = int(patients.max()) + 1
    if num_views < 2:
        raise ValueError(f"contrastive needs at least two views of each slice, got {num_views}")
    if len(np.unique(patients)) < 2:
        raise ValueError("contrastive needs slices of at least two patients, since negatives come from other patients")
    membership = torch.zeros(n, num_patients, dtype=torch.float64, device=views.device)
    membership[torch.arange(n), torch.as_tensor(patients, device=views.device)] = 1
    won = torch.zeros(num_patients, num_patients, dtype=torch.float64, device=views.device)
    for a, b in permutations(range(num_views), 2):
        to_negatives = pairwise(distance, views[a], views[b])
        margin = to_negatives - to_negatives.diagonal()[:, None]
        # equal embeddings differ by rounding in a matrix product; they are ties
        tie = margin.abs() <= 1e-12 * to_negatives.abs().mean().clamp_min(1e-300)
        wins = torch.where(tie, 0.5, (margin > 0).double())
        won += membership.T @ wins @ membership
    counts = membership.sum(0)
    made = num_views * (num_views - 1) * counts[:, None] * counts[None, :]
    won.fill_diagonal_(0)
    made.fill_diagonal_(0)
    return won.cpu().numpy(), made.cpu().numpy()


def contrastive(views: Tensor, patients: np.ndarray, distance: str = "cosine") -> float:
    """The share of other patients' slices that lie farther away than another view of the same slice.

        s = mean over slices i, view pairs (a, b), slices j of other patients of
            [d(z_i^a, z_i^b) < d(z_i^a, z_j^b)] + 1/2 [equal]

    It is the probability that the encoder tells a slice under another scanner from another patient's slice: 1/2 is
    chance, 1 is perfect. Multiplying or rotating the embeddings does not change it, and there is no margin.

    Args:
        views: Embeddings, shape (V, N, D), V >= 2.
        patients: Patient index of each slice, shape (N,), 0 to P - 1.
        distance: ``cosine``, ``l2`` or ``pearson``.

    Returns:
        0 to 1; higher is better.

    Raises:
        ValueError: One view, or one patient.

    Source: the rank form of the robustness score of arXiv:2410.18677, with its fixed negative replaced by all slices
    of other patients.

    Examples:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> contrastive(torch.stack([z, z]), np.array([0, 1, 2]))
        1.0
        >>> contrastive(torch.stack([z, z]) * 0 + 1, np.array([0, 1, 2]))
        0.5
    """
    won, made = patient_pairs(views, patients, distance)
    return float(won.sum() / made.sum())


def statistic(views: Tensor, patients: np.ndarray, distance: str) -> Statistic:
    """The contrastive score as a function of how often each patient was drawn.

    A pair of patients counts as often as both were drawn; a patient drawn twice is no negative of itself.

    Args:
        views: Embeddings, shape (V, N, D).
        patients: Patient index of each slice, shape (N,), 0 to P - 1.
        distance: See ``contrastive``.

    Returns:
        Multiplicities (B, P) to scores (B,); NaN where fewer than two patients were drawn.
    """
    return ratio_over_pairs(*patient_pairs(views, patients, distance))

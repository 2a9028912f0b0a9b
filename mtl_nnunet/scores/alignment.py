"""Alignment: how near views of one slice lie."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mtl_nnunet.scores.resampling import Statistic, per_patient, ratio_of_sums


def alignment_terms(views: Tensor) -> Tensor:
    """Mean squared distance between the views of each slice, embeddings of unit length; shape (N,)."""
    z = normalize(views.double(), dim=-1)
    if len(z) < 2:
        raise ValueError(f"alignment needs at least two views of each slice, got {len(z)}")
    return torch.stack([(z[a] - z[b]).square().sum(-1) for a, b in combinations(range(len(z)), 2)]).mean(0)


def alignment(views: Tensor) -> float:
    """Mean squared distance between two views of one slice; lower is better.

        s = mean_{i, a < b} |z_i^a - z_i^b|^2,  |z| = 1

    An encoder that maps everything to one point aligns perfectly: read it beside ``uniformity``.

    Args:
        views: Embeddings, shape (V, N, D), V >= 2.

    Returns:
        0 to 4; lower is better.

    Raises:
        ValueError: One view.

    Source: Wang and Isola 2020, arXiv:2005.10242, with exponent 2.

    Examples:
        >>> alignment(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]))
        2.0
    """
    return float(alignment_terms(views).mean())


def statistic(views: Tensor, patients: np.ndarray) -> Statistic:
    """The score as a function of how often each patient was drawn; exact."""
    terms = alignment_terms(views).numpy()
    num_patients = int(patients.max()) + 1
    return ratio_of_sums(
        per_patient(terms, patients, num_patients), per_patient(np.ones(len(terms)), patients, num_patients)
    )

"""RankMe and the effective rank: how many directions an embedding really uses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.scores.resampling import Statistic, by_deletion, mean_of


def effective_rank(embeddings: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values; higher is better.

        s = exp(-sum_k p_k log p_k),  p_k = sigma_k / sum_l sigma_l

    Args:
        embeddings: Shape (N, D).

    Returns:
        1 to min(N, D).

    Source: Roy and Vetterli 2007; as a score of pretrained encoders: RankMe, Garrido et al. 2023, arXiv:2210.02885.

    Examples:
        >>> round(effective_rank(torch.eye(3)), 4)
        3.0
        >>> round(effective_rank(torch.ones(4, 3)), 4)
        1.0
    """
    return _rank_and_slope(_spectrum(embeddings)[1])[0]


def statistic(views: Tensor, patients: np.ndarray) -> Statistic:
    """The score as a function of how often each patient was drawn, by the jackknife.

    Slices are often fewer than features, where the derivative would give half of the spread.

    Args:
        views: Embeddings, shape (V, N, D); the mean over the views is taken.
        patients: Patient index of each row, shape (N,).
    """

    def of_view(embeddings: Tensor) -> Statistic:
        x = embeddings.double()
        # leaving rows out leaves rows and columns of the Gram matrix out, so that one product serves all
        gram = x @ x.T if len(x) <= x.shape[1] else None

        def score(rows: np.ndarray) -> float:
            kept = torch.as_tensor(rows)
            matrix = x[kept].T @ x[kept] if gram is None else gram[kept][:, kept]
            return _rank_and_slope(_singular_values(torch.linalg.eigvalsh(matrix)))[0]

        return by_deletion(score, patients)

    return mean_of([of_view(embeddings) for embeddings in views])


def rank_influence(embeddings: Tensor) -> tuple[float, np.ndarray]:
    """The effective rank and its derivative with respect to the weight of each row.

    A weight w_i enters the Gram matrix as w_i x_i x_i^T, so d sigma_k / d w_i = sigma_k u_ik^2 / 2.

    Args:
        embeddings: Shape (N, D).

    Returns:
        The rank, and shape (N,).
    """
    left, sigma = _spectrum(embeddings)
    rank, slope = _rank_and_slope(sigma)
    influence: np.ndarray = (left.square() @ (slope * sigma / 2)).numpy()
    return rank, influence


def _spectrum(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    x = embeddings.double()
    # the smaller Gram matrix has the same spectrum at a fraction of the cost of an SVD
    if len(x) <= x.shape[1]:
        squares, left = torch.linalg.eigh(x @ x.T)
        sigma = _singular_values(squares)
        return left[:, -len(sigma) :], sigma
    squares, right = torch.linalg.eigh(x.T @ x)
    sigma = _singular_values(squares)
    return (x @ right[:, -len(sigma) :]) / sigma, sigma


def _singular_values(squares: Tensor) -> Tensor:
    """Of the ascending eigenvalues of a Gram matrix; what it cannot resolve is rounding, not rank."""
    sigma = squares.clamp_min(0).sqrt()
    return sigma[sigma > sigma[-1] * 1e-7]


def _rank_and_slope(sigma: Tensor) -> tuple[float, Tensor]:
    """exp(H) and its derivative with respect to each singular value."""
    if not len(sigma):
        return 1.0, sigma
    p = sigma / sigma.sum()
    entropy = -(p * p.log()).sum()
    rank = entropy.exp()
    return float(rank), -rank * (p.log() + entropy) / sigma.sum()

"""Distances between embeddings, as the published robustness score defines them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine of the angle between rows; 0 to 2.

        d(x, y) = 1 - x.y / sqrt(|x|^2 |y|^2)

    A row of zeros has no direction: its distance to anything is 1, so that it carries no evidence.

    Args:
        x: Shape (..., D).
        y: Shape (..., D).

    Returns:
        Shape (...).

    Examples:
        >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([0.2929])
    """
    norms = torch.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return 1 - (x * y).sum(-1) / norms.clamp_min(torch.finfo(x.dtype).tiny)


def l2_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of rows.

        d(x, y) = mean_k (x_k - y_k)^2

    Args:
        x: Shape (..., D).
        y: Shape (..., D).

    Returns:
        Shape (...).

    Examples:
        >>> l2_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([2.])
    """
    return ((x - y) ** 2).mean(-1)


def pearson_distance(x: Tensor, y: Tensor) -> Tensor:
    """One minus Pearson's correlation of rows: the cosine distance of the centred rows.

    Args:
        x: Shape (..., D).
        y: Shape (..., D).

    Returns:
        Shape (...).

    Examples:
        >>> pearson_distance(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[6.0, 4.0, 2.0]]))
        tensor([2.])
    """
    return cosine_distance(x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True))


def pairwise(distance: str, x: Tensor, y: Tensor) -> Tensor:
    """Every distance between rows of ``x`` and rows of ``y``, by one matrix product in double precision.

    Args:
        distance: A key of ``DISTANCES``.
        x: Shape (N, D).
        y: Shape (M, D).

    Returns:
        Shape (N, M), float64.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> pairwise("cosine", x, x)
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    x, y = x.double(), y.double()
    if distance == "l2":
        squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :]
        return (squares - 2 * x @ y.T).clamp_min(0) / x.shape[1]
    if distance == "pearson":
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    tiny = torch.finfo(torch.float64).tiny
    x = x / x.norm(dim=1, keepdim=True).clamp_min(tiny)
    y = y / y.norm(dim=1, keepdim=True).clamp_min(tiny)
    distances: Tensor = 1 - x @ y.T
    return distances


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "l2": l2_distance,
    "pearson": pearson_distance,
}

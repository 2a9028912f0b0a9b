"""A score that the package does not have: do the nearest ways from patient to patient stay within a class?"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from mtl_nnunet.scores.resampling import Statistic

PART_PIXELS = 1024


def tree(features: Tensor, labels: np.ndarray, patients: np.ndarray) -> float:
    """Share of edges of the features' minimum spanning tree that join one class: 0 as by chance, at most 1.

        (s - e) / (1 - e)

    with s the share of edges within a class and e that share among all pairs. Edges join pixels of different patients only; every
    feature counts by its own spread.

    Args:
        features: Shape (N, D).
        labels: Class of each pixel, shape (N,).
        patients: Patient of each pixel, shape (N,).

    Source: Friedman and Rafsky 1979, whose test counts the other edges; the idea to rank medical encoders by spanning trees is that
    of arXiv:2602.23916, whose own formulas are others.

    Examples:
        >>> x, y, p = torch.tensor([[0.0], [0.1], [5.0], [5.1]]), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
        >>> round(tree(x, y, p), 3), round(tree(x, y[[0, 2, 1, 3]], p), 3)
        (0.333, -0.333)
    """
    x = features.double() - features.double().mean(0)
    x = x / x.std(0).clamp_min(1e-12)
    distances = torch.cdist(x, x).numpy()
    rows, columns = np.nonzero(np.triu(patients[:, None] != patients))
    # an edge of length 0 would be none to scipy
    lengths = distances[rows, columns] + 1e-12 * (1 + distances.max())
    ends = minimum_spanning_tree(csr_array((lengths, (rows, columns)), shape=distances.shape)).nonzero()
    share, by_chance = ((labels[a] == labels[b]).mean() for a, b in (ends, (rows, columns)))
    return float((share - by_chance) / (1 - by_chance))


def parts(labels: np.ndarray, patients: np.ndarray, number: int) -> list[np.ndarray]:
    """Disjoint parts of about that many pixels, each with the same share of every class of every patient; indices."""
    step = max(1, round(len(labels) / number))
    order = np.lexsort((labels, patients))
    return [order[start::step] for start in range(step)]


def statistic(features: Tensor, labels: np.ndarray, patients: np.ndarray) -> Statistic:
    """The mean over disjoint parts of the pixels; how it would be of other patients is not told."""
    value = np.mean([
        tree(features[torch.as_tensor(part)], labels[part], patients[part]) for part in parts(labels, patients, PART_PIXELS)
    ])  # fmt: skip
    return lambda multiplicities: np.full(len(multiplicities), value)

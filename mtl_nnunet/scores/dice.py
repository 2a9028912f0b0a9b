"""Dice of predicted pixels as a function of which patients were drawn."""

from __future__ import annotations

import numpy as np

from mtl_nnunet.scores.resampling import Statistic


def dice_statistic(predicted: np.ndarray, labels: np.ndarray, patients: np.ndarray, weights: np.ndarray) -> Statistic:
    """Mean Dice over foreground classes, each from pixels summed over the drawn patients.

        s = mean_c 2 |pred_c and true_c| / (|pred_c| + |true_c|)

    Predictions are taken as they are: each must come from other patients.

    Args:
        predicted: Class of each pixel, shape (N,).
        labels: True class of each pixel, shape (N,); 0 is background.
        patients: Patient of each pixel, shape (N,).
        weights: How many pixels each stands for, shape (N,).

    Returns:
        Multiplicities (B, P) to (B,), 0 to 1; a class that no drawn patient has counts where it was predicted.

    Example:
        >>> s = dice_statistic(np.array([1, 1, 0]), np.array([1, 0, 0]), np.array([0, 0, 1]), np.ones(3))
        >>> s(np.array([[1, 1]])).round(4)
        array([0.6667])
    """
    num_patients = int(patients.max()) + 1
    foreground = np.unique(labels[labels > 0])
    hits, sizes = np.zeros((num_patients, len(foreground))), np.zeros((num_patients, len(foreground)))
    for c, label in enumerate(foreground):
        for where, into in (
            ((predicted == label) & (labels == label), hits),
            (predicted == label, sizes),
            (labels == label, sizes),
        ):
            into[:, c] += np.bincount(patients, weights=where * weights, minlength=num_patients)

    def of(multiplicities: np.ndarray) -> np.ndarray:
        above, below = 2 * multiplicities @ hits, multiplicities @ sizes
        dice = np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
        present = ~np.isnan(dice)
        mean: np.ndarray = np.divide(
            np.nansum(dice, 1), present.sum(1), out=np.full(len(dice), np.nan), where=present.any(1)
        )
        return mean

    return of

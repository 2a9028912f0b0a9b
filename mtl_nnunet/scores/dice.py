"""Dice of predicted pixels as a function of which patients were drawn."""

from __future__ import annotations

import numpy as np

from mtl_nnunet.scores.resampling import Statistic


def dice_statistic(predicted: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> Statistic:
    """Mean Dice over foreground classes, each from pixels summed over the drawn patients.

        s = mean_c 2 |pred_c and true_c| / (|pred_c| + |true_c|)

    Predictions are taken as they are: each must come from other patients. Classes of a single patient are left out, since
    others cannot predict them, and so are, of a draw, classes that none of its patients has.

    Args:
        predicted: Class of each pixel, shape (N,).
        labels: True class of each pixel, shape (N,); 0 is background.
        patients: Patient of each pixel, shape (N,).

    Returns:
        Multiplicities (B, P) to (B,), 0 to 1; NaN where no drawn patient has a class.

    Raises:
        ValueError: No foreground class in two patients.

    Examples:
        >>> s = dice_statistic(np.array([1, 1, 1]), np.array([1, 0, 1]), np.array([0, 0, 1]))
        >>> s(np.array([[1, 1], [2, 0]])).round(4)
        array([0.8   , 0.6667])
    """
    num_patients = int(patients.max()) + 1
    pairs = np.unique(np.stack([labels, patients]), axis=1)
    classes, owners = np.unique(pairs[0], return_counts=True)
    foreground = classes[(classes > 0) & (owners >= 2)]
    if not len(foreground):
        raise ValueError("Dice on other patients needs a foreground class in at least two patients")
    hits, sizes, true = (np.zeros((num_patients, len(foreground))) for _ in range(3))
    for c, label in enumerate(foreground):
        for where, into in (
            ((predicted == label) & (labels == label), hits),
            (predicted == label, sizes),
            (labels == label, sizes),
            (labels == label, true),
        ):
            into[:, c] += np.bincount(patients, weights=where, minlength=num_patients)

    def of(multiplicities: np.ndarray) -> np.ndarray:
        above, below = 2 * multiplicities @ hits, multiplicities @ sizes
        dice = np.divide(above, below, out=np.full(below.shape, np.nan), where=multiplicities @ true > 0)
        present = ~np.isnan(dice)
        mean: np.ndarray = np.divide(
            np.nansum(dice, 1), present.sum(1), out=np.full(len(dice), np.nan), where=present.any(1)
        )
        return mean

    return of

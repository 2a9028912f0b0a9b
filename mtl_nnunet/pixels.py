"""Which pixels of the slices stand for the rest: drawn evenly over patients, with labels evenly over classes too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mtl_nnunet.errors import UserError
from mtl_nnunet.slices import Slices

NUM_PIXELS = 4096
BOUNDARY_SHARE = 0.25


@dataclass(frozen=True)
class Pixels:
    """Sampled pixels, sorted by slice.

    Attributes:
        slices: Slice of each pixel, shape (M,).
        rows: Row of each, shape (M,).
        columns: Column of each, shape (M,).
        labels: Class of each, shape (M,); zeros without labels.
        patients: Patient of each, shape (M,), as in ``Slices.patients``.
    """

    slices: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


def sample_pixels(slices: Slices, labelled: bool, seed: int, num_pixels: int = NUM_PIXELS) -> Pixels:
    """Pixels of every patient in equal number and, with labels, of every class that the patient has.

    With labels, a quarter of each class's pixels comes from where it borders on another class, if it has so many.

    Args:
        slices: Where from.
        labelled: By class, which needs ``Slices.labels``; pixels that are not to be counted are left out.
        seed: Same seed, same pixels.
        num_pixels: About how many in all.

    Returns:
        Every checkpoint is scored on the same ones.

    Raises:
        UserError: Labels are asked for and the slices hold only one class.
    """
    n, _, height, width = slices.images.shape
    rng = np.random.default_rng([seed, 1])
    if labelled:
        if slices.labels is None:
            raise ValueError("labelled pixels need slices with labels")
        labels = slices.labels.numpy()
        classes = [int(c) for c in np.unique(labels) if c >= 0]
        if len(classes) < 2:
            raise UserError(
                f"the {n} slices hold only class {classes}, so scores with labels have nothing to tell apart. "
                "Raise -num_slices, or check the labels."
            )
        boundary = np.stack([borders(plane) for plane in labels])
    else:
        labels, classes = np.zeros((n, height, width), dtype=np.int16), [0]
        boundary = np.zeros(labels.shape, dtype=bool)
    quota = max(2, round(num_pixels / slices.num_patients / len(classes)))
    drawn = []
    for patient in range(slices.num_patients):
        of_patient = np.flatnonzero(slices.patients == patient)
        here, edge = labels[of_patient], boundary[of_patient]
        for label in classes:
            near = np.flatnonzero((here == label) & edge)
            far = np.flatnonzero((here == label) & ~edge)
            from_far = min(len(far), quota - min(len(near), round(quota * BOUNDARY_SHARE)))
            from_near = min(len(near), quota - from_far)
            positions = np.concatenate(
                [rng.choice(near, from_near, replace=False), rng.choice(far, from_far, replace=False)]
            )
            plane, row, column = np.unravel_index(positions.astype(np.int64), here.shape)
            drawn.append(np.stack([of_patient[plane], row, column]))
    where = np.concatenate(drawn, axis=1)
    where = where[:, np.lexsort(where[::-1])]
    return Pixels(where[0], where[1], where[2], labels[tuple(where)].astype(np.int64), slices.patients[where[0]])


def borders(plane: np.ndarray) -> np.ndarray:
    """Where a class borders on another, on both sides, shape (H, W).

    Examples:
        >>> borders(np.array([[0, 0, 0, 1, 1, 1]]))
        array([[False, False,  True,  True, False, False]])
    """
    # beyond what counts there is no boundary that an annotator drew
    counted = plane >= 0
    highest = ndimage.maximum_filter(np.where(counted, plane, -1), 3)
    lowest = ndimage.minimum_filter(np.where(counted, plane, np.iinfo(plane.dtype).max), 3)
    bordering: np.ndarray = counted & (highest != lowest)
    return bordering

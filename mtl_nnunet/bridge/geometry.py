"""nnU-Net's geometry to MONAI's: (z, y, x) arrays to (x, y, z), SimpleITK's LPS to RAS+."""

from __future__ import annotations

from typing import Any

import numpy as np


def from_zyx(voxels: np.ndarray, flat: bool) -> np.ndarray:
    """A segmentation (Z, Y, X) as (X, Y, Z), or (X, Y) where the file holds one plane.

    Example:
        >>> from_zyx(np.zeros((1, 4, 5)), flat=True).shape, from_zyx(np.zeros((3, 4, 5)), flat=False).shape
        ((5, 4), (5, 4, 3))
    """
    return np.transpose(voxels[0] if flat else voxels)


def to_zyx(voxels: np.ndarray, flat: bool) -> np.ndarray:
    """The way back.

    Example:
        >>> to_zyx(np.zeros((5, 4)), flat=True).shape, to_zyx(np.zeros((5, 4, 3)), flat=False).shape
        ((1, 4, 5), (3, 4, 5))
    """
    return np.transpose(voxels)[None] if flat else np.transpose(voxels)


def affine_of(properties: dict[str, Any]) -> np.ndarray:
    """Voxel index (x, y, z) to millimetres in RAS+, as nibabel and MONAI state it, shape (4, 4).

    Args:
        properties: Of nnU-Net's reader: SimpleITK's geometry, nibabel's affine, or a spacing (z, y, x) alone.

    Example:
        >>> geometry = {"spacing": [1, 2], "origin": [5, 6], "direction": [1, 0, 0, 1]}
        >>> affine_of({"sitk_stuff": geometry, "spacing": [999, 2, 1]})[:2].tolist()
        [[-1.0, 0.0, 0.0, -5.0], [0.0, -2.0, 0.0, -6.0]]
    """
    affine = np.eye(4)
    if "nibabel_stuff" in properties:
        stated = properties["nibabel_stuff"]
        return np.asarray(stated.get("reoriented_affine", stated["original_affine"]), dtype=float)
    if "sitk_stuff" not in properties:
        z, y, x = properties["spacing"]
        # a picture has no third axis
        affine[range(3), range(3)] = (x, y, z if z != 999 else 1)
        return affine
    stated = properties["sitk_stuff"]
    n = len(stated["spacing"])
    affine[:n, :n] = np.reshape(stated["direction"], (n, n)) * stated["spacing"]
    affine[:n, 3] = stated["origin"]
    return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)

"""nnU-Net's geometry to MONAI's: (z, y, x) arrays to (x, y, z), SimpleITK's LPS to RAS+."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtl_nnunet.bridge.model import NATURAL_READER
from mtl_nnunet.cases import SLICE_SPACING_OF_2D
from mtl_nnunet.errors import UserError

# readers that leave the axes of a file as they are
SAME_ORIENTATION = ("SimpleITKIO", "NibabelIO")
TO_OTHER_SIDE = np.diag([-1.0, -1.0, 1.0, 1.0])


def from_zyx(voxels: np.ndarray, flat: bool) -> np.ndarray:
    """A segmentation (Z, Y, X) as (X, Y, Z), or (X, Y) where the file holds one plane.

    Examples:
        >>> from_zyx(np.zeros((1, 4, 5)), flat=True).shape, from_zyx(np.zeros((3, 4, 5)), flat=False).shape
        ((5, 4), (5, 4, 3))
    """
    return np.transpose(voxels[0] if flat else voxels)


def to_zyx(voxels: np.ndarray, flat: bool) -> np.ndarray:
    """The way back.

    Examples:
        >>> to_zyx(np.zeros((5, 4)), flat=True).shape, to_zyx(np.zeros((5, 4, 3)), flat=False).shape
        ((1, 4, 5), (3, 4, 5))
    """
    return np.transpose(voxels)[None] if flat else np.transpose(voxels)


def affine_of(properties: dict[str, Any]) -> np.ndarray:
    """Voxel index (x, y, z) to millimetres in RAS+, as nibabel and MONAI state it, shape (4, 4).

    Args:
        properties: Of nnU-Net's reader: SimpleITK's geometry, nibabel's affine, or a spacing (z, y, x) alone.

    Examples:
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
        affine[range(3), range(3)] = (x, y, z if z != SLICE_SPACING_OF_2D else 1)
        return affine
    stated = properties["sitk_stuff"]
    n = len(stated["spacing"])
    affine[:n, :n] = np.reshape(stated["direction"], (n, n)) * stated["spacing"]
    affine[:n, 3] = stated["origin"]
    return np.asarray(TO_OTHER_SIDE @ affine)


def from_monai(image: Any, reader: str) -> tuple[np.ndarray, dict[str, Any]]:
    """An image that MONAI loaded, as nnU-Net's reader would have read it.

    Args:
        image: ``MetaTensor`` (C, X, Y, Z) or (C, X, Y) in the orientation of its file.
        reader: nnU-Net's name of the reader that the model was trained with.

    Returns:
        Voxels (C, Z, Y, X), float32, and the properties of that reader.

    Raises:
        UserError: A tensor without geometry, or a reader that turns images into another orientation.
    """
    from monai.data import MetaTensor

    if not isinstance(image, MetaTensor):
        raise UserError(
            "an image to predict is a tensor without geometry. Give file names, or a MetaTensor as LoadImaged and "
            "EnsureChannelFirstd make it."
        )
    if reader not in (*SAME_ORIENTATION, NATURAL_READER) or image.ndim not in (3, 4):
        raise UserError(
            f"a tensor of shape {tuple(image.shape)} cannot stand for what nnU-Net's {reader} reads. Give file names instead."
        )
    array = image.as_tensor().cpu().numpy().astype(np.float32)
    flat = array.ndim == 3
    voxels = np.ascontiguousarray(
        np.transpose(array, (0, 2, 1))[:, None] if flat else np.transpose(array, (0, 3, 2, 1))
    )
    if reader == NATURAL_READER:
        return voxels, {"spacing": (SLICE_SPACING_OF_2D, 1, 1)}
    n = array.ndim - 1
    affine = np.asarray(image.affine.cpu().numpy(), dtype=float)
    if image.meta.get("space") == "LPS":
        affine = TO_OTHER_SIDE @ affine
    spacing = _spacing(affine, image.meta.get("pixdim"), n)
    reversed_spacing = [float(s) for s in spacing[::-1]]
    if flat:
        reversed_spacing = [float(max(spacing)) * SLICE_SPACING_OF_2D, *reversed_spacing]
    if reader == "NibabelIO":
        return voxels, {"nibabel_stuff": {"original_affine": affine}, "spacing": reversed_spacing}
    lps = TO_OTHER_SIDE @ affine
    stated = {
        "spacing": [float(s) for s in spacing],
        "origin": lps[:n, 3].tolist(),
        "direction": (lps[:n, :n] / spacing).ravel().tolist(),
    }
    return voxels, {"sitk_stuff": stated, "spacing": reversed_spacing}


def _spacing(affine: np.ndarray, stated: Any, n: int) -> np.ndarray:
    """Of the affine, to the digits that the file's header states where the two agree."""
    spacing: np.ndarray = np.linalg.norm(affine[:n, :n], axis=0)
    if stated is not None:
        header: np.ndarray = np.abs(np.asarray(stated, dtype=float).ravel()[1 : n + 1])
        if header.shape == spacing.shape and np.allclose(header, spacing, rtol=1e-5, atol=0):
            return header
    return spacing

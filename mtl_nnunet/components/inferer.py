"""Inference on whole volumes, slice by slice or in patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.inferers import Inferer, SliceInferer, SlidingWindowInferer


def sliding_window(
    roi_size: Sequence[int], sw_batch_size: int | None = None, overlap: float = 0.5, **options: Any
) -> Inferer:
    """MONAI's inferer for volumes (N, C, D, H, W): of slices where ``roi_size`` is (H, W), of patches where it is (D, H, W).

    Args:
        roi_size: The window.
        sw_batch_size: Windows at a time; None for 16 of slices, 4 of volumes.
        overlap: Share of a window that the next one covers again.
        options: Further ones of ``SlidingWindowInferer``.
    """
    size = sw_batch_size or (16 if len(roi_size) == 2 else 4)
    window = {"sw_batch_size": size, "overlap": overlap, "mode": "gaussian", **options}
    if len(roi_size) == 2:
        return SliceInferer(spatial_dim=0, roi_size=tuple(roi_size), **window)
    return SlidingWindowInferer(roi_size=tuple(roi_size), **window)

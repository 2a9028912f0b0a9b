"""Random views of slices, seeded so that they depend on nothing but the seed and the slice's place."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mtl_nnunet.errors import UserError, listed


def make_views(images: Tensor, kind: str, num_views: int, seed: int) -> Tensor:
    """Random views of each slice.

    Args:
        images: Slices, shape (N, C, H, W), float32.
        kind: ``scanner`` or ``paper``.
        num_views: V.
        seed: Same seed, same views.

    Returns:
        Shape (V, N, C, H, W), float32.

    Raises:
        UserError: Unknown kind.
    """
    if kind not in VIEWS:
        raise UserError(f"unknown views '{kind}'. Available: {listed(sorted(VIEWS))}.")
    with tqdm(range(num_views), desc="Making views", unit="view", file=sys.stderr) as bar:
        return torch.stack([VIEWS[kind](images, seed, view) for view in bar])


def paper_view(images: Tensor, seed: int, view: int) -> Tensor:
    """The published jitter: brightness 10 %, contrast 5 %, saturation 10 %, hue 5 %, one factor for all slices.

    The jitter is defined on images in [0, 1], so each slice is jittered on its own range and put back. On images that
    are not RGB, hue and saturation change nothing, and each channel is jittered by the same factors.

    Args:
        images: Shape (N, C, H, W).
        seed: Seed of the run.
        view: Number of the view.

    Returns:
        Shape (N, C, H, W).

    Source: arXiv:2410.18677, its public code, commit ae4401a.
    """
    from torchvision.transforms import ColorJitter

    low = images.amin((1, 2, 3), keepdim=True)
    width = (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(torch.finfo(images.dtype).tiny)
    in_range = (images - low) / width
    n, channels, height, columns = images.shape
    if channels != 3:
        in_range = in_range.reshape(n * channels, 1, height, columns)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_derived_seed(seed, view))
        jittered = ColorJitter(brightness=0.1, contrast=0.05, saturation=0.1, hue=0.05)(in_range)
    view_in_range: Tensor = jittered.reshape(images.shape)
    return view_in_range * width + low


def scanner_view(images: Tensor, seed: int, view: int) -> Tensor:
    """What differs between scanners and protocols: bias field, contrast curve, gain, offset, resolution and noise.

    Strengths are in units of the slice's own standard deviation, so that they mean the same whatever the normalisation.

    Args:
        images: Shape (N, C, H, W).
        seed: Seed of the run.
        view: Number of the view.

    Returns:
        Shape (N, C, H, W).
    """
    from monai.transforms import (
        Compose,
        RandAdjustContrast,
        RandBiasField,
        RandGaussianNoise,
        RandGaussianSmooth,
        RandScaleIntensity,
        RandShiftIntensity,
    )

    scanner = Compose(
        [
            RandBiasField(degree=2, coeff_range=(0.0, 0.15), prob=1.0),
            RandAdjustContrast(prob=1.0, gamma=(0.75, 1.33), retain_stats=True),
            RandGaussianSmooth(sigma_x=(0.25, 1.0), sigma_y=(0.25, 1.0), prob=0.5),
            RandScaleIntensity(factors=0.2, prob=1.0),
            RandShiftIntensity(offsets=0.2, prob=1.0),
            RandGaussianNoise(prob=1.0, mean=0.0, std=0.15),
        ]
    )
    views = torch.empty_like(images)
    for i, image in enumerate(images):
        scanner.set_random_state(seed=_derived_seed(seed, view, i))
        mean, std = image.mean(), image.std().clamp_min(torch.finfo(image.dtype).tiny)
        viewed = scanner((image - mean) / std)
        views[i] = torch.as_tensor(viewed) * std + mean
    return views


VIEWS: dict[str, Callable[[Tensor, int, int], Tensor]] = {"paper": paper_view, "scanner": scanner_view}


def _derived_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

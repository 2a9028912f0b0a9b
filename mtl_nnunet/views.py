"""Random views of slices, seeded so that they depend on nothing but the seed and the slice's place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.generators import seeded


def make_views(images: Tensor, kind: str, num_views: int, seed: int, strength: float = 1.0) -> Tensor:
    """Random views of each slice.

    Args:
        images: Slices, shape (N, C, H, W), float32.
        kind: ``scanner``, ``paper``, or ``plain`` for the slices as they are.
        num_views: V.
        seed: Same seed, same views.
        strength: How far views stray from the slice: 0 not at all, 1 as documented.

    Returns:
        Shape (V, N, C, H, W), float32.

    Raises:
        UserError: Unknown kind, or a strength beyond 0 to 2.
    """
    if not 0 <= strength <= 2:
        raise UserError(f"views of strength {strength:g} are not known: expected 0 to 2.")
    if kind not in VIEWS:
        raise UserError(f"unknown views '{kind}'. Available: {listed(sorted(VIEWS))}.")
    if kind == "plain" or strength == 0:
        return images.expand(num_views, *images.shape)
    with tqdm(range(num_views), desc="Making views", unit="view", file=sys.stderr) as bar:
        return torch.stack([VIEWS[kind](images, seed, view, strength) for view in bar])


def views_of_some(
    images: Tensor, places: Sequence[int], kind: str, num_views: int, seed: int, strength: float
) -> Tensor:
    """The very views that ``make_views`` makes of some of the slices, without those of the others.

    Args:
        images: All slices, shape (N, C, H, W).
        places: Which of them, K.
        kind: As for ``make_views``.
        num_views: V.
        seed: As for ``make_views``.
        strength: As for ``make_views``.

    Returns:
        Shape (V, K, C, H, W), float32.
    """
    some = images[list(places)]
    if kind == "plain" or strength == 0:
        return some.expand(num_views, *some.shape)
    return torch.stack([VIEWS[kind](some, seed, view, strength, places) for view in range(num_views)])


def plain_view(
    images: Tensor, seed: int, view: int, strength: float = 1.0, places: Sequence[int] | None = None
) -> Tensor:
    """The slices as they are."""
    return images


def paper_view(
    images: Tensor, seed: int, view: int, strength: float = 1.0, places: Sequence[int] | None = None
) -> Tensor:
    """The published jitter: brightness 10 %, contrast 5 %, saturation 10 %, hue 5 %, one factor for all slices.

    The jitter is defined on images in [0, 1], so each slice is jittered on its own range and put back. Three channels are
    taken for RGB; on others hue and saturation change nothing, and each channel is jittered by the same factors.

    Args:
        images: Shape (N, C, H, W).
        seed: Seed of the run.
        view: Number of the view.
        strength: 1 as published; the four ranges are multiplied by it.
        places: Of no effect here.

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
    jitter = ColorJitter(
        brightness=0.1 * strength, contrast=0.05 * strength, saturation=0.1 * strength, hue=0.05 * strength
    )
    with seeded(_derived_seed(seed, view)):
        jittered = jitter(in_range)
    view_in_range: Tensor = jittered.reshape(images.shape)
    return view_in_range * width + low


def scanner_view(
    images: Tensor, seed: int, view: int, strength: float = 1.0, places: Sequence[int] | None = None
) -> Tensor:
    """What differs between scanners and protocols.

    Position, bias field, contrast curve, blur, resolution, gain, offset and noise. Strengths are in units of the slice's
    own standard deviation, so that they mean the same whatever the normalisation.

    Args:
        images: Shape (N, C, H, W).
        seed: Seed of the run.
        view: Number of the view.
        strength: 1 for rotations up to 6 degrees, 5 % of size, 15 % of bias, gamma up to 4/3, blur up to 1 pixel, half
            the resolution, 20 % of gain and offset, 15 % of noise; the ranges are multiplied by it.
        places: Of each slice among all, which seeds its view; None where these are all.

    Returns:
        Shape (N, C, H, W).
    """
    from monai.transforms import (
        Compose,
        RandAdjustContrast,
        RandAffine,
        RandBiasField,
        RandGaussianNoise,
        RandGaussianSmooth,
        RandScaleIntensity,
        RandShiftIntensity,
        RandSimulateLowResolution,
    )

    sigma = (0.25 * strength, strength)
    scanner = Compose(
        [
            RandAffine(
                prob=1.0, rotate_range=0.1 * strength, scale_range=(0.05 * strength,) * 2, padding_mode="reflection"
            ),
            RandBiasField(degree=2, coeff_range=(0.0, 0.15 * strength), prob=1.0),
            RandAdjustContrast(prob=1.0, gamma=(0.75**strength, 0.75**-strength), retain_stats=True),
            RandGaussianSmooth(sigma_x=sigma, sigma_y=sigma, prob=0.5),
            RandSimulateLowResolution(
                prob=0.25, upsample_mode="bilinear", zoom_range=(max(0.25, 1 - 0.5 * strength), 1.0)
            ),
            RandScaleIntensity(factors=0.2 * strength, prob=1.0),
            RandShiftIntensity(offsets=0.2 * strength, prob=1.0),
            RandGaussianNoise(prob=1.0, mean=0.0, std=0.15 * strength),
        ]
    )
    views = torch.empty_like(images)
    for i, (place, image) in enumerate(zip(range(len(images)) if places is None else places, images, strict=True)):
        scanner.set_random_state(seed=_derived_seed(seed, view, int(place)))
        mean, std = image.mean(), image.std().clamp_min(torch.finfo(image.dtype).tiny)
        viewed = scanner((image - mean) / std)
        views[i] = torch.as_tensor(viewed) * std + mean
    return views


VIEWS: dict[str, Callable[..., Tensor]] = {
    "plain": plain_view,
    "paper": paper_view,
    "scanner": scanner_view,
}


def _derived_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

"""One pass of an encoder over the target: every level, view and pixel that any of the scores reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.pixels import Pixels, sample_pixels
from mtl_nnunet.scores import Features, Score
from mtl_nnunet.slices import Slices
from mtl_nnunet.views import make_views

BATCH_SIZE = 32
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Target:
    """What every checkpoint sees.

    Attributes:
        views: Views of the slices by kind and strength, each of shape (V, N, C, H, W), float32.
        patients: Patient index of each slice, shape (N,).
        pixels: Sampled pixels, drawn with labels (True) or without (False).
    """

    views: dict[tuple[str, float], np.ndarray]
    patients: np.ndarray
    pixels: dict[bool, Pixels]

    @property
    def num_patients(self) -> int:
        """How many patients the slices are of."""
        return int(self.patients.max()) + 1

    def __sizeof__(self) -> int:
        """Bytes, by which a cluster decides to send it once and not with every job."""
        return sum(v.nbytes for v in self.views.values())

    @property
    def input_channels(self) -> int:
        """Channels of the slices."""
        return int(next(iter(self.views.values())).shape[2])


def make_target(slices: Slices, scores: Sequence[Score], seed: int) -> Target:
    """Views and pixels that the scores read, made once for all checkpoints.

    Args:
        slices: Of which slices.
        scores: For which scores.
        seed: Seed of views and pixels.

    Raises:
        UserError: A score needs labels and the slices have none.
    """
    unlabelled = [s.name for s in scores if s.labels]
    if slices.labels is None and unlabelled:
        raise UserError(
            f"score '{unlabelled[0]}' needs labels and the slices have none. Gather them with labels "
            "(gather_slices(..., with_labels=True)), or choose another score."
        )
    views = {
        (kind, strength): make_views(slices.images, kind, num, seed, strength).numpy()
        for (kind, strength), num in views_wanted(scores).items()
    }
    pixels = {
        labelled: sample_pixels(slices, labelled, seed)
        for labelled in sorted({s.labels for s in scores if s.reads == "pixels"})
    }
    return Target(views, slices.patients, pixels)


def views_wanted(scores: Sequence[Score]) -> dict[tuple[str, float], int]:
    """How many views of each kind and strength the scores read; those of one kind share them."""
    wanted: dict[tuple[str, float], int] = {}
    for score in scores:
        wanted[score.view_key] = max(score.num_views, wanted.get(score.view_key, 0))
    return wanted


def digest(slices: Slices, labelled: bool) -> str:
    """A name for the content of slices: images, who they are of, and labels where a score reads them."""
    sha = hashlib.sha256()
    sha.update(repr(tuple(slices.images.shape)).encode())
    sha.update(np.ascontiguousarray(slices.images.numpy()).data)
    sha.update(np.ascontiguousarray(slices.patients, dtype=np.int64).data)
    if labelled and slices.labels is not None:
        sha.update(np.ascontiguousarray(slices.labels.numpy()).data)
    return sha.hexdigest()


def embed(
    encoder: nn.Module, target: Target, scores: Sequence[Score], device: str = "cpu", precision: str = "auto"
) -> Features:
    """Everything that the scores read of an encoder, in one pass over each view.

    Args:
        encoder: Images (N, C, H, W) to feature maps, shallow to deep, each (N, D, h, w); used in eval mode.
        target: What it sees.
        scores: What is to be computed; layers deeper than any of them reads are not run where the encoder allows it.
        device: Where the forwards run.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on GPUs that have it.

    Returns:
        Float32, on the CPU.

    Raises:
        UserError: The encoder has no such level, gives no feature maps, or cannot take images of this size.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}'. Available: {listed(list(PRECISIONS))}.")
    try:
        encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the encoder cannot be moved to device '{device}' ({str(error).splitlines()[0]}).") from error
    name = encoder.name if isinstance(encoder, TimmEncoder) else type(encoder).__name__
    autocast = _autocast(device, precision)
    num_levels = (
        len(encoder.output_channels)
        if isinstance(encoder, TimmEncoder)
        else len(_forward(encoder, _batch(target, 0, slice(0, 2), device), name, autocast, device))
    )
    levels = {score: score.resolved_levels(num_levels, name) for score in scores}
    forward: Callable[[Tensor], Sequence[Tensor]] = encoder
    if isinstance(encoder, TimmEncoder):
        deepest = max(max(ls) for ls in levels.values())
        timm_encoder = encoder

        def forward(images: Tensor) -> Sequence[Tensor]:
            return timm_encoder.first_levels(images, deepest)

    embeddings: dict[tuple[tuple[str, float], int, bool], Tensor] = {}
    sampled: dict[tuple[bool, int], Tensor] = {}
    for key, views in target.views.items():
        reading = [s for s in scores if s.view_key == key]
        kept = {(level, s.pooled) for s in reading if s.reads == "views" for level in levels[s]}
        at = {(s.labels, level) for s in reading if s.reads == "pixels" for level in levels[s]}
        parts: dict[tuple[int, bool], list[list[Tensor]]] = {k: [[] for _ in views] for k in kept}
        found: dict[tuple[bool, int], list[Tensor]] = {k: [] for k in at}
        for v in range(len(views)):
            for start in range(0, views.shape[1], BATCH_SIZE):
                rows = slice(start, min(start + BATCH_SIZE, views.shape[1]))
                maps = _forward(forward, _batch(target, v, rows, device, key), name, autocast, device)
                for level, pooled in kept:
                    features = maps[level - 1].float()
                    parts[level, pooled][v].append((features.mean((2, 3)) if pooled else features.flatten(1)).cpu())
                # pixels are read off the first view, which is the slices themselves
                if v == 0:
                    for labelled, level in at:
                        found[labelled, level].append(
                            _at_pixels(maps[level - 1], target.pixels[labelled], rows, views.shape[3:])
                        )
        # cloned outside inference mode, so that scores can take derivatives
        for (level, pooled), by_view in parts.items():
            embeddings[key, level, pooled] = torch.stack([torch.cat(batches) for batches in by_view]).clone()
        for (labelled, level), batches in found.items():
            sampled[labelled, level] = torch.cat(batches).clone()
    # copied: a worker's array is read-only, and torch warns of those
    return Features(embeddings, sampled, target.patients.copy(), target.pixels, num_levels, _called(encoder))


def _called(encoder: nn.Module) -> str:
    if not isinstance(encoder, TimmEncoder):
        return f"encoder '{type(encoder).__name__}'"
    return f"checkpoint {encoder.source}" if encoder.source else f"encoder '{encoder.name}' at random initialisation"


def _batch(target: Target, view: int, rows: slice, device: str, key: tuple[str, float] | None = None) -> Tensor:
    views = target.views[key] if key is not None else next(iter(target.views.values()))
    # copied: a worker's array is mapped from the parent's memory and read-only
    images = torch.tensor(views[view, rows])
    return images.to(device=device, memory_format=torch.channels_last)


def _forward(
    forward: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    name: str,
    autocast: AbstractContextManager[None],
    device: str,
) -> Sequence[Tensor]:
    try:
        with torch.inference_mode(), autocast:
            maps = forward(images)
    except (AssertionError, RuntimeError) as error:
        if "memory" in str(error):
            raise UserError(f"out of memory on {device}. Pass -device cpu, or fewer -num_slices.") from error
        raise UserError(
            f"encoder '{name}' cannot take {images.dtype} slices of shape {tuple(images.shape)} ({error}). Use one that takes "
            "these channels and any size, as convolutional encoders do."
        ) from error
    if not isinstance(maps, (list, tuple)) or not all(isinstance(m, Tensor) and m.ndim == 4 for m in maps):
        raise UserError(
            f"encoder '{name}' gives no feature maps: expected a list of tensors (N, D, h, w), shallow to deep."
        )
    return maps


def _at_pixels(maps: Tensor, pixels: Pixels, rows: slice, size: Sequence[int]) -> Tensor:
    """Features at pixels, interpolated between the map's own positions, shape (M, D)."""
    first, last = np.searchsorted(pixels.slices, [rows.start, rows.stop])
    height, width = size
    # Apple's devices have no sampling beyond the border before torch 2.13
    maps = maps.cpu() if maps.device.type == "mps" else maps
    # pixel centres in the map's coordinates, where -1 and 1 are the image's edges
    y = torch.as_tensor((pixels.rows[first:last] + 0.5) / height * 2 - 1, dtype=torch.float32)
    x = torch.as_tensor((pixels.columns[first:last] + 0.5) / width * 2 - 1, dtype=torch.float32)
    where = pixels.slices[first:last] - rows.start
    taken = torch.empty(last - first, maps.shape[1])
    for i in np.unique(where):
        mine = torch.as_tensor(np.flatnonzero(where == i))
        grid = torch.stack([x[mine], y[mine]], -1)[None, None].to(maps.device)
        sampled = torch.nn.functional.grid_sample(
            maps[int(i), None].float(), grid, padding_mode="border", align_corners=False
        )
        taken[mine] = sampled[0, :, 0].T.cpu()
    return taken


def resolved_precision(device: str, precision: str) -> str:
    """``fp32`` or ``bf16``: what ``auto`` stands for on this device."""
    if precision != "auto":
        return precision
    # emulated it is slower than float32
    has_it = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_it else "fp32"


def _autocast(device: str, precision: str) -> AbstractContextManager[None]:
    half = resolved_precision(device, precision) == "bf16"
    context: AbstractContextManager[None] = (
        torch.autocast(device.partition(":")[0], torch.bfloat16) if half else nullcontext()
    )
    return context

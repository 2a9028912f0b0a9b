"""Volumes to 2D slices as nnU-Net's 2D configuration would see them, before any planning.

The plane, the in-plane spacing, the cropping, the normalisation and the resampling are nnU-Net's own: a test compares
the result with nnU-Net's preprocessed arrays.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm import tqdm

from mtl_nnunet.cases import SKIPPED_SHARE, Case, Dataset, read_case, sampled_cases
from mtl_nnunet.errors import UserError, listed

# a slice whose intensities vary less than this share of its volume's is empty: nothing in it to embed
EMPTY_SHARE = 0.1
MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 64, 512, 32
# HU; without labels, the CT statistics are those of everything denser than air and lung
BODY_THRESHOLD = -500.0
FOREGROUND_SAMPLES = 10_000_000


@dataclass(frozen=True)
class UsedCase:
    """A case that was read.

    Attributes:
        name: Of the case.
        patient: Whose.
        sha256: Hashes of its image files, and of its label if it has one.
        num_slices: How many of its slices were taken.
        spacing: Voxel size along (z, y, x) in mm, as the file states it.
        plane: Rows and columns of its resampled slices, before all were brought to one size.
        first: Which slice of the file is the first of the cropped volume, along the slicing axis.
    """

    name: str
    patient: str
    sha256: tuple[str, ...]
    num_slices: int
    spacing: tuple[float, float, float]
    plane: tuple[int, int]
    first: int = 0


@dataclass(frozen=True)
class Slices:
    """Slices of a dataset with where they came from.

    Attributes:
        images: Shape (N, C, H, W), float32, normalised, one in-plane spacing.
        patients: Patient index of each slice, shape (N,), 0 to P - 1.
        cases: Case name of each slice.
        positions: Index of each slice along the slicing axis of the cropped volume.
        axis: Slicing axis of the volume as nnU-Net reads it, (z, y, x).
        spacing: In-plane spacing (row, column) in mm.
        normalization: nnU-Net's scheme of each channel.
        use_mask_for_norm: Whether nnU-Net normalises inside the nonzero region only.
        intensities: nnU-Net's foreground intensity properties of each channel; empty unless a channel is CT.
        used: The cases that were read, sorted by name.
        labels: Class of each pixel, shape (N, H, W), int16, -1 where there is none to count (not annotated, outside the
            image, beyond its border); None unless asked for.
        skipped: Cases that could not be used, with the reason, where the caller let them be skipped.
    """

    images: Tensor
    patients: np.ndarray
    cases: tuple[str, ...]
    positions: tuple[int, ...]
    axis: int
    spacing: tuple[float, float]
    normalization: tuple[str, ...]
    use_mask_for_norm: bool
    intensities: dict[str, dict[str, float]]
    used: tuple[UsedCase, ...]
    labels: Tensor | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def num_patients(self) -> int:
        """How many patients the slices are of."""
        return int(self.patients.max()) + 1

    def patients_behind(self, labelled: bool) -> np.ndarray:
        """Indices of the patients that a score rests on: all, or with labels those who have foreground on their slices."""
        if not labelled or self.labels is None:
            return np.arange(self.num_patients)
        segmented = (self.labels > 0).flatten(1).any(1).numpy()
        return np.unique(self.patients[segmented])


@dataclass(frozen=True)
class _Extract:
    """What is kept of a case: a few slices along one axis, or the middle of them, and what the dataset's choices depend on."""

    case: Case
    sha256: tuple[str, ...]
    axis: int
    spacing: tuple[float, float, float]
    relative_size: float
    plane: tuple[int, int]
    is_cut: bool
    stacks: dict[bool, np.ndarray]
    positions: tuple[int, ...]
    taken: tuple[int, ...]
    foreground: list[np.ndarray]
    labels: np.ndarray | None
    first: int


@dataclass(frozen=True)
class _Finished:
    """The middle of a case's resampled slices (n, C, h, w), that of their labels (n, h, w), and rows and columns of the whole."""

    images: Tensor
    plane: tuple[int, int]
    labels: np.ndarray | None


def gather_slices(
    dataset: Dataset,
    num_slices: int = 256,
    num_cases: int = 64,
    seed: int = 0,
    num_workers: int | None = None,
    with_labels: bool = False,
    skip_bad_cases: bool = False,
) -> Slices:
    """Slices of a sample of cases, spread evenly over the cases, empty ones avoided.

    Args:
        dataset: Where from.
        num_slices: How many slices at most.
        num_cases: How many cases at most; each is read once.
        seed: Decides which cases and slices.
        num_workers: Threads that read; None for one a core, at most eight.
        with_labels: Keep the labels of the slices too; a class that few slices hold is not sought.
        skip_bad_cases: Go on without a case that cannot be used, and name it in ``Slices.skipped``.

    Returns:
        Slices in the order of case names; the same for the same seed, whatever the number of workers.

    Raises:
        UserError: A case that is not fit for use (with ``skip_bad_cases``: more than a tenth of them), a case without a
            label where labels are asked for, or slices of fewer than two patients.
    """
    cases = sampled_cases(dataset, min(num_cases, num_slices), seed)
    quotas = _quotas(len(cases), num_slices, seed)
    schemes = normalization_schemes(dataset.channel_names)
    workers = num_workers or min(8, os.cpu_count() or 1)
    if with_labels:
        _refuse_unlabelled(cases, dataset)
    # every thread comes to its own end: one that is left inside a reader when Python exits takes the process down
    stopped = threading.Event()

    def extract_or_reason(case: Case, quota: int, axis: int | None = None) -> _Extract | str | None:
        if stopped.is_set():
            return None
        try:
            return _extract(case, dataset, quota, seed, axis, with_labels)
        except UserError as error:
            if not skip_bad_cases:
                stopped.set()
            return str(error)

    jobs = [delayed(extract_or_reason)(case, quota) for case, quota in zip(cases, quotas, strict=True)]
    bar = tqdm(total=len(cases), desc="Reading cases", unit="case", file=sys.stderr)
    # nnU-Net's readers print to stdout, which belongs to the result
    with bar, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        read: list[_Extract | str | None] = []
        try:
            for extract in Parallel(n_jobs=workers, backend="threading", return_as="generator")(jobs):
                read.append(extract)
                bar.update()
        finally:
            stopped.set()
        _refuse_bad_cases(cases, read, skip_bad_cases)
        spacings = np.array([e.spacing for e in read if isinstance(e, _Extract)])
        median = np.percentile(spacings, 50, 0)
        axis = int(np.argmax(median))
        # the plane is known only now: a case sliced along another axis is read again
        stopped.clear()
        read = [
            extract_or_reason(e.case, quota, axis) if isinstance(e, _Extract) and e.axis != axis else e
            for e, quota in zip(read, quotas, strict=True)
        ]
        _refuse_bad_cases(cases, read, skip_bad_cases)
        skipped = tuple((c.name, e) for c, e in zip(cases, read, strict=True) if isinstance(e, str))
        extracts = [e for e in read if isinstance(e, _Extract)]
        target = [float(median[i]) for i in range(3) if i != axis]
        use_mask = bool(np.median([e.relative_size for e in extracts]) < 0.75)
        intensities = _intensity_properties(extracts, schemes)

        def finished(extract: _Extract) -> _Finished:
            if extract.is_cut and _shape_at(extract, target)[1:] != extract.plane:
                # a 2D image, so all of it is one slice
                extract = _extract(extract.case, dataset, 1, seed, axis, with_labels, whole=True)
            return _finish(extract, dataset, use_mask, intensities, target)

        # one by one, so that what is not used any more is gone before the next
        planes = [finished(e) for e in extracts]
    thin = [e.case.name for e, p in zip(extracts, planes, strict=True) if min(p.plane) < 8]
    if thin:
        raise UserError(
            f"the slices of {len(thin)} cases are fewer than 8 pixels wide ({listed(thin)}): nnU-Net slices along the axis "
            f"of the largest spacing, here axis {axis} of (z, y, x) at {median[axis]:g} mm. Correct the spacing in the headers "
            "if it is wrong, or leave these cases out."
        )
    size = _common_size([p.plane for p in planes])
    images = torch.cat([_to_size(p.images, size) for p in planes])
    labels = (
        torch.cat([_labels_to_size(p.labels, size) for p in planes if p.labels is not None]) if with_labels else None
    )
    names = sorted({e.case.patient for e in extracts})
    if len(names) < 2:
        raise UserError(
            f"the {len(extracts)} sampled cases are of one patient ({names[0]}). At least two patients are needed, since "
            "slices are compared between patients. Raise -num_cases or correct the table of patients."
        )
    index = {name: i for i, name in enumerate(names)}
    return Slices(
        images=images,
        patients=np.array([index[e.case.patient] for e in extracts for _ in e.taken]),
        cases=tuple(e.case.name for e in extracts for _ in e.taken),
        positions=tuple(p for e in extracts for p in e.taken),
        axis=axis,
        spacing=(target[0], target[1]),
        normalization=schemes,
        use_mask_for_norm=use_mask,
        intensities=intensities,
        used=tuple(
            UsedCase(e.case.name, e.case.patient, e.sha256, len(e.taken), e.spacing, p.plane, e.first)
            for e, p in zip(extracts, planes, strict=True)
        ),
        labels=labels,
        skipped=(*dataset.skipped, *skipped),
    )


def _refuse_bad_cases(cases: Sequence[Case], read: Sequence[_Extract | str | None], skip_bad_cases: bool) -> None:
    reasons = [e for e in read if isinstance(e, str)]
    if reasons and not skip_bad_cases:
        raise UserError(reasons[0])
    if len(reasons) > SKIPPED_SHARE * len(cases):
        raise UserError(
            f"{len(reasons)} of {len(cases)} sampled cases cannot be used, more than {SKIPPED_SHARE:.0%}. "
            f"The first: {reasons[0]}"
        )


def _quotas(num_cases: int, num_slices: int, seed: int) -> list[int]:
    quotas = np.full(num_cases, num_slices // num_cases)
    lucky = np.random.default_rng(seed).permutation(num_cases)[: num_slices % num_cases]
    quotas[lucky] += 1
    return [int(q) for q in quotas]


def normalization_schemes(channel_names: Sequence[str]) -> tuple[str, ...]:
    """nnU-Net's normalisation scheme for each channel name of a dataset.json."""
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import (
        get_normalization_scheme,
    )

    return tuple(get_normalization_scheme(name).__name__ for name in channel_names)


def _refuse_unlabelled(cases: Sequence[Case], dataset: Dataset) -> None:
    unlabelled = [case.name for case in cases if case.label is None]
    if unlabelled:
        raise UserError(
            f"{len(unlabelled)} cases of {dataset.name} have no label ({listed(unlabelled)}), and labels are needed. "
            "Add the labels, or choose a score that needs none."
        )


def _extract(
    case: Case,
    dataset: Dataset,
    quota: int,
    seed: int,
    axis: int | None = None,
    with_labels: bool = False,
    whole: bool = False,
) -> _Extract:
    """Read a case; of a 2D image only the middle is kept, which is what will be used of it unless it is resampled, but for ``whole``."""
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    image = read_case(case, dataset.reader, len(dataset.channel_names))
    axis = int(np.argmax(image.spacing)) if axis is None else axis
    order = [0, *(i + 1 for i in _plane_first(axis))]
    label = None if image.label is None else image.label[None].transpose(order)
    voxels, mask, kept = crop_to_nonzero(image.voxels.transpose(order), label)
    taken = evenly(not_empty(voxels, case.name), quota, np.random.default_rng([seed, zlib.crc32(case.name.encode())]))
    # nnU-Net clips resampled values to the range of the whole volume: its extreme slices travel along
    extremes = {int(s) for s in (*voxels.min((2, 3)).argmin(1), *voxels.max((2, 3)).argmax(1))}
    positions = sorted(extremes.union(taken))
    schemes = normalization_schemes(dataset.channel_names)
    plane = (voxels.shape[2], voxels.shape[3])
    rows, columns = _middle(plane) if voxels.shape[1] == 1 and not whole else (slice(None), slice(None))
    with_and_without_mask = (False, True) if "ZScoreNormalization" in schemes else (False,)
    return _Extract(
        case=case,
        sha256=image.hashes,
        axis=axis,
        spacing=image.spacing,
        relative_size=float(np.prod(voxels.shape[1:]) / np.prod(image.voxels.shape[1:])),
        plane=plane,
        is_cut=voxels[..., rows, columns].shape != voxels.shape,
        stacks={
            use_mask: _normalized_slices(
                voxels, mask, dataset.channel_names, use_mask, case, np.s_[positions, rows, columns]
            )
            for use_mask in with_and_without_mask
        },
        positions=tuple(positions),
        taken=taken,
        foreground=_foreground_samples(voxels, mask, label is not None, schemes, len(dataset.cases)),
        labels=_countable(mask[:, list(taken)][..., rows, columns], dataset.ignore_label) if with_labels else None,
        first=int(kept[0][0]),
    )


def _countable(labels: np.ndarray, ignore_label: int | None) -> np.ndarray:
    # outside the image nnU-Net marks -1: background that no network has to tell from tissue
    return np.where(labels == ignore_label, -1, labels) if ignore_label is not None else labels.copy()


def _plane_first(axis: int) -> list[int]:
    return [axis, *(i for i in range(3) if i != axis)]


def not_empty(voxels: np.ndarray, name: str) -> np.ndarray:
    """Places along the first axis of a volume (C, Z, Y, X) whose slices vary as an image does.

    Args:
        voxels: The volume.
        name: Of its case, for the message.

    Raises:
        UserError: There is none.
    """
    # slice by slice, since NumPy's deviation of a volume takes another volume of memory
    slices = range(voxels.shape[1])
    means = np.stack([voxels[:, s].mean((1, 2), dtype=np.float64) for s in slices], axis=1)
    of_slices = np.stack([voxels[:, s].std((1, 2), dtype=np.float64) for s in slices], axis=1)
    of_volume = np.sqrt((of_slices**2).mean(1) + means.var(1))[:, None]
    filled = np.flatnonzero(((of_slices >= EMPTY_SHARE * of_volume) & (of_volume > 0)).any(0))
    if not len(filled):
        raise UserError(
            f"case {name}: inside its nonzero region every slice is constant, so there is nothing to embed. "
            "Repair the image, or leave the case out."
        )
    return filled


def evenly(candidates: np.ndarray, quota: int, rng: np.random.Generator) -> tuple[int, ...]:
    """At most ``quota`` of the candidates, in equal steps from a random start."""
    if len(candidates) <= quota:
        return tuple(int(c) for c in candidates)
    steps = np.floor((np.arange(quota) + rng.random()) * len(candidates) / quota).astype(int)
    return tuple(int(c) for c in candidates[steps])


def _normalized_slices(
    voxels: np.ndarray,
    mask: np.ndarray,
    channel_names: Sequence[str],
    use_mask: bool,
    case: Case,
    kept: tuple[Sequence[int], slice, slice],
) -> np.ndarray:
    """Some slices of the volume, or a part of them, as normalised as a whole, one channel in memory at a time."""
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import (
        get_normalization_scheme,
    )

    positions, rows, columns = kept
    normalized = np.array(voxels[:, positions, rows, columns], dtype=np.float32)
    for channel, name in enumerate(channel_names):
        scheme = get_normalization_scheme(name)
        # CT waits for the statistics of the whole dataset
        if scheme.__name__ == "CTNormalization":
            continue
        honours_mask = scheme.leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true
        try:
            normalizer = scheme(use_mask_for_norm=bool(use_mask and honours_mask), intensityproperties={})
            normalized[channel] = normalizer.run(np.array(voxels[channel], dtype=np.float32), mask[0])[
                positions, rows, columns
            ]
        except AssertionError as error:
            raise UserError(
                f"case {case.name}: channel {channel} ('{name}') cannot be normalised by nnU-Net's {scheme.__name__}: {error}. "
                "Correct channel_names or the image."
            ) from error
    return normalized


def _foreground_samples(
    voxels: np.ndarray, mask: np.ndarray, labelled: bool, schemes: Sequence[str], num_cases: int
) -> list[np.ndarray]:
    if "CTNormalization" not in schemes:
        return []
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )

    if not labelled:
        # other channels are not in HU
        dense = [v > BODY_THRESHOLD for v, s in zip(voxels, schemes, strict=True) if s == "CTNormalization"]
        mask = np.logical_or.reduce(dense)[None]
    samples, _ = DatasetFingerprintExtractor.collect_foreground_intensities(
        mask, voxels, num_samples=FOREGROUND_SAMPLES // num_cases
    )
    return [np.asarray(s, dtype=np.float32) for s in samples]


def _intensity_properties(extracts: Sequence[_Extract], schemes: Sequence[str]) -> dict[str, dict[str, float]]:
    if "CTNormalization" not in schemes:
        return {}
    properties = {}
    for channel in range(len(schemes)):
        values = np.concatenate([e.foreground[channel] for e in extracts])
        if not len(values):
            raise UserError(
                "CT is normalised by the intensities of the labelled foreground, and no sampled case has any. "
                "Raise -num_cases, or check the labels."
            )
        if values.min() == values.max():
            raise UserError(
                f"CT is normalised by the intensities of the labelled foreground, and they are all {values[0]:g}. Check the labels."
            )
        low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
        statistics = (np.mean(values), median, np.std(values), np.min(values), np.max(values), high, low)
        names = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")
        properties[str(channel)] = {k: float(v) for k, v in zip(names, statistics, strict=True)}
    return properties


def _finish(
    extract: _Extract,
    dataset: Dataset,
    use_mask: bool,
    intensities: dict[str, dict[str, float]],
    target: Sequence[float],
) -> _Finished:
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    stack = extract.stacks[use_mask and True in extract.stacks]
    extract.stacks.clear()
    for channel, scheme in enumerate(normalization_schemes(dataset.channel_names)):
        if scheme == "CTNormalization":
            properties = intensities[str(channel)]
            stack[channel] = CTNormalization(False, properties).run(stack[channel])
    spacing = [extract.spacing[i] for i in _plane_first(extract.axis)]
    shape = _shape_at(extract, target)
    labels = extract.labels
    # of a part there is nothing to resample
    if not extract.is_cut:
        stack = resample_data_or_seg_to_shape(
            stack, shape, spacing, [spacing[0], *target], order=3, order_z=0, force_separate_z=None
        )
        if labels is not None and labels.shape[2:] != shape[1:]:
            # in-plane only, so the spacing across slices plays no part
            labels = resample_data_or_seg_to_shape(
                labels,
                (labels.shape[1], *shape[1:]),
                (1, 1, 1),
                (1, 1, 1),
                is_seg=True,
                order=1,
                order_z=0,
                force_separate_z=True,
            )
    rows, columns = _middle(stack.shape[2:])
    kept = [extract.positions.index(t) for t in extract.taken]
    # copies, which do not hold on to the rest
    return _Finished(
        torch.from_numpy(np.array(stack[:, kept][..., rows, columns].transpose(1, 0, 2, 3), np.float32, order="C")),
        (shape[1], shape[2]),
        None if labels is None else np.array(labels[0][..., rows, columns], np.int16),
    )


def _shape_at(extract: _Extract, target: Sequence[float]) -> tuple[int, int, int]:
    """Shape of a case's slices at an in-plane spacing."""
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    spacing = [extract.spacing[i] for i in _plane_first(extract.axis)]
    slices, rows, columns = compute_new_shape((len(extract.positions), *extract.plane), spacing, [spacing[0], *target])
    return int(slices), int(rows), int(columns)


def _middle(plane: Sequence[int]) -> tuple[slice, slice]:
    """The largest part of a plane that can be used: the common size is even, so the middle of it is the middle of the plane."""
    rows, columns = (slice(max(side // 2 - MAX_SIDE // 2, 0), side // 2 + MAX_SIDE // 2) for side in plane)
    return rows, columns


def _labels_to_size(labels: np.ndarray, size: tuple[int, int]) -> Tensor:
    from monai.transforms import ResizeWithPadOrCrop

    fitted = ResizeWithPadOrCrop(size, mode="constant", constant_values=-1)(labels)
    return torch.as_tensor(fitted.as_tensor()).to(torch.int16)


def _common_size(planes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    medians = [float(np.median([p[axis] for p in planes])) for axis in (0, 1)]
    height, width = (int(np.clip(np.ceil(m / SIDE_MULTIPLE) * SIDE_MULTIPLE, MIN_SIDE, MAX_SIDE)) for m in medians)
    return height, width


def _to_size(images: Tensor, size: tuple[int, int]) -> Tensor:
    from monai.transforms import ResizeWithPadOrCrop

    # mirrored at the border: a frame of zeros would tell patients apart by the size of their volumes
    fitted = ResizeWithPadOrCrop(size, mode="symmetric")(images.flatten(0, 1))
    return torch.as_tensor(fitted.as_tensor()).reshape(*images.shape[:2], *size)

"""Validation cases as pictures: one slice of each, with the truth, the prediction and where they differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.cases import Case, orientation, read_case, read_with_nnunet, refuse_endless_file
from mtl_nnunet.errors import UserError
from mtl_nnunet.pictures import (
    CLASSES,
    SHOWN_RANGE,
    Tile,
    are_colours,
    edges_of,
    hexadecimal,
    in_pixels,
    in_three_channels,
    with_some_width,
)

# pixels of a picture's longer side: smaller slices are enlarged, larger ones shrunk
SHORTEST, LONGEST = 320, 480
OUTLINE = 2
FILLED, OUTLINED, MARKED = 0.25, 1.0, 0.75
# a part of the slice is shown enlarged where what is segmented fits into this share of it
CLOSE_UP = 0.6
MARGIN = 0.35
# colours that people who see no red or no green can tell apart
MISSED, FALSE, CONFUSED = (86, 180, 233), (213, 94, 0), (240, 228, 66)
IGNORED = (150, 150, 150)


@dataclass(frozen=True)
class Look:
    """What is the same for every case that is shown.

    Attributes:
        reader: nnU-Net's name of the reader.
        axis: Slicing axis of (z, y, x).
        channel_names: Of the dataset.
        labels: dataset.json's: names to a label or a list of labels.
        clipped: What nnU-Net clips each channel to, for CT; None for others.
    """

    reader: str
    axis: int
    channel_names: tuple[str, ...]
    labels: dict[str, Any]
    clipped: tuple[tuple[float, float] | None, ...]

    @property
    def ignore_label(self) -> int | None:
        """Of voxels that are not annotated."""
        found = self.labels.get("ignore")
        return found if isinstance(found, int) else None

    @property
    def classes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names of labels and regions but background and ignore label, and the labels that each is of."""
        found = []
        for name, label in self.labels.items():
            values = tuple(label) if isinstance(label, (list, tuple)) else (label,)
            if name != "ignore" and values != (0,):
                found.append((str(name), values))
        return found

    @property
    def has_regions(self) -> bool:
        """Whether a voxel can be of several classes."""
        return any(len(values) > 1 for _, values in self.classes)


@dataclass(frozen=True)
class CasePicture:
    """A slice of a validation case.

    Attributes:
        case: Name.
        position: Index of the slice along the slicing axis.
        num_slices: How many there are.
        orientation: Where x, y and z point to, or None.
        rule: Why this slice.
        rows: Pictures in rows: of one channel image, truth, prediction and differences in one; of several the images above.
        pixels: Rows and columns of the slice.
        spacing: Of a row and of a column in mm.
        is_close_up: Whether truth, prediction and differences show a part of the slice.
        labels: Which are on it, in the truth or in the prediction.
    """

    case: str
    position: int
    num_slices: int
    orientation: str | None
    rule: str
    rows: tuple[tuple[Tile, ...], ...]
    pixels: tuple[int, int]
    spacing: tuple[float, float]
    is_close_up: bool
    labels: frozenset[int]


def look_of(plans: Mapping[str, Any], dataset: Mapping[str, Any]) -> Look:
    """What a model's plans and dataset.json say about how its cases are to be shown.

    Raises:
        UserError: They are not what nnU-Net v2 writes.
    """
    try:
        named = dataset.get("channel_names") or dataset["modality"]
        names = tuple(str(named[k]) for k in sorted(named, key=int))
        intensities = plans.get("foreground_intensity_properties_per_channel", {})
        clipped = tuple(
            (float(about["percentile_00_5"]), float(about["percentile_99_5"]))
            if name.lower() == "ct" and (about := intensities.get(str(c)))
            else None
            for c, name in enumerate(names)
        )
        return Look(
            str(plans["image_reader_writer"]),
            int(plans["transpose_forward"][0]),
            names,
            dict(dataset["labels"]),
            clipped,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"the plans or the dataset.json of the model are not what nnU-Net v2 writes ({error!r})."
        ) from error


def picture_of(case: Case, prediction: Path, look: Look) -> CasePicture:
    """The slice with the largest truth of a case, as nnU-Net's reader reads it; nothing is turned.

    Args:
        case: With its image and its truth.
        prediction: nnU-Net's segmentation of it.
        look: Of the dataset.

    Raises:
        UserError: A file that is missing or cannot be read, or files that are not on one grid.
    """
    if not prediction.is_file():
        raise UserError(f"{prediction} is gone. Validate again: nnUNetv2_train with --val.")
    for file in (*case.images, *filter(None, [case.label])):
        if not file.is_file():
            raise UserError(f"{file} does not exist.")
    image = read_case(case, look.reader, len(look.channel_names))
    refuse_endless_file(prediction)
    (predicted,) = read_with_nnunet((prediction,), look.reader)[0]
    assert image.label is not None
    if predicted.shape != image.label.shape:
        raise UserError(
            f"{prediction} is of another shape ({predicted.shape}) than the truth ({image.label.shape}; z, y, x)."
        )
    truth, predicted = (np.moveaxis(v, look.axis, 0) for v in (image.label, predicted.astype(image.label.dtype)))
    position, rule = slice_to_show(truth, predicted, look.ignore_label)
    ranges = _ranges(image.voxels, look)
    channels = np.moveaxis(image.voxels, look.axis + 1, 1)[:, position]
    spacing = [s for i, s in enumerate(image.spacing) if i != look.axis]
    letters = orientation(case, look.reader)
    rows, is_close_up = _tiles(
        channels,
        ranges,
        truth[position],
        predicted[position],
        (spacing[0], spacing[1]),
        edges_of(look.axis, letters),
        look,
    )
    return CasePicture(
        case=case.name,
        position=position,
        num_slices=len(truth),
        orientation=letters,
        rule=rule,
        rows=rows,
        pixels=(channels.shape[1], channels.shape[2]),
        spacing=(spacing[0], spacing[1]),
        is_close_up=is_close_up,
        labels=frozenset(int(v) for v in np.unique(np.stack([truth[position], predicted[position]]))),
    )


def slice_to_show(truth: np.ndarray, prediction: np.ndarray, ignore_label: int | None) -> tuple[int, str]:
    """The slice with the most foreground of the truth, else of the prediction, else the middle one; of equals the first.

    Args:
        truth: Labels, the slicing axis first.
        prediction: Labels of the same shape.
        ignore_label: That is no foreground.

    Examples:
        >>> truth = np.array([[0, 0, 0], [1, 1, 0], [9, 9, 9]])
        >>> slice_to_show(truth, truth, 9)
        (1, 'the most foreground in the truth')
        >>> slice_to_show(0 * truth, truth // 9, None)
        (2, 'the most foreground in the prediction, since the truth has none')
    """
    for labels, rule in (
        (truth, "the most foreground in the truth"),
        (prediction, "the most foreground in the prediction, since the truth has none"),
    ):
        areas = ((labels > 0) & (labels != ignore_label)).reshape(len(labels), -1).sum(1)
        if areas.any():
            return int(areas.argmax()), rule
    return len(truth) // 2, "the middle one, since there is no foreground"


def class_colours(look: Look, labels: Collection[int]) -> list[tuple[str, str]]:
    """Names of the classes that labels are of, with their colours in hexadecimal; of more than eight classes, some share one."""
    return [
        (name, hexadecimal(CLASSES[i % len(CLASSES)]))
        for i, (name, values) in enumerate(look.classes)
        if not set(values).isdisjoint(labels)
    ]


def difference_colours(look: Look) -> list[tuple[str, str]]:
    """What the differences of truth and prediction are called, with their colours."""
    found = [("missed", MISSED), ("false", FALSE)]
    if len({v for _, values in look.classes for v in values}) > 1:
        found.append(("wrong class", CONFUSED))
    if look.ignore_label is not None:
        found.append(("not annotated", IGNORED))
    return [(name, hexadecimal(colour)) for name, colour in found]


def _tiles(
    channels: np.ndarray,
    ranges: Sequence[tuple[float, float]],
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, float],
    edges: str,
    look: Look,
) -> tuple[tuple[tuple[Tile, ...], ...], bool]:
    shown = in_pixels(channels, ranges, are_colours(look.channel_names))
    marked = [labels * (labels != look.ignore_label) > 0 for labels in (truth, prediction)]
    part = close_up(marked[0] | marked[1], spacing)
    frame = None
    if part is not None:
        high, wide = truth.shape
        frame = (
            part[0].start / high,
            part[1].start / wide,
            (part[0].stop - part[0].start) / high,
            (part[1].stop - part[1].start) / wide,
        )
    names = ["image"] if len(shown) == 1 else [f"image, {look.channel_names[c]}" for c in range(len(shown))]
    images = tuple(
        Tile(name, _scaled(pixels, spacing), edges if i == 0 else "", frame)
        for i, (name, pixels) in enumerate(zip(names, shown, strict=True))
    )
    cut = part or (slice(None), slice(None))
    ground = in_three_channels(_scaled(shown[0][cut], spacing))
    true, predicted = (_resized(labels[cut].astype(np.int32), ground.shape[:2]) for labels in (truth, prediction))
    overlaid = (
        Tile("truth", _outlined(ground, true, look)),
        Tile(
            "prediction",
            _outlined(
                ground,
                np.where(true == look.ignore_label, 0, predicted) if look.ignore_label is not None else predicted,
                look,
            ),
        ),
        Tile("differences", _differences(ground, true, predicted, look)),
    )
    return ((images + overlaid,) if len(images) == 1 else (images, overlaid)), part is not None


def close_up(foreground: np.ndarray, spacing: tuple[float, float]) -> tuple[slice, slice] | None:
    """The part of a slice that holds all foreground with a margin, of the slice's own proportions; None where that is most of it.

    Args:
        foreground: Shape (H, W), bool.
        spacing: Of a row and of a column in mm.

    Examples:
        >>> foreground = np.zeros((100, 60), bool)
        >>> foreground[40:50, 0:5] = True
        >>> close_up(foreground, (1.0, 1.0))
        (slice(36, 53, None), slice(0, 10, None))
        >>> close_up(~foreground, (1.0, 1.0)) is None
        True
    """
    if not foreground.any():
        return None
    ends = [np.flatnonzero(foreground.any(1 - i))[[0, -1]] for i in (0, 1)]
    # in shares of the slice, so that the part has its proportions
    share = max((last + 1 - first) / size for (first, last), size in zip(ends, foreground.shape, strict=True)) * (
        1 + 2 * MARGIN
    )
    if share > CLOSE_UP:
        return None
    found = []
    for (first, last), size in zip(ends, foreground.shape, strict=True):
        length = max(1, min(size, round(share * size)))
        start = min(max(0, (int(first) + int(last) + 1 - length) // 2), size - length)
        found.append(slice(start, start + length))
    return found[0], found[1]


def _ranges(voxels: np.ndarray, look: Look) -> list[tuple[float, float]]:
    """What is black and what is white in each channel: of CT what nnU-Net clips to, of photographs all, else percentiles of the case."""
    if are_colours(look.channel_names):
        # a photograph as it is: a range of its own for each channel or picture would change its colours
        return [(0.0, next((top for top in (1.0, 255.0) if voxels.max() <= top), float(voxels.max())))] * len(voxels)
    return [
        with_some_width(*(clipped or np.percentile(channel, SHOWN_RANGE)))
        for channel, clipped in zip(voxels, look.clipped, strict=True)
    ]


def _scaled(pixels: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """With square pixels, as far as whole ones go, and the longer side of the size of a picture."""
    from PIL import Image

    height, width = (n * s for n, s in zip(pixels.shape[:2], spacing, strict=True))
    scale = min(max(SHORTEST, *pixels.shape[:2]), LONGEST) / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    # enlarged pixels stay pixels
    how = (
        Image.Resampling.NEAREST if size[0] >= pixels.shape[0] and size[1] >= pixels.shape[1] else Image.Resampling.BOX
    )
    found: np.ndarray = np.asarray(Image.fromarray(pixels).resize(size[::-1], how))
    return found


def _resized(labels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    found: np.ndarray = np.asarray(Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST))
    return found


def _outlined(ground: np.ndarray, labels: np.ndarray, look: Look) -> np.ndarray:
    from scipy.ndimage import binary_erosion

    found = ground.astype(np.float64)
    if look.ignore_label is not None:
        _blend(found, labels == look.ignore_label, IGNORED, 0.5)
    outlines = []
    for i, (_, values) in enumerate(look.classes):
        inside = np.isin(labels, values)
        colour = CLASSES[i % len(CLASSES)]
        # regions lie in one another: filled, their colours would mix
        if not look.has_regions:
            _blend(found, inside, colour, FILLED)
        outlines.append((inside & ~binary_erosion(inside, iterations=OUTLINE, border_value=True), colour))
    for outline, colour in outlines:
        _blend(found, outline, colour, OUTLINED)
    rounded: np.ndarray = found.round().astype(np.uint8)
    return rounded


def _differences(ground: np.ndarray, truth: np.ndarray, prediction: np.ndarray, look: Look) -> np.ndarray:
    found = 0.6 * ground.astype(np.float64)
    counted = truth != look.ignore_label if look.ignore_label is not None else np.ones_like(truth, dtype=bool)
    is_true, is_predicted = truth > 0, prediction > 0
    _blend(found, counted & is_true & ~is_predicted, MISSED, MARKED)
    _blend(found, counted & ~is_true & is_predicted, FALSE, MARKED)
    _blend(found, counted & is_true & is_predicted & (truth != prediction), CONFUSED, MARKED)
    _blend(found, ~counted, IGNORED, 0.5)
    rounded: np.ndarray = found.round().astype(np.uint8)
    return rounded


def _blend(ground: np.ndarray, where: np.ndarray, colour: tuple[int, int, int], share: float) -> None:
    ground[where] = (1 - share) * ground[where] + share * np.array(colour)

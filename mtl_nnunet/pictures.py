"""What the encoder was given, as pictures: a few slices, their views, and which way up they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mtl_nnunet.scores import Score
from mtl_nnunet.slices import Slices
from mtl_nnunet.views import views_of_some

NUM_SAMPLES = 4
# beyond these a page grows heavy, and nothing more is seen
LONGEST_SIDE, MOST_CHANNELS, MOST_VIEWS = 192, 4, 3
# values that are looked at for percentiles: every k-th row and column of larger slices
MOST_VALUES = 500_000
SHOWN_RANGE = (0.5, 99.5)
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}
# nnU-Net takes the last for all three; others name each
COLOURS = (("r", "g", "b"), ("red", "green", "blue"), ("rgb_to_0_1",) * 3)
CLASSES = (
    *((242, 177, 52), (47, 127, 193), (200, 71, 43), (76, 159, 112), (141, 95, 176)),
    *((231, 110, 181), (122, 199, 207), (163, 177, 56)),
)
CLASS_COLOURS = ("yellow", "blue", "red", "green", "violet", "pink", "pale blue", "olive")


@dataclass(frozen=True)
class Tile:
    """A picture of a slice or of one of its views.

    Attributes:
        caption: What it is.
        pixels: Shape (H, W) or (H, W, 3), uint8.
        edges: Which side of the patient lies at the top, bottom, left and right, a letter each; empty where that is not known.
        frame: Where the image itself ends and its mirror image begins: top, left, height and width as shares of the picture.
    """

    caption: str
    pixels: np.ndarray
    edges: str = ""
    frame: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Sample:
    """A slice that is shown: where it is from, which way up, and what the encoder was given of it.

    ``position`` counts from 0 along the slicing axis of the file, not of the volume as cropped.
    """

    case: str
    patient: str
    position: int
    why: str
    orientation: str | None
    rows: tuple[tuple[Tile, ...], ...]
    mean: float
    std: float
    low: float
    high: float


def sample_pictures(
    slices: Slices,
    score: Score,
    channel_names: Sequence[str],
    ranges: Sequence[tuple[float, float]],
    orientations: Mapping[str, str | None],
    seed: int,
) -> list[Sample]:
    """A few slices of different cases and the views of them that a score reads.

    Args:
        slices: Of which.
        score: Whose views.
        channel_names: Of the dataset.
        ranges: Of each channel, as ``shown_ranges`` says.
        orientations: Of each case, as ``mtl_nnunet.cases.orientation`` says.
        seed: Seed of the run, by which the views are those that were scored.
    """
    places = _shown_places(slices)
    num_views = min(score.num_views, MOST_VIEWS) if score.views != "plain" else 0
    views = (
        views_of_some(slices.images, list(places), score.views, num_views, seed, score.strength).numpy()
        if num_views
        else None
    )
    used = {c.name: c for c in slices.used}
    samples = []
    for k, (place, why) in enumerate(places.items()):
        image, case = slices.images[place].numpy(), used[slices.cases[place]]
        edges = edges_of(slices.axis, orientations[case.name])
        frame = _frame(case.plane, image.shape[1:])
        kinds = {"slice": image} | ({} if views is None else {f"view {v + 1}": views[v, k] for v in range(num_views)})
        by_kind = {what: _tiles(what, pixels, ranges, are_colours(channel_names)) for what, pixels in kinds.items()}
        by_kind["slice"] = [replace(t, edges=edges, frame=frame) for t in by_kind["slice"]]
        if slices.labels is not None:
            by_kind["slice and label"] = [_labelled(t, slices.labels[place].numpy()) for t in by_kind["slice"]]
        samples.append(
            Sample(
                case.name,
                case.patient,
                case.first + slices.positions[place],
                why,
                orientations[case.name],
                # a row a channel
                tuple(zip(*by_kind.values(), strict=True)),
                float(image.mean()),
                float(image.std()),
                float(image.min()),
                float(image.max()),
            )
        )
    return samples


def _shown_places(slices: Slices) -> dict[int, str]:
    """Middle slices of cases spread over all, and the slice least like the others, with why each is shown."""
    by_case: dict[str, list[int]] = {}
    for i, case in enumerate(slices.cases):
        by_case.setdefault(case, []).append(i)
    owners = list(by_case.values())
    flat = slices.images.flatten(1)
    moments = np.stack([flat.mean(1).numpy(), flat.std(1).numpy()])
    away = np.abs(moments - np.median(moments, axis=1, keepdims=True))
    # in units of what is usual, so that neither of the two decides alone
    away /= np.maximum(np.median(away, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    unusual = int(away.max(0).argmax())
    spread = np.unique(np.linspace(0, len(owners) - 1, NUM_SAMPLES - 1).round().astype(int))
    places = {owners[i][len(owners[i]) // 2]: "from the middle of what was read of its case" for i in spread}
    places.pop(unusual, None)
    return {**places, unusual: "the one whose mean and deviation are least like those of the others"}


def are_colours(channel_names: Sequence[str]) -> bool:
    """Whether the channels are those of a photograph.

    Examples:
        >>> are_colours(["R", "G", "B"]), are_colours(["T1", "T2", "FLAIR"])
        (True, False)
    """
    return tuple(name.lower() for name in channel_names) in COLOURS


def shown_ranges(slices: Slices) -> list[tuple[float, float]]:
    """What is black and what is white, the same in every picture of a channel."""
    return [with_some_width(*np.percentile(values, SHOWN_RANGE)) for values in values_looked_at(slices)]


def with_some_width(low: float, high: float) -> tuple[float, float]:
    """A range from black to white, also where all values are one.

    Examples:
        >>> with_some_width(0, 3), with_some_width(2, 2)
        ((0.0, 3.0), (2.0, 3.0))
    """
    return float(low), float(high if high > low else low + 1)


def values_looked_at(slices: Slices) -> list[np.ndarray]:
    """Normalised values of each channel, as many as percentiles need."""
    images = slices.images.numpy()
    step = int(np.ceil(np.sqrt(images[:, 0].size / MOST_VALUES)))
    return [images[:, c, ::step, ::step].ravel() for c in range(images.shape[1])]


def in_pixels(image: np.ndarray, ranges: Sequence[tuple[float, float]], in_colour: bool) -> list[np.ndarray]:
    """An image (C, H, W) as uint8: a photograph as one (H, W, 3), else the first channels, each (H, W).

    Args:
        image: Values.
        ranges: What is black and what is white in each channel.
        in_colour: As ``are_colours`` says.
    """
    grey = [
        (np.clip((channel - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
        for channel, (low, high) in zip(image, ranges, strict=True)
    ]
    return [np.stack(grey, axis=-1)] if in_colour else grey[:MOST_CHANNELS]


def in_three_channels(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3) as (H, W, 3), for colours to be laid on."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def hexadecimal(colour: tuple[int, int, int]) -> str:
    """A colour as figures and pages name it.

    Examples:
        >>> hexadecimal((242, 177, 52))
        '#f2b134'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _tiles(what: str, image: np.ndarray, ranges: Sequence[tuple[float, float]], in_colour: bool) -> list[Tile]:
    shown = in_pixels(image, ranges, in_colour)
    alone = in_colour or len(image) == 1
    return [Tile(what if alone else f"{what}, channel {c}", _fitted(p)) for c, p in enumerate(shown)]


def _labelled(tile: Tile, labels: np.ndarray) -> Tile:
    from PIL import Image

    height, width = tile.pixels.shape[:2]
    colours = np.zeros((*labels.shape, 3), dtype=np.uint8)
    for value in np.unique(labels[labels > 0]):
        colours[labels == value] = CLASSES[(int(value) - 1) % len(CLASSES)]
    small = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST))
    ground = in_three_channels(tile.pixels)
    mixed = np.where(small.any(-1, keepdims=True), 0.5 * ground + 0.5 * small, ground)
    return replace(
        tile, caption=tile.caption.replace("slice", "slice and label", 1), pixels=mixed.round().astype(np.uint8)
    )


def _fitted(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width = pixels.shape[:2]
    shrunk = LONGEST_SIDE / max(height, width)
    if shrunk >= 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((round(width * shrunk), round(height * shrunk))))


def edges_of(axis: int, orientation: str | None) -> str:
    """Which side of the patient lies at the top, bottom, left and right of a slice.

    Args:
        axis: Slicing axis of (z, y, x); the others are rows and columns, in this order, rows downwards.
        orientation: Where x, y and z point to.

    Examples:
        >>> edges_of(0, "LPS"), edges_of(2, "RAS"), edges_of(0, None)
        ('APRL', 'ISPA', '')
    """
    if orientation is None:
        return ""
    rows, columns = (orientation[2 - i] for i in range(3) if i != axis)
    return f"{OPPOSITE[rows]}{rows}{OPPOSITE[columns]}{columns}"


def _frame(plane: tuple[int, int], size: Sequence[int]) -> tuple[float, float, float, float] | None:
    (top, height), (left, width) = (
        (max(0, (whole - own) // 2) / whole, min(own, whole) / whole) for own, whole in zip(plane, size, strict=True)
    )
    return None if height == width == 1 else (top, left, height, width)

"""A selection as one page to look at: ``report.html`` and its figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_nnunet.cases import Dataset, orientation
from mtl_nnunet.figures import (
    Tile,
    draw_expected_loss,
    draw_levels,
    draw_ranking,
    draw_slices,
    for_page,
    write_figure,
)
from mtl_nnunet.files import write_text
from mtl_nnunet.ranking import Ranking
from mtl_nnunet.report import budget_text, comparison_text, names_of, notes_of, verdict_text
from mtl_nnunet.slices import Slices
from mtl_nnunet.views import views_of_some

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = Path(__file__).with_name("report.html.jinja")
NUM_SAMPLES = 4
# beyond these a page grows heavy, and nothing more is seen
LONGEST_SIDE, MOST_CHANNELS, MOST_VIEWS = 256, 4, 3
# values that are looked at for percentiles: every k-th row and column of larger slices
MOST_VALUES = 4_000_000
SHOWN_RANGE = (0.5, 99.5)
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}
SIDES = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}
PLANES = {"L": "sagittal", "R": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
CLASSES = ((242, 177, 52), (47, 127, 193), (200, 71, 43), (76, 159, 112), (141, 95, 176))


@dataclass(frozen=True)
class Cost:
    """What a selection cost.

    Attributes:
        seconds_reading: Reading and preparing the slices.
        seconds_scoring: Reading checkpoints, views, forwards, scores and bootstrap.
        forwards: How many views of slices went through an encoder.
        all_forwards: How many that are where nothing was kept from an earlier time and nothing went out of a race.
        raced: Whether checkpoints could go out early.
        device: Where the encoders ran.
    """

    seconds_reading: float
    seconds_scoring: float
    forwards: int
    all_forwards: int
    raced: bool
    device: str


@dataclass(frozen=True)
class Sample:
    """A slice that is shown: where it is from, which way up, and what the encoder was given of it."""

    case: str
    patient: str
    position: int
    why: str
    orientation: str | None
    tiles: tuple[Tile, ...]
    mean: float
    std: float
    low: float
    high: float


def write_report(
    folder: Path,
    content: dict[str, Any],
    rankings: Sequence[Ranking],
    dataset: Dataset,
    slices: Slices,
    warnings: Sequence[str],
    commands: Sequence[str],
    cost: Cost | None,
) -> None:
    """Write ``report.html``, which needs no other file, and its figures as PNG and SVG.

    Args:
        folder: Where to.
        content: Of ``selection.json``.
        rankings: The first one has the choice.
        dataset: The cases that could be sampled.
        slices: What was read of them.
        warnings: In words.
        commands: What to type next.
        cost: Of the scoring, where it was measured.
    """
    ranking = rankings[0]
    orientations = _orientations(dataset, slices)
    samples = _samples(ranking, slices, orientations, content["seed"])
    drawn = {
        "ranking": draw_ranking(ranking, dataset.name),
        "expected_loss": draw_expected_loss(ranking),
        "levels": draw_levels(ranking),
    }
    figures = {
        name: None if figure is None else _in_page(write_figure(figure, folder, name), name, ranking)
        for name, figure in drawn.items()
    }
    write_figure(draw_slices([(f"{s.case}, slice {s.position}", s.tiles) for s in samples]), folder, "slices")
    told = ranking.expectation
    text = _template().render(
        content=content,
        ranking=ranking,
        rows=_rows(ranking),
        levels=sorted(ranking.random.levels),
        verdict=verdict_text(ranking),
        told=None if told is None else told.text,
        warnings=warnings,
        compared=_lines(comparison_text(ranking)),
        budget=_lines(budget_text(ranking)),
        others=list(zip(names_of(rankings[1:]), rankings[1:], strict=True)),
        figures=figures,
        samples=samples,
        shown=_shown_ranges(slices),
        channels=_channels(dataset, slices),
        spacings=_ranges([c.spacing for c in slices.used]),
        plane=_plane(slices, orientations),
        orientations=_counted(orientations.values()),
        cases=[(c, orientations[c.name]) for c in slices.used],
        dataset=dataset,
        slices=slices,
        commands=commands,
        cost=cost,
        files=sorted(f.name for f in folder.iterdir()),
        image=_image,
        sides=SIDES,
        planes=[(min(c.plane[i] for c in slices.used), max(c.plane[i] for c in slices.used)) for i in (0, 1)],
    )
    write_text(folder / "report.html", text)


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    # names of datasets, cases and files come from outside: all is escaped
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value, form=".4f": (
        "–" if value is None or np.isnan(value) else format(value, form)
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _in_page(svg: str, name: str, ranking: Ranking) -> Markup:
    from markupsafe import Markup

    score = ranking.score.name
    rows = ranking.checkpoints
    title, description = {
        "ranking": (
            f"{score} score of each checkpoint",
            f"{len(rows)} checkpoints from {ranking.chosen.label} (chosen, {ranking.chosen.value:.4f}) to the best score "
            f"{rows[ranking.best].label} ({rows[ranking.best].value:.4f}); random initialisation {ranking.random.value:.4f}. "
            "The table below has every number.",
        ),
        "expected_loss": (
            "Dice points that each checkpoint is expected to lose",
            f"{verdict_text(ranking)} The table below has every number.",
        ),
        "levels": (f"{score} score at each level of the encoder", "The table below has every number."),
    }[name]
    # made by matplotlib and ElementTree, which escape what they are given
    return Markup(for_page(svg, name, title, description))


def _rows(ranking: Ranking) -> list[dict[str, Any]]:
    told = ranking.expectation
    found = []
    for i, row in enumerate((*ranking.checkpoints, ranking.random)):
        known = told is not None and row.checkpoint is not None and np.isfinite(told.expected_loss[i])
        found.append(
            {
                "row": row,
                "file": row.checkpoint.path.name if row.checkpoint else "",
                "accuracy": row.checkpoint.logged_accuracy if row.checkpoint else None,
                "loss": [100 * float(v[i]) for v in (told.expected_loss, told.low, told.high)]
                if known and told
                else None,
                "notes": ", ".join(n.removeprefix("<- ") for n in notes_of(ranking, row)),
                "chosen": row is ranking.chosen,
                "levels": [row.levels.get(level) for level in sorted(ranking.random.levels)],
            }
        )
    return found


def _lines(text: str) -> list[str]:
    return text.splitlines()


def _orientations(dataset: Dataset, slices: Slices) -> dict[str, str | None]:
    used = {c.name for c in slices.used}
    return {c.name: orientation(c, dataset.reader) for c in dataset.cases if c.name in used}


def _counted(values: Iterable[str | None]) -> list[tuple[str | None, int]]:
    found: dict[str | None, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return sorted(found.items(), key=lambda item: -item[1])


def _plane(slices: Slices, orientations: dict[str, str | None]) -> str | None:
    planes = {PLANES[letters[2 - slices.axis]] if letters else None for letters in orientations.values()}
    return planes.pop() if len(planes) == 1 else None


def edges_of(axis: int, orientation: str | None) -> str:
    """Which side of the patient lies at the top, bottom, left and right of a slice.

    Args:
        axis: Slicing axis of (z, y, x); the others are rows and columns, in this order, rows downwards.
        orientation: Where x, y and z point to.

    Example:
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


def _samples(ranking: Ranking, slices: Slices, orientations: dict[str, str | None], seed: int) -> list[Sample]:
    score = ranking.score
    places = _shown_places(slices)
    num_views = min(score.num_views, MOST_VIEWS) if score.views != "plain" else 0
    views = (
        views_of_some(slices.images, list(places), score.views, num_views, seed, score.strength).numpy()
        if num_views
        else None
    )
    ranges = _shown_ranges(slices)
    used = {c.name: c for c in slices.used}
    samples = []
    for k, (place, why) in enumerate(places.items()):
        image, case = slices.images[place].numpy(), used[slices.cases[place]]
        edges = edges_of(slices.axis, orientations[case.name])
        frame = _frame(case.plane, image.shape[1:])
        tiles = [replace(t, edges=edges, frame=frame) for t in _tiles("slice", image, ranges, slices)]
        if slices.labels is not None:
            tiles.append(_labelled(tiles[0], slices.labels[place].numpy()))
        for v in range(num_views):
            assert views is not None
            tiles += _tiles(f"view {v + 1}", views[v, k], ranges, slices)
        samples.append(
            Sample(
                case.name,
                case.patient,
                slices.positions[place],
                why,
                orientations[case.name],
                tuple(tiles),
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


def _is_colour(slices: Slices) -> bool:
    return slices.images.shape[1] == 3 and set(slices.normalization) == {"RGBTo01Normalization"}


def _shown_ranges(slices: Slices) -> list[tuple[float, float]]:
    """What is black and what is white, the same in every picture of a channel."""
    if _is_colour(slices):
        return [(0.0, 1.0)] * 3
    found = []
    for values in _looked_at(slices):
        low, high = (float(v) for v in np.percentile(values, SHOWN_RANGE))
        found.append((low, high if high > low else low + 1))
    return found


def _looked_at(slices: Slices) -> list[np.ndarray]:
    images = slices.images.numpy()
    step = int(np.ceil(np.sqrt(images[:, 0].size / MOST_VALUES)))
    return [images[:, c, ::step, ::step].ravel() for c in range(images.shape[1])]


def _tiles(what: str, image: np.ndarray, ranges: Sequence[tuple[float, float]], slices: Slices) -> list[Tile]:
    grey = [
        (np.clip((channel - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
        for channel, (low, high) in zip(image, ranges, strict=True)
    ]
    if _is_colour(slices):
        return [Tile(what, _fitted(np.stack(grey, axis=-1)))]
    shown = grey[:MOST_CHANNELS]
    return [Tile(what if len(grey) == 1 else f"{what}, channel {c}", _fitted(g)) for c, g in enumerate(shown)]


def _labelled(tile: Tile, labels: np.ndarray) -> Tile:
    from PIL import Image

    height, width = tile.pixels.shape[:2]
    colours = np.zeros((*labels.shape, 3), dtype=np.uint8)
    for value in np.unique(labels[labels > 0]):
        colours[labels == value] = CLASSES[(int(value) - 1) % len(CLASSES)]
    small = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST))
    ground = tile.pixels if tile.pixels.ndim == 3 else np.repeat(tile.pixels[..., None], 3, axis=2)
    mixed = np.where(small.any(-1, keepdims=True), 0.5 * ground + 0.5 * small, ground)
    return Tile("with label", mixed.round().astype(np.uint8))


def _fitted(pixels: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width = pixels.shape[:2]
    shrunk = LONGEST_SIDE / max(height, width)
    if shrunk >= 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((round(width * shrunk), round(height * shrunk))))


def _image(pixels: np.ndarray) -> str:
    """Pixels as an address that holds the image itself."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _channels(dataset: Dataset, slices: Slices) -> list[dict[str, Any]]:
    found = []
    for c, (name, scheme, values) in enumerate(
        zip(dataset.channel_names, slices.normalization, _looked_at(slices), strict=True)
    ):
        of_file = slices.intensities.get(str(c))
        low, middle, high = (float(v) for v in np.percentile(values, (0.5, 50, 99.5)))
        found.append(
            {
                "name": name,
                "scheme": scheme,
                "values": [float(values.min()), low, middle, high, float(values.max())],
                "mean": float(values.mean(dtype=np.float64)),
                "std": float(values.std(dtype=np.float64)),
                "foreground": of_file,
            }
        )
    return found


def _ranges(spacings: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Smallest, median and largest of each axis (z, y, x)."""
    found = np.percentile(np.array(spacings), (0, 50, 100), axis=0).T
    return [(float(a), float(b), float(c)) for a, b, c in found]

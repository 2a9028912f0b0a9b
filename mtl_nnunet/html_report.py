"""A selection as one page to look at: ``report.html`` and its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_nnunet.cases import Dataset, orientation
from mtl_nnunet.figures import draw_expected_loss, draw_levels, draw_ranking, draw_slices, write_figure
from mtl_nnunet.files import write_text
from mtl_nnunet.page import PLANES, figure_in_page, page_text
from mtl_nnunet.pictures import (
    CLASS_COLOURS,
    LONGEST_SIDE,
    MOST_CHANNELS,
    are_colours,
    sample_pictures,
    shown_ranges,
    values_looked_at,
)
from mtl_nnunet.ranking import Ranking
from mtl_nnunet.report import budget_text, comparison_text, names_of, notes_of, verdict_text
from mtl_nnunet.slices import Slices

if TYPE_CHECKING:
    from markupsafe import Markup

# of the sides of a pixel, up to which a picture with square pixels shows anatomy as it is
SQUARE = 1.02


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
    warnings = [*warnings, *_turned_in_words(orientations)]
    ranges = shown_ranges(slices)
    samples = sample_pictures(slices, ranking.score, dataset.channel_names, ranges, orientations, content["seed"])
    drawn = {
        "ranking": draw_ranking(ranking, dataset.name),
        "expected_loss": draw_expected_loss(ranking),
        "levels": draw_levels(ranking),
    }
    figures = {
        name: None if figure is None else _in_page(write_figure(figure, folder, name), name, ranking)
        for name, figure in drawn.items()
    }
    pictures = [(f"{s.case}, slice {s.position}", row) for s in samples for row in s.rows]
    write_figure(draw_slices(pictures), folder, "slices")
    told = ranking.expectation
    text = page_text(
        "report.html.jinja",
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
        shown=ranges,
        in_colour=are_colours(dataset.channel_names),
        channels=_channels(dataset, slices),
        spacings=_ranges([c.spacing for c in slices.used]),
        plane=_plane(slices, orientations),
        orientations=Counter(orientations.values()).most_common(),
        cases=[(c, orientations[c.name]) for c in slices.used],
        dataset=dataset,
        slices=slices,
        commands=commands,
        cost=cost,
        files=sorted(f.name for f in folder.iterdir()),
        shrunk=max(slices.images.shape[2:]) > LONGEST_SIDE,
        stretched=max(slices.spacing) / min(slices.spacing) > SQUARE,
        unshown=0 if are_colours(dataset.channel_names) else max(0, len(dataset.channel_names) - MOST_CHANNELS),
        label_key=_label_key(slices),
        intervals=any(not np.isnan(c.low) for c in ranking.checkpoints),
        counted_as_patients=all(c.patient == c.name for c in dataset.cases),
        planes=[(min(c.plane[i] for c in slices.used), max(c.plane[i] for c in slices.used)) for i in (0, 1)],
    )
    write_text(folder / "report.html", text)


def _in_page(svg: str, name: str, ranking: Ranking) -> Markup:
    score = ranking.score.name
    rows = ranking.checkpoints
    title, description = {
        "ranking": (
            f"{score} score of each checkpoint",
            f"{len(rows)} checkpoint{'s' if len(rows) > 1 else ''}. Chosen: {ranking.chosen.label}, {ranking.chosen.value:.4f}. Best score: "
            f"{rows[ranking.best].label}, {rows[ranking.best].value:.4f}. Random initialisation: {ranking.random.value:.4f}. "
            "The table below has every number.",
        ),
        "expected_loss": (
            "Dice points that each checkpoint is expected to lose",
            f"{verdict_text(ranking)} The table below has every number.",
        ),
        "levels": (f"{score} score at each level of the encoder", "The table below has every number."),
    }[name]
    return figure_in_page(svg, name, title, description)


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
                # what went out of a race early was not drawn with those that stayed, and one alone is always the best
                "probability": row.probability_of_best_score
                if row.out_after is None and len(ranking.checkpoints) > 1
                else None,
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


def _turned_in_words(orientations: Mapping[str, str | None]) -> list[str]:
    """What is wrong where cases are stored the one this way and the other that way."""
    counted = Counter(letters for letters in orientations.values() if letters)
    if len(counted) < 2:
        return []
    names = ", ".join(f"{letters} in {number}" for letters, number in counted.most_common())
    return [
        f"Cases have several orientations ({names}), and nothing is turned: neither here nor in nnU-Net's training, so slices of one "
        "dataset lie in different ways. Turn the files to one, unless that is meant."
    ]


def _plane(slices: Slices, orientations: dict[str, str | None]) -> str | None:
    planes = {PLANES[letters[2 - slices.axis]] if letters else None for letters in orientations.values()}
    return planes.pop() if len(planes) == 1 else None


def _channels(dataset: Dataset, slices: Slices) -> list[dict[str, Any]]:
    found = []
    for c, (name, scheme, values) in enumerate(
        zip(dataset.channel_names, slices.normalization, values_looked_at(slices), strict=True)
    ):
        of_file = slices.intensities.get(str(c))
        # extremes are of all values: the few that percentiles need miss them
        whole = slices.images[:, c].numpy()
        low, middle, high = (float(v) for v in np.percentile(values, (0.5, 50, 99.5)))
        found.append(
            {
                "name": name,
                "scheme": scheme,
                "values": [float(whole.min()), low, middle, high, float(whole.max())],
                "mean": float(values.mean(dtype=np.float64)),
                "std": float(values.std(dtype=np.float64)),
                "foreground": of_file,
            }
        )
    return found


def _label_key(slices: Slices) -> list[tuple[str, int]]:
    """Colour and value of each label that the slices hold; beyond the last colour they begin anew."""
    if slices.labels is None:
        return []
    found = [int(v) for v in np.unique(slices.labels.numpy()) if v > 0]
    return [(CLASS_COLOURS[(v - 1) % len(CLASS_COLOURS)], v) for v in found]


def _ranges(spacings: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Smallest, median and largest of each axis (z, y, x)."""
    found = np.percentile(np.array(spacings), (0, 50, 100), axis=0).T
    return [(float(a), float(b), float(c)) for a, b, c in found]

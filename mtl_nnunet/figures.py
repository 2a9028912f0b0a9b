"""The figures of a selection: for papers as PNG and SVG, and for the report as SVG that takes the page's colours."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from mtl_nnunet.budget import budgets_of
from mtl_nnunet.checkpoints import ages
from mtl_nnunet.drawing import matplotlib_defaults
from mtl_nnunet.pictures import Tile
from mtl_nnunet.ranking import RankedCheckpoint, Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mtl_nnunet.trainings import Curves

FIGURES = ("ranking", "expected_loss", "levels", "slices")
INK, MUTED, FAINT, PAPER = "#222222", "#666666", "#dddddd", "#ffffff"
BLUE, RED, GREEN = "#1f5a99", "#c8472b", "#2e7d4f"
LEVELS = (BLUE, RED, GREEN, "#8a5a00", "#7b4ea3", "#006d77")
MARKERS = "osD^vP"
# what a page puts in their place; names are of report.html.jinja
PAGE_COLOURS = {
    INK: "currentColor",
    PAPER: "none",
    MUTED: "var(--muted)",
    FAINT: "var(--line)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(LEVELS)},
}
WIDTH = 5.6
LONGEST_NAME = 28
# curves of more epochs are drawn as means of a part of them
MOST_EPOCHS = 100
# learning rates of this ratio do not go on one linear axis
FAR_APART = 3
# of a twentieth larger files, in a third of the time
FAST = {"compress_level": 3}
SVG = "http://www.w3.org/2000/svg"


def draw_ranking(ranking: Ranking, dataset: str) -> Figure:
    """Score over epochs with intervals, the yardstick, and below it the accuracy that the run logged."""
    rows = ranking.checkpoints
    age, unit = _ages(rows)
    logged = [(a, _accuracy(r)) for a, r in zip(age, rows, strict=True)] if unit else []
    logged = [(a, accuracy) for a, accuracy in logged if accuracy is not None]
    name, direction = ranking.score.name, f"{ranking.score.name} ({ranking.score.better} is better)"
    with _style():
        figure, (axes, *below) = _figure(2 if logged else 1, unit, rows)
        # of too few patients there are none
        bars = "" if np.isnan([r.low for r in rows]).all() else ", 95 % interval"
        _points(axes, unit, age, rows, f"{name} score{bars}")
        _mark(axes, unit, age[ranking.choice], ranking.chosen.value, _called(ranking.chosen, unit))
        line, band = (axes.axhline, axes.axhspan) if unit else (axes.axvline, axes.axvspan)
        line(ranking.random.value, color=MUTED, linestyle="--", label="random initialisation")
        if not np.isnan(ranking.random.low):
            band(ranking.random.low, ranking.random.high, color=MUTED, alpha=0.15, linewidth=0)
        figure.suptitle(_short(f"{ranking.encoder} on {dataset}", 56), fontsize=11)
        if unit:
            axes.set_ylabel(direction)
        else:
            axes.set_xlabel(direction)
        for beside in below:
            beside.plot(*zip(*logged, strict=True), color=GREEN, marker="s", markersize=4, linestyle=":")
            beside.set_ylabel("ImageNet\ntop-1 (%)")
        _finish(figure, axes, below[-1] if below else axes, unit)
    return figure


def draw_expected_loss(ranking: Ranking) -> Figure | None:
    """Dice points that starting from each epoch is expected to lose, with 90 % intervals; None where nothing is known."""
    told = ranking.expectation
    if told is None or not np.isfinite(told.expected_loss).all():
        return None
    age, unit = _ages(ranking.checkpoints)
    loss, low, high = (100 * np.asarray(v) for v in (told.expected_loss, told.low, told.high))
    with _style():
        figure, (axes,) = _figure(1, unit, ranking.checkpoints)
        errors = np.maximum(0, [loss - low, high - loss])
        axes.errorbar(age, loss, yerr=errors, color=BLUE, marker="o", capsize=3, label="expected, 90 % interval")
        _mark(axes, unit, age[ranking.choice], loss[ranking.choice], _called(ranking.chosen, unit))
        for cheaper in budgets_of(ranking)[1:]:
            at = age.index(cheaper.epoch)
            axes.plot(
                [age[at]],
                [loss[at]],
                "D",
                markersize=11,
                color=GREEN,
                fillstyle="none",
                zorder=4,
                label=f"cheaper: epoch {cheaper.epoch}",
            )
        axes.set_ylim(bottom=0)
        axes.set_ylabel("expected Dice points lost")
        figure.suptitle(
            f"Against the best of these checkpoints{'' if told.used else ', by the epoch alone'}", fontsize=11
        )
        _finish(figure, axes, axes, unit)
    return figure


def draw_levels(ranking: Ranking) -> Figure | None:
    """The score at each level of the encoder, shallow to deep; None where it reads one level."""
    rows = ranking.checkpoints
    levels = sorted(rows[0].levels)
    if len(levels) < 2:
        return None
    age, unit = _ages(rows)
    with _style():
        figure, (axes,) = _figure(1, unit, rows)
        for i, level in enumerate(levels):
            colour, marker = LEVELS[i % len(LEVELS)], MARKERS[i % len(MARKERS)]
            values = [r.levels.get(level, np.nan) for r in rows]
            along, across = (age, values) if unit else (values, age)
            axes.plot(
                along, across, color=colour, marker=marker, linestyle="-" if unit else "none", label=f"level {level}"
            )
            if level in ranking.random.levels:
                yardstick = axes.axhline if unit else axes.axvline
                at = ranking.random.levels[level]
                yardstick(at, color=colour, linestyle="--", linewidth=0.8)
                # lines differ by their colour alone: at the edge stands the marker of the level
                place = ([1.0], [at], axes.get_yaxis_transform()) if unit else ([at], [1.0], axes.get_xaxis_transform())
                edge = {"color": colour, "marker": marker, "fillstyle": "none", "clip_on": False, "linestyle": "none"}
                axes.plot(*place[:2], transform=place[2], **edge)  # type: ignore[arg-type]
        (axes.set_ylabel if unit else axes.set_xlabel)(f"{ranking.score.name} ({ranking.score.better} is better)")
        figure.suptitle("Dashed: random initialisation at the same level", fontsize=11)
        _finish(figure, axes, axes, unit)
    return figure


def draw_curves(named: Sequence[tuple[str, Curves]], title: str) -> Figure:
    """What nnU-Net logs of each epoch: losses, pseudo Dice and learning rate, a colour a training.

    Args:
        named: At most six, each with what to call it; the first one is drawn on top.
        title: Of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, NullLocator

    with _style():
        figure = Figure(figsize=(WIDTH, 6.4 + 0.25 * len(named)), layout="constrained", facecolor=PAPER)
        FigureCanvasAgg(figure)
        losses, dice, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.3])
        dashed: dict[str, Any] = {"linestyle": (0, (3, 1.5))}
        smoothing = smoothing_of([curves.num_epochs for _, curves in named])
        for i, (_, curves) in reversed(list(enumerate(named))):
            epochs = np.arange(curves.num_epochs)
            # a single epoch makes no line
            look: dict[str, Any] = {"color": LEVELS[i], "marker": MARKERS[i] if len(epochs) == 1 else None}
            for values, how in ((curves.train_loss, {}), (curves.val_loss, dashed)):
                if smoothing > 1:
                    losses.plot(epochs, values, linewidth=0.6, alpha=0.25, zorder=1.5, **look)
                losses.plot(epochs, _smoothed(values, smoothing), linewidth=1.6, **look, **how)
            dice.plot(epochs, curves.pseudo_dice, linewidth=0.8, alpha=0.4, zorder=1.5, **look)
            dice.plot(epochs, curves.ema, linewidth=2.2, **look)
            rate.plot(epochs, curves.learning_rate, linewidth=1.6, **look)
        averaged, single = {"linewidth": 2.2}, {"linewidth": 0.8, "alpha": 0.5}
        for axes, label, place, kinds in (
            (losses, "loss", "upper right", {"training": {}, "validation": dashed}),
            (dice, "pseudo Dice", "lower right", {"moving average": averaged, "epoch": single}),
            (rate, "learning\nrate", None, {}),
        ):
            axes.grid(axis="y", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.set_ylabel(label)
            if place:
                handles = [
                    Line2D([], [], color=MUTED, label=kind, **{"linewidth": 1.6, **how}) for kind, how in kinds.items()
                ]
                axes.legend(handles=handles, loc=place, frameon=False, fontsize=9, ncols=2)
        peaks = [float(np.nanmax(c.learning_rate)) for _, c in named if np.isfinite(c.learning_rate).any()]
        if peaks and max(peaks) > FAR_APART * min(peaks) > 0:
            rate.set_yscale("log")
            # the end of nnU-Net's decay would take most of the axis
            rate.set_ylim(bottom=max(min(peaks) / 100, rate.get_ylim()[0]))
            # without exponents, which would be formulas
            rate.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
            rate.yaxis.set_minor_locator(NullLocator())
        else:
            rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        rate.set_xlabel("epoch")
        rate.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        figure.suptitle(_short(title, 56), fontsize=11)
        handles = [
            Line2D([], [], color=LEVELS[i], linewidth=2.2, label=_short(name, 60)) for i, (name, _) in enumerate(named)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=1, frameon=False, fontsize=10)
        _lay_out(figure)
    return figure


def smoothing_of(numbers_of_epochs: Sequence[int]) -> int:
    """Of how many epochs a loss is drawn as the mean: one of short trainings, a fiftieth of long ones.

    Examples:
        >>> smoothing_of([20]), smoothing_of([1000, 100])
        (1, 21)
    """
    longest = max(numbers_of_epochs, default=0)
    # odd, so that the mean stands in its middle
    return 1 if longest <= MOST_EPOCHS else longest // 50 // 2 * 2 + 1


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and its neighbours, of fewer at the ends; a value that is not there counts nowhere."""
    known = np.isfinite(values)
    weights = np.ones(width)
    middle = slice(width // 2, width // 2 + len(values))
    number = np.convolve(known, weights)[middle]
    total = np.convolve(np.where(known, values, 0), weights)[middle]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def draw_slices(samples: Sequence[tuple[str, Sequence[Tile]]], legend: Sequence[tuple[str, str]] = ()) -> Figure:
    """Slices and their views, one row a slice.

    Args:
        samples: Name of each slice, and its pictures; sizes may differ.
        legend: Names of colours, below the pictures.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = max(len(tiles) for _, tiles in samples)
    width = max(tile.pixels.shape[1] for _, tiles in samples for tile in tiles)
    # one image and one set of axes: sixteen of them take a second
    name_rows, gap = max(1, round(0.13 * width)), max(1, round(0.03 * width))
    step = width + gap
    whole = columns * step - gap
    tops, bottom = [], 0
    for row, (name, tiles) in enumerate(samples):
        # captions stand above the first row, and above each whose pictures are other ones
        bottom += name_rows * _has_captions(samples, row)
        tops.append(bottom)
        bottom += max(tile.pixels.shape[0] for tile in tiles) + (name_rows if name else gap)
    letter = 0.6 * name_rows
    colours = _in_lines(legend, letter, whole)
    mosaic = np.full((bottom + len(colours) * name_rows, whole, 3), 255, dtype=np.uint8)
    inches = WIDTH / whole
    size = letter * inches * 72
    with _style():
        figure = Figure(figsize=(WIDTH, inches * mosaic.shape[0]), facecolor=PAPER)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for row, (name, tiles) in enumerate(samples):
            top = tops[row]
            lowest = top + max(tile.pixels.shape[0] for tile in tiles)
            axes.text(0, lowest + 0.1 * name_rows, _short(name, 60), fontsize=size, va="top")
            for column, tile in enumerate(tiles):
                left = column * step
                high, wide = tile.pixels.shape[:2]
                shown = tile.pixels if tile.pixels.ndim == 3 else tile.pixels[..., None]
                mosaic[top : top + high, left : left + wide] = shown
                if _has_captions(samples, row):
                    axes.text(left, top - 0.2 * name_rows, tile.caption, fontsize=size)
                if tile.frame is not None:
                    y, x, h, w = tile.frame
                    outline = {"fill": False, "edgecolor": "#ffd24a", "linestyle": ":", "linewidth": 0.8}
                    axes.add_patch(Rectangle((left + x * wide, top + y * high), w * wide, h * high, **outline))  # type: ignore[arg-type]
                places = ((0.5, 0.02), (0.5, 0.98), (0.02, 0.5), (0.98, 0.5))
                anchors = (("center", "top"), ("center", "bottom"), ("left", "center"), ("right", "center"))
                # of a picture whose sides are not known there are none
                sides = zip(tile.edges, places, anchors, strict=True) if tile.edges else ()
                for side, (x, y), (along, across) in sides:
                    box = {"boxstyle": "square,pad=0.1", "facecolor": "black", "edgecolor": "none", "alpha": 0.6}
                    at = (left + x * wide, top + y * high)
                    axes.text(*at, side, fontsize=size, color="#ffd24a", ha=along, va=across, bbox=box)
        for line, entries in enumerate(colours):
            middle = bottom + (line + 0.5) * name_rows
            for x, text, colour in entries:
                axes.add_patch(
                    Rectangle(
                        (x, middle - 0.5 * letter), letter, letter, facecolor=colour, edgecolor=MUTED, linewidth=0.4
                    )
                )
                axes.text(x + 1.5 * letter, middle, text, fontsize=size, va="center")
        extent = (0, mosaic.shape[1], mosaic.shape[0], 0)
        axes.imshow(mosaic, interpolation="none", aspect="auto", extent=extent)
    return figure


def _has_captions(samples: Sequence[tuple[str, Sequence[Tile]]], row: int) -> bool:
    return row == 0 or [t.caption for t in samples[row][1]] != [t.caption for t in samples[row - 1][1]]


def _in_lines(legend: Sequence[tuple[str, str]], letter: float, width: float) -> list[list[tuple[float, str, str]]]:
    """Entries of a legend in lines: where each begins, its text and its colour."""
    lines: list[list[tuple[float, str, str]]] = []
    x = width
    for name, colour in legend:
        text = _short(name)
        needs = (0.62 * len(text) + 3) * letter
        if x + needs > width:
            lines.append([])
            x = 0
        lines[-1].append((x, text, colour))
        x += needs
    return lines


def write_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write a figure as PNG and SVG, the same bytes for the same figure.

    Returns:
        The SVG.
    """
    save_png(figure, folder / f"{name}.png")
    with _style(name):
        figure.savefig(folder / f"{name}.svg", format="svg", metadata={"Date": None, "Creator": None})
    return (folder / f"{name}.svg").read_text(encoding="utf-8")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whatever the file's name ends in."""
    with _style():
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None}, pil_kwargs=FAST)


def for_page(svg: str, name: str, title: str, description: str) -> str:
    """An SVG of ``write_figure`` as an element of a page: in the page's colours and font, named for screen readers.

    Args:
        svg: Which.
        name: Tells its identifiers from those of other figures of the page.
        title: What it is.
        description: What it shows.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    referred = set(re.findall(r"#([\w-]+)", svg))
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
        if parent.get("id") not in referred:
            parent.attrib.pop("id", None)
        if style := parent.get("style"):
            style = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", style)
            for colour, on_page in PAGE_COLOURS.items():
                style = style.replace(colour, on_page)
            parent.set("style", style)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for i, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{'title' if i == 0 else 'description'}"})
        element.text = text
        root.insert(i, element)
    return ElementTree.tostring(root, encoding="unicode")


def _ages(rows: Sequence[RankedCheckpoint]) -> tuple[list[int], str]:
    """How old each checkpoint is, and in what; without a clock their places in the list, and nothing."""
    stated = ages([r.checkpoint for r in rows])
    known = [a for a in stated if a is not None]
    if len(known) < len(rows) or len(set(known)) < len(rows):
        return list(range(len(rows))), ""
    by_epoch = rows[0].checkpoint is not None and rows[0].checkpoint.epoch is not None
    return known, "epoch" if by_epoch else "step"


def _accuracy(row: RankedCheckpoint) -> float | None:
    return row.checkpoint.logged_accuracy if row.checkpoint else None


def _called(row: RankedCheckpoint, unit: str) -> str:
    # without a clock its name stands at the axis
    return f"chosen: {'epoch ' if unit == 'epoch' else ''}{row.label}" if unit else "chosen"


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    # the middle goes: names of runs differ at their ends
    half = longest // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


@contextmanager
def _style(salt: str = "") -> Iterator[None]:
    options: dict[str, Any] = {
        "font.size": 11,
        "svg.fonttype": "none",
        "svg.hashsalt": f"mtl-nnunet {salt}",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": PAPER,
        "grid.color": FAINT,
    }
    with matplotlib_defaults(**options), warnings.catch_warnings():
        # names in letters that the font lacks are boxes in the PNG; the SVG has them as text
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        yield


def _figure(panels: int, unit: str, rows: Sequence[RankedCheckpoint]) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = (4.9 if panels > 1 else 4.0) if unit else 1.9 + 0.28 * len(rows)
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    found = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[3, 1][:panels])
    for axes in found[:, 0]:
        axes.grid(axis="y" if unit else "x", linewidth=0.6)
        axes.set_axisbelow(True)
        if not unit:
            # names need room: they stand beside the axis, the first on top
            axes.set_yticks(range(len(rows)), [_short(r.label) for r in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure, list(found[:, 0])


def _points(axes: Axes, unit: str, age: Sequence[int], rows: Sequence[RankedCheckpoint], label: str) -> None:
    values = [r.value for r in rows]
    errors = [[max(0.0, r.value - r.low) for r in rows], [max(0.0, r.high - r.value) for r in rows]]
    if unit:
        axes.errorbar(age, values, yerr=errors, color=BLUE, marker="o", markersize=5, capsize=3, label=label)
        out = [(float(a), r.value) for a, r in zip(age, rows, strict=True) if r.out_after is not None]
    else:
        axes.errorbar(
            values, age, xerr=errors, color=BLUE, marker="o", markersize=5, capsize=3, linestyle="none", label=label
        )
        out = [(r.value, float(a)) for a, r in zip(age, rows, strict=True) if r.out_after is not None]
    if out:
        axes.plot(
            *zip(*out, strict=True),
            "o",
            color=BLUE,
            markersize=11,
            fillstyle="none",
            label="went out of the race early",
        )


def _mark(axes: Axes, unit: str, age: int, value: float, label: str) -> None:
    at = (age, value) if unit else (value, age)
    axes.plot([at[0]], [at[1]], marker="*", markersize=15, color=RED, linestyle="none", zorder=4, label=label)


def _finish(figure: Figure, axes: Axes, lowest: Axes, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    if unit:
        lowest.set_xlabel(f"pretraining {unit}")
        lowest.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    _lay_out(figure)


def _lay_out(figure: Figure) -> None:
    """Once, for every format."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")

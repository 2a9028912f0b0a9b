"""An evaluation for people: tables for a terminal and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mtl_nnunet.curves import STATES, Curve
from mtl_nnunet.drawing import matplotlib_defaults
from mtl_nnunet.evaluation import (
    ACCURACY,
    ALL,
    BEST,
    BEST_SCORE,
    FIXED,
    FROM_SCRATCH,
    HALF_SEEDS,
    HELD_OUT,
    LAST,
    RANDOM_EPOCH,
    WITHIN_ERROR,
    WITHIN_HALF_POINT,
    Evaluation,
    fixed_line,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SHOWN_SCORES = 10
SHOWN_FIXED = 4
FEW_CLUSTERS = 10
MOST_PANELS = 72
NAMES = {
    "free": "encoder free",
    "frozen": "encoder frozen",
    ALL: "free and frozen",
}
COLORS = {"free": "#0072B2", "frozen": "#D55E00"}
MARKERS = {
    LAST: ("s", "last epoch"),
    RANDOM_EPOCH: ("X", "random epoch"),
    HALF_SEEDS: ("P", "real trainings, half the seeds"),
    BEST: ("*", "best epoch (hindsight)"),
    HELD_OUT["dataset"]: ("D", "score chosen on other targets"),
    HELD_OUT["encoder"]: ("^", "score chosen on other encoders"),
}


def evaluation_text(evaluation: Evaluation, always: Sequence[str] = ()) -> str:
    """The tables for a terminal, all curves first; Dice in points (hundredths).

    Args:
        evaluation: What became of every rule.
        always: Scores that are shown even where they are not among the ten of least regret.
    """
    groups = list(evaluation.summary["state"].unique())
    blocks = [_group_text(evaluation, group, always) for group in [g for g in (ALL, *STATES) if g in groups]]
    facts = evaluation.noise.iloc[-1]
    legend = [
        "Regret: Dice points (hundredths) below the best epoch. split: the same with the best picked on half the seeds and judged",
        "on the others, so without luck. [ ]: 95 % bootstrap interval over targets and pretraining runs. worst: largest regret on a",
        "curve. budget: share of the pretraining. tau: weighted Kendall. -last, -fixed: gain in Dice points over the last epoch and",
        "over one fixed epoch of the same mean budget, with wins/ties/losses (tie: within two standard errors).",
    ]
    if min(facts["targets"], facts["runs"]) < FEW_CLUSTERS:
        legend.append(
            f"Intervals resample targets ({facts['targets']:.0f}) and pretraining runs ({facts['runs']:.0f}): so few make them rough."
        )
    return "\n\n".join([*blocks, "\n".join(legend)])


def shown_scores(group: pd.DataFrame, always: Sequence[str] = ()) -> list[str]:
    """The ten scores of least mean regret among those that all curves have, and those always shown."""
    scores = group[group["kind"] == "score"]
    complete = scores[scores["curves"] == group["curves"].max()]
    best = complete.sort_values("regret", kind="stable")["rule"].head(SHOWN_SCORES).tolist()
    return [*best, *(name for name in always if name in set(scores["rule"]) - set(best))]


def write_figure(evaluation: Evaluation, curves: Sequence[Curve], path: Path, always: Sequence[str] = ()) -> None:
    """Regret against budget, a panel a state, and below it the Dice along every pretraining run."""
    with matplotlib_defaults():
        _write_figure(evaluation, curves, path, always)


def _write_figure(evaluation: Evaluation, curves: Sequence[Curve], path: Path, always: Sequence[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    states = [state for state in STATES if state in set(evaluation.summary["state"])]
    groups: dict[tuple[str, ...], list[Curve]] = {}
    for curve in sorted(curves, key=lambda c: (c.encoder, c.scheme, c.run, c.dataset)):
        groups.setdefault((curve.dataset, curve.encoder, curve.scheme, curve.run), []).append(curve)
    panels = list(groups.values()) if len(groups) <= MOST_PANELS else []
    columns = min(6, len(panels))
    rows = -(-len(panels) // columns) if columns else 0
    figure = Figure(figsize=(13, 6.2 + 1.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    top, *below = figure.subfigures(
        2 if rows else 1, 1, height_ratios=[6.2, 1.8 * rows] if rows else [1], squeeze=False
    )[:, 0]
    for axes, state in zip(top.subplots(1, len(states), squeeze=False)[0], states, strict=True):
        _draw_regret(axes, evaluation, [c for c in curves if c.state == state], state, always)
    for part in below:
        part.suptitle(
            "Mean Dice along each pretraining run (bars: one standard error over seeds; dashed: from scratch)",
            fontsize=10,
        )
        grid = part.subplots(rows, columns, squeeze=False).ravel()
        for axes, group in zip(grid[: len(panels)], panels, strict=True):
            _draw_curves(axes, group)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        grid[0].legend(fontsize=7, loc="best", frameon=False)
    figure.savefig(path, format="png", dpi=130)


def _group_text(evaluation: Evaluation, state: str, always: Sequence[str]) -> str:
    group = evaluation.summary[evaluation.summary["state"] == state].set_index("rule", drop=False)
    noise = evaluation.noise[evaluation.noise["state"] == state].iloc[0]
    fixed = [rule for rule in group.index if rule.startswith(f"{FIXED} ")]
    later = [rule for rule in fixed if group.loc[rule, "budget"] >= 0.25][-SHOWN_FIXED:]
    averages = [rule for rule in group.index if rule.startswith("average of")]
    baselines = [LAST, *reversed(later), *averages, ACCURACY, RANDOM_EPOCH, FROM_SCRATCH]
    hindsight = [HALF_SEEDS, BEST_SCORE, WITHIN_ERROR, WITHIN_HALF_POINT]
    rules = group.index[group["kind"] == "rule"].tolist()
    sections = [shown_scores(group, always), [*rules, *HELD_OUT.values()], baselines, hindsight]
    shown = [[rule for rule in section if rule in group.index] for section in sections]
    width = max(len(_title(group.loc[rule])) for section in shown for rule in section)
    lines = [
        f"{NAMES[state]} (curves: {noise['curves']:.0f}, targets: {noise['targets']:.0f}, pretraining runs: {noise['runs']:.0f})",
        f"{'':{width}}  {'curves':>6}  {'regret':>6} {'[95 %]':>14}  {'split':>6}  {'worst':>6}  {'epoch':>5}  {'budget':>6}  {'tau':>5}"
        f"  {'-last':>6} {'w/t/l':>8}  {'-fixed':>6} {'w/t/l':>8}",
    ]
    for section in shown:
        lines += [_line(group.loc[rule], width) for rule in section]
        lines += ["-" * 8] if section and section is not shown[-1] else []
    scores = group[group["kind"] == "score"]
    hidden = len(scores) - len(shown[0])
    if hidden:
        partly = (scores["curves"] < group["curves"].max()).sum()
        lines.append(
            f"{hidden} more scores in summary.csv" + (f", {partly} of them on a part of the curves only" * bool(partly))
        )
    if not averages:
        lines.append("no average of the last checkpoints in the table (epoch average-K)")
    lines.append(
        f"noise of the seeds: regret of the truly best epoch {_points(noise['noise_floor'])}; agreement of half the seeds with the "
        f"others, a cautious ceiling for tau: weighted {noise['weighted_tau_of_halves']:.2f}, Kendall {noise['kendall_tau_of_halves']:.2f}, "
        f"Spearman {noise['spearman_of_halves']:.2f}"
    )
    return "\n".join(lines)


def _title(row: pd.Series) -> str:
    return f"{row['rule']} (hindsight)" if row["kind"] == "hindsight" else str(row["rule"])


def _line(row: pd.Series, width: int) -> str:
    interval = f"[{_points(row['regret_low'])}, {_points(row['regret_high'])}]"
    line = (
        f"{_title(row):{width}}  {row['curves']:>6.0f}  {_points(row['regret']):>6} {interval:>14}  {_points(row['split_regret']):>6}"
        f"  {_points(row['worst']):>6}  {row['epoch']:>5.0f}  {row['budget']:>6.2f}  {_number(row['weighted_tau']):>5}"
    )
    for name in ("last", "fixed"):
        counts = "/".join(f"{row[f'{word}_{name}']:.0f}" for word in ("wins", "ties", "losses"))
        judged = sum(row[f"{word}_{name}"] for word in ("wins", "ties", "losses"))
        line += f"  {_points(row[f'minus_{name}'], sign='+'):>6} {counts if judged else '-':>8}"
    return line


def _points(dice: float, sign: str = "") -> str:
    # + 0.0: minus zero is a gain that is none
    return "-" if np.isnan(dice) else f"{round(100 * dice, 2) + 0.0:{sign}.2f}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _draw_regret(
    axes: Axes, evaluation: Evaluation, curves: Sequence[Curve], state: str, always: Sequence[str]
) -> None:
    group = evaluation.summary[evaluation.summary["state"] == state].set_index("rule", drop=False)
    noise = evaluation.noise[evaluation.noise["state"] == state].iloc[0]
    budgets, regrets = fixed_line(curves, np.linspace(0, 1, 101).tolist())
    axes.plot(budgets, 100 * regrets, color="0.3", lw=1.5, label="one fixed epoch for all")
    if not np.isnan(noise["noise_floor"]):
        axes.axhline(100 * noise["noise_floor"], color="0.6", lw=1, ls=":", label="noise of the measured best")
    scores = group[(group["kind"] == "score") & (group["curves"] == len(curves))]
    axes.scatter(scores["budget"], 100 * scores["regret"], s=14, color=COLORS[state], alpha=0.35, lw=0, label="a score")
    named = [*shown_scores(group)[:1], *(name for name in always if name in scores.index)]
    for i, name in enumerate(dict.fromkeys(named)):
        axes.scatter(
            group.loc[name, "budget"],
            100 * group.loc[name, "regret"],
            s=60,
            marker="ov<>"[i % 4],
            color=COLORS[state],
            edgecolor="k",
            zorder=3,
            label=name,
        )
    for rule, (marker, label) in MARKERS.items():
        if rule in group.index:
            row = group.loc[rule]
            error = np.array([[row["regret"] - row["regret_low"]], [row["regret_high"] - row["regret"]]])
            axes.errorbar(
                row["budget"],
                100 * row["regret"],
                100 * error.clip(0),
                fmt=marker,
                ms=8,
                color="k",
                mfc="w",
                lw=0.8,
                capsize=2,
                zorder=2,
                label=label,
            )
    # the earliest epochs are far off: what matters lies near the best rules
    shown = group[~group.index.str.startswith(FIXED) & (group.index != FROM_SCRATCH)]["regret"]
    highest = max(shown.max(), 0.001)
    axes.set(
        xlim=(-0.02, 1.02),
        ylim=(-4 * highest, 115 * highest),
        xlabel="mean budget (epoch / last epoch)",
        ylabel="mean regret (Dice points)",
        title=f"{NAMES[state]}: {len(curves)} curves",
    )
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2, frameon=False)


def _draw_curves(axes: Axes, group: Sequence[Curve]) -> None:
    for curve in group:
        counts = (~np.isnan(curve.dice)).sum(1)
        spread = np.array([np.nanstd(row, ddof=1) if n > 1 else 0.0 for row, n in zip(curve.dice, counts, strict=True)])
        color = COLORS[curve.state]
        axes.errorbar(
            curve.epochs,
            curve.mean_dice,
            spread / np.sqrt(counts),
            color=color,
            lw=1,
            marker=".",
            ms=4,
            elinewidth=0.7,
            label=NAMES[curve.state],
        )
        if curve.scratch.size:
            axes.axhline(curve.scratch.mean(), color=color, lw=0.7, ls="--")
    # a run's name often says the others already
    parts = [p for p in (group[0].encoder, group[0].scheme) if p not in group[0].run]
    axes.set_title("\n".join([group[0].dataset, " ".join([*parts, group[0].run])]), fontsize=7)
    axes.tick_params(labelsize=6)

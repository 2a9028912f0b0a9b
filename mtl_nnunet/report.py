"""The ranking for people: tables, the verdict and warnings in words."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtl_nnunet.bootstrap import FEWEST_PATIENTS
from mtl_nnunet.budget import budgets_of
from mtl_nnunet.cases import Dataset, table_of_patients_left_unread
from mtl_nnunet.chooser import Choice
from mtl_nnunet.drawing import matplotlib_defaults
from mtl_nnunet.errors import listed
from mtl_nnunet.pictures import CLASSES, hexadecimal
from mtl_nnunet.ranking import RankedCheckpoint, Ranking
from mtl_nnunet.slices import Slices

FEW_PATIENTS = 10
# nnU-Net makes five folds
FEWEST_TO_SPLIT = 5
MOST_NAMES = 8


def ranking_table(rankings: Sequence[Ranking]) -> str:
    """The rankings as CSV, one row a checkpoint and score, the random initialisation last of each score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = "name,parameters,epoch,file,score,low,high,probability_of_best_score,undecided,chosen,last,out_after,logged_accuracy,expected_loss,loss_low,loss_high"
    writer.writerow(names.split(","))
    for ranking in rankings:
        told = ranking.expectation
        losses = {} if told is None else dict(enumerate(zip(told.expected_loss, told.low, told.high, strict=True)))
        for i, row in enumerate((*ranking.checkpoints, ranking.random)):
            checkpoint = row.checkpoint
            writer.writerow(
                [
                    ranking.score.name,
                    ranking.score.text.partition(":")[2],
                    checkpoint.epoch if checkpoint else None,
                    checkpoint.path.name if checkpoint else row.label,
                    row.value,
                    row.low,
                    row.high,
                    row.probability_of_best_score,
                    row.undecided,
                    row is ranking.chosen,
                    row is ranking.last,
                    row.out_after,
                    checkpoint.logged_accuracy if checkpoint else None,
                    *losses.get(i, (None, None, None)),
                ]
            )
    return text.getvalue()


def ranking_text(ranking: Ranking) -> str:
    """The ranking as a table for a terminal, best score first, the yardsticks marked."""
    width = max(8, *(len(r.label) for r in ranking.checkpoints))
    told = ranking.expectation
    losses = {} if told is None else dict(zip((r.label for r in ranking.checkpoints), _losses(told), strict=True))
    loss_width = max(len("Dice points lost"), *map(len, losses.values()), 0)
    lines = [f"{'epoch':>{width}}  {'score':>8}  {'95 % interval':>18}  {'P(best score)':>13}  {'ImageNet top-1':>14}"]
    if losses:
        lines[0] += f"  {'Dice points lost':>{loss_width}}"
    rows: list[RankedCheckpoint] = sorted(
        (*ranking.checkpoints, ranking.random), key=lambda r: r.value, reverse=ranking.score.higher_is_better
    )
    for row in rows:
        accuracy = row.checkpoint.logged_accuracy if row.checkpoint else None
        probability = "" if row.probability_of_best_score is None else f"{row.probability_of_best_score:.3f}"
        lines.append(
            f"{row.label:>{width}}  {row.value:8.4f}  [{row.low:7.4f}, {row.high:7.4f}]  {probability:>13}  "
            f"{'' if accuracy is None else f'{accuracy:.2f} %':>14}  "
            f"{f'{losses.get(row.label, str()):>{loss_width}}  ' if losses else ''}{', '.join(notes_of(ranking, row))}".rstrip()
        )
    lines.append(
        f"score {ranking.score.text}: {ranking.score.better} is better; intervals by bootstrap over patients; rule: {ranking.rule.text}."
    )
    if told is not None:
        lines.append(f"{told.text}.")
    return "\n".join(lines)


def notes_of(ranking: Ranking, row: RankedCheckpoint) -> list[str]:
    """What is to be said of a row of the table."""
    is_checkpoint, best = row.checkpoint is not None, ranking.checkpoints[ranking.best]
    return [
        note
        for note, applies in (
            ("<- chosen", row is ranking.chosen),
            ("best score", row is best),
            ("last epoch", row is ranking.last),
            ("undecided", row.undecided and is_checkpoint and row is not best),
            (f"out after {row.out_after} patients", row.out_after is not None),
            ("yardstick", row is ranking.random),
        )
        if applies
    ]


def _losses(told: Choice) -> list[str]:
    ends = zip(told.expected_loss, told.low, told.high, strict=True)
    return [f"{100 * loss:.2f} [{100 * low:.2f}, {100 * high:.2f}]" for loss, low, high in ends]


def names_of(rankings: Sequence[Ranking]) -> list[str]:
    """What to call the score of each; parameters tell apart what has one name."""
    names = [r.score.name for r in rankings]
    return [r.score.text if names.count(r.score.name) > 1 else r.score.name for r in rankings]


def others_text(rankings: Sequence[Ranking]) -> str:
    """One line a score that was computed beside the choosing one: what it would have chosen."""
    called = names_of(rankings)
    width = max(12, *map(len, called))
    lines = [f"{'beside it':>{width}}  {'would choose':>12}  {'score':>9}  {'random':>9}  undecided"]
    for name, ranking in zip(called, rankings, strict=True):
        lines.append(
            f"{name:>{width}}  {ranking.chosen.label:>12}  {ranking.chosen.value:9.4f}  {ranking.random.value:9.4f}  "
            f"{', '.join(c.label for c in ranking.undecided)}"
            f"{'' if ranking.better(ranking.checkpoints[ranking.best], ranking.random) else '; none beats random weights'}"
        )
    return "\n".join(lines)


def verdict_text(ranking: Ranking) -> str:
    """The choice in a few plain sentences: which and why, what it is expected to lose and how that is known, what could be saved, what the score says."""
    rows, told, budgets = ranking.checkpoints, ranking.expectation, budgets_of(ranking)
    chosen = ranking.chosen
    if len(rows) == 1:
        said = [f"Start from {_in_words([chosen])}, the only checkpoint."]
    elif budgets:
        said = [f"Start from epoch {budgets[0].epoch} of {budgets[0].last} ({_why(ranking)})."]
    else:
        said = [f"Start from {_in_words([chosen])}, one of {len(rows)} checkpoints ({_why(ranking)})."]
    if told is not None:
        said.append(_loss_in_words(told))
    if budgets and budgets[0].saved_epochs:
        unpriced = "" if told is not None else "; what that costs in Dice this rule does not say"
        said.append(f"{budgets[0].saved_share:.0%} of the {budgets[0].run} could have been saved{unpriced}.")
    elif len(budgets) > 1 and (loss := budgets[1].expected_loss) is not None:
        said.append(
            f"Stopping at epoch {budgets[1].epoch} could have saved {budgets[1].saved_share:.0%} of the {budgets[1].run} for an expected loss of "
            f"{100 * loss:.2f} Dice points."
        )
    elif budgets:
        said.append("This choice saves nothing of the run.")
    if len(rows) > 1:
        said.append(_score_in_words(ranking))
    if not ranking.better(rows[ranking.best], ranking.random):
        said.append(
            f"{'None' if len(rows) > 1 else 'It'} scores {'' if len(rows) > 1 else 'no '}better than random weights."
        )
    return " ".join(said)


def _why(ranking: Ranking) -> str:
    rule, told = ranking.rule, ranking.expectation
    if told is None:
        return rule.text
    if ranking.chosen is ranking.last and (told.fell_back or rule.price == 0):
        return "the last"
    priced = f", a whole pretraining being worth {rule.price:g} Dice points" if rule.price else ""
    return f"least expected loss{priced}"


def _loss_in_words(told: Choice) -> str:
    """What is expected to be lost, and that images had no part in it, or which scores of them had."""
    i = told.index
    if np.isnan(told.expected_loss[i]):
        return "What it loses against the best of these checkpoints is not known."
    by = (
        f"By other trainings and by {listed(list(told.used))} on these images"
        if told.used
        else "Going by its epoch alone, as other trainings went, and not by these images"
    )
    return (
        f"{by}, it is expected to lose {100 * told.expected_loss[i]:.2f} Dice points, 90 % interval {100 * told.low[i]:.2f} to "
        f"{100 * told.high[i]:.2f}, against the best of these checkpoints."
    )


def _score_in_words(ranking: Ranking) -> str:
    chosen, best = ranking.chosen, ranking.checkpoints[ranking.best]
    others, all_others = len(ranking.undecided) - 1, len(ranking.checkpoints) - 1
    said = "It has the best score" if best is chosen else f"The best score is that of {_in_words([best])}"
    if not others:
        return f"{said}, clear of all others{'' if best is chosen else ', the chosen one too'}."
    if others == 1 and chosen.undecided and best is not chosen:
        return f"{said}, which cannot be told from that of the chosen one."
    which = f"{others} of the {all_others} others"
    if others == all_others:
        which = "any other" if others > 1 else "the other"
    said += f", which cannot be told from {which}"
    if best is chosen or others == all_others:
        return f"{said}."
    return f"{said}, the chosen one among them." if chosen.undecided else f"{said}; the chosen one is behind it."


def _in_words(rows: Sequence[RankedCheckpoint]) -> str:
    names = listed([r.label for r in rows], MOST_NAMES)
    dated = all(r.checkpoint is not None and r.checkpoint.epoch is not None for r in rows)
    return f"epoch{'s' if len(rows) > 1 else ''} {names}" if dated else names


def _share(value: float) -> str:
    """In per cent; what is not all is not rounded to all.

    Examples:
        >>> _share(1.0), _share(0.9975), _share(0.86), _share(0.001)
        ('100%', '>99%', '86%', '<1%')
    """
    return ">99%" if 0.995 <= value < 1 else "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def comparison_text(ranking: Ranking) -> str:
    """The chosen checkpoint beside the baselines, paired over patients: last epoch and random initialisation."""
    lines = []
    for name, words in (("last", "the last epoch"), ("random", "random initialisation")):
        if (c := ranking.chosen.compared.get(name)) is not None and not np.isnan(c.low):
            lines.append(
                f"chosen against {words}: {c.gain:+.4f} [{c.low:+.4f}, {c.high:+.4f}], scores better on {_share(c.probability)} of the draws"
            )
    return "\n".join(lines)


def budget_text(ranking: Ranking) -> str:
    """What stopping at the choice saves and costs, and the earliest checkpoint that is expected to lose little more."""
    budgets = budgets_of(ranking)
    lines = [
        f"{name}: {budget.text}." for name, budget in zip(("chosen", "cheaper")[: len(budgets)], budgets, strict=True)
    ]
    if any(budget.saved_epochs for budget in budgets):
        lines.append(
            "This is of weights as they are in the middle of the longer run; a run planned for fewer epochs lowers its rate sooner and "
            "has others."
        )
    return "\n".join(lines)


def warnings_in_words(ranking: Ranking, num_patients: int) -> list[str]:
    """What a user should know before believing the choice."""
    warnings = []
    undecided, best, chosen = ranking.undecided, ranking.checkpoints[ranking.best], ranking.chosen
    if len(undecided) > 1:
        names = ", ".join(c.label for c in undecided)
        consequence = (
            "choosing the best score among them is close to a guess."
            if ranking.rule.name == "best"
            else "the score does not say which of them is best."
        )
        warnings.append(
            f"The score cannot tell {len(undecided)} of {len(ranking.checkpoints)} checkpoints apart ({names}): {consequence}"
        )
    from_scratch = "Compare with training from scratch (-tr MTLTrainerScratch)."
    if not ranking.better(best, ranking.random):
        warnings.append(
            f"No checkpoint scores better than the random initialisation of the same encoder. {from_scratch}"
        )
    elif best.compared["random"].is_undecided:
        warnings.append(
            f"No checkpoint scores clearly better than the random initialisation of the same encoder. {from_scratch}"
        )
    elif not ranking.better(chosen, ranking.random):
        warnings.append(
            f"The chosen checkpoint ({chosen.label}) scores no better than the random initialisation, though "
            f"{_in_words([best])} does. {from_scratch}"
        )
    if len(ranking.checkpoints) == 1:
        warnings.append("There is one checkpoint, so nothing was chosen: its score stands beside random weights only.")
    elif ranking.rule.name == "non-inferior" and chosen is ranking.last:
        warnings.append(
            "No earlier checkpoint is known to be good enough by the non-inferiority rule: the last one is taken."
        )
    published = chosen.checkpoint.published if chosen.checkpoint else None
    are_published = any(c.checkpoint is not None and c.checkpoint.published is not None for c in ranking.checkpoints)
    if are_published and ranking.rule.name == "best" and len(ranking.checkpoints) > 1:
        warnings.append(
            "How well a score chooses among published weights of one network has not been measured: take it as a hint "
            "(docs/evidence.md)."
        )
    if published is not None and published.caution:
        warnings.append(
            f"The licence of {published.name} is {published.licence}, which {published.caution} of these weights; what it says of models "
            "trained from them, read there."
        )
    if ranking.expectation is not None:
        warnings += [f"Expected loss: {text}" for text in ranking.expectation.warnings]
    if num_patients < FEWEST_PATIENTS:
        warnings.append(f"Only {num_patients} patients were read, too few for an interval: read more of them.")
    elif num_patients < FEW_PATIENTS:
        warnings.append(
            f"Only {num_patients} patients were read: intervals from so few are rough, and P(best score) is too sure of itself."
        )
    return warnings


def all_warnings(ranking: Ranking, dataset: Dataset, slices: Slices, fold: int | str | None) -> list[str]:
    """Everything that a user should know: of the choice, of labels, of cases left out and of patients.

    Args:
        ranking: The one that has the choice.
        dataset: The cases that could be sampled.
        slices: What was read of them.
        fold: Whose validation cases were kept out, or ``all``.
    """
    return warnings_in_words(ranking, slices.num_patients) + warnings_of_cases(dataset, slices, fold)


def warnings_of_cases(dataset: Dataset, slices: Slices, fold: int | str | None) -> list[str]:
    """What a user should know of labels, of cases left out and of patients, whatever is scored on them."""
    of_nnunet = dataset.reader != "monai"
    warnings = labels_in_words(slices, fold, can_keep_out=of_nnunet and len(dataset.cases) >= FEWEST_TO_SPLIT)
    warnings += [f"Case {name} was skipped: {reason}" for name, reason in slices.skipped]
    if of_nnunet and (table := table_of_patients_left_unread(dataset)) is not None:
        warnings.append(f"Every case counted as a patient of its own, though {table} is there. Pass it with -patients.")
    return warnings


def labels_in_words(slices: Slices, fold: int | str | None, can_keep_out: bool) -> list[str]:
    """What a user should know of the labels that were looked at.

    Args:
        slices: With labels, unless none were.
        fold: Whose validation cases were kept out, or ``all``.
        can_keep_out: Whether the labels of a fold's validation cases could have been kept out.
    """
    if slices.labels is None:
        return []
    warnings = []
    if (owners := len(slices.patients_behind(labelled=True))) < FEW_PATIENTS:
        warnings.append(
            f"Only {owners} patients have foreground on their slices: scores with labels rest on these few."
        )
    if fold == "all":
        advice = " Pass -f 0 to -f 4 to keep a fold's validation cases out." if can_keep_out else ""
        warnings.append(
            "Labels of validation cases were seen: cases were taken from all, those of every fold's validation too, so Dice "
            f"on them is a little too good.{advice}"
        )
    return warnings


def draw_predictions(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], class_names: Sequence[str], path: Path
) -> None:
    """Image, truth and prediction side by side, one row a case, as a PNG.

    Args:
        rows: Name, image, truth and prediction of a slice, each (H, W), rows running from posterior to anterior.
        class_names: Names of the labels 1, 2, ...
        path: Where to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    with matplotlib_defaults():
        colours = [hexadecimal(CLASSES[i % len(CLASSES)]) for i in range(len(class_names))]
        palette = ListedColormap(["#00000000", *colours])
        figure = Figure(figsize=(7.5, 2.5 * len(rows) + 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(rows), 3, squeeze=False)
        for axes, (name, image, truth, prediction) in zip(grid, rows, strict=True):
            for panel, overlay in zip(axes, (None, truth, prediction), strict=True):
                panel.imshow(image, cmap="gray", origin="lower")
                if overlay is not None:
                    panel.imshow(
                        overlay,
                        cmap=palette,
                        vmin=0,
                        vmax=len(class_names),
                        alpha=0.6,
                        origin="lower",
                        interpolation="nearest",
                    )
                panel.set_xticks([])
                panel.set_yticks([])
            axes[0].set_ylabel(name, fontsize=8)
        for panel, title in zip(grid[0], ("image", "truth", "prediction"), strict=True):
            panel.set_title(title)
        patches = [Patch(color=palette(i + 1), label=name) for i, name in enumerate(class_names)]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(class_names), frameon=False)
        figure.savefig(path, dpi=150)

"""A training as one page to look at: nnU-Net's curves and validation cases, against trainings from random weights."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet import __version__
from mtl_nnunet.bootstrap import FEWEST_PATIENTS
from mtl_nnunet.cases import Case, Dataset, find_nnunet_dataset, with_patients
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.figures import draw_curves, draw_slices, smoothing_of, write_figure
from mtl_nnunet.files import files_written_together, write_text
from mtl_nnunet.overlays import CasePicture, Look, class_colours, difference_colours, look_of, picture_of
from mtl_nnunet.page import figure_in_page, page_text
from mtl_nnunet.pictures import MOST_CHANNELS, are_colours
from mtl_nnunet.plans import RECIPE_KEY, dataset_name_of, preprocessed_folder
from mtl_nnunet.selection import DEFAULT_FOLDER, REPORT_FILE, selected_sha256
from mtl_nnunet.trainings import YARDSTICKS, Training, find_model, find_named, find_others, labels_of, read_training
from mtl_nnunet.validation import Paired, cases_to_look_at, class_names, pair

# what its files are called after the stem
PARTS = (".html", *(f"_{figure}.{ending}" for figure in ("curves", "cases") for ending in ("png", "svg")))
PACKAGES = ("torch", "nnunetv2", "numpy", "SimpleITK")
FEW_PATIENTS = 10
ONE_DRAW = (
    "One fold and one seed are one draw of each training: intervals are over the patients that were validated on, and do not hold what another fold or "
    "another seed would change. nnU-Net does not seed its trainings."
)


@dataclass(frozen=True)
class TrainingReport:
    """Where the picture of a training lies, and what it says.

    Attributes:
        page: The page to look at.
        files: All that was written.
        verdict: In a sentence or a few.
        warnings: In words.
        content: Everything in numbers, as ``mtl-nnunet training --json`` prints it.
    """

    page: Path
    files: tuple[Path, ...]
    verdict: str
    warnings: tuple[str, ...]
    content: dict[str, Any]


@dataclass(frozen=True)
class _Shown:
    """A validation case on the page: what it is, its Dice, and its picture or why there is none."""

    role: str
    case: str
    patient: str
    dice: float
    of_classes: tuple[float, ...]
    picture: CasePicture | None
    problem: str


def report_training(
    dataset: int | str,
    configuration: str,
    fold: int | str = 0,
    trainer: str = "MTLTrainer",
    plans: str = "nnUNetPlans",
    against: Sequence[str] | None = None,
    output: str | Path | None = None,
    patients: str | Path | None = None,
) -> TrainingReport:
    """Draw a training of nnU-Net: curves, validation Dice against other trainings, and its worst, median and best case.

    Args:
        dataset: Number or name, as for nnU-Net's ``-d``.
        configuration: nnU-Net's ``-c``.
        fold: nnU-Net's ``-f``, a number or ``all``.
        trainer: nnU-Net's ``-tr``.
        plans: nnU-Net's ``-p``.
        against: Trainings of the same fold to hold it against, ``TRAINER[__PLANS[__CONFIGURATION]]``; None for those of
            ``MTLTrainerScratch`` and ``nnUNetTrainer`` that are there, an empty list for none.
        output: Folder for the files; None for that of the selection that the training started from.
        patients: Table ``case,patient``; None for the raw dataset's ``patients.csv``, and without one every case is a patient.

    Returns:
        Where it was written, and what it says.

    Raises:
        UserError: No such training, nothing of it that could be shown, a selection folder that is gone or holds another selection, or a table
            that does not fit.
    """
    name = dataset_name_of(dataset)
    training = read_training(find_model(name, trainer, plans, configuration), fold)
    folder = _folder_of_selection(training) if output is None else Path(output)
    if output is not None and selected_sha256(folder) is not None:
        _refuse_other_selection(training, folder)
    others, left_out = find_others(training) if against is None else (find_named(training, against), [])
    everyone = [training, *others]
    labels = labels_of(everyone)
    owners, table, of_patients = _patients_of(everyone, patients)
    paired = [
        None if training.validation is None or o.validation is None else pair(training.validation, o.validation, owners)
        for o in others
    ]
    look = look_of(training.plans, training.dataset)
    shown = _pictures(training, owners, look)
    compared = list(zip(labels[1:], others, paired, strict=True))
    labels_shown = _labels_shown(shown)
    verdict = _verdict(training, labels[0], compared)
    warnings = [*_warnings(training, labels, others, paired, shown), *of_patients, *left_out, ONE_DRAW]
    command = command_of(training, against, output, patients)
    content = _content(training, everyone, labels, paired, shown, command, warnings, verdict, table)
    stem = stem_of(training)
    with files_written_together(folder) as temporary:
        figures = _draw(temporary, stem, everyone, labels, shown, look)
        text = page_text(
            "training.html.jinja",
            training=training,
            everyone=list(zip(labels, everyone, strict=True)),
            compared=compared,
            verdict=verdict,
            warnings=warnings,
            shown=shown,
            classes=[] if training.validation is None else class_names(training.validation.classes, look.labels),
            means=_class_means(everyone, look),
            all_cases=_all_cases(everyone, owners),
            figures=figures,
            look=look,
            legends=(
                ("Truth and prediction", class_colours(look, labels_shown)),
                ("Differences", difference_colours(look)),
            ),
            smoothing=smoothing_of([t.num_epochs for t in everyone]),
            content=content,
            num_patients=len({owners[c] for c in training.validation.cases}) if training.validation else 0,
            table=table,
            files=sorted(f.name for f in temporary.iterdir()),
            beside=output is None and (folder / REPORT_FILE).is_file(),
            report_file=REPORT_FILE,
            in_colour=are_colours(look.channel_names),
            most_channels=MOST_CHANNELS,
        )
        write_text(temporary / f"{stem}.html", text)
        written = sorted(f.name for f in temporary.iterdir())
        if output is None:
            # it may have been made again since
            _refuse_other_selection(training, folder)
        for name in {f"{stem}{part}" for part in PARTS} - set(written):
            # what an earlier picture had and this one has not
            (folder / name).unlink(missing_ok=True)
    content["page"] = str(folder / f"{stem}.html")
    return TrainingReport(
        folder / f"{stem}.html", tuple(folder / n for n in written), verdict, tuple(warnings), content
    )


def stem_of(training: Training) -> str:
    """What its files are called, but for their endings: one selection can serve several models and folds."""
    return f"training_{training.name}_fold_{training.fold}"


def command_of(
    training: Training,
    against: Sequence[str] | None = None,
    output: str | Path | None = None,
    patients: str | Path | None = None,
) -> str:
    """The command that draws it again."""
    named = re.match(r"Dataset(\d{3})_", training.dataset_name)
    words = ["mtl-nnunet", "training", "-d", str(int(named[1])) if named else training.dataset_name]
    words += ["-c", training.configuration, "-f", training.fold, "-tr", training.trainer, "-p", training.plans_name]
    for option, value in (("-o", output), ("-patients", patients)):
        words += [] if value is None else [option, str(value)]
    return shlex.join([*words, *([] if against is None else ["-against", *against])])


def _folder_of_selection(training: Training) -> Path:
    record = training.record
    if record is None or "encoder_sha256" not in record:
        raise UserError(
            f"{training.name} was not trained from a selection, so there is no folder to put its picture into. Pass -o FOLDER."
        )
    folder = preprocessed_folder(training.dataset_name) / str(record.get("folder", DEFAULT_FOLDER))
    _refuse_other_selection(training, folder)
    return folder


def _refuse_other_selection(training: Training, folder: Path) -> None:
    wanted, found = str((training.record or {}).get("encoder_sha256")), selected_sha256(folder)
    if found != wanted:
        there = f"holds another selection (SHA-256 {found[:12]})" if found else "holds no selection any more"
        from_it = f"was trained from {wanted[:12]}" if training.record else "was trained from none"
        raise UserError(
            f"{folder} {there}, and {training.name} {from_it}: its picture does not belong there. Pass -o another folder."
        )


def _patients_of(
    everyone: Sequence[Training], table: str | Path | None
) -> tuple[dict[str, str], str | None, list[str]]:
    """The patient of each validation case, by which table, and what is to be said; without one every case is a patient."""
    cases = sorted({c for t in everyone if t.validation for c in t.validation.cases})
    each_alone = {c: c for c in cases}
    own = Path(os.environ.get("nnUNet_raw", ""), everyone[0].dataset_name, "patients.csv")
    if not cases or (table is None and not own.is_file()):
        return each_alone, None, []
    alone = Dataset(everyone[0].dataset_name, tuple(Case(c, c, ()) for c in cases), (), "")
    try:
        found = with_patients(alone, own if table is None else table)
    except UserError as error:
        if table is not None:
            raise
        return each_alone, None, [f"Every case counted as a patient of its own: {error}"]
    return {c.name: c.patient for c in found.cases}, str(own if table is None else table), []


def _pictures(training: Training, owners: dict[str, str], look: Look) -> list[_Shown]:
    validation = training.validation
    if validation is None:
        return []
    problem, cases = "", {}
    try:
        cases = {c.name: c for c in find_nnunet_dataset(training.dataset_name, skip_bad_cases=True).cases}
    except UserError as error:
        problem = f"their images were not found: {error}"
    ending = str(training.dataset["file_ending"])
    truths = None
    with suppress(UserError):
        truths = preprocessed_folder(training.dataset_name) / "gt_segmentations"
    found = []
    for role, index in cases_to_look_at(validation):
        name = validation.cases[index]
        picture, why = (
            None,
            problem or (f"{training.dataset_name} has no image of it any more." if name not in cases else ""),
        )
        if not why:
            # what nnU-Net computed Dice with
            truth = (
                truths / f"{name}{ending}"
                if truths is not None and (truths / f"{name}{ending}").is_file()
                else cases[name].label
            )
            try:
                picture = picture_of(
                    Case(name, owners[name], cases[name].images, truth), validation.folder / f"{name}{ending}", look
                )
            except UserError as error:
                why = str(error)
        found.append(
            _Shown(
                role,
                name,
                owners[name],
                float(validation.of_cases[index]),
                tuple(map(float, validation.dice[index])),
                picture,
                why,
            )
        )
    return found


def _verdict(training: Training, label: str, compared: Sequence[tuple[str, Training, Paired | None]]) -> str:
    validation, curves = training.validation, training.curves
    if validation is None:
        assert curves is not None
        state = "is finished and not validated" if training.finished else "is not finished"
        return f"{label} {state}: {_epochs(curves.num_epochs)}, moving average of the pseudo Dice {curves.ema[-1]:.4f}."
    mean = validation.mean_of_classes
    many = "1 case" if len(validation.cases) == 1 else f"{len(validation.cases)} cases"
    if math.isnan(mean):
        return f"{label} has no validation Dice: neither the truth nor the prediction of {many} of fold {training.fold} has any class."
    sentences = [f"{label} reaches a mean validation Dice of {mean:.4f} on {many} of fold {training.fold}."]
    for name, _, paired in compared:
        if paired is None:
            continue
        gain, low, high = (100 * v for v in (paired.compared.gain, paired.compared.low, paired.compared.high))
        against = (
            f"{abs(gain):.2f} Dice points {'more' if gain > 0 else 'less'} than {name}"
            if gain
            else f"as much as {name}"
        )
        both = (
            "That"
            if paired.num_cases == len(validation.cases)
            else f"On the {paired.num_cases} cases that both have, it"
        )
        if math.isnan(low):
            sentences.append(f"{both} is {against}, on too few patients for an interval.")
        elif paired.compared.is_undecided:
            sentences.append(
                f"{both} is {against}, 95 % interval {low:+.2f} to {high:+.2f}: these cases cannot tell the two apart."
            )
        else:
            sentences.append(f"{both} is {against}, 95 % interval {low:+.2f} to {high:+.2f}.")
    return " ".join(sentences)


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


def _warnings(
    training: Training,
    labels: Sequence[str],
    others: Sequence[Training],
    paired: Sequence[Paired | None],
    shown: Sequence[_Shown],
) -> list[str]:
    warnings = []
    for label, run in zip(labels, (training, *others), strict=True):
        if not run.finished:
            warnings.append(f"{label} is not finished: {_epochs(run.num_epochs)} so far.")
        elif run.validation is None:
            warnings.append(f"{label} was not validated: nnUNetv2_train with --val does it.")
        if run.curves is None:
            warnings.append(f"{label} left no curves: no checkpoint and no log of it can be read.")
        warnings += [f"{label}: {note}" for note in run.notes]
    for label, other, difference in zip(labels[1:], others, paired, strict=True):
        if training.curves and other.curves and other.num_epochs != training.num_epochs:
            warnings.append(
                f"{label} had {_epochs(other.num_epochs)}, {labels[0]} {training.num_epochs}: what differs is not the start alone."
            )
        if other.iterations is not None and training.iterations is not None and other.iterations != training.iterations:
            warnings.append(
                f"{label} had {other.iterations} iterations per epoch, {labels[0]} {training.iterations}: what differs is not the start alone."
            )
        if len({t.record.get("encoder") for t in (training, other) if t.record}) > 1:
            warnings.append(
                f"{label} is a network of another encoder than {labels[0]}: what differs is not the start alone."
            )
        if unlike := _unlike_recipes(training, other):
            warnings.append(
                f"{label} learned by another recipe than {labels[0]} ({listed(unlike)}): what differs is not the start alone."
            )
        if other.batch != training.batch:
            warnings.append(
                f"{label} was trained on other patches or batches ({other.batch}) than {labels[0]} ({training.batch})."
            )
        mine, theirs = training.validation, other.validation
        if mine is not None and theirs is not None:
            if difference is None:
                warnings.append(f"{label} was validated on other cases or classes, so it is not compared.")
            elif set(mine.cases) != set(theirs.cases):
                warnings.append(
                    f"{label} was not validated on the same cases: the difference is on the {difference.num_cases} that both have."
                )
            if set(mine.classes) != set(theirs.classes):
                warnings.append(f"{label} was validated on other classes: the difference is on those that both have.")
    validation = training.validation
    if validation is not None:
        if training.fold == "all":
            warnings.append(
                "Fold all is validated on the cases that it was trained on: its Dice says nothing of other patients."
            )
        if (training.record or {}).get("fold") == "all":
            warnings.append("The selection looked at labels of validation cases, so Dice on them is a little too good.")
        names = class_names(validation.classes, training.dataset.get("labels", {}))
        absent = [n for n, value in zip(names, validation.of_classes, strict=True) if np.isnan(value)]
        if absent:
            warnings.append(
                f"No validation case has {listed(absent)}, and nothing was predicted as such: it does not count in the mean."
            )
        empty = [c for c, value in zip(validation.cases, validation.of_cases, strict=True) if np.isnan(value)]
        if empty:
            warnings.append(
                f"{len(empty)} cases have no foreground, nor were they given any, so they have no Dice ({listed(empty)})."
            )
        problems = {s.problem for s in shown if s.picture is None}
        if len(problems) == 1 and all(s.picture is None for s in shown):
            warnings.append(f"No pictures of cases: {problems.pop()}")
        else:
            warnings += [f"No picture of the {s.role} case {s.case}: {s.problem}" for s in shown if s.picture is None]
        number = min((p.num_patients for p in paired if p is not None), default=None)
        if number is not None and number < FEWEST_PATIENTS:
            warnings.append(f"Only {number} patients were validated on, too few for an interval.")
        elif number is not None and number < FEW_PATIENTS:
            warnings.append(f"Only {number} patients were validated on: intervals from so few are rough.")
    return warnings


def _unlike_recipes(training: Training, other: Training) -> list[str]:
    """Hyper-parameters that differ, but for those that every training from random weights has; none where they are not recorded."""
    mine, theirs = ((t.record or {}).get(RECIPE_KEY) or {} for t in (training, other))
    unlike = [k for k in mine if k in theirs and mine[k] != theirs[k]]
    if unlike and any(t.trainer.startswith(YARDSTICKS[0]) for t in (training, other)):
        from mtl_nnunet.variants import MTLTrainerScratch

        unlike = [k for k in unlike if k not in MTLTrainerScratch.fixed]
    return [f"{k} {theirs[k]}, not {mine[k]}" for k in unlike]


def _draw(
    folder: Path, stem: str, everyone: Sequence[Training], labels: Sequence[str], shown: Sequence[_Shown], look: Look
) -> dict[str, Any]:
    figures: dict[str, Any] = {"curves": None}
    known = [(label, t.curves) for label, t in zip(labels, everyone, strict=True) if t.curves is not None]
    if known:
        own = everyone[0]
        title = f"{own.dataset_name}, {own.configuration}, fold {own.fold}"
        svg = write_figure(draw_curves(known, title), folder, f"{stem}_curves")
        ends = "; ".join(
            f"{label}: {_epochs(c.num_epochs)}, moving average of the pseudo Dice {c.ema[-1]:.4f}" for label, c in known
        )
        figures["curves"] = figure_in_page(
            svg,
            "curves",
            "Losses, pseudo Dice and learning rate over the epochs",
            f"{ends}. The tables below have the numbers.",
        )
    drawn = [s for s in shown if s.picture is not None]
    labels_shown = _labels_shown(shown)
    if drawn:
        rows = []
        for s in drawn:
            assert s.picture is not None
            *above, last = s.picture.rows
            rows += [("", row) for row in above]
            rows.append((f"{s.role}: {s.case}, slice {s.picture.position}, Dice {s.dice:.3f}", last))
        legend = [
            *class_colours(look, labels_shown),
            *((f"differences: {name}", colour) for name, colour in difference_colours(look)),
        ]
        write_figure(draw_slices(rows, legend), folder, f"{stem}_cases")
    return figures


def _labels_shown(shown: Sequence[_Shown]) -> set[int]:
    return {label for s in shown if s.picture is not None for label in s.picture.labels}


def _class_means(everyone: Sequence[Training], look: Look) -> list[tuple[str, list[float]]]:
    """Mean Dice of each class in each training; the classes are those of the first that was validated."""
    first = next((t.validation for t in everyone if t.validation), None)
    if first is None:
        return []
    rows = []
    for key, name in zip(first.classes, class_names(first.classes, look.labels), strict=True):
        values = []
        for training in everyone:
            validation = training.validation
            there = validation is not None and key in validation.classes
            values.append(
                float(validation.of_classes[validation.classes.index(key)]) if validation and there else math.nan
            )
        rows.append((name, values))
    return rows


def _all_cases(everyone: Sequence[Training], owners: dict[str, str]) -> list[tuple[str, str, list[float]]]:
    """Mean Dice of each case in each training, the worst of the first one on top."""
    known = [
        dict(zip(t.validation.cases, map(float, t.validation.of_cases), strict=True)) if t.validation else {}
        for t in everyone
    ]
    rows = [(case, patient, [of.get(case, math.nan) for of in known]) for case, patient in owners.items()]
    return sorted(rows, key=lambda row: (math.isnan(row[2][0]), row[2][0], row[0]))


def _content(
    training: Training,
    everyone: Sequence[Training],
    labels: Sequence[str],
    paired: Sequence[Paired | None],
    shown: Sequence[_Shown],
    command: str,
    warnings: Sequence[str],
    verdict: str,
    table: str | None,
) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    content: dict[str, Any] = _plain(
        {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "dataset": training.dataset_name,
            "configuration": training.configuration,
            "fold": training.fold,
            "verdict": verdict,
            "warnings": list(warnings),
            "selection": training.record,
            "patients": table,
            "trainings": [_run(label, t) for label, t in zip(labels, everyone, strict=True)],
            "differences": [
                None
                if p is None
                else {"against": label, **{k: v for k, v in asdict(p).items() if k != "compared"}, **asdict(p.compared)}
                for label, p in zip(labels[1:], paired, strict=True)
            ],
            "cases": [
                {
                    "case": s.case,
                    "patient": s.patient,
                    "is": s.role,
                    "slice": None if s.picture is None else s.picture.position,
                    "problem": s.problem or None,
                }
                for s in shown
            ],
            "versions": {"mtl-nnunet": __version__, **versions},
        }
    )
    return content


def _run(label: str, training: Training) -> dict[str, Any]:
    curves, validation = training.curves, training.validation
    names = [] if validation is None else class_names(validation.classes, training.dataset.get("labels", {}))
    return {
        "label": label,
        "model": str(training.model),
        "finished": training.finished,
        "epochs": training.num_epochs,
        "iterations_per_epoch": training.iterations,
        "patch_and_batch": training.batch,
        "curves": None if curves is None else asdict(curves),
        "validation": None
        if validation is None
        else {
            "mean_dice": validation.mean,
            "of_classes": dict(zip(names, validation.of_classes, strict=True)),
            "of_cases": {
                case: {"mean": mean, **dict(zip(names, row, strict=True))}
                for case, mean, row in zip(validation.cases, validation.of_cases, validation.dice, strict=True)
            },
        },
    }


def _plain(value: Any) -> Any:
    """As JSON can have it: what is no number is null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value

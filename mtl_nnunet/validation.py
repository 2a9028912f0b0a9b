"""nnU-Net's validation of a fold: Dice of each case, which cases to look at, and paired comparisons of trainings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.bootstrap import BOOTSTRAP_DRAWS, Comparison, bootstrap_draws, compare
from mtl_nnunet.errors import UserError


@dataclass(frozen=True)
class Validation:
    """Dice of every class of every case.

    Attributes:
        folder: With the predictions.
        cases: Names, sorted.
        classes: Labels or regions as nnU-Net writes them: ``1``, ``(1, 2)``.
        dice: Shape (N, K), 0 to 1; NaN where nnU-Net defines none, since neither truth nor prediction has the class.
        mean: nnU-Net's mean over classes of the mean over cases; NaN where a class occurs in no case.
    """

    folder: Path
    cases: tuple[str, ...]
    classes: tuple[str, ...]
    dice: np.ndarray
    mean: float

    @property
    def of_cases(self) -> np.ndarray:
        """Mean of each case over the classes that it has, shape (N,)."""
        return _mean(self.dice, axis=1)

    @property
    def mean_of_classes(self) -> float:
        """nnU-Net's mean over the classes that occur; NaN where none does."""
        return float(_mean(self.of_classes, axis=0))

    @property
    def of_classes(self) -> np.ndarray:
        """Mean of each class over the cases that have it, shape (K,), as nnU-Net's."""
        return _mean(self.dice, axis=0)


@dataclass(frozen=True)
class Paired:
    """Two trainings on the cases that both were validated on.

    Attributes:
        num_cases: How many cases.
        num_patients: Of how many patients.
        own: nnU-Net's mean Dice of the first on them, over the classes that occur.
        other: That of the second.
        compared: Their difference, with a bootstrap interval over patients; the same patients for both.
        better: On how many cases the first has the higher mean.
        equal: On how many both have the same.
        worse: On how many the second has the higher mean.
    """

    num_cases: int
    num_patients: int
    own: float
    other: float
    compared: Comparison
    better: int
    equal: int
    worse: int


def read_validation(summary: Path, file_ending: str) -> Validation:
    """What nnU-Net wrote of a fold's validation.

    Args:
        summary: ``fold_X/validation/summary.json``.
        file_ending: Of the dataset's files.

    Raises:
        UserError: The file cannot be read, or is not what nnU-Net v2 writes.
    """
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
        measured: dict[str, dict[str, float]] = {}
        for entry in content["metric_per_case"]:
            path = entry["prediction_file"]
            # where it was written may have been Windows
            name = path.rpartition("/" if "/" in path else "\\")[2].removesuffix(file_ending)
            measured[name] = {k: float(v["Dice"]) for k, v in entry["metrics"].items() if k != "0"}
        cases = tuple(sorted(measured))
        classes = tuple(measured[cases[0]])
        dice = np.array([[measured[case][key] for key in classes] for case in cases], dtype=float)
        mean = float(content["foreground_mean"]["Dice"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{summary} is not what nnU-Net v2 writes after a validation ({error!r}). Validate again: nnUNetv2_train with --val."
        ) from error
    return Validation(summary.parent, cases, classes, dice, mean)


def cases_to_look_at(validation: Validation) -> list[tuple[str, int]]:
    """The cases of worst, median and best mean Dice, with what each is; equal ones go by name.

    Of an even number the worse of the two middle ones is the median. Fewer than three cases are the worst and the best, or the only one.

    Returns:
        Pairs of ``worst``, ``median``, ``best`` or ``only``, and the case's index; none without a Dice.

    Examples:
        >>> dice = np.array([[0.9], [0.5], [np.nan], [0.7], [0.6]])
        >>> cases_to_look_at(Validation(Path(), tuple("abcde"), ("1",), dice, 0.675))
        [('worst', 1), ('median', 4), ('best', 0)]
    """
    means = validation.of_cases
    ordered = sorted(
        (i for i in range(len(means)) if not np.isnan(means[i])), key=lambda i: (means[i], validation.cases[i])
    )
    if len(ordered) < 2:
        return [("only", i) for i in ordered]
    middle = [("median", ordered[(len(ordered) - 1) // 2])] if len(ordered) > 2 else []
    return [("worst", ordered[0]), *middle, ("best", ordered[-1])]


def pair(own: Validation, other: Validation, patients: Mapping[str, str], seed: int = 0) -> Paired | None:
    """The difference of two trainings in nnU-Net's mean Dice, on the cases that both have.

        d = mean_k [ mean_i dice_own(i, k) ] - mean_k [ mean_i dice_other(i, k) ]

    over the classes k that occur in both and, of each, the cases i where it is defined. Where every class of every case is, this is the mean
    of the differences of the cases. The interval is of 2000 draws of patients with replacement, the same for both.

    Args:
        own: The first training.
        other: The second.
        patients: Of each case.
        seed: Of the draws.

    Returns:
        None where they share no case or no class that is defined.
    """
    places = [{case: i for i, case in enumerate(v.cases)} for v in (own, other)]
    shared = [c for c in own.cases if c in places[1]]
    classes = [k for k in own.classes if k in other.classes]
    if not shared or not classes:
        return None
    both = [
        v.dice[np.ix_([place[c] for c in shared], [v.classes.index(k) for k in classes])]
        for v, place in zip((own, other), places, strict=True)
    ]
    occurring = ~np.isnan(both[0]).all(0) & ~np.isnan(both[1]).all(0)
    if not occurring.any():
        return None
    mine, others = (d[:, occurring] for d in both)
    owners = sorted({patients[c] for c in shared})
    draws = bootstrap_draws(len(owners), BOOTSTRAP_DRAWS, seed)
    # every case of a patient is drawn with that patient
    column = {patient: i for i, patient in enumerate(owners)}
    weights = draws[:, [column[patients[c]] for c in shared]]
    whole = np.ones((1, len(shared)))
    value, other_value = (float(_weighted_mean(d, whole)[0]) for d in (mine, others))
    compared = compare(value, _weighted_mean(mine, weights), other_value, _weighted_mean(others, weights), len(owners))
    first, second = _mean(mine, axis=1), _mean(others, axis=1)
    return Paired(
        num_cases=len(shared),
        num_patients=len(owners),
        own=value,
        other=other_value,
        compared=compared,
        better=int((first > second).sum()),
        equal=int((first == second).sum()),
        worse=int((first < second).sum()),
    )


def class_names(classes: Sequence[str], labels: Mapping[str, Any]) -> list[str]:
    """Names of nnU-Net's labels and regions.

    Args:
        classes: As a summary has them.
        labels: Of dataset.json: names to a label, or to a list of labels that are a region.

    Examples:
        >>> class_names(["1", "(1, 2)", "3"], {"background": 0, "core": 1, "whole": [1, 2]})
        ['core', 'whole', 'label 3']
    """
    known: dict[tuple[int, ...], str] = {}
    for name, label in labels.items():
        values = label if isinstance(label, (list, tuple)) else [label]
        known.setdefault(tuple(values), str(name))
    found = []
    for key in classes:
        values = tuple(int(n) for n in re.findall(r"\d+", key))
        found.append(known.get(values, f"{'region' if len(values) > 1 else 'label'} {key}"))
    return found


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.where(known, values, 0).sum(axis) / known.sum(axis)
    return found


def _weighted_mean(dice: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over classes of the weighted mean over cases, shape (B,); NaN for a draw in which a class does not occur.

    Args:
        dice: Shape (N, K).
        weights: How often each case counts, shape (B, N).
    """
    known = ~np.isnan(dice)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = ((weights @ np.where(known, dice, 0)) / (weights @ known)).mean(1)
    return found

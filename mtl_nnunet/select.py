"""The whole choice as one function: dataset and run in, ranking and files out."""

from __future__ import annotations

import operator
import os
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl_nnunet.cache import ResultCache
from mtl_nnunet.cases import Dataset, find_image_folder, find_nnunet_dataset, without_validation_cases
from mtl_nnunet.checkpoints import Checkpoint, architecture_of, find_checkpoints, runs_of
from mtl_nnunet.chooser import read_chooser
from mtl_nnunet.decision import Rule, default_rule, parse_rule
from mtl_nnunet.embedding import views_wanted
from mtl_nnunet.errors import AssumedWarning, UserError, listed
from mtl_nnunet.html_report import Cost
from mtl_nnunet.racing import race_checkpoints
from mtl_nnunet.ranking import Ranking, rank_checkpoints
from mtl_nnunet.scores import LABELLED, Score, parse_scores
from mtl_nnunet.selection import DEFAULT_FOLDER, refuse_foreign_folder, write_selection
from mtl_nnunet.slices import Slices, gather_slices


@dataclass(frozen=True)
class Outcome:
    """What was found and where it was written.

    Attributes:
        rankings: One a score; the first one has the choice.
        dataset: The cases that could be sampled.
        slices: What was read of them.
        fold: Whose validation cases were kept out, ``all`` where labels of none were, None where no label was used.
        forwards: Share of the forwards of a full run that were made; below 1 only in a race.
        folder: Where the selection lies, or None when it was not written.
        content: Content of ``selection.json``, or None.
    """

    rankings: tuple[Ranking, ...]
    dataset: Dataset
    slices: Slices
    fold: int | str | None
    forwards: float
    folder: Path | None
    content: dict[str, Any] | None

    @property
    def ranking(self) -> Ranking:
        """The ranking that has the choice."""
        return self.rankings[0]


def select_checkpoint(
    dataset: Dataset | int | str | Path,
    checkpoints: Sequence[Checkpoint | str | Path] | str | Path,
    scores: Sequence[Score | str] | Score | str = "contrastive",
    *,
    encoder: str | None = None,
    weights: str = "default",
    output: str | Path | None = None,
    rule: Rule | str | None = None,
    chooser: str | Path | None = None,
    fold: int | str | None = None,
    num_slices: int = 256,
    num_cases: int = 64,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "auto",
    cache: ResultCache | None = None,
    race: bool = False,
    skip_bad_cases: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Outcome:
    """Score the checkpoints of a run on a dataset, choose one, and write the choice where training finds it.

    Args:
        dataset: Number or name of an nnU-Net dataset, path of an image folder or datalist (a word such as
            ``photos`` too, where there is such a folder), or a ``Dataset``.
        checkpoints: Folder of a pretraining run, its files, names of published weights (``timm:NAME``), or what
            ``find_checkpoints`` found.
        scores: The first is shown, and chooses by rule ``best``; the others are computed beside it.
        encoder: timm's name of the architecture, where the checkpoints do not say and their tensors do not tell.
        weights: Which of the weights in each file: ``default``, ``ema`` (their moving average) or ``trained``.
        output: Folder to write; None writes nothing.
        rule: ``best``, ``last``, ``non-inferior``, ``expected-loss`` (its scores are computed beside those named) or a ``Rule``.
            None: along one run ``expected-loss`` where the checkpoints state epochs, ``last`` where they state steps; of several
            runs or published weights, and in a race, ``best``.
        chooser: With ``expected-loss``: a file of ``mtl-nnunet fit-chooser``; None for the shipped one.
        fold: With scores that need labels: whose validation cases to keep out, or ``all``.
        num_slices: Slices at most.
        num_cases: Cases read at most.
        seed: Of slices, views, pixels, bootstrap and random initialisation.
        device: Where the encoder runs.
        precision: ``fp32``, ``bf16``, or ``auto``.
        cache: Where results are looked up and kept; a race neither looks nor keeps.
        race: Drop checkpoints that are clearly out on a part of the patients.
        skip_bad_cases: Go on without cases that cannot be used.
        overwrite: Replace a selection that is there.
        command: The command that repeats this, for the record.

    Raises:
        UserError: What is wrong and what to do about it; nothing was written.
    """
    chosen_scores = parse_scores(scores)
    if rule is None and (race or chooser is not None):
        rule = Rule() if race else Rule("expected-loss")
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    for name, number, least in (("num_slices", num_slices, 2), ("num_cases", num_cases, 2), ("seed", seed, 0)):
        if not least <= number < 2**32:
            raise UserError(f"{name} is {number}; it must be at least {least}.")
    if race and (len(chosen_scores) > 1 or rule != Rule() or chooser is not None):
        raise UserError("a race goes with one score and rule best: what is out early has no score on all patients.")
    labelled = any(score.labels for score in chosen_scores)
    dataset, fold = cases_to_score(dataset, chosen_scores, fold, skip_bad_cases)
    if output is not None:
        refuse_foreign_folder(output, overwrite)
    found = _found_checkpoints(checkpoints, weights)
    if rule is None:
        runs = runs_of(found)
        rule = default_rule([c.epoch for c in found], [c.step for c in found], len(runs))
        if len(runs) > 1:
            warnings.warn(
                f"the checkpoints are taken as of {len(runs)} runs ({listed([str(r) for r in runs])}), among which the best score chooses. If "
                "they are of one, put them into one folder and pass that.",
                AssumedWarning,
                stacklevel=2,
            )
    if chooser is not None:
        if rule.name != "expected-loss":
            raise UserError(
                f"a chooser goes with rule expected-loss, and here the rule is {rule.name}. Leave -chooser out."
            )
        rule = replace(rule, chooser=Path(chooser))
    if rule.name == "expected-loss":
        chosen_scores += scores_of_the_chooser(rule.state, chosen_scores, rule.chooser)
    encoder = encoder or next((c.architecture for c in found if c.architecture), None) or architecture_of(found[-1])
    started = time.perf_counter()
    slices = gather_slices(dataset, num_slices, num_cases, seed, with_labels=labelled, skip_bad_cases=skip_bad_cases)
    read = time.perf_counter()
    forwards = 1.0
    if race:
        raced, forwards = race_checkpoints(found, encoder, slices, chosen_scores[0], seed, device, precision)
        rankings: tuple[Ranking, ...] = (raced,)
    else:
        rankings = rank_checkpoints(found, encoder, slices, chosen_scores, seed, device, rule, cache, precision)
    content = None
    if output is not None:
        all_forwards = len(slices.images) * (len(found) + 1) * _num_views([r.score for r in rankings])
        cost = Cost(
            seconds_reading=read - started,
            seconds_scoring=time.perf_counter() - read,
            forwards=round(forwards * all_forwards) if race else len(slices.images) * _views_run(rankings),
            all_forwards=all_forwards,
            raced=race,
            device=device,
        )
        content = write_selection(output, rankings, dataset, slices, seed, command, overwrite, fold, cost)
    return Outcome(rankings, dataset, slices, fold, forwards, Path(output) if output is not None else None, content)


def cases_to_score(
    dataset: Dataset | int | str | Path,
    scores: Sequence[Score],
    fold: int | str | None = None,
    skip_bad_cases: bool = False,
) -> tuple[Dataset, int | str | None]:
    """The cases that scores may see, and whose validation cases were kept out of them.

    Args:
        dataset: As for ``select_checkpoint``.
        scores: To be computed.
        fold: With scores that need labels: whose validation cases to keep out, or ``all``.
        skip_bad_cases: Go on without cases that cannot be used.

    Returns:
        Dataset, and fold: ``all`` where labels of none were kept out, None where no score needs labels.

    Raises:
        UserError: No such dataset, or a fold that cannot be kept out.
    """
    fold = parsed_fold(fold)
    labelled = any(score.labels for score in scores)
    if fold is not None and not labelled:
        raise UserError(
            "-f keeps labels of validation cases out, and no score here uses labels. Choose a score that does "
            f"({listed(LABELLED, len(LABELLED))}), or leave -f out."
        )
    fold = "all" if labelled and fold is None else fold
    found = _found(dataset, skip_bad_cases)
    if found.without_fold is not None and fold not in (None, "all", found.without_fold):
        raise UserError(f"fold is {fold}, and the validation cases of fold {found.without_fold} are left out already.")
    return _training_cases(found, fold) if isinstance(fold, int) and found.without_fold is None else found, fold


def scores_of_the_chooser(state: str, there: Sequence[Score], chooser: Path | None = None) -> list[Score]:
    """What the chooser reads of encoders of this state and was not asked for; labels are not read for its sake."""
    known = read_chooser(chooser).states.get(state)
    texts = {s.text for s in there if s.has_default_views}
    labelled = any(s.labels for s in there)
    try:
        read = parse_scores(known.evidence.scores) if known and known.evidence else []
    except UserError as error:
        raise UserError(
            f"chooser {chooser or 'that is shipped'} goes by scores that cannot be computed here: {error} Fit one without them "
            "(mtl-nnunet fit-chooser -use), or pass their values from Python: mtl_nnunet.chooser.choose_by_expected_loss."
        ) from error
    return [s for s in read if s.text not in texts and (labelled or not s.labels)]


def default_output(dataset_name: str, fold: int | str | None = None) -> Path:
    """Where training looks for the selection of a dataset; that of one fold lies beside it under its own name.

    Raises:
        UserError: ``nnUNet_preprocessed`` is not set.
    """
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if not preprocessed:
        raise UserError(
            "the environment variable nnUNet_preprocessed is not set. Set it as nnU-Net's documentation says, or pass -o FOLDER."
        )
    name = f"{DEFAULT_FOLDER}_fold_{fold}" if isinstance(fold, int) else DEFAULT_FOLDER
    return Path(preprocessed) / dataset_name / name


def _num_views(scores: Sequence[Score]) -> int:
    """How many views of each slice an encoder sees."""
    return sum(views_wanted(scores).values())


def _views_run(rankings: Sequence[Ranking]) -> int:
    return max(r.num_run for r in rankings) * _num_views([r.score for r in rankings if r.num_run])


def _found(dataset: Dataset | int | str | Path, skip_bad_cases: bool) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    if isinstance(dataset, Path) or (isinstance(dataset, str) and _is_path(dataset)):
        return find_image_folder(dataset, skip_bad_cases=skip_bad_cases)
    return find_nnunet_dataset(dataset, skip_bad_cases)


def _is_path(text: str) -> bool:
    """A word that may be a number or name of an nnU-Net dataset is one."""
    if os.sep in text:
        return True
    there = Path(text).is_dir() or (text.endswith(".json") and Path(text).is_file())
    return there and not text.isdecimal() and re.match(r"Dataset\d{3}_", text) is None


def parsed_fold(fold: Any) -> int | str | None:
    """A fold as it was passed: a number, ``all`` or None.

    Raises:
        UserError: It is something else.
    """
    if fold is None:
        return None
    if fold == "all":
        return "all"
    try:
        return int(fold) if isinstance(fold, str) else operator.index(fold)
    except (TypeError, ValueError):
        raise UserError(f"fold is {fold!r}; it must be a number from 0, 'all' or None.") from None


def _found_checkpoints(checkpoints: Sequence[Checkpoint | str | Path] | str | Path, weights: str) -> list[Checkpoint]:
    named = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    found = [c for c in named if isinstance(c, Checkpoint)]
    paths = [c for c in named if not isinstance(c, Checkpoint)]
    if paths and found:
        raise UserError("checkpoints are given both as found and as paths. Pass one kind.")
    if not named:
        raise UserError("no checkpoint is given. Pass a run's folder, its files, or what find_checkpoints found.")
    return found or find_checkpoints(paths, weights)


def _training_cases(dataset: Dataset, fold: int) -> Dataset:
    if dataset.reader == "monai":
        raise UserError(f"-f {fold} goes by nnU-Net's split, which only a dataset of -d has. Pass -f all, or -d.")
    preprocessed = os.environ.get("nnUNet_preprocessed")
    return without_validation_cases(dataset, fold, Path(preprocessed) / dataset.name if preprocessed else None)

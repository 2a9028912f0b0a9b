"""Choose a checkpoint from a config."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtl_nnunet.cache import ResultCache, default_folder
from mtl_nnunet.cases import find_dataset_folder
from mtl_nnunet.components.data import split_cases, with_own_patients
from mtl_nnunet.errors import UserError
from mtl_nnunet.select import Outcome, parsed_fold, select_checkpoint

logger = logging.getLogger(__name__)


def select(
    dataset_dir: str | Path,
    output: str | Path,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    encoder: str | None = None,
    scores: str | Sequence[str] = "contrastive",
    patients: str | Path | None = None,
    fold: int | str | None = None,
    cache: bool = True,
    device: Any = "cpu",
    **options: Any,
) -> Outcome:
    """Score checkpoints on a dataset, choose one, write the selection and print the ranking.

    Args:
        dataset_dir: Folder of an nnU-Net raw dataset, or of a Decathlon/MONAI datalist.
        output: Folder of the selection.
        checkpoints: Folder of a pretraining run, its files, or published weights (``timm:NAME``); None takes what timm publishes of
            the encoder.
        encoder: timm's name, where the checkpoints do not say.
        scores: The first one is shown; see ``mtl_nnunet.select_checkpoint``.
        patients: Table ``case,patient``; None takes ``patients.csv`` of the folder if it is there.
        fold: With scores that need labels: whose validation cases to keep out, by the split of ``split_cases``, or ``all``.
        cache: Look results up, and keep them.
        device: Where the encoder runs.
        options: Further ones of ``mtl_nnunet.select_checkpoint``, such as ``rule`` or ``num_slices``.

    Raises:
        UserError: What is wrong and what to do about it; nothing was written.
    """
    from mtl_nnunet.report import all_warnings, budget_text, comparison_text, ranking_text

    if checkpoints is None and encoder is None:
        raise UserError(
            "there are no checkpoints to choose from. Pass --checkpoints FOLDER of a pretraining run, or --encoder#name NAME for what "
            "timm publishes of that network."
        )
    if Path(output).exists() and not options.get("overwrite"):
        raise UserError(f"{output} exists already. Pass --overwrite True to replace it, or --encoder#selection FOLDER.")
    dataset, fold = with_own_patients(find_dataset_folder(dataset_dir), dataset_dir, patients), parsed_fold(fold)
    if isinstance(fold, int):
        # not nnU-Net's split, which goes by cases: what training of the bundle is measured on must not be seen here
        learnt = {str(entry["label"]) for entry in split_cases(dataset_dir, fold, patients).training}
        dataset = replace(dataset, cases=tuple(c for c in dataset.cases if str(c.label) in learnt), without_fold=fold)
    outcome = select_checkpoint(
        dataset,
        f"timm:{encoder}" if checkpoints is None else checkpoints,
        scores,
        encoder=encoder,
        output=output,
        fold=fold,
        device=str(device),
        cache=ResultCache(default_folder()) if cache else None,
        command=_command(),
        **options,
    )
    for warning in all_warnings(outcome.ranking, outcome.dataset, outcome.slices, outcome.fold):
        logger.warning(warning)
    texts = [ranking_text(outcome.ranking), comparison_text(outcome.ranking), budget_text(outcome.ranking)]
    print("\n".join(text for text in texts if text))
    print(f"written: {output}")
    return outcome


def _command() -> list[str]:
    """What was typed, where MONAI's command line runs the config."""
    program = Path(sys.argv[0])
    is_monais = program.parts[-3:] == ("monai", "bundle", "__main__.py")
    return ["python", "-m", "monai.bundle", *map(shlex.quote, sys.argv[1:])] if is_monais else []

"""The choice as files: written whole by the scorer, verified when training reads it again."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mtl_nnunet import __version__
from mtl_nnunet.bootstrap import INTERVAL
from mtl_nnunet.budget import budgets_of
from mtl_nnunet.cases import Dataset
from mtl_nnunet.checkpoints import Published, read_contents
from mtl_nnunet.chooser import SHIPPED
from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.figures import FIGURES
from mtl_nnunet.files import folder_written_atomically, sha256, to_json, write_text
from mtl_nnunet.ranking import RankedCheckpoint, Ranking
from mtl_nnunet.scores import Score
from mtl_nnunet.slices import Slices

if TYPE_CHECKING:
    from mtl_nnunet.html_report import Cost

SCHEMA_VERSION = 1
SELECTION_FILE = "selection.json"
ENCODER_FILE = "encoder.safetensors"
TABLE_FILE, REPORT_FILE = "ranking.csv", "report.html"
# the figures that a choice can have
FILES = (
    *(SELECTION_FILE, ENCODER_FILE, TABLE_FILE, REPORT_FILE),
    *(f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")),
)
# pictures of trainings that started from it, which go when it does
TRAINING_FILES = re.compile(r"training_.+__.+__.+_fold_(\d+|all)(\.html|_(curves|cases)\.(png|svg))")
# of folders that were looked into
LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")
DEFAULT_FOLDER = "mtl_selection"
PACKAGES = ("torch", "timm", "monai", "nnunetv2", "numpy", "scipy", "SimpleITK")


@dataclass(frozen=True)
class Selection:
    """What training needs to know of a choice.

    Attributes:
        folder: Where it lies.
        encoder: timm's name of the architecture.
        input_channels: Channels of the dataset it was made for.
        encoder_sha256: Hash of ``encoder.safetensors``; it is what tells one selection from another.
        checkpoint: File name of the chosen checkpoint.
        checkpoint_sha256: Hash of that file.
        epoch: Its pretraining epoch, or None where the run did not say.
        dataset: Name of the dataset it was chosen on.
        score: Name, parameters and value of the score.
        created_with: Version of mtl-nnunet that wrote it.
        fold: Whose validation cases were kept out where labels were used, ``all`` where none were, None where no label
            was looked at.
        licence: Of published weights, where it is stated.
        published: Name and revision of published weights, or None for a run of one's own.
        weights: Which of the checkpoint's weights: ``default``, ``ema`` or ``trained``.
    """

    folder: Path
    encoder: str
    input_channels: int
    encoder_sha256: str
    checkpoint: str
    checkpoint_sha256: str
    epoch: int | None
    dataset: str
    score: dict[str, Any]
    created_with: str
    fold: int | str | None = None
    licence: str | None = None
    published: str | None = None
    weights: str = "default"

    @property
    def caution(self) -> str | None:
        """What the licence of the published weights says to whoever earns money, as far as its name tells."""
        return Published("", "", None, self.licence).caution

    def record(self) -> dict[str, Any]:
        """Everything but the folder, as it goes into the plans and every model trained from it."""
        return {k: v for k, v in asdict(self).items() if k != "folder"}

    @property
    def summary(self) -> str:
        """One line for logs."""
        epoch = "epoch not stated" if self.epoch is None else f"epoch {self.epoch}"
        if self.published is not None:
            epoch = f"{self.published}, licence {self.licence or 'not stated'}"
        if self.weights != "default":
            epoch += f", {self.weights} weights"
        return (
            f"{self.encoder} from checkpoint {self.checkpoint} ({epoch}, SHA-256 {self.checkpoint_sha256[:12]}), "
            f"encoder.safetensors SHA-256 {self.encoder_sha256[:12]}"
        )


def write_selection(
    folder: str | Path,
    rankings: Sequence[Ranking],
    dataset: Dataset,
    slices: Slices,
    seed: int,
    command: Sequence[str],
    overwrite: bool = False,
    fold: int | str | None = None,
    cost: Cost | None = None,
) -> dict[str, Any]:
    """Write ``selection.json``, ``encoder.safetensors``, ``ranking.csv``, the figures and ``report.html``, all or nothing.

    Args:
        folder: Where to; its parents are made.
        rankings: What was found; the first one has the choice.
        dataset: On which dataset.
        slices: On which slices.
        seed: Seed of the run.
        command: The command that repeats it.
        overwrite: Replace a selection that is there.
        fold: Whose validation cases were kept out where labels were used, or ``all``.
        cost: Of the scoring, for the report; it is no part of ``selection.json``, whose bytes repeat.

    Returns:
        The content of ``selection.json``.

    Raises:
        UserError: The folder exists, is not a selection, or cannot be written.
    """
    from mtl_nnunet.html_report import write_report
    from mtl_nnunet.report import all_warnings, ranking_table

    refuse_foreign_folder(folder, overwrite)
    with folder_written_atomically(folder, overwrite) as temporary:
        not_loaded = _write_encoder(temporary / ENCODER_FILE, rankings[0], len(dataset.channel_names))
        encoder = {
            "name": rankings[0].encoder,
            "file": ENCODER_FILE,
            "sha256": sha256(temporary / ENCODER_FILE),
            "not_loaded": not_loaded,
        }
        content = _content(rankings, dataset, slices, seed, command, encoder, fold)
        write_text(temporary / SELECTION_FILE, to_json(content))
        write_text(temporary / TABLE_FILE, ranking_table(rankings))
        write_report(
            temporary,
            content,
            rankings,
            dataset,
            slices,
            all_warnings(rankings[0], dataset, slices, fold),
            next_commands(dataset, folder, fold, cost.device if cost else None, rankings[0].rule.state),
            cost,
        )
    return content


def next_commands(
    dataset: Dataset,
    folder: str | Path,
    fold: int | str | None = None,
    device: str | None = None,
    state: str = "free",
) -> list[str]:
    """What to type after a selection; nothing where the dataset is not one of nnU-Net's.

    Args:
        dataset: It was made on.
        folder: Where it lies.
        fold: Whose validation cases were kept out of it.
        device: To train on; None or ``cuda`` is nnU-Net's own.
        state: For an encoder that is trained, ``free``, or not, ``frozen``, it was chosen.
    """
    if dataset.reader == "monai" or not re.match(r"Dataset\d{3}_", dataset.name):
        return []
    number, of_fold = int(dataset.name[7:10]), isinstance(fold, int)
    on_device = "" if device in (None, "cuda") else f" -device {device}"
    trainer = "MTLTrainerFrozenEncoder" if state == "frozen" else "MTLTrainer"
    train = f"nnUNetv2_train {number} 2d {fold if of_fold else 0} -tr {trainer}"
    lines = [f"nnUNetv2_plan_and_preprocess -d {number} -c 2d"]
    own = Path(os.environ.get("nnUNet_preprocessed", ""), dataset.name, DEFAULT_FOLDER)
    if of_fold or Path(folder).resolve() != own.resolve():
        # training finds only the dataset's own selection by itself
        plans = f"nnUNetPlans_mtl_fold_{fold}" if of_fold else "nnUNetPlans_mtl"
        lines.append(f"mtl-nnunet plans -d {number} -selection {shlex.quote(os.path.abspath(folder))} -o {plans}")
        lines.append(f"{train} -p {plans}{on_device}")
    else:
        lines.append(f"{train}{on_device}")
    return lines


def read_selection(folder: str | Path) -> Selection:
    """Read a selection and verify that its encoder is the one that was chosen.

    Raises:
        UserError: No selection there, one of another version, or an encoder file that is gone or was altered.
    """
    folder = Path(folder)
    path = folder / SELECTION_FILE
    if not path.is_file():
        of_folds = sorted(f.parent.name for f in folder.parent.glob(f"{folder.name}_fold_*/{SELECTION_FILE}"))
        there = (
            f" There is {listed(of_folds)}, for single folds: mtl-nnunet plans -selection makes plans that start from it."
            if of_folds
            else ""
        )
        raise UserError(f"no selection in {folder}. Run mtl-select-checkpoint for this dataset first.{there}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {version}, this mtl-nnunet {__version__} reads {SCHEMA_VERSION}. Select again."
            )
        chosen = content["choice"]
        selection = Selection(
            folder=folder,
            encoder=content["encoder"]["name"],
            input_channels=len(content["dataset"]["channel_names"]),
            encoder_sha256=content["encoder"]["sha256"],
            checkpoint=chosen["file"],
            checkpoint_sha256=chosen["sha256"],
            epoch=chosen["epoch"],
            dataset=content["dataset"]["name"],
            score={**content["score"], "value": chosen["value"]},
            created_with=content["versions"]["mtl-nnunet"],
            fold=content.get("labels", {}).get("fold"),
            weights=chosen.get("weights", "default"),
            **_provenance(chosen.get("published")),
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Run mtl-select-checkpoint again with --overwrite.") from error
    encoder = folder / ENCODER_FILE
    if not encoder.is_file():
        raise UserError(
            f"{encoder} is gone, so this selection cannot be used. Run mtl-select-checkpoint again with --overwrite."
        )
    if (found := sha256(encoder)) != selection.encoder_sha256:
        raise UserError(
            f"{encoder} is not the file that was selected: SHA-256 {found[:12]}, expected {selection.encoder_sha256[:12]}. "
            "Run mtl-select-checkpoint again with --overwrite."
        )
    return selection


def load_selected_encoder(selection: Selection, encoder: TimmEncoder) -> None:
    """Load the selected weights into an encoder, strictly.

    Raises:
        UserError: The file cannot be read, or does not fit.
    """
    path = selection.folder / ENCODER_FILE
    encoder.load_weights(read_contents(path).weights, str(path))


def refuse_foreign_folder(folder: str | Path, overwrite: bool) -> None:
    """Stop before any work if the results could not be put into ``folder``.

    Raises:
        UserError: It exists and ``overwrite`` is off, or it holds something that is not a selection.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists already. Pass --overwrite to replace it, or -o another folder.")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / SELECTION_FILE).is_file())):
        raise UserError(
            f"{folder} is not a selection, so it is not overwritten. Pass -o a folder that does not exist yet."
        )
    if folder.exists() and (others := sorted(f.name for f in folder.iterdir() if not _is_ours(f.name))):
        raise UserError(
            f"{folder} holds other files than a selection's ({listed(others)}), so it is not overwritten. Move them away."
        )
    there = next(parent for parent in folder.parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror} ({there}). Choose another place.") from error


def selected_sha256(folder: Path) -> str | None:
    """Hash of the encoder that a folder's selection chose, by ``selection.json`` alone; None where there is no selection.

    Raises:
        UserError: ``selection.json`` is damaged.
    """
    path = folder / SELECTION_FILE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["encoder"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Run mtl-select-checkpoint again with --overwrite.") from error


def _is_ours(name: str) -> bool:
    return name in (*FILES, *LEFT_BY_SYSTEMS) or TRAINING_FILES.fullmatch(name) is not None


def _write_encoder(path: Path, ranking: Ranking, input_channels: int) -> list[str]:
    checkpoint = ranking.chosen.checkpoint
    assert checkpoint is not None
    encoder = TimmEncoder(ranking.encoder, input_channels)
    contents = read_contents(checkpoint.path, checkpoint.weights)
    # scoring may have stopped before the last layers: what training will load is checked here
    not_loaded = encoder.load_weights(contents.weights, str(checkpoint.path))
    weights = encoder.own_part(contents.weights)
    checkpoint.refuse_changed()
    provenance = {
        "architecture": ranking.encoder,
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": checkpoint.sha256,
        "epoch": checkpoint.epoch,
        "weights": checkpoint.weights,
    }
    # one metadata entry: safetensors writes several in no fixed order, and the file's hash must repeat
    try:
        save_file(weights, path, metadata={"mtl_nnunet": json.dumps(provenance, sort_keys=True)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return [*not_loaded, *contents.left_out]


def _content(
    rankings: Sequence[Ranking],
    dataset: Dataset,
    slices: Slices,
    seed: int,
    command: Sequence[str],
    encoder: dict[str, Any],
    fold: int | str | None,
) -> dict[str, Any]:
    ranking = rankings[0]
    used = [
        {"name": c.name, "patient": c.patient, "sha256": list(c.sha256), "num_slices": c.num_slices}
        for c in slices.used
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "seed": seed,
        "rule": ranking.rule.text,
        "choice": _entry(ranking.chosen),
        "expected_loss": None if ranking.expectation is None else _expectation(ranking),
        # first of the choice, then of the earliest checkpoint that is expected to lose little more
        "budget": [asdict(budget) for budget in budgets_of(ranking)],
        "undecided": [c.label for c in ranking.undecided],
        "score": _described(ranking.score),
        "interval": {"percentiles": list(INTERVAL), "bootstrap": "patients"},
        "checkpoints": [_entry(c) for c in ranking.checkpoints],
        "random_initialisation": _measured(ranking.random),
        "other_scores": [
            {
                "score": _described(r.score),
                "would_choose": r.chosen.label,
                "undecided": [c.label for c in r.undecided],
                "checkpoints": [{"label": c.label, **_measured(c)} for c in r.checkpoints],
                "random_initialisation": _measured(r.random),
            }
            for r in rankings[1:]
        ],
        "labels": {"used": any(r.score.labels for r in rankings), "fold": fold},
        "encoder": encoder,
        "dataset": {
            "name": dataset.name,
            "channel_names": list(dataset.channel_names),
            "reader": dataset.reader,
            "num_cases": len(dataset.cases),
            "num_patients": dataset.num_patients,
            "cases_used": used,
            "cases_skipped": [{"name": name, "reason": reason} for name, reason in slices.skipped],
        },
        "slices": {
            "shape": list(slices.images.shape),
            "axis": slices.axis,
            "spacing_mm": list(slices.spacing),
            "normalization": list(slices.normalization),
            "use_mask_for_norm": slices.use_mask_for_norm,
            "intensity_properties": slices.intensities,
        },
        "versions": {"mtl-nnunet": __version__, **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "threads": torch.get_num_threads(),
    }


def _expectation(ranking: Ranking) -> dict[str, Any]:
    """In Dice from 0 to 1, against the best of the run."""
    told = ranking.expectation
    assert told is not None
    columns = zip(told.expected_loss, told.low, told.high, told.probability_within, strict=True)
    return {
        "state": ranking.rule.state,
        "price_dice_points": ranking.rule.price,
        "scores_used": list(told.used),
        "warnings": list(told.warnings),
        "fell_back_to_last": told.fell_back,
        "checkpoints": [
            {
                "label": checkpoint.label,
                "expected_loss": _number(loss),
                "low": _number(low),
                "high": _number(high),
                "probability_within_half_a_point": _number(within),
            }
            for checkpoint, (loss, low, high, within) in zip(ranking.checkpoints, columns, strict=True)
        ],
        "chooser_sha256": sha256(ranking.rule.chooser or SHIPPED),
    }


def _entry(ranked: RankedCheckpoint) -> dict[str, Any]:
    checkpoint = ranked.checkpoint
    assert checkpoint is not None
    return {
        "file": checkpoint.path.name,
        "folder": str(checkpoint.path.parent),
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "weights": checkpoint.weights,
        "format": checkpoint.kind,
        "published": None if checkpoint.published is None else asdict(checkpoint.published),
        "sha256": checkpoint.sha256,
        **_measured(ranked),
        "logged_accuracy": checkpoint.logged_accuracy,
    }


def _provenance(published: dict[str, Any] | None) -> dict[str, str | None]:
    if published is None:
        return {}
    about = Published(**published)
    return {"licence": about.licence, "published": f"{about.name}@{about.revision}" if about.revision else about.name}


def _measured(ranked: RankedCheckpoint) -> dict[str, Any]:
    measured: dict[str, Any] = {
        "value": ranked.value,
        "low": _number(ranked.low),
        "high": _number(ranked.high),
        "levels": {str(level): value for level, value in ranked.levels.items()},
    }
    if ranked.checkpoint is not None:
        measured |= {
            "probability_of_best_score": ranked.probability_of_best_score,
            "undecided": ranked.undecided,
        }
    measured["compared_with"] = {
        name: {"gain": c.gain, "low": _number(c.low), "high": _number(c.high), "probability": _number(c.probability)}
        for name, c in ranked.compared.items()
    }
    if ranked.out_after is not None:
        measured["out_after_patients"] = ranked.out_after
    return measured


def _number(value: float) -> float | None:
    """JSON has no NaN; what does not exist is null."""
    return None if math.isnan(value) else value


def _described(score: Score) -> dict[str, Any]:
    return {
        "name": score.name,
        "parameters": score.parameters,
        "higher_is_better": score.higher_is_better,
        "labels": score.labels,
        "views": score.views,
        "num_views": score.num_views,
        "strength": score.strength,
    }

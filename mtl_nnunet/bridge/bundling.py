"""A folder of nnU-Net's results to a MONAI bundle, whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mtl_nnunet import __version__
from mtl_nnunet.bridge.describing import licence_text, metadata_of, readme_of
from mtl_nnunet.bridge.model import (
    ABOUT_FILE,
    DATASET_FILE,
    PLANS_FILE,
    RECORD_FILE,
    WEIGHTS_KEY,
    TrainedModel,
    fold_names,
    network_of,
    trainer_class,
    weights_file,
)
from mtl_nnunet.bundles import SHIPPED
from mtl_nnunet.checkpoints.file import read_pickle
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import folder_written_atomically, sha256, to_json, write_text
from mtl_nnunet.plans import RECORD_KEY

DEFAULT_CHECKPOINT = "checkpoint_final.pth"
PACKAGES = ("nnunetv2", "dynamic-network-architectures", "timm", "SimpleITK", "nibabel", "pytorch-ignite")
STOCK_TRAINER = "nnUNetTrainer"
NEEDED = ("network_weights", "init_args", "trainer_name")


def bundle_of_model(
    model_folder: str | Path,
    destination: str | Path,
    folds: int | str | Iterable[int | str] | None = None,
    checkpoint_name: str = DEFAULT_CHECKPOINT,
    overwrite: bool = False,
) -> Path:
    """Make a MONAI bundle that predicts what ``nnUNetv2_predict`` predicts with the model.

    The weights are copied without the optimiser's state. Nothing in the checkpoints is executed.

    Args:
        model_folder: ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION``, of our trainers or of nnU-Net's.
        destination: The bundle's folder, made with its parents.
        folds: Which to bundle, averaged in this order; None for all that have the checkpoint.
        checkpoint_name: nnU-Net's ``-chk``.
        overwrite: Replace a bundle that is there.

    Returns:
        The bundle's folder.

    Raises:
        UserError: No model there, a fold without the checkpoint, weights that do not fit the plans, a second stage of a
            cascade, a trainer whose network nnU-Net cannot build elsewhere, or a destination that is not ours to replace.
    """
    model_folder, destination = Path(model_folder), Path(destination).resolve()
    if destination.exists() and overwrite:
        _refuse_foreign(destination)
    plans, dataset = _descriptions(model_folder)
    chosen = _folds_there(model_folder, folds, checkpoint_name)
    files = [model_folder / f"fold_{fold}" / checkpoint_name for fold in chosen]
    checkpoints = [_checkpoint(file) for file in files]
    first = checkpoints[0]
    trained_with = plans.get(RECORD_KEY, {}).get("trainer", first["trainer_name"])
    axes = first.get("inference_allowed_mirroring_axes")
    model = TrainedModel(
        folder=model_folder,
        plans=plans,
        dataset=dataset,
        configuration=first["init_args"]["configuration"],
        trainer=_network_builder(first["trainer_name"]),
        mirroring_axes=None if axes is None else tuple(axes),
        folds=chosen,
        weights=tuple(dict(c["network_weights"]) for c in checkpoints),
    )
    about = {
        "inference_allowed_mirroring_axes": model.mirroring_axes,
        "init_args": {**first["init_args"], "plans": plans, "dataset_json": dataset},
        "trainer_name": model.trainer,
    }
    _refuse_second_stage(model)
    network_of(model)
    with folder_written_atomically(destination, overwrite) as folder:
        models = folder / "models"
        models.mkdir()
        for name in (PLANS_FILE, DATASET_FILE):
            shutil.copyfile(model_folder / name, models / name)
        torch.save(about, models / ABOUT_FILE)
        for fold, weights in zip(chosen, model.weights, strict=True):
            (models / f"fold_{fold}").mkdir()
            torch.save({WEIGHTS_KEY: weights}, models / weights_file(fold))
        record = _record(model, models, trained_with, dict(zip(chosen, files, strict=True)))
        write_text(models / RECORD_FILE, to_json(record))
        (folder / "configs").mkdir()
        for config in (Path(__file__).with_name("configs") / "inference.yaml", SHIPPED / "configs" / "logging.conf"):
            shutil.copyfile(config, folder / "configs" / config.name)
        described = metadata_of(model, destination.name, record, _validation(model_folder, chosen))
        write_text(folder / "configs" / "metadata.json", to_json(described))
        write_text(folder / "docs" / "README.md", readme_of(model, destination.name, record, described))
        write_text(folder / "LICENSE", licence_text(plans.get(RECORD_KEY)))
    return destination


def _descriptions(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist. Expected the folder of a trained model: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION."
        )
    missing = [name for name in (PLANS_FILE, DATASET_FILE) if not (folder / name).is_file()]
    if missing:
        inside = sorted(f.parent.name for f in folder.glob(f"*/{PLANS_FILE}"))
        above = (folder.parent / PLANS_FILE).is_file()
        hint = f" It holds models: {listed(inside)}." if inside else f" The model is {folder.parent}." if above else ""
        raise UserError(
            f"{folder} is no trained model of nnU-Net: {listed(missing)} is not there. Expected "
            f"nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION.{hint}"
        )
    try:
        plans, dataset = (json.loads((folder / n).read_text(encoding="utf-8")) for n in (PLANS_FILE, DATASET_FILE))
        plans["configurations"], plans["image_reader_writer"], dataset["labels"], dataset["file_ending"]
        len(dataset.get("channel_names", dataset.get("modality")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{PLANS_FILE} or {DATASET_FILE} in {folder} is not what nnU-Net v2 writes ({error!r}). Train the model again, or restore them."
        ) from error
    return plans, dataset


def _folds_there(folder: Path, folds: int | str | Iterable[int | str] | None, checkpoint: str) -> tuple[str, ...]:
    there = sorted(f.parent.name.removeprefix("fold_") for f in folder.glob(f"fold_*/{checkpoint}"))
    # as nnU-Net detects them
    detected = tuple(f for f in there if f != "all") or tuple(there)
    chosen = detected if folds is None else fold_names(folds)
    missing = [f for f in chosen if f not in there]
    if missing or not chosen:
        others = sorted({f.name for f in folder.glob("fold_*/checkpoint_*.pth")} - {checkpoint})
        raise UserError(
            f"{folder} has no {checkpoint} of {'fold ' + listed(missing) if missing else 'any fold'} (folds that have one: "
            f"{listed(there) or 'none'}; other checkpoints: {listed(others) or 'none'}). Finish the training, or name other folds or another "
            "checkpoint."
        )
    return chosen


def _checkpoint(file: Path) -> Mapping[str, Any]:
    checkpoint = read_pickle(file)
    try:
        if missing := [key for key in NEEDED if key not in checkpoint]:
            raise KeyError(missing[0])
        checkpoint["init_args"]["configuration"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no checkpoint of nnU-Net v2 ({error} is missing). Expected what nnUNetv2_train writes."
        ) from error
    return checkpoint


def _network_builder(trainer: str) -> str:
    """The trainer that builds the network where the model will predict: nnU-Net's own, unless another one has a way of its own."""
    stock, used = trainer_class(STOCK_TRAINER), trainer_class(trainer)
    if used.build_network_architecture is stock.build_network_architecture:
        return STOCK_TRAINER
    if used.__module__.startswith("nnunetv2."):
        return trainer
    raise UserError(
        f"{trainer} builds its network in its own build_network_architecture and is not a part of nnunetv2, so a bundle could not "
        "predict where that trainer is not installed. Name the network in the plans instead, as nnU-Net does."
    )


def _refuse_second_stage(model: TrainedModel) -> None:
    if model.configuration not in model.plans["configurations"]:
        raise UserError(
            f"the checkpoints in {model.folder} are of configuration {model.configuration}, which {PLANS_FILE} there does not have. "
            "Restore the plans that the model was trained with."
        )
    before = model.configuration_manager.previous_stage_name
    if before is not None:
        raise UserError(
            f"{model.folder} is the second stage of a cascade and needs the segmentations of {before}, which a bundle of one model "
            "does not have. Bundle another configuration, or predict with nnUNetv2_predict -prev_stage_predictions."
        )


def _refuse_foreign(destination: Path) -> None:
    if destination.is_dir() and (not any(destination.iterdir()) or (destination / "models" / RECORD_FILE).is_file()):
        return
    raise UserError(
        f"{destination} is not a bundle of a model, so it is not overwritten. Choose a folder that does not exist yet."
    )


def _record(model: TrainedModel, models: Path, trained_with: str, sources: dict[str, Path]) -> dict[str, Any]:
    names = (PLANS_FILE, DATASET_FILE, ABOUT_FILE, *(weights_file(f) for f in model.folds))
    return {
        "dataset": model.plans["dataset_name"],
        "configuration": model.configuration,
        "plans": model.plans["plans_name"],
        "trainer": trained_with,
        "folds": list(model.folds),
        "files": {name: sha256(models / name) for name in names},
        "made_from": {fold: {"file": file.name, "sha256": sha256(file)} for fold, file in sources.items()},
        "selection": model.plans.get(RECORD_KEY),
        "versions": {"mtl-nnunet": __version__, **_versions()},
    }


def _versions() -> dict[str, str]:
    """Of the packages that a prediction goes through; Ignite, which runs MONAI's engines, may not be needed here."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _validation(folder: Path, folds: Iterable[str]) -> dict[str, float]:
    """nnU-Net's mean foreground Dice of each fold on its own validation cases, where it was computed."""
    found = {}
    for fold in folds:
        file = folder / f"fold_{fold}" / "validation" / "summary.json"
        if file.is_file():
            try:
                dice = json.loads(file.read_text(encoding="utf-8"))["foreground_mean"]["Dice"]
            except (OSError, ValueError, KeyError, TypeError):
                # what was measured is told beside the model, and is no part of it
                continue
            # nnU-Net writes NaN where no case has any foreground
            if isinstance(dice, (int, float)) and dice == dice:
                found[f"fold_{fold}_mean_dice"] = float(dice)
    return found

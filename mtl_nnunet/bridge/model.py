"""The model of a bundle: nnU-Net's plans and description, the weights of its folds, their hashes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtl_nnunet.checkpoints.file import read_pickle
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import sha256
from mtl_nnunet.lookup import find_trainer

# not model.json, which a bundle that was trained in has
RECORD_FILE = "nnunet_model.json"
PLANS_FILE, DATASET_FILE = "plans.json", "dataset.json"
# names and keys of monai.apps.nnunet's bundles
ABOUT_FILE, WEIGHTS_FILE, WEIGHTS_KEY = "nnunet_checkpoint.pth", "model.pt", "network_weights"
NATURAL_READER = "NaturalImage2DIO"


@dataclass(frozen=True)
class TrainedModel:
    """What nnU-Net needs of a trained model to predict.

    Attributes:
        folder: Where it lies.
        plans: nnU-Net's plans.
        dataset: nnU-Net's dataset.json.
        configuration: Which configuration of the plans, e.g. ``2d``.
        trainer: Class of nnunetv2 that builds the network.
        mirroring_axes: Axes that test-time mirroring flips, or None.
        folds: Names of the folds, in the order in which they are averaged.
        weights: A state dict of each.
    """

    folder: Path
    plans: dict[str, Any]
    dataset: dict[str, Any]
    configuration: str
    trainer: str
    mirroring_axes: tuple[int, ...] | None
    folds: tuple[str, ...]
    weights: tuple[dict[str, Tensor], ...]

    @cached_property
    def plans_manager(self) -> Any:
        """nnU-Net's view of the plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(self.plans)

    @cached_property
    def configuration_manager(self) -> Any:
        """nnU-Net's view of the configuration."""
        return self.plans_manager.get_configuration(self.configuration)

    @cached_property
    def label_manager(self) -> Any:
        """nnU-Net's view of labels, regions and the ignore label."""
        return self.plans_manager.get_label_manager(self.dataset)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Of the images, in their order."""
        named: dict[str, str] = self.dataset.get("channel_names") or self.dataset["modality"]
        return tuple(str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0])))

    @property
    def reader(self) -> str:
        """nnU-Net's name of the reader that the model was trained with."""
        return str(self.plans["image_reader_writer"])

    @property
    def file_ending(self) -> str:
        """Of images and segmentations."""
        return str(self.dataset["file_ending"])


def read_model(folder: str | Path, folds: int | str | Iterable[int | str] | None = None) -> TrainedModel:
    """Read the model of a bundle, its files checked against their recorded hashes.

    Args:
        folder: The bundle's ``models``.
        folds: Which to average; None for all that the bundle holds.

    Raises:
        UserError: No model there, a fold that the bundle does not hold, or a file that is gone or was altered.
    """
    folder = Path(folder)
    record = _read_record(folder)
    hashes: dict[str, str] = record["files"]
    chosen = _chosen(folds, [str(f) for f in record["folds"]], folder)
    for name in (PLANS_FILE, DATASET_FILE, ABOUT_FILE, *(weights_file(f) for f in chosen)):
        _verify(folder / name, hashes[name])
    about = read_pickle(folder / ABOUT_FILE)
    axes = about["inference_allowed_mirroring_axes"]
    return TrainedModel(
        folder=folder,
        plans=json.loads((folder / PLANS_FILE).read_text(encoding="utf-8")),
        dataset=json.loads((folder / DATASET_FILE).read_text(encoding="utf-8")),
        configuration=about["init_args"]["configuration"],
        trainer=about["trainer_name"],
        mirroring_axes=None if axes is None else tuple(axes),
        folds=chosen,
        weights=tuple(dict(read_pickle(folder / weights_file(f))[WEIGHTS_KEY]) for f in chosen),
    )


def network_of(model: TrainedModel) -> nn.Module:
    """The network that the plans name, without deep supervision, with the weights of the first fold.

    Raises:
        UserError: The network cannot be built by this nnU-Net, or weights of a fold do not fit it.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    build = trainer_class(model.trainer).build_network_architecture
    if "plans_manager" not in inspect.signature(build).parameters:
        raise UserError(
            f"the trainer {model.trainer} builds its network in a way that nnU-Net has given up (no plans_manager in "
            "build_network_architecture). Update the trainer as nnU-Net's deprecation warning says."
        )
    network: nn.Module = build(
        model.plans_manager,
        model.configuration_manager,
        determine_num_input_channels(model.plans_manager, model.configuration_manager, model.dataset),
        model.label_manager.num_segmentation_heads,
        enable_deep_supervision=False,
    )
    # the first one last, which is what stays
    for fold, weights in reversed(list(zip(model.folds, model.weights, strict=True))):
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"the weights of fold {fold} in {model.folder} do not fit the network of the plans "
                f"({str(error).splitlines()[1].strip()[:160] if len(str(error).splitlines()) > 1 else error}). They are of another "
                "model: keep plans.json and the folds together."
            ) from error
    return network


def trainer_class(name: str) -> Any:
    """nnU-Net's class of that name.

    Raises:
        UserError: nnU-Net does not find it.
    """
    try:
        return find_trainer(name)
    except RuntimeError as error:
        raise UserError(
            f"the model was trained with {name}, which nnU-Net does not find. Set nnUNet_extTrainer to the folder that holds it, as "
            "for training."
        ) from error


def weights_file(fold: str) -> str:
    """Where the weights of a fold lie below ``models``."""
    return f"fold_{fold}/{WEIGHTS_FILE}"


def fold_names(folds: int | str | Iterable[int | str]) -> tuple[str, ...]:
    """Folds as they are given in Python or on a command line, each once, in their order.

    Examples:
        >>> fold_names([1, "0"]), fold_names("all"), fold_names(3), fold_names("0,1")
        (('1', '0'), ('all',), ('3',), ('0', '1'))
    """
    several = (
        folds.replace(",", " ").split() if isinstance(folds, str) else [folds] if isinstance(folds, int) else folds
    )
    return tuple(dict.fromkeys(str(f).removeprefix("fold_") for f in several))


def _chosen(folds: int | str | Iterable[int | str] | None, there: list[str], folder: Path) -> tuple[str, ...]:
    if folds is None:
        return tuple(there)
    chosen = fold_names(folds)
    missing = [f for f in chosen if f not in there]
    if missing or not chosen:
        raise UserError(
            f"the bundle in {folder} has no fold {listed(missing) or 'at all of those asked for'}, only {listed(there)}. Pass one of "
            "those, or bundle the model again with that fold."
        )
    return chosen


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        dict(record["files"])
        folds = list(record["folds"])
        if strange := [f for f in folds if not re.fullmatch(r"all|\d+", str(f))]:
            raise ValueError(f"{strange[0]!r} is no fold")
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no model ({RECORD_FILE} is not there). Run the command in the bundle's own folder, or pass "
            "--bundle_root FOLDER."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}). Copy the bundle again from where it was made.") from error
    needed = [PLANS_FILE, DATASET_FILE, ABOUT_FILE, *(weights_file(str(f)) for f in folds)]
    if missing := [name for name in needed if name not in record["files"]]:
        raise UserError(f"{file} records no hash of {listed(missing)}. Copy the bundle again from where it was made.")
    return record


def _verify(file: Path, expected: str) -> None:
    if not file.is_file():
        raise UserError(f"{file} is gone, so this bundle cannot predict. Copy the bundle again from where it was made.")
    if (found := sha256(file)) != expected:
        raise UserError(
            f"{file} is not the file that was bundled: SHA-256 {found[:12]}, expected {expected[:12]}. Copy the bundle again from "
            "where it was made."
        )

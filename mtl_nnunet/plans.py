"""A selection and nnU-Net's plans to plans that name TimmUNet; the trainer and ``mtl-nnunet plans`` do the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import to_json, write_text
from mtl_nnunet.selection import DEFAULT_FOLDER, Selection, read_selection

RECORD_KEY = "mtl_nnunet"
NETWORK = "mtl_nnunet.network.TimmUNet"


def with_timm_unet(plans: dict[str, Any], configuration: str, record: dict[str, Any]) -> dict[str, Any]:
    """Plans whose 2D configuration names TimmUNet with the selected encoder.

    Everything that concerns the preprocessed data stays, so that nothing has to be preprocessed again; the patch size
    is rounded up to a multiple of the encoder's deepest reduction.

    Args:
        plans: nnU-Net's plans; not changed.
        configuration: Which of their configurations.
        record: ``Selection.record()``; it travels in the plans.

    Returns:
        New plans.

    Raises:
        UserError: No such configuration, a 3D one, or a cascade.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from mtl_nnunet.encoder import TimmEncoder
    from mtl_nnunet.network import strides_of

    if configuration not in plans["configurations"]:
        raise UserError(
            f"the plans '{plans.get('plans_name')}' have no configuration '{configuration}', only "
            f"{listed(sorted(plans['configurations']))}."
        )
    resolved = PlansManager(deepcopy(plans)).get_configuration(configuration)
    if len(resolved.patch_size) != 2 or resolved.previous_stage_name is not None:
        raise UserError(
            f"configuration '{configuration}' is not 2D: MTLTrainer trains 2D configurations for now. "
            "Use -c 2d, or nnU-Net's own trainer."
        )
    encoder = TimmEncoder(record["encoder"], record["input_channels"])
    arch_kwargs = {"encoder": record["encoder"], "strides": strides_of(encoder), "n_conv_per_stage_decoder": 2}
    if resolved.network_arch_class_name == NETWORK:
        # plans that somebody wrote for TimmUNet may widen its stem or deepen its decoder
        arch_kwargs = {
            **resolved.network_arch_init_kwargs,
            "encoder": record["encoder"],
            "strides": strides_of(encoder),
        }
    changed = deepcopy(plans)
    changed["configurations"][configuration].update(
        patch_size=[_round_up(int(s), encoder.reductions[-1]) for s in resolved.patch_size],
        architecture={"network_class_name": NETWORK, "arch_kwargs": arch_kwargs, "_kw_requires_import": []},
    )
    changed[RECORD_KEY] = record
    return changed


def preprocessed_folder(dataset_name: str) -> Path:
    """nnU-Net's folder of a dataset's preprocessed data and plans.

    Raises:
        UserError: ``nnUNet_preprocessed`` is not set.
    """
    root = os.environ.get("nnUNet_preprocessed")
    if not root:
        raise UserError(
            "the environment variable nnUNet_preprocessed is not set. Set it as nnU-Net's documentation says."
        )
    return Path(root, dataset_name)


def selection_of(plans: dict[str, Any]) -> Selection:
    """The selection that plans start from: the one they name, else the dataset's own.

    Raises:
        UserError: There is none, it was altered, or it is not the one the plans were made from.
    """
    folder = preprocessed_folder(plans["dataset_name"])
    record = plans.get(RECORD_KEY)
    if record is None:
        return read_selection(folder / DEFAULT_FOLDER)
    selection = read_selection(folder / record.get("folder", DEFAULT_FOLDER))
    if selection.encoder_sha256 != record["encoder_sha256"]:
        raise UserError(
            f"{selection.folder} holds another selection (SHA-256 {selection.encoder_sha256[:12]}) than the plans "
            f"'{plans['plans_name']}' were made from ({record['encoder_sha256'][:12]}). Make the plans again: mtl-nnunet plans."
        )
    return selection


def write_plans(
    dataset_name: str,
    plans_name: str,
    new_name: str,
    selection_folder: str | None = None,
    overwrite: bool = False,
    batch_sizes: Callable[[dict[str, Any], dict[str, Any], list[str]], dict[str, int]] | None = None,
) -> Path:
    """Write plans of another name whose 2D configurations start from a selection.

    Args:
        dataset_name: nnU-Net's folder name.
        plans_name: Plans to start from, e.g. ``nnUNetPlans``.
        new_name: Name of the new plans, for nnU-Net's ``-p``.
        selection_folder: Which selection; None for the dataset's own.
        overwrite: Replace plans of that name.
        batch_sizes: From the source plans, the new ones and the names of the changed configurations to a batch size each;
            None keeps those of the source.

    Returns:
        The file written.

    Raises:
        UserError: No such plans or selection, no 2D configuration, or plans of the new name exist.
    """
    folder = preprocessed_folder(dataset_name)
    source, target = folder / f"{plans_name}.json", folder / f"{new_name}.json"
    if not source.is_file():
        raise UserError(f"{source} does not exist. Run nnUNetv2_plan_and_preprocess for this dataset first.")
    if new_name == plans_name or (target.exists() and not overwrite):
        raise UserError(f"plans '{new_name}' exist already. Choose another name with -o, or pass --overwrite.")
    try:
        plans = json.loads(source.read_text(encoding="utf-8"))
        flat = [n for n, c in plans["configurations"].items() if len(c.get("patch_size", ())) == 2]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is no plans file of nnU-Net v2 ({error!r}). Plan the dataset again.") from error
    if not flat:
        raise UserError(f"{source} has no 2D configuration. Plan one with nnUNetv2_plan_experiment.")
    selection = read_selection(selection_folder or folder / DEFAULT_FOLDER)
    # relative, so that the preprocessed folder can move
    record = {**selection.record(), "folder": os.path.relpath(selection.folder, folder)}
    source_plans = deepcopy(plans)
    plans["plans_name"] = new_name
    for configuration in flat:
        plans = with_timm_unet(plans, configuration, record)
    if batch_sizes is not None:
        for configuration, size in batch_sizes(source_plans, plans, flat).items():
            plans["configurations"][configuration]["batch_size"] = size
    write_text(target, to_json(plans))
    return target


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

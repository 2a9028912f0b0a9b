"""A selection and nnU-Net's plans to plans that name TimmUNet; the trainer and ``mtl-nnunet plans`` do the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import to_json, write_text
from mtl_nnunet.selection import DEFAULT_FOLDER, Selection, read_selection

RECORD_KEY = "mtl_nnunet"
RECIPE_KEY = "recipe"
ITERATIONS_KEY = "iterations_per_epoch"
# of TimmUNet, that plans may set and a selection does not decide
OWN_ARGUMENTS = ("n_conv_per_stage_decoder", "stem_channels", "inflation")
NETWORK = "mtl_nnunet.network.TimmUNet"


def with_timm_unet(plans: dict[str, Any], configuration: str, record: dict[str, Any]) -> dict[str, Any]:
    """Plans whose configuration names TimmUNet with the selected encoder.

    Everything that concerns the preprocessed data stays, so that nothing has to be preprocessed again; the patch size
    is rounded up to a multiple of the encoder's deepest reduction. In 3D the encoder is inflated, with the strides and kernels
    along the first axis that nnU-Net planned for its own network.

    Args:
        plans: nnU-Net's plans; not changed.
        configuration: Which of their configurations.
        record: ``Selection.record()``; it travels in the plans.

    Returns:
        New plans.

    Raises:
        UserError: No such configuration, plans of another version of nnU-Net, or an encoder that cannot be made
            three-dimensional.
    """
    if configuration not in plans["configurations"]:
        raise UserError(
            f"the plans '{plans.get('plans_name')}' have no configuration '{configuration}', only "
            f"{listed(sorted(plans['configurations']))}."
        )
    try:
        resolved = resolved_configuration(plans, configuration)
        patch_size = [int(s) for s in resolved.patch_size]
        planned = dict(resolved.network_arch_init_kwargs)
        by_us = resolved.network_arch_class_name == NETWORK
        strides = planned["strides"] if len(patch_size) == 3 else None
        kernel_sizes = planned["kernel_sizes"] if len(patch_size) == 3 else None
        is_cascade = resolved.previous_stage_name is not None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"configuration '{configuration}' of the plans '{plans.get('plans_name')}' cannot be read ({error!r}): they are of another "
            "version of nnU-Net. Plan the dataset again with nnUNetv2_plan_experiment."
        ) from error
    changed = deepcopy(plans)
    # plans that somebody wrote for TimmUNet may widen its stem, deepen its decoder or inflate in another way
    kept = {k: v for k, v in planned.items() if by_us and k in OWN_ARGUMENTS}
    shape, multiples = _encoder_shape(record["encoder"], strides, kernel_sizes, kept.get("inflation"))
    arch_kwargs = {"encoder": record["encoder"], **shape, "n_conv_per_stage_decoder": 2, **kept}
    if is_cascade:
        # the rest is the first stage's segmentation, which no ImageNet kernel fits
        arch_kwargs["image_channels"] = record["input_channels"]
    changed["configurations"][configuration].update(
        patch_size=[_round_up(s, m) for s, m in zip(patch_size, multiples, strict=True)],
        architecture={"network_class_name": NETWORK, "arch_kwargs": arch_kwargs, "_kw_requires_import": []},
    )
    changed[RECORD_KEY] = record
    return changed


def resolved_configuration(plans: dict[str, Any], configuration: str) -> Any:
    """nnU-Net's ``ConfigurationManager`` of a configuration, with what it inherits; the plans are not changed."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(deepcopy(plans)).get_configuration(configuration)


def dataset_name_of(dataset: int | str) -> str:
    """nnU-Net's name of a dataset that is named by its number or name, as for nnU-Net's ``-d``.

    Raises:
        UserError: nnU-Net finds no such dataset, or several.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"no dataset {dataset}: {error}") from error


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
    recipe: Mapping[str, Any] | None = None,
    batch_sizes: Callable[[dict[str, Any], dict[str, Any], list[str]], dict[str, int]] | None = None,
    only: Sequence[str] | None = None,
) -> tuple[Path, list[str]]:
    """Write plans of another name whose configurations start from a selection.

    Args:
        dataset_name: nnU-Net's folder name.
        plans_name: Plans to start from, e.g. ``nnUNetPlans``.
        new_name: Name of the new plans, for nnU-Net's ``-p``.
        selection_folder: Which selection; None for the dataset's own.
        overwrite: Replace plans of that name.
        recipe: Hyper-parameters that trainings from these plans use; None for the defaults.
        batch_sizes: From the source plans, the new ones and the names of the changed configurations to a batch size each;
            None keeps those of the source.
        only: Configurations to change; None for all that the encoder fits.

    Returns:
        The file written and the configurations that start from the selection; 3D ones of an encoder that is 2D only stay
        as they are.

    Raises:
        UserError: No such plans or selection, no configuration that the encoder fits, or plans of the new name exist.
    """
    folder = preprocessed_folder(dataset_name)
    source, target = folder / f"{plans_name}.json", folder / f"{new_name}.json"
    if not source.is_file():
        raise UserError(f"{source} does not exist. Run nnUNetv2_plan_and_preprocess for this dataset first.")
    if new_name == plans_name or (target.exists() and not overwrite):
        raise UserError(f"plans '{new_name}' exist already. Choose another name with -o, or pass --overwrite.")
    try:
        plans = json.loads(source.read_text(encoding="utf-8"))
        configurations = list(plans["configurations"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} is no plans file of nnU-Net v2 ({error!r}). Plan the dataset again.") from error
    selection = read_selection(selection_folder or folder / DEFAULT_FOLDER)
    # relative, so that the preprocessed folder can move; from where links lead to, since what follows .. is looked up there
    place = (
        os.path.relpath(os.path.realpath(selection_folder), os.path.realpath(folder))
        if selection_folder
        else DEFAULT_FOLDER
    )
    record = {**selection.record(), "folder": place}
    # plans that carry a recipe keep it
    record[RECIPE_KEY] = {**plans.get(RECORD_KEY, {}).get(RECIPE_KEY, {}), **(recipe or {})}
    source_plans = deepcopy(plans)
    changed: list[str] = []
    refused = None
    for configuration in only or configurations:
        try:
            plans = with_timm_unet(plans, configuration, record)
            changed.append(configuration)
        except UserError as error:
            if only:
                raise
            refused = error
    plans["plans_name"] = new_name
    for configuration in set(configurations) - set(changed):
        _keep_own(plans["configurations"][configuration], source_plans, configuration)
    if not changed:
        raise refused or UserError(f"{source} has no configuration. Plan one with nnUNetv2_plan_experiment.")
    if batch_sizes is not None:
        for configuration, size in batch_sizes(source_plans, plans, changed).items():
            plans["configurations"][configuration]["batch_size"] = size
    write_text(target, to_json(plans))
    return target, changed


def _keep_own(configuration: dict[str, Any], source: dict[str, Any], name: str) -> None:
    """What a configuration inherited from one that was changed stays what it was."""
    if "inherits_from" in configuration:
        was = resolved_configuration(source, name).configuration
        configuration.update({k: deepcopy(was[k]) for k in ("architecture", "patch_size", "batch_size") if k in was})


def _encoder_shape(
    name: str,
    strides: Sequence[Sequence[int]] | None,
    kernel_sizes: Sequence[Sequence[int]] | None,
    inflation: str | None,
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Architecture arguments that follow from the encoder, and what each side of the patch must be a multiple of.

    Strides and kernels are nnU-Net's own of a 3D configuration, None for 2D.
    """
    from mtl_nnunet.encoder import TimmEncoder
    from mtl_nnunet.inflation import DEFAULT_WEIGHTS, depth_of_plans
    from mtl_nnunet.network import strides_of

    flat = TimmEncoder(name)
    deepest = flat.reductions[-1]
    if strides is None or kernel_sizes is None:
        return {"strides": strides_of(flat)}, (deepest, deepest)
    depth = depth_of_plans(strides, kernel_sizes, flat.reductions, inflation or DEFAULT_WEIGHTS)
    return {
        "strides": strides_of(TimmEncoder(name, depth=depth)),
        "kernel_sizes": [[k, 3, 3] for k in depth.kernel_sizes],
        "inflation": depth.weights,
    }, (depth.depth_reductions[-1], deepest, deepest)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

"""A bundle's ``metadata.json``, brought in line with the model that was trained in it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from mtl_nnunet.components.plan import Plan, read_plan, read_record
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import to_json, write_text

REQUIRED = ("mtl-nnunet", "nnunetv2", "timm", "safetensors", "nibabel", "pytorch-ignite", "fire", "tensorboard")


def data_format(plan: Plan) -> dict[str, Any]:
    """``network_data_format`` of a plan's network.

    Examples:
        >>> from mtl_nnunet.components.plan import UNTRAINED
        >>> data_format(UNTRAINED)["outputs"]["pred"]["channel_def"]
        {'0': 'background', '1': 'foreground'}
    """
    # as nnU-Net takes it
    ct = "ct" in [name.casefold() for name in plan.channel_names]
    common = {"type": "image", "spatial_shape": list(plan.patch_size), "dtype": "float32", "value_range": []}
    return {
        "inputs": {
            "image": {
                **common,
                "format": "hounsfield" if ct else "magnitude",
                "modality": ", ".join(plan.channel_names),
                "num_channels": plan.in_channels,
                "is_patch_data": True,
                "channel_def": {str(i): name for i, name in enumerate(plan.channel_names)},
            }
        },
        "outputs": {
            "pred": {
                **common,
                "format": "segmentation",
                "num_channels": plan.out_channels,
                "is_patch_data": True,
                "channel_def": {str(i): name for i, name in enumerate(plan.labels)},
            }
        },
    }


def describe_model(model: str | Path, bundle_root: str | Path = ".") -> None:
    """Write into a bundle's ``metadata.json`` what its trained model takes and gives, how good it was, and with which versions.

    Args:
        model: File of weights, with its record beside it.
        bundle_root: Whose ``configs/metadata.json``; nothing is done where there is none, or where the model lies elsewhere.

    Raises:
        UserError: A record or ``metadata.json`` that cannot be read.
    """
    path = Path(bundle_root) / "configs" / "metadata.json"
    within = Path(model).resolve().is_relative_to(Path(bundle_root).resolve())
    if not within or not path.is_file() or not Path(model).is_file():
        return
    plan, record = read_plan(model), read_record(model)
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        metadata |= {
            **versions(),
            "data_source": plan.dataset,
            "image_classes": ", ".join(plan.channel_names),
            "label_classes": ", ".join(f"{i}: {name}" for i, name in enumerate(plan.labels)),
            "pred_classes": ", ".join(f"{i}: {name}" for i, name in enumerate(plan.labels)),
            "eval_metrics": {} if record["val_mean_dice"] is None else {"val_mean_dice": record["val_mean_dice"]},
            "network_data_format": data_format(plan),
        }
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a bundle's metadata ({error}). Restore it with mtl-nnunet bundle."
        ) from error
    write_text(path, to_json(metadata))


def versions() -> dict[str, Any]:
    """What is installed here, under the names of MONAI's metadata."""
    return {
        "monai_version": importlib.metadata.version("monai"),
        "pytorch_version": importlib.metadata.version("torch"),
        "numpy_version": importlib.metadata.version("numpy"),
        "required_packages_version": {name: importlib.metadata.version(name) for name in REQUIRED},
    }

"""What a bundle says of itself: metadata.json, docs/README.md, LICENSE."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np

from mtl_nnunet import __version__
from mtl_nnunet.bridge.model import TrainedModel

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
BUNDLE_VERSION = "0.1.0"
PAPER = "Isensee, F. et al. nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation. Nature Methods 18, 203-211 (2021)."


def metadata_of(model: TrainedModel, name: str, record: dict[str, Any], dice: dict[str, float]) -> dict[str, Any]:
    """``configs/metadata.json``: the network's own input and output are patches, as nnU-Net preprocesses them."""
    patch = [int(s) for s in model.configuration_manager.patch_size]
    channels = {str(i): n for i, n in enumerate(model.channel_names)}
    heads = {str(i): n for i, n in enumerate(head_names(model))}
    shape = {"spatial_shape": patch, "dtype": "float32", "value_range": [], "is_patch_data": True}
    return {
        "schema": SCHEMA,
        "version": BUNDLE_VERSION,
        "changelog": {BUNDLE_VERSION: f"made by mtl-nnunet {__version__} from a model trained with nnU-Net"},
        "monai_version": importlib.metadata.version("monai"),
        "pytorch_version": importlib.metadata.version("torch").split("+")[0],
        "numpy_version": importlib.metadata.version("numpy"),
        "required_packages_version": dict(record["versions"]),
        "name": name,
        "task": f"Segmentation of {', '.join(n for n in model.dataset['labels'] if n not in ('background', 'ignore'))}",
        "description": (
            f"nnU-Net's {record['configuration']} model of {record['dataset']}, trained with {record['trainer']}, fold(s) "
            f"{', '.join(record['folds'])}. Predicts what nnUNetv2_predict predicts."
        ),
        "authors": "not stated",
        "authorship": "not stated",
        "copyright": "of the weights: their owner; see LICENSE",
        "data_source": record["dataset"],
        "data_type": model.file_ending.removeprefix("."),
        "dataset_dir": f"folder of CASE_0000{model.file_ending} (nnU-Net's names), or a Decathlon datalist",
        "image_classes": ", ".join(f"{i}: {n}" for i, n in channels.items()),
        "label_classes": ", ".join(f"{n}: {v}" for n, v in model.dataset["labels"].items()),
        "pred_classes": ", ".join(f"{n}: {v}" for n, v in model.dataset["labels"].items() if n != "ignore"),
        "eval_metrics": dice,
        "intended_use": "Research. Not for clinical use.",
        "references": [PAPER],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": ", ".join(model.channel_names),
                    "num_channels": len(channels),
                    **shape,
                    "channel_def": channels,
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "logits",
                    "num_channels": len(heads),
                    **shape,
                    "channel_def": heads,
                }
            },
        },
    }


def head_names(model: TrainedModel) -> list[str]:
    """What each output channel of the network is: a label, background first, or a region."""
    labels = model.label_manager
    names = [n for n in model.dataset["labels"] if n != "ignore"]
    if labels.has_regions:
        return [n for n in names if n != "background"]
    # nnU-Net takes [1] for 1
    return sorted(names, key=lambda n: int(np.ravel(model.dataset["labels"][n])[0]))


def starts_from_selection(trainer: str) -> bool:
    """Whether a trainer of ours loads the selected encoder; of somebody's subclass it is taken to be so."""
    from mtl_nnunet import variants

    return bool(getattr(getattr(variants, trainer, None), "load_encoder", True))


def readme_of(model: TrainedModel, name: str, record: dict[str, Any], metadata: dict[str, Any]) -> str:
    """``docs/README.md``."""
    dice = "\n".join(f"- {k.replace('_', ' ')}: {v:.4f}" for k, v in metadata["eval_metrics"].items())
    selection = record["selection"] or {}
    if "encoder" not in selection:
        start = "It was trained by nnU-Net's own trainer, from random weights unless its owner says otherwise."
    elif not starts_from_selection(record["trainer"]):
        start = f"The encoder {selection['encoder']} started from random weights."
    else:
        start = (
            f"The encoder {selection['encoder']} started from {selection.get('published') or selection.get('checkpoint')} "
            f"(SHA-256 {str(selection.get('checkpoint_sha256'))[:12]}, licence {selection.get('licence') or 'not stated'})."
        )
    names = " ".join(f"`CASE_{i:04d}{model.file_ending}` ({n})" for i, n in enumerate(model.channel_names))
    hashes = "\n".join(f"| `{file}` | `{digest}` |" for file, digest in record["files"].items())
    sources = "\n".join(
        f"- fold {fold}: `{of['file']}`, SHA-256 `{of['sha256']}`" for fold, of in record["made_from"].items()
    )
    return f"""# {name}

{metadata["task"]}: {metadata["description"]}

It reads, crops, resamples, normalises, predicts and writes by nnU-Net's own functions, so that its segmentations are those of
`nnUNetv2_predict`, voxel for voxel on a CPU. None of nnU-Net's environment variables is needed.

## Run

```bash
pip install 'mtl-nnunet=={record["versions"]["mtl-nnunet"]}' 'nnunetv2=={record["versions"]["nnunetv2"]}' fire pytorch-ignite
cd {name}
python -m monai.bundle run --config_file configs/inference.yaml --dataset_dir IMAGES --output_dir SEGMENTATIONS
```

`IMAGES` is a folder of {names}, or a Decathlon datalist (`.json`; `--datalist_key testing`).
Segmentations have the geometry of their image. `--folds "[0]"` takes one fold, `--inferer#use_mirroring false` is nnU-Net's `--disable_tta`,
`--device cpu` chooses a device.

## Model

- dataset {record["dataset"]}, configuration {record["configuration"]}, plans {record["plans"]}, trainer {record["trainer"]}, folds {", ".join(record["folds"])}
- channels: {metadata["image_classes"]}
- labels: {metadata["pred_classes"]}
- {start}

## Validation, by nnU-Net on each fold's own cases

{dice or "not computed"}

## Files

| below `models` | SHA-256, checked before every run |
|---|---|
{hashes}

Made from

{sources}
"""


def licence_text(selection: dict[str, Any] | None) -> str:
    """``LICENSE``: ours of the configuration; of the weights, what is known."""
    of_encoder = ""
    if (
        selection
        and starts_from_selection(selection.get("trainer", ""))
        and (selection.get("published") or selection.get("licence"))
    ):
        of_encoder = (
            f"The encoder started from published weights: {selection.get('published')}, licence {selection.get('licence') or 'not stated'}. "
            "Its terms may bind what was trained from it.\n"
        )
    return f"""Configuration and documentation of this bundle (configs, docs) were written by mtl-nnunet and are under the Apache License,
Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0).

The weights (models) belong to whoever trained them. No licence of theirs is known to the program that made this bundle:
their owner states it here before passing the bundle on.
{of_encoder}"""

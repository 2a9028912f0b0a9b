"""Start nnU-Net and MONAI segmentation from the right pretrained timm checkpoint."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# imported on first use, so that a command's --help does not wait for torch
_MODULES = {
    "ResultCache": "cache",
    "find_checkpoints": "checkpoints",
    "list_checkpoints": "checkpoints",
    "find_image_folder": "cases",
    "find_nnunet_dataset": "cases",
    "gather_slices": "slices",
    "parse_score": "scores",
    "rank_checkpoints": "ranking",
    "report_training": "training_report",
    "score_encoder": "ranking",
    "select_checkpoint": "select",
    "workers": "parallel",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

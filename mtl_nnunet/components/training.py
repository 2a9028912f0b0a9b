"""The optimiser of the project's recipe, and its schedule, for a config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mtl_nnunet.recipe import EpochwiseLR, optimizer_of, parameter_groups, recipe


def recipe_optimizer(network: nn.Module, **changes: Any) -> torch.optim.Optimizer:
    """AdamW with rates that fall from the decoder to the encoder's first layers, as ``MTLTrainer`` learns.

    Args:
        network: A ``MonaiUNet``.
        changes: Hyper-parameters of ``mtl_nnunet.recipe.Recipe``, such as ``lr``.

    Raises:
        UserError: An unknown hyper-parameter, or a value that makes no sense.
    """
    how = recipe(changes, where="optimizer")
    return optimizer_of(parameter_groups(network, how), how)


def recipe_schedule(optimizer: torch.optim.Optimizer, max_epochs: int, warmup_epochs: int = 10) -> EpochwiseLR:
    """Linear warm-up for at most a tenth of the training, then polynomial decay; each group keeps its own rate.

    Args:
        optimizer: Whose rates.
        max_epochs: Length of the training.
        warmup_epochs: At most.
    """
    return EpochwiseLR(optimizer, max_epochs, min(warmup_epochs, max_epochs // 10))

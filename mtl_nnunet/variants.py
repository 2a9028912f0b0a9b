"""Variants of MTLTrainer, named as nnU-Net names its own and composed from them."""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from nnunetv2.training.nnUNetTrainer.variants.training_length import nnUNetTrainer_Xepochs

from mtl_nnunet.trainer import MTLTrainer

LENGTHS = (1, 5, 10, 20, 50, 100, 250, 500)


class MTLTrainerScratch(MTLTrainer):
    """The same network and recipe from random weights, for a fair comparison.

    Random weights have nothing to preserve, so the encoder learns at the full rate from the beginning.
    """

    load_encoder = False
    fixed: ClassVar[dict[str, Any]] = {
        "encoder_lr_factor": 1.0,
        "layer_decay": 1.0,
        "frozen_epochs": 0,
        "batch_norm": "live",
    }


class MTLTrainerFrozenEncoder(MTLTrainer):
    """The encoder stays as it was pretrained, statistics included; stem and decoder learn."""

    fixed: ClassVar[dict[str, Any]] = {"frozen_epochs": "all"}


class MTLTrainerNoMirroring(MTLTrainer, nnUNetTrainerNoMirroring):
    """Without mirroring in training and prediction."""


class MTLTrainerNoDeepSupervision(MTLTrainer, nnUNetTrainerNoDeepSupervision):
    """With a loss on the finest output alone."""


def _of_length(trainer: type[MTLTrainer], epochs: int) -> type[MTLTrainer]:
    length = f"_{epochs}epoch{'' if epochs == 1 else 's'}"
    stock: type[nnUNetTrainer] = getattr(nnUNetTrainer_Xepochs, f"nnUNetTrainer{length}")
    name = f"{trainer.__name__}{length}"
    return type(name, (trainer, stock), {"__module__": __name__, "__doc__": f"{trainer.__name__} for {epochs} epochs."})


FULL_LENGTH: tuple[type[MTLTrainer], ...] = (
    MTLTrainer,
    MTLTrainerScratch,
    MTLTrainerFrozenEncoder,
    MTLTrainerNoMirroring,
    MTLTrainerNoDeepSupervision,
)
VARIANTS: dict[str, type[MTLTrainer]] = {
    cls.__name__: cls
    for trainer in FULL_LENGTH
    for cls in (trainer, *(_of_length(trainer, epochs) for epochs in LENGTHS))
}
# importable by name, as nnU-Net and pickle need
globals().update(VARIANTS)

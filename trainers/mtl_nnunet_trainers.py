"""The trainers of mtl-nnunet for nnUNet_extTrainer; they live in mtl_nnunet.trainer."""

from mtl_nnunet.trainer import (
    MTLTrainer,
    MTLTrainer_1epoch,
    MTLTrainer_5epochs,
    MTLTrainer_10epochs,
    MTLTrainerScratch,
    MTLTrainerScratch_1epoch,
    MTLTrainerScratch_5epochs,
    MTLTrainerScratch_10epochs,
)

__all__ = [
    "MTLTrainer",
    "MTLTrainerScratch",
    "MTLTrainerScratch_1epoch",
    "MTLTrainerScratch_5epochs",
    "MTLTrainerScratch_10epochs",
    "MTLTrainer_1epoch",
    "MTLTrainer_5epochs",
    "MTLTrainer_10epochs",
]

"""nnU-Net's own trainer for as many iterations as MTLTrainer_10epochs does under MTL_ITERATIONS_PER_EPOCH."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs import nnUNetTrainer_10epochs


class StockTrainer_10epochs(nnUNetTrainer_10epochs):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        numbers = os.environ["MTL_ITERATIONS_PER_EPOCH"].split(",")
        self.num_iterations_per_epoch = int(numbers[0])
        self.num_val_iterations_per_epoch = int(numbers[1])

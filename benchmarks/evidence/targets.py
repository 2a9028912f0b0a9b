"""The targets of the downstream benchmark: which patients train, which test, and what the scorer sees, fixed beforehand.

Slices come from ``gather_slices``, normalised as nnU-Net does it, and are then made smaller so that a training takes
seconds. The test patients are drawn once for a target; the others are the pool from which every seed draws its training
cases. The scorer sees the pool alone, images and labels, and never a test patient.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.cases import find_nnunet_dataset, with_patients
from mtl_nnunet.slices import gather_slices

SPLIT_SEED = 2024
TRAINING_CASES = 8
TEST_SHARE = 0.4
MOST_TEST_PATIENTS = 30


@dataclass(frozen=True)
class Source:
    """Where a target comes from and how small it is made.

    Attributes:
        number: nnU-Net's number of the dataset.
        long_side: Pixels of the longer side.
        num_cases: Cases that are used at most.
        slices_per_case: Slices of each.
    """

    number: int
    long_side: int
    num_cases: int
    slices_per_case: int = 1


TARGETS = {
    "hippocampus": Source(4, 64, 90, 3),
    "fundus": Source(28, 192, 28),
    "ultrasound": Source(32, 96, 108),
    "chest_xray": Source(33, 96, 114),
    "cine_mr": Source(34, 96, 115),
    "liver_ct": Source(36, 96, 104),
}


@dataclass(frozen=True)
class Target:
    """Slices of a target and their patients.

    Attributes:
        images: (N, C, H, W).
        labels: (N, H, W), -1 where there is none to count.
        patients: (N,).
        cases: (N,) case of each slice.
        is_test: (N,) whether the slice is of a test patient.
    """

    images: Tensor
    labels: Tensor
    patients: np.ndarray
    cases: np.ndarray
    is_test: np.ndarray

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def prepared(name: str, raw: Path, folder: Path) -> Path:
    """The file of a target's slices, made if it is not there."""
    path = folder / f"{name}.npz"
    if path.is_file():
        return path
    source = TARGETS[name]
    os.environ["nnUNet_raw"] = str(raw)
    dataset = find_nnunet_dataset(source.number)
    if (table := raw / dataset.name / "patients.csv").is_file():
        dataset = with_patients(dataset, table)
    slices = gather_slices(dataset, source.num_cases * source.slices_per_case, source.num_cases, with_labels=True)
    assert slices.labels is not None
    height, width = slices.images.shape[2:]
    scale = min(1, source.long_side / max(height, width))
    size = [32 * max(1, round(side * scale / 32)) for side in (height, width)]
    images = torch.nn.functional.interpolate(slices.images, size, mode="bilinear", antialias=True)
    labels = torch.nn.functional.interpolate(slices.labels[:, None].float(), size, mode="nearest-exact")[:, 0]
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(slices.num_patients)
    num_test = min(MOST_TEST_PATIENTS, round(TEST_SHARE * slices.num_patients))
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        images=images.numpy(),
        labels=labels.numpy().astype(np.int64),
        patients=slices.patients,
        cases=np.array(slices.cases),
        is_test=np.isin(slices.patients, shuffled[:num_test]),
    )
    os.replace(partial, path)
    return path


@cache
def read(path: Path) -> Target:
    with np.load(path) as kept:
        return Target(
            torch.from_numpy(kept["images"]),
            torch.from_numpy(kept["labels"]),
            kept["patients"],
            kept["cases"],
            kept["is_test"],
        )


def training_slices(target: Target, seed: int) -> np.ndarray:
    """Indices of the slices of the training cases that a seed draws from the pool, one case a patient."""
    rng = np.random.default_rng([SPLIT_SEED, seed])
    pool = np.unique(target.patients[~target.is_test])
    chosen = rng.choice(pool, min(TRAINING_CASES, len(pool)), replace=False)
    cases = [rng.choice(np.unique(target.cases[target.patients == p])) for p in chosen]
    return np.flatnonzero(np.isin(target.cases, cases))

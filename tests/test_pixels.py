"""Labels of slices and the pixels sampled from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import phantom, plan_with_nnunet, write_image

from mtl_nnunet.cases import find_nnunet_dataset, without_validation_cases
from mtl_nnunet.errors import UserError
from mtl_nnunet.pixels import sample_pixels
from mtl_nnunet.slices import Slices, gather_slices


def slices_with(labels: np.ndarray, patients: list[int]) -> Slices:
    n, h, w = labels.shape
    return Slices(
        torch.zeros(n, 1, h, w),
        np.array(patients),
        tuple("abcdef"[:n]),
        tuple(range(n)),
        0,
        (1.0, 1.0),
        ("Z",),
        False,
        {},
        (),
        labels=torch.as_tensor(labels.astype(np.int16)),
    )


def square(size: int = 40) -> np.ndarray:
    plane = np.zeros((size, size), dtype=int)
    plane[10:30, 10:30] = 1
    plane[:3] = -1
    return plane


def test_classes_and_patients_come_in_equal_numbers_and_a_quarter_from_the_boundary() -> None:
    slices = slices_with(np.stack([square()] * 3), [0, 1, 1])
    pixels = sample_pixels(slices, labelled=True, seed=0, num_pixels=400)
    for patient in (0, 1):
        for label in (0, 1):
            mine = (pixels.patients == patient) & (pixels.labels == label)
            assert mine.sum() == 100
            row, column = pixels.rows[mine], pixels.columns[mine]
            # class 1 touches class 0 on its outermost ring, class 0 touches class 1 on the ring around it
            inner, outer = (11, 28) if label else (10, 29)
            ring = (
                ~((row >= inner) & (row <= outer) & (column >= inner) & (column <= outer))
                if label
                else ((row >= 9) & (row <= 30) & (column >= 9) & (column <= 30))
            )
            assert ring.sum() == 25
    assert (slices.labels.numpy()[pixels.slices, pixels.rows, pixels.columns] == pixels.labels).all()
    assert (slices.patients[pixels.slices] == pixels.patients).all()
    assert len({*zip(pixels.slices, pixels.rows, pixels.columns, strict=True)}) == len(pixels.rows), "none twice"
    assert (np.diff(pixels.slices) >= 0).all()


def test_pixels_that_do_not_count_are_never_drawn_and_draw_no_boundary() -> None:
    slices = slices_with(np.stack([square(), square()]), [0, 1])
    pixels = sample_pixels(slices, labelled=True, seed=0, num_pixels=10_000)
    assert (pixels.rows >= 3).all()
    assert set(pixels.labels) == {0, 1}


def test_a_class_that_a_patient_lacks_is_taken_from_the_others() -> None:
    empty = np.zeros((40, 40), dtype=int)
    pixels = sample_pixels(slices_with(np.stack([square(), empty]), [0, 1]), labelled=True, seed=0, num_pixels=80)
    assert set(pixels.labels[pixels.patients == 1]) == {0}
    assert (pixels.labels == 1).sum() == 20


def test_one_class_has_nothing_to_tell_apart() -> None:
    with pytest.raises(UserError, match="only class"):
        sample_pixels(slices_with(np.zeros((2, 40, 40)), [0, 1]), labelled=True, seed=0)


def test_without_labels_all_patients_count_alike() -> None:
    pixels = sample_pixels(slices_with(np.stack([square()] * 3), [0, 1, 1]), labelled=False, seed=0, num_pixels=200)
    assert np.bincount(pixels.patients).tolist() == [100, 100]
    assert (pixels.labels == 0).all()


def test_labels_are_those_that_nnunet_preprocesses(make_dataset: Callable[..., Path], nnunet_folders: Path) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    make_dataset(7, num_cases=5, shape=(10, 70, 66), spacing=(3.0, 0.8, 0.8))
    plan_with_nnunet(7, preprocessed="2d")
    slices = gather_slices(find_nnunet_dataset(7), 15, with_labels=True)
    stored = nnUNetDatasetBlosc2(str(nnunet_folders / "preprocessed" / "Dataset007_Phantom" / "nnUNetPlans_2d"))
    assert slices.labels is not None
    height, width = slices.labels.shape[1:]
    for labels, case, position in zip(slices.labels, slices.cases, slices.positions, strict=True):
        theirs = np.asarray(stored.load_case(case)[1])[0, position]
        top, left = (height - theirs.shape[0]) // 2, (width - theirs.shape[1]) // 2
        ours = labels[top : top + theirs.shape[0], left : left + theirs.shape[1]].numpy()
        np.testing.assert_array_equal(ours, theirs)
        outside = labels.clone()
        outside[top : top + theirs.shape[0], left : left + theirs.shape[1]] = -1
        assert (outside == -1).all(), "what is mirrored at the border does not count"


def test_ignored_voxels_do_not_count(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=4)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"]["ignore"] = 3
    (folder / "dataset.json").write_text(json.dumps(description))
    for i in range(4):
        _, label = phantom((12, 40, 36), seed=100 + i)
        label[:, :10] = 3
        write_image(folder / "labelsTr" / f"case_{i:02d}.nii.gz", label, (2.0, 1.0, 1.0))
    slices = gather_slices(find_nnunet_dataset(1), 16, with_labels=True)
    assert set(np.unique(slices.labels)) == {-1, 0, 1, 2}


def test_the_fold_is_nnunets_own_before_and_after_the_split_file_exists(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    make_dataset(1, num_cases=11)
    dataset = find_nnunet_dataset(1)
    splits = generate_crossval_split(sorted(c.name for c in dataset.cases))
    for fold in range(5):
        kept = without_validation_cases(dataset, fold, tmp_path / "nothing here")
        assert [c.name for c in kept.cases] == sorted(splits[fold]["train"])
    own = [{"train": ["case_00", "case_01"], "val": ["case_02"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(own))
    assert [c.name for c in without_validation_cases(dataset, 0, tmp_path).cases] == own[0]["train"]
    with pytest.raises(UserError, match="folds 0 to 0"):
        without_validation_cases(dataset, 1, tmp_path)
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["case_77"], "val": []}]))
    with pytest.raises(UserError, match="case_77"):
        without_validation_cases(dataset, 0, tmp_path)
    (tmp_path / "splits_final.json").write_text("{")
    with pytest.raises(UserError, match="no nnU-Net split"):
        without_validation_cases(dataset, 0, tmp_path)

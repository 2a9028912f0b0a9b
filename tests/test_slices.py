"""Slices against nnU-Net's own planning and preprocessing of the same files, and how they are chosen."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from conftest import REAL_DATA, needs_real_data, phantom, plan_with_nnunet, write_image

import mtl_nnunet.cases
import mtl_nnunet.slices
from mtl_nnunet.cases import find_image_folder, find_nnunet_dataset, sampled_cases, with_patients
from mtl_nnunet.errors import UserError
from mtl_nnunet.slices import Slices, gather_slices


def nnunet_plans(number: int, folder: Path) -> tuple[Any, dict[str, Any]]:
    """nnU-Net's own fingerprint and plans of a raw dataset."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plan_with_nnunet(number)
    plans = Path(os.environ["nnUNet_preprocessed"], folder.name, "nnUNetPlans.json")
    return PlansManager(str(plans)), json.loads((folder / "dataset.json").read_text())


def nnunet_volume(plans: Any, description: dict[str, Any], folder: Path, case: str) -> np.ndarray:
    """A case as nnU-Net's 2D configuration preprocesses it, (C, slice, row, column)."""
    configuration = plans.get_configuration("2d")
    ending = description["file_ending"]
    images = sorted(str(p) for p in (folder / "imagesTr").glob(f"{case}_????{ending}"))
    label = str(folder / "labelsTr" / f"{case}{ending}")
    preprocessor = configuration.preprocessor_class(verbose=False)
    volume, _, _ = preprocessor.run_case(images, label, plans, configuration, description)
    return volume


def centred(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop or mirror-pad about the centre, the slow way; MONAI puts the odd pixel of padding behind."""
    for axis, target in zip((-2, -1), size, strict=True):
        have = image.shape[axis]
        if have > target:
            start = have // 2 - target // 2
            image = np.take(image, range(start, start + target), axis)
        elif have < target:
            before = (target - have) // 2
            widths = [(0, 0)] * image.ndim
            widths[axis] = (before, target - have - before)
            image = np.pad(image, widths, mode="symmetric")
    return image


def compare(slices: Slices, plans: Any, description: dict[str, Any], folder: Path, tolerance: float = 1e-5) -> None:
    """Every slice is the plane of nnU-Net's preprocessed volume that it says it is."""
    configuration = plans.get_configuration("2d")
    assert plans.transpose_forward[0] == slices.axis
    assert list(configuration.spacing) == pytest.approx(list(slices.spacing))
    assert tuple(configuration.normalization_schemes) == slices.normalization
    assert any(configuration.use_mask_for_norm) == slices.use_mask_for_norm
    volumes = {c: nnunet_volume(plans, description, folder, c) for c in set(slices.cases)}
    for image, case, position in zip(slices.images, slices.cases, slices.positions, strict=True):
        expected = centred(volumes[case][:, position], tuple(image.shape[1:]))
        np.testing.assert_allclose(image.numpy(), expected, atol=tolerance, rtol=0)


SETTINGS: dict[str, dict[str, Any]] = {
    "isotropic": {"shape": (30, 40, 36), "spacing": (1, 1, 1)},
    "thick slices along z": {"shape": (12, 60, 52), "spacing": (5, 0.8, 0.8)},
    "thick slices along y": {"shape": (60, 12, 52), "spacing": (0.8, 5, 0.8)},
    "thick slices along x": {"shape": (60, 52, 12), "spacing": (0.8, 0.9, 5)},
    "two channels": {"shape": (12, 60, 52), "spacing": (3, 1, 1), "channel_names": ("T1", "noNorm")},
    "rescaled channel": {"shape": (12, 60, 52), "spacing": (3, 1, 1), "channel_names": ("rescale_to_0_1",)},
    "one slice": {"shape": (1, 60, 52), "spacing": (1, 1, 1)},
    "nrrd": {"shape": (12, 40, 36), "spacing": (2, 1, 1), "ending": ".nrrd"},
    "mha": {"shape": (12, 40, 36), "spacing": (2, 1, 1), "ending": ".mha"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_slices_are_nnunets_preprocessed_planes(make_dataset: Callable[..., Path], setting: str) -> None:
    folder = make_dataset(1, num_cases=3, **SETTINGS[setting])
    slices = gather_slices(find_nnunet_dataset(1), num_slices=15)
    assert len(slices.images) == min(15, 3 * SETTINGS[setting]["shape"][slices.axis])
    compare(slices, *nnunet_plans(1, folder), folder)


def test_resampled_slices_are_nnunets_also_where_it_clips(make_dataset: Callable[..., Path]) -> None:
    """Cases of different spacing, with extreme voxels far from the chosen slices: nnU-Net clips to the volume's range."""
    folder = make_dataset(1, num_cases=4, shape=(20, 48, 44), spacing=(1, 1, 1))
    for i, spacing in enumerate([(1, 1, 1), (1, 0.7, 0.8), (1.1, 1.4, 1), (5, 1, 1.2)]):
        voxels, label = phantom((20, 48, 44), seed=i)
        voxels[0, 0, 0, 0], voxels[0, 19, 5, 5] = -300, 900
        voxels[0, 10, 20:24, 20:24] = 400
        write_image(folder / "imagesTr" / f"case_{i:02d}_0000.nii.gz", voxels[0], spacing)
        write_image(folder / "labelsTr" / f"case_{i:02d}.nii.gz", label, spacing)
    slices = gather_slices(find_nnunet_dataset(1), num_slices=12)
    compare(slices, *nnunet_plans(1, folder), folder)


def test_mostly_empty_volumes_are_cropped_and_normalised_inside_the_mask(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=3, shape=(20, 60, 60), spacing=(2, 1, 1))
    for i in range(3):
        voxels, label = phantom((20, 60, 60), seed=i)
        outside = np.ones_like(label, dtype=bool)
        outside[4:16, 15 + i : 45, 18:44] = False
        # a hole at the corner of the bounding box: outside the mask, inside the crop
        outside[4:8, 15 + i : 22, 18:25] = True
        voxels[0][outside] = 0
        label[outside] = 0
        write_image(folder / "imagesTr" / f"case_{i:02d}_0000.nii.gz", voxels[0], (2, 1, 1))
        write_image(folder / "labelsTr" / f"case_{i:02d}.nii.gz", label, (2, 1, 1))
    slices = gather_slices(find_nnunet_dataset(1), num_slices=12)
    assert slices.use_mask_for_norm
    compare(slices, *nnunet_plans(1, folder), folder)


def test_ct_is_normalised_by_the_foreground_of_the_dataset(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=3, shape=(12, 60, 52), spacing=(3, 1, 1), channel_names=("CT",))
    plans, description = nnunet_plans(1, folder)
    slices = gather_slices(find_nnunet_dataset(1), num_slices=12)
    theirs = plans.foreground_intensity_properties_per_channel["0"]
    for name, value in slices.intensities["0"].items():
        # both sample the foreground with replacement, nnU-Net more of it
        assert value == pytest.approx(theirs[name], rel=0.01), name
    # in units of the foreground's standard deviation
    compare(slices, plans, description, folder, tolerance=0.05)


def test_ct_without_labels_uses_the_body(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    for i in range(2):
        voxels = np.full((8, 60, 60), -1000, np.float32)
        voxels[:, 20:40, 20:40] = 50 + np.random.default_rng(i).normal(0, 10, (8, 20, 20))
        write_image(tmp_path / f"case_{i}.nii.gz", voxels, (3, 1, 1))
    slices = gather_slices(find_image_folder(tmp_path, ["CT"]), num_slices=4)
    assert slices.intensities["0"]["mean"] == pytest.approx(50, abs=1)
    assert slices.intensities["0"]["std"] == pytest.approx(10, abs=1)


def test_the_body_is_looked_for_in_ct_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        ct = np.full((8, 60, 60), -1000, np.float32)
        ct[:, 20:40, 20:40] = 50 + rng.normal(0, 10, (8, 20, 20))
        write_image(tmp_path / f"case_{i}_0000.nii.gz", ct, (3, 1, 1))
        write_image(tmp_path / f"case_{i}_0001.nii.gz", rng.normal(5, 1, ct.shape).astype(np.float32), (3, 1, 1))
    slices = gather_slices(find_image_folder(tmp_path, ["CT", "PET"]), num_slices=4)
    assert slices.intensities["0"]["mean"] == pytest.approx(50, abs=1)


def write_planes(folder: Path, shapes: Sequence[tuple[int, int]], sides: Sequence[float]) -> Path:
    """2D images with labels, as a datalist; voxels of the given sides."""
    rng, entries = np.random.default_rng(0), []
    for i, (shape, side) in enumerate(zip(shapes, sides, strict=True)):
        image = rng.normal(100, 20, shape).astype(np.float32)
        for name, voxels in ((f"i{i}", image), (f"l{i}", (image > 100).astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(voxels.T[..., None], np.diag([side, side, 9, 1])), folder / f"{name}.nii")
        entries.append({"image": f"i{i}.nii", "label": f"l{i}.nii"})
    (folder / "dataset.json").write_text(json.dumps({"training": entries}))
    return folder


@pytest.mark.parametrize("sides", [(1.0, 1.0, 1.0), (1.0, 0.9, 1.1)])
def test_the_middle_of_a_plane_is_the_middle_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sides: Sequence[float]
) -> None:
    dataset = find_image_folder(write_planes(tmp_path, [(801, 514), (513, 640), (90, 777)], sides))
    cut = gather_slices(dataset, num_slices=3, num_workers=1, with_labels=True)
    monkeypatch.setattr(mtl_nnunet.slices, "_middle", lambda _: (slice(None), slice(None)))
    whole = gather_slices(dataset, num_slices=3, num_workers=1, with_labels=True)
    assert torch.equal(cut.images, whole.images)
    assert cut.labels is not None
    assert whole.labels is not None
    assert torch.equal(cut.labels, whole.labels)
    assert cut.used == whole.used
    assert cut.used[0].plane == (801, 514)


def test_large_images_are_not_all_held_at_once(tmp_path: Path) -> None:
    dataset = find_image_folder(write_planes(tmp_path, [(1600, 1500)] * 20, [1.0] * 20))
    tracemalloc.start()
    gather_slices(dataset, num_slices=20, num_workers=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 1600 * 1500 * 4


@pytest.mark.parametrize("kind", ["grey", "rgb"])
def test_png_datasets(make_dataset: Callable[..., Path], nnunet_folders: Path, kind: str) -> None:
    from skimage import io

    folder = nnunet_folders / "raw" / "Dataset002_Photos"
    (folder / "imagesTr").mkdir(parents=True), (folder / "labelsTr").mkdir()
    for i in range(3):
        voxels, label = phantom((1, 70, 90), seed=i, channels=3)
        picture = voxels[:, 0].clip(0, 255).astype(np.uint8)
        picture = picture[0] if kind == "grey" else picture.transpose(1, 2, 0)
        io.imsave(folder / "imagesTr" / f"case_{i}_0000.png", picture, check_contrast=False)
        io.imsave(folder / "labelsTr" / f"case_{i}.png", label[0], check_contrast=False)
    names = ("grey",) if kind == "grey" else ("R", "G", "B")
    description = {
        "channel_names": dict(enumerate(names)),
        "labels": {"background": 0, "ball": 1, "core": 2},
        "numTraining": 3,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    slices = gather_slices(find_nnunet_dataset(2), num_slices=3)
    assert slices.images.shape == (3, len(names), 96, 96)
    compare(slices, *nnunet_plans(2, folder), folder)


def test_tif_volume_takes_its_spacing_from_the_json_beside_it(nnunet_folders: Path) -> None:
    import tifffile

    folder = nnunet_folders / "raw" / "Dataset003_Microscope"
    (folder / "imagesTr").mkdir(parents=True), (folder / "labelsTr").mkdir()
    for i in range(2):
        voxels, label = phantom((8, 40, 50), seed=i)
        tifffile.imwrite(folder / "imagesTr" / f"case_{i}_0000.tif", voxels[0])
        tifffile.imwrite(folder / "labelsTr" / f"case_{i}.tif", label)
        for sub in ("imagesTr", "labelsTr"):
            (folder / sub / f"case_{i}.json").write_text(json.dumps({"spacing": [4.0, 0.5, 0.5]}))
    description = {
        "channel_names": {"0": "light"},
        "labels": {"background": 0, "ball": 1, "core": 2},
        "numTraining": 2,
        "file_ending": ".tif",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    dataset = find_nnunet_dataset(3)
    assert dataset.reader == "Tiff3DIO"
    slices = gather_slices(dataset, num_slices=6)
    assert slices.spacing == (0.5, 0.5)
    compare(slices, *nnunet_plans(3, folder), folder)


def oblique(folder: Path, orthonormal: bool) -> None:
    import nibabel

    angle = 0.3
    affine = np.diag([1.0, 1.2, 3.0, 1.0])
    affine[:2, :2] = [[np.cos(angle), -1.2 * np.sin(angle)], [np.sin(angle), 1.2 * np.cos(angle)]]
    if not orthonormal:
        affine[0, 2] = 1.0
    for file in (*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()):
        voxels = np.asarray(nibabel.load(file).dataobj)
        image = nibabel.Nifti1Image(voxels, affine)
        image.set_qform(affine if orthonormal else np.diag([1.0, 1.2, 3.0, 1.0]), code=1)
        image.set_sform(affine, code=1)
        nibabel.save(image, file)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_oblique_volumes(make_dataset: Callable[..., Path], orthonormal: bool) -> None:
    folder = make_dataset(1, num_cases=2, shape=(10, 40, 36))
    oblique(folder, orthonormal)
    slices = gather_slices(find_nnunet_dataset(1), num_slices=8)
    compare(slices, *nnunet_plans(1, folder), folder)


def test_dataset_json_may_list_its_files(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=3)
    plain = gather_slices(find_nnunet_dataset(1), num_slices=9)
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "imagesTr").rename(folder / "elsewhere")
    description["dataset"] = {
        f"case_{i:02d}": {"images": [f"elsewhere/case_{i:02d}_0000.nii.gz"], "label": f"labelsTr/case_{i:02d}.nii.gz"}
        for i in range(3)
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    assert torch.equal(gather_slices(find_nnunet_dataset(1), num_slices=9).images, plain.images)


@pytest.mark.parametrize("setting", ["isotropic", "thick slices along x"])
@pytest.mark.parametrize("way", ["folder", "decathlon folder", "datalist"])
def test_monai_reads_the_same_slices(make_dataset: Callable[..., Path], setting: str, way: str) -> None:
    folder = make_dataset(1, num_cases=3, **SETTINGS[setting])
    ours = gather_slices(find_nnunet_dataset(1), num_slices=9)
    for file in (folder / "imagesTr").iterdir():
        file.rename(file.with_name(file.name.replace("_0000", "")))
    source = folder / "imagesTr"
    if way != "folder":
        training = [
            {"image": f"./imagesTr/case_{i:02d}.nii.gz", "label": f"./labelsTr/case_{i:02d}.nii.gz"} for i in range(3)
        ]
        source = folder / ("dataset.json" if way == "decathlon folder" else "list.json")
        source.write_text(json.dumps({"training": training, "modality": {"0": "MRI"}}))
        source = folder if way == "decathlon folder" else source
    theirs = gather_slices(find_image_folder(source), num_slices=9)
    assert theirs.cases == ours.cases
    assert theirs.positions == ours.positions
    assert (theirs.images - ours.images).abs().max() < 1e-5, "up to the order in which float32 is summed"


def test_plain_folder_with_channel_files_and_with_4d_files(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    import nibabel

    folder = make_dataset(1, num_cases=3, channel_names=("T1", "T2"))
    by_file = gather_slices(find_image_folder(folder / "imagesTr"), num_slices=9)
    assert by_file.images.shape[1] == 2
    assert torch.allclose(by_file.images, gather_slices(find_nnunet_dataset(1), num_slices=9).images, atol=1e-5)
    for i in range(3):
        parts = [nibabel.load(folder / "imagesTr" / f"case_{i:02d}_{c:04d}.nii.gz") for c in range(2)]
        stacked = np.stack([np.asarray(p.dataobj) for p in parts], -1)
        header = nibabel.Nifti1Image(stacked, parts[0].affine)
        header.header.set_zooms((*parts[0].header.get_zooms(), 1.0))
        nibabel.save(header, tmp_path / f"case_{i:02d}.nii.gz")
    in_one = gather_slices(find_image_folder(tmp_path), num_slices=9)
    assert torch.allclose(in_one.images, by_file.images, atol=1e-5)


def test_same_seed_same_slices_whatever_the_number_of_workers(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, num_cases=8)
    one, many = (gather_slices(find_nnunet_dataset(1), 20, 5, seed=3, num_workers=n) for n in (1, 4))
    assert torch.equal(one.images, many.images)
    assert one.cases == many.cases
    assert one.used == many.used
    other = gather_slices(find_nnunet_dataset(1), 20, 5, seed=4)
    assert (other.cases, other.positions) != (one.cases, one.positions)


def test_only_the_sampled_cases_are_read_and_each_once(
    make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(1, num_cases=8)
    dataset = find_nnunet_dataset(1)
    read: list[str] = []
    original = mtl_nnunet.cases._read_with_nnunet

    def counted(files: Any, reader: str) -> Any:
        read.extend(f.name for f in files)
        return original(files, reader)

    monkeypatch.setattr(mtl_nnunet.cases, "_read_with_nnunet", counted)
    slices = gather_slices(dataset, num_slices=20, num_cases=5)
    assert len(read) == len(set(read)) == 2 * 5
    assert {c.name for c in slices.used} == {n[:7] for n in read}


def test_slices_are_spread_evenly_and_empty_ones_avoided(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=4, shape=(30, 40, 36))
    for i in range(4):
        voxels, label = phantom((30, 40, 36), seed=i)
        voxels[0, :10] = 100 + 0.01 * np.random.default_rng(i).random((10, 40, 36))
        write_image(folder / "imagesTr" / f"case_{i:02d}_0000.nii.gz", voxels[0], (2, 1, 1))
        write_image(folder / "labelsTr" / f"case_{i:02d}.nii.gz", label, (2, 1, 1))
    slices = gather_slices(find_nnunet_dataset(1), num_slices=22)
    taken = [c.num_slices for c in slices.used]
    assert sum(taken) == 22
    assert max(taken) - min(taken) <= 1
    assert min(slices.positions) >= 10
    for case in set(slices.cases):
        positions = [p for p, c in zip(slices.positions, slices.cases, strict=True) if c == case]
        steps = np.diff(positions)
        assert (abs(steps - 20 / len(positions)) < 1.01).all()


def test_cases_are_spread_over_patients_before_any_comes_twice(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    make_dataset(1, num_cases=8)
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\n" + "".join(f"case_{i:02d},{'abcd'[i // 2]}\n" for i in range(8)))
    dataset = with_patients(find_nnunet_dataset(1), table)
    for seed in range(10):
        assert {c.patient for c in sampled_cases(dataset, 4, seed)} == set("abcd")


def test_one_slice_images_with_a_thin_axis_in_plane_are_refused(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, num_cases=3, shape=(1, 60, 52), spacing=(1, 1.5, 1.5))
    with pytest.raises(UserError, match="fewer than 8 pixels wide"):
        gather_slices(find_nnunet_dataset(1), num_slices=3)


def test_photographs_that_are_no_rgb_are_refused(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, num_cases=2, channel_names=("rgb_to_0_1",), shape=(8, 40, 36))
    folder = Path(os.environ["nnUNet_raw"], "Dataset001_Phantom", "imagesTr")
    for file in folder.iterdir():
        write_image(file, phantom((8, 40, 36), seed=0)[0][0] * 10, (2, 1, 1))
    with pytest.raises(UserError, match="RGBTo01Normalization"):
        gather_slices(find_nnunet_dataset(1), num_slices=4)


@needs_real_data
@pytest.mark.parametrize(("number", "name"), [(4, "Dataset004_Hippocampus"), (28, "Dataset028_CHASEDB1")])
def test_real_slices_are_nnunets(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    raw = nnunet_folders / "raw" / name
    source = REAL_DATA / name
    description = json.loads((source / "dataset.json").read_text())
    (raw / "imagesTr").mkdir(parents=True), (raw / "labelsTr").mkdir()
    for label in sorted((source / "labelsTr").iterdir())[:6]:
        stem = label.name.removesuffix(".nii.gz")
        for file in (label, *(source / "imagesTr").glob(f"{stem}_????.nii.gz")):
            (raw / file.parent.name / file.name).symlink_to(file)
    (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": 6}))
    slices = gather_slices(find_nnunet_dataset(number), num_slices=12)
    compare(slices, *nnunet_plans(number, raw), raw)

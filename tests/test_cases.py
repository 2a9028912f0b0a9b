"""Datasets of every layout and file format are found and read as nnU-Net reads them, or refused in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from conftest import phantom, write_image
from PIL import Image
from skimage import io as skimage_io

from mtl_nnunet.cases import (
    Dataset,
    find_image_folder,
    find_nnunet_dataset,
    read_case,
    sampled_cases,
    with_patients,
)
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import sha256

MakeDataset = Callable[..., Path]


def describe(folder: Path, ending: str, channels: Sequence[str] = ("MRI",), **more: object) -> None:
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "ball": 1},
        "numTraining": 2,
        "file_ending": ending,
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(description))


def edit_description(folder: Path, **changes: object) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, **changes}))


def oblique_affine(shear: float = 0.0) -> np.ndarray:
    """Voxel axes turned by 20 degrees about x, with spacing (x, y, z) = (1, 1.5, 3); a shear makes it non-orthonormal."""
    angle = np.deg2rad(20)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    turn[0, 1] = shear
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.0, 1.5, 3.0])
    return affine


def write_nibabel_dataset(folder: Path, affine: np.ndarray, **more: object) -> None:
    describe(folder, ".nii.gz", **more)  # type: ignore[arg-type]
    for name in ("a", "b"):
        image, label = phantom((6, 40, 36), seed=ord(name))
        for part, voxels in ((f"imagesTr/{name}_0000", image[0]), (f"labelsTr/{name}", label)):
            (folder / part).parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels.transpose(2, 1, 0), affine), folder / f"{part}.nii.gz")


def read_first(dataset: Dataset):  # type: ignore[no-untyped-def]
    return read_case(dataset.cases[0], dataset.reader, len(dataset.channel_names))


# ------------------------------------------------------------------------------------------------- nnU-Net raw folders


def test_raw_dataset_is_found_by_number_and_by_name(make_dataset: MakeDataset) -> None:
    make_dataset(number=7, num_cases=3, channel_names=("T1", "T2"))
    dataset = find_nnunet_dataset(7)
    assert (
        dataset == find_nnunet_dataset("7") == find_nnunet_dataset("007") == find_nnunet_dataset("Dataset007_Phantom")
    )
    assert dataset.channel_names == ("T1", "T2")
    assert [case.name for case in dataset.cases] == ["case_00", "case_01", "case_02"]
    assert [image.name for image in dataset.cases[0].images] == ["case_00_0000.nii.gz", "case_00_0001.nii.gz"]
    assert dataset.cases[0].label is not None
    assert dataset.cases[0].label.name == "case_00.nii.gz"
    assert dataset.num_patients == 3


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".gipl"])
def test_formats_of_simpleitk_are_read_with_axes_and_spacing_z_y_x(make_dataset: MakeDataset, ending: str) -> None:
    make_dataset(num_cases=2, shape=(5, 20, 24), spacing=(3.0, 1.5, 0.5), ending=ending)
    dataset = find_nnunet_dataset(1)
    image = read_first(dataset)
    voxels, label = phantom((5, 20, 24), seed=100)
    assert dataset.reader == "SimpleITKIO"
    np.testing.assert_allclose(image.voxels, voxels, rtol=1e-6)
    assert image.voxels.dtype == np.float32
    np.testing.assert_allclose(image.spacing, (3.0, 1.5, 0.5), rtol=1e-6)
    np.testing.assert_array_equal(image.label > 0, label > 0)
    case = dataset.cases[0]
    assert case.label is not None
    assert image.hashes == (sha256(case.images[0]), sha256(case.label))


def test_uncompressed_nifti_is_read_by_nibabel_as_in_nnunet(make_dataset: MakeDataset) -> None:
    make_dataset(num_cases=2, shape=(5, 20, 24), spacing=(3.0, 1.5, 0.5), ending=".nii")
    dataset = find_nnunet_dataset(1)
    image = read_first(dataset)
    assert dataset.reader == "NibabelIO"
    np.testing.assert_allclose(image.voxels, phantom((5, 20, 24), seed=100)[0], rtol=1e-6)
    np.testing.assert_allclose(image.spacing, (3.0, 1.5, 0.5), rtol=1e-6)


def test_gray_png_is_a_case_of_one_slice(nnunet_folders: Path) -> None:
    folder = nnunet_folders / "raw" / "Dataset002_Gray"
    describe(folder, ".png")
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    gray = np.random.default_rng(0).integers(0, 255, (40, 48), dtype=np.uint8)
    for name in ("a", "b"):
        skimage_io.imsave(folder / "imagesTr" / f"{name}_0000.png", gray, check_contrast=False)
        skimage_io.imsave(folder / "labelsTr" / f"{name}.png", (gray > 99).astype(np.uint8), check_contrast=False)
    dataset = find_nnunet_dataset(2)
    image = read_first(dataset)
    assert dataset.reader == "NaturalImage2DIO"
    np.testing.assert_array_equal(image.voxels, gray[None, None])
    np.testing.assert_array_equal(image.label > 0, gray[None] > 99)
    assert image.spacing == (999.0, 1.0, 1.0)


def test_rgb_png_holds_three_channels_in_one_file(nnunet_folders: Path) -> None:
    folder = nnunet_folders / "raw" / "Dataset003_RGB"
    describe(folder, ".png", channels=("R", "G", "B"))
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    rgb = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    for name in ("a", "b"):
        skimage_io.imsave(folder / "imagesTr" / f"{name}_0000.png", rgb, check_contrast=False)
        skimage_io.imsave(
            folder / "labelsTr" / f"{name}.png", (rgb[..., 0] > 99).astype(np.uint8), check_contrast=False
        )
    dataset = find_nnunet_dataset(3)
    np.testing.assert_array_equal(read_first(dataset).voxels, rgb.transpose(2, 0, 1)[:, None])


@pytest.mark.parametrize("with_spacing", [True, False])
def test_3d_tif_takes_its_spacing_from_the_json_beside_it(nnunet_folders: Path, with_spacing: bool) -> None:
    folder = nnunet_folders / "raw" / "Dataset004_Tif"
    describe(folder, ".tif")
    voxels, label = phantom((6, 20, 24), seed=1)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    for name in ("a", "b"):
        tifffile.imwrite(folder / "imagesTr" / f"{name}_0000.tif", voxels[0])
        tifffile.imwrite(folder / "labelsTr" / f"{name}.tif", label)
        for part in ("imagesTr", "labelsTr") if with_spacing else ():
            (folder / part / f"{name}.json").write_text(json.dumps({"spacing": [4.0, 1.0, 0.5]}))
    dataset = find_nnunet_dataset(4)
    image = read_first(dataset)
    assert dataset.reader == "Tiff3DIO"
    np.testing.assert_array_equal(image.voxels, voxels)
    np.testing.assert_array_equal(image.label > 0, label > 0)
    assert image.spacing == ((4.0, 1.0, 0.5) if with_spacing else (1.0, 1.0, 1.0))


def test_oblique_nifti_keeps_its_voxel_axes(nnunet_folders: Path) -> None:
    write_nibabel_dataset(nnunet_folders / "raw" / "Dataset005_Oblique", oblique_affine())
    dataset = find_nnunet_dataset(5)
    image = read_first(dataset)
    assert dataset.reader == "SimpleITKIO"
    np.testing.assert_allclose(image.voxels, phantom((6, 40, 36), seed=ord("a"))[0], rtol=1e-6)
    np.testing.assert_allclose(image.spacing, (3.0, 1.5, 1.0), rtol=1e-5)


def test_non_orthonormal_nifti_falls_to_nibabel_as_in_nnunet(
    nnunet_folders: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = nnunet_folders / "raw" / "Dataset006_Sheared"
    write_nibabel_dataset(folder, oblique_affine(shear=0.2))
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(folder / "imagesTr" / "a_0000.nii.gz"))
    capfd.readouterr()
    dataset = find_nnunet_dataset(6)
    assert dataset.reader == "NibabelIO"
    np.testing.assert_allclose(read_first(dataset).voxels, phantom((6, 40, 36), seed=ord("a"))[0], rtol=1e-6)
    assert "Traceback" not in "".join(capfd.readouterr()), "nnU-Net's tracebacks are not the user's business"


def test_reader_named_in_dataset_json_wins(nnunet_folders: Path) -> None:
    folder = nnunet_folders / "raw" / "Dataset005_Oblique"
    write_nibabel_dataset(folder, oblique_affine(), overwrite_image_reader_writer="NibabelIOWithReorient")
    assert find_nnunet_dataset(5).reader == "NibabelIOWithReorient"


def test_several_channels_in_one_4d_nifti(nnunet_folders: Path) -> None:
    folder = nnunet_folders / "raw" / "Dataset008_4D"
    describe(folder, ".nii.gz", channels=("T1", "T2"))
    (folder / "imagesTr").mkdir()
    for name in ("a", "b"):
        voxels, label = phantom((6, 20, 24), seed=1, channels=2)
        affine = np.diag([1.0, 2.0, 3.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(voxels.transpose(3, 2, 1, 0), affine), folder / f"imagesTr/{name}_0000.nii.gz")
        write_image(folder / "labelsTr" / f"{name}.nii.gz", label, (3, 2, 1))
    nnunet, monai = find_nnunet_dataset(8), find_image_folder(folder / "imagesTr", ("T1", "T2"))
    for dataset in (nnunet, monai):
        image = read_first(dataset)
        np.testing.assert_allclose(image.voxels, voxels, rtol=1e-6)
        np.testing.assert_allclose(image.spacing, (3.0, 2.0, 1.0), rtol=1e-6)


def test_dataset_json_may_list_paths_outside_its_folder(make_dataset: MakeDataset, tmp_path: Path) -> None:
    folder = make_dataset(num_cases=3)
    plain = find_nnunet_dataset(1)
    shutil.move(folder / "imagesTr", tmp_path / "elsewhere")
    entries = {
        f"case_{i:02d}": {
            "images": [str(tmp_path / "elsewhere" / f"case_{i:02d}_0000.nii.gz")],
            "label": f"./labelsTr/case_{i:02d}.nii.gz",
        }
        for i in (2, 0, 1)
    }
    edit_description(folder, dataset=entries)
    listed = find_nnunet_dataset(1)
    assert [c.name for c in listed.cases] == [c.name for c in plain.cases]
    np.testing.assert_array_equal(read_first(listed).voxels[0], phantom((12, 40, 36), seed=100)[0][0])


def test_old_dataset_json_calls_its_channels_modality(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    description = json.loads((folder / "dataset.json").read_text())
    description["modality"] = description.pop("channel_names")
    (folder / "dataset.json").write_text(json.dumps(description))
    assert find_nnunet_dataset(1).channel_names == ("MRI",)


def test_files_of_other_kinds_in_the_image_folder_are_passed_over(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    (folder / "imagesTr" / ".DS_Store").write_text("")
    (folder / "imagesTr" / "notes.txt").write_text("")
    assert len(find_nnunet_dataset(1).cases) == 2


# ------------------------------------------------------------------------------------- plain folders and datalists


def test_plain_folder_takes_every_file_as_a_case(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_image(tmp_path / f"{name}.nii.gz", phantom((5, 20, 24), seed=1)[0][0], (3.0, 1.5, 0.5))
    (tmp_path / "readme.txt").write_text("")
    dataset = find_image_folder(tmp_path)
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert (dataset.name, dataset.reader, len(dataset.channel_names)) == (tmp_path.name, "monai", 1)
    image = read_first(dataset)
    np.testing.assert_allclose(image.voxels, phantom((5, 20, 24), seed=1)[0], rtol=1e-6)
    np.testing.assert_allclose(image.spacing, (3.0, 1.5, 0.5), rtol=1e-6)
    assert image.label is None


def test_plain_folder_groups_files_numbered_like_channels(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2, channel_names=("T1", "T2"))
    dataset = find_image_folder(folder / "imagesTr", ("T1", "T2"))
    assert [case.name for case in dataset.cases] == ["case_00", "case_01"]
    np.testing.assert_array_equal(read_first(dataset).voxels, read_first(find_nnunet_dataset(1)).voxels)


def write_pixels(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 24), dtype=np.uint8)).save(folder / name)


@pytest.mark.parametrize(
    ("names", "cases"),
    [
        # numbered images of one patient are no channels, wherever the numbers start
        (["p_0001.png", "p_0002.png", "p_0003.png"], [["p_0001.png"], ["p_0002.png"], ["p_0003.png"]]),
        (["a_0000.png", "b_0000.png"], [["a_0000.png"], ["b_0000.png"]]),
        (["a_0001.png", "b_0004.png", "c.png"], [["a_0001.png"], ["b_0004.png"], ["c.png"]]),
        (["a_0000.png", "a_0001.png", "b_0000.png", "b_0001.png"], [["a_0000.png", "a_0001.png"], ["b_0000.png", "b_0001.png"]]),
        # what macOS leaves on other file systems
        (["a.png", "b.png", "._a.png"], [["a.png"], ["b.png"]]),
    ],
)  # fmt: skip
def test_numbers_are_channels_only_where_all_cases_have_them_from_0(
    tmp_path: Path, names: list[str], cases: list[list[str]]
) -> None:
    write_pixels(tmp_path, *names)
    assert [[file.name for file in case.images] for case in find_image_folder(tmp_path).cases] == cases


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "a.png", "b.jpg", "b.png"], r"a\.jpg and a\.png have one name"),
        (["a_0000.png", "a_0000.bmp", "b_0000.png"], r"a_0000\.bmp and a_0000\.png have one name"),
        (["p_0000.png", "p_0001.png"], r"channels of one case \(p\)"),
        (["p_0000.png", "p_0001.png", "q_0000.png"], r"\(p has 0000 to 0001\), but not all of them alike \(q has 0000\)"),
        (["p_0000.png", "p_0001.png", "q_0001.png", "q_0002.png"], r"not all of them alike \(q has 0001, 0002\)"),
        (["p_0000.png", "p_0001.png", "q_0000.png", "q_0001.png", "q_0002.png"], r"\(q has 0000, 0001, 0002\)"),
        (["p_0000.png", "p_0001.png", "q.png"], r"not all of them alike \(q\.png has no number\)"),
    ],
)  # fmt: skip
def test_files_that_may_be_channels_or_masks_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    write_pixels(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        find_image_folder(tmp_path)


def test_a_missing_channel_in_a_plain_folder_can_be_skipped(tmp_path: Path) -> None:
    write_pixels(tmp_path, *(f"{c}_{i:04d}.png" for c in "abcdefghij" for i in range(2)), "k_0001.png")
    found = find_image_folder(tmp_path, skip_bad_cases=True)
    assert "".join(case.name for case in found.cases) == "abcdefghij"
    assert [name for name, _ in found.skipped] == ["k"]


@pytest.mark.parametrize("ending", ["png", "bmp"])
def test_palettes_are_read_by_colour_and_labels_by_index(tmp_path: Path, ending: str) -> None:
    colours = np.random.default_rng(0).integers(0, 4, (20, 24, 3), dtype=np.uint8) * 80
    image = Image.fromarray(colours).quantize(64)
    for name in ("a", "b"):
        image.save(tmp_path / f"{name}.{ending}")
    read = read_first(find_image_folder(tmp_path))
    np.testing.assert_array_equal(read.voxels[:, 0].transpose(1, 2, 0), colours)
    entries = [{"image": f"{name}.{ending}", "label": f"{name}.{ending}"} for name in ("a", "b")]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    label = read_first(find_image_folder(tmp_path)).label
    np.testing.assert_array_equal(label[0], np.asarray(image))


def test_a_datalist_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sitk.WriteImage(sitk.GetImageFromArray(phantom((5, 20, 24), seed=1)[0][0]), tmp_path / f"{name}.mha")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a.mha"}, {"image": "b.mha"}]}))
    with pytest.raises(UserError, match=r"list\.json names .*a\.mha.*use -d"):
        find_image_folder(tmp_path / "list.json")


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("shape", [(40, 48), (40, 48, 3)])
def test_plain_folder_of_natural_images_keeps_rows_and_columns(tmp_path: Path, ending: str, shape: tuple) -> None:  # type: ignore[type-arg]
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    for name in ("a", "b"):
        skimage_io.imsave(tmp_path / f"{name}{ending}", pixels, check_contrast=False)
    image = read_first(find_image_folder(tmp_path))
    expected = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    np.testing.assert_array_equal(image.voxels, expected[:, None])
    assert image.spacing == (999.0, 1.0, 1.0)


def test_plain_folder_of_2d_nifti_without_a_third_axis(tmp_path: Path) -> None:
    pixels = phantom((1, 40, 48), seed=1)[0][0, 0]
    for name in ("a", "b"):
        nibabel.save(nibabel.Nifti1Image(pixels.T, np.diag([0.5, 2.0, 1.0, 1.0])), tmp_path / f"{name}.nii.gz")
    image = read_first(find_image_folder(tmp_path))
    np.testing.assert_array_equal(image.voxels, pixels[None, None])
    np.testing.assert_allclose(image.spacing, (999.0, 2.0, 0.5))


def test_stack_of_pages_in_a_plain_folder_is_not_taken_for_its_first_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"{name}.tif", phantom((6, 40, 48), seed=1)[0][0])
    with pytest.raises(UserError, match=r"a\.tif.*6 pages"):
        find_image_folder(tmp_path)


@pytest.fixture
def decathlon(make_dataset: MakeDataset) -> Path:
    """The phantom dataset described as the Decathlon does."""
    folder = make_dataset(num_cases=3)
    for file in (folder / "imagesTr").iterdir():
        file.rename(file.with_name(file.name.replace("_0000", "")))
    training = [
        {"image": f"./imagesTr/case_{i:02d}.nii.gz", "label": f"./labelsTr/case_{i:02d}.nii.gz"} for i in range(3)
    ]
    content = {"modality": {"0": "CT"}, "training": training, "test": [], "labels": {"0": "background", "1": "ball"}}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("given", ["folder", "file", "file of another name"])
def test_decathlon_datalist_is_found(decathlon: Path, given: str) -> None:
    path = decathlon
    if given != "folder":
        path = decathlon / "dataset.json"
    if given == "file of another name":
        path = path.rename(decathlon / "split.json")
    dataset = find_image_folder(path)
    assert dataset.channel_names == ("CT",)
    assert [case.name for case in dataset.cases] == ["case_00", "case_01", "case_02"]
    image = read_first(dataset)
    np.testing.assert_allclose(image.voxels, phantom((12, 40, 36), seed=100)[0], rtol=1e-6)
    np.testing.assert_array_equal(image.label > 0, phantom((12, 40, 36), seed=100)[1] > 0)


def test_datalist_may_list_channels_in_files_of_their_own(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2, channel_names=("T1", "T2"))
    training = [{"image": [f"imagesTr/case_{i:02d}_{c:04d}.nii.gz" for c in range(2)]} for i in range(2)]
    (folder / "list.json").write_text(json.dumps({"training": training}))
    dataset = find_image_folder(folder / "list.json", ("T1", "T2"))
    assert len(dataset.cases) == 2
    np.testing.assert_array_equal(read_first(dataset).voxels, phantom((12, 40, 36), seed=100, channels=2)[0])


# ------------------------------------------------------------------------------------------------------------ patients


def test_patients_come_from_the_table(make_dataset: MakeDataset, tmp_path: Path) -> None:
    make_dataset(num_cases=3)
    table = tmp_path / "patients.csv"
    table.write_text(
        "\ufeffcase,age,patient\ncase_00,50,anna\ncase_01,50, anna\ncase_02,60,ben\nothers,1,carl\n", "utf-8"
    )
    dataset = with_patients(find_nnunet_dataset(1), table)
    assert [case.patient for case in dataset.cases] == ["anna", "anna", "ben"]
    assert dataset.num_patients == 2


def test_sample_takes_every_patient_before_any_twice(make_dataset: MakeDataset, tmp_path: Path) -> None:
    make_dataset(num_cases=6)
    table = tmp_path / "patients.csv"
    rows = [f"case_{i:02d},{patient}" for i, patient in enumerate("aaaabc")]
    table.write_text("\n".join(["case,patient", *rows]))
    dataset = with_patients(find_nnunet_dataset(1), table)
    samples = [sampled_cases(dataset, 3, seed) for seed in range(10)]
    assert all(sorted(case.patient for case in sample) == ["a", "b", "c"] for sample in samples)
    assert len({sample for sample in samples}) > 1, "the seed decides"
    assert sampled_cases(dataset, 3, 0) == sampled_cases(dataset, 3, 0)
    assert len(sampled_cases(dataset, 99, 0)) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "columns case,patient"),
        (b"", "columns case,patient|no patient for"),
        (b"name,subject\ncase_00,a\n", "columns case,patient"),
        (b"case;patient\ncase_00;a\n", "columns case,patient"),
        (b"case,patient\ncase_00,a\n", r"no patient for 2 cases \(case_01, case_02\)"),
        (b"case,patient\ncase_00,a\ncase_01\ncase_02,b\n", "columns case,patient|case_01"),
        (b"case,patient\ncase_00,a\ncase_01,\ncase_02,b\n", "case_01"),
        (b"case,patient\ncase_00,a\ncase_00,b\ncase_01,b\ncase_02,b\n", "case_00.*a.*b"),
        (b"PK\x03\x04\xff\xfe\x00spreadsheet", "columns case,patient"),
    ],
)
def test_bad_table_of_patients_is_refused(
    make_dataset: MakeDataset, tmp_path: Path, content: bytes | None, message: str
) -> None:
    make_dataset(num_cases=3)
    table = tmp_path / "patients.csv"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        with_patients(find_nnunet_dataset(1), table)
    assert "patients.csv" in str(refusal.value)


# ----------------------------------------------------------------------------------------------------------- bad input


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace_by_text(file: Path) -> None:
    file.write_text("this is no image\n" * 100)


def fill_nan(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    voxels = sitk.GetArrayFromImage(image)
    voxels[0, 0, 0] = np.nan
    write_image(file, voxels, image.GetSpacing()[::-1])


def make_constant(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    write_image(file, np.full_like(sitk.GetArrayFromImage(image), 7), image.GetSpacing()[::-1])


def delete(file: Path) -> None:
    file.unlink()


def fill_voxel_size(file: Path) -> None:
    image = nibabel.load(file, mmap=False)
    image.header["pixdim"][1:4] = np.nan
    image.header["qform_code"] = image.header["sform_code"] = 0
    broken = nibabel.Nifti1Image(np.asanyarray(image.dataobj), None, image.header)
    broken.header["pixdim"][1:4] = np.nan
    nibabel.save(broken, file)


def read_all(dataset: Dataset) -> None:
    for case in dataset.cases:
        read_case(case, dataset.reader, len(dataset.channel_names))


@pytest.mark.parametrize("number", [0, 2], ids=["first case", "later case"])
@pytest.mark.parametrize("how_read", ["nnunet", "monai"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read.*Replace the file"),
        (empty, "is empty.*Replace the file"),
        (replace_by_text, "cannot be read.*Replace the file"),
        (fill_nan, "NaN.*Repair"),
        (make_constant, r"constant \(7 everywhere\).*Repair"),
    ],
)
def test_damaged_image_is_named(
    make_dataset: MakeDataset, damage: Callable[[Path], None], message: str, number: int, how_read: str
) -> None:
    folder = make_dataset(num_cases=3)
    damage(folder / "imagesTr" / f"case_{number:02d}_0000.nii.gz")
    with pytest.raises(UserError, match=message) as refusal:
        read_all(find_nnunet_dataset(1) if how_read == "nnunet" else find_image_folder(folder / "imagesTr"))
    assert f"case_{number:02d}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", [truncate, empty, replace_by_text])
@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha"])
def test_damaged_image_of_another_format_is_named(
    make_dataset: MakeDataset, damage: Callable[[Path], None], ending: str
) -> None:
    folder = make_dataset(num_cases=2, ending=ending)
    damage(folder / "imagesTr" / f"case_01_0000{ending}")
    with pytest.raises(UserError, match="case_01_0000"):
        read_all(find_nnunet_dataset(1))


def test_voxel_size_that_is_no_number_is_refused(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2, ending=".nii")
    fill_voxel_size(folder / "imagesTr" / "case_01_0000.nii")
    with pytest.raises(UserError, match=r"case_01.*voxel size.*header"):
        read_all(find_nnunet_dataset(1))


def test_damaged_label_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    truncate(folder / "labelsTr" / "case_01.nii.gz")
    with pytest.raises(UserError, match=r"labelsTr/case_01\.nii\.gz cannot be read"):
        read_all(find_nnunet_dataset(1))


def test_missing_channel_file_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=3, channel_names=("T1", "T2"))
    delete(folder / "imagesTr" / "case_01_0001.nii.gz")
    with pytest.raises(UserError, match=r"case_01.*1 of 2 channel files.*Add the missing file"):
        find_nnunet_dataset(1)
    with pytest.raises(UserError, match=r"case_01.*1 of 2 channel files.*Add the missing file"):
        find_image_folder(folder / "imagesTr")


def test_channel_that_is_missing_from_every_case_is_noticed(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    edit_description(folder, channel_names={"0": "T1", "1": "T2"})
    with pytest.raises(UserError, match=r"case_00.*has 1 channels, but the dataset names 2.*channel_names"):
        read_all(find_nnunet_dataset(1))


def test_channels_on_different_grids_are_refused(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2, channel_names=("T1", "T2"))
    write_image(folder / "imagesTr" / "case_01_0001.nii.gz", phantom((11, 40, 36), seed=1)[0][0], (2, 1, 1))
    for dataset in (find_nnunet_dataset(1), find_image_folder(folder / "imagesTr")):
        with pytest.raises(UserError, match=r"case_01_0001.*differ in shape.*Resample"):
            read_all(dataset)


def test_label_of_another_shape_is_refused(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    write_image(folder / "labelsTr" / "case_01.nii.gz", phantom((12, 40, 35), seed=1)[1], (2, 1, 1))
    with pytest.raises(UserError, match=r"case_01: image \(12, 40, 36\) and label \(12, 40, 35\).*Resample"):
        read_all(find_nnunet_dataset(1))


def test_missing_label_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    delete(folder / "labelsTr" / "case_01.nii.gz")
    with pytest.raises(UserError, match=r"case case_01: .*labelsTr/case_01\.nii\.gz does not exist.*Add the file"):
        find_nnunet_dataset(1)


@pytest.mark.parametrize("dataset", [2, "2", "Dataset002_Other"])
def test_unknown_dataset_is_answered_with_those_that_exist(make_dataset: MakeDataset, dataset: str | int) -> None:
    make_dataset(num_cases=2)
    with pytest.raises(UserError, match=r"no dataset .*2.*Dataset001_Phantom.*Check -d"):
        find_nnunet_dataset(dataset)


@pytest.mark.parametrize("dataset", ["Hippocampus", "", "-1", "²"])
def test_what_is_no_dataset_at_all_is_refused(make_dataset: MakeDataset, dataset: str) -> None:
    make_dataset(num_cases=2)
    with pytest.raises(UserError, match="neither a dataset number nor a name"):
        find_nnunet_dataset(dataset)


def test_two_folders_of_one_number_are_refused(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    shutil.copytree(folder, folder.with_name("Dataset001_Copy"))
    for dataset in (1, "Dataset001_Copy"):
        with pytest.raises(UserError, match=r"number 1.*Dataset001_Copy, Dataset001_Phantom.*Rename"):
            find_nnunet_dataset(dataset)


def test_unset_environment_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(UserError, match=r"nnUNet_raw is not set.*Set nnUNet_raw"):
        find_nnunet_dataset(1)


def test_environment_that_names_no_folder_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere, which is no folder.*Correct"):
        find_nnunet_dataset(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list"),
        ("{}", "needs 'channel_names'"),
        ('{"channel_names": {"0": "MRI"}}', "needs 'channel_names'"),
        ('{"channel_names": {}, "file_ending": ".nii.gz"}', "needs 'channel_names'"),
        ('{"channel_names": {"MRI": 0}, "file_ending": ".nii.gz"}', "channel_names.*MRI"),
        ('{"channel_names": {"0": "MRI"}, "file_ending": ".dcm"}', r"no image in .*CASE_0000\.dcm"),
        ('{"channel_names": {"0": "MRI"}, "file_ending": ""}', "file_ending|no image in"),
        ('{"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "dataset": [1]}', "'dataset'"),
        ('{"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "dataset": {}}', "0 case|'dataset'"),
        ('{"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "dataset": {"a": {"images": ["x"]}}}', "'dataset'"),
        (
            '{"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "dataset": '
            '{"a": {"images": ["gone.nii.gz"], "label": "l"}, "b": {"images": ["gone.nii.gz"], "label": "l"}}}',
            r"case a: .*gone\.nii\.gz does not exist",
        ),
    ],
)
def test_broken_dataset_json_is_refused(make_dataset: MakeDataset, content: str | None, message: str) -> None:
    folder = make_dataset(num_cases=2)
    (folder / "dataset.json").unlink()
    if content is not None:
        (folder / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        find_nnunet_dataset(1)
    assert "Dataset001_Phantom" in str(refusal.value)


def test_format_that_nnunet_cannot_read_is_refused(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    for file in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()]:
        file.rename(file.with_name(file.name.replace(".nii.gz", ".xyz")))
    edit_description(folder, file_ending=".xyz")
    with pytest.raises(UserError, match=r"\.xyz.*case_00_0000\.xyz|case_00_0000\.xyz"):
        find_nnunet_dataset(1)


def test_missing_image_folder_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    shutil.rmtree(folder / "imagesTr")
    with pytest.raises(UserError, match=r"imagesTr does not exist"):
        find_nnunet_dataset(1)


def test_one_case_is_too_few(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=1)
    for find in (lambda: find_nnunet_dataset(1), lambda: find_image_folder(folder / "imagesTr")):
        with pytest.raises(UserError, match=r"holds 1 case\. At least two"):
            find()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ("{}", "'training'"),
        ('{"training": [1, 2]}', "'training'"),
        ('{"training": []}', "At least two|'training'"),
        ('{"training": [{"image": "gone.nii.gz"}, {"image": "gone2.nii.gz"}]}', r"gone\.nii\.gz, which does not exist"),
        ('{"training": [{"image": 1}, {"image": 2}]}', "'training'"),
        ('{"training": [{"image": []}, {"image": []}]}', "'training'"),
        ('{"training": [{"image": "a.nii.gz"}, {"image": "b.nii.gz"}], "modality": {"MRI": "0"}}', "modality"),
        ('{"training": [{"image": "a.nii.gz"}, {"image": "a.nii.gz"}]}', "two cases are called a"),
    ],
)
def test_broken_datalist_is_refused(tmp_path: Path, content: str, message: str) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.nii.gz", phantom((5, 20, 24), seed=1)[0][0])
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        find_image_folder(tmp_path / "list.json")
    assert "list.json" in str(refusal.value)


def test_nnunet_folder_given_as_plain_folder_points_to_the_right_option(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    with pytest.raises(UserError, match="use -d"):
        find_image_folder(folder)


def test_place_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder or datalist: .*nowhere"):
        find_image_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no image in"):
        find_image_folder(tmp_path)


def test_wrong_number_of_channel_names_is_refused(make_dataset: MakeDataset) -> None:
    folder = make_dataset(num_cases=2)
    with pytest.raises(UserError, match="1 channels, but 2 are named"):
        find_image_folder(folder / "imagesTr", ("T1", "T2"))

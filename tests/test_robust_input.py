"""Odd but legal inputs work; broken ones end in one line that names them."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from conftest import DEMO_RUN, phantom, write_image, write_phantoms

from mtl_nnunet.cases import find_image_folder, find_nnunet_dataset
from mtl_nnunet.cli.select_checkpoint import main
from mtl_nnunet.slices import gather_slices


def select(*more: str) -> int:
    return main(["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "24", "-device", "cpu", *more])


def refused(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert select(*more) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def save(path: Path, voxels_xyz: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> None:
    image = nibabel.Nifti1Image(voxels_xyz, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def test_a_time_axis_is_named(make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_dataset(1)
    save(
        folder / "imagesTr" / "case_02_0000.nii.gz",
        np.random.default_rng(0).normal(size=(36, 40, 12, 5)).astype(np.float32),
    )
    line = refused(capsys)
    assert "case_02" in line
    assert "5 channels" in line or "4" in line


def test_scaled_integers_are_read_as_what_they_stand_for(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1)
    plain = gather_slices(find_nnunet_dataset(1), 24)
    for file in sorted((folder / "imagesTr").iterdir()):
        image = nibabel.load(file)
        values = np.asarray(image.dataobj)
        slope, inter = 0.01, 1e5
        stored = np.round(values / 0.01).astype(np.int16)
        scaled = nibabel.Nifti1Image(stored, image.affine)
        scaled.header.set_slope_inter(slope, inter)
        nibabel.save(scaled, file)
        with np.errstate(all="ignore"):
            assert np.asarray(nibabel.load(file).dataobj).max() > 1e5 - 1e4, "beyond what int16 holds"
    scaled_slices = gather_slices(find_nnunet_dataset(1), 24)
    assert torch.allclose(plain.images, scaled_slices.images, atol=2e-2), "z-scores do not change with scale and offset"


def test_links_spaces_and_letters_of_other_alphabets(
    make_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset(1)
    plain = {hashes for case in gather_slices(find_nnunet_dataset(1), 24).used for hashes in case.sha256}
    raw = tmp_path / "räw dàta 数据"
    linked = raw / "Dataset001_Phantom"
    for part in ("imagesTr", "labelsTr"):
        (linked / part).mkdir(parents=True)
        for file in (folder / part).iterdir():
            (linked / part / file.name.replace("case_", "Fäll 患者 ")).symlink_to(file)
    (linked / "dataset.json").write_text((folder / "dataset.json").read_text())
    monkeypatch.setenv("nnUNet_raw", str(raw))
    assert select("-o", str(tmp_path / "sélection d'ici")) == 0
    content = json.loads((tmp_path / "sélection d'ici" / "selection.json").read_text(encoding="utf-8"))
    assert content["dataset"]["cases_used"][0]["name"].startswith("Fäll 患者")
    assert {hashes for case in content["dataset"]["cases_used"] for hashes in case["sha256"]} == plain


@pytest.mark.usefixtures("undrawn")
def test_orientations_that_disagree_and_spacing_0_do_not_end_in_a_traceback(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dataset(1)
    voxels = phantom((12, 40, 36), seed=7)[0][0].transpose(2, 1, 0)
    tilted = np.array([[0.8, 0.6, 0, 5], [-0.6, 0.8, 0, 7], [0, 0, 2, 1], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(voxels, np.diag([1, 1, 2, 1.0]))
    image.set_sform(tilted, code=2)
    image.set_qform(np.diag([1, 1, 2, 1.0]), code=1)
    nibabel.save(image, folder / "imagesTr" / "case_02_0000.nii.gz")
    assert select() == 0
    capsys.readouterr()
    content = bytearray(nibabel.Nifti1Image(voxels, None).to_bytes())
    content[80:92] = np.zeros(3, np.float32).tobytes()
    (folder / "imagesTr" / "case_02_0000.nii.gz").unlink()
    import gzip

    (folder / "imagesTr" / "case_02_0000.nii.gz").write_bytes(gzip.compress(bytes(content)))
    line = refused(capsys, "--overwrite")
    assert "case_02" in line


def test_a_label_that_is_all_background_counts_as_background(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1)
    write_image(folder / "labelsTr" / "case_02.nii.gz", np.zeros((12, 40, 36), np.uint8), (2.0, 1.0, 1.0))
    scores = ("contrastive", "ccfv", "probe", "hscore", "gbc", "logme", "knn", "dse_labels")
    assert select("-score", *scores, "-ckpt", str(DEMO_RUN / "checkpoint-39.pth.tar")) == 0


def test_labels_as_regions_and_an_ignore_label(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    description["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(description))
    assert select("-labels") == 0


def test_twenty_channels(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, num_cases=4, channel_names=[f"MR{i}" for i in range(20)])
    assert select() == 0


@pytest.mark.usefixtures("undrawn")
def test_volumes_smaller_than_the_encoders_stride(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, shape=(5, 14, 11), spacing=(1.0, 1.0, 1.0))
    slices = gather_slices(find_nnunet_dataset(1), 24)
    assert slices.images.shape[2:] == (64, 64)
    assert select() == 0


def test_one_giant_slice(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, num_cases=2, shape=(1, 4000, 4000), spacing=(999.0, 1.0, 1.0), ending=".nii")
    # a process of its own, whose peak is of this alone
    reading = (
        "import resource; from mtl_nnunet.cases import find_nnunet_dataset\n"
        "from mtl_nnunet.slices import gather_slices\n"
        "slices = gather_slices(find_nnunet_dataset(1), 2, num_workers=1)\n"
        "print(*slices.images.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", reading], capture_output=True, text=True, check=True)
    *shape, peak = map(int, done.stdout.split())
    assert shape == [2, 1, 512, 512]
    assert peak / 2**20 < 4, "GiB"


def test_a_plain_folder_with_odd_names(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "data", num_cases=3)
    images = tmp_path / "data" / "imagesTr"
    for file in list(images.iterdir()):
        os.rename(file, images / file.name.replace("case_0", "Bild nummer ").replace("_0000", ""))
    assert len(find_image_folder(images).cases) == 3


# ITK's reader computes for ever on these rows, which a fuzz test came upon
ENDLESS = (
    *(6.4707054e15, -0.0, -0.0, 3e38),
    *(4.7135823e16, 0.0, 1e30, -9.2196294e15),
    *(60.0, float("-inf"), -5.4929054e16, -1.6854989e16),
)


@pytest.mark.parametrize("comment", [b"", b"x" * 2000])
def test_an_orientation_with_infinity_is_refused_and_not_read_for_ever(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str], comment: bytes
) -> None:
    folder = make_dataset(1, num_cases=6)
    file = sorted((folder / "imagesTr").glob("*.nii.gz"))[0]
    image = nibabel.load(file)
    image.set_sform(np.eye(4), code=2)
    if comment:
        # an extension between header and voxels
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", comment))
    nibabel.save(image, file)
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[280:328] = struct.pack("<12f", *ENDLESS)
    file.write_bytes(gzip.compress(bytes(content)))
    line = refused(capsys)
    assert file.name in line
    assert line.endswith("states an orientation that holds NaN or infinity. Repair the header.")

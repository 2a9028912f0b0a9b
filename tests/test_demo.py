"""The demonstration's data: real, whole, and held out honestly."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from mtl_nnunet.demo import CORNERS_X, CORNERS_Z, HELD_OUT_Z, run_demo, write_blocks
from mtl_nnunet.errors import UserError

pytest.importorskip("nilearn", reason="the template comes with nilearn")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "Dataset900_MNIBlocks"
    write_blocks(folder)
    return folder


def test_blocks_make_an_nnunet_dataset(blocks: Path) -> None:
    from mtl_nnunet.cases import find_image_folder

    description = json.loads((blocks / "dataset.json").read_text())
    images = sorted((blocks / "imagesTr").iterdir())
    assert description["numTraining"] == len(images) >= 20
    assert [i.name.replace("_0000", "") for i in images] == sorted(p.name for p in (blocks / "labelsTr").iterdir())
    assert len(find_image_folder(blocks / "imagesTr").cases) == len(images)


def test_blocks_are_the_template_at_the_place_that_their_header_states(blocks: Path) -> None:
    from nilearn.datasets import load_mni152_template

    template = load_mni152_template(resolution=1)
    block = nibabel.load(blocks / "imagesTs" / f"block_x034_y086_z{HELD_OUT_Z:03d}_0000.nii.gz")
    corner = np.linalg.inv(template.affine) @ block.affine @ [3, 5, 7, 1]
    expected = template.get_fdata()[tuple(np.round(corner[:3]).astype(int))]
    assert block.get_fdata()[3, 5, 7] == pytest.approx(expected)


def test_held_out_slab_is_not_in_training_on_either_side_of_the_symmetric_brain(blocks: Path) -> None:
    assert HELD_OUT_Z in CORNERS_Z
    assert not list((blocks / "imagesTr").glob(f"*_z{HELD_OUT_Z:03d}_*"))
    sides = {p.name.split("_")[1] for p in (blocks / "imagesTs").iterdir()}
    assert sides == {f"x{x:03d}" for x in CORNERS_X}


def test_every_block_holds_both_tissues(blocks: Path) -> None:
    for label in (*(blocks / "labelsTr").iterdir(), *(blocks / "labelsTs").iterdir()):
        assert set(np.unique(nibabel.load(label).get_fdata())) == {0, 1, 2}


def test_demo_does_not_overwrite_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no earlier demonstration"):
        run_demo(tmp_path / "notes.txt", overwrite=True)


def test_demo_never_overwrites_a_folder_that_is_no_demonstration(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        run_demo(tmp_path)
    with pytest.raises(UserError, match="no earlier demonstration"):
        run_demo(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"

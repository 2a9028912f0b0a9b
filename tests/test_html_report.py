"""The report of a selection: what it says, that it stands alone, and that a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import DEMO_RUN, write_phantoms
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from pages import (
    HOSTILE,
    Page,
    check_that_a_browser_shows_it,
    check_that_it_stands_alone_and_can_be_read_by_all,
    needs_chromium,
)
from PIL import Image

from mtl_nnunet.cases import Case, find_nnunet_dataset, orientation
from mtl_nnunet.checkpoints import Published, find_checkpoints
from mtl_nnunet.cli.select_checkpoint import main
from mtl_nnunet.pictures import edges_of, shown_ranges
from mtl_nnunet.select import select_checkpoint
from mtl_nnunet.slices import gather_slices
from mtl_nnunet.views import make_views


def selected(folder: Path, dataset: Any = 1, checkpoints: Any = DEMO_RUN, *scores: str, **options: Any) -> Page:
    select_checkpoint(
        dataset, checkpoints, list(scores) or "contrastive", output=folder, **{"num_slices": 16, **options}
    )
    page = Page(folder / "report.html")
    check_that_it_stands_alone_and_can_be_read_by_all(page)
    return page


def of_draws(share: float) -> str:
    return "&lt;0.001" if share < 0.001 else "&gt;0.999" if share > 0.999 else f"{share:.3f}"


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture
def dataset(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(1, num_cases=6)


def test_the_page_says_what_selection_json_says(dataset: Path, tmp_path: Path) -> None:
    page = selected(tmp_path / "chosen", seed=3)
    content = content_of(tmp_path / "chosen")
    losses = {c["label"]: c for c in content["expected_loss"]["checkpoints"]}
    mine = losses["39"]
    # neither the rule without a price nor its numbers saw an image, and the page does not let anybody believe it
    assert page.verdict.startswith(
        "Start from epoch 39 of 39 (the last). Going by its epoch alone, as other trainings went, and not by these images, "
    )
    assert (
        f"{100 * mine['expected_loss']:.2f} Dice points, 90 % interval {100 * mine['low']:.2f} to {100 * mine['high']:.2f}"
        in page.verdict
    )
    cheaper = content["budget"][1]
    assert (
        f"Stopping at epoch {cheaper['epoch']} could have saved {cheaper['saved_share']:.0%} of the run" in page.verdict
    )
    assert f"of the run for an expected loss of {100 * cheaper['expected_loss']:.2f} Dice points." in page.verdict
    for entry in content["checkpoints"]:
        row = " ".join(
            [
                f"epoch {entry['epoch']} {entry['value']:.4f} {entry['low']:.4f} to {entry['high']:.4f}",
                f"{of_draws(entry['probability_of_best_score'])} {entry['logged_accuracy']:.2f}",
                f"{100 * losses[str(entry['epoch'])]['expected_loss']:.2f}",
            ]
        )
        assert row in re.sub(r"</t[dh]>", " ", page.source).replace("  ", " ").replace("<td>", "").replace(
            '<th scope="row">', ""
        )
    for said in (
        "seed 3",
        content["choice"]["sha256"][:12],
        "6 of 6",
        "case_05",
        "2 × 1 × 1",
        "nnUNetv2_plan_and_preprocess -d 1 -c 2d",
        f"mtl-nnunet plans -d 1 -selection {tmp_path / 'chosen'}",
        *content["versions"].values(),
    ):
        assert said in page.words
    num_views = 3
    assert f"{(6 + 1) * 16 * num_views} forwards" in page.words


def test_a_second_run_tells_what_was_kept(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    command = ["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "16", "-device", "cpu"]
    folder = tmp_path / "Dataset001_Phantom" / "mtl_selection"
    assert main(command) == 0
    assert "had been made before" not in Page(folder / "report.html").words
    assert main([*command, "--overwrite"]) == 0
    words = Page(folder / "report.html").words
    assert "0 forwards" in words
    assert f"The other {7 * 16 * 3} forwards had been made before" in words
    assert "nnUNetv2_train 1 2d 0 -tr MTLTrainer -device cpu" in words
    assert f"mtl-select-checkpoint -d 1 -ckpt {DEMO_RUN}" in words


def test_nothing_that_is_named_outside_becomes_markup(nnunet_folders: Path, tmp_path: Path) -> None:
    folder = write_phantoms(nnunet_folders / "raw" / f"Dataset007_{HOSTILE}", channel_names=[HOSTILE])
    for file in sorted(folder.rglob("case_*")):
        file.rename(file.with_name(file.name.replace("case_", f"{HOSTILE} ")))
    run = tmp_path / f"run{HOSTILE}"
    run.mkdir()
    names = [f"{HOSTILE}{letter}.pth.tar" for letter in "ab"]
    for name, epoch in zip(names, (3, 39), strict=True):
        shutil.copy(DEMO_RUN / f"checkpoint-{epoch}.pth.tar", run / name)
    found = [replace(c, epoch=None, logged_accuracy=None) for n in names for c in find_checkpoints([run / n])]
    page = selected(tmp_path / "chosen", f"Dataset007_{HOSTILE}", found, command=["mtl-select-checkpoint", HOSTILE])
    assert page.words.count(HOSTILE) > 10
    assert page.source.count("<img ") == page.source.count('<img src="data:image/png;base64,')
    for svg in (tmp_path / "chosen").glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(svg).iter()}
        assert not {"img", "script", "foreignObject", "a"} & tags


def test_figures_look_the_same_after_a_training(dataset: Path, tmp_path: Path) -> None:
    files = ("ranking.png", "ranking.svg", "expected_loss.png", "slices.png")
    selected(tmp_path / "before")
    log = LocalLogger()
    for key in log.my_fantastic_logging:
        log.log(key, [0.5] if key == "dice_per_class_or_region" else 0.5, 0)
    with matplotlib.rc_context():
        log.plot_progress_png(str(tmp_path))
        assert matplotlib.rcParams["axes.labelsize"] != matplotlib.rcParamsDefault["axes.labelsize"]
        selected(tmp_path / "after")
    assert [(tmp_path / "after" / f).read_bytes() for f in files] == [
        (tmp_path / "before" / f).read_bytes() for f in files
    ]


def test_published_weights_have_no_epochs(dataset: Path, tmp_path: Path) -> None:
    found = [
        replace(
            c,
            epoch=None,
            logged_accuracy=None,
            published=Published(f"timm:net.{i}", "timm/net", "1" * 40, "cc-by-nc-4.0"),
        )
        for i, c in enumerate(find_checkpoints(DEMO_RUN)[-3:])
    ]
    page = selected(tmp_path / "chosen", 1, found)
    chosen = content_of(tmp_path / "chosen")["choice"]["published"]["name"]
    assert page.verdict.startswith(f"Start from {chosen.partition(':')[2]}, one of 3 checkpoints (best score)")
    assert "epoch" not in page.verdict
    assert "forbids commercial use" in page.words
    assert "licence cc-by-nc-4.0" in page.words
    assert not (tmp_path / "chosen" / "expected_loss.png").exists()


def test_steps_and_no_epochs(dataset: Path, tmp_path: Path) -> None:
    found = [replace(c, epoch=None, step=1000 * (i + 1)) for i, c in enumerate(find_checkpoints(DEMO_RUN)[-3:])]
    page = selected(tmp_path / "chosen", 1, found)
    assert page.verdict.startswith("Start from step 3000, one of 3 checkpoints (last epoch)")
    assert "pretraining step" in page.source


def test_one_checkpoint_is_no_choice(dataset: Path, tmp_path: Path) -> None:
    page = selected(tmp_path / "chosen", 1, [DEMO_RUN / "checkpoint-39.pth.tar"])
    assert page.verdict.startswith("Start from epoch 39, the only checkpoint.")
    assert "best" not in page.verdict
    assert "nothing was chosen" in page.words


def test_a_race_says_what_it_saved(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    make_dataset(2, num_cases=20)
    page = selected(tmp_path / "chosen", 2, race=True, num_slices=40)
    out = [c for c in content_of(tmp_path / "chosen")["checkpoints"] if "out_after_patients" in c]
    assert out
    assert all(f"out after {c['out_after_patients']} patients" in page.words for c in out)
    assert re.search(r"The race took \d+ % of the 840 forwards", page.words)
    # how often they would score best among all was never drawn
    rows = [row for row in re.findall(r"<tr.*?</tr>", page.source, re.DOTALL) if "out after" in row]
    cells = [re.findall(r">([^<]*)</t[dh]>", row) for row in rows]
    assert len(cells) == len(out)
    assert all(c[3] == "–" for c in cells)


def test_scores_with_labels_show_them_and_every_level(dataset: Path, tmp_path: Path) -> None:
    page = selected(tmp_path / "chosen", 1, DEMO_RUN, "ccfv", "rankme", fold=0)
    content = content_of(tmp_path / "chosen")
    assert all(f"Level {level}" in page.text["levels"] for level in content["choice"]["levels"])
    assert all(f"{v:.4f}" in page.text["levels"] for c in content["checkpoints"] for v in c["levels"].values())
    assert "rankme" in page.text["others"]
    assert "slice and label" in page.text["slices"]
    assert "without those of fold 0" in page.words
    # two of the six are validation cases, and the page says where they went
    assert "4 of 4 for training in fold 0" in page.words
    assert "Labels: 1 yellow, 2 blue." in page.text["slices"]
    assert "ccfv (higher is better)" in page.text["levels"]
    assert "rankme (higher is better)" in page.text["others"]
    assert "without views" in page.text["slices"]
    assert (tmp_path / "chosen" / "levels.svg").is_file()


def test_a_folder_of_photographs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    page = selected(tmp_path / "chosen", str(tmp_path / "images"))
    assert "not stated" in page.text["data"]
    assert "state an orientation" in page.text["slices"]
    assert "nnUNetv2" not in page.words
    assert "From Python" in page.words


def pictures_of(page: Page, case: str, position: str) -> list[np.ndarray]:
    found = [i for i in page.all("img") if re.search(rf"of case {case}, slice {position}\b", str(i["alt"]))]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(str(i["src"]).partition(",")[2])))) for i in found]


@pytest.mark.parametrize("score", ["contrastive", "robustness"])
def test_pictures_are_what_was_scored(dataset: Path, tmp_path: Path, score: str) -> None:
    page = selected(tmp_path / "chosen", 1, DEMO_RUN, score, seed=5)
    slices = gather_slices(find_nnunet_dataset(1), 16, 64, 5)
    kind, number = ("scanner", 3) if score == "contrastive" else ("paper", 2)
    views = make_views(slices.images, kind, number, 5).numpy()
    ((low, high),) = shown_ranges(slices)
    shown = re.findall(r'alt="slice of case (\w+), slice (\d+)', page.source)
    assert len(shown) >= 3
    for case, position in shown:
        (place,) = [i for i in range(16) if slices.cases[i] == case and slices.positions[i] == int(position)]
        expected = [slices.images[place, 0].numpy(), *views[:, place, 0]]
        for picture, pixels in zip(pictures_of(page, case, position), expected, strict=True):
            assert np.abs(picture - 255 * np.clip((pixels - low) / (high - low), 0, 1)).max() <= 0.5 + 1e-3


def test_a_slice_is_found_in_its_file_by_its_number(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    """nnU-Net crops to what is not zero, and whoever looks for a slice opens the file."""
    for file in sorted((make_dataset(6, num_cases=3) / "imagesTr").iterdir()):
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        array[:5] = 0
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.0, 2.0))
        sitk.WriteImage(image, str(file))
    page = selected(tmp_path / "chosen", 6)
    named = re.findall(r'alt="slice of case (\w+), slice (\d+)', page.source)
    assert named
    for case, position in named:
        array = sitk.GetArrayFromImage(
            sitk.ReadImage(str(tmp_path / "raw" / "Dataset006_Phantom" / "imagesTr" / f"{case}_0000.nii.gz"))
        )
        picture = pictures_of(page, case, position)[0].astype(float)
        rows, columns = array.shape[1:]
        top, left = (picture.shape[0] - rows) // 2, (picture.shape[1] - columns) // 2
        inside = picture[top : top + rows, left : left + columns].ravel()
        alike = [np.corrcoef(inside, a.ravel())[0, 1] if a.std() else -1 for a in array]
        assert int(np.argmax(alike)) == int(position)


def test_extremes_are_of_every_value(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    """Percentiles look at every k-th row and column; what is called least and most is not that of these few."""
    folder = make_dataset(3, num_cases=4, shape=(1, 400, 400), spacing=(999.0, 1.0, 1.0))
    for i, file in enumerate(sorted((folder / "imagesTr").iterdir())):
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(image)
        # where every second row is not looked at
        array[0, 201, 201 + i] = 1e4
        spiked = sitk.GetImageFromArray(array)
        spiked.CopyInformation(image)
        sitk.WriteImage(spiked, str(file))
    page = selected(tmp_path / "chosen", 3)
    most = float(gather_slices(find_nnunet_dataset(3), 16, 64, 0).images.max())
    assert f"{most:.2f}" in page.text["data"]


def test_what_a_picture_cannot_show_is_said(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_dataset(4, num_cases=4, spacing=(3.0, 1.0, 0.5), channel_names=["T1", "T2", "FLAIR", "ADC", "DWI"])
    for file in folder.rglob("case_02*"):
        image = sitk.ReadImage(str(file))
        image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(file))
    page = selected(tmp_path / "chosen", 4)
    words = " ".join(page.text["slices"].split())
    assert "several orientations (LPS in 3, RPS in 1)" in page.text["verdict"]
    assert "Pixels are drawn square" in words
    assert "Only the first 4 of 5 channels are shown." in words


def test_too_few_patients_have_no_interval(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    make_dataset(5, num_cases=3)
    page = selected(tmp_path / "chosen", 5)
    assert "too few for an interval" in page.words
    assert "Bars:" not in page.words
    assert "95 % interval</text>" not in page.source, "the legend names no bar either"
    assert "– to –" not in page.words


def test_what_to_type_next_works_from_any_folder(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = selected(Path("a choice"), 1, rule="expected-loss:price=1,state=frozen")
    assert f"-selection '{tmp_path / 'a choice'}' -o" in page.words
    assert 'export nnUNet_extTrainer="$(mtl-nnunet trainers)"' in page.words
    assert "-tr MTLTrainerFrozenEncoder -p" in page.words, "it was chosen for an encoder that stays as it is"
    assert "(least expected loss, a whole pretraining being worth 1 Dice points)" in page.verdict


def test_orientation_is_where_the_axes_point_to_in_the_patient(tmp_path: Path) -> None:
    voxels = np.zeros((4, 5, 6), np.float32)
    # in nibabel's world x runs to the right, y to the front, z up
    for affine, letters in (
        (np.diag([1.0, 1, 1, 1]), "RAS"),
        (np.diag([-1.0, -1, 1, 1]), "LPS"),
        (np.array([[0, 0, 2.0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]), "PSR"),
    ):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "a.nii.gz")
        assert orientation(Case("a", "a", (tmp_path / "a.nii.gz",)), "SimpleITKIO") == letters
        assert orientation(Case("a", "a", (tmp_path / "a.nii.gz",)), "NibabelIOWithReorient") == "RAS"
        # ITK's own reader and writer agree
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / "a.nrrd"))
        assert orientation(Case("a", "a", (tmp_path / "a.nrrd",)), "SimpleITKIO") == letters
    silent = nibabel.Nifti1Image(voxels, None)
    silent.header["sform_code"] = silent.header["qform_code"] = 0
    nibabel.save(silent, tmp_path / "b.nii")
    assert orientation(Case("b", "b", (tmp_path / "b.nii",)), "SimpleITKIO") is None
    assert orientation(Case("c", "c", (tmp_path / "gone.nii",)), "SimpleITKIO") is None


def test_edges_show_the_corner_that_was_marked(tmp_path: Path) -> None:
    # a bright spot at the patient's left front, in three orientations
    for directions in ("LPS", "RAS", "LAS"):
        array = np.zeros((3, 8, 8), np.float32)
        row, column = (0 if directions[1] == "P" else 7), (7 if directions[0] == "L" else 0)
        array[1, row, column] = 1
        image = sitk.GetImageFromArray(array)
        image.SetDirection(sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(directions))
        sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
        edges = edges_of(0, orientation(Case("a", "a", (tmp_path / "a.nii.gz",)), "SimpleITKIO"))
        assert edges[0 if row == 0 else 1] == "A"
        assert edges[2 + (column == 7)] == "L"


@needs_chromium
def test_a_browser_shows_it_without_a_complaint(dataset: Path, tmp_path: Path) -> None:
    page = selected(tmp_path / "chosen")
    check_that_a_browser_shows_it(page, tmp_path / "chosen" / "report.html", tmp_path, num_figures=2)

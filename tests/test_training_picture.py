"""The page of a training: real short trainings, cases worked by hand, and what nnU-Net's own writers write."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import (
    DEMO_RUN,
    Workplace,
    nnunet_folders_below,
    phantom,
    plan_with_nnunet,
    write_image,
    write_phantoms,
)
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from pages import (
    HOSTILE,
    Page,
    check_that_a_browser_shows_it,
    check_that_it_stands_alone_and_can_be_read_by_all,
    needs_chromium,
)
from PIL import Image

from mtl_nnunet.bootstrap import bootstrap_draws, interval
from mtl_nnunet.cases import Case
from mtl_nnunet.checkpoints.file import read_pickle
from mtl_nnunet.cli.main import main
from mtl_nnunet.cli.select_checkpoint import main as select
from mtl_nnunet.errors import UserError
from mtl_nnunet.overlays import FALSE, MISSED, Look, look_of, picture_of, slice_to_show
from mtl_nnunet.selection import SELECTION_FILE
from mtl_nnunet.training_report import report_training
from mtl_nnunet.trainings import LOGS, _curves_of_logs, find_others, read_training
from mtl_nnunet.validation import Validation, cases_to_look_at, pair, read_validation

NAME = "Dataset011_Phantom"
TRAINER = "MTLTrainer_1epoch"
SHA = "a" * 64
RECORD = {
    **{"encoder": "test_resnet", "encoder_sha256": SHA, "epoch": 39, "iterations_per_epoch": 250, "trained_with": "0"},
    "recipe": {"lr": 1e-3, "encoder_lr_factor": 0.1},
}


# real trainings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A selection, and one epoch from it, by nnU-Net's own command."""
    place = Workplace(tmp_path_factory.mktemp("trained"), NAME, TRAINER, iterations="2,1")
    write_phantoms(place.root / "raw" / NAME, num_cases=6, shape=(4, 40, 36))
    checkpoint = str(DEMO_RUN / "checkpoint-39.pth.tar")
    place.run("mtl-select-checkpoint", "-d", "11", "-ckpt", checkpoint, "-num_slices", "6", "-device", "cpu")
    with nnunet_folders_below(place.root):
        plan_with_nnunet(11, preprocessed="2d")
    file = place.root / "preprocessed" / NAME / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    # nnU-Net plans hundreds of such small slices a batch
    plans["configurations"]["2d"]["batch_size"] = 2
    file.write_text(json.dumps(plans))
    place.run("nnUNetv2_train", "11", "2d", "0", "-device", "cpu", "-tr", TRAINER)
    return place


@pytest.fixture
def trained(place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may spoil, set in the environment."""
    shutil.copytree(place.root, tmp_path / "nn")
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / "nn" / name))
    return tmp_path / "nn"


def selection_in(root: Path, name: str = NAME) -> Path:
    return root / "preprocessed" / name / "mtl_selection"


STEM = f"training_{TRAINER}__nnUNetPlans__2d_fold_0"


def test_the_trainer_draws_it_after_its_validation(trained: Path) -> None:
    folder = selection_in(trained)
    endings = (".html", "_curves.png", "_curves.svg", "_cases.png", "_cases.svg")
    assert {f.name for f in folder.glob("training*")} == {STEM + e for e in endings}
    page = Page(folder / f"{STEM}.html")
    check_that_it_stands_alone_and_can_be_read_by_all(page, links=["report.html"])
    fold = trained / "results" / NAME / f"{TRAINER}__nnUNetPlans__2d" / "fold_0"
    (log,) = fold.glob(LOGS)
    (said,) = re.findall(r"Picture of the training: (.*)", log.read_text())
    assert Path(said.strip()).name == f"{STEM}.html"
    assert "Warning" not in log.read_text().split("Validation complete")[1]
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert f"mean validation Dice of {summary['foreground_mean']['Dice']:.4f} on 2 cases of fold 0" in page.verdict
    logged = torch.load(fold / "checkpoint_final.pth", weights_only=True)["logging"]
    for key in ("train_losses", "val_losses", "ema_fg_dice"):
        assert f"{logged[key][0]:.4f}" in page.text["curves"]
    for entry in summary["metric_per_case"]:
        for label in "12":
            assert f"{entry['metrics'][label]['Dice']:.4f}" in page.text["cases"]
    assert "1 of 2 iterations" in page.words
    assert "One fold and one seed are one draw" in page.words


def test_a_later_run_of_the_command_says_the_same(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Page(selection_in(trained) / f"{STEM}.html")
    assert main(["training", "-d", "11", "-c", "2d", "-tr", TRAINER, "--json"]) == 0
    told = capsys.readouterr()
    content = json.loads(told.out)
    assert content["verdict"] in told.err
    assert content["verdict"] == before.verdict == Page(Path(content["page"])).verdict
    assert [t["iterations_per_epoch"] for t in content["trainings"]] == [2]
    # what it says how to repeat it is what repeats it
    assert main(content["command"].split()[1:]) == 0
    capsys.readouterr()


def test_nobody_finds_it_beside_another_selection(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = selection_in(trained)
    command = ["training", "-d", "11", "-c", "2d", "-tr", TRAINER]
    again = [
        "-d",
        "11",
        "-ckpt",
        str(DEMO_RUN / "checkpoint-0.pth.tar"),
        "-num_slices",
        "6",
        "-device",
        "cpu",
        "--overwrite",
    ]
    (folder / "training_notes.png").touch()
    assert select(again) == 1
    assert re.search(r"holds other files than a selection's \(training_notes\.png\)", capsys.readouterr().err)
    (folder / "training_notes.png").unlink()
    assert select(again) == 0
    assert not list(folder.glob("training*"))
    assert main(command) == 1
    assert re.search(r"mtl_selection holds another selection \(SHA-256 .*Pass -o", capsys.readouterr().err)
    assert main([*command, "-o", str(folder)]) == 1
    assert "Pass -o" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "elsewhere")]) == 0
    page = Page(tmp_path / "elsewhere" / f"{STEM}.html")
    check_that_it_stands_alone_and_can_be_read_by_all(page)
    shutil.rmtree(folder)
    assert main(command) == 1
    assert "holds no selection any more" in capsys.readouterr().err
    assert not folder.exists()


def test_curves_of_the_log_are_those_of_the_checkpoint(trained: Path) -> None:
    model = trained / "results" / NAME / f"{TRAINER}__nnUNetPlans__2d"
    known = read_training(model, 0)
    assert known.curves is not None
    read = _curves_of_logs(sorted((model / "fold_0").glob(LOGS)))
    assert read is not None
    for name in ("train_loss", "val_loss", "pseudo_dice", "ema", "learning_rate"):
        np.testing.assert_allclose(getattr(read, name), getattr(known.curves, name), atol=6e-5, err_msg=name)
    np.testing.assert_allclose(read.seconds, known.curves.seconds, atol=0.02)
    for file in (model / "fold_0").glob("checkpoint*"):
        file.unlink()
    without = report_training(11, "2d", 0, TRAINER)
    assert any("are read from training_log" in w and "no checkpoint" in w for w in without.warnings)
    # as with --disable_checkpointing
    assert without.verdict.startswith(f"{TRAINER} reaches a mean validation Dice")


def test_logs_of_a_fold_that_went_on_and_of_one_begun_anew(tmp_path: Path) -> None:
    def log(name: str, first: int, losses: Sequence[float]) -> Path:
        stamp = "2026-11-26 01:02:03.456789: "
        lines = [f"{stamp}Using a split"]
        for epoch, loss in enumerate(losses, first):
            lines += [f"{stamp}Epoch {epoch}", f"{stamp}Current learning rate: 0.01", f"{stamp}train_loss {loss}"]
            lines += [f"{stamp}val_loss -0.5", f"{stamp}Pseudo dice [np.float32(0.5), np.float32(nan), 0.7]"]
            lines.append(f"{stamp}Epoch time: 7.5 s")
        # killed in the middle of the next one
        lines += [f"{stamp}Epoch {first + len(losses)}", f"{stamp}train_loss 9.0"]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    begun, went_on = (
        log("training_log_2026_9_9_1_2_3.txt", 0, [4, 3, 2]),
        log("training_log_2026_10_9_1_2_3.txt", 2, [1, 0.5]),
    )
    read = _curves_of_logs([begun, went_on])
    assert read is not None
    assert list(read.train_loss) == [4, 3, 1, 0.5]
    assert list(read.pseudo_dice) == pytest.approx([0.6] * 4)
    assert list(read.seconds) == [7.5] * 4
    anew = _curves_of_logs([begun, went_on, log("training_log_2026_11_9_1_2_3.txt", 0, [8])])
    assert anew is not None
    assert list(anew.train_loss) == [8]
    assert _curves_of_logs([log("training_log_2026_12_9_1_2_3.txt", 0, [])]) is None


def test_what_fails_here_fails_no_training(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl_nnunet.trainer import MTLTrainer

    monkeypatch.setenv("MTL_ITERATIONS_PER_EPOCH", "2,1")
    dataset = trained / "preprocessed" / NAME
    plans, description = (json.loads((dataset / n).read_text()) for n in ("nnUNetPlans.json", "dataset.json"))
    plans["continue_training"] = False
    trainer = MTLTrainer(plans, "2d", 3, description, torch.device("cpu"))
    trainer._draw_training()
    # a package that it needs is broken
    monkeypatch.setitem(sys.modules, "mtl_nnunet.training_report", None)
    trainer._draw_training()
    log = Path(trainer.log_file).read_text()
    assert log.count("Warning: no picture of the training was drawn: ") == 2
    assert not list(selection_in(trained).glob("training_MTLTrainer__*"))


@needs_chromium
def test_a_browser_shows_it_without_a_complaint(trained: Path, tmp_path: Path) -> None:
    file = selection_in(trained) / f"{STEM}.html"
    check_that_a_browser_shows_it(Page(file), file, tmp_path, num_figures=1)


@pytest.mark.slow
def test_trainings_from_random_weights_and_nnunets_own_are_found_and_shown(place: Workplace, tmp_path: Path) -> None:
    train = ("nnUNetv2_train", "11", "2d", "0", "-device", "cpu", "-tr")
    place.run_together((*train, "nnUNetTrainer_1epoch"), (*train, "MTLTrainerScratch_1epoch"))
    (log,) = (place.model("MTLTrainerScratch_1epoch") / "fold_0").glob(LOGS)
    assert "Picture of the training" not in log.read_text()
    place.run("mtl-nnunet", "training", "-d", "11", "-c", "2d", "-tr", TRAINER, "-o", str(tmp_path))
    page = Page(tmp_path / f"{STEM}.html")
    assert "nnUNetTrainer_1epoch had 250 iterations per epoch, MTLTrainer_1epoch 2" in page.words
    assert re.search("than MTLTrainerScratch_1epoch, on too few patients for an interval", page.verdict)
    # numbers that nnU-Net stores as NumPy's
    stock = read_pickle(place.model("nnUNetTrainer_1epoch") / "fold_0" / "checkpoint_final.pth")["logging"]
    assert f"{stock['train_losses'][0]:.4f}" in page.text["curves"]
    place.run("mtl-nnunet", "training", "-d", "11", "-c", "2d", "-tr", "nnUNetTrainer_1epoch", "-o", str(tmp_path))
    assert "no selection" in Page(tmp_path / "training_nnUNetTrainer_1epoch__nnUNetPlans__2d_fold_0.html").words


# results in nnU-Net's layout, by nnU-Net's own logger and metrics


def write_training(
    root: Path,
    model: str,
    predictions: dict[str, np.ndarray] | None = None,
    epochs: int = 3,
    name: str = NAME,
    finished: bool = True,
    labels: dict[str, Any] | None = None,
    reader: Any = None,
    **plans: Any,
) -> Path:
    """A fold of a model: what nnU-Net's logger hands to a checkpoint, predictions, and the summary that its metrics make."""
    folder = root / "results" / name / model
    fold = folder / "fold_0"
    (fold / "validation").mkdir(parents=True)
    description = json.loads((root / "raw" / name / "dataset.json").read_text())
    ours = model.startswith("MTLTrainer")
    record = {"mtl_nnunet": RECORD}
    about = {
        "dataset_name": name,
        "plans_name": model.split("__")[1],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d": {"patch_size": [32, 32], "batch_size": 2, "architecture": {}}},
        **(record if ours else {}),
        **plans,
    }
    (folder / "plans.json").write_text(json.dumps(about))
    (folder / "dataset.json").write_text(json.dumps(description))
    logger = MetaLogger(str(fold), False)
    for epoch in range(epochs):
        for key in ("train_losses", "val_losses"):
            logger.log(key, np.float32(0.5 - 0.1 * epoch), epoch)
        logger.log("mean_fg_dice", np.float64(0.2 * epoch + 0.1), epoch)
        logger.log("lrs", 1e-2 / (epoch + 1), epoch)
        logger.log("epoch_start_timestamps", 100.0 + 10 * epoch, epoch)
        logger.log("epoch_end_timestamps", 107.0 + 10 * epoch, epoch)
    content = {"network_weights": {}, "logging": logger.get_checkpoint(), "init_args": {"configuration": "2d"}}
    torch.save(content, fold / ("checkpoint_final.pth" if finished else "checkpoint_latest.pth"))
    if predictions is None:
        return fold
    classes = [
        tuple(v) if isinstance(v, list) else v for k, v in description["labels"].items() if v != 0 and k != "ignore"
    ]
    results = []
    for case, voxels in predictions.items():
        truth = root / "raw" / name / "labelsTr" / f"{case}.nii.gz"
        image = sitk.GetImageFromArray(voxels.astype(np.uint8))
        image.CopyInformation(sitk.ReadImage(str(truth)))
        file = fold / "validation" / truth.name
        sitk.WriteImage(image, str(file))
        results.append(
            compute_metrics(str(truth), str(file), SimpleITKIO(), classes, description["labels"].get("ignore"))
        )
    means = {k: {m: float(np.nanmean([r["metrics"][k][m] for r in results])) for m in ("Dice", "IoU")} for k in classes}
    foreground = {m: float(np.mean([means[k][m] for k in classes])) for m in ("Dice", "IoU")}
    for result in results:
        recursive_fix_for_json_export(result)
    content = {"metric_per_case": results, "mean": means, "foreground_mean": foreground}
    save_summary_json(content, str(fold / "validation" / "summary.json"))
    return fold


def write_selection_record(root: Path, sha: str = SHA, name: str = NAME) -> Path:
    folder = selection_in(root, name)
    folder.mkdir(parents=True)
    (folder / SELECTION_FILE).write_text(json.dumps({"encoder": {"sha256": sha}}))
    return folder


def truths(root: Path, name: str = NAME) -> dict[str, np.ndarray]:
    files = sorted((root / "raw" / name / "labelsTr").glob("*.nii.gz"))
    return {f.name.removesuffix(".nii.gz"): sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in files}


def eroded(truth: np.ndarray, columns: int) -> np.ndarray:
    """The truth without what lies in its first columns."""
    first = int(np.flatnonzero(truth.any((0, 1)))[0])
    found = truth.copy()
    found[..., : first + columns] = 0
    return found


@pytest.fixture
def results(nnunet_folders: Path) -> Path:
    """Phantoms, and a model whose predictions are the worse the higher the number of the case."""
    write_phantoms(nnunet_folders / "raw" / NAME, num_cases=5, shape=(6, 40, 36))
    write_selection_record(nnunet_folders)
    known = truths(nnunet_folders)
    predictions = {case: eroded(truth, 2 * i) for i, (case, truth) in enumerate(known.items())}
    write_training(nnunet_folders, "MTLTrainer__nnUNetPlans__2d", predictions)
    return nnunet_folders


def test_worst_median_and_best_are_the_ones_that_were_made_so(results: Path) -> None:
    report = report_training(11, "2d")
    shown = {c["is"]: c["case"] for c in report.content["cases"]}
    assert shown == {"worst": "case_04", "median": "case_02", "best": "case_00"}
    of_cases = report.content["trainings"][0]["validation"]["of_cases"]
    assert of_cases["case_00"] == {"mean": 1.0, "ball": 1.0, "core": 1.0}
    page = Page(report.page)
    check_that_it_stands_alone_and_can_be_read_by_all(page)
    assert re.findall(r"(Worst|Median|Best): (\w+)", page.text["cases"]) == [
        ("Worst", "case_04"),
        ("Median", "case_02"),
        ("Best", "case_00"),
    ]
    drawn = report.page.with_name(f"{report.page.stem}_cases.svg").read_text()
    for role, case in shown.items():
        assert f"{role}: {case}, slice" in drawn
    # the slice with the largest truth
    for entry in report.content["cases"]:
        areas = (truths(results)[entry["case"]] > 0).sum((1, 2))
        assert areas[entry["slice"]] == areas.max()


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([0.5], [("only", "a")]),
        ([0.5, 0.4], [("worst", "b"), ("best", "a")]),
        ([0.5, 0.5, 0.5], [("worst", "a"), ("median", "b"), ("best", "c")]),
        ([0.9, 0.1, 0.4, 0.6], [("worst", "b"), ("median", "c"), ("best", "a")]),
        ([np.nan, 0.3, np.nan, 0.2], [("worst", "d"), ("best", "b")]),
        ([np.nan], []),
    ],
)
def test_cases_to_look_at_by_hand(dice: list[float], expected: list[tuple[str, str]]) -> None:
    validation = Validation(Path(), tuple("abcdef"[: len(dice)]), ("1",), np.array(dice)[:, None], np.nan)
    assert [(role, validation.cases[i]) for role, i in cases_to_look_at(validation)] == expected


def validation_of(dice: Sequence[Sequence[float]]) -> Validation:
    array = np.array(dice, dtype=float)
    return Validation(
        Path(), tuple(f"c{i}" for i in range(len(array))), tuple(str(k + 1) for k in range(array.shape[1])), array, 0.0
    )


def test_differences_are_paired_and_intervals_are_over_patients() -> None:
    rng = np.random.default_rng(0)
    level = rng.uniform(0.3, 0.9, (8, 1))
    own, other = (validation_of(level + shift + 0.01 * rng.normal(size=(8, 2))) for shift in (0.02, 0.0))
    owners = dict(zip(own.cases, "aabbccdd", strict=True))
    found = pair(own, other, owners)
    assert found is not None
    of_cases = (own.dice - other.dice).mean(1)
    assert found.compared.gain == pytest.approx(of_cases.mean())
    assert (found.num_cases, found.num_patients) == (8, 4)
    assert (found.better, found.equal, found.worse) == (int((of_cases > 0).sum()), 0, int((of_cases < 0).sum()))
    # the slow way: of each draw, all cases of the patients that were drawn
    draws = bootstrap_draws(4, 2000, 0).astype(int)
    sample = [np.repeat(of_cases, np.repeat(counts, 2)).mean() for counts in draws]
    expected = interval(float(of_cases.mean()), np.array(sample), 4)
    assert (found.compared.low, found.compared.high) == pytest.approx(expected)
    # patients differ by far more than the trainings do, and that cancels
    assert found.compared.high - found.compared.low < 0.1 < np.ptp(own.of_cases)
    turned = pair(other, own, owners)
    assert turned is not None
    assert turned.compared.gain == pytest.approx(-found.compared.gain)


def test_means_are_nnunets_own_where_a_class_is_missing() -> None:
    # core: only in the first; no case has the third class
    own = validation_of([[0.8, 0.6, np.nan], [0.6, np.nan, np.nan], [0.7, np.nan, np.nan], [0.5, np.nan, np.nan]])
    other = validation_of([[0.7, 0.4, np.nan], [0.6, np.nan, np.nan], [0.5, 0.0, np.nan], [0.6, np.nan, np.nan]])
    assert own.mean_of_classes == pytest.approx((0.65 + 0.6) / 2)
    found = pair(own, other, {c: c for c in own.cases})
    assert found is not None
    assert (found.own, found.other) == pytest.approx(((0.65 + 0.6) / 2, (0.6 + 0.2) / 2))
    assert own.of_cases == pytest.approx([0.7, 0.6, 0.7, 0.5])
    nothing = replace(own, cases=("x", "y", "z", "w"))
    assert pair(own, nothing, {}) is None


def test_summaries_are_read_as_nnunet_writes_them(results: Path) -> None:
    summary = results / "results" / NAME / "MTLTrainer__nnUNetPlans__2d" / "fold_0" / "validation" / "summary.json"
    validation = read_validation(summary, ".nii.gz")
    written = json.loads(summary.read_text())
    assert validation.cases == tuple(f"case_{i:02d}" for i in range(5))
    assert validation.mean == written["foreground_mean"]["Dice"] == pytest.approx(validation.mean_of_classes)
    assert list(validation.of_classes) == pytest.approx([written["mean"][k]["Dice"] for k in "12"])
    summary.write_text(summary.read_text().replace('"Dice"', '"Dyce"'))
    with pytest.raises(UserError, match=r"summary\.json is not what nnU-Net v2 writes"):
        report_training(11, "2d")


def test_others_are_found_and_what_differs_is_said(results: Path) -> None:
    known = truths(results)
    worse = {case: eroded(truth, 9) for case, truth in known.items()}
    (results / "raw" / NAME / "patients.csv").write_text(
        "case,patient\n" + "".join(f"case_{i:02d},p{i // 2}\n" for i in range(5))
    )
    write_training(results, "MTLTrainerScratch__nnUNetPlans__2d", worse)
    write_training(
        results, "nnUNetTrainer_5epochs__nnUNetResEncUNetMPlans__2d", dict(list(worse.items())[:4]), epochs=5
    )
    write_training(results, "MTLTrainerScratch_10epochs__nnUNetPlans__2d", epochs=2, finished=False)
    write_training(results, "nnUNetTrainer__nnUNetPlans__3d_fullres", worse)
    write_training(results, "nnUNetTrainerDA5__nnUNetPlans__2d", worse)
    report = report_training(11, "2d")
    labels = [t["label"] for t in report.content["trainings"]]
    assert labels == ["MTLTrainer", "MTLTrainerScratch", "MTLTrainerScratch_10epochs", "nnUNetTrainer_5epochs"]
    scratch, unfinished, stock = report.content["differences"]
    assert unfinished is None
    assert (scratch["num_cases"], scratch["num_patients"], scratch["better"]) == (5, 3, 5)
    assert stock["num_cases"] == 4
    assert re.search(
        r"On the 4 cases that both have, it is \d+\.\d\d Dice points more than nnUNetTrainer_5epochs", report.verdict
    )
    said = " ".join(report.warnings)
    for words in (
        "MTLTrainerScratch_10epochs is not finished: 2 epochs so far",
        "MTLTrainerScratch_10epochs had 2 epochs, MTLTrainer 3",
        "nnUNetTrainer_5epochs had 5 epochs, MTLTrainer 3",
        "nnUNetTrainer_5epochs was not validated on the same cases: the difference is on the 4",
        "Only 2 patients were validated on, too few for an interval",
    ):
        assert words in said
    page = Page(report.page)
    check_that_it_stands_alone_and_can_be_read_by_all(page)
    assert "patients.csv" in page.text["validation"]
    mine = report_training(11, "2d", against=["nnUNetTrainerDA5", "nnUNetTrainer__nnUNetPlans__3d_fullres"])
    assert [t["label"] for t in mine.content["trainings"]] == ["MTLTrainer", "nnUNetTrainerDA5", "nnUNetTrainer"]
    assert main(mine.content["command"].split()[1:]) == 0
    write_training(
        results,
        "nnUNetTrainer_10epochs__nnUNetPlans__2d",
        {c: eroded(t, 2 * i) for i, (c, t) in enumerate(known.items())},
    )
    same = report_training(11, "2d", against=["nnUNetTrainer_10epochs"])
    assert "That is as much as nnUNetTrainer_10epochs" in same.verdict
    alone = report_training(11, "2d", against=[])
    assert alone.content["command"].endswith("-p nnUNetPlans -against")
    assert alone.content["differences"] == []
    assert Page(alone.page).verdict.endswith("on 5 cases of fold 0.")
    table = results / "few.csv"
    table.write_text("case,patient\ncase_00,a\n")
    with pytest.raises(UserError, match="gives no patient for 4 cases"):
        report_training(11, "2d", patients=table)
    table.rename(results / "raw" / NAME / "patients.csv")
    assert any("Every case counted as a patient of its own" in w for w in report_training(11, "2d").warnings)


def test_another_encoder_or_recipe_is_said_and_what_random_weights_have_of_their_own_is_not(results: Path) -> None:
    of_random = {**RECORD, "recipe": {"lr": 1e-3, "encoder_lr_factor": 1.0}}
    write_training(results, "MTLTrainerScratch__nnUNetPlans__2d", mtl_nnunet=of_random)
    other = {**RECORD, "encoder": "test_convnext", "recipe": {"lr": 1e-2, "encoder_lr_factor": 1.0}}
    write_training(results, "MTLTrainerScratch__Other__2d", mtl_nnunet=other)
    said = [w for w in report_training(11, "2d").warnings if "what differs is not the start alone" in w]
    assert said == [
        "MTLTrainerScratch, Other is a network of another encoder than MTLTrainer: what differs is not the start alone.",
        "MTLTrainerScratch, Other learned by another recipe than MTLTrainer (lr 0.01, not 0.001): what differs is not the start alone.",
    ]


def test_a_trainer_that_loads_no_selection_started_from_none_though_its_plans_name_one(
    results: Path, tmp_path: Path
) -> None:
    named = {"encoder": "test_resnet", "encoder_sha256": SHA, "epoch": 39, "folder": "mtl_selection", "recipe": {}}
    write_training(results, "nnUNetTrainer__nnUNetPlansMTL__2d", mtl_nnunet=named)
    with pytest.raises(UserError, match="was not trained from a selection"):
        report_training(11, "2d", trainer="nnUNetTrainer", plans="nnUNetPlansMTL")
    report = report_training(11, "2d", trainer="nnUNetTrainer", plans="nnUNetPlansMTL", output=tmp_path / "page")
    assert report.content["selection"] is None
    assert "no selection" in Page(report.page).words


def test_no_more_are_shown_than_there_are_colours(results: Path) -> None:
    for i in range(6):
        write_training(results, f"nnUNetTrainer_{i + 2}epochs__nnUNetPlans__2d", epochs=1)
    others, left_out = find_others(read_training(results / "results" / NAME / "MTLTrainer__nnUNetPlans__2d", 0))
    assert len(others) == 5
    assert "name it with -against" in left_out[0]


def test_what_is_not_there_is_one_message(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_training(results, "MTLTrainerScratch__A__2d")
    write_training(results, "MTLTrainerScratch__B__2d")
    write_training(results, "nnUNetTrainer_1epoch__nnUNetPlans__2d", epochs=0)
    base = ["training", "-d", "11", "-c", "2d"]
    for more, message in (
        (
            ["-tr", "MTLTrainerFast"],
            "there is no model MTLTrainerFast__nnUNetPlans__2d .*there are MTLTrainerScratch__A__2d",
        ),
        (["-f", "3"], "has no fold 3: it has 0"),
        (["-d", "12"], "no dataset 12"),
        (
            ["-against", "MTLTrainerScratch"],
            r"used with several plans \(A, B\)\. Say which: -against MTLTrainerScratch__A",
        ),
        (["-against", "MTLTrainer"], "is the training itself"),
        (["-against", "a__b__c__d"], "expected TRAINER, TRAINER__PLANS or"),
        (["-tr", "nnUNetTrainer_1epoch"], "no epoch is finished yet"),
        (["-tr", "MTLTrainerScratch", "-p", "A", "-patients", "gone.csv"], None),
    ):
        assert main([*base, *more]) == (0 if message is None else 1)
        said = capsys.readouterr().err
        if message:
            assert re.search(message, said), said
            assert said.count("\n") == 1
    stock = ["-tr", "nnUNetTrainer", "-p", "nnUNetPlans"]
    write_training(results, "nnUNetTrainer__nnUNetPlans__2d")
    assert main([*base, *stock]) == 1
    assert "was not trained from a selection" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_results")
    assert main(base) == 1


def test_an_unfinished_training_shows_its_curves(results: Path) -> None:
    write_training(results, "MTLTrainer_5epochs__nnUNetPlans__2d", epochs=2, finished=False)
    report = report_training(11, "2d", trainer="MTLTrainer_5epochs")
    page = Page(report.page)
    check_that_it_stands_alone_and_can_be_read_by_all(page)
    assert page.verdict == "MTLTrainer_5epochs is not finished: 2 epochs, moving average of the pseudo Dice 0.1200."
    assert "cases" not in page.text
    assert {f.name.removeprefix(report.page.stem) for f in report.files} == {".html", "_curves.png", "_curves.svg"}
    # nnU-Net's own logger has the same moving average
    logger = LocalLogger()
    assert pytest.approx(0.12) == 0.9 * 0.1 + 0.1 * 0.3
    assert set(logger.my_fantastic_logging) >= {"mean_fg_dice", "ema_fg_dice", "train_losses", "val_losses", "lrs"}


def test_a_validation_from_before_the_training_ended_is_told(results: Path) -> None:
    fold = results / "results" / NAME / "MTLTrainer__nnUNetPlans__2d" / "fold_0"
    assert not read_training(fold.parent, 0).notes
    written = (fold / "validation" / "summary.json").stat().st_mtime
    # a fold that was trained again, and whose validation was killed
    os.utime(fold / "checkpoint_final.pth", (written + 60, written + 60))
    (note,) = read_training(fold.parent, 0).notes
    assert "The validation is older than checkpoint_final.pth" in note
    assert any(note in w for w in report_training(11, "2d").warnings)


def test_missing_predictions_and_images_leave_the_rest(results: Path) -> None:
    validation = results / "results" / NAME / "MTLTrainer__nnUNetPlans__2d" / "fold_0" / "validation"
    (validation / "case_04.nii.gz").unlink()
    report = report_training(11, "2d")
    assert any(
        "No picture of the worst case case_04" in w and "nnUNetv2_train with --val" in w for w in report.warnings
    )
    assert Page(report.page).source.count('<figure class="sample"') == 2
    shutil.rmtree(results / "raw" / NAME / "imagesTr")
    report = report_training(11, "2d")
    assert sum("No pictures of cases: their images were not found" in w for w in report.warnings) == 1
    check_that_it_stands_alone_and_can_be_read_by_all(Page(report.page))
    assert not report.page.with_name(f"{report.page.stem}_cases.png").exists(), (
        "what an earlier page had and this one has not"
    )


def test_a_checkpoint_that_would_run_code_is_not_executed(results: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return __import__("os").mkdir, (str(tmp_path / "executed"),)

    fold = results / "results" / NAME / "MTLTrainer__nnUNetPlans__2d" / "fold_0"
    (fold / "checkpoint_final.pth").write_bytes(pickle.dumps(Malicious()))
    report = report_training(11, "2d")
    assert any("MTLTrainer left no curves" in w for w in report.warnings)
    torch.save({"logging": {"train_losses": Malicious()}}, fold / "checkpoint_final.pth")
    assert any("is refused" in w for w in report_training(11, "2d").warnings)
    torch.save(
        {"logging": {"train_losses": ["fast"], "val_losses": [1], "mean_fg_dice": [1]}}, fold / "checkpoint_final.pth"
    )
    assert any("holds no curves as nnU-Net v2 logs them" in w for w in report_training(11, "2d").warnings)
    assert not (tmp_path / "executed").exists()


def test_numpy_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    numbers = [np.float64(0.1), np.float32(0.25), np.int64(-3), np.bool_(True), np.float16(0.5), np.uint8(7)]
    torch.save({"numbers": numbers, "text": np.str_("words")}, tmp_path / "a.pth")
    content = read_pickle(tmp_path / "a.pth")
    assert content["numbers"] == [0.1, 0.25, -3, True, 0.5, 7]
    assert not {type(n).__module__ for n in content["numbers"]} - {"builtins"}
    assert not isinstance(content["text"], (str, np.generic))


def test_nothing_that_is_named_outside_becomes_markup(nnunet_folders: Path) -> None:
    name = f"Dataset007_{HOSTILE}"
    folder = write_phantoms(
        nnunet_folders / "raw" / name, num_cases=3, shape=(4, 40, 36), channel_names=[HOSTILE, "T2"]
    )
    for file in sorted(folder.rglob("case_*")):
        file.rename(file.with_name(file.name.replace("case_", f"{HOSTILE} ")))
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {"background": 0, HOSTILE: 1, f"{HOSTILE}2": 2}
    (folder / "dataset.json").write_text(json.dumps(description))
    write_selection_record(nnunet_folders, name=name)
    predictions = {case: eroded(truth, 3) for case, truth in truths(nnunet_folders, name).items()}
    write_training(nnunet_folders, f"MTLTrainer__{HOSTILE}__2d", predictions, name=name)
    write_training(nnunet_folders, f"MTLTrainerScratch__{HOSTILE}__2d", predictions, name=name)
    report = report_training(name, "2d", plans=HOSTILE)
    page = Page(report.page)
    check_that_it_stands_alone_and_can_be_read_by_all(page)
    assert page.words.count(HOSTILE) > 10
    assert page.source.count("<img ") == page.source.count('<img src="data:image/png;base64,') > 9
    for svg in report.page.parent.glob("*.svg"):
        assert "<img" not in svg.read_text()


# pictures


def look(**more: Any) -> Look:
    known = {
        "reader": "SimpleITKIO",
        "axis": 0,
        "channel_names": ("MRI",),
        "labels": {"background": 0, "a": 1, "b": 2},
        "clipped": (None,),
    }
    return Look(**{**known, **more})


@pytest.mark.parametrize("directions", ["RAS", "LPS", "LAS", "PSR"])
def test_pictures_lie_as_nibabel_says_and_have_the_proportions_of_the_patient(tmp_path: Path, directions: str) -> None:
    # nibabel's world: x to the right, y to the front, z up; voxels of 1 x 3 x 5 mm along the file's axes
    size, spacing = (20, 12, 6), (1.0, 3.0, 5.0)
    to_file = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(directions)
    )
    affine = nibabel.orientations.inv_ornt_aff(to_file, size) @ np.diag([1, 1, 1, 1])
    affine = affine @ np.diag([*spacing, 1])
    voxels = np.random.default_rng(0).uniform(0, 1, size).astype(np.float32)
    image = nibabel.Nifti1Image(voxels, affine)
    assert "".join(nibabel.aff2axcodes(image.affine)) == directions
    nibabel.save(image, tmp_path / "a_0000.nii.gz")
    label = np.zeros(size, np.uint8)
    label[12:18, 6:11, 4] = 1
    prediction = np.zeros(size, np.uint8)
    prediction[12:18, 4:9, 4] = 1
    for file, content in (("a.nii.gz", label), ("p.nii.gz", prediction)):
        nibabel.save(nibabel.Nifti1Image(content, affine), tmp_path / file)
    case = Case("a", "a", (tmp_path / "a_0000.nii.gz",), tmp_path / "a.nii.gz")
    picture = picture_of(case, tmp_path / "p.nii.gz", look())
    assert (picture.position, picture.orientation) == (4, directions)
    ((shown, truth, predicted, differences),) = picture.rows
    # columns are the file's x, rows its y: 20 of 1 mm and 12 of 3 mm
    height, width = shown.pixels.shape
    assert height / width == pytest.approx(12 * 3.0 / (20 * 1.0), rel=0.01)
    assert picture.spacing == (3.0, 1.0)
    opposite = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}
    assert shown.edges == f"{opposite[directions[1]]}{directions[1]}{opposite[directions[0]]}{directions[0]}"
    # the middle of each shown pixel is the voxel of the file
    grey = voxels[..., 4].T
    low, high = np.percentile(voxels, (0.5, 99.5))
    rows, columns = ((np.arange(n) + 0.5) * s / n for n, s in ((12, height), (20, width)))
    sampled = shown.pixels[np.ix_(rows.astype(int), columns.astype(int))]
    np.testing.assert_allclose(sampled, 255 * np.clip((grey - low) / (high - low), 0, 1), atol=0.51)
    # where they differ: above the truth something false, below the prediction something missed
    at = differences.pixels[np.ix_(rows.astype(int), columns.astype(int))].astype(float)
    for colour, region in ((FALSE, (prediction > label)), (MISSED, (label > prediction))):
        inside = region[..., 4].T
        distance = np.abs(at - np.array(colour)).sum(-1)
        assert distance[inside].max() < distance[~inside].min()
    assert (truth.pixels != predicted.pixels).any()


def test_what_is_small_is_shown_enlarged_inside_the_frame(tmp_path: Path) -> None:
    image, _ = phantom((4, 100, 80), 0)
    label = np.zeros((4, 100, 80), np.uint8)
    label[2, 60:70, 10:16] = 1
    write_image(tmp_path / "a_0000.nii.gz", image[0])
    write_image(tmp_path / "a.nii.gz", label)
    picture = picture_of(
        Case("a", "a", (tmp_path / "a_0000.nii.gz",), tmp_path / "a.nii.gz"), tmp_path / "a.nii.gz", look()
    )
    assert picture.is_close_up
    whole, truth, _, differences = picture.rows[0]
    assert whole.frame is not None
    top, left, height, width = whole.frame
    assert top <= 0.60 and left <= 0.125 and top + height >= 0.70 and left + width >= 0.2  # noqa: PT018
    assert height == pytest.approx(width, abs=0.02), "the proportions of the slice"
    # the truth takes the share of the enlarged part that it should
    amber = (np.abs(truth.pixels.astype(int) - (242, 177, 52)).sum(-1) < 30).any(0)
    assert amber.mean() == pytest.approx(6 / 80 / width, abs=0.03)
    # nothing is wrong where prediction and truth are one
    assert np.ptp(differences.pixels.astype(int), axis=-1).max() == 0


def test_ignored_voxels_are_no_differences_and_regions_are_outlined(tmp_path: Path) -> None:
    image, _ = phantom((3, 40, 40), 0)
    label = np.zeros((3, 40, 40), np.uint8)
    label[1, 10:30, 10:30] = 1
    label[1, 15:25, 15:25] = 2
    label[0] = 3
    label[1, :, 30:] = 3
    prediction = label.copy()
    prediction[prediction == 3] = 1
    write_image(tmp_path / "a_0000.nii.gz", image[0])
    write_image(tmp_path / "a.nii.gz", label)
    write_image(tmp_path / "p.nii.gz", prediction)
    case = Case("a", "a", (tmp_path / "a_0000.nii.gz",), tmp_path / "a.nii.gz")
    regions = look(labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    assert slice_to_show(label, prediction, 3)[0] == 1
    picture = picture_of(case, tmp_path / "p.nii.gz", regions)
    _, truth, predicted, differences = picture.rows[0]
    np.testing.assert_array_equal(truth.pixels[:, :230], predicted.pixels[:, :230])
    inner = differences.pixels[:, :230].astype(int)
    assert np.ptp(inner, axis=-1).max() == 0, "nothing but grey"
    # the whole's outline goes round the core too, so the core's is not on it
    row = truth.pixels[160].astype(int)
    blue = np.abs(row - (47, 127, 193)).sum(-1) < 10
    amber = np.abs(row - (242, 177, 52)).sum(-1) < 10
    assert np.flatnonzero(amber)[0] < np.flatnonzero(blue)[0]


def test_channels_photographs_and_ct(tmp_path: Path) -> None:
    images, label = phantom((3, 40, 40), 0, channels=3)
    case = Case("a", "a", tuple(tmp_path / f"a_{c:04d}.nii.gz" for c in range(3)), tmp_path / "a.nii.gz")
    for file, voxels in zip(case.images, images, strict=True):
        write_image(file, np.clip(voxels, 0, 255))
    write_image(tmp_path / "a.nii.gz", label)
    several = picture_of(case, tmp_path / "a.nii.gz", look(channel_names=("T1", "T2", "FLAIR"), clipped=(None,) * 3))
    assert [[t.caption for t in row] for row in several.rows] == [
        ["image, T1", "image, T2", "image, FLAIR"],
        ["truth", "prediction", "differences"],
    ]
    photograph = picture_of(case, tmp_path / "a.nii.gz", look(channel_names=("R", "G", "B"), clipped=(None,) * 3))
    (row,) = photograph.rows
    assert row[0].pixels.shape == (320, 320, 3)
    middle = np.clip(images, 0, 255)[:, photograph.position, 20, 20]
    np.testing.assert_allclose(row[0].pixels[164, 164], middle, atol=1)
    plans = {
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [2, 0, 1],
        "foreground_intensity_properties_per_channel": {"0": {"percentile_00_5": -50.0, "percentile_99_5": 150.0}},
    }
    of_ct = look_of(plans, {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}})
    assert (of_ct.axis, of_ct.clipped) == (2, ((-50.0, 150.0),))
    single = picture_of(replace(case, images=case.images[:1]), tmp_path / "a.nii.gz", replace(of_ct, axis=0))
    value = images[0][single.position, 20, 20]
    assert single.rows[0][0].pixels[164, 164] == pytest.approx(255 * np.clip((value + 50) / 200, 0, 1), abs=1)
    with pytest.raises(UserError, match="not what nnU-Net v2 writes"):
        look_of({}, {})
    write_image(tmp_path / "p.nii.gz", label[:, :30])
    with pytest.raises(UserError, match="is of another shape"):
        picture_of(case, tmp_path / "p.nii.gz", look(channel_names=("T1", "T2", "FLAIR"), clipped=(None,) * 3))


def test_the_page_says_how_each_channel_of_ct_and_another_is_shown(nnunet_folders: Path) -> None:
    name = "Dataset012_PetCt"
    write_phantoms(nnunet_folders / "raw" / name, num_cases=3, shape=(3, 40, 36), channel_names=("CT", "PET"))
    write_selection_record(nnunet_folders, name=name)
    intensities = {"0": {"percentile_00_5": 50.0, "percentile_99_5": 150.0}}
    write_training(
        nnunet_folders,
        "MTLTrainer__nnUNetPlans__2d",
        truths(nnunet_folders, name),
        name=name,
        foreground_intensity_properties_per_channel=intensities,
    )
    words = Page(report_training(12, "2d").page).text["cases"]
    assert "what nnU-Net clips CT to, and of other channels 0.5 and 99.5" in words


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_where_nothing_is_to_be_found_and_nothing_was_found_there_is_no_dice(results: Path) -> None:
    raw = results / "raw" / NAME / "labelsTr"
    for file in raw.iterdir():
        write_image(file, np.zeros((6, 40, 36), np.uint8), (2.0, 1.0, 1.0))
    empty = {case: np.zeros_like(voxels) for case, voxels in truths(results).items()}
    write_training(results, "MTLTrainer_5epochs__nnUNetPlans__2d", empty)
    report = report_training(11, "2d", trainer="MTLTrainer_5epochs")
    page = Page(report.page)
    check_that_it_stands_alone_and_can_be_read_by_all(page)
    assert page.verdict.startswith(
        "MTLTrainer_5epochs has no validation Dice: neither the truth nor the prediction of 5 cases"
    )
    assert "nan" not in page.words.lower().split()


def test_the_pictures_of_the_page_are_those(results: Path, make_dataset: Callable[..., Path]) -> None:
    report = report_training(11, "2d")
    page = Page(report.page)
    found = [i for i in page.all("img") if str(i["alt"]).startswith("truth of the worst case case_04")]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(found[0]["src"]).partition(",")[2]))))
    raw = results / "raw" / NAME
    case = Case("case_04", "case_04", (raw / "imagesTr" / "case_04_0000.nii.gz",), raw / "labelsTr" / "case_04.nii.gz")
    fold = results / "results" / NAME / "MTLTrainer__nnUNetPlans__2d" / "fold_0"
    of_model = read_training(fold.parent, 0)
    expected = picture_of(case, fold / "validation" / "case_04.nii.gz", look_of(of_model.plans, of_model.dataset))
    np.testing.assert_array_equal(pixels, expected.rows[0][1].pixels)

"""The commands of the README, as a user types them, on a small real-format dataset; minutes, so marked slow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DEMO_RUN, Workplace, phantom, write_image, write_phantoms

pytestmark = pytest.mark.slow

NAME = "Dataset008_Phantom"
TRAINER = "MTLTrainer_10epochs"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Selected, planned (default and ResEnc) and preprocessed."""
    place = Workplace(tmp_path_factory.mktemp("end to end"), NAME, TRAINER)
    raw = place.root / "raw" / NAME
    write_phantoms(raw, num_cases=10, shape=(10, 56, 40))
    for i in range(3):
        image, label = phantom((10, 50, 44), seed=9000 + i)
        write_image(raw / "imagesTs" / f"new_{i}_0000.nii.gz", image[0], (2.0, 1.0, 1.0))
        write_image(raw / "labelsTs" / f"new_{i}.nii.gz", label, (2.0, 1.0, 1.0))
    place.run("mtl-select-checkpoint", "-d", "8", "-ckpt", str(DEMO_RUN), "-num_slices", "40", "-device", "cpu")
    place.run("nnUNetv2_plan_and_preprocess", "-d", "8", "-c", "2d", "-np", "1", "-npfp", "1")
    planner = ("-pl", "nnUNetPlannerResEncM")
    place.run("nnUNetv2_plan_and_preprocess", "-d", "8", "-c", "2d", "-np", "1", "-npfp", "1", *planner)
    return place


@pytest.fixture(scope="module")
def trained(place: Workplace) -> Workplace:
    """Fold 0 killed in the middle and continued, fold 1 trained at the same time."""
    other_fold = place.start("nnUNetv2_train", "8", "2d", "1", "-tr", TRAINER, "-device", "cpu")
    killed = place.start("nnUNetv2_train", "8", "2d", "0", "-tr", TRAINER, "-device", "cpu")
    best = place.model() / "fold_0" / "checkpoint_best.pth"
    while not best.is_file():
        assert killed.poll() is None, killed.stdout and killed.stdout.read()
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    begun = torch.load(best, weights_only=True)
    assert 1 <= begun["current_epoch"] < 10
    assert not (best.parent / "checkpoint_final.pth").exists()
    place.run("nnUNetv2_train", "8", "2d", "0", "-tr", TRAINER, "-device", "cpu", "--c")
    output, _ = other_fold.communicate()
    assert other_fold.returncode == 0, output[-3000:]
    return place


def dice(truth: np.ndarray, prediction: np.ndarray, label: int) -> float:
    a, b = truth == label, prediction == label
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def check_predictions(place: Workplace, folder: Path) -> None:
    """Every image has its label with its geometry; the mean Dice is beyond chance (nnU-Net does not seed training)."""
    raw = place.root / "raw" / NAME
    reached, by_chance = [], []
    for truth_file in sorted((raw / "labelsTs").glob("*.nii.gz")):
        truth, prediction = (sitk.ReadImage(str(f)) for f in (truth_file, folder / truth_file.name))
        assert prediction.GetSize() == truth.GetSize()
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(prediction, geometry)() == pytest.approx(getattr(truth, geometry)())
        t, p = sitk.GetArrayFromImage(truth), sitk.GetArrayFromImage(prediction)
        for label in (1, 2):
            reached.append(dice(t, p, label))
            by_chance.append(dice(t, np.full_like(t, label), label))
    assert np.mean(reached) > max(0.5, np.mean(by_chance) + 0.2), (reached, by_chance)


def test_continued_after_a_kill_to_the_end(trained: Workplace) -> None:
    folder = trained.model() / "fold_0"
    final = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert final["current_epoch"] == 10
    assert len(final["logging"]["train_losses"]) == 10
    assert not list(folder.glob(".*.tmp"))
    last_log = max(folder.glob("training_log_*.txt"), key=lambda f: f.stat().st_mtime).read_text()
    assert "weights come from the checkpoint of this fold" in last_log


def test_validation_reaches_a_dice_above_chance(trained: Workplace) -> None:
    for fold in (0, 1):
        summary = json.loads((trained.model() / f"fold_{fold}" / "validation" / "summary.json").read_text())
        assert summary["foreground_mean"]["Dice"] > 0.5


def test_validation_runs_again_by_itself_without_the_selection(trained: Workplace) -> None:
    selection = trained.root / "preprocessed" / NAME / "mtl_selection"
    hidden = selection.with_name("hidden")
    shutil.rmtree(trained.model() / "fold_0" / "validation")
    selection.rename(hidden)
    try:
        trained.run("nnUNetv2_train", "8", "2d", "0", "-tr", TRAINER, "-device", "cpu", "--val")
    finally:
        hidden.rename(selection)
    assert (trained.model() / "fold_0" / "validation" / "summary.json").is_file()


def predict(place: Workplace, images: Path, out: Path) -> None:
    options = ("-d", "8", "-c", "2d", "-f", "0", "1", "-tr", TRAINER, "-device", "cpu", "-npp", "1", "-nps", "1")
    place.run("nnUNetv2_predict", "-i", str(images), "-o", str(out), *options)


@pytest.fixture(scope="module")
def predicted(trained: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions of both folds where the trainers are not on the path."""
    out = tmp_path_factory.mktemp("predictions")
    without = {k: v for k, v in trained.environment.items() if k != "nnUNet_extTrainer"}
    trained.environment, kept = without, trained.environment
    try:
        predict(trained, trained.root / "raw" / NAME / "imagesTs", out)
    finally:
        trained.environment = kept
    return out


def test_predicts_where_the_trainers_are_not_on_the_path(trained: Workplace, predicted: Path) -> None:
    check_predictions(trained, predicted)


def test_exported_model_predicts_the_same_in_another_place(trained: Workplace, predicted: Path, tmp_path: Path) -> None:
    zipped = str(tmp_path / "model.zip")
    export = ("-d", "8", "-o", zipped, "-c", "2d", "-tr", TRAINER, "-f", "0", "1", "-p", "nnUNetPlans", "--not_strict")
    trained.run("nnUNetv2_export_model_to_zip", *export)
    elsewhere = Workplace(tmp_path / "elsewhere", NAME, TRAINER)
    del elsewhere.environment["nnUNet_extTrainer"]
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", zipped)
    plans = json.loads((elsewhere.model() / "plans.json").read_text())
    assert plans["mtl_nnunet"]["trainer"] == TRAINER
    out = tmp_path / "predictions"
    predict(elsewhere, trained.root / "raw" / NAME / "imagesTs", out)
    files = sorted(f.name for f in predicted.glob("*.nii.gz"))
    assert len(files) == 3
    for name in files:
        here, there = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / name))) for folder in (predicted, out))
        assert (here == there).mean() > 0.9999, name


def test_fold_of_another_selection_is_refused_with_one_clear_message(trained: Workplace, tmp_path: Path) -> None:
    selection = trained.root / "preprocessed" / NAME / "mtl_selection"
    kept = tmp_path / "kept"
    shutil.copytree(selection, kept)
    one = str(DEMO_RUN / "checkpoint-0.pth.tar")
    chosen = json.loads((selection / "selection.json").read_text())["choice"]["epoch"]
    assert chosen != 0
    options = ("-num_slices", "20", "-device", "cpu", "--overwrite")
    trained.run("mtl-select-checkpoint", "-d", "8", "-ckpt", one, *options)
    plans_before = (trained.model() / "plans.json").read_bytes()
    done = trained.run("nnUNetv2_train", "8", "2d", "2", "-tr", TRAINER, "-device", "cpu", fails=True)
    assert "begun from another selection" in done.stderr.strip().splitlines()[-1]
    assert (trained.model() / "plans.json").read_bytes() == plans_before
    shutil.rmtree(selection)
    shutil.copytree(kept, selection)


def test_resenc_plans_train_too(place: Workplace) -> None:
    plans = "nnUNetResEncUNetMPlans"
    place.run("nnUNetv2_train", "8", "2d", "0", "-tr", "MTLTrainer_1epoch", "-p", plans, "-device", "cpu")
    written = json.loads((place.model("MTLTrainer_1epoch", plans) / "plans.json").read_text())
    architecture = written["configurations"]["2d"]["architecture"]
    assert architecture["network_class_name"] == "mtl_nnunet.network.TimmUNet"

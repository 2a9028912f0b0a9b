"""What nnU-Net's own trainer can do, MTLTrainer can: nnU-Net's commands, as a user types them; minutes, so marked slow."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DEMO_RUN, Workplace, phantom, write_image, write_phantoms
from timm.models import adapt_input_conv

from mtl_nnunet.checkpoints import read_contents
from mtl_nnunet.inflation import inflated_kernel
from mtl_nnunet.trainer import MTLTrainer

pytestmark = pytest.mark.slow

NAME = "Dataset009_Phantom"
TRAINER = "MTLTrainer_1epoch"
SHAPE = (12, 40, 36)
FIRST_KERNEL = "conv1.0.weight"
VOLUMETRIC = ("3d_fullres", "3d_lowres", "3d_cascade_fullres")


def select(place: Workplace, number: str) -> None:
    checkpoint = str(DEMO_RUN / "checkpoint-16.pth.tar")
    place.run("mtl-select-checkpoint", "-d", number, "-ckpt", checkpoint, "-num_slices", "10", "-device", "cpu")


def training(configuration: str, fold: str, *more: str, trainer: str = TRAINER, number: str = "9") -> tuple[str, ...]:
    return ("nnUNetv2_train", number, configuration, fold, "-tr", trainer, "-device", "cpu", *more)


def prediction(images: Path, out: Path, configuration: str, *more: str, number: str = "9") -> tuple[str, ...]:
    options = ("-d", number, "-c", configuration, "-tr", TRAINER, "-device", "cpu", "-npp", "1", "-nps", "1", *more)
    return ("nnUNetv2_predict", "-i", str(images), "-o", str(out), *options)


def add_cascade(plans_file: Path) -> None:
    """As nnU-Net plans it for images that are large against the patch."""
    plans = json.loads(plans_file.read_text())
    configurations = plans["configurations"]
    configurations["3d_fullres"]["batch_dice"] = True
    lowres = json.loads(json.dumps(configurations["3d_fullres"]))
    lowres.update(
        data_identifier="nnUNetPlans_3d_lowres",
        spacing=[2.0, 1.4, 1.4],
        median_image_size_in_voxels=[12.0, 28.0, 25.0],
        batch_dice=False,
        next_stage="3d_cascade_fullres",
    )
    configurations["3d_lowres"] = lowres
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans_file.write_text(json.dumps(plans))


def write_new_images(folder: Path, count: int = 2) -> Path:
    for i in range(count):
        image, _ = phantom(SHAPE, seed=9000 + i)
        write_image(folder / f"new_{i}_0000.nii.gz", image[0], (2.0, 1.0, 1.0))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Selected, planned and preprocessed, 2D, 3D and a cascade."""
    place = Workplace(tmp_path_factory.mktemp("features"), NAME, TRAINER, iterations="2,1")
    write_phantoms(place.root / "raw" / NAME, num_cases=5, shape=SHAPE)
    write_new_images(place.root / "raw" / NAME / "imagesTs")
    select(place, "9")
    place.run("nnUNetv2_plan_and_preprocess", "-d", "9", "-np", "1", "-npfp", "1", "--no_pp")
    add_cascade(place.root / "preprocessed" / NAME / "nnUNetPlans.json")
    configurations = ("2d", "3d_fullres", "3d_lowres")
    place.run("nnUNetv2_preprocess", "-d", "9", "-np", "1", "-c", *configurations)
    return place


@pytest.fixture(scope="module")
def trained(place: Workplace) -> Workplace:
    """Two folds of 2D and of 3D, their validation's probabilities kept."""
    for configuration in ("2d", "3d_fullres"):
        place.run_together(*[training(configuration, fold, "--npz") for fold in ("0", "1")])
    return place


@pytest.fixture(scope="module")
def cascade(place: Workplace) -> Workplace:
    """The first stage on all cases, so that the second has a segmentation of each."""
    place.run(*training("3d_lowres", "all"))
    place.run(*training("3d_cascade_fullres", "0"))
    return place


def final_checkpoint(model: Path, fold: str = "0") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(model / f"fold_{fold}" / "checkpoint_final.pth", weights_only=True)
    return checkpoint


def encoder_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    prefix = "encoder.timm.model."
    weights = checkpoint["network_weights"]
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def selected_encoder(place: Workplace) -> dict[str, torch.Tensor]:
    """As it is for one channel, in 2D."""
    weights = dict(read_contents(place.root / "preprocessed" / NAME / "mtl_selection" / "encoder.safetensors").weights)
    weights[FIRST_KERNEL] = adapt_input_conv(1, weights[FIRST_KERNEL].clone())
    return weights


def last_log(fold_folder: Path) -> str:
    return max(fold_folder.glob("training_log_*.txt"), key=lambda f: f.stat().st_mtime_ns).read_text()


def voxels(file: Path) -> np.ndarray:
    array: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    return array


def probabilities(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file)["probabilities"]
    return array


def validated(model: Path, fold: str) -> set[str]:
    return {f.name.removesuffix(".nii.gz") for f in (model / f"fold_{fold}" / "validation").glob("*.nii.gz")}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_folds_are_validated_on_their_own_cases_and_keep_softmax(trained: Workplace, configuration: str) -> None:
    model = trained.model(configuration=configuration)
    splits = json.loads((trained.root / "preprocessed" / NAME / "splits_final.json").read_text())
    for fold in ("0", "1"):
        cases = validated(model, fold)
        assert cases == set(splits[int(fold)]["val"])
        for case in cases:
            file = model / f"fold_{fold}" / "validation" / f"{case}.npz"
            softmax = probabilities(file).astype(np.float64)
            assert softmax.shape == (3, *SHAPE)
            np.testing.assert_allclose(softmax.sum(0), 1, atol=1e-2)
            assert np.array_equal(softmax.argmax(0), voxels(file.with_suffix(".nii.gz")))


def always_predicting(label: int, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with segmentation layers that look at nothing."""
    for key, tensor in checkpoint["network_weights"].items():
        if ".seg_layers." in key:
            tensor.zero_()
            if key.endswith("bias"):
                tensor[label] = 10
    return checkpoint


def test_validation_alone_uses_the_final_checkpoint_and_on_demand_the_best(trained: Workplace, tmp_path: Path) -> None:
    fold = trained.model() / "fold_0"
    kept = tmp_path / "kept"
    shutil.copytree(fold, kept)
    try:
        best = always_predicting(1, torch.load(fold / "checkpoint_best.pth", weights_only=True))
        torch.save(best, fold / "checkpoint_best.pth")
        (case,) = validated(trained.model(), "0")
        before = voxels(fold / "validation" / f"{case}.nii.gz")
        shutil.rmtree(fold / "validation")
        trained.run(*training("2d", "0", "--val"))
        assert np.array_equal(voxels(fold / "validation" / f"{case}.nii.gz"), before)
        assert (fold / "validation" / "summary.json").is_file()
        trained.run(*training("2d", "0", "--val", "--val_best"))
        assert (voxels(fold / "validation" / f"{case}.nii.gz") == 1).all()
    finally:
        shutil.rmtree(fold)
        shutil.copytree(kept, fold)


@pytest.fixture(scope="module")
def predicted(trained: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions of new images, below a folder for each configuration and way to predict."""
    out = tmp_path_factory.mktemp("predictions")
    images = trained.root / "raw" / NAME / "imagesTs"
    ways = {
        "mirrored": ("-f", "0", "1"),
        "plain": ("-f", "0", "1", "--disable_tta"),
        "one_fold": ("-f", "0", "--disable_tta"),
    }
    for configuration in ("2d", "3d_fullres"):
        trained.run_together(
            *[
                prediction(images, out / configuration / way, configuration, "--save_probabilities", *options)
                for way, options in ways.items()
            ]
        )
    return out


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_predictions_are_of_the_folds_and_mirrorings_asked_for(predicted: Path, configuration: str) -> None:
    folder = predicted / configuration
    for i in range(2):
        softmax = {}
        for way in ("mirrored", "plain", "one_fold"):
            softmax[way] = probabilities(folder / way / f"new_{i}.npz")
            assert softmax[way].shape == (3, *SHAPE)
            label = sitk.ReadImage(str(folder / way / f"new_{i}.nii.gz"))
            assert label.GetSpacing() == (1.0, 1.0, 2.0)
            assert np.array_equal(sitk.GetArrayFromImage(label), softmax[way].argmax(0))
        assert not np.allclose(softmax["mirrored"], softmax["plain"])
        assert not np.allclose(softmax["plain"], softmax["one_fold"])


def test_best_configuration_is_found_among_ours_and_their_ensemble(trained: Workplace) -> None:
    options = ("-c", "2d", "3d_fullres", "-tr", TRAINER, "-f", "0", "1", "-np", "1")
    trained.run("nnUNetv2_find_best_configuration", "9", *options)
    results = trained.root / "results" / NAME
    found = json.loads((results / "inference_information.json").read_text())
    assert len(found["all_results"]) == 3
    assert {k.startswith("ensemble___") for k in found["all_results"]} == {True, False}
    assert all(0 <= dice <= 1 for dice in found["all_results"].values())
    chosen = found["best_model_or_ensemble"]["selected_model_or_models"]
    assert {model["trainer"] for model in chosen} == {TRAINER}
    assert Path(found["best_model_or_ensemble"]["postprocessing_file"]).is_file()
    assert f"-tr {TRAINER}" in (results / "inference_instructions.txt").read_text()


def test_exported_models_predict_the_same_where_the_trainers_are_unknown(
    trained: Workplace, predicted: Path, tmp_path: Path
) -> None:
    zipped = str(tmp_path / "model.zip")
    options = ("-c", "2d", "3d_fullres", "-tr", TRAINER, "-f", "0", "1", "-p", "nnUNetPlans", "--not_strict")
    trained.run("nnUNetv2_export_model_to_zip", "-d", "9", "-o", zipped, *options)
    elsewhere = Workplace(tmp_path / "elsewhere", NAME, TRAINER)
    del elsewhere.environment["nnUNet_extTrainer"]
    elsewhere.run("nnUNetv2_install_pretrained_model_from_zip", zipped)
    images = trained.root / "raw" / NAME / "imagesTs"
    folds = ("-f", "0", "1", "--disable_tta")
    elsewhere.run_together(*[prediction(images, tmp_path / c, c, *folds) for c in ("2d", "3d_fullres")])
    for configuration in ("2d", "3d_fullres"):
        for i in range(2):
            here, there = (
                f / f"new_{i}.nii.gz" for f in (predicted / configuration / "plain", tmp_path / configuration)
            )
            assert (voxels(here) == voxels(there)).mean() > 0.999


def test_fold_all_is_trained_and_validated_on_every_case(cascade: Workplace) -> None:
    model = cascade.model(configuration="3d_lowres")
    assert final_checkpoint(model, "all")["init_args"]["fold"] == "all"
    assert validated(model, "all") == {f"case_{i:02d}" for i in range(5)}
    segmented = {f.stem for f in (model / "predicted_next_stage" / "3d_cascade_fullres").iterdir()}
    assert segmented == {f"case_{i:02d}" for i in range(5)}


@pytest.mark.parametrize("configuration", VOLUMETRIC)
def test_volumes_start_from_the_inflated_selection_and_nothing_for_labels(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, configuration: str
) -> None:
    for name, value in place.environment.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    folder = place.root / "preprocessed" / NAME
    plans = {**json.loads((folder / "nnUNetPlans.json").read_text()), "continue_training": False}
    description = json.loads((folder / "dataset.json").read_text())
    trainer: Any = MTLTrainer(plans, configuration, 0, description, torch.device("cpu"))
    trainer.initialize()
    own = trainer.network.encoder.timm.model.state_dict()
    flat = selected_encoder(place)
    assert own[FIRST_KERNEL].shape[1] == (3 if configuration == "3d_cascade_fullres" else 1)
    assert own[FIRST_KERNEL].shape[2] > 1
    assert not own[FIRST_KERNEL][:, 1:].any()
    own[FIRST_KERNEL] = own[FIRST_KERNEL][:, :1]
    for key, tensor in own.items():
        expected = inflated_kernel(flat[key], tensor.shape[2], "averaged") if tensor.ndim == 5 else flat[key]
        assert torch.equal(tensor, expected), key


def test_cascade_trains_on_images_and_the_segmentation_of_the_first_stage(cascade: Workplace) -> None:
    model = cascade.model(configuration="3d_cascade_fullres")
    kernel = encoder_of(final_checkpoint(model))[FIRST_KERNEL]
    assert kernel.shape[1] == 3
    assert kernel[:, 1:].any()
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1


def test_cascade_predicts_from_what_its_first_stage_predicted(cascade: Workplace, tmp_path: Path) -> None:
    images = cascade.root / "raw" / NAME / "imagesTs"
    first = tmp_path / "first"
    cascade.run(*prediction(images, first, "3d_lowres", "-f", "all"))
    other = tmp_path / "other"
    for i in range(2):
        write_image(other / f"new_{i}.nii.gz", np.full(SHAPE, i + 1, np.uint8), (2.0, 1.0, 1.0))
        assert voxels(first / f"new_{i}.nii.gz").shape == SHAPE
    options = ("-f", "0", "--save_probabilities", "-prev_stage_predictions")
    cascade.run_together(
        *[
            prediction(images, tmp_path / f"from_{stage.name}", "3d_cascade_fullres", *options, str(stage))
            for stage in (first, other)
        ]
    )
    for i in range(2):
        a, b = (probabilities(tmp_path / f"from_{stage}" / f"new_{i}.npz") for stage in ("first", "other"))
        assert a.shape == (3, *SHAPE)
        assert not np.array_equal(a, b)


def test_resenc_plans_train_in_three_dimensions(place: Workplace) -> None:
    plans = "nnUNetResEncUNetMPlans"
    place.run("nnUNetv2_plan_experiment", "-d", "9", "-pl", "nnUNetPlannerResEncM")
    place.run(*training("3d_fullres", "0", "-p", plans))
    model = place.model(plans=plans, configuration="3d_fullres")
    written = json.loads((model / "plans.json").read_text())["configurations"]["3d_fullres"]["architecture"]
    assert written["network_class_name"] == "mtl_nnunet.network.TimmUNet"
    assert encoder_of(final_checkpoint(model))[FIRST_KERNEL].ndim == 5
    assert validated(model, "0")


@pytest.fixture(scope="module")
def variants(place: Workplace) -> Workplace:
    names = ("FrozenEncoder", "Scratch", "NoMirroring", "NoDeepSupervision")
    commands = [training("2d", "0", trainer=f"MTLTrainer{name}_1epoch") for name in names]
    place.run_together(*commands[:2])
    place.run_together(*commands[2:])
    return place


def test_frozen_encoder_ends_as_it_was_selected_statistics_included(variants: Workplace) -> None:
    checkpoint = final_checkpoint(variants.model("MTLTrainerFrozenEncoder_1epoch"))
    encoder, selected = encoder_of(checkpoint), selected_encoder(variants)
    assert set(encoder) == set(selected)
    assert any(key.endswith("running_mean") for key in encoder)
    for key, tensor in encoder.items():
        assert torch.equal(tensor, selected[key]), key
    assert checkpoint["optimizer_state"]["state"], "the others learnt"


def test_scratch_ends_far_from_the_selection(variants: Workplace) -> None:
    model = variants.model("MTLTrainerScratch_1epoch")
    encoder, selected = encoder_of(final_checkpoint(model)), selected_encoder(variants)
    for key, tensor in encoder.items():
        if tensor.ndim == 4:
            similarity = torch.cosine_similarity(tensor.flatten(), selected[key].flatten(), dim=0)
            assert abs(similarity) < 0.5, key
    assert "random weights" in last_log(model / "fold_0")


def test_no_mirroring_predicts_without_mirroring(variants: Workplace, trained: Workplace) -> None:
    assert final_checkpoint(trained.model())["inference_allowed_mirroring_axes"] == (0, 1)
    without = final_checkpoint(variants.model("MTLTrainerNoMirroring_1epoch"))
    assert without["inference_allowed_mirroring_axes"] is None


def test_no_deep_supervision_has_one_loss(variants: Workplace) -> None:
    model = variants.model("MTLTrainerNoDeepSupervision_1epoch")
    debug = json.loads((model / "fold_0" / "debug.json").read_text())
    assert debug["enable_deep_supervision"] == "False"
    assert not debug["loss"].startswith("DeepSupervisionWrapper")
    assert validated(model, "0")


def check_starts_from(donor: Path, model: Path, fold: str) -> None:
    """The encoder was frozen, so the checkpoint still has what training started from."""
    given, taken = (torch.load(f, weights_only=True) for f in (donor, model / f"fold_{fold}" / "checkpoint_final.pth"))
    for key, tensor in encoder_of(taken).items():
        assert torch.equal(tensor, encoder_of(given)[key]), key


def test_pretrained_weights_are_those_of_another_model_of_ours(variants: Workplace, trained: Workplace) -> None:
    donor = trained.model() / "fold_0" / "checkpoint_final.pth"
    frozen = "MTLTrainerFrozenEncoder_1epoch"
    variants.run(*training("2d", "1", "-pretrained_weights", str(donor), trainer=frozen))
    check_starts_from(donor, variants.model(frozen), "1")
    assert not torch.equal(
        encoder_of(torch.load(donor, weights_only=True))[FIRST_KERNEL], selected_encoder(variants)[FIRST_KERNEL]
    )


REGIONS = {"background": 0, "ball": [1, 2], "core": 2}
LABELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "regions": ("21", {"labels": REGIONS, "regions_class_order": [1, 2]}),
    "ignore": ("22", {"labels": {"background": 0, "ball": 1, "core": 2, "ignore": 3}}),
    "regions and ignore": ("23", {"labels": {**REGIONS, "ignore": 3}, "regions_class_order": [1, 2]}),
}


@pytest.fixture(scope="module", params=LABELLINGS)
def labelled(request: pytest.FixtureRequest, place: Workplace) -> tuple[str, Path]:
    """A dataset with such labels, trained and its images predicted: its number and the model."""
    number, description = LABELLINGS[request.param]
    name = f"Dataset0{number}_Labels"
    raw = write_phantoms(place.root / "raw" / name, num_cases=5, shape=SHAPE)
    file = raw / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **description}))
    if "ignore" in description["labels"]:
        for label_file in (raw / "labelsTr").iterdir():
            label = voxels(label_file)
            label[:, ::3, 5:20] = 3
            write_image(label_file, label, (2.0, 1.0, 1.0))
    write_new_images(raw / "imagesTs", count=1)
    select(place, number)
    place.run("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-np", "1", "-npfp", "1")
    place.run(*training("2d", "0", "--npz", number=number))
    place.run(*prediction(raw / "imagesTs", place.root / "predictions" / name, "2d", "-f", "0", number=number))
    return number, place.root / "results" / name / f"{TRAINER}__nnUNetPlans__2d"


def test_regions_and_ignored_voxels_are_trained_and_predicted_as_nnunet_does(
    place: Workplace, labelled: tuple[str, Path]
) -> None:
    number, model = labelled
    description = json.loads((model / "dataset.json").read_text())
    has_regions = "regions_class_order" in description
    heads = {v.shape[0] for k, v in final_checkpoint(model)["network_weights"].items() if "seg_layers" in k}
    assert heads == {2 if has_regions else 3}
    (case,) = validated(model, "0")
    label = model / "fold_0" / "validation" / f"{case}.nii.gz"
    (new,) = (place.root / "predictions" / f"Dataset0{number}_Labels").glob("*.nii.gz")
    for file in (label, new):
        assert set(np.unique(voxels(file))) <= {0, 1, 2}
    outputs = probabilities(label.with_suffix("").with_suffix(".npz"))
    assert outputs.shape == (2 if has_regions else 3, *SHAPE)
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == ({"(1, 2)", "2"} if has_regions else {"1", "2"})
    if has_regions:
        ball, core = outputs > 0.5
        assert np.array_equal(voxels(label), np.where(core, 2, np.where(ball, 1, 0)))
        assert not np.allclose(outputs.astype(np.float64).sum(0), 1, atol=1e-2), "sigmoids, not a softmax"


def test_pretrained_weights_fit_another_number_of_classes(trained: Workplace, labelled: tuple[str, Path]) -> None:
    number, model = labelled
    if number != LABELLINGS["regions"][0]:
        pytest.skip("one labelling is enough")
    donor = trained.model() / "fold_0" / "checkpoint_final.pth"
    frozen = "MTLTrainerFrozenEncoder_1epoch"
    trained.run(*training("2d", "0", "-pretrained_weights", str(donor), trainer=frozen, number=number))
    check_starts_from(donor, model.with_name(f"{frozen}__nnUNetPlans__2d"), "0")


KILLED = "MTLTrainer_20epochs"
KILLS = ("at random", "while it writes", "at random", "while it writes")
RECIPE = {"optimizer": "sgd", "lr": 1e-3}


def epochs_begun(log: str) -> list[int]:
    return [int(epoch) for epoch in re.findall(r": Epoch (\d+)", log)]


def kill(run: subprocess.Popen[str], folder: Path, moment: str, rng: random.Random) -> None:
    latest = folder / "checkpoint_latest.pth"

    def wait_for_a_checkpoint() -> float:
        before, begun = latest.stat().st_mtime_ns if latest.exists() else 0, time.monotonic()
        while not latest.exists() or latest.stat().st_mtime_ns == before:
            assert run.poll() is None, run.stdout and run.stdout.read()
            time.sleep(0.01)
        return time.monotonic() - begun

    wait_for_a_checkpoint()
    duration = wait_for_a_checkpoint()
    if moment == "at random":
        time.sleep(rng.uniform(0, duration))
    else:
        while not list(folder.glob(f".{latest.name}.*.tmp")):
            assert run.poll() is None, run.stdout and run.stdout.read()
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


@pytest.fixture(scope="module")
def killed(place: Workplace) -> list[dict[str, Any]]:
    """A run begun with a recipe, killed again and again, continued without it to the end: what was there at each kill."""
    folder = place.model(KILLED) / "fold_0"
    rng = random.Random(0)
    recipe = {"MTL_RECIPE": ",".join(f"{k}={v}" for k, v in RECIPE.items())}
    seen = []
    for i, moment in enumerate(KILLS):
        continued = ("--c",) if i else ()
        run = place.start(*training("2d", "0", *continued, trainer=KILLED), **({} if i else recipe))
        kill(run, folder, moment, rng)
        checkpoints = {f.name: torch.load(f, weights_only=True) for f in folder.glob("*.pth")}
        seen.append({"log": last_log(folder), "checkpoints": checkpoints})
    place.run(*training("2d", "0", "--c", trainer=KILLED))
    seen.append({"log": last_log(folder), "checkpoints": {}})
    return seen


def test_of_a_killed_run_nothing_but_the_epoch_in_progress_is_lost(killed: list[dict[str, Any]]) -> None:
    for before, after in pairwise(killed):
        last_begun = epochs_begun(before["log"])[-1]
        latest = before["checkpoints"]["checkpoint_latest.pth"]
        assert latest["current_epoch"] in (last_begun, last_begun + 1)
        assert epochs_begun(after["log"])[0] == latest["current_epoch"]
        for values in latest["logging"].values():
            assert len(values) == latest["current_epoch"]


def test_killed_run_ends_as_if_it_had_not_been(place: Workplace, killed: list[dict[str, Any]]) -> None:
    folder = place.model(KILLED) / "fold_0"
    final = final_checkpoint(folder.parent)
    assert final["current_epoch"] == 20
    assert all(len(values) == 20 for values in final["logging"].values())
    assert {f.name for f in folder.glob("*.pth")} == {"checkpoint_final.pth", "checkpoint_best.pth"}
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*.tmp"))
    best = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    # a kill may fall between nnU-Net's writing of an epoch's latest and of its best checkpoint
    last_epochs = {run["checkpoints"]["checkpoint_latest.pth"]["current_epoch"] - 1 for run in killed[:-1]}
    reached = [ema for epoch, ema in enumerate(final["logging"]["ema_fg_dice"]) if epoch not in last_epochs]
    assert best["_best_ema"] >= max(reached)


def test_recipe_of_the_environment_is_recorded_and_kept_when_continued_without_it(
    place: Workplace, killed: list[dict[str, Any]]
) -> None:
    model = place.model(KILLED)
    final = final_checkpoint(model)
    written = json.loads((model / "plans.json").read_text())
    for plans in (final["init_args"]["plans"], written):
        recorded = plans["mtl_nnunet"]["recipe"]
        assert {k: recorded[k] for k in RECIPE} == RECIPE
    assert all(group["momentum"] == 0.99 for group in final["optimizer_state"]["param_groups"])
    assert all("Recipe: optimizer=sgd, lr=0.001" in run["log"] for run in killed)


RUNNER = """
import sys
from monai.apps.nnunet import nnUNetV2Runner

class OnCPU(nnUNetV2Runner):
    def train_single_model_command(self, *arguments):
        command, environment = super().train_single_model_command(*arguments)
        return [*command, "-device", "cpu"], environment

root = sys.argv[1]
folders = {f"nnunet_{name}": f"{root}/{name}" for name in ("raw", "preprocessed", "results")}
runner = OnCPU({**folders, "dataset_name_or_id": "9"}, trainer_class_name=sys.argv[2], work_dir=root)
runner.train_single_model(config="2d", fold=2)
"""


def test_monais_runner_trains_ours(place: Workplace) -> None:
    place.run(sys.executable, "-c", RUNNER, str(place.root), TRAINER)
    assert len(encoder_of(final_checkpoint(place.model(), "2"))) == len(selected_encoder(place))
    (case,) = validated(place.model(), "2")
    assert (place.model() / "fold_2" / "validation" / f"{case}.npz").is_file()

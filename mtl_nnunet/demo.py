"""The whole job on data that comes with packages: select, plan, train, predict, draw."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.errors import UserError
from mtl_nnunet.files import to_json, write_text

DATASET = "Dataset900_MNIBlocks"
NUMBER = "900"
TRAINER = "MTLTrainer_10epochs"
ITERATIONS = "30,5"
CLASSES = {"grey matter": 1, "white matter": 2}
# corners of the blocks in template voxels (x, y, z) and their size; the template is symmetric, so a held-out slab takes
# both hemispheres with it
BLOCK = (64, 64, 20)
CORNERS_X, CORNERS_Y, CORNERS_Z = (34, 98), (22, 86, 150), (30, 52, 74, 96, 118)
HELD_OUT_Z = 74
MIN_TISSUE = 0.15


def run_demo(folder: Path, overwrite: bool = False) -> dict[str, Any]:
    """Run every command a user would type, one after the other, and say where everything lies.

    Args:
        folder: Where to write; made.
        overwrite: Replace an earlier demonstration.

    Returns:
        Dice of each class on the held-out blocks, seconds, and the files that are named at the end.

    Raises:
        UserError: The folder is in the way, nilearn is missing, or a command failed.
    """
    folder = folder.resolve()
    raw = folder / "nnUNet_raw"
    if folder.exists():
        if not overwrite:
            raise UserError(f"{folder} exists already. Pass --overwrite to replace it, or -o another folder.")
        if not folder.is_dir() or (any(folder.iterdir()) and not (raw / DATASET).is_dir()):
            raise UserError(f"{folder} is no earlier demonstration, so it is not overwritten. Pass -o another folder.")
        shutil.rmtree(folder)
    started = time.monotonic()
    num_train, num_test = write_blocks(raw / DATASET)
    print(
        f"{num_train} training and {num_test} test cases: blocks of one averaged brain (MNI ICBM152 T1 template, 1 mm), "
        "labels are\nits grey- and white-matter maps above one half. This shows how things fit together. It says nothing "
        "about how\nwell they work: there is one brain, and nothing to generalise to.\n"
    )
    results, predictions = folder / "nnUNet_results", folder / "predictions"
    environment = {
        **os.environ,
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(folder / "nnUNet_preprocessed"),
        "nnUNet_results": str(results),
        # a few workers are enough for a few blocks; nnU-Net would start dozens
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "MTL_CACHE": str(folder / "cache"),
        "MTL_ITERATIONS_PER_EPOCH": ITERATIONS,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    environment["nnUNet_extTrainer"] = subprocess.run(
        ["mtl-nnunet", "trainers"], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()
    checkpoints = str(Path(__file__).parent / "demo_data" / "pretraining")
    test_images, test_labels = str(raw / DATASET / "imagesTs"), raw / DATASET / "labelsTs"
    device = ["-device", "cpu"]
    model = ["-d", NUMBER, "-c", "2d", "-f", "0", "-tr", TRAINER]
    logs = folder / "logs"
    select = ["mtl-select-checkpoint", "-d", NUMBER, "-ckpt", checkpoints, *device]
    ranking = _run(select, environment, logs / "select.txt")
    plan = ["nnUNetv2_plan_and_preprocess", "-d", NUMBER, "-c", "2d", "-np", "2", "-npfp", "2"]
    _run(plan, environment, logs / "plan.txt")
    _run(["nnUNetv2_train", NUMBER, "2d", "0", "-tr", TRAINER, *device], environment, logs / "train.txt")
    predict = ["nnUNetv2_predict", "-i", test_images, "-o", str(predictions), *model, *device, "-npp", "1", "-nps", "1"]
    _run(predict, environment, logs / "predict.txt")

    dice = _dice(test_labels, predictions)
    picture = folder / "demo.png"
    _draw(raw / DATASET, predictions, picture)
    print(f"\n{ranking[ranking.index('test_resnet on') :].split('written:')[0].rstrip()}\n")
    print("Dice on the held-out blocks: " + ", ".join(f"{name} {value:.3f}" for name, value in dice.items()))
    selection = folder / "nnUNet_preprocessed" / DATASET / "mtl_selection"
    seconds = time.monotonic() - started
    print(f"\n{seconds:.0f} s in all. What was written:")
    written = {
        "picture": ("picture (image, truth, prediction)", picture),
        "selection": ("selection; look at its report.html", selection),
        "training": (
            "how it trained, to look at",
            selection / f"training_{TRAINER}__nnUNetPlans__2d_fold_0.html",
        ),
        "raw": ("raw dataset", raw / DATASET),
        "preprocessed": ("plans and preprocessed data", selection.parent),
        "model": ("trained model", results / DATASET),
        "predictions": ("predictions", predictions),
        "logs": ("output of every command", logs),
    }
    # a page that could not be drawn is a warning in the training's log
    written = {name: entry for name, entry in written.items() if entry[1].exists()}
    for what, path in written.values():
        print(f"  {what:<36} {path}")
    return {"dice": dice, "seconds": round(seconds), "files": {name: str(path) for name, (_, path) in written.items()}}


def write_blocks(folder: Path) -> tuple[int, int]:
    """Cut the MNI ICBM152 template into blocks, as an nnU-Net raw dataset with a held-out slab.

    Args:
        folder: Where to; ``imagesTr``, ``labelsTr``, ``imagesTs`` and ``labelsTs`` are made in it.

    Returns:
        Number of training and of test cases.

    Raises:
        UserError: nilearn, whose package carries the template, is not installed.
    """
    try:
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    except ImportError as error:
        raise UserError(
            "the demo takes its images from nilearn. Install it: pip install 'mtl-nnunet[demo]'."
        ) from error
    import nibabel

    template = load_mni152_template(resolution=1)
    image = np.asarray(template.dataobj, dtype=np.float32)
    grey = np.asarray(load_mni152_gm_template(resolution=1).dataobj)
    white = np.asarray(load_mni152_wm_template(resolution=1).dataobj)
    label = np.where(white > 0.5, 2, np.where(grey > 0.5, 1, 0)).astype(np.uint8)
    counts = {"Tr": 0, "Ts": 0}
    for x in CORNERS_X:
        for y in CORNERS_Y:
            for z in CORNERS_Z:
                block = tuple(slice(a, a + size) for a, size in zip((x, y, z), BLOCK, strict=True))
                if (label[block] > 0).mean() < MIN_TISSUE:
                    continue
                split = "Ts" if z == HELD_OUT_Z else "Tr"
                counts[split] += 1
                affine = template.affine.copy()
                affine[:3, 3] = (template.affine @ [x, y, z, 1])[:3]
                for kind, voxels, suffix in (("images", image, "_0000"), ("labels", label, "")):
                    file = folder / f"{kind}{split}" / f"block_x{x:03d}_y{y:03d}_z{z:03d}{suffix}.nii.gz"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    nibabel.save(nibabel.Nifti1Image(voxels[block], affine), file)
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, **CLASSES},
        "numTraining": counts["Tr"],
        "file_ending": ".nii.gz",
        "description": "Blocks of one averaged brain (MNI ICBM152 T1 template), for demonstration only",
        "licence": "MNI ICBM152 non-linear symmetric template, (C) 1993-2004 Louis Collins, McConnell Brain Imaging "
        "Centre, McGill University",
    }
    write_text(folder / "dataset.json", to_json(description))
    return counts["Tr"], counts["Ts"]


def _run(command: list[str], environment: dict[str, str], log: Path) -> str:
    print(f"$ {' '.join(command)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    output = log.read_text(encoding="utf-8", errors="replace")
    if status:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        raise UserError(f"{command[0]} failed with status {status}: {last} The whole output is in {log}.")
    print(f"  done in {time.monotonic() - started:.0f} s", flush=True)
    return output


def _dice(truth: Path, predictions: Path) -> dict[str, float]:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple

    compute_metrics_on_folder_simple(str(truth), str(predictions), list(CLASSES.values()), num_processes=1)
    summary = json.loads((predictions / "summary.json").read_text(encoding="utf-8"))
    return {name: float(summary["mean"][str(value)]["Dice"]) for name, value in CLASSES.items()}


def _draw(dataset: Path, predictions: Path, picture: Path) -> None:
    import SimpleITK as sitk

    from mtl_nnunet.report import draw_predictions

    rows = []
    for label in sorted((dataset / "labelsTs").glob("*.nii.gz")):
        name = label.name.removesuffix(".nii.gz")
        files = (dataset / "imagesTs" / f"{name}_0000.nii.gz", label, predictions / label.name)
        volumes = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files]
        middle = len(volumes[0]) // 2
        rows.append((name, *(volume[middle] for volume in volumes)))
    draw_predictions(rows[::2], tuple(CLASSES), picture)

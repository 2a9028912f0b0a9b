"""The downstream benchmark's curves again on one target, with nnU-Net's own planning and ``MTLTrainer``.

The same test patients and the same training cases a seed as in ``downstream.py``, as folds of a dataset of their own; planned and
preprocessed by nnU-Net, each checkpoint selected by ``mtl-select-checkpoint`` and put into plans by ``mtl-nnunet plans``,
trained by ``MTLTrainer`` with nnU-Net's augmentation and loop, and from random weights by ``MTLTrainerScratch``. Test patients are
predicted whole at the preprocessed spacing, without mirroring. Rows that the table has already are not computed again.

    python benchmarks/evidence/confirm.py -raw nnUNet_raw -runs runs/test_convnext-cosine-0 -work work -o confirmed.csv -epochs 1 4 16
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from downstream import COLUMNS, accuracies, add_common_options, made_with, opened, scheme_of
from targets import TARGETS, Target, prepared, read, training_slices

from mtl_nnunet.checkpoints import find_checkpoints
from mtl_nnunet.curves import SCRATCH

sys.path.append(str(Path(__file__).parents[1]))
from recipes import train_and_validate

NUMBER = 904
PLANS, SMALL_PLANS = "nnUNetPlans", "nnUNetPlansSmall"
# nnU-Net plans hundreds of tiny slices a batch for the hippocampus
BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("-epochs", nargs="+", required=True, help="pretraining epochs; random weights come beside them")
    parser.add_argument("-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("-training_epochs", type=int, default=10)
    parser.add_argument("-iterations", type=int, default=25, help="of a training epoch")
    args = parser.parse_args()
    if len(args.d) > 1:
        parser.error("-d: one target at a time")
    if args.device == "cpu":
        torch.set_num_threads(1)
    (name,) = args.d
    target = read(prepared(name, args.raw, args.work))
    dataset = in_nnunet(name, target, args.raw, args.work / "nnunet", args.seeds)
    file, done = opened(args.o, COLUMNS, COLUMNS[:7])
    jobs = []
    for folder in args.runs:
        found = {str(c.epoch): c for c in find_checkpoints([folder])}
        encoder = str(next(iter(found.values())).architecture)
        plans = {e: plans_of(f"{folder.name}-{e}", found[e].path) for e in args.epochs}
        jobs += [(name, encoder, "", "", "free", SCRATCH, seed, "", plans[args.epochs[-1]]) for seed in args.seeds]
        jobs += [
            (name, encoder, scheme_of(folder), folder.name, "free", e, seed, accuracies(folder).get(e, ""), plans[e])
            for seed in args.seeds
            for e in args.epochs
        ]
    with file:
        writer = csv.writer(file, lineterminator="\n")
        for *key, accuracy, plans_name in sorted(jobs, key=lambda job: job[6]):
            if tuple(map(str, key)) in done:
                continue
            started = time.monotonic()
            dice = trained_and_tested(dataset, plans_name, key, args)
            seconds = time.monotonic() - started
            writer.writerow([*key, f"{dice:.5f}", accuracy, "", f"{seconds:.0f}", made_with()])
            file.flush()
            done.add(tuple(map(str, key)))
            print(*key, f"{dice:.4f} {seconds:.0f} s", flush=True)


def in_nnunet(name: str, target: Target, raw: Path, folder: Path, seeds: list[int]) -> Path:
    """The cases of a target as a dataset of nnU-Net's, a fold a seed, planned and preprocessed."""
    for kind in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{kind}"] = str(folder / f"nnUNet_{kind}")
        (folder / f"nnUNet_{kind}").mkdir(parents=True, exist_ok=True)
    (source,) = raw.glob(f"Dataset{TARGETS[name].number:03d}_*")
    dataset = f"Dataset{NUMBER}_{name}"
    preprocessed = folder / "nnUNet_preprocessed" / dataset
    test = sorted(set(target.cases[target.is_test]))
    folds = [
        {"train": sorted(set(target.cases[training_slices(target, seed)])), "val": test}
        for seed in range(max(seeds) + 1)
    ]
    splits = preprocessed / "splits_final.json"
    text = json.dumps([{k: list(map(str, v)) for k, v in fold.items()} for fold in folds])
    if splits.is_file() and splits.read_text() == text:
        return preprocessed
    shutil.rmtree(folder / "nnUNet_raw" / dataset, ignore_errors=True)
    shutil.rmtree(preprocessed, ignore_errors=True)
    description = json.loads((source / "dataset.json").read_text())
    ending = description["file_ending"]
    cases = sorted({case for fold in folds for cases in fold.values() for case in cases})
    for kind in ("imagesTr", "labelsTr"):
        (folder / "nnUNet_raw" / dataset / kind).mkdir(parents=True)
        for case in cases:
            pattern = f"{case}_[0-9][0-9][0-9][0-9]{ending}" if kind == "imagesTr" else f"{case}{ending}"
            for path in (source / kind).glob(pattern):
                shutil.copy(path, folder / "nnUNet_raw" / dataset / kind)
    description["numTraining"] = len(cases)
    (folder / "nnUNet_raw" / dataset / "dataset.json").write_text(json.dumps(description))
    command("nnUNetv2_plan_and_preprocess", "-d", NUMBER, "-c", "2d", "-npfp", 2, "-np", 2)
    plans = json.loads((preprocessed / f"{PLANS}.json").read_text())
    plans["plans_name"] = SMALL_PLANS
    plans["configurations"]["2d"]["batch_size"] = BATCH_SIZE
    (preprocessed / f"{SMALL_PLANS}.json").write_text(json.dumps(plans))
    splits.write_text(text)
    return preprocessed


def plans_of(name: str, checkpoint: Path) -> str:
    """Plans that start from one checkpoint."""
    selection = Path(os.environ["nnUNet_preprocessed"]).parent / "selections" / name
    if not (selection / "selection.json").is_file():
        options = ("-rule", "last", "-num_slices", 32, "-num_cases", 16)
        command("mtl-select-checkpoint", "-d", NUMBER, "-ckpt", checkpoint, "-o", selection, *options)
    plans = f"mtl_{name}"
    command("mtl-nnunet", "plans", "-d", NUMBER, "-p", SMALL_PLANS, "-c", "2d", "-selection", selection, "-o", plans, "--overwrite")  # fmt: skip
    return plans


def command(program: str, *options: object) -> None:
    """Run a program that lies beside this Python."""
    where = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    subprocess.run([where or program, *map(str, options)], check=True, stdout=subprocess.DEVNULL)


def trained_and_tested(dataset: Path, plans_name: str, key: list[object], args: argparse.Namespace) -> float:
    """Mean Dice on the test patients of one training."""
    epoch, seed = key[5], int(str(key[6]))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # as recipes.py takes them from its command line
    how = argparse.Namespace(
        p=plans_name, c="2d", f=seed, epochs=args.training_epochs, iterations=args.iterations, device=args.device
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return train_and_validate(dataset, "SCRATCH" if epoch == SCRATCH else "", how)


if __name__ == "__main__":
    main()

"""Recipes and trainers at the same number of iterations: Dice on a fold's validation cases, spread over repeats.

nnU-Net does not seed training, so each repeat is another draw. Training is nnU-Net's own loop with its augmentation; the
validation cases are predicted whole, without mirroring, at the preprocessed spacing. nnU-Net's environment variables must
be set and the dataset planned, preprocessed and selected for. A run that is in the table already is not repeated.

    python benchmarks/recipes.py -d 4 -p nnUNetPlansSmall -repeats 3 -iterations 20 -device cpu -o recipes.csv
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mtl_nnunet.variants import VARIANTS

FLAT = "batch_norm=live,layer_decay=1"
DECAY = "encoder_lr_factor=1,layer_decay=0.75"
SGD = f"{FLAT},optimizer=sgd,weight_decay=3e-5"
RECIPES = {
    "SGD 1e-2 everywhere, no warm-up (stock)": f"{SGD},lr=1e-2,encoder_lr_factor=1,warmup_epochs=0",
    "SGD 1e-3 everywhere, warm-up": f"{SGD},lr=1e-3,encoder_lr_factor=1",
    "SGD 1e-2, encoder a tenth": f"{SGD},lr=1e-2,encoder_lr_factor=0.1",
    "AdamW 1e-3 everywhere": f"{FLAT},encoder_lr_factor=1",
    "AdamW 1e-3, encoder a tenth": f"{FLAT},encoder_lr_factor=0.1",
    "AdamW 1e-3, encoder layer decay 0.75": f"{DECAY},batch_norm=live",
    "AdamW 1e-3, encoder layer decay 0.75, BatchNorm frozen": f"{DECAY},batch_norm=frozen",
    "AdamW 1e-3, encoder a tenth, frozen for 3 of 10 epochs": f"{FLAT},encoder_lr_factor=0.1,frozen_epochs=3",
    "AdamW 1e-3, encoder frozen": "frozen_epochs=all",
    "AdamW 1e-3, encoder a tenth, clipped to 1": f"{FLAT},encoder_lr_factor=0.1,clip_norm=1",
    "AdamW 1e-3, random weights": "SCRATCH",
}
# statistics of small batches: to be run with plans of batch size 2
BATCH_NORM = {
    "BatchNorm live": f"{FLAT},encoder_lr_factor=0.1",
    "BatchNorm frozen": "batch_norm=frozen,layer_decay=1,encoder_lr_factor=0.1",
    "BatchNorm to InstanceNorm": f"INSTANCE,{FLAT},encoder_lr_factor=0.1",
}
INFLATION = {
    "centred": "INFLATION centred",
    "centred, BatchNorm live": "INFLATION centred,batch_norm=live",
    "averaged": "INFLATION averaged",
    "centred, no layer decay": f"INFLATION centred,{FLAT.replace('live', 'frozen')}",
    "averaged, no layer decay": f"INFLATION averaged,{FLAT.replace('live', 'frozen')}",
}
TRAINERS = {"MTLTrainer": "", "MTLTrainerScratch": "SCRATCH", "nnUNetTrainer": "STOCK"}
SETS = {"recipes": RECIPES, "batch_norm": BATCH_NORM, "inflation": INFLATION, "trainers": TRAINERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, type=int)
    parser.add_argument("-c", default="2d")
    parser.add_argument("-f", default=0, type=int)
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-set", choices=list(SETS), default="recipes")
    parser.add_argument("-repeats", type=int, default=3)
    parser.add_argument("-epochs", type=int, default=10)
    parser.add_argument("-iterations", type=int, default=20, help="per epoch")
    parser.add_argument("-only", nargs="+", help="some of the set, by name")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-o", type=Path, default=Path("recipes.csv"))
    args = parser.parse_args()

    (dataset,) = Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{args.d:03d}_*")
    keys = ("dataset", "configuration", "plans", "set", "recipe", "epochs", "iterations", "repeat", "dice", "seconds")
    rows: list[dict[str, str]] = []
    if args.o.is_file():
        rows = list(csv.DictReader(args.o.open(newline="")))
    done = {tuple(r[k] for k in keys[:8]) for r in rows}
    for repeat in range(args.repeats):
        for name, changes in SETS[args.set].items():
            if args.only and name not in args.only:
                continue
            row = [dataset.name, args.c, args.p, args.set, name, args.epochs, args.iterations, repeat]
            if tuple(map(str, row)) in done:
                continue
            started = time.monotonic()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                dice = train_and_validate(dataset, changes, args)
            row += [f"{dice:.4f}", f"{time.monotonic() - started:.0f}"]
            rows.append(dict(zip(keys, map(str, row), strict=True)))
            print(*row, flush=True)
            with args.o.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=keys)
                writer.writeheader()
                writer.writerows(rows)
    for name in args.only or SETS[args.set]:
        values = [
            float(r["dice"])
            for r in rows
            if r["recipe"] == name
            and r["dataset"] == dataset.name
            and r["plans"] == args.p
            and r["configuration"] == args.c
        ]
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{name:<56} {statistics.mean(values):.4f}{spread} ({len(values)})")


def train_and_validate(dataset: Path, changes: str, args: argparse.Namespace) -> float:
    plans = json.loads((dataset / f"{args.p}.json").read_text())
    if changes.startswith("INFLATION"):
        inflation, _, changes = changes.partition(",")
        plans = with_inflation(plans, args.c, inflation.split()[1])
    tokens = [t for t in changes.split(",") if t and "=" not in t]
    os.environ["MTL_RECIPE"] = ",".join(t for t in changes.split(",") if "=" in t)
    plans["continue_training"] = False
    cls = VARIANTS["MTLTrainerScratch" if "SCRATCH" in tokens else "MTLTrainer"]
    if "STOCK" in tokens:
        cls = nnUNetTrainer
    description = json.loads((dataset / "dataset.json").read_text())
    trainer = cls(plans, args.c, args.f, description, torch.device(args.device))
    shutil.rmtree(trainer.output_folder_base)
    Path(trainer.output_folder).mkdir(parents=True)
    trainer.num_epochs = args.epochs
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = args.iterations, 1
    trainer.disable_checkpointing = True
    trainer.logger.plot_progress_png = lambda *_: None
    if "INSTANCE" in tokens:
        with_instance_norm(trainer)
    trainer.run_training()
    return validate(trainer)


def with_instance_norm(trainer) -> None:
    """The encoder's BatchNorm layers as InstanceNorm layers with the same scale and shift, running statistics dropped."""
    initialize = trainer.initialize

    def convert(module: torch.nn.Module) -> None:
        for module_name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                norm = torch.nn.InstanceNorm2d(child.num_features, child.eps, affine=True)
                norm.weight, norm.bias = child.weight, child.bias
                act = getattr(child, "act", torch.nn.Identity())
                setattr(module, module_name, torch.nn.Sequential(norm, act))
            else:
                convert(child)

    def initialize_and_convert() -> None:
        initialize()
        convert(trainer.network.encoder)

    trainer.initialize = initialize_and_convert


def with_inflation(plans: dict, configuration: str, inflation: str) -> dict:
    from mtl_nnunet.plans import selection_of, with_timm_unet

    record = selection_of(plans).record()
    changed = with_timm_unet(plans, configuration, {**record, "folder": "mtl_selection"})
    changed["configurations"][configuration]["architecture"]["arch_kwargs"]["inflation"] = inflation
    return changed


def validate(trainer) -> float:
    """Mean over labels of the mean Dice over the validation cases that have the label."""
    network = trainer.network
    network.eval()
    network.decoder.deep_supervision = False
    _, cases = trainer.do_split()
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    labels = trainer.label_manager.foreground_labels
    per_label: dict[int, list[float]] = {label: [] for label in labels}
    patch = trainer.configuration_manager.patch_size
    strides = np.cumprod(trainer.configuration_manager.network_arch_init_kwargs["strides"], axis=0)[-1]
    for case in cases:
        image, truth, *_ = data.load_case(case)
        image, truth = torch.from_numpy(np.asarray(image[:])), np.asarray(truth[:])[0]
        image = image.transpose(0, 1) if len(patch) == 2 else image[None]
        size = image.shape[2:]
        target = [int(-(-max(s, p) // m) * m) for s, p, m in zip(size, patch, strides, strict=True)]
        padding = [p for s, t in zip(size[::-1], target[::-1], strict=True) for p in (0, t - s)]
        with torch.no_grad():
            padded = torch.nn.functional.pad(image.float(), padding).to(trainer.device)
            logits = torch.cat([network(part) for part in padded.split(32)])
        predicted = logits.argmax(1).cpu().numpy()[(slice(None), *(slice(s) for s in size))]
        predicted = predicted if len(patch) == 2 else predicted[0]
        for label in labels:
            a, b = predicted == label, truth == label
            if b.any():
                per_label[label].append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(np.mean([np.mean(v) for v in per_label.values()]))


if __name__ == "__main__":
    main()

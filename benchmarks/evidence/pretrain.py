"""Miniature ImageNet pretraining: every encoder under two schemes and several seeds, with the checkpoints that are kept.

``cosine`` decays once over the whole run, as most published runs do: a checkpoint of epoch k is a state that no one would have
stopped at. ``cooldown`` has a constant rate, and every kept checkpoint is a branch of its own that spends its last fifth
on decaying the rate to zero: the checkpoint of epoch k is what a pretraining of k epochs gives. A run that is complete is not
repeated.

    python benchmarks/evidence/pretrain.py -tar tiny-imagenet-64.tar -o runs -num_proc 2
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import math
import os
import tarfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import timm
import torch
from joblib import Parallel, delayed
from PIL import Image
from timm.optim import create_optimizer_v2
from torchvision.transforms import v2

ENCODERS = ("test_resnet", "test_convnext", "test_efficientnet")
SCHEMES = ("cosine", "cooldown")
SEEDS = (0, 1)
# all encoders of one seed before the next seed, so that what comes after can begin
RUNS = tuple((e, s, seed) for seed, s, e in product(SEEDS, SCHEMES, ENCODERS))
KEPT_EPOCHS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
COOLDOWN = 0.2
PIXELS = 64
PADDING = 8
BATCH_SIZE = 64
RATE = 1e-3
WARMUP_EPOCHS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-tar", type=Path, required=True, help="train/<class>/*.jpg and val/<class>/*.jpg")
    parser.add_argument("-o", type=Path, required=True)
    parser.add_argument("-seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("-num_proc", type=int, default=1)
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    runs = [run for run in RUNS if run[-1] in args.seeds]
    missing = [run for run in runs if not (args.o / name_of(*run) / "summary.csv").is_file()]
    Parallel(n_jobs=args.num_proc, batch_size=1, pre_dispatch="n_jobs")(
        delayed(pretrain)(*run, args.tar, args.o, args.device) for run in missing
    )


def name_of(encoder: str, scheme: str, seed: int) -> str:
    return f"{encoder}-{scheme}-{seed}"


def pretrain(encoder: str, scheme: str, seed: int, tar: Path, output: Path, device: str) -> None:
    """One run: ``checkpoint-K.pth.tar`` after K epochs and, last of all, ``summary.csv``."""
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    folder = output / name_of(encoder, scheme, seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, classes = read_images(tar, "train")
    validation = read_images(tar, "val")
    started = time.monotonic()
    torch.manual_seed(seed)
    model = timm.create_model(encoder, num_classes=int(classes.max()) + 1)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, "adamw", lr=RATE, weight_decay=0.05)
    per_epoch = len(images) // BATCH_SIZE
    steps = [round(k * per_epoch) for k in KEPT_EPOCHS]
    batches = batches_of(images, classes, seed, device)
    rows = []

    def keep(epoch: int, trained: torch.nn.Module) -> None:
        top1 = accuracy(trained, *validation, device)
        contents = {"arch": encoder, "epoch": epoch, "state_dict": trained.state_dict(), "metric": top1}
        path = folder / f"checkpoint-{epoch}.pth.tar"
        torch.save(contents, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        rows.append({"epoch": epoch, "eval_top1": round(top1, 3)})
        print(f"{folder.name}: epoch {epoch}, top-1 {top1:.1f} %, {time.monotonic() - started:.0f} s", flush=True)

    if scheme == "cosine":
        for step in range(1, steps[-1] + 1):
            rate = RATE * min(step / (WARMUP_EPOCHS * per_epoch), 0.5 + 0.5 * math.cos(math.pi * step / steps[-1]))
            train_step(model, optimizer, rate, *next(batches))
            if step in steps:
                keep(KEPT_EPOCHS[steps.index(step)], model)
    else:
        branch_at = {round(s * (1 - COOLDOWN)): (k, s) for k, s in zip(KEPT_EPOCHS, steps, strict=True)}
        for step in range(1, max(branch_at) + 1):
            constant = RATE * min(1, step / (WARMUP_EPOCHS * per_epoch))
            train_step(model, optimizer, constant, *next(batches))
            if step in branch_at:
                epoch, end = branch_at[step]
                branch = copy.deepcopy(model)
                moments = create_optimizer_v2(branch, "adamw", lr=RATE, weight_decay=0.05)
                moments.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                own_batches = batches_of(images, classes, seed + 1000 * epoch, device)
                for left in range(end - step - 1, -1, -1):
                    train_step(branch, moments, constant * left / (end - step), *next(own_batches))
                keep(epoch, branch)
    partial = folder / "summary.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "eval_top1"])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, folder / "summary.csv")


def read_images(tar: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 64, 64) as bytes and their classes, in the order of their names."""
    images, names = [], []
    with tarfile.open(tar) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            parts = Path(member.name).parts
            if split in parts and member.name.lower().endswith((".jpg", ".jpeg")):
                data = archive.extractfile(member)
                assert data is not None
                images.append(np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB")))
                names.append(parts[-2])
    _, classes = np.unique(names, return_inverse=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(classes)


def batches_of(images: torch.Tensor, classes: torch.Tensor, seed: int, device: str):
    """Endless batches, every image once an epoch, randomly cropped and mirrored, four at a time alike to save time."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    augment = v2.Compose([v2.RandomCrop(PIXELS, PADDING), v2.RandomHorizontalFlip()])
    while True:
        shuffled = torch.randperm(len(images), generator=order)
        for chosen in shuffled[: len(images) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            yield (
                normalized(torch.cat([augment(images[few]) for few in chosen.split(4)]), device),
                classes[chosen].to(device),
            )


def normalized(images: torch.Tensor, device: str) -> torch.Tensor:
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    return ((images / 255 - mean) / std).to(device, memory_format=torch.channels_last)


def train_step(model, optimizer, rate: float, images: torch.Tensor, classes: torch.Tensor) -> None:
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16):
        logits = model(images)
    torch.nn.functional.cross_entropy(logits.float(), classes, label_smoothing=0.1).backward()
    optimizer.step()


@torch.inference_mode()
def accuracy(model, images: torch.Tensor, classes: torch.Tensor, device: str) -> float:
    """Top-1 accuracy on whole images, in percent."""
    model.eval()
    found = [model(normalized(batch, device)).argmax(1).cpu() for batch in images.split(500)]
    return 100 * (torch.cat(found) == classes).float().mean().item()


if __name__ == "__main__":
    main()

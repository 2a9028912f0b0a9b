"""Pretrain a small timm network on Tiny ImageNet, and end where a watcher beside it says stop.

    python pretrain_watched.py -data tiny-imagenet-200 -o runs/tiny
    mtl-watch-pretraining -d 4 -run runs/tiny -o runs/tiny/watch -price 1     # in another terminal

``-data`` is a folder or tar file that holds train/CLASS/.../*.jpeg, as Tiny ImageNet does
(http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked).
"""

from __future__ import annotations

import argparse
import io
import math
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from torchvision.transforms import v2

PIXELS, PADDING = 64, 8


def main() -> None:
    """Train until the last epoch, or until the watcher says stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-data", type=Path, required=True, help="folder or tar file with train/CLASS/.../*.jpeg")
    parser.add_argument("-o", type=Path, required=True, help="where checkpoints go")
    parser.add_argument(
        "-stop", type=Path, help="end once this file is there (default: watch/STOP in the output folder)"
    )
    parser.add_argument("-model", default="test_resnet")
    parser.add_argument("-epochs", type=int, default=16)
    parser.add_argument("-per_class", type=int, default=150, help="images of each class at most")
    parser.add_argument("-batch_size", type=int, default=64)
    parser.add_argument("-rate", type=float, default=1e-3)
    parser.add_argument("-seed", type=int, default=0)
    args = parser.parse_args()

    stop = args.stop or args.o / "watch" / "STOP"
    args.o.mkdir(parents=True, exist_ok=True)
    # the watcher reads here how long the run is to be
    (args.o / "args.yaml").write_text(yaml.safe_dump({"model": args.model, "epochs": args.epochs}))
    images, classes = read_images(args.data, args.per_class)
    print(f"{len(images)} images of {int(classes.max()) + 1} classes", flush=True)

    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=int(classes.max()) + 1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.05)
    steps = args.epochs * (len(images) // args.batch_size)
    warmup = max(1, steps // args.epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    augment = v2.Compose([v2.RandomCrop(PIXELS, PADDING), v2.RandomHorizontalFlip()])
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    for epoch in range(args.epochs):
        started, losses, right = time.monotonic(), [], 0
        model.train()
        batches = torch.randperm(len(images))[: len(images) // args.batch_size * args.batch_size].split(args.batch_size)
        for chosen in batches:
            # four at a time alike, to save time
            batch = torch.cat([augment(images[few]) for few in chosen.split(4)])
            batch = ((batch / 255 - mean) / std).to(memory_format=torch.channels_last)
            logits = model(batch)
            loss = torch.nn.functional.cross_entropy(logits, classes[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            right += int((logits.argmax(1) == classes[chosen]).sum())
        save(model, args, epoch)
        accuracy = 100 * right / (len(batches) * args.batch_size)
        print(
            f"epoch {epoch}: loss {np.mean(losses):.3f}, training top-1 {accuracy:.1f} %, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if stop.exists():
            print(f"{stop} is there: training ends after epoch {epoch} of {args.epochs - 1}")
            return


def save(model: torch.nn.Module, args: argparse.Namespace, epoch: int) -> None:
    """Write a checkpoint in the layout of timm's train.py, under its name only once it is whole."""
    path = args.o / f"checkpoint-{epoch}.pth.tar"
    partial = path.with_suffix(".part")
    torch.save({"arch": args.model, "epoch": epoch, "state_dict": model.state_dict()}, partial)
    os.replace(partial, path)


def read_images(source: Path, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images (N, 3, 64, 64) as bytes and their classes (N,), in the order of their names."""
    images, names = [], []
    taken: Counter[str] = Counter()
    for name, read in files_of(source):
        parts = name.parts
        if "train" in parts and name.suffix.lower() in (".jpg", ".jpeg"):
            label = parts[parts.index("train") + 1]
            if taken[label] < per_class:
                images.append(np.asarray(Image.open(io.BytesIO(read())).convert("RGB")))
                names.append(label)
                taken[label] += 1
    if not images:
        raise SystemExit(f"{source} holds no train/CLASS/.../*.jpeg")
    _, classes = np.unique(names, return_inverse=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(classes)


def files_of(source: Path) -> Iterator[tuple[Path, Callable[[], bytes]]]:
    """Names below a folder or in a tar file, sorted, each with a function that reads it."""
    if source.is_dir():
        for file in sorted(source.rglob("*")):
            yield file.relative_to(source), file.read_bytes
        return
    with tarfile.open(source) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.isfile():
                yield Path(member.name), lambda member=member: archive.extractfile(member).read()


if __name__ == "__main__":
    main()

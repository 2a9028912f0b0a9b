"""Downstream Dice of every kept checkpoint: short trainings of TimmUNet on small training sets, whole test images.

Every seed draws its own training cases, decoder weights and order of patches, the same for all checkpoints, so that
checkpoints are compared pair by pair. Rows that the table has already are not computed again.

    python benchmarks/evidence/downstream.py -raw nnUNet_raw -runs runs/* -work work -o downstream.csv -num_proc 2
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from joblib import Parallel, delayed
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from targets import TARGETS, Target, prepared, read, training_slices
from torch import Tensor

from mtl_nnunet.checkpoints import find_checkpoints, read_contents
from mtl_nnunet.curves import AVERAGE, SCRATCH, STATES
from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.network import TimmUNet, strides_of
from mtl_nnunet.recipe import EpochwiseLR, Recipe, optimizer_of, parameter_groups, recipe

# how many of the last checkpoints are averaged, as one more choice
AVERAGED = 3
ITERATIONS = 240
RATE = 3e-3
WARMUP = 10
BATCH_SIZE = 8
PATCH = 64
STEM_CHANNELS = 8
COLUMNS = (
    "dataset",
    "encoder",
    "scheme",
    "run",
    "state",
    "epoch",
    "seed",
    "dice",
    "accuracy",
    "pooled_dice",
    "seconds",
    "made_with",
)


@dataclass(frozen=True)
class Job:
    """One training: what is known of it before it is run."""

    dataset: str
    encoder: str
    scheme: str
    run: str
    state: str
    epoch: str
    seed: int
    accuracy: str = ""
    checkpoints: tuple[Path, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, c)) for c in COLUMNS[:7])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("-state", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("-seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("-epochs", nargs="+", help="of each run, and average-3; default all")
    parser.add_argument("-iterations", type=int, default=ITERATIONS)
    parser.add_argument("-lr", type=float, default=RATE)
    parser.add_argument(
        "-layer_decay", type=float, help="of all trainings; default MTLTrainer's, and 1 from random weights"
    )
    args = parser.parse_args()
    files = {name: prepared(name, args.raw, args.work) for name in args.d}
    file, done = opened(args.o, COLUMNS, COLUMNS[:7])
    jobs = [j for j in jobs_of(args) if j.key not in done]
    print(f"{len(done)} trainings are in {args.o}, {len(jobs)} to go", flush=True)
    version = made_with(args.device)
    started = time.monotonic()
    results = Parallel(n_jobs=args.num_proc, batch_size=1, return_as="generator")(
        delayed(train_and_test)(job, files[job.dataset], args.iterations, args.lr, args.device, args.layer_decay)
        for job in jobs
    )
    with file:
        writer = csv.writer(file, lineterminator="\n")
        for i, (job, (dice, pooled, seconds)) in enumerate(zip(jobs, results, strict=True), start=1):
            writer.writerow([*job.key, f"{dice:.5f}", job.accuracy, f"{pooled:.5f}", f"{seconds:.2f}", version])
            file.flush()
            if i % 100 == 0:
                print(f"{i} of {len(jobs)}, {time.monotonic() - started:.0f} s", flush=True)


def opened(path: Path, columns: tuple[str, ...], key: tuple[str, ...]) -> tuple[TextIO, set[tuple[str, ...]]]:
    """A table to append to, for this process alone, and the keys of what it holds.

    Where a kill cut the last line off, all rows of the last key are taken out: there may be fewer than there should be.
    """
    file = path.open("a+", newline="")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another process is writing {path}: wait for it, or pass -o another table") from None
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind("\n") + 1] or ",".join(columns) + "\n"
    reader = csv.DictReader(io.StringIO(whole))
    rows = [(tuple(row[c] for c in key), row) for row in reader]
    if whole != text:
        rows = [row for row in rows if row[0] != rows[-1][0]]
        file.truncate(0)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in rows)
        file.flush()
    return file, {k for k, _ in rows}


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-raw", type=Path, required=True, help="nnU-Net's folder of raw datasets")
    parser.add_argument("-runs", type=Path, nargs="+", required=True, help="folders of pretraining runs")
    parser.add_argument("-work", type=Path, required=True, help="where prepared targets are kept")
    parser.add_argument("-o", type=Path, required=True)
    parser.add_argument("-d", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("-num_proc", type=int, default=1)
    parser.add_argument("-device", default="cpu")


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """All trainings, a whole grid of one seed before the next, so that what is there at any time is balanced."""
    jobs = []
    runs = {folder: find_checkpoints([folder]) for folder in args.runs}
    encoders = dict.fromkeys(str(found[0].architecture) for found in runs.values())
    for seed, dataset, state in product(args.seeds, args.d, args.state):
        jobs += [Job(dataset, encoder, "", "", state, SCRATCH, seed) for encoder in encoders]
        for folder, found in runs.items():
            known = (dataset, str(found[0].architecture), scheme_of(folder), folder.name, state)
            jobs += [
                Job(*known, epoch, seed, accuracies(folder).get(epoch, ""), (checkpoint.path,))
                for checkpoint in found
                if (epoch := str(checkpoint.epoch)) in (args.epochs or [epoch])
            ]
            average = f"{AVERAGE}{AVERAGED}"
            if average in (args.epochs or [average]):
                jobs.append(Job(*known, average, seed, "", tuple(c.path for c in found[-AVERAGED:])))
    return jobs


def scheme_of(folder: Path) -> str:
    return "cooldown" if "-cooldown-" in folder.name else "cosine"


def made_with(device: str = "cpu") -> str:
    """The commit of this code, whether it was changed since, and the accelerator if it is one."""
    here = Path(__file__).parent
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=here, text=True).strip()
    return f"{commit} on {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else commit


@cache
def accuracies(folder: Path) -> dict[str, str]:
    with (folder / "summary.csv").open(newline="") as file:
        return {row["epoch"]: row["eval_top1"] for row in csv.DictReader(file)}


def train_and_test(
    job: Job, file: Path, iterations: int, lr: float, device: str, layer_decay: float | None = None
) -> tuple[float, float, float]:
    """Both kinds of Dice on the test patients of one training, and the seconds that it took."""
    started = time.monotonic()
    target = read(file)
    network, how = network_of(job, target, lr, device, layer_decay)
    train(network, target, training_slices(target, job.seed), how, iterations, job.seed, device)
    return *test(network, target, device), time.monotonic() - started


def network_of(
    job: Job, target: Target, lr: float, device: str, layer_decay: float | None = None
) -> tuple[TimmUNet, Recipe]:
    """The network that a training starts from, and its recipe."""
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    strides = strides_of(TimmEncoder(job.encoder))
    network = TimmUNet(
        target.images.shape[1],
        target.num_classes,
        job.encoder,
        strides,
        n_conv_per_stage_decoder=1,
        stem_channels=STEM_CHANNELS,
    )
    if job.checkpoints:
        network.encoder.load_weights(averaged(job.checkpoints), " and ".join(map(str, job.checkpoints)))
    network = network.to(device, memory_format=torch.channels_last)
    frozen = job.state == "frozen"
    network.encoder.frozen = frozen
    # pretrained layers learn the slower the shallower they are; random ones have nothing to keep
    decay: dict[str, float] = {} if job.checkpoints else {"layer_decay": 1}
    if layer_decay is not None:
        decay = {"layer_decay": layer_decay}
    return network, recipe({"lr": lr, **decay, **({"frozen_epochs": "all"} if frozen else {})})


def averaged(checkpoints: tuple[Path, ...]) -> dict[str, Tensor]:
    """Mean of the weights of checkpoints of one run."""
    weights = [read_contents(path).weights for path in checkpoints]
    return {
        name: torch.stack([w[name].double() for w in weights]).mean(0).to(tensor.dtype)
        for name, tensor in weights[0].items()
    }


def train(
    network: TimmUNet, target: Target, chosen: np.ndarray, how: Recipe, iterations: int, seed: int, device: str
) -> None:
    groups = [{**group, "fused": True} for group in parameter_groups(network, how)]
    optimizer = optimizer_of(groups, how)
    schedule = EpochwiseLR(optimizer, iterations, WARMUP)
    loss = DC_and_CE_loss(
        {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": False},
        {},
        ignore_label=-1,
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    rng = np.random.default_rng([seed, 1])
    images, labels = target.images[chosen], target.labels[chosen]
    network.train()
    for iteration in range(iterations):
        schedule.step(iteration)
        batch, truth = patches(images, labels, rng)
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = network(batch.to(device, memory_format=torch.channels_last))
        loss(logits.float(), truth.to(device)).backward()
        optimizer.step()


def patches(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A batch of random patches, brighter or darker and of more or less contrast."""
    rows = rng.integers(len(images), size=BATCH_SIZE)
    corners = rng.integers([images.shape[2] - PATCH + 1, images.shape[3] - PATCH + 1], size=(BATCH_SIZE, 2))
    pairs = [
        (images[r, :, y : y + PATCH, x : x + PATCH], labels[r, None, y : y + PATCH, x : x + PATCH])
        for r, (y, x) in zip(rows, corners, strict=True)
    ]
    contrast, brightness = torch.from_numpy(rng.normal([[1], [0]], 0.1, (2, BATCH_SIZE)).astype(np.float32))
    batch = torch.stack([p[0] for p in pairs])
    return batch * contrast[:, None, None, None] + brightness[:, None, None, None], torch.stack([p[1] for p in pairs])


@torch.inference_mode()
def test(network: TimmUNet, target: Target, device: str) -> tuple[float, float]:
    """Dice on the test patients, averaged over classes: the mean over patients, and that of all their pixels together."""
    network.eval()
    images, labels = target.images[target.is_test], target.labels[target.is_test]
    found = []
    for batch in images.split(16):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found.append(network(batch.to(device, memory_format=torch.channels_last)).argmax(1).cpu())
    predicted, patients = torch.cat(found), target.patients[target.is_test]
    predicted[labels < 0] = -1
    by_patient = [
        class_dice(predicted[mine], labels[mine], target) for mine in map(patients.__eq__, np.unique(patients))
    ]
    return float(np.nanmean(by_patient)), float(np.nanmean(class_dice(predicted, labels, target)))


def class_dice(predicted: Tensor, truth: Tensor, target: Target) -> list[float]:
    """Dice of each class but the background; NaN where it is neither there nor predicted."""
    found = []
    for k in range(1, target.num_classes):
        size = int((predicted == k).sum() + (truth == k).sum())
        found.append(2 * int(((predicted == k) & (truth == k)).sum()) / size if size else float("nan"))
    return found


if __name__ == "__main__":
    # workers import functions, and what these keep, by the name of their module
    import downstream

    downstream.main()

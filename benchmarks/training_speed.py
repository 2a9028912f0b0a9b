"""What a training step of TimmUNet costs beside nnU-Net's own network at the same patch and batch.

A step is nnU-Net's: forward, Dice and cross-entropy at every scale, backward, clipping, optimiser (AdamW; nnU-Net's SGD for its
own network); mixed precision on CUDA. The two networks step in turn, so that a drift of the machine's speed meets both. Prints
samples a second and the bytes that autograd keeps for backward, and the ratio TimmUNet / nnU-Net of both, median and range over
the pairs. Kept bytes are counted without torch.compile. nnU-Net's environment variables must be set and the dataset planned.

    python benchmarks/training_speed.py -d 4 -encoder resnet18 -c 2d 3d_fullres -device cuda -o speed.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mtl_nnunet.errors import UserError
from mtl_nnunet.memory import GB, kept_tensors, network_of, nnunet_loss, targets_of
from mtl_nnunet.plans import preprocessed_folder, with_timm_unet


@dataclass(frozen=True)
class Row:
    configuration: str
    network: str
    patch_size: str
    batch_size: int
    parameters: int
    seconds: float
    samples_per_second: float
    kept_bytes: int
    speed_ratio: float
    speed_ratio_low: float
    speed_ratio_high: float
    kept_ratio: float
    device: str
    threads: int
    repeats: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="number or name of a planned dataset")
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-c", nargs="+", default=["2d"], help="configurations")
    parser.add_argument("-encoder", default="resnet18")
    parser.add_argument("-batch_size", type=int, help="default: that of the plans")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("-repeats", type=int, default=20, help="pairs of steps")
    parser.add_argument("-warmup", type=int, default=3, help="pairs of steps before them")
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks, as nnU-Net does on CUDA")
    parser.add_argument("-o", type=Path)
    args = parser.parse_args()

    folder = preprocessed_folder(maybe_convert_to_dataset_name(args.d))
    plans = json.loads((folder / f"{args.p}.json").read_text())
    dataset_json = json.loads((folder / "dataset.json").read_text())
    rows: list[Row] = []
    for configuration in args.c:
        try:
            rows += compare(plans, configuration, dataset_json, args)
        except UserError as error:
            print(f"{configuration}: left out, {error}")
    if args.o and rows:
        with open(args.o, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=asdict(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


def compare(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], args: argparse.Namespace
) -> list[Row]:
    manager = PlansManager(deepcopy(plans))
    channels = determine_num_input_channels(manager, manager.get_configuration(configuration), dataset_json)
    ours = with_timm_unet(plans, configuration, {"encoder": args.encoder, "input_channels": channels})
    resolved = [PlansManager(deepcopy(p)).get_configuration(configuration) for p in (ours, plans)]
    batch_size = args.batch_size or resolved[1].batch_size
    # a patch that both networks take: TimmUNet's, which is rounded up, and then to what the other's strides need
    divisors = np.prod(np.vstack(resolved[1].pool_op_kernel_sizes), axis=0)
    reductions = np.prod(np.vstack(resolved[0].pool_op_kernel_sizes), axis=0)
    multiples = [lcm(int(a), int(b)) for a, b in zip(divisors, reductions, strict=True)]
    patch = [-(-int(s) // m) * m for s, m in zip(resolved[0].patch_size, multiples, strict=True)]

    names = [network_of(p, configuration) for p in (ours, plans)]
    networks = [build(r, channels, manager.get_label_manager(dataset_json).num_segmentation_heads) for r in resolved]
    parameters = [sum(p.numel() for p in n.parameters()) for n in networks]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, channels, *patch, generator=generator).to(args.device)
    kept, steps = [], []
    for network, optimizer_of in zip(networks, (adamw, sgd), strict=True):
        forward, step = training_step(network, optimizer_of, images, manager, configuration, dataset_json, args)
        kept.append(kept_tensors(forward, [images, *network.parameters(), *network.buffers()]).total)
        steps.append(step)
    for _ in range(args.warmup):
        for step in steps:
            step()
    seconds: list[list[float]] = [[], []]
    for _ in range(args.repeats):
        for step, record in zip(steps, seconds, strict=True):
            started = time.perf_counter()
            step()
            record.append(time.perf_counter() - started)
    ratios = [theirs / mine for mine, theirs in zip(*seconds, strict=True)]

    threads = torch.get_num_threads()
    print(f"{configuration}: patch {' x '.join(map(str, patch))}, batch {batch_size}, {args.device}, {threads} threads")
    print(f"  {'network':<28}{'parameters':>12}{'s/step':>10}{'samples/s':>12}{'kept GB':>10}")
    rows = []
    for i, name in enumerate(names):
        median = statistics.median(seconds[i])
        print(
            f"  {name:<28}{parameters[i] / 1e6:>10.2f} M{median:>10.3f}{batch_size / median:>12.2f}{kept[i] / GB:>10.3f}"
        )
        figures = (statistics.median(ratios), min(ratios), max(ratios), kept[0] / kept[1])
        if i == 1:
            figures = (1.0, 1.0, 1.0, 1.0)
        rows.append(
            Row(
                configuration,
                name,
                "x".join(map(str, patch)),
                batch_size,
                parameters[i],
                round(median, 5),
                round(batch_size / median, 3),
                kept[i],
                *(round(f, 4) for f in figures),
                args.device,
                threads,
                args.repeats,
            )
        )
    print(
        f"  {names[0]} / {names[1]}: speed {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
        f"{args.repeats} pairs), kept tensors {kept[0] / kept[1]:.2f}",
        flush=True,
    )
    return rows


def build(resolved: Any, channels: int, heads: int) -> torch.nn.Module:
    network: torch.nn.Module = get_network_from_plans(
        resolved.network_arch_class_name,
        resolved.network_arch_init_kwargs,
        resolved.network_arch_init_kwargs_req_import,
        channels,
        heads,
        deep_supervision=True,
    )
    return network.train()


def adamw(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-2)


def sgd(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)


def training_step(
    network: torch.nn.Module,
    optimizer_of: Callable[[torch.nn.Module], torch.optim.Optimizer],
    images: torch.Tensor,
    manager: PlansManager,
    configuration: str,
    dataset_json: dict[str, Any],
    args: argparse.Namespace,
) -> tuple[Callable[[], object], Callable[[], None]]:
    """Forward with loss, and a whole step that has finished on the device when it returns."""
    network.to(args.device)
    labels = manager.get_label_manager(dataset_json)
    loss_of = nnunet_loss(labels, manager.get_configuration(configuration).batch_dice)
    with torch.no_grad():
        targets = targets_of(network(images), labels)
    for target in targets:
        # some foreground, so that every term of the loss has something to do
        target[:, :, : target.shape[2] // 2] = 1
    optimizer = optimizer_of(network)
    on_cuda = torch.device(args.device).type == "cuda"
    scaler = torch.amp.GradScaler("cuda", enabled=on_cuda)
    stepped = torch.compile(network) if args.compile else network

    def forward_of(model: Any) -> torch.Tensor:
        # nnU-Net's own choice: mixed precision on CUDA only
        with torch.autocast("cuda", enabled=on_cuda):
            return loss_of(model(images), targets)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(forward_of(stepped)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        if on_cuda:
            torch.cuda.synchronize()

    return lambda: forward_of(network), step


if __name__ == "__main__":
    main()

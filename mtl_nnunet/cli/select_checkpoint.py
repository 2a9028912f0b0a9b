"""``mtl-select-checkpoint``: score the checkpoints of a pretraining run on a dataset and pick one."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from mtl_nnunet.cli.command import run


def build_parser() -> argparse.ArgumentParser:
    """The command's options; nothing heavy is imported to build them."""
    parser = argparse.ArgumentParser(
        prog="mtl-select-checkpoint",
        description="Score the checkpoints of a pretraining run on a segmentation dataset, before any planning, and pick "
        "the one that training starts from.",
        epilog="Scores: contrastive (default), robustness. Parameters follow the name: "
        "-score robustness:margin=0.25,distance=l2,level=5,pooled=no",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", metavar="DATASET", help="number or name of a dataset in nnUNet_raw, e.g. 4")
    source.add_argument("-i", metavar="FOLDER", help="folder of images, or Decathlon/MONAI datalist, without nnU-Net")
    parser.add_argument(
        "-ckpt", nargs="+", required=True, metavar="PATH", help="folder of a pretraining run, or its files"
    )
    parser.add_argument("-encoder", metavar="NAME", help="timm's name of the encoder, where the checkpoints do not say")
    parser.add_argument(
        "-o",
        metavar="FOLDER",
        help="where to write; default with -d: the dataset's folder in nnUNet_preprocessed",
    )
    parser.add_argument("-score", default="contrastive", metavar="NAME", help="score to rank by (default: contrastive)")
    parser.add_argument("-num_slices", type=_positive, default=256, metavar="N", help="slices at most (default: 256)")
    parser.add_argument("-num_cases", type=_positive, default=64, metavar="N", help="cases read at most (default: 64)")
    parser.add_argument("-patients", metavar="CSV", help="table case,patient; default: every case is a patient")
    parser.add_argument(
        "-channel_names",
        nargs="+",
        metavar="NAME",
        help="with -i: channels as in nnU-Net's dataset.json, e.g. CT",
    )
    parser.add_argument(
        "-seed", type=_seed, default=0, metavar="N", help="seed of slices, views and bootstrap (default: 0)"
    )
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--overwrite", action="store_true", help="replace a selection that is there")
    parser.add_argument("--json", action="store_true", help="print selection.json on stdout instead of the table")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(build_parser(), argv, select)


def select(args: argparse.Namespace) -> None:
    """Gather slices, rank, write and print."""
    from mtl_nnunet.cases import find_image_folder, find_nnunet_dataset, with_patients
    from mtl_nnunet.checkpoints import find_checkpoints
    from mtl_nnunet.errors import UserError
    from mtl_nnunet.ranking import rank_checkpoints
    from mtl_nnunet.report import ranking_text, warnings_in_words
    from mtl_nnunet.scores import parse_score
    from mtl_nnunet.selection import refuse_foreign_folder, write_selection
    from mtl_nnunet.slices import gather_slices

    if args.channel_names and args.d:
        raise UserError("-channel_names goes with -i; with -d they stand in dataset.json.")
    score = parse_score(args.score)
    device = _device(args.device)
    dataset = find_nnunet_dataset(args.d) if args.d else find_image_folder(args.i, args.channel_names)
    if args.patients:
        dataset = with_patients(dataset, args.patients)
    folder = args.o or _default_folder(args.d, dataset.name)
    refuse_foreign_folder(folder, args.overwrite)
    checkpoints = find_checkpoints(args.ckpt)
    encoder = args.encoder or next((c.architecture for c in checkpoints if c.architecture), None)
    if encoder is None:
        raise UserError(
            f"checkpoint {checkpoints[0].path} does not say which network it is of. Pass timm's name of it: -encoder NAME."
        )
    slices = gather_slices(dataset, args.num_slices, args.num_cases, args.seed)
    ranking = rank_checkpoints(checkpoints, encoder, slices, score, args.seed, device)
    content = write_selection(folder, ranking, dataset, slices, args.seed, _command(args, device), args.overwrite)
    for warning in warnings_in_words(ranking, slices.num_patients):
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        from mtl_nnunet.files import to_json

        print(to_json(content), end="")
        return
    height, width = slices.images.shape[2:]
    print(
        f"\n{encoder} on {dataset.name}: {len(slices.images)} slices of {len(slices.used)} cases, {slices.num_patients} "
        f"patients; {height} x {width} pixels of {slices.spacing[0]:.3g} x {slices.spacing[1]:.3g} mm, axis {slices.axis} of (z, y, x)\n"
    )
    print(ranking_text(ranking))
    print(f"\nwritten: {folder} (selection.json, encoder.safetensors, ranking.csv, ranking.png)")
    if args.d:
        print(_next_commands(int(dataset.name[7:10]), args.o, device))


def _next_commands(number: int, folder: str | None, device: str) -> str:
    on_device = "" if device == "cuda" else f" -device {device}"
    lines = ["next:", f"  nnUNetv2_plan_and_preprocess -d {number} -c 2d"]
    if folder is None:
        lines.append(f"  nnUNetv2_train {number} 2d 0 -tr MTLTrainer{on_device}")
    else:
        # training finds only the default folder by itself
        lines.append(f"  mtl-nnunet plans -d {number} -selection {shlex.quote(folder)} -o nnUNetPlans_mtl")
        lines.append(f"  nnUNetv2_train {number} 2d 0 -tr MTLTrainer -p nnUNetPlans_mtl{on_device}")
    return "\n".join(lines)


def _default_folder(dataset_argument: str | None, dataset_name: str) -> str:
    import os

    from mtl_nnunet.errors import UserError
    from mtl_nnunet.selection import DEFAULT_FOLDER

    if dataset_argument is None:
        raise UserError("-i needs -o FOLDER: there is no nnU-Net folder to write to.")
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if not preprocessed:
        raise UserError(
            "the environment variable nnUNet_preprocessed is not set. Set it as nnU-Net's documentation says, or pass -o FOLDER."
        )
    return os.path.join(preprocessed, dataset_name, DEFAULT_FOLDER)


def _device(wanted: str | None) -> str:
    import torch

    from mtl_nnunet.errors import UserError

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[wanted]:
        have = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"-device {wanted} is not available on this machine. Available: {have}.")
    return wanted


def _command(args: argparse.Namespace, device: str) -> list[str]:
    # only what decides the result, so that the same selection is recorded by the same bytes
    source = ["-d", args.d] if args.d else ["-i", args.i]
    words = ["mtl-select-checkpoint", *source, "-ckpt", *args.ckpt]
    for name in ("encoder", "patients"):
        if getattr(args, name):
            words += [f"-{name}", getattr(args, name)]
    if args.channel_names:
        words += ["-channel_names", *args.channel_names]
    words += [
        "-score",
        args.score,
        "-num_slices",
        args.num_slices,
        "-num_cases",
        args.num_cases,
        "-seed",
        args.seed,
    ]
    return [shlex.quote(str(w)) for w in (*words, "-device", device)]


def _positive(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is too few, at least 2 are needed")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^32 - 1")
    return value

"""``mtl-select-checkpoint``: score the checkpoints of a pretraining run on a dataset and pick one."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtl_nnunet.cli.command import run

if TYPE_CHECKING:
    from mtl_nnunet.cases import Dataset


def build_parser() -> argparse.ArgumentParser:
    """The command's options; nothing heavy is imported to build them."""
    parser = argparse.ArgumentParser(
        prog="mtl-select-checkpoint",
        description="Score the checkpoints of a pretraining run on a segmentation dataset, before any planning, and pick "
        "the one that training starts from.",
        epilog="Scores without labels: contrastive (default), robustness (published), infonce, alignment, uniformity, rankme, "
        "dse. With labels: ccfv, logme, gbc, hscore, knn, probe, dse_labels. Parameters follow the name: "
        "-score robustness:margin=0.25,distance=l2,level=5,pooled=no; level=all averages all levels.",
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
    parser.add_argument(
        "-score",
        nargs="+",
        metavar="NAME",
        help="score to choose by (default: contrastive, with -labels ccfv); more names are computed beside it",
    )
    parser.add_argument(
        "-rule",
        default="best",
        metavar="RULE",
        help="best (default), last, or non-inferior[:margin=0.05,probability=0.95]: the earliest that loses at most that share "
        "of the gain over random weights, else the last",
    )
    parser.add_argument("-labels", action="store_true", help="use the labels of the training cases")
    parser.add_argument(
        "-f",
        metavar="FOLD",
        type=_fold,
        help="with labels: keep the validation cases of this fold of nnU-Net's split out (0 to 4), or all",
    )
    parser.add_argument("-views", choices=("scanner", "paper"), help="views of slices; default: the score's own")
    parser.add_argument(
        "-strength", type=_strength, default=1.0, metavar="X", help="strength of the views (default: 1)"
    )
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
    parser.add_argument("-precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: bf16 on GPUs")
    parser.add_argument("-np", type=_count, default=1, metavar="N", help="checkpoints scored at a time (default: 1)")
    parser.add_argument("-backend", choices=("loky", "dask", "ray"), default="loky", help="where -np workers run")
    parser.add_argument("-address", metavar="URL", help="scheduler of a Dask or Ray cluster; default: one of its own")
    parser.add_argument(
        "-cache", metavar="FOLDER", help="where results are kept (default: $MTL_CACHE or ~/.cache/mtl-nnunet)"
    )
    parser.add_argument("--no-cache", action="store_true", help="compute everything anew and keep nothing")
    parser.add_argument(
        "--skip-bad-cases", action="store_true", help="go on without cases that cannot be used, up to a tenth of them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a selection that is there")
    parser.add_argument("--json", action="store_true", help="print selection.json on stdout instead of the table")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(build_parser(), argv, select)


def select(args: argparse.Namespace) -> None:
    """Gather slices, rank, write and print."""
    from mtl_nnunet.cache import ResultCache, default_folder
    from mtl_nnunet.cases import find_image_folder, find_nnunet_dataset, with_patients
    from mtl_nnunet.checkpoints import find_checkpoints
    from mtl_nnunet.decision import parse_rule
    from mtl_nnunet.errors import UserError
    from mtl_nnunet.parallel import workers
    from mtl_nnunet.ranking import rank_checkpoints
    from mtl_nnunet.report import others_text, ranking_text, warnings_in_words
    from mtl_nnunet.scores import parse_score
    from mtl_nnunet.selection import refuse_foreign_folder, write_selection
    from mtl_nnunet.slices import gather_slices

    if args.channel_names and args.d:
        raise UserError("-channel_names goes with -i; with -d they stand in dataset.json.")
    scores = [parse_score(s, args.views, args.strength) for s in args.score or [_default_score(args)]]
    if len({s.text for s in scores}) < len(scores):
        raise UserError("the same score is named twice in -score. Name each once, or change a parameter.")
    rule = parse_rule(args.rule)
    labelled = any(score.labels for score in scores)
    fold = (args.f if args.f is not None else "all") if labelled else None
    if args.f is not None and not labelled:
        raise UserError(
            "-f keeps labels of validation cases out, and no score here uses labels. Add -labels, or leave -f out."
        )
    device = _device(args.device)
    dataset = find_nnunet_dataset(args.d) if args.d else find_image_folder(args.i, args.channel_names)
    if args.patients:
        dataset = with_patients(dataset, args.patients)
    if isinstance(fold, int):
        dataset = _training_cases(dataset, fold, args)
    folder = args.o or _default_folder(args.d, dataset.name, fold)
    refuse_foreign_folder(folder, args.overwrite)
    cache = None if args.no_cache else ResultCache(args.cache or default_folder())
    checkpoints = find_checkpoints(args.ckpt)
    encoder = args.encoder or next((c.architecture for c in checkpoints if c.architecture), None)
    if encoder is None:
        raise UserError(
            f"checkpoint {checkpoints[0].path} does not say which network it is of. Pass timm's name of it: -encoder NAME."
        )
    slices = gather_slices(
        dataset,
        args.num_slices,
        args.num_cases,
        args.seed,
        with_labels=labelled,
        skip_bad_cases=args.skip_bad_cases,
    )
    with workers(args.np, args.backend, args.address):
        rankings = rank_checkpoints(
            checkpoints, encoder, slices, scores, args.seed, device, rule, cache, args.precision
        )
    ranking = rankings[0]
    content = write_selection(
        folder, rankings, dataset, slices, args.seed, _command(args, device), args.overwrite, fold
    )
    warnings = warnings_in_words(ranking, slices.num_patients)
    warnings += [f"Case {name} was skipped: {reason}" for name, reason in slices.skipped]
    if fold == "all":
        warnings.append(
            "Labels of all cases were looked at, those of every fold's validation cases too: Dice on them is a little too "
            "good. Pass -f 0 to -f 4 to keep a fold's validation cases out."
        )
    for warning in warnings:
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
    if len(rankings) > 1:
        print("\n" + others_text(rankings[1:]))
    print(f"\nwritten: {folder} (selection.json, encoder.safetensors, ranking.csv, ranking.png)")
    if args.d:
        other_folder = args.o or (folder if isinstance(fold, int) else None)
        print(_next_commands(int(dataset.name[7:10]), other_folder, device, fold if isinstance(fold, int) else 0))


def _default_score(args: argparse.Namespace) -> str:
    return "ccfv" if args.labels else "contrastive"


def _training_cases(dataset: Dataset, fold: int, args: argparse.Namespace) -> Dataset:
    import os

    from mtl_nnunet.cases import without_validation_cases
    from mtl_nnunet.errors import UserError

    if not args.d:
        raise UserError(f"-f {fold} goes by nnU-Net's split, which only a dataset of -d has. Pass -f all, or -d.")
    preprocessed = os.environ.get("nnUNet_preprocessed")
    return without_validation_cases(dataset, fold, os.path.join(preprocessed, dataset.name) if preprocessed else None)


def _next_commands(number: int, folder: str | None, device: str, fold: int = 0) -> str:
    on_device = "" if device == "cuda" else f" -device {device}"
    lines = ["next:", f"  nnUNetv2_plan_and_preprocess -d {number} -c 2d"]
    if folder is None:
        lines.append(f"  nnUNetv2_train {number} 2d {fold} -tr MTLTrainer{on_device}")
    else:
        # training finds only the default folder by itself
        plans = "nnUNetPlans_mtl" + (f"_fold_{fold}" if fold else "")
        lines.append(f"  mtl-nnunet plans -d {number} -selection {shlex.quote(folder)} -o {plans}")
        lines.append(f"  nnUNetv2_train {number} 2d {fold} -tr MTLTrainer -p {plans}{on_device}")
    return "\n".join(lines)


def _default_folder(dataset_argument: str | None, dataset_name: str, fold: int | str | None) -> str:
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
    name = f"{DEFAULT_FOLDER}_fold_{fold}" if isinstance(fold, int) else DEFAULT_FOLDER
    return os.path.join(preprocessed, dataset_name, name)


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
    words += ["-score", *(args.score or [_default_score(args)]), "-rule", args.rule]
    if args.labels:
        words.append("-labels")
    for name in ("f", "views"):
        if getattr(args, name) is not None:
            words += [f"-{name}", getattr(args, name)]
    if args.skip_bad_cases:
        words.append("--skip-bad-cases")
    words += [
        "-strength",
        args.strength,
        "-precision",
        args.precision,
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


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few, at least 1 is needed")
    return value


def _strength(text: str) -> float:
    value = float(text)
    if not 0 < value <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 2")
    return value


def _fold(text: str) -> int | str:
    if text == "all":
        return text
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is no fold")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^32 - 1")
    return value

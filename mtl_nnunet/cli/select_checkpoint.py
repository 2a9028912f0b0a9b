"""``mtl-select-checkpoint``: score the checkpoints of a pretraining run on a dataset and pick one."""

from __future__ import annotations

import argparse
import os
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
        epilog="Scores without labels: contrastive (default), robustness (published), infonce, alignment, uniformity, rankme, "
        "dse. With labels: ccfv, logme, gbc, hscore, knn, probe, dse_labels. Parameters follow the name: "
        "-score robustness:margin=0.25,distance=l2,level=5,pooled=no; level=all averages all levels.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", metavar="DATASET", help="number or name of a dataset in nnUNet_raw, e.g. 4")
    source.add_argument("-i", metavar="FOLDER", help="folder of images, or Decathlon/MONAI datalist, without nnU-Net")
    parser.add_argument(
        "-ckpt",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folder of a pretraining run, or its files; or published weights: timm:resnet50 (all of that network), "
        "timm:resnet50.a1_in1k, hf-hub:OWNER/NAME, each with @REVISION if wanted",
    )
    parser.add_argument(
        "-weights",
        choices=("default", "ema", "trained"),
        default="default",
        help="which weights in each file: what its own code would evaluate (default), their moving average (EMA, teacher, key "
        "encoder), or what gradients trained (student, query encoder)",
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
        help="score to show, and with -rule best to choose by (default: contrastive, with -labels ccfv); more names are computed "
        "beside it",
    )
    parser.add_argument(
        "-rule",
        metavar="RULE",
        help="expected-loss[:price=0,state=free]: least expected Dice loss plus what a whole pretraining is worth in Dice points, "
        "encoder free or frozen; best score; last; or non-inferior[:margin=0.05,probability=0.95]: the earliest that loses at most that "
        "share of the gain over random weights, else the last. Default: expected-loss; where checkpoints state steps and no "
        "epochs last; among checkpoints of no one run, such as published weights, and with --race best",
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
    parser.add_argument(
        "-num_slices", type=_two_or_more, default=256, metavar="N", help="slices at most (default: 256)"
    )
    parser.add_argument(
        "-num_cases", type=_two_or_more, default=64, metavar="N", help="cases read at most (default: 64)"
    )
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
    parser.add_argument(
        "-np", type=_one_or_more, default=1, metavar="N", help="checkpoints scored at a time (default: 1)"
    )
    parser.add_argument("-backend", choices=("loky", "dask", "ray"), default="loky", help="where -np workers run")
    parser.add_argument("-address", metavar="URL", help="scheduler of a Dask or Ray cluster; default: one of its own")
    parser.add_argument(
        "-cache", metavar="FOLDER", help="where results are kept (default: $MTL_CACHE or ~/.cache/mtl-nnunet)"
    )
    parser.add_argument("--no-cache", action="store_true", help="compute everything anew and keep nothing")
    parser.add_argument(
        "--race",
        action="store_true",
        help="stop scoring checkpoints that are clearly out on a part of the patients; one score, rule best",
    )
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
    from mtl_nnunet.errors import UserError, listed
    from mtl_nnunet.parallel import workers
    from mtl_nnunet.report import (
        budget_text,
        comparison_text,
        labels_in_words,
        others_text,
        ranking_text,
        warnings_in_words,
    )
    from mtl_nnunet.scores import LABELLED, parse_score
    from mtl_nnunet.select import default_output, select_checkpoint

    if args.channel_names and args.d:
        raise UserError("-channel_names goes with -i; with -d they stand in dataset.json.")
    if args.i and not args.o:
        raise UserError("-i needs -o FOLDER: there is no nnU-Net folder to write to.")
    scores = [parse_score(s, args.views, args.strength) for s in args.score or [_default_score(args)]]
    if args.labels and not any(s.labels for s in scores):
        raise UserError(
            f"-labels is given, and no score here uses labels. Choose one of {listed(LABELLED, len(LABELLED))}."
        )
    if (args.views or args.strength != 1) and all(s.views == "plain" for s in scores):
        raise UserError(
            "-views and -strength go with scores that compare views, and none is named here. Leave them out."
        )
    if args.address and args.backend == "loky":
        raise UserError("-address goes with -backend dask or ray.")
    device = _device(args.device)
    dataset = (
        find_nnunet_dataset(args.d, args.skip_bad_cases)
        if args.d
        else find_image_folder(args.i, args.channel_names, args.skip_bad_cases)
    )
    if args.patients:
        dataset = with_patients(dataset, args.patients)
    folder = args.o or str(default_output(dataset.name, args.f))
    with workers(args.np, args.backend, args.address):
        outcome = select_checkpoint(
            dataset,
            args.ckpt,
            scores,
            encoder=args.encoder,
            weights=args.weights,
            output=folder,
            rule=args.rule,
            fold=args.f,
            num_slices=args.num_slices,
            num_cases=args.num_cases,
            seed=args.seed,
            device=device,
            precision=args.precision,
            cache=None if args.no_cache else ResultCache(args.cache or default_folder()),
            race=args.race,
            skip_bad_cases=args.skip_bad_cases,
            overwrite=args.overwrite,
            command=_command(args, device),
        )
    ranking, slices = outcome.ranking, outcome.slices
    warnings = warnings_in_words(ranking, slices.num_patients)
    warnings += labels_in_words(slices, outcome.fold, can_keep_out=bool(args.d) and len(dataset.cases) >= 5)
    warnings += [f"Case {name} was skipped: {reason}" for name, reason in slices.skipped]
    table = os.path.join(os.environ.get("nnUNet_raw", ""), dataset.name, "patients.csv")
    if args.d and not args.patients and os.path.isfile(table):
        warnings.append(f"Every case counted as a patient of its own, though {table} is there. Pass it with -patients.")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.race:
        print(f"the race took {outcome.forwards:.0%} of the forwards of a full run", file=sys.stderr)
    if args.json:
        from mtl_nnunet.files import to_json

        print(to_json(outcome.content), end="")
        return
    height, width = slices.images.shape[2:]
    print(
        f"\n{ranking.encoder} on {dataset.name}: {len(slices.images)} slices of {len(slices.used)} cases, {slices.num_patients} "
        f"patients; {height} x {width} pixels of {slices.spacing[0]:.3g} x {slices.spacing[1]:.3g} mm, axis {slices.axis} of (z, y, x)\n"
    )
    print(ranking_text(ranking))
    if compared := comparison_text(ranking):
        print(compared)
    if budget := budget_text(ranking):
        print(budget)
    if len(outcome.rankings) > 1:
        print("\n" + others_text(outcome.rankings[1:]))
    print(f"\nwritten: {folder} (selection.json, encoder.safetensors, ranking.csv, ranking.png)")
    if args.d:
        print(_next_commands(int(dataset.name[7:10]), folder, args.o is not None, outcome.fold, device))


def _default_score(args: argparse.Namespace) -> str:
    return "ccfv" if args.labels else "contrastive"


def _next_commands(number: int, folder: str, elsewhere: bool, fold: int | str | None, device: str) -> str:
    on_device = "" if device == "cuda" else f" -device {device}"
    of_fold = isinstance(fold, int)
    train = f"  nnUNetv2_train {number} 2d {fold if of_fold else 0} -tr MTLTrainer"
    lines = ["next:", f"  nnUNetv2_plan_and_preprocess -d {number} -c 2d"]
    if elsewhere or of_fold:
        # training finds only the dataset's own selection by itself
        plans = f"nnUNetPlans_mtl_fold_{fold}" if of_fold else "nnUNetPlans_mtl"
        lines.append(f"  mtl-nnunet plans -d {number} -selection {shlex.quote(folder)} -o {plans}")
        lines.append(f"{train} -p {plans}{on_device}")
    else:
        lines.append(f"{train}{on_device}")
    return "\n".join(lines)


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
    for name in ("encoder", "patients", "rule"):
        if getattr(args, name):
            words += [f"-{name}", getattr(args, name)]
    if args.weights != "default":
        words += ["-weights", args.weights]
    if args.channel_names:
        words += ["-channel_names", *args.channel_names]
    words += ["-score", *(args.score or [_default_score(args)])]
    if args.labels:
        words.append("-labels")
    for name in ("f", "views"):
        if getattr(args, name) is not None:
            words += [f"-{name}", getattr(args, name)]
    if args.race:
        words.append("--race")
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


def _whole(text: str, least: int, most: int = 2**32 - 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
    return value


def _two_or_more(text: str) -> int:
    return _whole(text, 2)


def _one_or_more(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _fold(text: str) -> int | str:
    return text if text == "all" else _whole(text, 0)


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None
    if not 0 < value <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 2")
    return value

"""``mtl-select-checkpoint``: score the checkpoints of a pretraining run on a dataset and pick one."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from mtl_nnunet.cli.command import run
from mtl_nnunet.cli.options import (
    add_cache,
    add_chooser,
    add_dataset,
    add_encoder,
    add_precision,
    add_score,
    add_skip_bad_cases,
    add_views_and_cases,
    available_device,
    cache_named,
    dataset_named,
    dataset_words,
    label_and_view_words,
    one_or_more,
    sampling_words,
    score_words,
    scores_named,
    weights_words,
)


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
    add_dataset(parser)
    parser.add_argument(
        "-ckpt",
        nargs="+",
        required=True,
        metavar="PATH",
        help="folder of a pretraining run, or its files; or published weights: timm:resnet50 (all of that network), "
        "timm:resnet50.a1_in1k, hf-hub:OWNER/NAME, each with @REVISION if wanted",
    )
    add_encoder(parser)
    parser.add_argument(
        "-o",
        metavar="FOLDER",
        help="where to write; default with -d: the dataset's folder in nnUNet_preprocessed",
    )
    add_score(parser)
    parser.add_argument(
        "-rule",
        metavar="RULE",
        help="expected-loss[:price=0,state=free]: least expected Dice loss plus what a whole pretraining is worth in Dice points, "
        "encoder free or frozen; best score; last; or non-inferior[:margin=0.05,probability=0.95]: the earliest that loses at most that "
        "share of the gain over random weights, else the last. Default: expected-loss; where checkpoints state steps and no "
        "epochs last; where they state neither, such as published weights, and with --race best",
    )
    add_chooser(parser)
    add_views_and_cases(parser)
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one, else cpu")
    add_precision(parser)
    parser.add_argument(
        "-np", type=one_or_more, default=1, metavar="N", help="checkpoints scored at a time (default: 1)"
    )
    parser.add_argument("-backend", choices=("loky", "dask", "ray"), default="loky", help="where -np workers run")
    parser.add_argument("-address", metavar="URL", help="scheduler of a Dask or Ray cluster; default: one of its own")
    add_cache(parser)
    parser.add_argument(
        "--race",
        action="store_true",
        help="stop scoring checkpoints that are clearly out on a part of the patients; one score, rule best",
    )
    add_skip_bad_cases(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a selection that is there")
    parser.add_argument("--json", action="store_true", help="print selection.json on stdout instead of the table")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(build_parser(), argv, select)


def select(args: argparse.Namespace) -> None:
    """Gather slices, rank, write and print."""
    from mtl_nnunet.errors import UserError
    from mtl_nnunet.parallel import workers
    from mtl_nnunet.report import (
        all_warnings,
        budget_text,
        comparison_text,
        others_text,
        ranking_text,
    )
    from mtl_nnunet.select import default_output, select_checkpoint
    from mtl_nnunet.selection import next_commands

    if args.i and not args.o:
        raise UserError("-i needs -o FOLDER: there is no nnU-Net folder to write to.")
    scores = scores_named(args)
    if args.address and args.backend == "loky":
        raise UserError("-address goes with -backend dask or ray.")
    device = available_device(args.device)
    dataset = dataset_named(args)
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
            chooser=args.chooser,
            fold=args.f,
            num_slices=args.num_slices,
            num_cases=args.num_cases,
            seed=args.seed,
            device=device,
            precision=args.precision,
            cache=cache_named(args),
            race=args.race,
            skip_bad_cases=args.skip_bad_cases,
            overwrite=args.overwrite,
            command=_command(args, device),
        )
    ranking, slices = outcome.ranking, outcome.slices
    for warning in all_warnings(ranking, outcome.dataset, slices, outcome.fold):
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
    print(f"\nwritten: {folder} (report.html to look at; selection.json, encoder.safetensors, ranking.csv, figures)")
    if commands := next_commands(outcome.dataset, folder, outcome.fold, device, ranking.rule.state):
        print("next:", *commands, sep="\n  ")


def _command(args: argparse.Namespace, device: str) -> list[str]:
    # only what decides the result, so that the same selection is recorded by the same bytes
    words = ["mtl-select-checkpoint", *dataset_words(args), "-ckpt", *args.ckpt, *weights_words(args)]
    words += ["-score", *score_words(args)]
    for name in ("rule", "chooser"):
        if getattr(args, name):
            words += [f"-{name}", getattr(args, name)]
    words += label_and_view_words(args)
    if args.race:
        words.append("--race")
    words += [*sampling_words(args), "-device", device]
    return [shlex.quote(str(w)) for w in words]

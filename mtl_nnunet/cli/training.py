"""``mtl-nnunet training``: draw a training, against others of the same fold."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from mtl_nnunet.cli.command import add_json, answers_json


def add_parser(commands: Any) -> None:
    """Add the command's options; nothing heavy is imported to build them."""
    parser = commands.add_parser(
        "training",
        help="draw a training: curves, validation, worst, median and best case",
        description="Draw what nnU-Net left of a training as a page and as figures, beside the selection that it started from: its curves and its "
        "validation Dice against trainings of the same fold from random weights (MTLTrainerScratch, nnUNetTrainer), and the worst, median and best "
        "validation case. MTLTrainer does it by itself after its validation; run it again when another training is finished. What it drew before is "
        "replaced.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="number or name of the dataset")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="nnU-Net's configuration, e.g. 2d")
    parser.add_argument("-f", default="0", metavar="FOLD", help="nnU-Net's fold, 0 to 4 or all (default: 0)")
    parser.add_argument("-tr", default="MTLTrainer", metavar="TRAINER", help="default: MTLTrainer")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="default: nnUNetPlans")
    parser.add_argument(
        "-against",
        nargs="*",
        metavar="TRAINER[__PLANS[__CONFIGURATION]]",
        help="trainings of the same fold to hold it against, none where nothing follows (default: those of MTLTrainerScratch and nnUNetTrainer, "
        "of any length, that are there)",
    )
    parser.add_argument(
        "-patients", metavar="CSV", help="table case,patient (default: the raw dataset's patients.csv, if it is there)"
    )
    parser.add_argument(
        "-o", metavar="FOLDER", help="default: the folder of the selection that the training started from"
    )
    add_json(parser, "everything in numbers")
    parser.set_defaults(command=answers_json(draw))


def draw(args: argparse.Namespace) -> dict[str, Any]:
    """Draw it, and say what it shows and where it lies."""
    # nnU-Net's readers and its warnings print to stdout, which belongs to the result
    with contextlib.redirect_stdout(sys.stderr):
        from mtl_nnunet.training_report import report_training

        report = report_training(args.d, args.c, args.f, args.tr, args.p, args.against, args.o, args.patients)
    print(report.verdict)
    for warning in report.warnings:
        print(f"note: {warning}")
    print(f"written: {report.page} and {len(report.files) - 1} files of figures beside it")
    return report.content

"""``mtl-nnunet``: trainers, plans, training, bundle, checkpoints, demo, doctor, evaluate-scores, fit-chooser."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mtl_nnunet.cli import doctor, evaluate_scores, fit_chooser, list_checkpoints, training
from mtl_nnunet.cli.command import add_json, answers_json, run
from mtl_nnunet.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command's options; nothing heavy is imported to build them."""
    parser = argparse.ArgumentParser(
        prog="mtl-nnunet", description="Start nnU-Net from the right pretrained checkpoint."
    )
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    trainers = commands.add_parser(
        "trainers",
        help="print the value for nnUNet_extTrainer",
        description="Print the folder of our trainers, joined with what nnUNet_extTrainer names already: "
        'export nnUNet_extTrainer="$(mtl-nnunet trainers)"',
    )
    add_json(trainers, "the value and our folder")
    trainers.set_defaults(command=answers_json(print_trainers))

    plans = commands.add_parser(
        "plans",
        help="write plans that start from a selection",
        description="Write nnU-Net plans of another name whose configurations start from a selection, so that several "
        "selections or recipes can live side by side: nnUNetv2_train 4 2d 0 -tr MTLTrainer -p NAME. Nothing is preprocessed "
        "again.",
    )
    plans.add_argument("-d", required=True, metavar="DATASET", help="number or name of the dataset")
    plans.add_argument("-p", default="nnUNetPlans", metavar="NAME", help="plans to start from (default: nnUNetPlans)")
    plans.add_argument("-o", required=True, metavar="NAME", help="name of the new plans")
    plans.add_argument(
        "-c", nargs="+", metavar="CONFIGURATION", help="configurations to change (default: all that the encoder fits)"
    )
    plans.add_argument("-selection", metavar="FOLDER", help="default: the dataset's mtl_selection")
    plans.add_argument(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="size the batch of each configuration for a GPU of that much memory (default: the batch of the plans)",
    )
    plans.add_argument(
        "-recipe",
        metavar="FILE.json|NAME=VALUE,...",
        help="hyper-parameters for trainings from these plans, e.g. optimizer=sgd,lr=1e-3; MTL_RECIPE goes before them",
    )
    plans.add_argument("--overwrite", action="store_true", help="replace plans of that name")
    add_json(plans, "what was written and sized")
    plans.set_defaults(command=answers_json(make_plans))

    bundle = commands.add_parser(
        "bundle",
        help="make a MONAI bundle: to train in, or of a trained model",
        description="Copy the MONAI bundle into a new folder, to select, train and segment in with python -m monai.bundle run. With -model, "
        "make a bundle of a model that nnU-Net trained, which predicts what nnUNetv2_predict predicts.",
    )
    bundle.add_argument("name", metavar="NAME", help="folder to write")
    bundle.add_argument(
        "-model", metavar="FOLDER", help="a trained model: nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION"
    )
    bundle.add_argument("-f", nargs="+", metavar="FOLD", help="with -model: which folds (default: all that are there)")
    bundle.add_argument("-chk", metavar="FILE", help="with -model: which checkpoint (default: checkpoint_final.pth)")
    bundle.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the shipped files of a bundle, while what was trained in it stays; with -model, replace the whole bundle of a model",
    )
    add_json(bundle, "the folder and what is next")
    bundle.set_defaults(command=answers_json(copy_bundle))

    demo = commands.add_parser(
        "demo",
        help="run the whole job on a small example",
        description="Select, plan, train, predict and draw, on blocks of the MNI ICBM152 brain template and a miniature "
        "ImageNet run. It shows how things fit together and says nothing about how well they work.",
    )
    demo.add_argument("-o", default="mtl_demo", metavar="FOLDER", help="where to write (default: mtl_demo)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    add_json(demo, "Dice, seconds and files")
    demo.set_defaults(command=answers_json(run_demo))

    doctor.add_parser(commands)
    training.add_parser(commands)
    list_checkpoints.add_parser(commands)
    evaluate_scores.add_parser(commands)
    fit_chooser.add_parser(commands)
    for command in commands.choices.values():
        # not set here, so that what stands before the command's name holds
        command.add_argument(
            "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(build_parser(), argv, lambda args: args.command(args))


def print_trainers(args: argparse.Namespace) -> dict[str, Any]:
    """Print our folder of trainers in front of those that ``nnUNet_extTrainer`` names already."""
    ours = str(trainers_folder())
    others = [p for p in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if p.strip() and p != ours]
    value = os.pathsep.join([ours, *others])
    print(value)
    return {"nnUNet_extTrainer": value, "folder": ours}


def trainers_folder() -> Path:
    """The folder that ``nnUNet_extTrainer`` must name: in the package, or beside it in a source checkout.

    Raises:
        UserError: The installation lacks it.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "trainers", package / "trainers"):
        if (folder / "mtl_nnunet_trainers.py").is_file():
            return folder
    raise UserError(f"the folder of trainers is missing from {package}. Install mtl-nnunet again.")


def make_plans(args: argparse.Namespace) -> dict[str, Any]:
    """Write plans of another name that start from a selection."""
    from mtl_nnunet.plans import dataset_name_of, resolved_configuration, write_plans
    from mtl_nnunet.recipe import read_recipe

    name = dataset_name_of(args.d)
    memory: list[dict[str, Any]] = []
    sizes = None if args.gpu_memory_target is None else partial(sized_batches, args.p, args.gpu_memory_target, memory)
    recipe = None if args.recipe is None else read_recipe(args.recipe, "-recipe")
    file, configurations = write_plans(name, args.p, args.o, args.selection, args.overwrite, recipe, sizes, args.c)
    print(f"written: {file} ({', '.join(configurations)})")
    train = f"nnUNetv2_train {int(name[7:10])} {configurations[0]} 0 -tr MTLTrainer -p {args.o}"
    print(f"next:\n  {train}")
    plans = json.loads(file.read_text(encoding="utf-8"))
    resolved = {c: resolved_configuration(plans, c) for c in configurations}
    return {
        "file": str(file),
        "configurations": {
            c: {"patch_size": list(r.patch_size), "batch_size": r.batch_size} for c, r in resolved.items()
        },
        "memory": memory,
        "next": [train],
    }


def sized_batches(
    source_name: str,
    target_gb: float,
    told: list[dict[str, Any]],
    source: dict[str, Any],
    plans: dict[str, Any],
    configurations: list[str],
) -> dict[str, int]:
    """Batch sizes for a memory target; what decided them is printed, and appended to ``told`` for machines."""
    from mtl_nnunet.memory import report, size_batches

    sized = size_batches(source, plans, configurations, target_gb)
    print(report(sized, source_name, target_gb))
    told += [
        {
            "configuration": ours.configuration,
            "batch_size": ours.size,
            "fits": ours.fits,
            "covers": ours.covers,
            "planned": ours.planned,
            "bytes": ours.memory.total,
        }
        for ours, _ in sized
    ]
    return {ours.configuration: ours.size for ours, _ in sized}


def copy_bundle(args: argparse.Namespace) -> dict[str, Any]:
    """Copy the MONAI bundle out, or make one of a trained model."""
    if args.model is not None:
        from mtl_nnunet.bridge import bundle_of_model

        chosen = {} if args.chk is None else {"checkpoint_name": args.chk}
        folder = bundle_of_model(args.model, args.name, args.f, overwrite=args.overwrite, **chosen)
        configs: tuple[str, ...] = ("inference.yaml --dataset_dir IMAGES --output_dir SEGMENTATIONS",)
    elif args.f is not None or args.chk is not None:
        raise UserError("-f and -chk choose among the weights of a trained model: pass -model FOLDER too.")
    else:
        from mtl_nnunet.bundles import write_bundle

        folder = write_bundle(args.name, args.overwrite)
        configs = ("select.yaml --dataset_dir DATASET --checkpoints RUN", "train.yaml --dataset_dir DATASET")
    print(f"written: {shlex.quote(str(folder))}")
    commands = [f"cd {shlex.quote(str(folder))}"]
    commands += [f"python -m monai.bundle run --config_file configs/{config}" for config in configs]
    print("next (pip install 'mtl-nnunet[monai]'):", *commands, sep="\n  ")
    return {"folder": str(folder), "next": commands}


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """Run the demonstration."""
    from mtl_nnunet.demo import run_demo as run

    return run(Path(args.o), args.overwrite)

"""``mtl-nnunet evaluate-scores``: how well scores choose, on tables of real trainings."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from mtl_nnunet.cli.command import add_json, answers_json
from mtl_nnunet.errors import UserError, listed

DROPPABLE = ("dataset", "encoder", "scheme", "run", "state")
# the default of the published method
PUBLISHED_DEFAULT = "robustness:level=4,pooled=yes,distance=cosine,margin=0.5"
PACKAGES = ("numpy", "scipy", "pandas", "matplotlib")
TABLE, SUMMARY, RECORD, FIGURE = FILES = ("evaluation.csv", "summary.csv", "evaluation.json", "evaluation.png")


def add_parser(commands: Any) -> None:
    """Add the command's options; nothing heavy is imported to build them."""
    parser = commands.add_parser(
        "evaluate-scores",
        help="judge scores on tables of real trainings",
        description="Judge how well scores choose among the checkpoints of pretraining runs, on a table of downstream results: "
        "regret against the best epoch, rank agreement, and gains over the last epoch, a fixed epoch and others.",
        epilog="Downstream table: dataset, encoder, scheme, run, state (free or frozen), epoch (a number, scratch or average-K), "
        "seed, dice and, if wanted, accuracy. Score table: dataset, encoder, scheme, run, epoch (a number or random), score, value and, "
        "if wanted, higher_is_better (1 or 0). See docs/evaluating.md.",
    )
    parser.add_argument("-downstream", required=True, metavar="CSV", help="table of downstream results")
    parser.add_argument("-scores", metavar="CSV", help="table of scores (without: baselines only)")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="where to write tables and figure")
    add_drop_option(parser)
    parser.add_argument("-score", nargs="+", default=[], metavar="NAME", help="scores to show, however they do")
    parser.add_argument("-draws", type=int, default=2000, metavar="N", help="bootstrap draws (default: 2000)")
    parser.add_argument("-seed", type=int, default=0, metavar="N", help="seed of the bootstrap (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation")
    add_json(parser, "evaluation.json")
    parser.set_defaults(command=answers_json(evaluate_scores))


def add_drop_option(parser: argparse.ArgumentParser) -> None:
    """Add ``-drop``, which ``dropped`` reads."""
    parser.add_argument(
        "-drop",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="leave out curves, e.g. encoder=resnet50,scheme=advanced; may be repeated",
    )


def evaluate_scores(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, print the tables, write the files."""
    from mtl_nnunet.curves import read_curves
    from mtl_nnunet.evaluation import evaluate
    from mtl_nnunet.evaluation_report import evaluation_text, write_figure
    from mtl_nnunet.files import folder_written_atomically, to_json, write_text

    if args.draws < 1 or args.seed < 0:
        raise UserError(f"-draws {args.draws} -seed {args.seed}: expected at least one draw and a seed of at least 0.")
    inside = [p for p in (args.downstream, args.scores) if p and Path(args.o).resolve() in Path(p).resolve().parents]
    if inside and args.overwrite:
        raise UserError(f"-o {args.o} holds {inside[0]}, which would be replaced with it. Pass -o another folder.")
    _refuse_foreign_folder(Path(args.o), args.overwrite)
    curves = dropped(read_curves(args.downstream, args.scores), args.drop)
    known = sorted({name for curve in curves for name in curve.scores})
    unknown = [name for name in args.score if name not in known]
    if unknown:
        raise UserError(f"no score '{unknown[0]}' in {args.scores or 'the tables'}. There: {listed(known) or 'none'}.")
    always = list(dict.fromkeys([*args.score, *([PUBLISHED_DEFAULT] if PUBLISHED_DEFAULT in known else [])]))
    evaluation = evaluate(curves, args.draws, args.seed)
    record = _record(args, evaluation, [c.label for c in curves])
    with folder_written_atomically(args.o, args.overwrite) as folder:
        for name, table in ((TABLE, evaluation.curves), (SUMMARY, evaluation.summary)):
            write_text(folder / name, table.to_csv(index=False, lineterminator="\n"))
        write_text(folder / RECORD, to_json(record))
        write_figure(evaluation, curves, folder / FIGURE, always)
    print(evaluation_text(evaluation, always))
    print(f"written: {args.o} ({', '.join(FILES)})")
    return record


def _refuse_foreign_folder(folder: Path, overwrite: bool) -> None:
    """The folder is replaced as a whole, and with it whatever lies in it."""
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} exists already. Pass --overwrite to replace it, or -o another folder.")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder, so it is not overwritten. Pass -o another folder.")
    # macOS keeps what other file systems cannot hold in files called ._NAME
    inside = (f.name for f in folder.iterdir() if f.name != ".DS_Store" and not f.name.startswith("._"))
    if others := sorted(name for name in inside if name not in FILES):
        raise UserError(
            f"{folder} holds other files than an evaluation's ({listed(others)}), so it is not overwritten. Pass -o another folder, or "
            "move them away."
        )


def dropped(curves: list[Any], drops: list[str]) -> list[Any]:
    """The curves that no ``-drop`` names.

    Raises:
        UserError: A drop that is not KEY=VALUE, that names no curve, or that leaves none.
    """
    for text in drops:
        wanted = {}
        for item in text.split(","):
            key, equals, value = (part.strip() for part in item.partition("="))
            if key not in DROPPABLE or not equals:
                raise UserError(f"-drop {text}: expected KEY=VALUE,... with KEY one of {', '.join(DROPPABLE)}.")
            wanted[key] = value
        kept = [c for c in curves if any(getattr(c, key) != value for key, value in wanted.items())]
        if len(kept) == len(curves):
            there = {key: listed(sorted({getattr(c, key) for c in curves})) for key in wanted}
            raise UserError(
                f"-drop {text} names no curve. There is: " + "; ".join(f"{k} {v}" for k, v in there.items()) + "."
            )
        curves = kept
    if not curves:
        raise UserError("-drop leaves no curve. Drop less.")
    return curves


def _record(args: argparse.Namespace, evaluation: Any, labels: list[str]) -> dict[str, Any]:
    import importlib.metadata
    import json

    from mtl_nnunet import __version__
    from mtl_nnunet.files import sha256

    inputs = {"downstream": args.downstream, **({"scores": args.scores} if args.scores else {})}
    return {
        "command": shlex.join(["mtl-nnunet", *sys.argv[1:]]),
        "version": __version__,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "inputs": {name: {"path": str(path), "sha256": sha256(path)} for name, path in inputs.items()},
        "drop": args.drop,
        "draws": args.draws,
        "seed": args.seed,
        "curves": labels,
        # pandas writes what does not exist as null
        "noise": json.loads(evaluation.noise.to_json(orient="records", double_precision=15)),
        "summary": json.loads(evaluation.summary.to_json(orient="records", double_precision=15)),
    }

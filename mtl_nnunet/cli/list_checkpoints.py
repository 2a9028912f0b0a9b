"""``mtl-nnunet checkpoints``: what a pretraining run holds, without reading all of it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command's options; nothing heavy is imported to build them."""
    parser = commands.add_parser(
        "checkpoints",
        help="list what a pretraining run holds",
        description="List the checkpoints of a pretraining run, or the published weights of a network (timm:resnet50), with what is known of them. "
        "Of many files only a few are opened, and nothing is fetched.",
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="folder of a run, or its files, or timm:NAME")
    parser.add_argument(
        "-weights", choices=("default", "ema", "trained"), default="default", help="which weights in each file"
    )
    parser.add_argument("--json", action="store_true", help="print checkpoints and notes as JSON instead of the table")
    parser.set_defaults(command=list_run)


def list_run(args: argparse.Namespace) -> None:
    """List, and say on stderr what the run no longer has."""
    from mtl_nnunet.checkpoints import inferred_architecture, list_checkpoints, runs_of, span_of_run
    from mtl_nnunet.checkpoints.names import in_groups

    listing = list_checkpoints(args.run, args.weights)
    contents = listing.contents
    if args.json:
        checkpoints = [{**asdict(c), "path": str(c.path)} for c in listing.checkpoints]
        print(json.dumps({"checkpoints": checkpoints, "notes": listing.notes}, indent=2))
        return
    own = [c for c in listing.checkpoints if c.published is None]
    if own:
        print(own_text(own))
    if contents is not None:
        architecture = next((c.architecture for c in own if c.architecture), None)
        fitting = () if architecture else inferred_architecture(contents.weights)
        said = architecture or (
            f"{fitting[0]}, told by the shapes of the tensors"
            + (f" ({', '.join(fitting[1:4])} would fit too)" if fitting[1:] else "")
            if fitting
            else "not known: pass -encoder NAME when selecting"
        )
        number = sum(t.numel() for t in contents.weights.values())
        print(
            f"architecture: {said}; {number:,} parameters, classifier and statistics included; format: {contents.kind}"
        )
        span = span_of_run(own) if len(runs_of(own)) == 1 else None
        if span is not None and all(c.planned_epochs for c in own):
            latest = max(c.epoch for c in own if c.epoch is not None)
            cut = f"; the latest at hand is {latest}: not over, or cut short" if latest < span[1] else ""
            print(f"planned: epochs {span[0]} to {span[1]}{cut}")
        if contents.left_out:
            print(f"left out of each file: {in_groups(list(contents.left_out))}")
    published = [c for c in listing.checkpoints if c.published is not None]
    if published:
        print(published_text(published))
    for note in listing.notes:
        print(f"note: {note}", file=sys.stderr)


def own_text(checkpoints: list[Any]) -> str:
    """A run's checkpoints as a table."""
    from mtl_nnunet.checkpoints.filenames import telling_name

    lines = [f"{'epoch':>8}{'step':>10}{'size':>10}{'logged top-1':>14}  file"]
    for c in checkpoints:
        epoch, step = ("-" if v is None else str(v) for v in (c.epoch, c.step))
        accuracy = "-" if c.logged_accuracy is None else f"{c.logged_accuracy:.2f} %"
        size = f"{c.path.stat().st_size / 2**20:.1f} MB" if c.path.exists() else "gone"
        lines.append(f"{epoch:>8}{step:>10}{size:>10}{accuracy:>14}  {telling_name(c.path)}")
    return "\n".join(lines)


def published_text(checkpoints: list[Any]) -> str:
    """Published weights as a table."""
    cautions = sorted({c.published.caution for c in checkpoints if c.published.caution})
    marks = dict(zip(cautions, "*+"[: len(cautions)], strict=True))
    width = max(len(c.published.name) for c in checkpoints) + 2
    licences = [
        (c.published.licence or "not stated") + (marks[c.published.caution] if c.published.caution else "")
        for c in checkpoints
    ]
    wide = max(12, *map(len, licences)) + 2
    lines = [f"{'weights':<{width}}{'epochs':>7}  {'licence':<{wide}}{'cached':<8}recipe"]
    for c, licence in zip(checkpoints, licences, strict=True):
        about = c.published
        cached = "yes" if c.path.is_file() else "no"
        lines.append(
            f"{about.name:<{width}}{about.epochs or '-':>7}  {licence:<{wide}}{cached:<8}{about.recipe or 'see its model card'}"
        )
    lines += [f"{mark} {caution}" for caution, mark in marks.items()]
    return "\n".join(lines)

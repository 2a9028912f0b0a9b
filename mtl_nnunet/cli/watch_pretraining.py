"""``mtl-watch-pretraining``: score the checkpoints of a pretraining while it runs, and say when to stop it."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtl_nnunet.cli.command import add_json, answers_json, run
from mtl_nnunet.cli.options import (
    above_zero,
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
    zero_or_more,
)


def build_parser() -> argparse.ArgumentParser:
    """The command's options; nothing heavy is imported to build them."""
    parser = argparse.ArgumentParser(
        prog="mtl-watch-pretraining",
        description="Score the checkpoints of a pretraining as it writes them, each once and all on the same slices, and say when going on is no "
        "longer worth it. Started again, it goes on where it was.",
        epilog="When the rule says stop, a file STOP is written in the output folder, which a training loop can look for; -signal and -on_stop "
        "do more.",
    )
    add_dataset(parser)
    parser.add_argument(
        "-run", required=True, metavar="FOLDER", help="where the run writes its checkpoints; it may begin later"
    )
    parser.add_argument("-o", required=True, metavar="FOLDER", help="where to write history, curve, STOP and copies")
    add_encoder(parser)
    add_score(parser)
    parser.add_argument(
        "-rule",
        choices=("auto", "expected-gain", "patience"),
        default="auto",
        help="expected-gain: stop when no later epoch is expected to bring more Dice than its epochs are worth; patience: stop when the score "
        "has not improved beyond its noise; auto (default): expected-gain where epochs and length of the run are known",
    )
    parser.add_argument(
        "-price",
        type=zero_or_more,
        default=0.0,
        metavar="X",
        help="what a whole pretraining is worth to you in Dice points (default: 0, go on as long as anything is expected)",
    )
    parser.add_argument(
        "-state",
        choices=("free", "frozen"),
        default="free",
        help="whether the encoder will be trained on the target (default: free)",
    )
    parser.add_argument(
        "-patience", type=one_or_more, default=3, metavar="N", help="checkpoints without improvement (default: 3)"
    )
    parser.add_argument(
        "-epochs", type=one_or_more, metavar="N", help="planned length of the run (default: what its files say)"
    )
    parser.add_argument(
        "-every", type=above_zero, default=60.0, metavar="SECONDS", help="time between looks (default: 60)"
    )
    parser.add_argument(
        "-idle", type=above_zero, metavar="MINUTES", help="end when nothing was written for so long (default: wait on)"
    )
    parser.add_argument("-on_stop", metavar="COMMAND", help='command to run on stop, e.g. "scancel 123"; no shell')
    parser.add_argument("-signal", type=one_or_more, metavar="PID", help="process to send SIGTERM on stop")
    parser.add_argument("--once", action="store_true", help="score what is finished, and end")
    parser.add_argument("--keep-all", action="store_true", help="keep a copy of every checkpoint")
    add_chooser(parser)
    add_views_and_cases(parser)
    parser.add_argument(
        "-device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: cpu, which leaves the run its GPU"
    )
    parser.add_argument(
        "-threads",
        type=one_or_more,
        default=1,
        metavar="N",
        help="CPU threads (default: 1, which leaves the run the rest)",
    )
    add_precision(parser)
    add_cache(parser)
    add_skip_bad_cases(parser)
    add_json(parser, "how the watch ended")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(build_parser(), argv, answers_json(watch_pretraining))


def watch_pretraining(args: argparse.Namespace) -> dict[str, Any]:
    """Gather slices once, watch, and print what is done next."""
    command = command_of(args.on_stop)

    import torch

    from mtl_nnunet.errors import UserError
    from mtl_nnunet.monitoring import CURVE_FILE, HISTORY_FILE, Monitor, with_scores_of_the_chooser
    from mtl_nnunet.report import warnings_of_cases
    from mtl_nnunet.select import cases_to_score
    from mtl_nnunet.slices import gather_slices
    from mtl_nnunet.stopping import StopRule
    from mtl_nnunet.watching import process_with, watch

    rule = StopRule(args.rule, args.price, args.state, args.patience, args.chooser and Path(args.chooser))
    if args.rule == "patience" and (args.price or args.chooser or args.state != "free"):
        raise UserError(
            "-price, -state and -chooser go with -rule expected-gain or auto: patience goes by the score alone."
        )
    scores = with_scores_of_the_chooser(scores_named(args), rule)
    process = None if args.signal is None else process_with(args.signal)
    device = available_device(args.device)
    torch.set_num_threads(args.threads)
    cache = cache_named(args)
    if cache is not None:
        cache.check()
    dataset, fold = cases_to_score(dataset_named(args), scores, args.f, args.skip_bad_cases)
    labelled = any(score.labels for score in scores)
    slices = gather_slices(
        dataset,
        args.num_slices,
        args.num_cases,
        args.seed,
        num_workers=args.threads,
        with_labels=labelled,
        skip_bad_cases=args.skip_bad_cases,
    )
    for warning in warnings_of_cases(dataset, slices, fold):
        print(f"warning: {warning}", file=sys.stderr)
    about = {
        "run": os.path.abspath(args.run),
        "-weights": args.weights,
        "-num_slices": args.num_slices,
        "-num_cases": args.num_cases,
        "-seed": args.seed,
        "-f": fold,
    }
    monitor = Monitor(
        args.o,
        slices,
        scores,
        encoder=args.encoder,
        rule=rule,
        planned_epochs=args.epochs,
        dataset=dataset.name,
        seed=args.seed,
        device=device,
        precision=args.precision,
        cache=cache,
        about=about,
    )
    try:
        ending = watch(
            args.run,
            monitor,
            weights=args.weights,
            every=args.every,
            once=args.once,
            idle=args.idle,
            on_stop=command,
            process=process,
            keep_all=args.keep_all,
            say=say,
        )
    except KeyboardInterrupt:
        # what was scored is on disk, unlike in a command that writes at its end
        print(
            f"mtl-watch-pretraining: interrupted; what was scored is in {args.o}, and the same command goes on from there.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    told = {
        "ended": ending.why,
        "folder": args.o,
        "best": None if ending.best is None else asdict(ending.best),
        "file": None if ending.file is None else str(ending.file),
        "next": [],
    }
    if ending.best is None:
        say("no checkpoint was scored.")
        return told
    say(f"written: {args.o} ({HISTORY_FILE}, {CURVE_FILE})")
    if ending.file is None:
        say(
            f"to start from: {ending.best.name}, which the run has deleted since; --keep-all keeps a copy of every checkpoint."
        )
        return told
    words = [*dataset_words(args), "-ckpt", str(ending.file), *weights_words(args), "-score", *score_words(args)]
    if args.encoder is None and monitor.encoder is not None:
        words += ["-encoder", monitor.encoder]
    words += [*label_and_view_words(args), *sampling_words(args), "-device", device]
    if args.i:
        words += ["-o", "SELECTION_FOLDER"]
    select = f"mtl-select-checkpoint {shlex.join(map(str, words))}"
    say(f"to start from: {ending.best.name}\nnext:\n  {select}")
    return {**told, "next": [select]}


def say(text: str) -> None:
    """Print at once, since a log is read while the watch goes on."""
    print(text, flush=True)


def command_of(text: str | None) -> list[str] | None:
    """Program and arguments of ``-on_stop``, found before hours are spent.

    Raises:
        UserError: Quotes that are not closed, or no such program.
    """
    from mtl_nnunet.errors import UserError

    if text is None:
        return None
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"-on_stop {text}: {error}. Expected a command as typed in a shell.") from error
    if not words or shutil.which(words[0]) is None:
        raise UserError(
            f"-on_stop {text}: there is no program '{words[0] if words else ''}'. Expected a command and its arguments; for pipes and "
            "the like: \"sh -c '...'\"."
        )
    return words

"""What all commands share: one line for an error, a traceback only when asked."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

from mtl_nnunet.errors import AssumedWarning, LeftOutWarning, UserError
from mtl_nnunet.files import to_json


def run(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], None]
) -> int:
    """Parse, run, and turn an error into one line on stderr.

    Returns:
        0, or 1 after a user's error; wrong usage exits with 2 inside ``parse_args``.
    """
    _refuse_lost_dash(parser, sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    verbose = getattr(args, "verbose", False)
    try:
        with _tidy_when_terminated(), warnings.catch_warnings(), _without_warnings_of_others(verbose):
            warnings.showwarning = partial(_show_warning, parser.prog, warnings.showwarning)
            command(args)
    except UserError as error:
        if verbose:
            traceback.print_exc()
        one_line = re.sub(r"\s*\n\s*", " ", str(error).strip())
        print(f"{parser.prog}: {one_line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # only commands with a cache have the option
        kept = (
            "; what was scored is in the cache, and not scored again"
            if not getattr(args, "no_cache", True) and not getattr(args, "race", False)
            else ""
        )
        print(f"{parser.prog}: interrupted before it was finished{kept}.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0


def answers_json(command: Callable[[argparse.Namespace], dict[str, Any]]) -> Callable[[argparse.Namespace], None]:
    """With ``--json``, what a command returns goes to stdout, and what it prints on its way to stderr."""

    def answer(args: argparse.Namespace) -> None:
        if not args.json:
            command(args)
            return
        stdout = sys.stdout
        with redirect_stdout(sys.stderr), _descriptor_of_stderr():
            content = command(args)
            # what was written to it by those who kept it
            stdout.flush()
        print(to_json(content), end="")

    return answer


@contextmanager
def _descriptor_of_stderr() -> Iterator[None]:
    """What other programs and libraries print by the descriptor of stdout goes to stderr too."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--json``, which ``answers_json`` reads."""
    parser.add_argument(
        "--json", action="store_true", help=f"print {what} as JSON on stdout, everything else on stderr"
    )


def _refuse_lost_dash(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """``-overwrite`` is no mistake to argparse: it is ``-o verwrite``, and everything goes into a folder of that name."""
    known = set(_options(parser))
    for word in argv:
        if word == "--":
            return
        name = word.partition("=")[0]
        if not re.match(r"-[a-z]{3}", name) or any(option.startswith(name) for option in known):
            continue
        # argparse takes the beginning of a long option too
        meant = sorted(option for option in known if option.startswith(f"-{name}"))
        if meant:
            parser.error(f"unknown option {name}. Did you mean {meant[0]}?")


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _options(sub)


@contextmanager
def _without_warnings_of_others(verbose: bool) -> Iterator[None]:
    """What other packages will change one day is no concern of the user's; inside ``warnings.catch_warnings``."""
    if verbose:
        yield
        return
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    asked = "PYTHONWARNINGS" in os.environ
    if not asked:
        # for the workers, which start with no filter of their own
        os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::DeprecationWarning"
    try:
        yield
    finally:
        if not asked:
            os.environ.pop("PYTHONWARNINGS", None)


def _show_warning(
    prog: str, show: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any
) -> None:
    if issubclass(category, (LeftOutWarning, AssumedWarning)):
        print(f"{prog}: {message}", file=sys.stderr)
    else:
        show(message, category, *where)


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """Leave through the open blocks, which remove what is half-written, when a scheduler asks the process to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def leave(*_: object) -> None:
        if os.getpid() == owner:
            sys.exit(128 + signal.SIGTERM)
        # a forked worker of a pool ends as it always did
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

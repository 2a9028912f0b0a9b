"""What all commands share: one line for an error, a traceback only when asked."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from mtl_nnunet.errors import UserError


def run(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], None]
) -> int:
    """Parse, run, and turn an error into one line on stderr.

    Returns:
        0, or 1 after a user's error; wrong usage exits with 2 inside ``parse_args``.
    """
    args = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            if not getattr(args, "verbose", False):
                # what other packages will change one day is no concern of the user's
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            command(args)
    except UserError as error:
        if getattr(args, "verbose", False):
            traceback.print_exc()
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0

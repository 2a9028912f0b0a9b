"""Importing this makes a traceback that a user's error caused end in that error's message.

MONAI wraps what fails while it resolves a config into errors of its own, so that the last line names a component and not
what is wrong. The bundle's configs import this first.
"""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType

from mtl_nnunet.errors import UserError

_before = sys.excepthook


def user_error_behind(error: BaseException | None) -> UserError | None:
    """The user's error that led to another one, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UserError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _before(kind, error, traceback)
    behind = user_error_behind(error)
    if behind is None:
        return
    print(f"\nmtl-nnunet: {' '.join(str(behind).split())}", file=sys.stderr)
    if not (hasattr(sys, "ps1") or sys.flags.interactive):
        # threads that are still inside a reader would take the process down, with a last line of their own
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


sys.excepthook = _hook

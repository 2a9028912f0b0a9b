"""Importing this makes a traceback that a user's error caused end in that error's message.

MONAI wraps what fails while it resolves a config into errors of its own, so that the last line names a component and not
what is wrong. The configs of our bundles import this first.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from types import TracebackType

from mtl_nnunet.errors import UserError

NAME = f"{UserError.__module__}.{UserError.__qualname__}"

_before = sys.excepthook


def message_behind(error: BaseException | None) -> str | None:
    """The message of the ``UserError`` that led to an error, in this process or in a worker; None where there was none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        # a worker of a DataLoader hands its errors over as text
        if found := re.findall(rf"^{re.escape(NAME)}: (.*)$", str(error), re.MULTILINE):
            return str(found[-1])
        if isinstance(error, UserError):
            return str(error)
        seen.add(id(error))
        # as Python itself tells it: after "from None" what came before is no cause
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _before(kind, error, traceback)
    message = message_behind(error)
    if message is None:
        return
    print(f"\nmtl-nnunet: {' '.join(message.split())}", file=sys.stderr)
    if getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None) == "monai.bundle.__main__":
        # threads that are still inside a reader would take the process down, with a last line of their own
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


sys.excepthook = _hook

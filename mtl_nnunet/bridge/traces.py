"""MONAI wraps whatever a component raises; this puts our message back at the end of the trace."""

from __future__ import annotations

import re
import sys
from types import TracebackType

from mtl_nnunet.errors import UserError

NAME = f"{UserError.__module__}.{UserError.__qualname__}"


def end_traces_in_our_message() -> None:
    """Let a process that ends by a ``UserError`` inside other exceptions print that message last.

    MONAI's configs raise ``RuntimeError: Failed to evaluate ...`` from every error in a component, so that what a user can
    act on stands in the middle of the trace. The trace itself stays as it is.
    """
    if getattr(sys.excepthook, "says_ours_last", False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        message = message_behind(error)
        # an error of ours that nothing wraps stands there already
        if message is not None and message != str(error):
            print(f"\n{NAME}: {message}", file=sys.stderr)

    hook.says_ours_last = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def message_behind(error: BaseException) -> str | None:
    """The message of the ``UserError`` that an exception was raised from, in this process or in a worker."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        # a worker of a DataLoader hands its errors over as text
        if found := re.findall(rf"^{re.escape(NAME)}: (.*)$", str(current), re.MULTILINE):
            return str(found[-1])
        if isinstance(current, UserError):
            return str(current)
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None

"""MONAI wraps whatever a component raises; this puts our message back at the end of the trace."""

from __future__ import annotations

import sys
from types import TracebackType

from mtl_nnunet.errors import UserError


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
        inner = _user_error_behind(error)
        if inner is not None and inner is not error:
            print(f"\n{type(inner).__module__}.{type(inner).__qualname__}: {inner}", file=sys.stderr)

    hook.says_ours_last = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _user_error_behind(error: BaseException) -> UserError | None:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, UserError):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None

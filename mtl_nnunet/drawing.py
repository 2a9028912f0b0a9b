"""Matplotlib as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast


@contextmanager
def matplotlib_defaults(**options: Any) -> Iterator[None]:
    """Within it figures look the same whatever the process set before: nnU-Net's logger makes all letters 2.5 times as large."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # names are no formulas
        matplotlib.rcParams["text.parse_math"] = False
        matplotlib.rcParams.update(cast("Any", options))
        yield

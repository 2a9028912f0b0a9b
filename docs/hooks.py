"""mkdocs: ``[help: COMMAND]`` in a page becomes what the command prints with ``--help``, so that the reference cannot go stale."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

MODULES = {
    "mtl-select-checkpoint": "mtl_nnunet.cli.select_checkpoint",
    "mtl-watch-pretraining": "mtl_nnunet.cli.watch_pretraining",
    "mtl-nnunet": "mtl_nnunet.cli.main",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks of a page."""
    return re.sub(r"^\[help: (.+?)\]$", lambda found: help_of(found[1].split()), markdown, flags=re.MULTILINE)


def help_of(command: list[str]) -> str:
    """What a command prints, as a block of text."""
    code = f"import sys; from {MODULES[command[0]]} import main; main({[*command[1:], '--help']!r})"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"}
    )
    return f"```text\n{printed.stdout.rstrip()}\n```"

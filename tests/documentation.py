"""Commands and code as the pages of the documentation print them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOW_TOS = tuple(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs" / "how-to").glob("*.md")))
# what a machine with two cores and no GPU needs besides
MORE = {
    "mtl-select-checkpoint": ("-device", "cpu"),
    "nnUNetv2_plan_and_preprocess": ("-np", "1", "-npfp", "1"),
    "nnUNetv2_train": ("-device", "cpu"),
    "nnUNetv2_predict": ("-device", "cpu", "-npp", "1", "-nps", "1"),
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "bash") -> list[str]:
    """The fenced blocks of a page that are in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), flags=re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The commands of a block as words, without comments and exports."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and line[0] not in ("export", ".")]


def inline(page: str, beginning: str) -> list[str]:
    """What stands between backquotes in a page and begins so."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return [span for span in re.findall(r"`([^`\n]+)`", prose) if re.match(beginning, span)]


def with_own(words: Iterable[str], means: dict[str, str]) -> list[str]:
    """The words of a command with a page's stand-ins replaced, also at the beginning or inside of a path."""
    replaced = []
    for word in words:
        for name, meant in means.items():
            word = meant if word == name else word.replace(f"{name}/", f"{meant}/") if name.startswith("$") else word
        replaced.append(word)
    return replaced

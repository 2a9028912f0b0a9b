"""The quickstart of the README and of the documentation's first page, taken from their text and run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import DEMO_RUN, Workplace, phantom, write_image, write_phantoms

ROOT = Path(__file__).resolve().parents[1]
SHORT = "MTLTrainer_1epoch"


def commands(page: str) -> list[list[str]]:
    """The lines of a page's first block that selects, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    block = next(b for b in blocks if "mtl-select-checkpoint -d" in b)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [line for line in lines if line and line[0] != "export"]


def test_both_pages_say_the_same() -> None:
    assert [c[0] for c in commands("README.md")] == [
        "mtl-select-checkpoint", "nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict",
    ]  # fmt: skip
    assert commands("docs/index.md") == commands("README.md")


@pytest.mark.slow
def test_the_quickstart_runs_as_it_is_written(tmp_path: Path) -> None:
    place = Workplace(tmp_path, "Dataset004_Phantom", SHORT, iterations="2,1")
    raw = tmp_path / "raw" / "Dataset004_Phantom"
    write_phantoms(raw, num_cases=6, shape=(6, 48, 40))
    image, _ = phantom((6, 48, 40), seed=1)
    write_image(tmp_path / "in" / "new_0000.nii.gz", image[0], (2.0, 1.0, 1.0))
    means = {
        "runs/my_pretraining/": str(DEMO_RUN),
        "MTLTrainer": SHORT,
        "IN": str(tmp_path / "in"),
        "OUT": str(tmp_path / "out"),
    }
    # what a machine with two cores and no GPU needs besides
    more = {
        "mtl-select-checkpoint": ("-device", "cpu"),
        "nnUNetv2_plan_and_preprocess": ("-np", "1", "-npfp", "1"),
        "nnUNetv2_train": ("-device", "cpu"),
        "nnUNetv2_predict": ("-device", "cpu", "-npp", "1", "-nps", "1"),
    }
    for command in commands("README.md"):
        place.run(*(means.get(word, word) for word in command), *more[command[0]])
    assert [f.name for f in (tmp_path / "out").glob("*.nii.gz")] == ["new.nii.gz"]

"""The quickstart of the README and of the documentation's first page, taken from their text and run."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DEMO_RUN, Workplace, phantom, write_image, write_phantoms
from documentation import MORE, blocks, commands, with_own

SHORT = "MTLTrainer_1epoch"


def quickstart(page: str) -> list[list[str]]:
    """The commands of a page's first block that selects."""
    return commands(next(b for b in blocks(page) if "mtl-select-checkpoint -d" in b))


def test_both_pages_say_the_same() -> None:
    assert [c[0] for c in quickstart("README.md")] == [
        "mtl-select-checkpoint", "nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict",
    ]  # fmt: skip
    assert quickstart("docs/index.md") == quickstart("README.md")


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
    for command in quickstart("README.md"):
        place.run(*with_own(command, means), *MORE[command[0]])
    assert [f.name for f in (tmp_path / "out").glob("*.nii.gz")] == ["new.nii.gz"]

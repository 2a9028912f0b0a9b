"""``mtl-nnunet doctor`` on installations that are whole, and on ones that are broken in ways that people meet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import DEMO_RUN
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from mtl_nnunet.cli.main import main, trainers_folder
from mtl_nnunet.doctor import OK, PROBLEM, Finding, of_datasets, of_folders, of_packages, of_trainers, of_variables
from mtl_nnunet.select import select_checkpoint
from mtl_nnunet.selection import ENCODER_FILE


@pytest.fixture
def whole(
    nnunet_folders: Path, make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> Path:
    """Everything set up, and a selection made."""
    make_dataset(1, num_cases=4)
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    folder = Path(os.environ["nnUNet_preprocessed"], "Dataset001_Phantom", "mtl_selection")
    select_checkpoint(1, [DEMO_RUN / "checkpoint-39.pth.tar"], num_slices=12, output=folder)
    return folder


def problems(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.state == PROBLEM]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_whole_installation_has_no_problem(
    whole: Path, nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(nnunet_folders)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert files(nnunet_folders) == before, "nothing is left behind"
    assert "nnU-Net finds MTLTrainer" in said
    assert "Dataset001_Phantom: 4 cases" in said
    assert "mtl_selection: test_resnet from checkpoint checkpoint-39.pth.tar" in said
    assert metadata.version("torch") in said


def test_without_variables_everything_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    found = [Finding(**finding) for finding in json.loads(captured.out)]
    assert [f.said.split()[0] for f in problems(found)] == [
        "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer",
    ]  # fmt: skip
    assert all(f.remedy for f in problems(found))
    assert captured.err.splitlines()[-1].startswith("mtl-nnunet: 4 problems, the first: nnUNet_raw is not set.")


def test_values_with_which_nnunet_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "gone"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    said = [f.said for f in problems(of_variables())]
    assert any("gone, which is no folder" in text for text in said)
    assert any("nnUNet_n_proc_DA is 0" in text for text in said)


def test_a_module_that_aborts_nnunets_look_up_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a_trainer.py").write_text("import no_such_package_of_theirs\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(trainers_folder())]))
    (found,) = problems(of_trainers())
    assert "no_such_package_of_theirs" in found.said


@pytest.mark.parametrize("of_same_name", [True, False])
def test_trainers_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of_same_name: bool) -> None:
    name = "MTLTrainer" if of_same_name else "TheirTrainer"
    (tmp_path / f"their_{name.lower()}.py").write_text(
        f"from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\nclass {name}(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    (found,) = problems(of_trainers())
    assert ("finds another MTLTrainer" if of_same_name else "does not find MTLTrainer") in found.said
    assert "mtl-nnunet trainers" in found.remedy
    # ours in front of theirs is found
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(trainers_folder()), str(tmp_path)]))
    assert [f.state for f in of_trainers()] == [OK]


def test_modules_that_import_others_when_nnunet_asks_for_their_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.17 leaves them in sys.modules, and MONAI imports transformers."""
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    for i in range(3):
        lazy = ModuleType(f"lazy_{i}")

        def imports(name: str, i: int = i) -> Any:
            monkeypatch.setitem(sys.modules, f"loaded_by_{i}", ModuleType(f"loaded_by_{i}"))
            raise AttributeError(name)

        lazy.__getattr__ = imports  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, lazy.__name__, lazy)
    with pytest.raises(RuntimeError, match="changed size"):
        recursive_find_trainer_class_by_name("MTLTrainer")
    for i in range(3):
        sys.modules.pop(f"loaded_by_{i}", None)
    assert [finding.state for finding in of_trainers()] == [OK]
    assert "lazy_0" in sys.modules


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file" / "results"))
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "not" / "yet"))
    found = list(of_folders())
    assert [f.said.split(" is ")[0] for f in problems(found)] == ["nnUNet_results", "the result cache"]
    assert "made when it is needed" in found[0].said
    assert not (tmp_path / "not").exists()


def test_requirements_that_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    assert problems(of_packages()) == []
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.5" if name == "timm" else real(name))
    assert any("mtl-nnunet needs timm>=1.0.20, and it is 1.0.5" in f.said for f in problems(of_packages()))


def test_two_folders_of_one_number_and_an_altered_encoder(whole: Path, make_dataset: Callable[..., Path]) -> None:
    with (whole / ENCODER_FILE).open("ab") as file:
        file.write(b"more")
    (found,) = problems(of_datasets())
    assert "is not the file that was selected" in found.said
    Path(os.environ["nnUNet_raw"], "Dataset001_Twin").mkdir()
    assert all("several datasets have the number 1" in f.said for f in problems(of_datasets()))
    assert len(problems(of_datasets())) == 2

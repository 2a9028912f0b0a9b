"""Checkpoints: written by the libraries that define the formats, read without trusting them."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver

from mtl_nnunet.checkpoints import Checkpoint, find_checkpoints, read_contents, runs_of, span_of_run
from mtl_nnunet.errors import UserError


@pytest.fixture
def model() -> torch.nn.Module:
    return timm.create_model("test_resnet", num_classes=5)


@pytest.fixture
def timm_run(tmp_path: Path, model: torch.nn.Module) -> Path:
    """What timm's own saver leaves behind after epochs 8 to 11, with its arguments as a Namespace."""
    run = tmp_path / "timm_run"
    run.mkdir()
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model="test_resnet", lr=0.1),
        checkpoint_dir=str(run),
        recovery_dir=str(run),
        max_history=10,
    )
    for epoch, metric in ((8, 10.0), (9, 30.0), (10, 20.0), (11, 25.0)):
        with torch.no_grad():
            next(iter(model.parameters())).fill_(float(epoch))
        saver.save_checkpoint(epoch, metric)
    return run


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_run_of_timms_own_saver_is_read_whole_and_in_the_order_of_epochs(timm_run: Path) -> None:
    assert {"last.pth.tar", "model_best.pth.tar"} < {p.name for p in timm_run.iterdir()}
    found = find_checkpoints([timm_run])
    assert [c.epoch for c in found] == [8, 9, 10, 11], "9 before 10, and copies do not count"
    assert {c.architecture for c in found} == {"test_resnet"}
    assert {c.kind for c in found} == {"timm train.py"}
    weights = read_contents(found[1].path).weights
    assert weights["conv1.0.weight"].flatten()[0] == 9


def test_files_of_a_run_named_one_by_one_are_the_same_as_its_folder(timm_run: Path) -> None:
    by_file = find_checkpoints(sorted(timm_run.glob("*.tar")))
    assert by_file == find_checkpoints([timm_run])


def test_last_and_best_count_where_their_epoch_has_no_other_file(timm_run: Path) -> None:
    for epoch in (9, 11):
        (timm_run / f"checkpoint-{epoch}.pth.tar").unlink()
    found = find_checkpoints([timm_run])
    assert [(c.epoch, c.path.name) for c in found] == [
        (8, "checkpoint-8.pth.tar"),
        (9, "model_best.pth.tar"),
        (10, "checkpoint-10.pth.tar"),
        (11, "last.pth.tar"),
    ]


def test_run_says_architecture_and_accuracy_beside_its_files(tmp_path: Path, model: torch.nn.Module) -> None:
    torch.save(model.state_dict(), tmp_path / "epoch_003.pth")
    (tmp_path / "args.yaml").write_text("model: test_resnet\nlr: 0.1\n")
    (tmp_path / "summary.csv").write_text("epoch,train_loss,eval_top1\n3,1.0,55.5\n4,0.9,60.0\n")
    (found,) = find_checkpoints([tmp_path / "epoch_003.pth"])
    assert (found.epoch, found.architecture, found.logged_accuracy) == (3, "test_resnet", 55.5)
    assert found.kind == "state dict"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_state_dicts_alone_or_wrapped(tmp_path: Path, model: torch.nn.Module, wrapped: bool, prefix: str) -> None:
    weights = {prefix + k: v for k, v in model.state_dict().items()}
    torch.save({"model": weights, "epoch": 4} if wrapped else weights, tmp_path / "weights.pt")
    contents = read_contents(tmp_path / "weights.pt")
    assert same(contents.weights, model.state_dict())
    assert contents.epoch == (4 if wrapped else None)


def test_safetensors(tmp_path: Path, model: torch.nn.Module) -> None:
    save_file(model.state_dict(), tmp_path / "checkpoint-7.safetensors", metadata={"architecture": "test_resnet"})
    contents = read_contents(tmp_path / "checkpoint-7.safetensors")
    assert same(contents.weights, model.state_dict())
    assert (contents.epoch, contents.architecture, contents.kind) == (7, "test_resnet", "safetensors")


def test_legacy_files_of_old_pytorch(tmp_path: Path, model: torch.nn.Module) -> None:
    torch.save(model.state_dict(), tmp_path / "epoch-2.pth", _use_new_zipfile_serialization=False)
    assert same(read_contents(tmp_path / "epoch-2.pth").weights, model.state_dict())


def test_ends_of_several_runs_are_told_what_to_do(tmp_path: Path, model: torch.nn.Module) -> None:
    for seed in ("seed0", "seed1"):
        (tmp_path / seed).mkdir()
        torch.save(model.state_dict(), tmp_path / seed / "checkpoint-39.pth")
    with pytest.raises(UserError, match=r"2 checkpoints say they are epoch 39: .*select for each run"):
        find_checkpoints([tmp_path / "seed0", tmp_path / "seed1"])


def test_two_files_of_one_epoch_are_refused(timm_run: Path) -> None:
    shutil.copy(timm_run / "checkpoint-9.pth.tar", timm_run / "again-9.pth.tar")
    with pytest.raises(UserError, match=r"2 checkpoints say they are epoch 9: .*again-9"):
        find_checkpoints([timm_run])


def test_checkpoints_of_two_architectures_are_refused(timm_run: Path, tmp_path: Path) -> None:
    other = timm.create_model("test_convnext").state_dict()
    torch.save({"state_dict": other, "arch": "test_convnext", "epoch": 1}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="test_convnext"):
        find_checkpoints([timm_run, tmp_path / "other.pth"])


def test_no_checkpoint_is_said_with_a_hint_where_they_are(timm_run: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint in .*timm_run"):
        find_checkpoints([timm_run.parent])
    with pytest.raises(UserError, match="no such checkpoint"):
        find_checkpoints([timm_run / "nothing"])


@pytest.mark.parametrize("kept", [0, 1, 100, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("ending", ["pth.tar", "safetensors"])
def test_truncated_file_is_refused_by_name(tmp_path: Path, model: torch.nn.Module, kept: float, ending: str) -> None:
    file = tmp_path / f"checkpoint-1.{ending}"
    save: Callable[..., None] = save_file if ending == "safetensors" else torch.save
    save(model.state_dict(), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(UserError, match=r"checkpoint-1\..* (is empty|cannot be read)"):
        find_checkpoints([tmp_path])


@pytest.mark.parametrize(
    "content",
    [b"hello", b"\x80\x04.", b"PK\x03\x04 not a zip", np.random.default_rng(0).bytes(5000)],
    ids=["text", "pickle", "zip", "noise"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_contents(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": "text"}}, {}, torch.zeros(3)])
def test_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth holds"):
        read_contents(tmp_path / "a.pth")


class RunsCode:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "inside the arguments"])
def test_pickle_that_runs_code_is_refused_and_not_executed(tmp_path: Path, model: torch.nn.Module, form: str) -> None:
    trap = RunsCode(tmp_path / "executed")
    file = tmp_path / "checkpoint-1.pth.tar"
    if form == "bare pickle":
        file.write_bytes(pickle.dumps(trap, protocol=2))
    elif form == "inside the arguments":
        args = argparse.Namespace(model="test_resnet", trap=trap)
        torch.save({"state_dict": model.state_dict(), "epoch": 1, "arch": "test_resnet", "args": args}, file)
    else:
        torch.save({"state_dict": trap}, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"refused: it holds Python objects besides weights \(posix\.mkdir\)"):
        find_checkpoints([tmp_path])
    assert not (tmp_path / "executed").exists()


def test_whole_pickled_module_is_refused_with_advice(tmp_path: Path, model: torch.nn.Module) -> None:
    torch.save(model, tmp_path / "model.pth")
    with pytest.raises(UserError, match="Save it again as a plain state dict"):
        read_contents(tmp_path / "model.pth")


def told(file: str, epoch: int, planned: int | None = None, kind: str = "state dict") -> Checkpoint:
    return Checkpoint(Path(file), epoch, None, kind, planned_epochs=planned)


@pytest.mark.parametrize(
    ("checkpoints", "span"),
    [
        # whole, and counted from 0 though nothing says so
        ([told("a.pth", 20, 80), told("b.pth", 79, 80)], (0, 79)),
        ([told("a.pth", 20, 80), told("b.pth", 80, 80)], (1, 80)),
        ([told("a.pth", 20, 80), told("b.pth", 40, 80)], (1, 80)),
        ([told("a.pth", 40, 200, "MoCo"), told("b.pth", 199, 200, "MoCo")], (0, 199)),
        # Hugging Face counts from 1: one epoch is missing
        ([told("a", 79, 80, "Hugging Face Trainer")], (1, 80)),
        # resumed with a longer plan; an average beside them that states none
        ([told("a.pth", 9, 20), told("b.pth", 24, 60), told("c.pth", 26)], (1, 60)),
        # runs of their own, each annealed
        ([told("a.pth", 4, 4), told("b.pth", 16, 16)], (1, 16)),
        ([told("a.pth", 40, 30)], (1, 40)),
    ],
)
def test_how_long_a_run_is(checkpoints: list[Checkpoint], span: tuple[int, int]) -> None:
    assert span_of_run(checkpoints) == span
    assert span_of_run(checkpoints[::-1]) == span


def test_one_folder_under_two_names_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    same = [
        told("run/1.pth", 1),
        told(str(tmp_path / "run/2.pth"), 2),
        told("link/3.pth", 3),
        told("run/../run/4.pth", 4),
    ]
    assert runs_of(same) == (tmp_path / "run",)


def test_the_ends_of_runs_are_not_one_run(tmp_path: Path) -> None:
    ends = [tmp_path / "a" / "99.pth", tmp_path / "b" / "299.pth"]
    assert len(runs_of([told(str(ends[0]), 99, 100), told(str(ends[1]), 299, 300)])) == 2
    alike = [told(str(ends[0]), 99, 300), told(str(ends[1]), 299, 300)]
    assert len(runs_of(alike)) == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "args.yaml").touch()
    assert len(runs_of(alike)) == 2

"""A run as users leave it: many files, copies, links, files half written, other runs' files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from conftest import DEMO_RUN
from safetensors.torch import save_file

from mtl_nnunet.checkpoints import ages, find_checkpoints, list_checkpoints, read_contents
from mtl_nnunet.checkpoints import run as run_module
from mtl_nnunet.cli.main import main
from mtl_nnunet.errors import AssumedWarning, LeftOutWarning, UserError


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).state_dict()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the checkpoint files that Python opens while the test runs, by whatever way."""
    import sys

    names: list[str] = []
    active = True

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if (
            active
            and event == "open"
            and isinstance(arguments[0], str)
            and arguments[0].endswith((".pth.tar", ".pth", ".pt", ".ckpt", ".safetensors"))
        ):
            names.append(os.path.basename(arguments[0]))

    # an audit hook stays for the life of the process; the flag switches it off
    sys.addaudithook(note)
    original = run_module.read_contents

    def counted(path: Path, which: str = "default"):  # type: ignore[no-untyped-def]
        # safetensors opens files below Python
        names.append(Path(path).name)
        return original(path, which)

    monkeypatch.setattr(run_module, "read_contents", counted)
    yield names
    active = False


@pytest.mark.parametrize(
    "name", ["checkpoint-{}.pth.tar", "epoch={}-step={}00.ckpt", "checkpoint_{:04d}.pth.tar", "resnet_{}.pth"]
)
def test_300_files_are_listed_without_reading_them(
    tmp_path: Path, weights: dict[str, torch.Tensor], opened: list[str], name: str
) -> None:
    file = tmp_path / name.format(299, 300)
    torch.save({"state_dict": weights, "epoch": 299, "arch": "test_resnet"}, file)
    for epoch in range(299):
        # the content is that of no checkpoint: who reads it, fails
        (tmp_path / name.format(epoch, epoch + 1)).write_bytes(b"not read")
    (tmp_path / "last.pth.tar").hardlink_to(file)
    opened.clear()
    listing = list_checkpoints(tmp_path)
    assert [c.epoch for c in listing.checkpoints] == list(range(300))
    assert {c.architecture for c in listing.checkpoints} == {"test_resnet"}
    assert len(set(opened)) <= 2, "the latest file, and last, whose name does not say its epoch"


def test_listing_says_what_finding_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(list_checkpoints(DEMO_RUN).checkpoints) == find_checkpoints(DEMO_RUN)
    capsys.readouterr()
    assert main(["checkpoints", str(DEMO_RUN)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["epoch", "step", "size", "logged", "top-1", "file"]
    assert [line.split()[0] for line in lines[1:7]] == ["0", "3", "8", "16", "25", "39"]
    assert lines[1].split()[-3:] == ["4.68", "%", "checkpoint-0.pth.tar"]
    assert lines[7].startswith("architecture: test_resnet; 394,183 parameters")
    assert lines[8] == "planned: epochs 0 to 39"
    assert "34 of them have no checkpoint any more: 1 to 2, 4 to 7" in err
    assert "--checkpoint-hist" in err


def test_listing_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(DEMO_RUN), "timm:resnet18.a1_in1k", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [c["epoch"] for c in told["checkpoints"]] == [0, 3, 8, 16, 25, 39, None]
    assert {c["planned_epochs"] for c in told["checkpoints"][:6]} == {40}
    assert told["checkpoints"][-1]["published"]["name"] == "timm:resnet18.a1_in1k"
    assert Path(told["checkpoints"][0]["path"]).is_file()
    assert any("have no checkpoint any more" in note for note in told["notes"])


def test_a_hash_is_not_computed_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl_nnunet.checkpoints import checkpoint as module

    monkeypatch.setattr(module, "sha256", lambda path: f"hash of {path.name}")
    (found,) = find_checkpoints(DEMO_RUN / "checkpoint-3.pth.tar")
    assert "sha256" not in vars(found)
    assert found.sha256 == found.content_key == "hash of checkpoint-3.pth.tar"


def test_timm_keeps_ten_and_the_listing_says_so(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model="test_resnet"),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    for epoch in range(14):
        saver.save_checkpoint(epoch, float(epoch))
    saver.save_recovery(14, 200)
    listing = list_checkpoints(tmp_path)
    assert [c.epoch for c in listing.checkpoints] == list(range(4, 14))
    said = " ".join(listing.notes)
    assert "keeps its 10 best checkpoints" in said
    assert "recovery-14-200.pth.tar" in said
    assert [c.epoch for c in find_checkpoints(tmp_path)] == list(range(4, 14))


def test_best_counts_once_where_it_is_the_same_tensors(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    for epoch in (1, 2):
        torch.save(
            {"state_dict": {k: v + epoch for k, v in weights.items()}, "epoch": epoch}, tmp_path / f"epoch_{epoch}.pth"
        )
    # other bytes, the same tensors, and no epoch of its own
    torch.save({k: v + 2 for k, v in weights.items()}, tmp_path / "model_best.pth")
    assert [c.path.name for c in find_checkpoints(tmp_path)] == ["epoch_1.pth", "epoch_2.pth"]
    torch.save({k: v + 3 for k, v in weights.items()}, tmp_path / "model_best.pth")
    assert [c.label for c in find_checkpoints(tmp_path)] == ["1", "2", "model_best.pth"]
    torch.save({"state_dict": weights, "epoch": 2}, tmp_path / "model_best.pth")
    with pytest.warns(
        LeftOutWarning, match=r"model_best\.pth says it is epoch 2, as epoch_2\.pth does, and holds other weights"
    ):
        assert len(find_checkpoints(tmp_path)) == 2


def test_links(tmp_path: Path) -> None:
    elsewhere = shutil.copytree(DEMO_RUN, tmp_path / "elsewhere")
    run = tmp_path / "run"
    run.mkdir()
    for file in elsewhere.glob("*.tar"):
        (run / file.name).symlink_to(file)
    (run / "last.pth.tar").symlink_to(run / "checkpoint-39.pth.tar")
    assert [c.epoch for c in find_checkpoints(run)] == [0, 3, 8, 16, 25, 39]
    (run / "around.pth").symlink_to(run / "around.pth")
    (elsewhere / "checkpoint-3.pth.tar").unlink()
    with pytest.warns(LeftOutWarning, match=r"files that are gone are left out: around\.pth, checkpoint-3\.pth\.tar"):
        assert [c.epoch for c in find_checkpoints(run)] == [0, 8, 16, 25, 39]
    with pytest.raises(
        UserError,
        match=r"no such checkpoint file or folder: .*checkpoint-3\.pth\.tar\. It is a link to a file that is gone",
    ):
        find_checkpoints(run / "checkpoint-3.pth.tar")


def test_files_being_written(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save({"state_dict": weights, "epoch": 1, "arch": "test_resnet"}, tmp_path / "epoch_1.pth")
    whole = (tmp_path / "epoch_1.pth").read_bytes()
    # names that savers use until a file is whole
    for name in ("tmp.pth.tar", ".epoch_2.pth", "epoch_2.pth.part", "model.safetensors.incomplete"):
        (tmp_path / name).write_bytes(whole[:1000])
    assert len(find_checkpoints(tmp_path)) == 1
    # a writer that uses the final name
    growing = tmp_path / "epoch_2.pth"
    for part in (b"", whole[:10], whole[: len(whole) // 2], whole[:-1]):
        growing.write_bytes(part)
        with pytest.raises(
            UserError, match=r"epoch_2\.pth .*It was changed \d+ s ago: if the run is still writing it, try again"
        ):
            find_checkpoints(tmp_path)
        listing = list_checkpoints(tmp_path)
        assert [c.epoch for c in listing.checkpoints] == [1, 2]
        assert {c.architecture for c in listing.checkpoints} == {"test_resnet"}, "the latest that can be read tells"
        assert any("epoch_2.pth" in note and "try again" in note for note in listing.notes)
    an_hour_ago = time.time() - 3600
    os.utime(growing, (an_hour_ago, an_hour_ago))
    with pytest.raises(UserError, match=r"truncated, damaged or not a PyTorch or safetensors file\. Copy it again"):
        find_checkpoints(tmp_path)


def test_a_file_that_the_run_deletes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(DEMO_RUN, tmp_path / "run")
    original = run_module.read_contents

    def read(path: Path, which: str = "default"):  # type: ignore[no-untyped-def]
        (run / "checkpoint-25.pth.tar").unlink(missing_ok=True)
        return original(path, which)

    monkeypatch.setattr(run_module, "read_contents", read)
    with pytest.raises(
        UserError, match=r"checkpoint-25\.pth\.tar cannot be opened: No such file.*still writing or deleting"
    ):
        find_checkpoints(run)


def test_two_runs_in_one_folder(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    for name in ("resnet_seed1_epoch_1.pth", "resnet_seed1_epoch_2.pth", "other_epoch_3.pth"):
        torch.save(weights, tmp_path / name)
    with pytest.warns(AssumedWarning, match="names of 2 kinds"):
        assert [c.epoch for c in find_checkpoints(tmp_path)] == [1, 2, 3]
    torch.save(weights, tmp_path / "other_epoch_2.pth")
    with pytest.raises(UserError, match="2 checkpoints say they are epoch 2"):
        find_checkpoints(tmp_path)
    assert any("2 files say they are epoch 2" in note for note in list_checkpoints(tmp_path).notes)
    (tmp_path / "other_epoch_2.pth").unlink()
    torch.save(
        {"state_dict": timm.create_model("test_convnext").state_dict(), "arch": "test_convnext"},
        tmp_path / "epoch_7.pth",
    )
    torch.save({"state_dict": weights, "arch": "test_resnet"}, tmp_path / "epoch_8.pth")
    with pytest.raises(UserError, match="different architectures cannot be ranked together"):
        find_checkpoints(tmp_path)
    # of two networks that share their epochs it is the networks that do not go together
    (tmp_path / "other").mkdir()
    (tmp_path / "epoch_7.pth").rename(tmp_path / "other" / "epoch_8.pth")
    with pytest.raises(UserError, match="different architectures cannot be ranked together"):
        find_checkpoints([tmp_path, tmp_path / "other"])


def test_a_number_that_is_a_size_is_no_epoch_where_the_file_knows_better(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    torch.save({"state_dict": weights, "epoch": 7}, tmp_path / "resnet_50.pth")
    (found,) = find_checkpoints(tmp_path)
    assert found.epoch == 7


@pytest.mark.parametrize("make", [lambda f: f.mkdir(), lambda f: (f / "a").mkdir(parents=True), lambda f: f.touch()])
def test_nothing_there(tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run.pth")
    assert main(["checkpoints", str(tmp_path / "run.pth")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(UserError, match=r"run\.pth"):
        find_checkpoints(tmp_path / "run.pth")


def test_steps_order_where_no_epoch_is_stated(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    for step in (900, 1000, 20000):
        torch.save(weights, tmp_path / f"iter_{step}.pth")
    found = find_checkpoints(tmp_path)
    assert ages(found) == [900, 1000, 20000]
    assert [c.label for c in found] == ["step 900", "step 1000", "step 20000"]


def test_companions_of_a_run_are_not_read(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, tmp_path / "epoch_1.pth")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt", "optimizer_1.pt"):
        (tmp_path / name).write_bytes(b"no weights")
    assert len(find_checkpoints(tmp_path)) == 1


def test_which_weights_are_a_closed_list() -> None:
    with pytest.raises(UserError, match="'teacher' is none of default, ema, trained"):
        read_contents(DEMO_RUN / "checkpoint-0.pth.tar", "teacher")


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=5).state_dict()


def test_names_that_do_not_run_with_the_epochs_inside_are_not_believed(tmp_path: Path) -> None:
    for number, epoch in ((1, 90), (2, 40), (3, 70)):
        torch.save(
            {"arch": "test_resnet", "epoch": epoch, "state_dict": weights_of(epoch)}, tmp_path / f"model_{number}.pth"
        )
    with pytest.warns(AssumedWarning, match="not the epochs"):
        found = find_checkpoints([tmp_path])
    assert [(c.epoch, c.path.name) for c in found] == [(40, "model_2.pth"), (70, "model_3.pth"), (90, "model_1.pth")]


def test_steps_with_a_last_file_that_states_its_epoch_go_by_steps(tmp_path: Path) -> None:
    for step in (500, 1000):
        torch.save({"arch": "test_resnet", "state_dict": weights_of(step)}, tmp_path / f"step_{step}.pth")
    torch.save({"arch": "test_resnet", "epoch": 1, "state_dict": weights_of(1000)}, tmp_path / "last.pth")
    assert [c.path.name for c in find_checkpoints([tmp_path])] == ["step_500.pth", "step_1000.pth"]


def test_what_a_trainer_saves_beside_its_checkpoints_is_no_further_one(tmp_path: Path) -> None:
    folder = tmp_path / "resnet-50"
    for step in (100, 200):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        save_file(weights_of(step), folder / f"checkpoint-{step}" / "model.safetensors")
    save_file(weights_of(100), folder / "model.safetensors")
    with pytest.warns(LeftOutWarning, match="repeats one"):
        found = find_checkpoints([folder])
    assert [c.path.parent.name for c in found] == ["checkpoint-100", "checkpoint-200"]
    (alone,) = find_checkpoints([folder / "model.safetensors"])
    assert alone.epoch is None, "50 is the network's depth"


def test_a_teacher_without_a_student_is_another_network(tmp_path: Path) -> None:
    own, other = weights_of(1), weights_of(2)
    both = {**{f"model.{k}": v for k, v in own.items()}, **{f"teacher.{k}": v for k, v in other.items()}}
    torch.save({"state_dict": both}, tmp_path / "epoch=1.ckpt")
    torch.save({"model": own, "teacher": other, "epoch": 1}, tmp_path / "distilled.pth")
    for name in ("epoch=1.ckpt", "distilled.pth"):
        held = read_contents(tmp_path / name).weights
        assert torch.equal(held["conv1.0.weight"], own["conv1.0.weight"])


def test_tensors_with_and_without_a_wrapper_are_not_mixed(tmp_path: Path) -> None:
    own = weights_of(1)
    twice = {**own, **{f"_orig_mod.{k}": v + 1 for k, v in own.items()}}
    torch.save(twice, tmp_path / "checkpoint-1.pth.tar")
    with pytest.raises(UserError, match="twice"):
        read_contents(tmp_path / "checkpoint-1.pth.tar")


def test_a_timm_run_below_one_per_cent_is_not_taken_for_shares(tmp_path: Path) -> None:
    torch.save({"arch": "test_resnet", "epoch": 0, "state_dict": weights_of(0)}, tmp_path / "checkpoint-0.pth.tar")
    (tmp_path / "summary.csv").write_text("epoch,eval_top1\n0,0.9\n")
    assert find_checkpoints([tmp_path])[0].logged_accuracy == 0.9

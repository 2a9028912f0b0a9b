"""Watching a folder that somebody else writes to, deletes from and breaks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEMO_RUN, write_phantoms
from safetensors.torch import save_file

from mtl_nnunet import watching
from mtl_nnunet.cases import find_image_folder
from mtl_nnunet.checkpoints import find_checkpoints, read_contents
from mtl_nnunet.cli.watch_pretraining import main
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import sha256
from mtl_nnunet.monitoring import CURVE_FILE, HISTORY_FILE, STOP_FILE, Monitor
from mtl_nnunet.slices import Slices, gather_slices
from mtl_nnunet.stopping import StopRule
from mtl_nnunet.watching import (
    COPIES_FOLDER,
    IDLE,
    LOOKED,
    OVER,
    STOPPED,
    process_with,
    refuse_damaged,
    terminated,
    watch,
)

FILES = sorted(DEMO_RUN.glob("*.pth.tar"), key=lambda f: int(f.name.split("-")[1].split(".")[0]))
NEVER = StopRule("patience", patience=99)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="module")
def slices(phantoms: Path) -> Slices:
    return gather_slices(find_image_folder(phantoms / "imagesTr"), num_slices=24, num_workers=1)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(watching, "SHORT_PAUSE", 0.01)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def look(tmp_path: Path, run: Path, slices: Slices) -> Callable[..., tuple[Monitor, watching.Ending, str]]:
    """A function that looks once, with a new monitor on the same folder, and returns it with the ending and what was said."""

    def once(
        rule: StopRule = NEVER, planned: int | None = None, **options: Any
    ) -> tuple[Monitor, watching.Ending, str]:
        said: list[str] = []
        monitor = Monitor(tmp_path / "out", slices, rule=rule, planned_epochs=planned)
        ending = watch(run, monitor, say=said.append, **{"once": True, **options})
        return monitor, ending, "\n".join(said)

    return once


Look = Callable[..., tuple[Monitor, watching.Ending, str]]


def copies(tmp_path: Path) -> set[str]:
    return {
        str(f.relative_to(tmp_path / "out" / COPIES_FOLDER))
        for f in (tmp_path / "out" / COPIES_FOLDER).rglob("*")
        if f.is_file()
    }


def test_a_finished_run_is_scored_in_the_order_of_its_epochs(tmp_path: Path, run: Path, look: Look) -> None:
    for file in reversed(FILES[:5]):
        shutil.copy(file, run)
    monitor, ending, said = look()
    assert ending.why == LOOKED
    assert [s.epoch for s in monitor.history] == [0, 3, 8, 16, 25]
    assert [line.split()[1] for line in said.splitlines() if line.strip().startswith("epoch")] == [
        "0",
        "3",
        "8",
        "16",
        "25",
    ]
    assert (tmp_path / "out" / CURVE_FILE).read_bytes().startswith(b"\x89PNG")
    assert ending.best is not None
    assert copies(tmp_path) == {ending.best.name, "checkpoint-25.pth.tar"}
    assert ending.file is not None
    assert sha256(ending.file) == sha256(run / ending.best.name)
    again, _, said = look()
    assert again.history == monitor.history
    assert "going on after 5 checkpoints" in said
    assert "contrastive" not in said


def test_a_live_run_is_watched_until_the_rule_says_stop(tmp_path: Path, run: Path, slices: Slices) -> None:
    written: list[int] = []

    def train() -> None:
        for i, file in enumerate([FILES[-1], *FILES[:4]]):
            # under its final name from the first byte on, as torch.save does
            whole = file.read_bytes()
            with open(run / f"checkpoint-{i}.pth.tar", "wb") as growing:
                growing.write(whole[: len(whole) // 2])
                growing.flush()
                time.sleep(0.15)
                growing.write(whole[len(whole) // 2 :])
            written.append(i)
            history, patience = tmp_path / "out" / HISTORY_FILE, time.monotonic() + 60
            while not (history.exists() and len(history.read_text().splitlines()) > i) and time.monotonic() < patience:
                time.sleep(0.05)
            time.sleep(0.5)
            if (tmp_path / "out" / STOP_FILE).exists():
                return
            # and deletes what is not among its best
            (run / f"checkpoint-{i}.pth.tar").unlink()

    said: list[str] = []
    training = threading.Thread(target=train)
    training.start()
    monitor = Monitor(tmp_path / "out", slices, rule=StopRule("patience", patience=2))
    ending = watch(run, monitor, every=0.05, say=said.append, idle=1)
    training.join()
    assert ending.why == STOPPED
    assert [s.epoch for s in monitor.history] == [0, 1, 2]
    assert ending.best is not None
    assert ending.best.epoch == 0
    # the run deleted it long ago
    assert not (run / "checkpoint-0.pth.tar").exists()
    assert ending.file is not None
    assert sha256(ending.file) == sha256(FILES[-1])
    stop = json.loads((tmp_path / "out" / STOP_FILE).read_text())
    assert (stop["epoch"], stop["rule"], stop["start_from"]) == (2, "patience", str(ending.file))
    assert "2 of 2 checkpoints without an improvement" in stop["reason"]
    assert len(written) <= 4


def test_on_stop_signals_and_runs_a_command_and_a_restart_does_not_repeat_them(
    tmp_path: Path, run: Path, look: Look
) -> None:
    for file in FILES[:2]:
        shutil.copy(file, run)
    swapped = run / "checkpoint-3.pth.tar"
    shutil.copy(FILES[0], run / "checkpoint-0.pth.tar")
    shutil.copy(FILES[-1], run / "checkpoint-0.pth.tar")
    shutil.copy(FILES[0], swapped)
    training = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    command = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); raise SystemExit(7)"]
    rule = StopRule("patience", patience=1)
    _, ending, said = look(rule, on_stop=command, process=process_with(training.pid))
    assert ending.why == STOPPED
    assert training.wait(20) == -signal.SIGTERM
    assert f"SIGTERM was sent to process {training.pid}" in said
    assert "ended with exit status 7" in said
    _, ending, said = look(rule, on_stop=command)
    assert ending.why == STOPPED
    assert "Remove that file to go on" in said
    assert (tmp_path / "ran").read_text() == "x"
    (tmp_path / "out" / STOP_FILE).unlink()
    _, ending, said = look(NEVER, on_stop=command)
    assert ending.why == LOOKED


def test_a_process_that_ended_is_not_signalled() -> None:
    training = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = process_with(training.pid)
    training.kill()
    training.wait()
    assert "has ended already" in terminated(process)
    with pytest.raises(UserError, match=f"no process {training.pid}"):
        process_with(training.pid)


def test_the_planned_end_is_no_stop(tmp_path: Path, run: Path, look: Look) -> None:
    for file in FILES:
        shutil.copy(file, run)
    (run / "args.yaml").write_text(yaml.safe_dump({"model": "test_resnet", "epochs": 40}))
    monitor, ending, said = look(StopRule())
    assert ending.why == OVER
    assert "planned for 40 epochs" in said
    assert "the last planned epoch is reached" in said
    assert not (tmp_path / "out" / STOP_FILE).exists()
    assert monitor.history[-1].said["planned_epochs"] == 40
    # the plan is remembered where the run is gone
    shutil.rmtree(run)
    _, ending, _ = look(StopRule())
    assert ending.why == OVER


def test_a_run_that_ends_early_is_said_to(run: Path, look: Look) -> None:
    shutil.copy(FILES[0], run)
    monitor, ending, said = look(once=False, every=0.05, idle=0.01)
    assert ending.why == IDLE
    assert "seems to have ended early" in said
    assert len(monitor.history) == 1


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path, slices: Slices) -> None:
    said: list[str] = []
    monitor = Monitor(tmp_path / "out", slices)
    ending = watch(tmp_path / "later", monitor, every=0.05, idle=0.005, say=said.append)
    assert (ending.why, ending.best) == (IDLE, None)
    assert said[0].startswith("waiting for checkpoints in ")


def test_a_broken_file_is_named_once_and_scored_when_it_is_whole(run: Path, look: Look) -> None:
    shutil.copy(FILES[0], run)
    whole = FILES[1].read_bytes()
    (run / "checkpoint-3.pth.tar").write_bytes(whole[: len(whole) // 2])
    (run / "checkpoint-8.pth.tar").write_bytes(b"")
    monitor, _, said = look()
    assert [s.epoch for s in monitor.history] == [0]
    assert said.count("checkpoint-3.pth.tar cannot be read: it is truncated") == 1
    assert said.count("is empty") == 1
    assert said.count("It is skipped unless it changes.") == 2
    assert str(run / "checkpoint-3.pth.tar") in said
    (run / "checkpoint-3.pth.tar").write_bytes(whole)
    monitor, _, _ = look()
    assert [s.epoch for s in monitor.history] == [0, 3]


def test_bytes_that_changed_inside_are_noticed(tmp_path: Path) -> None:
    damaged = bytearray(FILES[0].read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 64] = bytes(64)
    (tmp_path / "checkpoint-0.pth.tar").write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged"):
        refuse_damaged(tmp_path / "checkpoint-0.pth.tar")
    refuse_damaged(FILES[0])


def test_diverged_weights_are_skipped_by_name(run: Path, look: Look) -> None:
    shutil.copy(FILES[0], run)
    weights = read_contents(FILES[1]).weights
    weights["conv1.0.weight"] = weights["conv1.0.weight"] * float("nan")
    torch.save({"arch": "test_resnet", "epoch": 3, "state_dict": weights}, run / "checkpoint-3.pth.tar")
    shutil.copy(FILES[2], run)
    monitor, _, said = look()
    assert [s.epoch for s in monitor.history] == [0, 8]
    assert f"{run / 'checkpoint-3.pth.tar'} holds NaN or infinite weights" in said


def test_a_checkpoint_deleted_before_it_is_copied_is_left_out(
    run: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in FILES[:2]:
        shutil.copy(file, run)
    original = watching.own_copy

    def too_late(file: Path, *more: Any) -> Path:
        if file.name == "checkpoint-0.pth.tar":
            file.unlink(missing_ok=True)
        return original(file, *more)

    monkeypatch.setattr(watching, "own_copy", too_late)
    monitor, _, said = look()
    assert [s.epoch for s in monitor.history] == [3]
    assert "checkpoint-0.pth.tar was deleted before it could be copied" in said


def test_a_checkpoint_deleted_while_it_is_copied_is_scored(
    run: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(FILES[0], run)
    original = shutil.copyfileobj

    def deleting(source: Any, *more: Any) -> None:
        (run / FILES[0].name).unlink()
        original(source, *more)

    monkeypatch.setattr(watching.shutil, "copyfileobj", deleting)
    monitor, ending, _ = look()
    assert [s.epoch for s in monitor.history] == [0]
    assert ending.file is not None
    assert sha256(ending.file) == sha256(FILES[0])


def test_a_file_that_changes_while_it_is_copied_is_left_for_later(
    run: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(FILES[0], run)
    original, touched = shutil.copyfileobj, []

    def touching(source: Any, *more: Any) -> None:
        original(source, *more)
        if not touched:
            touched.append(True)
            shutil.copyfile(FILES[1], run / FILES[0].name)

    monkeypatch.setattr(watching.shutil, "copyfileobj", touching)
    monitor, _, said = look()
    assert monitor.history == []
    assert "not finished yet: checkpoint-0.pth.tar" in said
    monitor, ending, _ = look()
    assert ending.file is not None
    assert sha256(ending.file) == sha256(FILES[1])


def test_a_copy_that_was_not_scored_before_a_kill_is_scored_though_its_file_is_gone(
    tmp_path: Path, run: Path, look: Look
) -> None:
    kept = tmp_path / "out" / COPIES_FOLDER
    kept.mkdir(parents=True)
    shutil.copy(FILES[1], kept)
    (kept / ".checkpoint-8.pth.tar.1.tmp").write_bytes(b"half")
    shutil.copy(FILES[3], run)
    monitor, _, _ = look()
    assert [s.epoch for s in monitor.history] == [3, 16]
    assert not list(kept.glob(".*"))


def test_moving_aliases_are_not_counted_beside_numbered_files(run: Path, look: Look) -> None:
    for file in FILES[:2]:
        shutil.copy(file, run)
    shutil.copy(FILES[1], run / "last.pth.tar")
    os.link(run / FILES[0].name, run / "model_best.pth.tar")
    monitor, _, said = look()
    assert [s.name for s in monitor.history] == ["checkpoint-0.pth.tar", "checkpoint-3.pth.tar"]
    assert "not finished yet" not in said
    # the numbered ones go, as timm deletes all but its best
    for file in FILES[:2]:
        (run / file.name).unlink()
    monitor, _, _ = look()
    assert len(monitor.history) == 2


def test_an_alias_alone_is_one_checkpoint_each_time_it_moves(tmp_path: Path, run: Path, look: Look) -> None:
    for epoch, file in ((0, FILES[0]), (1, FILES[1]), (1, FILES[1])):
        # other bytes, as Lightning writes them for the same weights
        content = {"arch": "test_resnet", "epoch": epoch, "state_dict": read_contents(file).weights, "at": time.time()}
        torch.save(content, run / "last.pth.tar")
        monitor, ending, _ = look()
    assert [(s.name, s.epoch) for s in monitor.history] == [("epoch_0.pth.tar", 0), ("epoch_1.pth.tar", 1)]
    assert "last.pth.tar" not in copies(tmp_path)
    assert ending.file is not None


def test_a_folder_that_is_written_again_and_again_keeps_its_best(tmp_path: Path, run: Path, look: Look) -> None:
    left, others = (
        tmp_path / "out" / COPIES_FOLDER / "last" / ".model.safetensors.17.tmp",
        tmp_path / "out" / "mine" / ".a.1.tmp",
    )
    for file in (left, others):
        file.parent.mkdir(parents=True)
        file.touch()
    (run / "last").mkdir()
    for epoch, file in enumerate(FILES[:3], 1):
        about = {"architecture": "test_resnet", "epoch": str(epoch)}
        save_file(read_contents(file).weights, run / "last" / "model.safetensors", metadata=about)
        monitor, ending, _ = look()
    names = [f"epoch_{epoch}.safetensors" for epoch in (1, 2, 3)]
    assert [s.name for s in monitor.history] == names
    assert ending.best is not None
    assert ending.file == tmp_path / "out" / COPIES_FOLDER / ending.best.name
    assert copies(tmp_path) == {ending.best.name, names[-1]}
    assert others.exists()


def test_names_that_say_no_epoch_go_by_the_content_or_by_the_time_of_writing(
    run: Path, look: Look, slices: Slices, tmp_path: Path
) -> None:
    for i, file in enumerate(FILES[:3]):
        weights = read_contents(file).weights
        torch.save(
            {"arch": "test_resnet", "epoch": 10 * (3 - i), "state_dict": weights}, run / f"weights_{'abc'[i]}.pt"
        )
    monitor, _, _ = look()
    assert [(s.name, s.epoch) for s in monitor.history] == [
        ("weights_c.pt", 10),
        ("weights_b.pt", 20),
        ("weights_a.pt", 30),
    ]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name, file, age in (("z", FILES[0], 300), ("y", FILES[1], 200), ("x", FILES[2], 100)):
        save_file(read_contents(file).weights, bare / f"{name}.safetensors")
        os.utime(bare / f"{name}.safetensors", (time.time() - age,) * 2)
    other = Monitor(tmp_path / "other", slices, rule=StopRule(), encoder="test_resnet", planned_epochs=40)
    watch(bare, other, once=True, say=lambda _: None)
    assert [s.name for s in other.history] == ["z.safetensors", "y.safetensors", "x.safetensors"]
    assert {s.said["rule"] for s in other.history} == {"patience"}


def test_folders_of_hugging_face_keep_their_epochs(tmp_path: Path, run: Path, look: Look) -> None:
    for i, file in enumerate(FILES[:2], 1):
        folder = run / f"checkpoint-{500 * i}"
        folder.mkdir()
        save_file(read_contents(file).weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
        state = {"epoch": float(i), "global_step": 500 * i, "num_train_epochs": 30}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    shutil.copytree(run / "checkpoint-500", run / "tmp-checkpoint-1500")
    monitor, ending, _ = look(StopRule())
    assert [(s.name, s.epoch) for s in monitor.history] == [("checkpoint-500", 1), ("checkpoint-1000", 2)]
    assert (monitor.planned_epochs, monitor.first_epoch, monitor.last_epoch) == (30, 1, 30)
    assert ending.file is not None
    (kept,) = find_checkpoints(ending.file)
    assert ending.best is not None
    assert kept.epoch == ending.best.epoch


def test_a_second_watcher_of_the_same_run_is_refused(tmp_path: Path, run: Path, slices: Slices, look: Look) -> None:
    shutil.copy(FILES[0], run)
    refused: list[str] = []

    def second(line: str) -> None:
        if not refused and "epoch" in line:
            with pytest.raises(UserError) as error:
                watch(run, Monitor(tmp_path / "elsewhere", slices, rule=NEVER), once=True)
            refused.append(str(error.value))

    watch(run, Monitor(tmp_path / "out", slices, rule=NEVER), once=True, say=second)
    assert f"is running already: process {os.getpid()}" in refused[0]
    assert not (tmp_path / "elsewhere").exists()
    look()
    with pytest.raises(UserError, match="the folder of the run itself"):
        watch(run, Monitor(run, slices, rule=NEVER), once=True)


def test_all_copies_are_kept_on_request(tmp_path: Path, run: Path, look: Look) -> None:
    for file in FILES[:4]:
        shutil.copy(file, run)
    look(keep_all=True)
    assert copies(tmp_path) == {f.name for f in FILES[:4]}


def words(tmp_path: Path, phantoms: Path, run: Path) -> list[str]:
    source = ["-i", str(phantoms / "imagesTr"), "-run", str(run), "-o", str(tmp_path / "out")]
    return [*source, "-num_slices", "24", "--once"]


def command(tmp_path: Path, phantoms: Path, run: Path, *more: str) -> int:
    return main([*words(tmp_path, phantoms, run), *more])


def test_the_command_watches_and_says_what_is_next(
    tmp_path: Path, phantoms: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in FILES[:2]:
        shutil.copy(file, run)
    assert command(tmp_path, phantoms, run, "-epochs", "40", "-price", "50") == 0
    out = capsys.readouterr().out
    assert "STOP after epoch 0: expected gain of going on: -" in out
    assert (
        f"mtl-select-checkpoint -i {phantoms / 'imagesTr'} -ckpt {tmp_path / 'out' / COPIES_FOLDER}/checkpoint-" in out
    )
    assert len((tmp_path / "out" / HISTORY_FILE).read_text().splitlines()) == 1
    (tmp_path / "out" / STOP_FILE).unlink()
    # the same folder, other slices
    for option, said in (
        (("-seed", "1"), "-seed was 0 and is 1"),
        (("-num_slices", "20"), "-num_slices was 24 and is 20"),
    ):
        assert command(tmp_path, phantoms, run, "-epochs", "40", *option) == 1
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert command(tmp_path, phantoms, run, "-epochs", "40", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len((tmp_path / "out" / HISTORY_FILE).read_text().splitlines()) == 2
    assert told["ended"] == "looked"
    assert Path(told["file"]).name == told["best"]["name"]
    assert told["next"][0].startswith(f"mtl-select-checkpoint -i {phantoms / 'imagesTr'} -ckpt {told['file']}")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("-rule", "hope"), 2, "invalid choice"),
        (("-price", "-1"), 2, "not at least 0"),
        (("-every", "0"), 2, "not above 0"),
        (("-rule", "patience", "-price", "1"), 1, "patience goes by the score alone"),
        (("-rule", "patience", "-chooser", "mine.json"), 1, "patience goes by the score alone"),
        (("-on_stop", "no-such-program now"), 1, "there is no program 'no-such-program'"),
        (("-on_stop", "echo 'open"), 1, "No closing quotation"),
        (("-signal", "4194304"), 1, "no process 4194304"),
        (("-labels",), 1, "have no label"),
        (("-f", "0"), 1, "no score here uses labels"),
        (("-score", "hope"), 1, "unknown score"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path,
    phantoms: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    shutil.copy(FILES[0], run)
    if status == 2:
        with pytest.raises(SystemExit, match="2"):
            command(tmp_path, phantoms, run, *options)
    else:
        assert command(tmp_path, phantoms, run, *options) == status
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_command_says_that_labels_of_validation_cases_were_seen(
    make_dataset: Callable[..., Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(1, num_cases=6)
    (dataset / "patients.csv").write_text("case,patient\n")
    shutil.copy(FILES[0], run)
    words = ["-d", "1", "-run", str(run), "-o", str(tmp_path / "out"), "-num_slices", "24", "--once"]
    assert main([*words, "-score", "knn", "-rule", "patience"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert any("Labels of validation cases were seen" in line and "Pass -f 0" in line for line in told)
    assert any("patients.csv" in line for line in told)


def test_an_interrupted_command_says_that_nothing_is_lost(
    tmp_path: Path, phantoms: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(FILES[0], run)

    def interrupted(_: float) -> None:
        if (tmp_path / "out" / HISTORY_FILE).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupted)
    words = ["-i", str(phantoms / "imagesTr"), "-run", str(run), "-o", str(tmp_path / "out"), "-num_slices", "24"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 130
    assert "goes on from there" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert command(tmp_path, phantoms, run) == 0


@pytest.mark.slow
def test_a_watcher_that_is_killed_goes_on_without_loss(tmp_path: Path, phantoms: Path, run: Path) -> None:
    for file in FILES:
        shutil.copy(file, run)
    code = "import sys; from mtl_nnunet.cli.watch_pretraining import main; sys.exit(main())"
    begun = [sys.executable, "-c", code, *words(tmp_path, phantoms, run), "-rule", "patience", "-patience", "99"]
    history = tmp_path / "out" / HISTORY_FILE
    for wanted in (1, 3):
        watcher = subprocess.Popen(begun, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (history.exists() and len(history.read_text().splitlines()) >= wanted):
            assert watcher.poll() is None
            time.sleep(0.01)
        watcher.kill()
        watcher.wait()
    subprocess.run(begun, check=True, capture_output=True)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 3, 8, 16, 25, 39]

"""What reviewers broke: each of these once gave a traceback, an abort, a lost file or a wrong winner."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEMO_RUN, write_image

from mtl_nnunet.bootstrap import bootstrap_draws
from mtl_nnunet.cases import find_image_folder, find_nnunet_dataset, without_validation_cases
from mtl_nnunet.checkpoints import find_checkpoints
from mtl_nnunet.cli.select_checkpoint import main
from mtl_nnunet.errors import UserError
from mtl_nnunet.parallel import workers
from mtl_nnunet.racing import RISK, race_checkpoints, survivors
from mtl_nnunet.ranking import rank_checkpoints, score_encoder
from mtl_nnunet.scores import parse_score, parse_scores
from mtl_nnunet.select import cases_to_score, select_checkpoint
from mtl_nnunet.slices import gather_slices

COMMAND = [sys.executable, "-c", "import sys; from mtl_nnunet.cli.select_checkpoint import main; sys.exit(main())"]
FEW = ["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "24", "-device", "cpu"]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of a refusal."""
    capsys.readouterr()
    assert main([*FEW, *arguments]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def selection() -> Path:
    return Path(os.environ["nnUNet_preprocessed"], "Dataset001_Phantom", "mtl_selection")


@pytest.fixture
def collapsed_run(tmp_path: Path) -> Path:
    """The demo run's last two checkpoints and one whose training collapsed to zero."""
    run = tmp_path / "run"
    run.mkdir()
    for epoch in (25, 39):
        shutil.copy(DEMO_RUN / f"checkpoint-{epoch}.pth.tar", run)
    content = torch.load(run / "checkpoint-39.pth.tar", weights_only=True)
    content["state_dict"] = {k: torch.zeros_like(v) for k, v in content["state_dict"].items()}
    torch.save({**content, "epoch": 12}, run / "checkpoint-12.pth.tar")
    return run


@pytest.mark.parametrize(
    "score", ["contrastive", "uniformity", "ccfv", "dse_labels", "logme", "hscore", "probe", "dse"]
)
def test_a_collapsed_checkpoint_is_named_and_never_wins(
    make_dataset: Callable[..., Path], collapsed_run: Path, score: str
) -> None:
    make_dataset(1, num_cases=5)
    with pytest.raises(UserError, match=r"checkpoint-12\.pth\.tar gives the same features .* collapsed\. Leave it out"):
        select_checkpoint(1, collapsed_run, score, num_slices=20)


def test_a_bad_case_ends_in_exit_code_1_while_other_threads_still_read(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_dataset(1, num_cases=20, shape=(35, 51, 35), spacing=(1.0, 1.0, 1.0))
    broken = folder / "imagesTr" / "case_07_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:3000])
    # libraries are imported once, and each of the three processes ends as one of its own does
    thrice = (
        "import os, sys, mtl_nnunet.ranking, nnunetv2.imageio.reader_writer_registry\n"
        "from mtl_nnunet.cli.select_checkpoint import main\n"
        "for _ in range(3):\n"
        "    if not (child := os.fork()): sys.exit(main())\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "    print('ended', file=sys.stderr, flush=True)"
    )
    command = [sys.executable, "-c", thrice, *FEW, "-num_slices", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "1", "1"], done.stderr
    for err in done.stderr.split("ended\n")[:3]:
        assert "case_07" in err.strip().splitlines()[-1]


def test_a_terminated_run_leaves_nothing_half_written(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    make_dataset(1, num_cases=4)
    slow = (
        "import sys, time, mtl_nnunet.selection as s; write = s.save_file\n"
        "def save(*a, **k): write(*a, **k); print('writing', flush=True); time.sleep(60)\n"
        "s.save_file = save\n"
        "from mtl_nnunet.cli.select_checkpoint import main; sys.exit(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *FEW], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert list(selection().parent.iterdir()) == []


def test_labels_of_a_fold_given_in_words_are_kept_out_too(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, num_cases=10)
    for fold in (0, "0", np.int64(0)):
        outcome = select_checkpoint(1, DEMO_RUN, "hscore", fold=fold, num_slices=20)
        assert outcome.fold == 0
        assert len(outcome.dataset.cases) == 8
    for wrong in ("zero", 0.5):
        with pytest.raises(UserError, match="fold is"):
            select_checkpoint(1, DEMO_RUN, "hscore", fold=wrong)


@pytest.mark.parametrize(
    "log", [b"epoch,eval_top1\n39,nan\n25,inf\n", "epoch,eval_top1,näme\n39,1.0,x\n".encode("latin-1")]
)
@pytest.mark.usefixtures("undrawn")
def test_what_a_run_logged_never_stops_the_scoring(
    make_dataset: Callable[..., Path], tmp_path: Path, log: bytes
) -> None:
    make_dataset(1, num_cases=4)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(DEMO_RUN / "checkpoint-39.pth.tar", run)
    (run / "summary.csv").write_bytes(log)
    assert main(["-d", "1", "-ckpt", str(run), "-num_slices", "24", "-device", "cpu"]) == 0
    assert json.loads((selection() / "selection.json").read_text())["choice"]["logged_accuracy"] is None


@pytest.mark.usefixtures("undrawn")
def test_overwriting_replaces_a_selection_and_nothing_else(
    make_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(1, num_cases=4)
    real, link = tmp_path / "real" / "selection", tmp_path / "link"
    link.symlink_to(real)
    assert main([*FEW, "-o", str(link)]) == 0
    first = json.loads((real / "selection.json").read_text())
    assert main([*FEW, "-o", str(link), "--overwrite", "-seed", "1"]) == 0
    assert link.is_symlink()
    assert json.loads((real / "selection.json").read_text())["seed"] != first["seed"]
    assert sorted(p.name for p in (real.parent, tmp_path) for p in p.iterdir() if p.name.startswith(".")) == []
    modes = {stat.S_IMODE(file.stat().st_mode) for file in real.iterdir()}
    assert len(modes) == 1, "the encoder is as readable as the rest"
    (real / "notes.txt").write_text("mine")
    assert "notes.txt" in said(capsys, "-o", str(link), "--overwrite")
    assert (real / "notes.txt").read_text() == "mine"


def test_places_that_cannot_be_written_are_found_before_any_work(
    make_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(1, num_cases=4)
    (tmp_path / "file").write_text("")
    for arguments in (["-o", str(tmp_path / "file" / "selection")], ["-cache", str(tmp_path / "file")]):
        line = said(capsys, *arguments)
        assert str(tmp_path / "file") in line
    assert "--no-cache" in line


def test_names_without_a_number_are_no_datasets(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dataset(1)
    folder.rename(folder.with_name("Dataset_foo"))
    assert main(["-d", "Dataset_foo", *FEW[2:]]) == 1
    assert "neither a dataset number nor a name" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_cases_without_a_label_and_a_broken_first_case_are_skipped_when_told(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=24)
    (folder / "labelsTr" / "case_05.nii.gz").unlink()
    first = folder / "imagesTr" / "case_00_0000.nii.gz"
    first.write_bytes(first.read_bytes()[:500])
    assert main(FEW) == 1
    assert main([*FEW, "--skip-bad-cases"]) == 0
    content = json.loads((selection() / "selection.json").read_text())
    assert [c["name"] for c in content["dataset"]["cases_skipped"]] == ["case_05", "case_00"]
    for i in (6, 7):
        (folder / "labelsTr" / f"case_{i:02d}.nii.gz").unlink()
    assert main([*FEW, "--skip-bad-cases", "--overwrite"]) == 1


def test_a_skipped_case_keeps_its_place_in_the_split(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    folder = make_dataset(1, num_cases=12)
    splits = generate_crossval_split([f"case_{i:02d}" for i in range(12)])
    (folder / "labelsTr" / "case_03.nii.gz").unlink()
    dataset = find_nnunet_dataset(1, skip_bad_cases=True)
    (tmp_path / "splits_final.json").write_text(json.dumps([{k: list(v) for k, v in s.items()} for s in splits]))
    for where in (None, tmp_path):
        for fold in range(5):
            kept = {c.name for c in without_validation_cases(dataset, fold, where).cases}
            assert kept == set(splits[fold]["train"]) - {"case_03"}


def test_a_broken_first_image_of_a_folder_is_skipped_when_told(make_dataset: Callable[..., Path]) -> None:
    images = make_dataset(1, num_cases=12) / "imagesTr"
    first = images / "case_00_0000.nii.gz"
    first.write_bytes(first.read_bytes()[:300])
    with pytest.raises(UserError, match="case_00"):
        find_image_folder(images)
    slices = gather_slices(find_image_folder(images, skip_bad_cases=True), 24, skip_bad_cases=True)
    assert [name for name, _ in slices.skipped] == ["case_00"]


def test_a_link_to_the_last_epoch_is_no_epoch_of_its_own(tmp_path: Path) -> None:
    run = shutil.copytree(DEMO_RUN, tmp_path / "run")
    (run / "last.pth.tar").symlink_to(run / "checkpoint-39.pth.tar")
    (run / "model_best.pth.tar").symlink_to(run / "checkpoint-25.pth.tar")
    assert all(c.path.name.startswith("checkpoint-") for c in find_checkpoints(run))


def test_an_end_between_the_two_renames_keeps_the_old_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_nnunet.files import folder_written_atomically

    folder = tmp_path / "selection"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename, calls = os.rename, []

    def ends(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise SystemExit(143)
        rename(a, b)

    monkeypatch.setattr(os, "rename", ends)
    with pytest.raises(SystemExit), folder_written_atomically(folder, overwrite=True) as temporary:
        (temporary / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["selection"]
    assert (folder / "old").read_text() == "old"


def test_one_score_on_two_kinds_of_views_is_two_scores() -> None:
    assert len(parse_scores([parse_score("contrastive"), parse_score("contrastive", "paper")])) == 2


def test_a_case_with_nothing_in_it_is_named(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dataset(1, num_cases=5)
    voxels = np.zeros((12, 40, 36), dtype=np.float32)
    voxels[3:8, 10:30, 10:30] = 100
    write_image(folder / "imagesTr" / "case_03_0000.nii.gz", voxels, (2.0, 1.0, 1.0))
    line = said(capsys)
    assert "case_03" in line
    assert "constant" in line


def test_labels_beyond_int16_are_named(make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_dataset(1, num_cases=5)
    write_image(folder / "labelsTr" / "case_02.nii.gz", np.full((12, 40, 36), 40001, dtype=np.int32), (2.0, 1.0, 1.0))
    assert "32767" in said(capsys)


@pytest.mark.usefixtures("undrawn")
def test_mistakes_on_the_command_line_are_told_before_an_old_selection_is_looked_at(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(1, num_cases=4)
    assert main(FEW) == 0
    assert "unknown rule" in said(capsys, "-rule", "foo")
    assert "race" in said(capsys, "--race", "-rule", "last")
    assert "-address" in said(capsys, "-address", "tcp://127.0.0.1:1")
    assert "compare views" in said(capsys, "-score", "rankme", "-strength", "2")
    for option in ("-np", "-f", "-num_slices", "-seed", "-strength"):
        with pytest.raises(SystemExit) as stopped:
            main([*FEW, option, "abc"])
        assert stopped.value.code == 2
        assert f"argument {option}: abc is no" in capsys.readouterr().err


def test_a_table_of_patients_that_is_not_used_is_mentioned(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dataset(1, num_cases=6)
    rows = "".join(f"case_{i:02d},p{i // 2}\n" for i in range(6))
    (folder / "patients.csv").write_text(f"case,patient\n{rows}")
    assert main(FEW) == 0
    assert "Pass it with -patients" in capsys.readouterr().err
    assert main([*FEW, "-patients", str(folder / "patients.csv"), "--overwrite"]) == 0
    printed = capsys.readouterr()
    assert "Pass it with -patients" not in printed.err
    assert "3 patients were read, too few for an interval" in printed.err
    content = json.loads((selection() / "selection.json").read_text())
    assert content["choice"]["low"] is None
    assert content["choice"]["probability_of_best_score"] is None
    assert len(content["undecided"]) == 6


def test_scores_of_one_name_are_told_apart_by_their_parameters(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(1, num_cases=4)
    assert main([*FEW, "-score", "contrastive", "robustness:level=1", "robustness:level=2"]) == 0
    out = capsys.readouterr().out
    assert "robustness:level=1" in out
    assert "robustness:level=2" in out
    table = (selection() / "ranking.csv").read_text()
    assert "level=1,pooled=yes" in table


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"checkpoints": []}, "no checkpoint is given"),
        ({"scores": []}, "no score is named"),
        ({"scores": ["contrastive", "contrastive"]}, "named twice"),
        ({"num_slices": 0}, "num_slices is 0"),
        ({"num_cases": 1}, "num_cases is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
    ],
)
def test_wrong_arguments_in_python_are_named(
    make_dataset: Callable[..., Path], arguments: dict[str, Any], named: str
) -> None:
    make_dataset(1, num_cases=4)
    with pytest.raises(UserError, match=named):
        select_checkpoint(**{"dataset": 1, "checkpoints": DEMO_RUN, "num_slices": 12, **arguments})


def test_a_word_is_a_folder_where_it_is_no_dataset(
    make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset(1, num_cases=2)
    for name, where in (("imagesTr", folder), (folder.name, folder.parent), ("1", folder)):
        monkeypatch.chdir(where)
        found, _ = cases_to_score(name, [])
        assert found.reader == ("monai" if name == "imagesTr" else "SimpleITKIO")


def test_python_takes_names_paths_and_leaves_the_module_as_it_was(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=5)
    slices = gather_slices(find_nnunet_dataset(1), 20)
    assert len(find_checkpoints(str(DEMO_RUN))) == 6
    file = DEMO_RUN / "checkpoint-39.pth.tar"
    assert len(find_checkpoints([file, file])) == 1
    (ranking,) = rank_checkpoints(find_checkpoints(file), "test_resnet", slices, "contrastive", rule="last")
    assert ranking.chosen.label == "39"
    assert select_checkpoint(str(folder / "imagesTr"), [str(file)], num_slices=12).ranking.chosen.label == "39"

    class Pyramid(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.Dropout())
            self.body[1].eval()

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.body(x)]

    module = Pyramid()
    modes = [m.training for m in module.modules()]
    score_encoder(module, slices, "contrastive")
    assert [m.training for m in module.modules()] == modes
    with pytest.raises(UserError, match="needs labels"):
        score_encoder(module, slices, "ccfv")
    with pytest.raises(UserError, match=r"\(2, 1, 64, 64\)"):
        score_encoder(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), slices, "contrastive")


def test_a_race_goes_on_where_the_first_patients_lack_a_class(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(1, num_cases=16)
    order = np.random.default_rng([0, 2]).permutation(16)
    for i in range(16):
        if i not in order[-3:]:
            write_image(folder / "labelsTr" / f"case_{i:02d}.nii.gz", np.zeros((12, 40, 36), np.uint8), (2.0, 1.0, 1.0))
    slices = gather_slices(find_nnunet_dataset(1), 48, with_labels=True)
    assert sorted(slices.patients_behind(labelled=True)) == sorted(order[-3:])
    assert len(slices.patients_behind(labelled=False)) == 16
    checkpoints = find_checkpoints(DEMO_RUN)
    for name in ("logme", "ccfv", "probe"):
        (full,) = rank_checkpoints(checkpoints, "test_resnet", slices, name)
        assert all(c.undecided and np.isnan(c.low) for c in full.checkpoints), "three patients decide nothing"
        raced, share = race_checkpoints(checkpoints, "test_resnet", slices, parse_score(name))
        assert share == 1
        assert raced.chosen.label == full.chosen.label


@pytest.mark.parametrize("num_patients", [8, 16, 64])
def test_of_two_equal_checkpoints_a_round_drops_one_as_seldom_as_stated(num_patients: int) -> None:
    rng = np.random.default_rng(num_patients)
    draws = bootstrap_draws(num_patients, 500, 0)
    dropped = 0
    for _ in range(2000):
        terms = rng.normal(size=(2, num_patients))
        dropped += len(survivors(terms.mean(1).tolist(), terms @ draws.T / num_patients, num_patients)) < 2
    # either may be dropped; the bound is four standard errors above
    assert dropped / 2000 < 2 * RISK + 4 * np.sqrt(2 * RISK / 2000)


def test_patients_without_foreground_do_not_make_a_race_surer() -> None:
    rng = np.random.default_rng(0)
    draws = bootstrap_draws(8, 500, 0)
    dropped = 0
    for _ in range(300):
        terms = np.zeros((2, 8))
        terms[:, :4] = rng.normal(size=(2, 4))
        dropped += len(survivors(terms.mean(1).tolist(), terms @ draws.T / 8, num_patients=4)) < 2
    assert dropped <= 3
    samples = np.array([[0.9, 0.91], [0.1, 0.11]])
    assert survivors([0.9, 0.1], samples, num_patients=3) == [0, 1]


def test_draws_without_a_score_put_nobody_out() -> None:
    samples = np.array([[0.9, np.nan, 0.8], [0.5, np.nan, 0.6]])
    assert survivors([0.9, 0.5], np.where(np.arange(3) == 0, samples, np.nan), 20) == [0, 1]
    assert survivors([0.9, 0.1], np.where(np.arange(3) == 1, np.nan, samples), 20) == [0]


def test_ray_finds_what_one_process_finds(make_dataset: Callable[..., Path]) -> None:
    ray = pytest.importorskip("ray", reason="Ray is an optional dependency")
    make_dataset(1, num_cases=6)
    slices = gather_slices(find_nnunet_dataset(1), 24)
    checkpoints = find_checkpoints(DEMO_RUN)[:3]
    (alone,) = rank_checkpoints(checkpoints, "test_resnet", slices, "contrastive")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with workers(2, "ray"):
            (together,) = rank_checkpoints(checkpoints, "test_resnet", slices, "contrastive")
    finally:
        ray.shutdown()
        # Ray's own would keep the workers that later tests fork from being terminated
        signal.signal(signal.SIGTERM, before)
    assert [c.value for c in together.checkpoints] == pytest.approx([c.value for c in alone.checkpoints], rel=1e-5)


def test_two_runs_at_once_leave_one_whole_selection(make_dataset: Callable[..., Path]) -> None:
    make_dataset(1, num_cases=4)
    both = [subprocess.Popen([*COMMAND, *FEW], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 0], [0, 1])
    for process, error in zip(both, errors, strict=True):
        assert "Traceback" not in error
        assert process.returncode == 0 or "exists already" in error
    assert sorted(p.name for p in selection().parent.iterdir()) == ["mtl_selection"]

"""mtl-select-checkpoint in process: what it writes, prints and refuses."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import DEMO_RUN, REAL_DATA, needs_real_data, phantom, write_image
from test_chooser import SCORE

import mtl_nnunet.select
from mtl_nnunet.bootstrap import bootstrap_draws
from mtl_nnunet.cases import find_nnunet_dataset
from mtl_nnunet.checkpoints import find_checkpoints, read_contents
from mtl_nnunet.chooser import SHIPPED, choose_by_expected_loss, read_chooser
from mtl_nnunet.cli.select_checkpoint import main
from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import sha256
from mtl_nnunet.ranking import rank_checkpoints
from mtl_nnunet.scores import parse_score
from mtl_nnunet.select import scores_of_the_chooser
from mtl_nnunet.selection import (
    ENCODER_FILE,
    SELECTION_FILE,
    load_selected_encoder,
    read_selection,
    refuse_foreign_folder,
    write_selection,
)
from mtl_nnunet.slices import gather_slices

FEW = ("-num_slices", "24", "-device", "cpu")


@pytest.fixture
def dataset(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(1, num_cases=6)


def run(*more: str, ckpt: str | Path = DEMO_RUN) -> int:
    return main(["-d", "1", "-ckpt", str(ckpt), *FEW, *more])


def selection_folder() -> Path:
    return Path(os.environ["nnUNet_preprocessed"], "Dataset001_Phantom", "mtl_selection")


def refused(capsys: pytest.CaptureFixture[str], *more: str, ckpt: str | Path = DEMO_RUN) -> str:
    """The one line of a refusal; nothing may be written and nothing printed as a result."""
    capsys.readouterr()
    assert run(*more, ckpt=ckpt) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if line.strip()]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert [line for line in lines if line.startswith("mtl-select-checkpoint: ")] == [lines[-1]]
    left = [p for p in Path(os.environ["nnUNet_preprocessed"]).rglob("*") if p.is_file()]
    assert left == []
    return lines[-1]


def test_writes_the_choice_and_prints_what_to_do_next(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    content = json.loads((selection_folder() / "selection.json").read_text())
    assert {p.name for p in selection_folder().iterdir()} == {
        "selection.json",
        ENCODER_FILE,
        "ranking.csv",
        "report.html",
        *(f"{name}.{ending}" for name in ("ranking", "expected_loss", "slices") for ending in ("png", "svg")),
    }
    assert (selection_folder() / "ranking.png").read_bytes().startswith(b"\x89PNG")
    for printed in (
        "nnUNetv2_plan_and_preprocess -d 1 -c 2d",
        "nnUNetv2_train 1 2d 0 -tr MTLTrainer",
        "last epoch",
        "random",
    ):
        assert printed in out
    assert [c["epoch"] for c in content["checkpoints"]] == [0, 3, 8, 16, 25, 39]
    assert [c["logged_accuracy"] for c in content["checkpoints"]] == [4.68, 17.94, 27.48, 32.48, 34.84, 36.42]
    assert content["choice"]["epoch"] == 39, "without a price the last epoch"
    (chosen_entry,) = [c for c in content["checkpoints"] if c["file"] == content["choice"]["file"]]
    assert content["choice"] == chosen_entry
    assert content["budget"][0]["epoch"] == chosen_entry["epoch"]
    assert sum(c["probability_of_best_score"] for c in content["checkpoints"]) == pytest.approx(1)
    assert all(c["low"] <= c["value"] <= c["high"] for c in content["checkpoints"])
    assert content["dataset"]["num_cases"] == len(content["dataset"]["cases_used"]) == 6
    assert content["slices"]["shape"] == [24, 1, 64, 64]
    chosen = read_contents(DEMO_RUN / chosen_entry["file"]).weights
    written = read_contents(selection_folder() / ENCODER_FILE).weights
    assert set(chosen) - set(written) == set(content["encoder"]["not_loaded"]) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(written[k], chosen[k].float()) for k in written)
    rows = list(csv.DictReader((selection_folder() / "ranking.csv").open()))
    assert [r["chosen"] for r in rows if r["name"] == "contrastive"].count("True") == 1
    assert rows[-1]["file"] == "random"
    assert read_selection(selection_folder()).epoch == chosen_entry["epoch"]


@pytest.mark.usefixtures("undrawn")
def test_the_best_score_chooses_where_asked_to(dataset: Path) -> None:
    assert run("-rule", "best") == 0
    content = json.loads((selection_folder() / "selection.json").read_text())
    assert content["choice"] == max(content["checkpoints"], key=lambda c: c["value"])
    assert content["expected_loss"] is None


def test_same_seed_writes_the_same_bytes_but_for_one_line(dataset: Path) -> None:
    assert run() == 0
    before = {f.name: f.read_bytes() for f in selection_folder().iterdir()}
    assert run("--overwrite") == 0
    after = {f.name: f.read_bytes() for f in selection_folder().iterdir()}
    assert before.keys() == after.keys()
    for name in before.keys() - {"selection.json", "report.html"}:
        assert before[name] == after[name], name
    lines = zip(before["selection.json"].splitlines(), after["selection.json"].splitlines(), strict=True)
    assert {a.split(b":")[0].strip() for a, b in lines if a != b} <= {b'"created"'}
    # the page says what it cost besides, and here the results of the first run were kept
    said = b"\n".join(before["report.html"].splitlines()), b"\n".join(after["report.html"].splitlines())
    first, second = (re.sub(rb'(?s)<section id="cost".*?</section>', b"", page).splitlines() for page in said)
    assert [a for a, b in zip(first, second, strict=True) if a != b and not a.startswith(b"<time ")] == []


@pytest.mark.usefixtures("undrawn")
def test_another_seed_reads_other_slices(dataset: Path) -> None:
    assert run() == 0
    first = (selection_folder() / "ranking.csv").read_text()
    assert run("-seed", "1", "--overwrite") == 0
    assert (selection_folder() / "ranking.csv").read_text() != first


@pytest.mark.usefixtures("undrawn")
def test_json_alone_on_stdout(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((selection_folder() / "selection.json").read_text())


@pytest.mark.usefixtures("undrawn")
def test_published_score_with_parameters(dataset: Path) -> None:
    assert run("-score", "robustness:level=5,distance=l2", "-rule", "best") == 0
    content = json.loads((selection_folder() / "selection.json").read_text())
    assert content["score"]["parameters"] == {"level": 5, "pooled": True, "distance": "l2", "margin": 0.5}
    assert content["choice"] == min(content["checkpoints"], key=lambda c: c["value"])


@pytest.mark.usefixtures("undrawn")
def test_expected_loss_is_the_default(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr()
    content = json.loads((selection_folder() / "selection.json").read_text())
    epochs = [c["epoch"] for c in content["checkpoints"]]
    by_hand = choose_by_expected_loss(read_chooser(), epochs, None, encoder="test_resnet")
    assert content["choice"]["epoch"] == epochs[by_hand.index]
    assert [c["expected_loss"] for c in content["expected_loss"]["checkpoints"]] == pytest.approx(
        list(by_hand.expected_loss)
    )
    assert content["expected_loss"]["chooser_sha256"] == sha256(SHIPPED)
    assert by_hand.text in printed.out
    # its evidence is in the epochs: nothing is computed for its sake
    assert content["other_scores"] == []


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_cut_short_is_judged_as_a_part_of_the_planned_one(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shutil.copytree(DEMO_RUN, tmp_path / "cut")
    for late in ("25", "39"):
        (cut / f"checkpoint-{late}.pth.tar").unlink()
    assert run("-rule", "expected-loss:price=1", ckpt=cut) == 0
    said = capsys.readouterr().out
    content = json.loads((selection_folder() / "selection.json").read_text())
    epochs = [c["epoch"] for c in content["checkpoints"]]
    assert epochs == [0, 3, 8, 16]
    by_hand = choose_by_expected_loss(
        read_chooser(), epochs, None, price=1, encoder="test_resnet", pretraining_epochs=39
    )
    as_whole = choose_by_expected_loss(read_chooser(), epochs, None, price=1, encoder="test_resnet")
    told = [c["expected_loss"] for c in content["expected_loss"]["checkpoints"]]
    assert told == pytest.approx(list(by_hand.expected_loss))
    assert told != pytest.approx(list(as_whole.expected_loss))
    first = content["budget"][0]
    assert (first["last"], first["latest"], first["saved_share"]) == (39, 16, (39 - first["epoch"]) / 40)
    assert "of the planned run" in said
    assert "up to epoch 16" in said


@pytest.mark.filterwarnings("default::mtl_nnunet.errors.AssumedWarning")
def test_of_several_runs_the_score_chooses(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"a": ("3", "16"), "b": ("8", "39")}
    for name, epochs in runs.items():
        (tmp_path / name).mkdir()
        for epoch in epochs:
            shutil.copy(DEMO_RUN / f"checkpoint-{epoch}.pth.tar", tmp_path / name)
    both = ["-d", "1", "-ckpt", *(str(tmp_path / name) for name in runs), *FEW]
    assert main([*both, "-rule", "expected-loss"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "these checkpoints are of 2" in last
    assert "-rule best" in last
    assert main(both) == 0
    assert "are taken as of 2 runs" in capsys.readouterr().err
    content = json.loads((selection_folder() / "selection.json").read_text())
    assert content["rule"] == "best score"
    assert content["choice"] == max(content["checkpoints"], key=lambda c: c["value"])
    assert content["budget"] == []


@pytest.mark.parametrize("asked", [(), ("-score", "robustness", "infonce")])
@pytest.mark.usefixtures("undrawn")
def test_a_chooser_weighs_the_scores_it_was_fitted_with(
    dataset: Path, capsys: pytest.CaptureFixture[str], chooser_file: Path, asked: tuple[str, ...]
) -> None:
    assert run(*asked, "-rule", "expected-loss:price=3", "-chooser", str(chooser_file)) == 0
    printed = capsys.readouterr()
    content = json.loads((selection_folder() / "selection.json").read_text())
    rows = list(csv.DictReader((selection_folder() / "ranking.csv").open(newline="")))
    robust = [r for r in rows if r["name"] == "robustness" and r["epoch"]]
    # lower is better there, and the chooser takes what is higher
    values = {f"robustness:{robust[0]['parameters']}": [-float(r["score"]) for r in robust]}
    epochs = [int(r["epoch"]) for r in robust]
    by_hand = choose_by_expected_loss(read_chooser(chooser_file), epochs, values, price=3, encoder="test_resnet")
    assert by_hand.used
    told = content["expected_loss"]
    assert content["choice"]["epoch"] == epochs[by_hand.index]
    assert [c["expected_loss"] for c in told["checkpoints"]] == pytest.approx(list(by_hand.expected_loss))
    assert told["warnings"] == list(by_hand.warnings)
    assert told["chooser_sha256"] == sha256(chooser_file)
    assert by_hand.text in printed.out
    assert "by mine.json" in content["rule"]
    assert all(f"warning: Expected loss: {text}" in printed.err for text in by_hand.warnings)
    # only the ranking that chose says what is lost
    assert [bool(r["expected_loss"]) for r in rows] == [r["name"] == rows[0]["name"] and bool(r["epoch"]) for r in rows]
    assert len([r for r in rows if r["chosen"] == "True" and r["name"] == rows[0]["name"]]) == 1


def test_a_chooser_goes_with_expected_loss(
    dataset: Path, capsys: pytest.CaptureFixture[str], chooser_file: Path, tmp_path: Path
) -> None:
    assert "rule expected-loss" in refused(capsys, "-rule", "best", "-chooser", str(chooser_file))
    assert "race" in refused(capsys, "--race", "-chooser", str(chooser_file))
    assert "no-such.json" in refused(capsys, "-chooser", str(tmp_path / "no-such.json"))


def test_a_chooser_that_reads_a_score_of_another_program_is_named(chooser_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(chooser_file.read_text().replace(SCORE, "my_score"))
    with pytest.raises(
        UserError, match=r"chooser .*other\.json goes by scores .*unknown score 'my_score'.*fit-chooser"
    ):
        scores_of_the_chooser("free", [], other)


@pytest.mark.usefixtures("undrawn")
def test_the_other_rules_say_nothing_of_losses(dataset: Path) -> None:
    assert run("-rule", "last") == 0
    assert json.loads((selection_folder() / "selection.json").read_text())["expected_loss"] is None


@pytest.mark.usefixtures("undrawn")
def test_views_of_another_kind_are_not_what_the_chooser_knows(dataset: Path, chooser_file: Path) -> None:
    rule = ("-rule", "expected-loss:price=3", "-chooser", str(chooser_file))
    assert run("-score", "robustness", "-views", "scanner", *rule) == 0
    content = json.loads((selection_folder() / "selection.json").read_text())
    own = content["other_scores"][0]
    assert own["score"]["views"] == "paper"
    values = [-c["value"] for c in own["checkpoints"]]
    epochs = [c["epoch"] for c in content["checkpoints"]]
    by_hand = choose_by_expected_loss(read_chooser(chooser_file), epochs, {SCORE: values}, price=3)
    assert [c["expected_loss"] for c in content["expected_loss"]["checkpoints"]] == pytest.approx(
        list(by_hand.expected_loss)
    )


@pytest.mark.usefixtures("undrawn")
def test_training_is_told_that_the_moving_average_was_chosen(dataset: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    ema = timm.utils.ModelEmaV3(timm.create_model("test_resnet", num_classes=5))
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model="test_resnet"),
        model_ema=ema,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, 10.0)
    assert run("-weights", "ema", ckpt=tmp_path) == 0
    chosen = read_selection(selection_folder())
    assert chosen.weights == chosen.record()["weights"] == "ema"
    assert "epoch 0, ema weights" in chosen.summary
    written = read_contents(selection_folder() / ENCODER_FILE).weights
    assert all(torch.equal(v, ema.module.state_dict()[k]) for k, v in written.items())


@pytest.mark.usefixtures("undrawn")
def test_images_without_nnunet(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    shutil.copytree(dataset / "imagesTr", images)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name)
    assert main(["-i", str(images), "-ckpt", str(DEMO_RUN), *FEW, "-o", str(tmp_path / "chosen")]) == 0
    assert read_selection(tmp_path / "chosen").dataset == "images"
    assert main(["-i", str(images), "-ckpt", str(DEMO_RUN), *FEW]) == 1


@pytest.mark.usefixtures("undrawn")
def test_patients_share_cases(dataset: Path, tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\n" + "".join(f"case_{i:02d},p{i // 2}\n" for i in range(6)))
    assert run("-patients", str(table)) == 0
    content = json.loads((selection_folder() / "selection.json").read_text())
    assert content["dataset"]["num_patients"] == 3
    assert [c["patient"] for c in content["dataset"]["cases_used"]] == ["p0", "p0", "p1", "p1", "p2", "p2"]


@pytest.mark.usefixtures("undrawn")
def test_existing_selection_is_kept_unless_told(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    before = (selection_folder() / "selection.json").read_bytes()
    assert run("-seed", "3") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (selection_folder() / "selection.json").read_bytes() == before


def test_folder_that_is_no_selection_is_never_replaced(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    assert run("-o", str(tmp_path / "home"), "--overwrite") == 1
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


def broken_image(dataset: Path, what: str) -> None:
    file = dataset / "imagesTr" / "case_03_0000.nii.gz"
    voxels = phantom((12, 40, 36), seed=1)[0][0]
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif what == "empty":
        file.write_bytes(b"")
    elif what == "text":
        file.write_text("not an image")
    elif what == "nan":
        voxels[3, 3, 3] = np.nan
        write_image(file, voxels, (2, 1, 1))
    elif what == "constant":
        write_image(file, np.full_like(voxels, 7), (2, 1, 1))
    elif what == "label of another shape":
        write_image(file, voxels[:-1], (2, 1, 1))


@pytest.mark.parametrize("what", ["truncated", "empty", "text", "nan", "constant", "label of another shape"])
def test_broken_image_is_named_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    broken_image(dataset, what)
    assert "case_03" in refused(capsys)


@pytest.mark.parametrize("what", ["truncated", "empty", "text"])
def test_broken_first_image_is_named_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    for name in ("case_00", "case_01", "case_02"):
        (dataset / "imagesTr" / f"{name}_0000.nii.gz").unlink()
        (dataset / "labelsTr" / f"{name}.nii.gz").unlink()
    broken_image(dataset, what)
    assert "case_03" in refused(capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "labelsTr" / "case_02.nii.gz").unlink(), "case_02.nii.gz does not exist"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json cannot be read as JSON"),
        (lambda d: (d / "dataset.json").write_text('{"labels": {}}'), "no nnU-Net v2 dataset.json"),
        (lambda d: (d / "dataset.json").unlink(), "dataset.json does not exist"),
        (lambda d: shutil.rmtree(d / "imagesTr"), "imagesTr does not exist"),
        (lambda d: [p.unlink() for p in (d / "imagesTr").glob("case_0[1-5]*")], "holds 1 case"),
        (lambda d: shutil.copytree(d, d.with_name("Dataset001_Twin")), "several datasets"),
        (lambda d: shutil.rmtree(d), "no dataset 1"),
    ],
)
def test_broken_dataset_is_named_in_one_line(
    dataset: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object], said: str
) -> None:
    change(dataset)
    assert said in refused(capsys)


def test_missing_channel_is_named_in_one_line(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(1, num_cases=4, channel_names=("T1", "T2"))
    (dataset / "imagesTr" / "case_02_0001.nii.gz").unlink()
    assert "case_02" in refused(capsys)
    for file in (dataset / "imagesTr").glob("*_0001.nii.gz"):
        file.unlink()
    assert "1 channels, but the dataset names 2" in refused(capsys)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_unset_variable_is_named_in_one_line(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv(variable)
    assert run() == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert f"{variable} is not set" in err[0]


def test_patients_that_leave_no_negative_are_refused(
    dataset: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\n" + "".join(f"case_{i:02d},same\n" for i in range(6)))
    assert "of one patient" in refused(capsys, "-patients", str(table))
    table.write_text("case,patient\ncase_00,a\n")
    assert "no patient for 5 cases" in refused(capsys, "-patients", str(table))
    table.write_text("who,what\n")
    assert "case,patient" in refused(capsys, "-patients", str(table))


def test_broken_checkpoints_are_named_in_one_line(
    dataset: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(DEMO_RUN, run_folder)
    file = run_folder / "checkpoint-8.pth.tar"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert "checkpoint-8.pth.tar cannot be read" in refused(capsys, ckpt=run_folder)
    file.write_bytes(whole)
    content = torch.load(file, weights_only=True)
    content["state_dict"]["conv1.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(content, file)
    assert "checkpoint-8.pth.tar holds NaN" in refused(capsys, ckpt=run_folder)
    file.write_bytes(whole)
    assert "does not fit timm encoder 'resnet18'" in refused(capsys, "-encoder", "resnet18")
    assert "knows no encoder 'resnet5O'" in refused(capsys, "-encoder", "resnet5O")
    assert "no checkpoint in" in refused(capsys, ckpt=dataset)
    torch.save({"conv.weight": torch.ones(8, 3, 3, 3)}, tmp_path / "plain.pth")
    assert "-encoder NAME" in refused(capsys, ckpt=tmp_path / "plain.pth")


@pytest.mark.filterwarnings("default::mtl_nnunet.errors.AssumedWarning")
@pytest.mark.usefixtures("undrawn")
def test_a_plain_state_dict_tells_its_network_by_its_tensors(
    dataset: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.save(read_contents(DEMO_RUN / "checkpoint-39.pth.tar").weights, tmp_path / "plain.pth")
    assert run(ckpt=tmp_path / "plain.pth") == 0
    said = [
        line for line in capsys.readouterr().err.splitlines() if "its tensors fit test_resnet, which is taken" in line
    ]
    assert len(said) == 1
    assert read_selection(selection_folder()).encoder == "test_resnet"


def test_unknown_score_or_level_is_named_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Available: alignment, ccfv, contrastive" in refused(capsys, "-score", "accuracy")
    assert "levels 1 to 5" in refused(capsys, "-score", "contrastive:level=7")


@pytest.mark.parametrize(
    "arguments", [[], ["-d", "1"], ["-d", "1", "-i", "x", "-ckpt", "y"], ["-d", "1", "-ckpt", "y", "-num_slices", "1"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_verbose_shows_the_traceback(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-score", "accuracy", "--verbose") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("mtl-select-checkpoint: unknown score")


def test_help_imports_nothing_heavy() -> None:
    for module in ("select_checkpoint", "main"):
        code = (
            f"import sys; from mtl_nnunet.cli.{module} import build_parser; build_parser().format_help();"
            "print([m for m in ('torch', 'monai', 'nnunetv2', 'timm', 'numpy', 'SimpleITK', 'matplotlib') if m in sys.modules])"
        )
        assert (
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
            == "[]"
        )


def test_full_disk_leaves_nothing_and_is_said_in_one_line(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        line = refused(capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not write" in line
    assert not list(Path(os.environ["nnUNet_preprocessed"]).rglob("*.tmp"))


def test_order_of_the_checkpoints_leaves_the_ranking_alone(dataset: Path) -> None:
    slices = gather_slices(find_nnunet_dataset(1), 24)
    score = parse_score("contrastive")
    checkpoints = find_checkpoints([DEMO_RUN])
    (there,) = rank_checkpoints(checkpoints, "test_resnet", slices, score)
    (back,) = rank_checkpoints(checkpoints[::-1], "test_resnet", slices, score)
    assert there.checkpoints == back.checkpoints[::-1]
    assert there.chosen == back.chosen
    assert there.random == back.random


def test_equal_checkpoints_tie(dataset: Path, tmp_path: Path) -> None:
    content = torch.load(DEMO_RUN / "checkpoint-39.pth.tar", weights_only=True)
    for epoch in (1, 2):
        torch.save({**content, "epoch": epoch}, tmp_path / f"checkpoint-{epoch}.pth.tar")
    slices = gather_slices(find_nnunet_dataset(1), 24)
    (ranking,) = rank_checkpoints(find_checkpoints([tmp_path]), "test_resnet", slices, parse_score("contrastive"))
    assert [c.probability_of_best_score for c in ranking.checkpoints] == [0.5, 0.5]
    assert all(c.undecided for c in ranking.checkpoints)
    assert ranking.chosen.label == "2", "of equal scores the later epoch"
    (back,) = rank_checkpoints(find_checkpoints([tmp_path])[::-1], "test_resnet", slices, parse_score("contrastive"))
    assert back.chosen == ranking.chosen
    assert back.last == ranking.last


def test_bootstrap_draws_patients_with_replacement() -> None:
    draws = bootstrap_draws(9, 500, seed=0)
    assert (draws.sum(1) == 9).all()
    assert draws.mean(0) == pytest.approx(np.ones(9), abs=0.15)
    assert (draws == bootstrap_draws(9, 500, seed=0)).all()


@needs_real_data
def test_real_run_on_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(REAL_DATA))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    run_folder = REAL_DATA / "pretraining" / "test_resnet"
    assert main(["-d", "4", "-ckpt", str(run_folder), "-num_slices", "64", "-device", "cpu"]) == 0
    content = json.loads((tmp_path / "Dataset004_Hippocampus" / "mtl_selection" / "selection.json").read_text())
    assert [c["epoch"] for c in content["checkpoints"]] == [0, 1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 35, 39]
    assert content["checkpoints"][-1]["logged_accuracy"] == 36.42
    assert content["choice"]["value"] > content["random_initialisation"]["value"]


def test_a_checkpoint_that_was_written_to_while_it_was_scored_is_not_selected(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Path(shutil.copy(DEMO_RUN / "checkpoint-0.pth.tar", tmp_path / "last.pth.tar"))

    def written_meanwhile(*arguments: Any) -> Any:
        shutil.copy(DEMO_RUN / "checkpoint-39.pth.tar", last)
        return write_selection(*arguments)

    monkeypatch.setattr(mtl_nnunet.select, "write_selection", written_meanwhile)
    assert "was written to in the meantime" in refused(capsys, "-rule", "best", ckpt=last)


@pytest.mark.usefixtures("undrawn")
def test_a_network_of_one_channel_is_selected_and_trained_from(dataset: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", in_chans=1)
    torch.save({"arch": "test_resnet", "epoch": 3, "state_dict": model.state_dict()}, tmp_path / "checkpoint-3.pth.tar")
    assert run(ckpt=tmp_path / "checkpoint-3.pth.tar") == 0
    # what MTLTrainer does with its network's encoder
    encoder = TimmEncoder("test_resnet", 1)
    load_selected_encoder(read_selection(selection_folder()), encoder)
    first = f"{model.pretrained_cfg['first_conv']}.weight"
    assert torch.equal(encoder.timm.model.state_dict()[first], model.state_dict()[first])


def test_what_a_file_browser_left_in_a_selection_is_no_hindrance(tmp_path: Path) -> None:
    for name in (SELECTION_FILE, ".DS_Store"):
        (tmp_path / name).write_text("{}")
    refuse_foreign_folder(tmp_path, overwrite=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        refuse_foreign_folder(tmp_path, overwrite=True)

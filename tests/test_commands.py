"""mtl-nnunet trainers and plans, in process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_RUN
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mtl_nnunet.cli.command import answers_json
from mtl_nnunet.cli.main import build_parser, main, trainers_folder
from mtl_nnunet.cli.select_checkpoint import build_parser as select_parser
from mtl_nnunet.cli.select_checkpoint import main as select
from mtl_nnunet.cli.watch_pretraining import build_parser as watch_parser
from mtl_nnunet.cli.watch_pretraining import main as watch
from mtl_nnunet.errors import UserError
from mtl_nnunet.plans import NETWORK, with_timm_unet

NAME = "Dataset001_Phantom"
RECORD = {"encoder": "test_resnet", "input_channels": 1, "encoder_sha256": "0" * 64}


def stock_plans(folder: Path) -> dict[str, Any]:
    """Plans as nnU-Net writes them, reduced to what is read here, with 2D, 3D and cascade configurations."""
    architecture = {"network_class_name": "x.PlainConvUNet", "_kw_requires_import": []}
    flat = {**architecture, "arch_kwargs": {"n_stages": 4, "strides": [[1, 1], *[[2, 2]] * 3]}}
    kwargs = {"strides": [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 2], "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 3]}
    deep = {**architecture, "arch_kwargs": {"n_stages": 4, **kwargs}}
    plans = {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "configurations": {
            "2d": {
                "data_identifier": "nnUNetPlans_2d",
                "patch_size": [56, 40],
                "batch_size": 12,
                "architecture": flat,
            },
            "3d_fullres": {"patch_size": [40, 56, 40], "batch_size": 2, "architecture": deep},
            "3d_lowres": {"patch_size": [40, 56, 40], "batch_size": 2, "architecture": deep},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            "2d_small": {"inherits_from": "2d", "batch_size": 4},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return plans


def test_trainers_are_joined_with_what_the_variable_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = str(trainers_folder())
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert main(["trainers"]) == 0
    assert capsys.readouterr().out.strip() == ours
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["/somebody/elses", ours, ""]))
    assert main(["trainers"]) == 0
    both = os.pathsep.join([ours, "/somebody/elses"])
    assert capsys.readouterr().out.strip() == both
    assert main(["trainers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"nnUNet_extTrainer": both, "folder": ours}


def test_plans_change_the_network_and_nothing_about_the_data(tmp_path: Path) -> None:
    plans = stock_plans(tmp_path)
    before = json.dumps(plans)
    changed = with_timm_unet(plans, "2d", RECORD)
    assert json.dumps(plans) == before
    configuration = changed["configurations"]["2d"]
    assert configuration["patch_size"] == [64, 64]
    assert configuration["architecture"]["network_class_name"] == "mtl_nnunet.network.TimmUNet"
    for key in ("data_identifier", "batch_size"):
        assert configuration[key] == plans["configurations"]["2d"][key]
    assert changed["mtl_nnunet"] == RECORD
    rest = {k: v for k, v in changed["configurations"].items() if k != "2d"}
    assert rest == {k: v for k, v in plans["configurations"].items() if k != "2d"}


def test_configuration_that_inherits_gets_the_network_too(tmp_path: Path) -> None:
    changed = with_timm_unet(stock_plans(tmp_path), "2d_small", RECORD)
    assert changed["configurations"]["2d_small"]["patch_size"] == [64, 64]
    assert changed["configurations"]["2d_small"]["batch_size"] == 4


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_lowres", "3d_cascade_fullres"])
def test_volumes_get_the_depth_that_nnunet_planned(tmp_path: Path, configuration: str) -> None:
    changed = with_timm_unet(stock_plans(tmp_path), configuration, RECORD)["configurations"][configuration]
    kwargs = changed["architecture"]["arch_kwargs"]
    assert kwargs["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]]
    assert kwargs["kernel_sizes"] == [[1, 3, 3], *[[3, 3, 3]] * 5]
    assert changed["patch_size"] == [40, 64, 64]
    assert kwargs.get("image_channels") == (1 if configuration == "3d_cascade_fullres" else None)


def test_plans_in_any_order_give_the_same(tmp_path: Path) -> None:
    plans = stock_plans(tmp_path)
    names = ["3d_fullres", "3d_cascade_fullres"]
    made = []
    for order in (names, names[::-1]):
        changed = plans
        for configuration in order:
            changed = with_timm_unet(changed, configuration, RECORD)
        made.append([changed["configurations"][n] for n in names])
    assert made[0] == made[1]


def test_inflation_that_plans_name_is_kept(tmp_path: Path) -> None:
    changed = with_timm_unet(stock_plans(tmp_path), "3d_fullres", RECORD)
    kwargs = changed["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["inflation"] == "averaged"
    kwargs["inflation"] = "centred"
    assert with_timm_unet(changed, "3d_fullres", RECORD) == changed


def test_encoders_that_are_flat_only_are_refused_for_volumes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be made three-dimensional"):
        with_timm_unet(stock_plans(tmp_path), "3d_fullres", {**RECORD, "encoder": "swin_tiny_patch4_window7_224"})


@pytest.mark.parametrize("missing", ["architecture", "patch_size"])
def test_plans_of_another_version_of_nnunet_are_refused_with_one_message(tmp_path: Path, missing: str) -> None:
    plans = stock_plans(tmp_path)
    del plans["configurations"]["3d_fullres"][missing]
    with pytest.raises(UserError, match="another version of nnU-Net"):
        with_timm_unet(plans, "3d_fullres", RECORD)


def test_plans_that_somebody_wrote_for_timm_unet_keep_their_width(tmp_path: Path) -> None:
    changed = with_timm_unet(stock_plans(tmp_path), "2d", RECORD)
    changed["configurations"]["2d"]["architecture"]["arch_kwargs"]["stem_channels"] = 16
    again = with_timm_unet(changed, "2d", {**RECORD, "encoder": "test_convnext"})
    kwargs = again["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert kwargs["stem_channels"] == 16
    assert kwargs["encoder"] == "test_convnext"
    assert kwargs["strides"] == [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]


@pytest.mark.usefixtures("undrawn")
def test_plans_command_writes_a_file_of_another_name(make_dataset, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(1)
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    checkpoint = str(DEMO_RUN / "checkpoint-39.pth.tar")
    assert select(["-d", "1", "-ckpt", checkpoint, "-num_slices", "12", "-device", "cpu"]) == 0
    stock_plans(folder)
    stock = (folder / "nnUNetPlans.json").read_bytes()
    assert main(["plans", "-d", "1", "-o", "nnUNetPlansMTL"]) == 0
    assert "-tr MTLTrainer -p nnUNetPlansMTL" in capsys.readouterr().out
    written = json.loads((folder / "nnUNetPlansMTL.json").read_text())
    assert written["plans_name"] == "nnUNetPlansMTL"
    assert written["mtl_nnunet"]["folder"] == "mtl_selection"
    assert [c["architecture"]["network_class_name"] for c in written["configurations"].values()] == [NETWORK] * 5
    assert (folder / "nnUNetPlans.json").read_bytes() == stock
    assert main(["plans", "-d", "1", "-o", "slow", "-recipe", "lr=1e-4,frozen_epochs=all"]) == 0
    capsys.readouterr()
    assert json.loads((folder / "slow.json").read_text())["mtl_nnunet"]["recipe"] == {
        "lr": "1e-4",
        "frozen_epochs": "all",
    }
    assert main(["plans", "-d", "1", "-o", "flat", "-c", "2d", "3d_fullres", "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["configurations"] == {
        "2d": {"patch_size": [64, 64], "batch_size": 12},
        "3d_fullres": {"patch_size": [40, 64, 64], "batch_size": 2},
    }
    assert told["file"] == str(folder / "flat.json")
    assert f"written: {folder / 'flat.json'}" in printed.err
    assert told["next"][0] in printed.err
    kept = PlansManager(json.loads((folder / "flat.json").read_text()))
    stock_manager = PlansManager(json.loads(stock))
    for inheriting in ("2d_small", "3d_cascade_fullres"):
        ours, theirs = (m.get_configuration(inheriting).configuration for m in (kept, stock_manager))
        assert ours == theirs, "what inherits from a changed configuration stays nnU-Net's"
    for arguments, said in (
        (["-o", "nnUNetPlansMTL"], "exist already"),
        (["-o", "nnUNetPlans", "--overwrite"], "exist already"),
        (["-o", "other", "-p", "nothing"], "nothing.json does not exist"),
        (["-o", "other", "-selection", "nowhere"], "no selection in nowhere"),
        (["-o", "other", "-recipe", "lr=fast"], "-recipe=lr=fast: lr=fast makes no sense"),
    ):
        assert main(["plans", "-d", "1", *arguments]) == 1
        err = capsys.readouterr().err.strip().splitlines()
        assert len(err) == 1, err
        assert said in err[0]
    assert main(["plans", "-d", "77", "-o", "x"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        (select, ["-d", "1", "-ckpt", "x", "-overwrite"]),
        (watch, ["-d", "1", "-run", "x", "-o", "y", "-once"]),
        (main, ["plans", "-d", "1", "-o", "mine", "-overwrite"]),
        (main, ["plans", "-d", "1", "-o", "mine", "-overwrit"]),
        (main, ["plans", "-d", "1", "-o", "mine", "-overwrite=1"]),
    ],
)
def test_a_lost_dash_is_no_name_of_a_folder(command: Any, typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # to argparse these are -o verwrite and -o nce
    with pytest.raises(SystemExit) as stopped:
        command(typed)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"unknown option {typed[-1].partition('=')[0]}. Did you mean --" in said


@pytest.mark.parametrize(
    "typed",
    [
        ["-d", "1", "-run", "run", "-o", "w", "-rule", "patience"],
        ["-d", "1", "-run", "labels", "-o", "once", "-num_sl", "3"],
        ["-i", "i", "-run", "weights", "-o", "overwrite"],
    ],
)
def test_words_that_are_called_like_options_are_words(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(typed) == 1
    assert "unknown option" not in capsys.readouterr().err


def test_json_of_a_bundle_names_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my bundle"
    assert main(["bundle", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(folder)
    assert (folder / "configs" / "select.yaml").is_file()
    assert told["next"][0] == f"cd '{folder}'"


def test_every_command_answers_in_json() -> None:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for parser in (select_parser(), watch_parser(), *commands.choices.values()):
        assert "--json" in parser.format_help(), parser.prog


def test_with_json_what_other_programs_print_goes_to_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(args: argparse.Namespace) -> dict[str, Any]:
        print("printed")
        subprocess.run(["echo", "from elsewhere"], check=True)
        return {"args": args.json}

    answers_json(noisy)(argparse.Namespace(json=True))
    printed = capfd.readouterr()
    assert json.loads(printed.out) == {"args": True}
    assert sorted(printed.err.split("\n")) == ["", "from elsewhere", "printed"]
    answers_json(noisy)(argparse.Namespace(json=False))
    assert capfd.readouterr().out.split() == ["printed", "from", "elsewhere"]


def test_with_json_what_is_written_to_a_stream_that_was_kept_goes_to_stderr() -> None:
    code = """
import argparse, sys
from mtl_nnunet.cli.command import answers_json
kept = sys.stdout
answers_json(lambda _: {"written": kept.write("from a handler\\n")})(argparse.Namespace(json=True))
"""
    # as users have it: buffered
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"written": 15}
    assert done.stderr == "from a handler\n"


def test_folds_and_checkpoint_of_a_bundle_need_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["-f", "0"], ["-chk", "checkpoint_best.pth"]):
        assert main(["bundle", str(tmp_path / "mine"), *option]) == 1
        assert "pass -model FOLDER too" in capsys.readouterr().err
    assert main(["bundle", str(tmp_path / "mine"), "-model", str(tmp_path)]) == 1
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("typed", "kept"), [([], True), (["--no-cache"], False), (["--race"], False)]
)  # fmt: skip
def test_an_interrupted_selection_says_what_is_kept(
    typed: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtl_nnunet.cli.select_checkpoint.select", interrupted)
    assert select(["-d", "1", "-ckpt", "x", *typed]) == 130
    said = capsys.readouterr().err
    assert "interrupted before it was finished" in said
    assert ("what was scored is in the cache" in said) == kept


@pytest.mark.parametrize("typed", [["--verbose", "bundle"], ["bundle", "--verbose"]])
def test_verbose_is_taken_on_either_side_of_the_commands_name(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*typed, str(tmp_path), "-f", "0"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_command_leaves_its_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    before = dict(os.environ)
    assert main(["bundle", str(tmp_path / "bundle")]) == 0
    assert dict(os.environ) == before

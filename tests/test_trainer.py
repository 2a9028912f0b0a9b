"""MTLTrainer inside nnU-Net: what it starts from, how it learns, what it saves and what it refuses."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_RUN, write_phantoms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from timm.models import adapt_input_conv

import mtl_nnunet.variants as trainers
from mtl_nnunet.checkpoints import read_contents
from mtl_nnunet.cli.main import trainers_folder
from mtl_nnunet.cli.select_checkpoint import main as select
from mtl_nnunet.errors import UserError
from mtl_nnunet.recipe import EpochwiseLR
from mtl_nnunet.trainer import MTLTrainer
from mtl_nnunet.variants import VARIANTS

CPU = torch.device("cpu")
NAME = "Dataset007_Phantom"


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's three folders with a dataset that is selected for, planned and preprocessed, by the real commands."""
    root = tmp_path_factory.mktemp("planned")
    write_phantoms(root / "raw" / NAME, num_cases=5, shape=(6, 56, 40))
    environment = {
        **os.environ,
        **{f"nnUNet_{k}": str(root / k) for k in ("raw", "preprocessed", "results")},
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
    }
    (root / "preprocessed").mkdir()
    bin_folder = Path(sys.executable).parent
    for command in (
        ["mtl-select-checkpoint", "-d", "7", "-ckpt", str(DEMO_RUN), "-num_slices", "20", "-device", "cpu"],
        ["nnUNetv2_plan_and_preprocess", "-d", "7", "-c", "2d", "-np", "1", "-npfp", "1"],
    ):
        subprocess.run([bin_folder / command[0], *command[1:]], env=environment, check=True, capture_output=True)
    return root


@pytest.fixture
def folders(planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the planned dataset that a test may spoil."""
    shutil.copytree(planned, tmp_path / "nn")
    (tmp_path / "nn" / "results").mkdir(exist_ok=True)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / "nn" / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    return tmp_path / "nn"


def make(cls: type[Any], folders: Path, fold: int = 0, resume: bool = False, plans_name: str = "nnUNetPlans") -> Any:
    """As nnU-Net's own ``get_trainer_from_args`` does."""
    dataset = folders / "preprocessed" / NAME
    plans = json.loads((dataset / f"{plans_name}.json").read_text())
    plans["continue_training"] = resume
    description = json.loads((dataset / "dataset.json").read_text())
    return cls(plans=plans, configuration="2d", fold=fold, dataset_json=description, device=CPU)


def started(trainer: Any) -> Any:
    """The trainer as it is after its first steps: initialised, its model folder claimed, one value logged for an epoch."""
    trainer.initialize()
    trainer._claim_model_folder()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    for key in ("train_losses", "val_losses", "mean_fg_dice", "lrs"):
        trainer.logger.log(key, torch.tensor(0.5).numpy()[()], 0)
    trainer._best_ema = trainer.logger.get_value("ema_fg_dice", step=-1)
    return trainer


def selected_weights(folders: Path) -> dict[str, torch.Tensor]:
    return read_contents(folders / "preprocessed" / NAME / "mtl_selection" / "encoder.safetensors").weights


def select_again(folders: Path, run: Path, *more: str) -> None:
    arguments = ["-d", "7", "-ckpt", str(run), "-num_slices", "20", "-device", "cpu", *more]
    assert select(arguments) == 0


@pytest.fixture
def other_run(tmp_path: Path) -> Path:
    """A run whose only checkpoint is not the one selected in ``planned``."""
    run = tmp_path / "other_run"
    run.mkdir()
    shutil.copy(DEMO_RUN / "checkpoint-0.pth.tar", run)
    return run


def test_nnunet_finds_every_class_that_the_folder_of_trainers_exports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "somebody_elses_trainer.py").write_text("class NotThisOne: pass\n")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(trainers_folder())]))
    ours = [n for n, c in vars(trainers).items() if isinstance(c, type) and issubclass(c, MTLTrainer)]
    assert len(ours) == 45
    for name in ours:
        assert recursive_find_trainer_class_by_name(name) is getattr(trainers, name)


def test_constructor_has_the_signature_that_nnunet_records() -> None:
    for cls in (MTLTrainer, VARIANTS["MTLTrainer_5epochs"], VARIANTS["MTLTrainerScratch_1epoch"]):
        ours = inspect.signature(cls.__init__).parameters
        stock = inspect.signature(nnUNetTrainer.__init__).parameters
        assert list(ours) == list(stock)
        assert [p.default for p in ours.values()] == [p.default for p in stock.values()]


def test_encoder_holds_the_selected_weights_and_nothing_else_does(folders: Path) -> None:
    trainer = make(MTLTrainer, folders)
    trainer.initialize()
    network = trainer.network
    weights = selected_weights(folders)
    first = "conv1.0.weight"
    own = network.encoder.timm.model.state_dict()
    assert set(own) == set(weights)
    for key, tensor in own.items():
        expected = adapt_input_conv(1, weights[key].clone()) if key == first else weights[key]
        assert torch.equal(tensor, expected), key
    assert own[first].shape[1] == 1
    assert type(network).__name__ == "TimmUNet"
    assert trainer.configuration_manager.patch_size == [64, 64]
    log = Path(trainer.log_file).read_text()
    selection = json.loads((folders / "preprocessed" / NAME / "mtl_selection" / "selection.json").read_text())
    for said in (
        selection["choice"]["file"],
        f"epoch {selection['choice']['epoch']}",
        selection["encoder"]["sha256"][:12],
    ):
        assert said in log


def test_scratch_is_the_same_network_from_random_weights(folders: Path) -> None:
    scratch, pretrained = make(VARIANTS["MTLTrainerScratch_1epoch"], folders), make(MTLTrainer, folders)
    scratch.initialize(), pretrained.initialize()
    a, b = scratch.network.state_dict(), pretrained.network.state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert not torch.equal(a["encoder.timm.model.layer1.0.conv1.weight"], b["encoder.timm.model.layer1.0.conv1.weight"])
    rates = {g["lr"] for g in scratch.optimizer.param_groups}
    assert len(rates) == 1


def test_every_parameter_is_in_one_group_and_the_encoder_learns_slower(folders: Path) -> None:
    trainer = make(MTLTrainer, folders)
    trainer.initialize()
    grouped = [id(p) for g in trainer.optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in trainer.network.parameters())
    encoder = {id(p) for p in trainer.network.encoder.parameters()}
    for group in trainer.optimizer.param_groups:
        assert {id(p) in encoder for p in group["params"]} == {group["part"] == "encoder"}
        assert all(p.ndim > 1 for p in group["params"]) == (group["weight_decay"] > 0)


def slow_factor(epoch: int, epochs: int, warmup: int) -> float:
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return (1 - (epoch - warmup) / (epochs - warmup)) ** 0.9


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (5, 0), (100, 10), (1000, 10)])
def test_schedule_follows_its_formula_and_groups_keep_their_ratio(epochs: int, warmup: int) -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [a], "lr": 1e-3}, {"params": [b], "lr": 1e-4}])
    scheduler = EpochwiseLR(optimizer, epochs, warmup)
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates[0] == pytest.approx(1e-3 * slow_factor(epoch, epochs, warmup))
        assert rates[1] == pytest.approx(rates[0] / 10)
        assert scheduler.get_last_lr() == rates


def test_rates_of_the_groups_differ_while_nnunet_drives_the_schedule_and_after_resuming(folders: Path) -> None:
    trainer = started(make(MTLTrainer, folders))
    trainer.current_epoch = 500
    trainer.on_train_epoch_start()
    before = [g["lr"] for g in trainer.optimizer.param_groups]
    assert before[0] == pytest.approx(10 * before[2]) == pytest.approx(1e-3 * slow_factor(500, 1000, 10))
    latest = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(latest))
    resumed = make(MTLTrainer, folders, resume=True)
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 501
    resumed.on_train_epoch_start()
    after = [g["lr"] for g in resumed.optimizer.param_groups]
    assert after[0] == pytest.approx(10 * after[2]) == pytest.approx(1e-3 * slow_factor(501, 1000, 10))


def test_checkpoint_has_the_keys_of_nnunets_own_and_loads_without_pickled_objects(
    folders: Path, tmp_path: Path
) -> None:
    stock = make(nnUNetTrainer, folders)
    stock.initialize()
    stock.save_checkpoint(str(tmp_path / "stock.pth"))
    ours = started(make(VARIANTS["MTLTrainer_5epochs"], folders))
    ours.save_checkpoint(str(tmp_path / "ours.pth"))
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True)
    # written by nnU-Net two lines above; its NumPy scalars are what ours leave out
    theirs = torch.load(tmp_path / "stock.pth", weights_only=False)
    assert set(loaded) == set(theirs)
    assert isinstance(loaded["_best_ema"], float)
    assert loaded["trainer_name"] == "nnUNetTrainer"
    assert loaded["init_args"]["plans"]["mtl_nnunet"]["trainer"] == "MTLTrainer_5epochs"
    keys = [k.removeprefix("decoder.encoder.") for k in loaded["network_weights"]]
    assert len(keys) == len(set(keys)), "the encoder is stored once"


def test_resuming_restores_everything_and_needs_no_selection(folders: Path) -> None:
    first = started(make(MTLTrainer, folders))
    with torch.no_grad():
        for parameter in first.network.parameters():
            parameter.add_(0.25)
    latest = Path(first.output_folder, "checkpoint_latest.pth")
    first.save_checkpoint(str(latest))
    shutil.rmtree(folders / "preprocessed" / NAME / "mtl_selection")
    again = make(MTLTrainer, folders, resume=True)
    again.load_checkpoint(str(latest))
    for key, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[key]), key
    assert again._best_ema == first._best_ema


def test_resuming_knows_the_best_epoch_though_it_is_the_latest(folders: Path) -> None:
    first = started(make(MTLTrainer, folders))
    folder = Path(first.output_folder)
    first._best_ema = None
    first.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    first._best_ema = 0.5
    first.save_checkpoint(str(folder / "checkpoint_best.pth"))
    again = make(MTLTrainer, folders, resume=True)
    again.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert again._best_ema == 0.5


def test_continuing_where_nothing_is_to_continue_loads_the_encoder(folders: Path) -> None:
    trainer = make(MTLTrainer, folders, resume=True)
    trainer.initialize()
    loaded = trainer.network.encoder.timm.model.state_dict()["layer1.0.conv1.weight"]
    assert torch.equal(loaded, selected_weights(folders)["layer1.0.conv1.weight"])


def test_pretrained_weights_of_nnunet_are_not_overwritten(folders: Path, tmp_path: Path) -> None:
    from nnunetv2.run.run_training import maybe_load_checkpoint

    donor = started(make(VARIANTS["MTLTrainerScratch_1epoch"], folders))
    donor.save_checkpoint(str(tmp_path / "donor.pth"))
    trainer = make(MTLTrainer, folders)
    maybe_load_checkpoint(trainer, False, False, str(tmp_path / "donor.pth"))
    key = "encoder.timm.model.layer1.0.conv1.weight"
    assert torch.equal(trainer.network.state_dict()[key], donor.network.state_dict()[key])


def test_fold_of_another_selection_is_refused(folders: Path, other_run: Path) -> None:
    first = started(make(MTLTrainer, folders))
    latest = Path(first.output_folder, "checkpoint_latest.pth")
    first.save_checkpoint(str(latest))
    select_again(folders, other_run, "--overwrite")
    for fold, resume in ((1, False), (0, True), (0, False)):
        with pytest.raises(UserError, match="begun from another selection"):
            make(MTLTrainer, folders, fold=fold, resume=resume)
    assert make(VARIANTS["MTLTrainerScratch_1epoch"], folders), "another model folder is free"


def test_of_two_folds_that_start_at_once_from_two_selections_one_is_refused(folders: Path, other_run: Path) -> None:
    first = make(MTLTrainer, folders)
    select_again(folders, other_run, "--overwrite")
    second = make(MTLTrainer, folders, fold=1)
    second._claim_model_folder()
    with pytest.raises(UserError, match="begun from another selection"):
        first._claim_model_folder()


def test_selections_live_side_by_side_under_plans_of_two_names(folders: Path, other_run: Path) -> None:
    from mtl_nnunet.cli.main import main

    other = folders / "preprocessed" / NAME / "other"
    select_again(folders, other_run, "-o", str(other))
    assert main(["plans", "-d", "7", "-selection", str(other), "-o", "nnUNetPlansOther"]) == 0
    default, named = make(MTLTrainer, folders), make(MTLTrainer, folders, plans_name="nnUNetPlansOther")
    default.initialize(), named.initialize()
    key = "layer1.0.conv1.weight"
    a, b = (t.network.encoder.timm.model.state_dict()[key] for t in (default, named))
    assert torch.equal(a, selected_weights(folders)[key])
    assert torch.equal(b, read_contents(other / "encoder.safetensors").weights[key])
    assert not torch.equal(a, b)
    assert default.output_folder_base != named.output_folder_base


def test_without_a_selection_the_message_says_what_to_run(folders: Path) -> None:
    shutil.rmtree(folders / "preprocessed" / NAME / "mtl_selection")
    with pytest.raises(UserError, match="Run mtl-select-checkpoint"):
        make(MTLTrainer, folders)
    assert not list((folders / "results").rglob("*.pth"))


@pytest.mark.parametrize("damage", ["altered", "removed"])
def test_altered_or_removed_encoder_is_refused(folders: Path, damage: str) -> None:
    encoder = folders / "preprocessed" / NAME / "mtl_selection" / "encoder.safetensors"
    if damage == "altered":
        content = bytearray(encoder.read_bytes())
        content[-1] ^= 1
        encoder.write_bytes(content)
    else:
        encoder.unlink()
    with pytest.raises(UserError, match=r"encoder\.safetensors"):
        make(MTLTrainer, folders)


def test_channels_that_changed_since_the_selection_are_refused(folders: Path) -> None:
    file = folders / "preprocessed" / NAME / "dataset.json"
    description = json.loads(file.read_text())
    description["channel_names"]["1"] = "T2"
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match="2 channels"):
        make(MTLTrainer, folders)


def test_checkpoint_that_would_run_code_is_refused_and_not_executed(folders: Path, tmp_path: Path) -> None:
    trainer = started(make(MTLTrainer, folders))
    latest = Path(trainer.output_folder, "checkpoint_latest.pth")

    class Malicious:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    latest.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="cannot be read"):
        make(MTLTrainer, folders, resume=True).load_checkpoint(str(latest))
    torch.save({"network_weights": {}, "init_args": Malicious()}, latest)
    with pytest.raises(UserError, match="cannot be read"):
        make(MTLTrainer, folders, resume=True).load_checkpoint(str(latest))
    assert not (tmp_path / "executed").exists()


def test_failing_disk_keeps_the_checkpoint_that_was_there(folders: Path) -> None:
    trainer = started(make(MTLTrainer, folders))
    file = Path(trainer.output_folder, "checkpoint_best.pth")
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(UserError, match="could not write"):
            trainer.save_checkpoint(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.tmp"))


@pytest.mark.parametrize(("text", "expected"), [("7,2", (7, 2)), ("50", (50, 10)), ("3", (3, 1)), ("", (250, 50))])
def test_iterations_come_from_the_environment(
    folders: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[int, int]
) -> None:
    monkeypatch.setenv("MTL_ITERATIONS_PER_EPOCH", text)
    trainer = make(MTLTrainer, folders)
    assert (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == expected


@pytest.mark.parametrize("text", ["many", "0", "5,0", "1,2,3", "-4"])
def test_senseless_iterations_are_refused(folders: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MTL_ITERATIONS_PER_EPOCH", text)
    with pytest.raises(UserError, match="MTL_ITERATIONS_PER_EPOCH"):
        make(MTLTrainer, folders)


def test_one_training_step_moves_encoder_and_decoder(folders: Path) -> None:
    trainer = make(MTLTrainer, folders)
    trainer.initialize()
    scales = trainer._get_deep_supervision_scales()
    assert scales == [[1, 1], [0.5, 0.5], [0.25, 0.25], [0.125, 0.125], [0.0625, 0.0625]]
    before = {k: v.clone() for k, v in trainer.network.named_parameters()}
    target = [torch.zeros(2, 1, int(64 * a), int(64 * b)) for a, b in scales]
    trainer.network.train()
    trainer.train_step({"data": torch.randn(2, 1, 64, 64), "target": target})
    after = dict(trainer.network.named_parameters())
    for part in ("encoder.", "stem.", "decoder.stages"):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(part)), part

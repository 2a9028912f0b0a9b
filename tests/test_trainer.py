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
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm.layers
import torch
import torch.distributed as dist
from conftest import DEMO_RUN, FAMILIES, nnunet_folders_below, plan_with_nnunet, write_phantoms
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerDiceLoss import nnUNetTrainerDiceLoss
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainerCosAnneal import nnUNetTrainerCosAnneal
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam
from nnunetv2.training.nnUNetTrainer.variants.sampling.nnUNetTrainer_probabilisticOversampling import (
    nnUNetTrainer_probabilisticOversampling,
)
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from timm.layers.norm_act import BatchNormAct2d
from timm.models import adapt_input_conv
from torch.nn.parallel import DistributedDataParallel

import mtl_nnunet.variants as trainers
from mtl_nnunet.checkpoints import read_contents
from mtl_nnunet.cli.main import trainers_folder
from mtl_nnunet.cli.select_checkpoint import main as select
from mtl_nnunet.encoder import TimmEncoder, _first_convolutions
from mtl_nnunet.errors import UserError
from mtl_nnunet.network import TimmUNet, strides_of
from mtl_nnunet.plans import selection_of, with_timm_unet, write_plans
from mtl_nnunet.recipe import optimizer_of, parameter_groups, recipe
from mtl_nnunet.trainer import MTLTrainer, _sync_batch_norm_keeps_activations
from mtl_nnunet.variants import VARIANTS

CPU = torch.device("cpu")
NAME = "Dataset007_Phantom"


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's three folders with a dataset that is selected for, by the real command, planned and preprocessed."""
    root = tmp_path_factory.mktemp("planned")
    write_phantoms(root / "raw" / NAME, num_cases=5, shape=(6, 56, 40))
    with nnunet_folders_below(root):
        command = Path(sys.executable).with_name("mtl-select-checkpoint")
        options = ["-d", "7", "-ckpt", str(DEMO_RUN), "-num_slices", "20", "-device", "cpu"]
        subprocess.run([command, *options], check=True, capture_output=True)
        plan_with_nnunet(7, preprocessed="2d")
    return root


@pytest.fixture
def folders(planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Path:
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_what_to_type(folders: Path) -> None:
    plans = json.loads((folders / "preprocessed" / NAME / "nnUNetPlans.json").read_text())
    with pytest.raises(UserError, match="Add -device cpu"):
        MTLTrainer(plans, "2d", 0, {}, torch.device("cuda"))


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


def poly(epoch: int) -> float:
    """nnU-Net's decay over 1000 epochs, 10 of them warm-up."""
    return float((1 - (epoch - 10) / 990) ** 0.9)


def test_rates_of_the_groups_differ_while_nnunet_drives_the_schedule_and_after_resuming(folders: Path) -> None:
    trainer = started(make(MTLTrainer, folders))
    trainer.current_epoch = 500
    trainer.on_train_epoch_start()
    own = [g["initial_lr"] for g in trainer.optimizer.param_groups]
    assert max(own) == 1e-3 > 3 * min(own)
    before = [g["lr"] for g in trainer.optimizer.param_groups]
    assert before == pytest.approx([rate * poly(500) for rate in own])
    latest = Path(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(str(latest))
    resumed = make(MTLTrainer, folders, resume=True)
    resumed.load_checkpoint(str(latest))
    assert resumed.current_epoch == 501
    resumed.on_train_epoch_start()
    assert [g["lr"] for g in resumed.optimizer.param_groups] == pytest.approx([rate * poly(501) for rate in own])


def test_checkpoint_has_the_keys_of_nnunets_own_and_loads_without_pickled_objects(
    folders: Path, tmp_path: Path
) -> None:
    stock = make(nnUNetTrainer, folders)
    stock.initialize()
    stock.save_checkpoint(str(tmp_path / "stock.pth"))
    ours = started(make(VARIANTS["MTLTrainer_5epochs"], folders))
    ours.save_checkpoint(str(tmp_path / "ours.pth"))
    loaded = torch.load(tmp_path / "ours.pth", weights_only=True)
    # what nnU-Net writes of NumPy, and ours leave out
    scalar = np.float64(0)
    with torch.serialization.safe_globals([scalar.__reduce__()[0], np.dtype, type(scalar.dtype)]):
        theirs = torch.load(tmp_path / "stock.pth", weights_only=True)
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


def test_plans_find_a_selection_from_a_preprocessed_folder_behind_a_link(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = folders / "preprocessed" / NAME
    elsewhere = shutil.copytree(own / "mtl_selection", folders / "selections" / "a")
    link = tmp_path / "on" / "another" / "disk"
    link.parent.mkdir(parents=True)
    link.symlink_to(folders / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(link))
    for selection in (None, str(elsewhere)):
        path, _ = write_plans(NAME, "nnUNetPlans", "nnUNetPlansLinked", selection, overwrite=True)
        plans = json.loads(path.read_text())
        assert selection_of(plans).folder.resolve() == Path(selection or own / "mtl_selection").resolve()


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


def test_a_fold_that_goes_on_with_other_iterations_says_so_and_has_no_single_number(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(trainer: Any) -> list[Any]:
        latest = Path(trainer.output_folder, "checkpoint_latest.pth")
        trainer.save_checkpoint(str(latest))
        saved = torch.load(latest, weights_only=True)["init_args"]["plans"]
        return [plans["mtl_nnunet"].get("iterations_per_epoch") for plans in (saved, trainer.plans_manager.plans)]

    def went_on(iterations: str, num_epochs: int = 1000) -> Any:
        monkeypatch.setenv("MTL_ITERATIONS_PER_EPOCH", iterations)
        trainer = make(MTLTrainer, folders, resume=True)
        trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_latest.pth")))
        trainer.num_epochs = num_epochs
        trainer._record_iterations()
        return trainer

    monkeypatch.setenv("MTL_ITERATIONS_PER_EPOCH", "7")
    first = started(make(MTLTrainer, folders))
    first._record_iterations()
    assert recorded(first) == [7, 7]
    assert recorded(went_on("7")) == [7, 7]
    # a fold that is finished is validated once more
    assert recorded(went_on("9", num_epochs=1)) == [7, 7]
    other = went_on("9")
    assert recorded(other) == [None, None]
    assert "begun with 7 iterations per epoch and goes on with 9" in Path(other.log_file).read_text()
    assert recorded(went_on("9")) == [None, None]


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


@pytest.mark.parametrize("epochs", [1, 5, 10, 20, 50, 100, 250, 500])
def test_lengths_are_nnunets_own(epochs: int, folders: Path) -> None:
    length = f"_{epochs}epoch{'' if epochs == 1 else 's'}"
    for base in ("MTLTrainer", "MTLTrainerScratch", "MTLTrainerFrozenEncoder"):
        cls = VARIANTS[f"{base}{length}"]
        assert issubclass(cls, VARIANTS[base])
        assert issubclass(cls, recursive_find_trainer_class_by_name(f"nnUNetTrainer{length}"))
        assert make(cls, folders).num_epochs == epochs


def test_variants_combine_what_nnunets_own_do_with_ours(folders: Path) -> None:
    flat = make(VARIANTS["MTLTrainerNoMirroring_5epochs"], folders)
    _, _, _, mirror_axes = flat.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert (mirror_axes, flat.inference_allowed_mirroring_axes, flat.num_epochs) == (None, None, 5)
    single = make(VARIANTS["MTLTrainerNoDeepSupervision_20epochs"], folders)
    single.initialize()
    assert isinstance(single.network(torch.zeros(2, 1, 64, 64)), torch.Tensor)
    assert single.num_epochs == 20
    for trainer in (flat, single):
        assert trainer.recipe == make(MTLTrainer, folders).recipe
        assert trainer.load_encoder


@pytest.mark.parametrize("stock", [nnUNetTrainerDA5, nnUNetTrainerDiceLoss, nnUNetTrainer_probabilisticOversampling])
def test_trainers_of_augmentation_loss_and_sampling_compose(stock: type[Any], folders: Path) -> None:
    mine = type("Mine", (MTLTrainer, stock), {})
    trainer = make(mine, folders)
    trainer.initialize()
    for method in ("get_training_transforms", "_build_loss", "get_dataloaders"):
        assert getattr(mine, method) is getattr(stock, method)
    assert trainer.plans_manager.plans["mtl_nnunet"]["trainer"] == "Mine"


@pytest.mark.parametrize("stock", [nnUNetTrainerAdam, nnUNetTrainerCosAnneal, nnUNetTrainerBN])
def test_trainers_whose_optimiser_or_network_would_be_ignored_are_refused(stock: type[Any], folders: Path) -> None:
    with pytest.raises(UserError, match=f"combines MTLTrainer with {stock.__name__}"):
        make(type("Mine", (MTLTrainer, stock), {}), folders)


def test_frozen_encoder_keeps_weights_and_statistics_through_nnunets_epoch(folders: Path) -> None:
    trainer = make(VARIANTS["MTLTrainerFrozenEncoder"], folders)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    trainer.on_train_epoch_start()
    trainer.train_step(batch(trainer))
    after = trainer.network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("encoder."))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("decoder."))
    assert trainer.recipe.frozen_epochs == "all"


def test_encoder_that_is_frozen_at_first_moves_afterwards(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_RECIPE", "frozen_epochs=3,batch_norm=live")
    trainer = make(VARIANTS["MTLTrainer_10epochs"], folders)
    trainer.initialize()
    moved = []
    for epoch in range(5):
        trainer.current_epoch = epoch
        before = {k: v.clone() for k, v in trainer.network.encoder.state_dict().items()}
        trainer.on_train_epoch_start()
        trainer.train_step(batch(trainer))
        after = trainer.network.encoder.state_dict()
        moved.append({"running" in k for k in before if not torch.equal(before[k], after[k])})
    assert moved[:3] == [set()] * 3
    assert moved[3:] == [{True, False}] * 2


def batch(trainer: Any, num_samples: int = 2) -> dict[str, Any]:
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() or [[1] * len(patch)]
    targets = [
        torch.randint(0, 2, (num_samples, 1, *(int(s * f) for s, f in zip(patch, scale, strict=True)))).float()
        for scale in scales
    ]
    return {"data": torch.randn(num_samples, 1, *patch), "target": targets}


def test_recipe_is_logged_stored_and_kept_when_the_run_goes_on(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_RECIPE", "optimizer=sgd,lr=2e-3")
    first = started(make(MTLTrainer, folders))
    assert type(first.optimizer) is torch.optim.SGD
    assert "optimizer=sgd, lr=0.002" in Path(first.log_file).read_text()
    latest = Path(first.output_folder, "checkpoint_latest.pth")
    first.save_checkpoint(str(latest))
    stored = torch.load(latest, weights_only=True)["init_args"]["plans"]["mtl_nnunet"]["recipe"]
    assert (stored["optimizer"], stored["lr"], stored["weight_decay"]) == ("sgd", 2e-3, 1e-2)
    monkeypatch.delenv("MTL_RECIPE")
    again = make(MTLTrainer, folders, resume=True)
    again.load_checkpoint(str(latest))
    assert type(again.optimizer) is torch.optim.SGD
    assert again.recipe == first.recipe
    assert again.plans_manager.plans["mtl_nnunet"]["recipe"] == stored
    assert "goes on with the recipe it was begun with" in Path(again.log_file).read_text()
    other = make(MTLTrainer, folders, fold=1)
    other._claim_model_folder()
    assert "begun with another recipe (optimizer=sgd, lr=0.002)" in Path(other.log_file).read_text()


def test_fold_begun_before_recipes_were_recorded_goes_on_as_its_variant(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = started(make(VARIANTS["MTLTrainerScratch"], folders))
    latest = Path(first.output_folder, "checkpoint_latest.pth")
    first.save_checkpoint(str(latest))
    content = torch.load(latest, weights_only=True)
    del content["init_args"]["plans"]["mtl_nnunet"]["recipe"]
    torch.save(content, latest)
    monkeypatch.setenv("MTL_RECIPE", "gone.json")
    again = make(VARIANTS["MTLTrainerScratch"], folders, resume=True)
    again.load_checkpoint(str(latest))
    assert again.recipe.encoder_lr_factor == 1
    content["optimizer_state"]["param_groups"].pop()
    torch.save(content, latest)
    with pytest.raises(UserError, match="begun by another version of mtl-nnunet"):
        make(VARIANTS["MTLTrainerScratch"], folders, resume=True).load_checkpoint(str(latest))
    with pytest.raises(UserError, match=r"MTL_RECIPE=gone\.json cannot be read"):
        make(VARIANTS["MTLTrainerScratch"], folders, fold=1, resume=True)


@pytest.mark.parametrize("damaged", [None, ["lr"], {"lr": "fast"}])
def test_damaged_recipe_in_plans_is_named(damaged: Any, folders: Path) -> None:
    from mtl_nnunet.cli.main import main

    assert main(["plans", "-d", "7", "-o", "Slow", "-recipe", "lr=1e-4"]) == 0
    file = folders / "preprocessed" / NAME / "Slow.json"
    plans = json.loads(file.read_text())
    plans["mtl_nnunet"]["recipe"] = damaged
    file.write_text(json.dumps(plans))
    with pytest.raises(UserError, match="the recipe in the plans 'Slow'"):
        make(MTLTrainer, folders, plans_name="Slow")


def test_plans_set_a_recipe_and_the_environment_goes_before_them(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_nnunet.cli.main import main

    assert main(["plans", "-d", "7", "-o", "Slow", "-recipe", "lr=1e-4,layer_decay=0.8"]) == 0
    trainer = make(MTLTrainer, folders, plans_name="Slow")
    assert (trainer.recipe.lr, trainer.recipe.layer_decay) == (1e-4, 0.8)
    monkeypatch.setenv("MTL_RECIPE", "lr=5e-4")
    trainer = make(MTLTrainer, folders, plans_name="Slow")
    assert (trainer.recipe.lr, trainer.recipe.layer_decay) == (5e-4, 0.8)
    assert main(["plans", "-d", "7", "-p", "Slow", "-o", "Slower", "-recipe", "lr=1e-5"]) == 0
    monkeypatch.delenv("MTL_RECIPE")
    slower = make(MTLTrainer, folders, plans_name="Slower").recipe
    assert (slower.lr, slower.layer_decay) == (1e-5, 0.8)
    monkeypatch.setenv("MTL_RECIPE", "lr=5e-4")
    scratch = make(VARIANTS["MTLTrainerScratch"], folders, plans_name="Slow")
    assert (scratch.recipe.lr, scratch.recipe.layer_decay, scratch.recipe.encoder_lr_factor) == (5e-4, 1.0, 1.0)


def test_rate_set_in_nnunets_own_way_counts_and_is_recorded(folders: Path) -> None:
    class Mine(MTLTrainer):
        def __init__(
            self, plans: Any, configuration: str, fold: int, dataset_json: Any, device: torch.device = CPU
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.initial_lr = 3e-4

    trainer = make(Mine, folders)
    trainer.initialize()
    assert {g["initial_lr"] for g in trainer.optimizer.param_groups} == {3e-4 * 0.75**depth for depth in range(5)}
    assert trainer.plans_manager.plans["mtl_nnunet"]["recipe"]["lr"] == 3e-4


def test_out_of_memory_ends_in_one_message(folders: Path) -> None:
    trainer = make(MTLTrainer, folders)
    trainer.initialize()
    # more than any machine has, of which nothing is held: the first convolution asks for all of it
    huge = {**batch(trainer), "data": torch.zeros(1, 1, 64, 64).expand(2**28, 1, 64, 64)}
    with pytest.raises(UserError, match="out of memory on cpu with batches of 2 patches of 64x64"):
        trainer.train_step(huge)
    with pytest.raises(RuntimeError, match="channels") as other:
        trainer.train_step({**batch(trainer), "data": torch.zeros(2, 5, 64, 64)})
    assert not isinstance(other.value, UserError)


@pytest.fixture
def join_process_group(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """A function that begins a process group of one on the CPU."""
    yield lambda: dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    dist.destroy_process_group()


def test_several_gpus_keep_every_activation(
    folders: Path, join_process_group: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(MTLTrainer, folders)
    join_process_group()
    # nnU-Net makes several processes on GPUs alone, and torch wraps no SyncBatchNorm on a CPU
    trainer.is_ddp = True
    monkeypatch.setattr(nnunet_trainer, "DDP", lambda network, device_ids: network)
    trainer.initialize()
    network = trainer.network
    assert not [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m for m in network.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert {id(p) for p in network.parameters()} == {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    loaded = network.encoder.timm.model.state_dict()["layer1.0.conv1.weight"]
    assert torch.equal(loaded, selected_weights(folders)["layer1.0.conv1.weight"])
    assert torch.nn.SyncBatchNorm.convert_sync_batchnorm is not timm.layers.convert_sync_batchnorm, "put back"


@pytest.mark.parametrize(("together", "live"), [(7, True), (3, False)])
def test_gpus_whose_shares_of_the_batch_differ_agree_on_statistics(folders: Path, together: int, live: bool) -> None:
    trainer = make(trainers.MTLTrainer, folders)
    trainer.configuration_manager.configuration["batch_size"] = together
    trainer.initialize()
    shares, modes = [], []
    for rank in range(2):
        trainer.is_ddp = True
        with (
            mock.patch.object(dist, "get_world_size", return_value=2),
            mock.patch.object(dist, "get_rank", return_value=rank),
        ):
            trainer._set_batch_size_and_oversample()
        trainer.is_ddp = False
        trainer.on_train_epoch_start()
        shares.append(trainer.batch_size)
        modes.append({m.training for m in trainer.network.encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)})
    assert shares == [together // 2 + 1, together // 2]
    assert modes == [{live}, {live}]


@pytest.mark.parametrize("volumetric", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_conversion_for_several_gpus_leaves_the_output_as_it_is(name: str, volumetric: bool) -> None:
    if volumetric and name == "swin_tiny_patch4_window7_224":
        pytest.skip("Swin is 2D only")
    network = network_of(name, 2, volumetric).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    images = torch.randn(1, 2, *((32, 64, 32) if volumetric else (64, 96)))
    with torch.no_grad():
        before = network(images)
        by_torch = torch.nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(network))(images)
        with _sync_batch_norm_keeps_activations():
            converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        assert torch.equal(converted(images), before)
    fused = any(isinstance(m, BatchNormAct2d) for m in network_of(name, 2, volumetric).modules())
    assert torch.equal(by_torch, before) != fused, "this test could not fail"


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_no_parameter_is_waited_for_by_other_processes(name: str, join_process_group: Callable[[], None]) -> None:
    join_process_group()
    bare = network_of(name, 1, False)
    bare.decoder.deep_supervision = True
    # nnU-Net makes the optimiser before it wraps the network
    parameter_groups(bare, recipe())
    network = DistributedDataParallel(bare)
    for _ in range(2):
        sum(o.mean() for o in network(torch.randn(2, 1, 64, 64))).backward()


def network_of(name: str, channels: int, volumetric: bool) -> TimmUNet:
    strides = strides_of(TimmEncoder(name))
    return TimmUNet(channels, 3, name, [[s[0], *s] for s in strides] if volumetric else strides)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_step_and_predicts(name: str, channels: int, folders: Path) -> None:
    dataset = folders / "preprocessed" / NAME
    plans = json.loads((dataset / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["patch_size"] = [56, 90]
    record = {"encoder": name, "input_channels": channels, "encoder_sha256": "0" * 64}
    manager = PlansManager(with_timm_unet(plans, "2d", record))
    configuration = manager.get_configuration("2d")
    assert list(configuration.patch_size) == [64, 96]
    description = json.loads((dataset / "dataset.json").read_text())
    description["channel_names"] = {str(c): "MRI" for c in range(channels)}
    network = nnUNetTrainer.build_network_architecture(manager, configuration, channels, 3, True)
    how = recipe()
    optimizer = optimizer_of(parameter_groups(network, how), how)
    network.train()
    before = {k: v.clone() for k, v in network.named_parameters()}
    loss = sum(o.float().pow(2).mean() for o in network(torch.randn(2, channels, *configuration.patch_size)))
    loss.backward()
    optimizer.step()
    assert not [k for k, v in network.named_parameters() if v.requires_grad and v.grad is None]
    moved = {k for k, v in network.named_parameters() if not torch.equal(v, before[k])}
    for part in (f"encoder.timm.model.{_first_convolutions(network.encoder.timm.model)[0]}", "stem.", "decoder."):
        assert any(k.startswith(part) for k in moved), part
    network.decoder.deep_supervision = False
    predictor = nnUNetPredictor(device=CPU, use_mirroring=False, perform_everything_on_device=False, allow_tqdm=False)
    weights = [network.state_dict()]
    predictor.manual_initialization(network, manager, configuration, weights, description, "nnUNetTrainer", (0, 1))
    # larger than a patch, in sides that no reduction divides
    image = torch.randn(channels, 2, 101, 119)
    logits = predictor.predict_logits_from_preprocessed_data(image)
    assert logits.shape == (3, 2, 101, 119)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["densenet121", "vgg16", "vit_tiny_patch16_224", "test_vit", "deit_tiny_patch16_224"])
def test_networks_that_do_not_fit_are_refused_with_what_is_supported(name: str, folders: Path) -> None:
    plans = json.loads((folders / "preprocessed" / NAME / "nnUNetPlans.json").read_text())
    with pytest.raises(UserError, match=f"'{name}' gives no feature pyramid.*Use a ResNet, ConvNeXt, EfficientNet"):
        with_timm_unet(plans, "2d", {"encoder": name, "input_channels": 1, "encoder_sha256": "0" * 64})


def test_encoder_that_timm_no_longer_knows_is_named(folders: Path) -> None:
    plans = json.loads((folders / "preprocessed" / NAME / "nnUNetPlans.json").read_text())
    with pytest.raises(UserError, match="knows no encoder 'resnet18_of_old'"):
        with_timm_unet(plans, "2d", {"encoder": "resnet18_of_old", "input_channels": 1, "encoder_sha256": "0" * 64})


def test_a_licence_that_forbids_commercial_use_is_said_in_the_log(folders: Path) -> None:
    file = folders / "preprocessed" / NAME / "mtl_selection" / "selection.json"
    content = json.loads(file.read_text())
    published = {"name": "timm:a.b", "source": "timm/a.b", "revision": None, "licence": "cc-by-nc-4.0", "epochs": None}
    for licence, said in (("cc-by-nc-4.0", "forbids"), ("seer-license", "terms of its own"), ("apache-2.0", None)):
        content["choice"]["published"] = {**published, "licence": licence}
        file.write_text(json.dumps(content))
        trainer = make(MTLTrainer, folders)
        trainer.initialize()
        log = Path(trainer.log_file).read_text()
        assert f"timm:a.b, licence {licence}" in log
        assert ("commercial use" in log) == (said is not None)
        assert said is None or said in log
        shutil.rmtree(folders / "results")
        (folders / "results").mkdir()

"""The monitor inside loops of timm's kind, Lightning, Ignite and MONAI, run with the real libraries."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import write_phantoms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mtl_nnunet.callbacks import MonitorHandler, lightning_callback, should_stop
from mtl_nnunet.cases import find_image_folder
from mtl_nnunet.chooser import read_chooser
from mtl_nnunet.errors import UserError
from mtl_nnunet.monitoring import Monitor
from mtl_nnunet.slices import Slices, gather_slices
from mtl_nnunet.stopping import StopRule, expected_gain


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Slices:
    folder = write_phantoms(tmp_path_factory.mktemp("phantoms"))
    return gather_slices(find_image_folder(folder / "imagesTr"), num_slices=12, num_workers=1)


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(16, 3, 32, 32, generator=generator), torch.arange(16) % 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet", num_classes=4, drop_path_rate=0.2)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(k == other and torch.equal(v, w) for (k, v), (other, w) in pairs)


def patient(folder: Path, slices: Slices, patience: int) -> Monitor:
    return Monitor(folder, slices, rule=StopRule("patience", patience=patience))


def trained_by_hand(data: TensorDataset, stop: Callable[[nn.Module, int], bool], epochs: int = 3) -> nn.Module:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    random.seed(0)
    np.random.seed(0)
    for epoch in range(epochs):
        model.train()
        for images, classes in DataLoader(data, 8, shuffle=True):
            # every generator is used, so that one that is moved shows
            images = images * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand()) * torch.rand_like(images)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
        if stop(model, epoch):
            break
    return model


def test_a_training_with_it_is_the_training_without_it_bit_by_bit(
    tmp_path: Path, slices: Slices, data: TensorDataset
) -> None:
    monitor = Monitor(tmp_path, slices)
    watched = trained_by_hand(data, lambda model, epoch: should_stop(monitor, model, epoch, 100))
    assert [s.epoch for s in monitor.history] == [0, 1, 2]
    assert len({s.content_key for s in monitor.history}) == 3
    # a run of a hundred epochs, counted from zero
    until = expected_gain(read_chooser(), [0], 99).until
    assert monitor.history[0].said["gain_in_dice_points"]["until_epoch"] == until
    assert same(watched, trained_by_hand(data, lambda *_: False))


def test_a_loop_ends_where_the_rule_says(tmp_path: Path, slices: Slices, data: TensorDataset) -> None:
    monitor = Monitor(tmp_path, slices, rule=StopRule(price=100.0))
    epochs: list[int] = []

    def stop(model: nn.Module, epoch: int) -> bool:
        epochs.append(epoch)
        return should_stop(monitor, model, epoch, 100)

    trained_by_hand(data, stop)
    assert epochs == [0]


class Module:
    """What both of Lightning's packages can make a module of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, _: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), 1e-3)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_the_same_and_stops(tmp_path: Path, slices: Slices, data: TensorDataset, package: str) -> None:
    pl = importlib.import_module(package)
    net = type("Net", (Module, pl.LightningModule), {})

    def fit(epochs: int, *callbacks: Any) -> Any:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        pl.seed_everything(1, verbose=False)
        module = net()
        trainer.fit(module, DataLoader(data, 8, shuffle=True))
        return trainer, module

    monitor = patient(tmp_path / "long", slices, 99)
    _, watched = fit(3, lightning_callback(monitor, package=package))
    _, alone = fit(3)
    assert same(watched, alone)
    assert [s.epoch for s in monitor.history] == [0, 1, 2]
    assert monitor.planned_epochs == 3
    dear = Monitor(tmp_path / "short", slices, rule=StopRule(price=100.0))
    trainer, _ = fit(50, lightning_callback(dear, part=lambda module: module.net, every=2, package=package))
    assert trainer.current_epoch == 2
    assert [s.epoch for s in dear.history] == [1]


@pytest.mark.filterwarnings("ignore")
def test_lightning_decides_on_the_first_process_only(tmp_path: Path, slices: Slices) -> None:
    monitor = patient(tmp_path / "other", slices, 99)
    callback = lightning_callback(monitor, package="lightning.pytorch")

    class Strategy:
        told = True

        def broadcast(self, stop: Any, src: int) -> Any:
            assert (stop, src) == (None, 0)
            return self.told

    trainer = type(
        "Trainer", (), {"current_epoch": 0, "max_epochs": 9, "is_global_zero": False, "should_stop": False}
    )()
    trainer.strategy = Strategy()
    callback.on_train_epoch_end(trainer, network())
    assert trainer.should_stop
    # a process that is not the first scores nothing and writes nothing
    assert not (tmp_path / "other").exists()
    trainer.strategy.told = None
    with pytest.raises(UserError, match="the first process could not score"):
        callback.on_train_epoch_end(trainer, network())
    trainer.strategy = type("FSDPStrategy", (), {})()
    with pytest.raises(UserError, match="run mtl-watch-pretraining beside"):
        callback.setup(trainer, network(), "fit")
    with pytest.raises(UserError, match="is none of"):
        lightning_callback(monitor, package="torch")


def test_ignite_trains_the_same_and_terminates(tmp_path: Path, slices: Slices, data: TensorDataset) -> None:
    from ignite.engine import create_supervised_trainer

    def trained(epochs: int, monitor: Monitor | None) -> tuple[nn.Module, Any]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        engine = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
        if monitor is not None:
            MonitorHandler(monitor, model).attach(engine)
        torch.manual_seed(1)
        engine.run(DataLoader(data, 8, shuffle=True), max_epochs=epochs)
        return model, engine

    monitor = patient(tmp_path / "long", slices, 99)
    watched, _ = trained(3, monitor)
    alone, _ = trained(3, None)
    assert same(watched, alone)
    assert [s.epoch for s in monitor.history] == [0, 1, 2]
    _, engine = trained(50, Monitor(tmp_path / "short", slices, rule=StopRule(price=100.0)))
    assert engine.state.epoch == 1


def test_monais_trainer_takes_the_handler(tmp_path: Path, slices: Slices, data: TensorDataset) -> None:
    from monai.engines import SupervisedTrainer

    model = network()
    monitor = Monitor(tmp_path, slices, rule=StopRule(price=100.0))
    loader = DataLoader([{"image": image, "label": label} for image, label in data], batch_size=8)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=50, train_data_loader=loader, network=model,
        optimizer=torch.optim.AdamW(model.parameters(), 1e-3), loss_function=nn.CrossEntropyLoss(),
        train_handlers=[MonitorHandler(monitor, model)],
    )  # fmt: skip
    trainer.run()
    assert trainer.state.epoch == 1
    assert monitor.history[0].said["stop"]


@pytest.mark.slow
def test_all_processes_of_a_training_are_told(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "phantoms")
    code = f"""
import sys, timm, torch, torch.distributed as dist
from mtl_nnunet.callbacks import should_stop
from mtl_nnunet.cases import find_image_folder
from mtl_nnunet.monitoring import Monitor
from mtl_nnunet.slices import gather_slices
from mtl_nnunet.stopping import StopRule
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=rank, world_size=2)
slices = gather_slices(find_image_folder("{tmp_path}/phantoms/imagesTr"), 12, num_workers=1)
monitor = Monitor("{tmp_path}/out", slices, rule=StopRule(price=100.0))
model = torch.nn.parallel.DistributedDataParallel(timm.create_model("test_resnet"))
print(should_stop(monitor, model, 0, 100), len(monitor.history))
"""
    begun = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=300)[0].strip() for process in begun]
    assert printed == ["True 1", "True 0"]


@pytest.mark.slow
def test_lightning_on_two_processes_stops_both(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    write_phantoms(tmp_path / "phantoms")
    script = tmp_path / "train.py"
    script.write_text(f"""
import timm, torch, lightning.pytorch as lightning
from torch.utils.data import DataLoader, TensorDataset
from mtl_nnunet.callbacks import lightning_callback
from mtl_nnunet.cases import find_image_folder
from mtl_nnunet.monitoring import Monitor
from mtl_nnunet.slices import gather_slices
from mtl_nnunet.stopping import StopRule

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=5)
    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

if __name__ == "__main__":
    slices = gather_slices(find_image_folder("{tmp_path}/phantoms/imagesTr"), 12, num_workers=1)
    images = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 5)
    with Monitor("{tmp_path}/out", slices, rule=StopRule(price=100.0)) as monitor:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=50, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[lightning_callback(monitor)],
        )
        trainer.fit(Module(), DataLoader(images, 8))
        with open(f"{tmp_path}/ended_{{trainer.global_rank}}", "w") as file:
            print(trainer.current_epoch, len(monitor.history), file=file)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    # both after the first epoch, and only the first process has scored
    assert [(tmp_path / f"ended_{rank}").read_text().split() for rank in (0, 1)] == [["1", "1"], ["1", "0"]]


@pytest.mark.slow
def test_the_others_wait_longer_for_the_first_process_than_their_training_would(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys, time, torch.distributed as dist
from datetime import timedelta
from mtl_nnunet.callbacks import should_stop
rank = int(sys.argv[1])
here = pathlib.Path("{tmp_path}")
(here / f"ready_{{rank}}").touch()
while not (here / f"ready_{{1 - rank}}").exists():
    time.sleep(0.1)
dist.init_process_group("gloo", init_method=f"file://{{here}}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=10))
class Slow:
    def see(self, *_):
        time.sleep(15)
        return True
print(should_stop(Slow(), None, 0), should_stop(Slow(), None, 1))
dist.destroy_process_group()
"""
    begun = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in begun] == ["True True"] * 2

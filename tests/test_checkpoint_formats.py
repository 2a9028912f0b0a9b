"""Every format that is read, written by the library that defines it."""

from __future__ import annotations

import argparse
import copy
import os
import pathlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from mtl_nnunet.checkpoints import architecture_of, find_checkpoints, inferred_architecture, read_contents
from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import AssumedWarning, UserError

NAME = "test_resnet"


def network(seed: int = 0, name: str = NAME) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def loads(path: Path, expected: nn.Module, which: str = "default") -> bool:
    """Whether the encoder loads strictly from the file, and holds what the network holds."""
    encoder = TimmEncoder(NAME, 3)
    encoder.load_weights(read_contents(path, which).weights, str(path))
    state = expected.state_dict()
    return all(torch.equal(v, state[k]) for k, v in encoder.timm.model.state_dict().items())


def images(number: int = 8) -> torch.utils.data.TensorDataset:
    torch.manual_seed(1)
    return torch.utils.data.TensorDataset(torch.randn(number, 3, 32, 32), torch.arange(number) % 5)


# timm


def test_timm_moving_average_on_request(tmp_path: Path) -> None:
    model = network()
    ema = timm.utils.ModelEmaV3(network(1))
    saver = timm.utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model=NAME, data=pathlib.Path("/data"), metric=np.float64(3.5)),
        model_ema=ema,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, 10.0)
    saver.save_recovery(1, 50)
    (found,) = find_checkpoints(tmp_path)
    (averaged,) = find_checkpoints(tmp_path, weights="ema")
    assert found.epoch == averaged.epoch == 0
    assert (found.architecture, found.kind) == (NAME, "timm train.py")
    assert loads(found.path, model)
    assert loads(averaged.path, ema.module, "ema")
    assert found.content_key != averaged.content_key, "results of one are not taken for the other's"


def test_average_that_is_not_there_is_refused(tmp_path: Path) -> None:
    torch.save({"model": network().state_dict(), "epoch": 3}, tmp_path / "model_3.pth")
    with pytest.raises(UserError, match=r"model_3\.pth holds no moving average of its weights \(it holds: model\)"):
        find_checkpoints(tmp_path, weights="ema")


def test_timms_class_name_is_no_architecture(tmp_path: Path) -> None:
    model = network()
    timm.utils.CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), checkpoint_dir=str(tmp_path)
    ).save_checkpoint(0, 1.0)
    (found,) = find_checkpoints(tmp_path)
    assert torch.load(found.path, weights_only=True)["arch"] == "resnet"
    assert found.architecture is None
    with pytest.warns(AssumedWarning, match="its tensors fit test_resnet, which is taken"):
        assert architecture_of(found) == NAME


# torchvision's references/classification/train.py: what it puts into model_N.pth


def test_torchvision_references(tmp_path: Path) -> None:
    model = torchvision.models.resnet18(num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    average.update_parameters(model)
    with torch.no_grad():
        model.conv1.weight.add_(1)
    average.update_parameters(model)
    for epoch in (9, 10):
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "epoch": epoch,
            "args": argparse.Namespace(model="resnet18", lr=0.1, workers=16),
            "model_ema": average.state_dict(),
        }
        for name in (f"model_{epoch}.pth", "checkpoint.pth"):
            torch.save(content, tmp_path / name)
    found = find_checkpoints(tmp_path)
    assert [(c.epoch, c.path.name) for c in found] == [(9, "model_9.pth"), (10, "model_10.pth")]
    assert {(c.kind, c.architecture) for c in found} == {("torchvision references", "resnet18")}
    encoder = TimmEncoder("resnet18")
    encoder.load_weights(read_contents(found[0].path).weights, "file")
    assert torch.equal(encoder.timm.model.conv1.weight, model.conv1.weight)
    encoder.load_weights(read_contents(found[0].path, "ema").weights, "file")
    assert torch.equal(encoder.timm.model.conv1.weight, average.module.conv1.weight)
    assert not torch.equal(encoder.timm.model.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize(
    ("theirs", "ours", "size"),
    [
        ("resnet18", "resnet18", 97),
        ("resnet50", "resnet50", 97),
        ("resnext50_32x4d", "resnext50_32x4d", 64),
        ("convnext_tiny", "convnext_tiny", 96),
        ("swin_t", "swin_tiny_patch4_window7_224", 224),
        ("swin_v2_t", "swinv2_tiny_window8_256", 256),
    ],
)
def test_torchvisions_networks_give_the_same_logits_and_maps(tmp_path: Path, theirs: str, ours: str, size: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(theirs, weights=None).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model=theirs)}, tmp_path / "model_0.pth")
    contents = read_contents(tmp_path / "model_0.pth")
    assert contents.architecture == ours
    assert inferred_architecture(contents.weights)[0] == ours
    classifier = timm.create_model(ours).eval()
    classifier.load_state_dict(contents.weights, strict=True)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(classifier(x), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
        encoder = TimmEncoder(ours).eval()
        encoder.load_weights(contents.weights, theirs)
        maps = encoder(x)
        for ours_map, theirs_map in zip(maps[-len(of := stages(model, x)) :], of, strict=True):
            torch.testing.assert_close(ours_map, theirs_map, rtol=1e-4, atol=1e-4 * float(theirs_map.abs().max()))


def stages(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output of each of torchvision's four stages, channels first."""
    if hasattr(model, "layer4"):
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        maps = []
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            maps.append(x := layer(x))
        return maps
    maps = []
    for i, group in enumerate(model.features):
        x = group(x)
        if i % 2:
            maps.append(x)
    return [m.permute(0, 3, 1, 2) if "swin" in type(model).__name__.lower() else m for m in maps]


# wrappers of torch


def wrapped_in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def wrapped_in_fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def with_checkpointed_activations(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda m: m is model.layer1)
    return model


def compiled_part(model: nn.Module) -> nn.Module:
    model.layer2 = torch.compile(model.layer2)
    return model


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, wrapped_in_ddp, torch.compile, wrapped_in_fsdp, with_checkpointed_activations, compiled_part],
    ids=lambda f: f.__name__,
)
@pytest.mark.filterwarnings("ignore:FSDP", "ignore:.*FullyShardedDataParallel", "ignore:.*torch.jit")
def test_wrappers_of_torch(tmp_path: Path, process_group: None, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    expected = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = wrap(model).state_dict()
    torch.save({"state_dict": state, "epoch": 2}, tmp_path / "checkpoint.pth")
    assert same(read_contents(tmp_path / "checkpoint.pth").weights, expected.state_dict())


def test_compiled_inside_data_parallel(tmp_path: Path) -> None:
    model = network()
    torch.save(nn.DataParallel(torch.compile(model)).state_dict(), tmp_path / "a.pth")
    assert same(read_contents(tmp_path / "a.pth").weights, model.state_dict())


def test_distributed_checkpoint_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, process_group: None
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = network()
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(tmp_path / "step_100"))
    with pytest.raises(UserError, match=r"distributed checkpoint of torch, in shards.*dcp_to_torch"):
        find_checkpoints(tmp_path / "step_100")
    dcp_to_torch_save(tmp_path / "step_100", tmp_path / "step_100.pth")
    (found,) = find_checkpoints(tmp_path / "step_100.pth")
    assert found.step == 100
    assert loads(found.path, model)


# Lightning


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    class Classifier(lightning.LightningModule):
        def __init__(self, model_name: str = NAME, lr: float = 0.01):
            super().__init__()
            self.save_hyperparameters()
            self.model = network()
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(5))

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.criterion(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_acc", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), self.hparams.lr)

    module = Classifier()
    loader = torch.utils.data.DataLoader(images(), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=11,
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=CSVLogger(tmp_path),
            callbacks=[ModelCheckpoint(save_top_k=-1, save_last=True)],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, loader, loader)
    # the folder that the user named, and the one that Lightning wrote
    for folder in (tmp_path, tmp_path / "lightning_logs" / "version_0" / "checkpoints"):
        found = find_checkpoints(folder)
        assert [(c.epoch, c.step) for c in found] == [(e, 2 * e + 2) for e in range(11)], (
            "9 before 10, last.ckpt is a copy"
        )
    assert {(c.kind, c.architecture) for c in found} == {("Lightning", NAME)}
    assert all(c.logged_accuracy is not None and 0 <= c.logged_accuracy <= 100 for c in found)
    assert loads(found[-1].path, module.model)
    assert "criterion.weight" in read_contents(found[-1].path).left_out


def test_lightning_with_several_checkpoints_an_epoch_goes_by_steps(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.Trainer(
            max_epochs=3,
            default_root_dir=tmp_path,
            accelerator="cpu",
            logger=False,
            callbacks=[ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=2)],
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Classifier(), torch.utils.data.DataLoader(images(16), batch_size=4))
    found = find_checkpoints(tmp_path)
    assert [(c.epoch, c.label) for c in found] == [(None, f"step {s}") for s in (2, 4, 6, 8, 10, 12)]


# Hugging Face


class ForTrainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Dictionaries(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        x, y = images()[i]
        return {"pixel_values": x, "labels": y}


def train_with_hugging_face(model: nn.Module, folder: Path, **options: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="epoch",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=Dictionaries(),
            eval_dataset=Dictionaries(),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        ).train()


def test_hugging_face_trainer(tmp_path: Path) -> None:
    model = ForTrainer()
    train_with_hugging_face(model, tmp_path, save_strategy="epoch")
    found = find_checkpoints(tmp_path)
    assert [(c.epoch, c.step, c.path.parent.name) for c in found] == [
        (e, 2 * e, f"checkpoint-{2 * e}") for e in (1, 2, 3)
    ]
    assert {c.kind for c in found} == {"Hugging Face Trainer"}
    assert all(c.logged_accuracy is not None and 0 <= c.logged_accuracy <= 100 for c in found)
    assert loads(found[-1].path, model.model)
    (alone,) = find_checkpoints(tmp_path / "checkpoint-4")
    assert (alone.epoch, alone.step) == (2, 4)


def test_hugging_face_trainer_that_saves_inside_epochs_goes_by_steps(tmp_path: Path) -> None:
    train_with_hugging_face(ForTrainer(), tmp_path, save_strategy="steps", save_steps=1)
    found = find_checkpoints(tmp_path)
    assert [(c.epoch, c.label) for c in found] == [(None, f"step {s}") for s in range(1, 7)]


def test_hugging_faces_own_wrapper_of_timm(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    wrapper = transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(architecture=NAME, num_labels=5)
    )
    wrapper.save_pretrained(tmp_path / "model")
    (found,) = find_checkpoints(tmp_path / "model")
    assert found.architecture == NAME
    assert loads(found.path, wrapper.timm_model)


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate(tmp_path: Path, safe: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = network()
    accelerator = accelerate.Accelerator(
        cpu=True,
        project_config=accelerate.utils.ProjectConfiguration(
            project_dir=str(tmp_path), automatic_checkpoint_naming=True
        ),
    )
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(11):
        accelerator.save_state(safe_serialization=safe)
    found = find_checkpoints(tmp_path)
    assert [c.epoch for c in found] == list(range(11))
    assert {c.kind for c in found} == {"Accelerate"}
    assert loads(found[0].path, model)
    accelerator.project_configuration.automatic_checkpoint_naming = False
    for step in (500, 1000):
        accelerator.save_state(str(tmp_path / "own" / f"step_{step}"), safe_serialization=safe)
    assert [(c.epoch, c.step) for c in find_checkpoints(tmp_path / "own")] == [(None, 500), (None, 1000)]


# self-supervised methods: modules built, wrapped and saved as the original repositories' code does


class MoCo(nn.Module):
    """Names as in moco/builder.py of facebookresearch/moco, with --mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = (torchvision.models.resnet18(num_classes=16) for _ in range(2))
        for encoder in (self.encoder_q, self.encoder_k):
            encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
        self.register_buffer("queue", torch.randn(16, 64))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


class MoCoV3(nn.Module):
    """Names as in moco/builder.py of facebookresearch/moco-v3, MoCo_ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.base_encoder, self.momentum_encoder = (torchvision.models.resnet18(num_classes=32) for _ in range(2))
        for encoder in (self.base_encoder, self.momentum_encoder):
            encoder.fc = self.mlp(512)
        self.predictor = self.mlp(16)

    def mlp(self, size: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(size, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16, bias=False)
        )


class MultiCropWrapper(nn.Module):
    """Names as in utils.py and vision_transformer.py of facebookresearch/dino."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc, self.backbone.head = nn.Identity(), nn.Identity()
        self.head = nn.Module()
        self.head.mlp = nn.Sequential(nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 16))
        self.head.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(16, 32, bias=False))


class ResNetSimCLR(nn.Module):
    """Names as in models/resnet_simclr.py of sthalles/SimCLR."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet18(num_classes=16)
        self.backbone.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), self.backbone.fc)


def holds(path: Path, expected: nn.Module, which: str = "default") -> bool:
    encoder = TimmEncoder("resnet18")
    encoder.load_weights(read_contents(path, which).weights, str(path))
    state = expected.state_dict()
    return all(torch.equal(v, state[k]) for k, v in encoder.timm.model.state_dict().items())


def test_moco_v2(tmp_path: Path, process_group: None) -> None:
    model = MoCo()
    for epoch in (9, 10):
        content = {
            "epoch": epoch + 1,
            "arch": "resnet18",
            "state_dict": wrapped_in_ddp(model).state_dict(),
            "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
        }
        torch.save(content, tmp_path / f"checkpoint_{epoch:04d}.pth.tar")
    found = find_checkpoints(tmp_path)
    assert [(c.epoch, c.kind, c.architecture) for c in found] == [(9, "MoCo", "resnet18"), (10, "MoCo", "resnet18")]
    for which, encoder in (("default", model.encoder_q), ("trained", model.encoder_q), ("ema", model.encoder_k)):
        assert holds(found[0].path, encoder, which)
    left_out = read_contents(found[0].path).left_out
    assert {"queue", "encoder_k.conv1.weight", "encoder_q.fc.0.weight"} <= set(left_out)


def test_moco_v3(tmp_path: Path, process_group: None) -> None:
    model = MoCoV3()
    content = {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": wrapped_in_ddp(model).state_dict(),
        "optimizer": {},
        "scaler": {},
    }
    torch.save(content, tmp_path / "checkpoint_0000.pth.tar")
    (found,) = find_checkpoints(tmp_path)
    assert (found.epoch, found.kind) == (0, "MoCo v3")
    assert holds(found.path, model.base_encoder)
    assert holds(found.path, model.momentum_encoder, "ema")


def test_dino(tmp_path: Path, process_group: None) -> None:
    student, teacher = MultiCropWrapper(), MultiCropWrapper()
    for epoch in (0, 20, 39):
        content = {
            "student": wrapped_in_ddp(student).state_dict(),
            # with batch norms the teacher is wrapped too
            "teacher": wrapped_in_ddp(teacher).state_dict(),
            "optimizer": torch.optim.SGD(student.parameters(), 0.1).state_dict(),
            "epoch": epoch + 1,
            "args": argparse.Namespace(arch="resnet18", out_dim=32, output_dir="."),
            "dino_loss": {"center": torch.zeros(1, 32)},
        }
        torch.save(content, tmp_path / "checkpoint.pth")
        if epoch % 20 == 0:
            torch.save(content, tmp_path / f"checkpoint{epoch:04}.pth")
    found = find_checkpoints(tmp_path)
    assert [(c.epoch, c.path.name) for c in found] == [
        (0, "checkpoint0000.pth"),
        (20, "checkpoint0020.pth"),
        (39, "checkpoint.pth"),
    ], "the running file counts as the epoch that it is"
    assert {(c.kind, c.architecture) for c in found} == {("teacher and student", "resnet18")}
    assert holds(found[0].path, teacher.backbone)
    assert holds(found[0].path, teacher.backbone, "ema")
    assert holds(found[0].path, student.backbone, "trained")


def test_simclr(tmp_path: Path) -> None:
    model = ResNetSimCLR()
    content = {"epoch": 200, "arch": "resnet18", "state_dict": model.state_dict(), "optimizer": {}}
    torch.save(content, tmp_path / "checkpoint_0200.pth.tar")
    (found,) = find_checkpoints(tmp_path)
    assert (found.epoch, found.architecture, found.kind) == (200, "resnet18", "self-supervised")
    assert holds(found.path, model.backbone)


def test_resnet_in_a_sequential_as_in_lightlys_documentation(tmp_path: Path) -> None:
    resnet = torchvision.models.resnet18()

    class SimCLR(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(resnet.children())[:-1])
            self.projection_head = nn.Sequential(nn.Linear(512, 128))

    torch.save({"state_dict": SimCLR().state_dict()}, tmp_path / "epoch=99-step=100.ckpt")
    assert holds(tmp_path / "epoch=99-step=100.ckpt", resnet)
    assert inferred_architecture(read_contents(tmp_path / "epoch=99-step=100.ckpt").weights)[0] == "resnet18"


@pytest.mark.parametrize(
    "name", ["convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "regnety_002", "test_resnet"]
)
def test_a_network_of_each_family_is_told_by_its_tensors(name: str) -> None:
    # on an image classifier's tensors, and nothing else
    assert name in inferred_architecture(timm.create_model(name).state_dict())
    assert name in inferred_architecture(timm.create_model(name, in_chans=1).state_dict())


# plain data of packages that need not be here


def test_plain_data_of_other_packages_is_read_without_importing_them(tmp_path: Path) -> None:
    import sys
    import types

    module = types.ModuleType("yacs.config")

    class CfgNode(dict[str, Any]):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    sys.modules["yacs.config"] = module
    try:
        content = {
            "model": network().state_dict(),
            "epoch": 4,
            "config": CfgNode(MODEL="x"),
            "max_accuracy": np.float64(1),
        }
        torch.save(content, tmp_path / "ckpt_epoch_4.pth")
    finally:
        del sys.modules["yacs.config"]
    contents = read_contents(tmp_path / "ckpt_epoch_4.pth")
    assert contents.epoch == 4
    assert "yacs.config" not in sys.modules


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "builtins.exec", "posix.system", "subprocess.Popen", "numpy.load"]
)
def test_what_could_act_is_never_allowed(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    import importlib

    class Trap:
        def __reduce__(self) -> Any:
            return getattr(importlib.import_module(module), function), (f"touch {tmp_path}/executed",)

    torch.save({"state_dict": network().state_dict(), "args": Trap()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is refused: it holds Python objects"):
        read_contents(tmp_path / "a.pth")
    assert os.listdir(tmp_path) == ["a.pth"]

"""Memory of a training step: counted by hand, with and without values, and what it makes of a memory target."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO_RUN
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_nnunet.cli.main import main
from mtl_nnunet.cli.select_checkpoint import main as select
from mtl_nnunet.errors import UserError
from mtl_nnunet.memory import (
    FRAGMENTATION,
    GB,
    RESERVE,
    Kept,
    TrainingMemory,
    five_percent_batch,
    kept_tensors,
    largest_batch,
    memory_counter,
    mixed_precision,
    size_batches,
)
from mtl_nnunet.plans import with_timm_unet

NAME = "Dataset001_Phantom"
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "ball": 1, "core": 2},
    "numTraining": 200,
    "file_ending": ".nii.gz",
}
RECORD = {"encoder": "test_resnet", "input_channels": 1, "encoder_sha256": "0" * 64}


class HandWorked(nn.Module):
    """Two convolutions and a ReLU, small enough to count on paper."""

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(input_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, num_classes, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.layers(images)]


def plain_unet(dimensions: int) -> dict[str, Any]:
    """A small network of nnU-Net's own, as plans name it."""
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [8, 16, 32],
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * 3,
            "strides": [[1] * dimensions, [2] * dimensions, [2] * dimensions],
            "n_conv_per_stage": [2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def stock_plans() -> dict[str, Any]:
    common = {"batch_size": 12, "batch_dice": True}
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_shape_after_transp": [36, 50, 35],
        "label_manager": "LabelManager",
        "configurations": {
            "2d": {
                **common,
                "patch_size": [56, 40],
                "median_image_size_in_voxels": [50.0, 35.0],
                "architecture": plain_unet(2),
            },
            "3d_fullres": {
                **common,
                "patch_size": [16, 24, 24],
                "median_image_size_in_voxels": [36.0, 50.0, 35.0],
                "architecture": plain_unet(3),
            },
        },
    }


def plans_of(network: str) -> tuple[dict[str, Any], str]:
    plans = stock_plans()
    if network == "TimmUNet":
        return with_timm_unet(plans, "2d", RECORD), "2d"
    return plans, "2d" if network == "2D" else "3d_fullres"


def hand_worked_plans() -> dict[str, Any]:
    plans = stock_plans()
    architecture = {"network_class_name": f"{__name__}.HandWorked", "arch_kwargs": {}, "_kw_requires_import": []}
    plans["configurations"]["2d"].update(patch_size=[8, 8], architecture=architecture)
    return plans


def test_hand_worked_network_in_float32() -> None:
    network, images = HandWorked(1, 2), torch.zeros(3, 1, 8, 8)
    # the ReLU's result, which the second convolution keeps too; the first one's input is the batch
    kept = kept_tensors(lambda: network(images), [*network.parameters(), images])
    assert kept == Kept(3 * 4 * 64 * 4, 3 * 4 * 64 * 4)


def test_hand_worked_network_in_half_precision() -> None:
    network, images = HandWorked(1, 2), torch.zeros(3, 1, 8, 8)
    with mixed_precision("cpu", torch.bfloat16):
        kept = kept_tensors(lambda: network(images), [*network.parameters(), images])
    half_images, half_weights, relu = 3 * 64 * 2, (4 * 9 + 2 * 4) * 2, 3 * 4 * 64 * 2
    assert kept == Kept(half_images + half_weights + relu, relu)
    assert not torch.is_autocast_enabled("cpu")


def test_hand_worked_step_with_nnunets_loss() -> None:
    batch, classes, pixels = 3, 3, 64
    memory = memory_counter(hand_worked_plans(), "2d", DATASET, dtype=None, device="cpu")(batch)
    parameters = 4 * 9 + 4 + classes * 4 + classes
    relu = batch * 4 * pixels * 4
    # Dice: softmax and one-hot target; cross-entropy: log-softmax, int64 labels and the sum of the class weights
    maps = 3 * batch * classes * pixels * 4 + batch * pixels * 8 + 4
    # Dice of the two foreground classes: numerator, denominator before and after its clamp
    quotient = 3 * 2 * 4
    assert memory.kept == Kept(relu + maps + quotient, relu)
    images, targets = batch * pixels * 4, batch * pixels * 2
    assert memory == TrainingMemory(4 * parameters, 4 * parameters, 8 * parameters, images + targets, memory.kept)
    assert memory.working == 2 * relu
    held = 16 * parameters + images + targets + relu + maps + quotient + 2 * relu
    assert memory.total == RESERVE + round((1 + FRAGMENTATION) * held)


def test_optimiser_step_of_a_network_that_keeps_little_is_counted() -> None:
    assert TrainingMemory(1000, 1000, 2000, 10, Kept(100, 20)).working == 900
    assert TrainingMemory(1000, 1000, 2000, 10, Kept(990, 20)).working == 40


@pytest.mark.parametrize("network", ["TimmUNet", "2D", "3D"])
def test_count_without_values_is_the_count_with_values(network: str) -> None:
    plans, configuration = plans_of(network)
    for batch in (2, 3):
        counts = [
            memory_counter(plans, configuration, DATASET, device="cpu", dtype=None, fake=fake)(batch)
            for fake in (True, False)
        ]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("network", ["TimmUNet", "2D", "3D"])
def test_in_half_precision_the_two_differ_by_the_statistics_of_norms_on_a_cpu(network: str) -> None:
    plans, configuration = plans_of(network)
    batch = 2
    fake, real = (
        memory_counter(plans, configuration, DATASET, device="cpu", dtype="bfloat16", fake=fake)(batch)
        for fake in (True, False)
    )
    # mean and scale of each norm: torch computes float32, and says bfloat16 of tensors without values; on CUDA it says float32
    channels = statistics_of_norms(plans, configuration, batch)
    assert real.kept.total - fake.kept.total == channels * 2 * (4 - 2)
    assert real.kept.largest == fake.kept.largest


def test_count_without_norms_is_exact_in_half_precision_too() -> None:
    fake, real = (
        memory_counter(hand_worked_plans(), "2d", DATASET, device="cpu", dtype="bfloat16", fake=fake)(3)
        for fake in (True, False)
    )
    assert fake == real


def statistics_of_norms(plans: dict[str, Any], configuration: str, batch: int) -> int:
    """Channels over which the network's norms compute statistics; instance norm has them for every image."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    a = plans["configurations"][configuration]["architecture"]
    network = get_network_from_plans(
        a["network_class_name"], a["arch_kwargs"], a["_kw_requires_import"], 1, 3, deep_supervision=True
    )
    channels = 0
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            images = batch if isinstance(module, nn.modules.instancenorm._InstanceNorm) else 1
            # decoder stages hold their convolution blocks under two names, which modules() lists once
            channels += images * module.num_features
    return channels


@pytest.mark.parametrize("network", ["TimmUNet", "2D", "3D"])
def test_kept_bytes_are_affine_in_the_batch(network: str) -> None:
    plans, configuration = plans_of(network)
    memory = memory_counter(plans, configuration, DATASET)
    two, four, eight = (memory(b).kept.total for b in (2, 4, 8))
    assert eight - four == 2 * (four - two) > 0
    # what does not grow: half-precision copies of the weights
    assert 0 < two - (four - two) < memory(2).weights


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "a": 1, "ignore": 2}, None),
        ({"background": 0, "whole": [1, 2], "core": 2}, [1, 2]),
        ({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2]),
    ],
)
def test_ignore_label_and_regions_are_counted_with_and_without_values(labels: dict[str, Any], order: Any) -> None:
    dataset = {**DATASET, "labels": labels, **({"regions_class_order": order} if order else {})}
    fake, real = (
        memory_counter(stock_plans(), "2d", dataset, device="cpu", dtype=None, fake=fake)(2) for fake in (True, False)
    )
    assert fake == real


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, as an allocator without fragmentation would hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known[key] = tensor.untyped_storage().nbytes()
                self.live += self.known[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor.untyped_storage(), self.forget, key)
        return made

    def forget(self, key: int) -> None:
        self.live -= self.known.pop(key)


@pytest.mark.parametrize("network", ["TimmUNet", "2D"])
def test_kept_and_working_memory_cover_the_peak_of_backward(network: str) -> None:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plans, configuration = plans_of(network)
    plans["configurations"][configuration]["patch_size"] = [128, 128]
    memory = memory_counter(plans, configuration, DATASET, device="cpu", dtype="bfloat16")(8)
    a = plans["configurations"][configuration]["architecture"]
    with FakeTensorMode():
        model = get_network_from_plans(
            a["network_class_name"], a["arch_kwargs"], a["_kw_requires_import"], 1, 3, deep_supervision=True
        )
        images = torch.zeros(8, 1, 128, 128)
        with LiveBytes() as bytes_:
            with mixed_precision("cpu", torch.bfloat16):
                loss = sum(o.float().softmax(1).square().mean() for o in model(images))
            loss.backward()
    counted = memory.kept.total + memory.working + memory.gradients
    assert bytes_.peak <= counted
    assert counted < 1.25 * bytes_.peak


def line(fixed: int, slope: int) -> Any:
    """A network whose kept bytes are a line, and which otherwise holds nothing."""
    return lambda batch: TrainingMemory(0, 0, 0, 0, Kept(fixed + slope * batch, 0))


@pytest.mark.parametrize("most", [2, 3, 7, 33, 1000])
def test_largest_batch_is_the_last_that_fits(most: int) -> None:
    memory = line(10**6, 10**5)
    assert largest_batch(memory, memory(most).total) == most
    assert largest_batch(memory, memory(most + 1).total - 1) == most
    assert largest_batch(memory, memory(2).total - 1) == 0


@pytest.mark.parametrize("bend", [5, 50])
def test_largest_batch_where_a_weight_is_the_largest_tensor_of_small_batches(bend: int) -> None:
    def memory(batch: int) -> TrainingMemory:
        return TrainingMemory(0, 0, 0, 0, Kept(10**6 * batch, 10**6 * max(bend, batch)))

    for most in (2, 4, 6, 49, 51, 200):
        assert largest_batch(memory, memory(most).total) == most


def test_five_percent_is_nnunets_own_rule() -> None:
    plans = stock_plans()
    voxels = 36 * 50 * 35 * 200
    assert five_percent_batch(plans, "2d", DATASET) == round(0.05 * voxels / (56 * 40)) == 281
    assert five_percent_batch(plans, "3d_fullres", DATASET) == round(0.05 * voxels / (16 * 24 * 24))
    del plans["configurations"]["3d_fullres"]
    assert five_percent_batch(plans, "2d", DATASET) == 281
    del plans["configurations"]["2d"]["median_image_size_in_voxels"]
    with pytest.raises(UserError, match="do not say how many voxels"):
        five_percent_batch(plans, "2d", DATASET)


@pytest.fixture
def planned(nnunet_folders: Path) -> Path:
    folder = nnunet_folders / "preprocessed" / NAME
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    (folder / "nnUNetPlans.json").write_text(json.dumps(stock_plans()))
    return folder


def test_batch_grows_with_the_target_until_the_dataset_binds(planned: Path) -> None:
    source = stock_plans()
    plans = with_timm_unet(source, "2d", RECORD)
    sizes = []
    for target in (1.1, 1.3, 8):
        ((ours, stock),) = size_batches(source, plans, ["2d"], target)
        assert ours.patch_size == (64, 64)
        assert not isinstance(stock, UserError)
        assert (stock.patch_size, stock.network, stock.planned) == ((56, 40), "PlainConvUNet", 12)
        assert ours.memory.total <= target * GB
        assert ours.size == min(ours.fits, ours.covers)
        sizes.append(ours.size)
    assert sizes[0] < sizes[1] < sizes[2] == five_percent_batch(plans, "2d", DATASET) < ours.fits
    small = {**DATASET, "numTraining": 1}
    (planned / "dataset.json").write_text(json.dumps(small))
    ((ours, _),) = size_batches(source, plans, ["2d"], 8)
    assert (ours.size, ours.covers) == (2, 1)


def test_what_does_not_fit_says_what_to_do(planned: Path) -> None:
    plans = with_timm_unet(stock_plans(), "2d", RECORD)
    with pytest.raises(UserError, match=r"does not fit into 1 GB: a batch of 2 .* Select a smaller encoder"):
        size_batches(stock_plans(), plans, ["2d"], 1)
    for target in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="is not valid"):
            size_batches(stock_plans(), plans, ["2d"], target)
    (planned / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        size_batches(stock_plans(), plans, ["2d"], 8)


def test_network_that_cannot_run_at_the_patch_size_is_a_plain_error() -> None:
    plans = with_timm_unet(stock_plans(), "2d", RECORD)
    plans["configurations"]["2d"]["patch_size"] = [60, 60]
    with pytest.raises(
        UserError, match=r"TimmUNet \(test_resnet\) in configuration '2d' cannot be counted at patch size"
    ):
        memory_counter(plans, "2d", DATASET)(2)


def test_command_writes_the_batch_size_and_says_what_decided_it(
    make_dataset: Any, planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(1)
    assert select(["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "12", "-device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["plans", "-d", "1", "-o", "sized", "-gpu_memory_target", "1.3"]) == 0
    out = capsys.readouterr().out
    written = json.loads((planned / "sized.json").read_text())["configurations"]
    assert f"2d: batch {written['2d']['batch_size']} at patch 64 x 64" in out
    assert "PlainConvUNet of 'nnUNetPlans' would get batch" in out
    assert "assumed:" in out
    assert f"3d_fullres: batch {written['3d_fullres']['batch_size']} at patch" in out
    assert main(["plans", "-d", "1", "-o", "sized", "-gpu_memory_target", "1.3", "--overwrite", "--json"]) == 0
    printed = capsys.readouterr()
    counted = {m["configuration"]: m for m in json.loads(printed.out)["memory"]}
    assert {n: m["batch_size"] for n, m in counted.items()} == {n: written[n]["batch_size"] for n in counted}
    assert f"{counted['2d']['bytes'] / 2**30:.2f} GB" in printed.err
    assert main(["plans", "-d", "1", "-o", "flat", "-c", "2d", "-gpu_memory_target", "1.1"]) == 0
    flat = json.loads((planned / "flat.json").read_text())["configurations"]
    assert flat["3d_fullres"] == stock_plans()["configurations"]["3d_fullres"]
    capsys.readouterr()
    assert main(["plans", "-d", "1", "-o", "other", "-gpu_memory_target", "0.5"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (planned / "other.json").exists()
    assert main(["plans", "-d", "1", "-o", "unsized"]) == 0
    unsized = json.loads((planned / "unsized.json").read_text())["configurations"]
    assert unsized["2d"]["batch_size"] == 12


def test_module_is_imported_without_torch() -> None:
    code = "import mtl_nnunet.memory, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The paper's ResNet-50: against the network written out from its description, and files in the published layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from mtl_nnunet.checkpoints import find_checkpoints, read_contents
from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.network import TimmUNet, strides_of
from mtl_nnunet.paper_resnet import PLAIN, WITH_DROP_PATH, PaddedShortcut, UnscaledDropPath, in_timm_names

BLOCKS = (3, 4, 6, 3)
CHANNELS = (64, 256, 512, 1024, 2048)


def norm_of(name: str, channels: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": 0.3 * torch.randn(channels),
        f"{name}.running_mean": 0.3 * torch.randn(channels),
        f"{name}.running_var": torch.rand(channels) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def kernel(out: int, channels: int, size: int) -> Tensor:
    return torch.randn(out, channels, size, size) / (channels * size * size) ** 0.5


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """A state dict with the names and shapes of the published files: an encoder, two empty layers, a classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {"layers.0.stem.0.weight": kernel(64, 3, 7), **norm_of("layers.0.stem.1", 64)}
        for level, depth in enumerate(BLOCKS):
            for number in range(depth):
                block = f"layers.0.levels.{level}.{number}"
                channels, out = CHANNELS[level + (number > 0)], CHANNELS[level + 1]
                shapes = ((out // 4, channels, 1), (out // 4, out // 4, 3), (out, out // 4, 1))
                for i, shape in enumerate(shapes, 1):
                    weights[f"{block}.conv{i}.weight"] = kernel(*shape)
                    weights.update(norm_of(f"{block}.bn{i}", shape[0]))
        return {**weights, "layers.3.weight": torch.randn(1000, 2048), "layers.3.bias": torch.randn(1000)}


def normalised(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    w, b, mean, var = (weights[f"{name}.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var"))
    return (x - mean) / (var + 1e-5).sqrt() * w + b


def block_by_formula(x: Tensor, weights: dict[str, Tensor], name: str, stride: int, keep: float) -> Tensor:
    y = functional.conv2d(x, weights[f"{name}.conv1.weight"])
    y = normalised(y, weights, f"{name}.bn1").clamp(min=0)
    y = functional.conv2d(y, weights[f"{name}.conv2.weight"], stride=stride, padding=1)
    y = normalised(y, weights, f"{name}.bn2").clamp(min=0)
    y = functional.conv2d(y, weights[f"{name}.conv3.weight"])
    y = keep * normalised(y, weights, f"{name}.bn3")
    channels, height, width = x.shape[1:]
    for i in range(0, height, stride):
        for j in range(0, width, stride):
            y[:, :channels, i // stride, j // stride] += x[:, :, i, j]
    return y.clamp(min=0)


def levels_by_formula(images: Tensor, weights: dict[str, Tensor], drop_path_rate: float) -> list[Tensor]:
    x = functional.conv2d(images, weights["layers.0.stem.0.weight"], stride=2, padding=3)
    levels = [normalised(x, weights, "layers.0.stem.1").clamp(min=0)]
    x = functional.max_pool2d(levels[0], 3, stride=2, padding=1)
    before = 0
    for level, depth in enumerate(BLOCKS):
        for number in range(depth):
            keep = 1 - drop_path_rate * before / (sum(BLOCKS) - 1)
            stride = 2 if level > 0 and number == 0 else 1
            x = block_by_formula(x, weights, f"layers.0.levels.{level}.{number}", stride, keep)
            before += 1
        levels.append(x)
    return levels


def saved(published: dict[str, Tensor], file: Path) -> Path:
    torch.save(published, file)
    return file


def test_shortcut_by_hand() -> None:
    image = torch.arange(2 * 3 * 5.0).reshape(1, 2, 3, 5)
    halved = PaddedShortcut(channels=3, stride=(2, 2))(image)
    assert halved.tolist() == [[[[0, 2, 4], [10, 12, 14]], [[15, 17, 19], [25, 27, 29]], [[0, 0, 0], [0, 0, 0]]]]
    widened = PaddedShortcut(channels=5, stride=(1, 1))(image)
    assert torch.equal(widened[:, :2], image)
    assert widened.shape == (1, 5, 3, 5)
    assert not widened[:, 2:].any()
    assert not list(PaddedShortcut(3, (2, 2)).state_dict())


def test_drop_path_drops_unscaled_in_training_and_scales_at_evaluation() -> None:
    x = torch.rand(2000, 2, 1, 1) + 1
    dropping = UnscaledDropPath(0.25)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = dropping.train()(x)
    kept = y.flatten(1).any(1)
    assert torch.equal(y[kept], x[kept])
    assert not y[~kept].any()
    assert 0.7 < kept.float().mean() < 0.8
    assert torch.equal(dropping.eval()(x), 0.75 * x)


@pytest.mark.parametrize(("scheme", "name", "rate"), [("simple", PLAIN, 0.0), ("advanced", WITH_DROP_PATH, 0.1)])
def test_every_level_is_that_of_the_network_written_out(
    published: dict[str, Tensor], scheme: str, name: str, rate: float
) -> None:
    weights, architecture = in_timm_names(published, f"resnet50_{scheme}_pretraining_checkpoint_epoch_20.pt")
    assert architecture == name
    encoder = TimmEncoder(name)
    assert encoder.load_weights(weights, "file") == ["fc.weight", "fc.bias"]
    # odd, not square: rows and columns that a stride leaves over
    images = torch.rand(2, 3, 65, 90)
    with torch.inference_mode():
        features = encoder.eval()(images)
        first = encoder.first_levels(images, 3)
    expected = levels_by_formula(images, published, rate)
    assert [f.shape for f in features] == [e.shape for e in expected]
    for level, (ours, theirs) in enumerate(zip(features, expected, strict=True), 1):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), level
    assert all(torch.equal(a, b) for a, b in zip(first, features[:3], strict=True))


def test_every_published_tensor_has_one_place_in_the_classifier(published: dict[str, Tensor]) -> None:
    weights, _ = in_timm_names(published, "model_state_dict_epoch_1.pt")
    assert len(weights) == len(published) == 296
    classifier = timm.create_model(PLAIN)
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in classifier.state_dict().items()}
    back = {
        "conv1": "layers.0.stem.0",
        "bn1": "layers.0.stem.1",
        "fc": "layers.3",
        **{f"layer{i}": f"layers.0.levels.{i - 1}" for i in (1, 2, 3, 4)},
    }
    for name, tensor in weights.items():
        first, rest = name.split(".", 1)
        assert tensor is published[f"{back[first]}.{rest}"], name


def test_published_files_are_found_in_order_and_load_into_one_channel(
    tmp_path: Path, published: dict[str, Tensor]
) -> None:
    for epoch in (100, 5):
        saved(published, tmp_path / f"resnet50_simple_pretraining_checkpoint_epoch_{epoch}.pt")
    found = find_checkpoints(tmp_path)
    assert [(c.epoch, c.architecture) for c in found] == [(5, PLAIN), (100, PLAIN)]
    encoder = TimmEncoder(PLAIN, 1)
    assert encoder.load_weights(read_contents(found[0].path).weights, "file") == ["fc.weight", "fc.bias"]
    state = encoder.timm.model.state_dict()
    grey = published["layers.0.stem.0.weight"].sum(1, keepdim=True)
    assert torch.allclose(state["conv1.weight"], grey, atol=1e-6)
    assert torch.equal(state["layer4.2.bn3.bias"], published["layers.0.levels.3.2.bn3.bias"])
    assert (encoder.output_channels, encoder.reductions) == (CHANNELS, (2, 4, 8, 16, 32))


def test_a_file_may_say_itself_which_network_it_is_of(tmp_path: Path, published: dict[str, Tensor]) -> None:
    content = {"state_dict": {f"module.{k}": v for k, v in published.items()}, "arch": WITH_DROP_PATH, "epoch": 3}
    torch.save(content, tmp_path / "renamed.pt")
    contents = read_contents(tmp_path / "renamed.pt")
    assert (contents.architecture, contents.epoch) == (WITH_DROP_PATH, 3)
    assert "layer1.0.conv1.weight" in contents.weights


def test_files_of_both_schemes_are_not_ranked_together(tmp_path: Path, published: dict[str, Tensor]) -> None:
    for scheme, epoch in (("simple", 1), ("advanced", 5)):
        saved(published, tmp_path / f"resnet50_{scheme}_pretraining_checkpoint_epoch_{epoch}.pt")
    with pytest.raises(UserError, match="different architectures cannot be ranked together"):
        find_checkpoints(tmp_path)


def deeper(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    extra = {k.replace("levels.3.2.", "levels.3.3."): v for k, v in weights.items() if ".levels.3.2." in k}
    return {**weights, **extra}


def shallower(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in weights.items() if ".levels.3.2." not in k}


def with_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "layers.0.stem.0.bias": torch.zeros(64)}


@pytest.mark.parametrize("change", [deeper, shallower, with_biases])
def test_relatives_of_the_published_network_are_refused(
    published: dict[str, Tensor], change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    weights, name = in_timm_names(change(published), "file")
    assert name == PLAIN
    with pytest.raises(UserError, match=r"checkpoint file does not fit timm encoder 'resnet50_padded_shortcut'"):
        TimmEncoder(name).load_weights(weights, "file")


def test_published_weights_do_not_pass_for_timms_resnet50(published: dict[str, Tensor]) -> None:
    weights, _ = in_timm_names(published, "file")
    with pytest.raises(UserError, match=r"'resnet50': \d+ keys missing \(first: layer1\.0\.downsample"):
        TimmEncoder("resnet50").load_weights(weights, "file")


def test_other_state_dicts_are_left_alone() -> None:
    weights = timm.create_model("test_resnet").state_dict()
    same, name = in_timm_names(weights, "resnet50_advanced.pt")
    assert name is None
    assert same == dict(weights)


def test_the_papers_other_encoders_are_refused_by_name(tmp_path: Path) -> None:
    file = saved({"layers.0.first_block.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "unet_encoder_epoch_1.pt")
    with pytest.raises(UserError, match=r"unet_encoder_epoch_1\.pt holds the Swin or the plain U-Net encoder"):
        find_checkpoints(file)


@pytest.mark.parametrize("name", [PLAIN, WITH_DROP_PATH])
def test_trains_inside_a_unet(name: str) -> None:
    strides = strides_of(TimmEncoder(name, 1))
    assert strides == [[1, 1], *[[2, 2]] * 5]
    network = TimmUNet(1, 2, name, strides).train()
    logits = network(torch.rand(2, 1, 64, 32))
    assert logits.shape == (2, 2, 64, 32)
    logits.square().mean().backward()
    gradients = [p.grad for k, p in network.encoder.named_parameters() if "fc." not in k]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)

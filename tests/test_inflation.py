"""2D encoders made three-dimensional: a volume that is constant along the new axis gives the features of its slice."""

from __future__ import annotations

from itertools import pairwise

import pytest
import timm
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from timm.models import adapt_input_conv

from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.inflation import Depth, depth_of_plans, inflated_kernel
from mtl_nnunet.network import TimmUNet, strides_of

FAMILIES = {
    "ResNet": "test_resnet",
    "ResNet with average-pooled shortcuts": "resnet26d",
    "ResNeXt": "resnext50_32x4d",
    "SE-ResNet": "seresnet18",
    "the paper's ResNet": "resnet50_padded_shortcut_droppath",
    "ConvNeXt": "test_convnext",
    "ConvNeXt V2": "convnextv2_atto",
    "EfficientNet": "test_efficientnet",
    "EfficientNet with TensorFlow's padding": "tf_efficientnet_lite0",
    "RegNetX": "regnetx_002",
    "RegNetY": "regnety_002",
    "MobileNetV3": "mobilenetv3_small_050",
    "MobileNetV4": "mobilenetv4_conv_small_035",
}
# 3 mm slices of 1 mm pixels, as nnU-Net plans them: the depth waits for the plane
ANISOTROPIC = ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]])
ISOTROPIC = ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 6)


def trained_looking(name: str, channels: int) -> TimmEncoder:
    """Random weights whose norms are not the identity."""
    torch.manual_seed(0)
    encoder = TimmEncoder(name, channels).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    for key, parameter in encoder.named_parameters():
        # layer scale starts so small that a ConvNeXt block would count for nothing
        if key.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.0)
    return encoder


def inflated(flat: TimmEncoder, plans: tuple[list[list[int]], list[list[int]]], weights: str) -> TimmEncoder:
    depth = depth_of_plans(*plans, flat.reductions, weights)
    volumetric = TimmEncoder(flat.name, flat.input_channels, depth=depth)
    volumetric.load_weights(flat.timm.model.state_dict(), "made here")
    return volumetric.eval()


@pytest.mark.parametrize("plans", [ISOTROPIC, ANISOTROPIC], ids=["isotropic", "anisotropic"])
@pytest.mark.parametrize("name", FAMILIES.values(), ids=FAMILIES.keys())
def test_constant_volume_gives_the_features_of_its_slice(
    name: str, plans: tuple[list[list[int]], list[list[int]]]
) -> None:
    flat = trained_looking(name, 2)
    volumetric = inflated(flat, plans, "centred")
    assert volumetric.depth is not None
    num_slices = 2 * volumetric.depth.depth_reductions[-1]
    image = torch.randn(1, 2, 64, 96)
    with torch.no_grad():
        expected = flat(image)
        features = volumetric(image[:, :, None].repeat(1, 1, num_slices, 1, 1))
    for level, (a, b) in enumerate(zip(expected, features, strict=True)):
        assert b.shape[2] == num_slices // volumetric.depth.depth_reductions[level + 1]
        # with centred kernels every slice, also the first and the last
        for i in range(b.shape[2]):
            assert torch.allclose(a, b[:, :, i], atol=1e-4 * float(a.abs().max())), (level, i)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "resnet10t"])
def test_averaged_kernels_give_them_too_away_from_the_border(name: str) -> None:
    flat = trained_looking(name, 1)
    volumetric = inflated(flat, ANISOTROPIC, "averaged")
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected, features = flat(image), volumetric(image[:, :, None].repeat(1, 1, 64, 1, 1))
    for a, b in zip(expected, features, strict=True):
        assert torch.allclose(a, b[:, :, b.shape[2] // 2], atol=1e-4 * float(a.abs().max()))
    assert not torch.allclose(a, b[:, :, 0], atol=1e-3 * float(a.abs().max())), "zeros are padded at the border"


@pytest.mark.parametrize("weights", ["centred", "averaged"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_inflated_kernel_sums_to_the_flat_one(weights: str, depth: int) -> None:
    kernel = torch.randn(4, 2, 3, 3)
    volumetric = inflated_kernel(kernel, depth, weights)
    assert volumetric.shape == (4, 2, depth, 3, 3)
    assert torch.allclose(volumetric.sum(2), kernel, atol=1e-6)


def test_slices_are_mixed_only_where_nnunet_planned_it() -> None:
    flat = trained_looking("test_resnet", 1)
    volume = torch.randn(1, 1, 16, 64, 64)
    shuffled = volume[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    one = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 2, 2]]
    never = inflated(flat, (one, [[1, 3, 3]] * 4), "averaged")
    mixed = inflated(flat, ISOTROPIC, "averaged")
    with torch.no_grad():
        alone, together = never(volume), mixed(volume.repeat(1, 1, 2, 1, 1))
        for a, b in zip(alone, flat_stack(flat, volume), strict=True):
            assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max())), "a depth of 1 everywhere is slice by slice"
        assert not torch.allclose(together[-1], mixed(shuffled.repeat(1, 1, 2, 1, 1))[-1], atol=1e-3)


def flat_stack(flat: TimmEncoder, volume: torch.Tensor) -> list[torch.Tensor]:
    slices = [flat(volume[:, :, i]) for i in range(volume.shape[2])]
    return [torch.stack(levels, dim=2) for levels in zip(*slices, strict=True)]


@pytest.mark.parametrize(
    ("strides", "kernels", "reductions", "expected_depths", "expected_kernels"),
    [
        (*ANISOTROPIC, (2, 4, 8, 16, 32), (1, 1, 2, 4, 4, 4), (1, 3, 3, 3, 3, 3)),
        (*ANISOTROPIC, (4, 8, 16, 32), (1, 2, 4, 4, 4), (1, 3, 3, 3, 3)),
        (*ISOTROPIC, (4, 8, 16, 32), (1, 4, 8, 16, 32), (3, 3, 3, 3, 3)),
        # nnU-Net halves a deep, narrow patch further along the depth than an encoder does in the plane
        ([[1, 1, 1], [2, 2, 2], [2, 1, 1], [2, 1, 1]], [[3, 3, 3]] * 4, (2, 4, 8), (1, 2, 4, 8), (3, 3, 3, 3)),
        ([[1, 1, 1], [2, 2, 2]], [[3, 3, 3], [2, 3, 3]], (2, 4), (1, 2, 2), (3, 3, 3)),
    ],
)
def test_depth_follows_the_plans(
    strides: list[list[int]],
    kernels: list[list[int]],
    reductions: tuple[int, ...],
    expected_depths: tuple[int, ...],
    expected_kernels: tuple[int, ...],
) -> None:
    depth = depth_of_plans(strides, kernels, reductions, "centred")
    assert depth.depth_reductions == expected_depths
    assert depth.kernel_sizes == expected_kernels
    again = depth_of_plans(strides_of_depth(depth), [[k, 3, 3] for k in depth.kernel_sizes], reductions, "centred")
    assert again == depth, "plans that were made for the encoder are left alone"


def strides_of_depth(depth: Depth) -> list[list[int]]:
    steps = [(1, 1), *zip(depth.depth_reductions, depth.reductions, strict=True)]
    return [[b[0] // a[0], b[1] // a[1], b[1] // a[1]] for a, b in pairwise(steps)]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mobilenetv4_hybrid_medium", "test_byobnet"])
def test_what_has_no_counterpart_is_refused_by_its_type(name: str) -> None:
    reductions = TimmEncoder(name).reductions
    with pytest.raises(UserError, match="cannot be made three-dimensional: it holds a"):
        TimmEncoder(name, 1, depth=depth_of_plans(*ISOTROPIC, reductions, "centred"))


def test_unknown_inflation_is_refused() -> None:
    with pytest.raises(UserError, match="'sideways' is unknown"):
        TimmEncoder("test_resnet", 1, depth=Depth((1, 2), (1, 2), (3, 3), "sideways"))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("channels", [1, 4])
def test_network_has_the_sizes_of_its_plans_and_every_parameter_learns(name: str, channels: int) -> None:
    depth = depth_of_plans(*ANISOTROPIC, TimmEncoder(name).reductions, "centred")
    strides = strides_of(TimmEncoder(name, depth=depth))
    kwargs = {"encoder": name, "strides": strides, "kernel_sizes": [[k, 3, 3] for k in depth.kernel_sizes]}
    network = get_network_from_plans("mtl_nnunet.network.TimmUNet", kwargs, [], channels, 3, deep_supervision=True)
    outputs = network(torch.randn(2, channels, 8, 64, 32))
    size, expected = [8, 64, 32], []
    for step in strides[:-1]:
        size = [s // f for s, f in zip(size, step, strict=True)]
        expected.append((2, 3, *size))
    assert [tuple(o.shape) for o in outputs] == expected
    sum(o.mean() for o in outputs).backward()
    unused = {id(p) for p in network.encoder.unused_parameters()}
    assert {k for k, p in network.named_parameters() if p.grad is None} == {
        k for k, p in network.named_parameters() if id(p) in unused
    }


@pytest.mark.parametrize("volumetric", [False, True])
def test_channels_of_a_cascade_start_at_zero_weights(volumetric: bool) -> None:
    strides = [[1, 1, 1], *[[2, 2, 2]] * 5] if volumetric else [[1, 1], *[[2, 2]] * 5]
    network = TimmUNet(3, 2, "test_resnet", strides, image_channels=1)
    torch.manual_seed(1)
    weights = timm.create_model("test_resnet").state_dict()
    network.encoder.load_weights(weights, "made here")
    first = network.encoder.timm.model.conv1[0].weight
    assert first.shape[1] == 3
    expected = adapt_input_conv(1, weights["conv1.0.weight"].clone())
    assert torch.allclose(first[:, :1].sum(2) if volumetric else first[:, :1], expected)
    assert not first[:, 1:].any()
    network.encoder.eval()
    images = torch.randn(1, 3, *[32] * (3 if volumetric else 2))
    with torch.no_grad():
        before = network.encoder(images)
        images[:, 1:] += 5
        assert all(torch.equal(a, b) for a, b in zip(before, network.encoder(images), strict=True))
    network.encoder(images)[-1].sum().backward()
    assert first.grad is not None
    assert first.grad[:, 1:].any(), "they learn"

"""TimmUNet as nnU-Net builds and uses it."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.network import TimmUNet, strides_of


def build(name: str, channels: int, deep_supervision: bool = True) -> TimmUNet:
    """As nnU-Net does it from the plans."""
    kwargs = {"encoder": name, "strides": strides_of(TimmEncoder(name)), "n_conv_per_stage_decoder": 2}
    return get_network_from_plans(
        "mtl_nnunet.network.TimmUNet", kwargs, [], channels, 3, deep_supervision=deep_supervision
    )


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_outputs_have_the_sizes_of_nnunets_deep_supervision_scales(name: str, channels: int) -> None:
    network = build(name, channels)
    scales = (1 / np.cumprod(np.vstack(strides_of(network.encoder)), axis=0))[:-1]
    outputs = network(torch.randn(2, channels, 64, 96))
    assert [tuple(o.shape) for o in outputs] == [(2, 3, int(64 * a), int(96 * b)) for a, b in scales]
    network.decoder.deep_supervision = False
    assert network(torch.randn(2, channels, 64, 96)).shape == (2, 3, 64, 96)


def test_every_parameter_gets_a_gradient() -> None:
    network = build("test_resnet", 1)
    sum(o.mean() for o in network(torch.randn(2, 1, 64, 64))).backward()
    assert not [k for k, p in network.named_parameters() if p.grad is None]


def test_encoder_is_stored_once_and_nothing_would_overwrite_its_weights() -> None:
    network = build("test_resnet", 1)
    encoder = {v.data_ptr() for v in network.encoder.state_dict().values() if v.numel() > 1}
    assert len([k for k, v in network.state_dict().items() if v.data_ptr() in encoder]) == len(encoder)
    assert not hasattr(network, "initialize")


def test_strides_of_another_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match="not those of timm encoder 'test_convnext'"):
        TimmUNet(1, 3, "test_convnext", strides_of(TimmEncoder("test_resnet")))


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
INDUCTOR = pytest.param("inductor", 1e-3, marks=[pytest.mark.slow, needs_compiler])
STRIDES = {2: strides_of(TimmEncoder("test_resnet")), 3: [[1, 1, 1], [1, 2, 2], [2, 2, 2], *[[1, 2, 2]] * 3]}


@pytest.mark.parametrize("axes", STRIDES)
@pytest.mark.parametrize(("backend", "tolerance"), [("aot_eager", 1e-5), INDUCTOR])
def test_compiled_network_gives_the_same_outputs_and_gradients(backend: str, tolerance: float, axes: int) -> None:
    torch._dynamo.reset()
    network = TimmUNet(1, 3, "test_resnet", STRIDES[axes], deep_supervision=True)
    copied = copy.deepcopy(network)
    copied.encoder.frozen_statistics = network.encoder.frozen_statistics = True
    compiled = torch.compile(copied, backend=backend)
    images = torch.randn(2, 1, *([4] if axes == 3 else []), 64, 64)
    outputs = [module.train()(images) for module in (network, compiled)]
    for predicted in outputs:
        sum(o.square().mean() for o in predicted).backward()
    for output, other in zip(*outputs, strict=True):
        torch.testing.assert_close(output, other, rtol=tolerance, atol=tolerance)
    for (name, a), b in zip(network.named_parameters(), copied.parameters(), strict=True):
        assert torch.linalg.vector_norm(a.grad - b.grad) <= tolerance * (1 + torch.linalg.vector_norm(a.grad)), name
    for (name, a), b in zip(network.named_buffers(), copied.buffers(), strict=True):
        assert torch.equal(a, b), f"{name} is frozen"

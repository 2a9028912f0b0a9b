"""TimmUNet as nnU-Net builds and uses it."""

from __future__ import annotations

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

"""The encoder: timm's features, strict loading, channel adaptation."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import adapt_input_conv

from mtl_nnunet.checkpoints import read_contents
from mtl_nnunet.encoder import TimmEncoder, random_encoder
from mtl_nnunet.errors import UserError

FAMILIES = {
    "test_resnet": "conv1.0.weight",
    "resnet18": "conv1.weight",
    "test_convnext": "stem.0.weight",
    "test_efficientnet": "conv_stem.weight",
    "regnety_002": "stem.conv.weight",
    "mobilenetv3_small_050": "conv_stem.weight",
}


def classifier(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=7)
        # running statistics of a network that has seen data are not zeros and ones
        return {k: torch.rand_like(v) + 0.1 if "running" in k else v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_tensor_comes_from_the_file(name: str, channels: int) -> None:
    weights = classifier(name)
    encoder = TimmEncoder(name, channels)
    not_loaded = encoder.load_weights(weights, "file")
    own = encoder.timm.model.state_dict()
    for key, tensor in own.items():
        expected = adapt_input_conv(channels, weights[key].clone()) if key == FAMILIES[name] else weights[key]
        assert torch.equal(tensor, expected), key
    assert own[FAMILIES[name]].shape[1] == channels
    assert set(own) | set(not_loaded) == set(weights)
    assert not set(own) & set(not_loaded)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
def test_features_are_those_of_timms_own_classifier(name: str) -> None:
    weights = classifier(name)
    whole = timm.create_model(name, num_classes=7)
    whole.load_state_dict(weights)
    encoder = TimmEncoder(name)
    encoder.load_weights(weights, "file")
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = whole.eval().forward_intermediates(images, intermediates_only=True)
        features = encoder.eval()(images)
    assert [f.shape[1] for f in features] == list(encoder.output_channels)
    assert [64 // f.shape[2] for f in features] == list(encoder.reductions)
    for ours, theirs in zip(features, expected[-len(features) :], strict=True):
        assert torch.equal(ours, theirs)


def test_one_channel_gives_the_response_of_a_grey_image_in_all_three() -> None:
    weights = classifier("resnet18")
    grey, colour = TimmEncoder("resnet18", 1), TimmEncoder("resnet18", 3)
    grey.load_weights(weights, "file"), colour.load_weights(weights, "file")
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        for a, b in zip(grey.eval()(image), colour.eval()(image.expand(1, 3, 64, 64)), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_checkpoint_of_a_deeper_relative_is_refused_although_every_key_fits() -> None:
    with pytest.raises(UserError, match=r"tensors that this network does not have .*-encoder NAME"):
        TimmEncoder("resnet18").load_weights(classifier("resnet34"), "file")


def test_checkpoint_of_another_architecture_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"checkpoint file does not fit timm encoder 'resnet18': \d+ keys missing \(first: "
    ):
        TimmEncoder("resnet18").load_weights(classifier("test_convnext"), "file")


def test_tensor_of_another_shape_is_refused() -> None:
    weights = classifier("resnet18")
    weights["layer1.0.conv1.weight"] = weights["layer1.0.conv1.weight"][:32]
    with pytest.raises(
        UserError, match=r"layer1\.0\.conv1\.weight has shape \(32, 64, 3, 3\), expected \(64, 64, 3, 3\)"
    ):
        TimmEncoder("resnet18").load_weights(weights, "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weights = classifier("test_resnet")
    weights["layer2.0.conv1.weight"].flatten()[3] = value
    with pytest.raises(UserError, match=r"NaN or infinite .*layer2\.0\.conv1\.weight"):
        TimmEncoder("test_resnet").load_weights(weights, "file")


def test_half_precision_loads_to_single(demo_run) -> None:
    weights = read_contents(demo_run / "checkpoint-39.pth.tar").weights
    assert weights["conv1.0.weight"].dtype == torch.float16
    encoder = TimmEncoder("test_resnet")
    encoder.load_weights(weights, "file")
    own = encoder.timm.model.state_dict()
    assert own["layer1.0.conv1.weight"].dtype == torch.float32
    assert torch.equal(own["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"].float())


def test_loading_leaves_the_given_weights_alone() -> None:
    weights = classifier("test_resnet")
    before = {k: v.clone() for k, v in weights.items()}
    TimmEncoder("test_resnet", 4).load_weights(weights, "file")
    assert all(torch.equal(before[k], weights[k]) for k in before)


@pytest.mark.parametrize("name", ["densenet121", "vgg11", "vit_tiny_patch16_224", "hrnet_w18_small"])
def test_networks_without_a_pyramid_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' gives no feature pyramid.*ResNet, ConvNeXt"):
        TimmEncoder(name)


def test_unknown_encoder_suggests_close_names() -> None:
    with pytest.raises(UserError, match=r"knows no encoder 'resnet5O'.*resnet50"):
        TimmEncoder("resnet5O")


def test_a_device_that_is_not_used_yet_keeps_the_seed_it_was_given() -> None:
    # PyTorch seeds it when it is first used, by what it was told last
    told = torch.cuda._lazy_seed_tracker.get_calls
    torch.manual_seed(5)
    before = told()
    random_encoder("test_resnet", 1, 0)
    assert told() == before
    assert torch.cuda.is_initialized() or before


def test_random_encoder_repeats_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (
        random_encoder("test_resnet", 1, 0),
        random_encoder("test_resnet", 1, 0),
        random_encoder("test_resnet", 1, 1),
    )
    assert torch.equal(torch.rand(3), expected)
    key = "layer1.0.conv1.weight"
    states = [e.timm.model.state_dict()[key] for e in (a, b, c)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", list(FAMILIES))
def test_stopping_early_changes_no_level(name: str) -> None:
    encoder = random_encoder(name, 1, 0).eval()
    images = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        every = encoder(images)
        for num_levels in range(1, len(every) + 1):
            some = encoder.first_levels(images, num_levels)
            assert len(some) == num_levels
            assert all(torch.equal(a, b) for a, b in zip(some, every[:num_levels], strict=True))


@pytest.mark.parametrize("name", ["edgenext_xx_small", "rdnet_tiny"])
def test_networks_whose_modules_take_lists_are_encoders_too(name: str) -> None:
    encoder = TimmEncoder(name, 1)
    assert [f.shape[1] for f in encoder(torch.zeros(1, 1, 64, 64))] == list(encoder.output_channels)

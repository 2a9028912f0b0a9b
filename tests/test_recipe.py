"""Recipes: where hyper-parameters come from, parameter groups, schedule, clipping and frozen statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from timm.optim import param_groups_layer_decay

from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.network import TimmUNet, strides_of
from mtl_nnunet.recipe import (
    EpochwiseLR,
    Recipe,
    optimizer_of,
    parameter_groups,
    read_recipe,
    recipe,
    recipe_of_environment,
)


def network(name: str = "test_resnet") -> TimmUNet:
    return TimmUNet(1, 3, name, strides_of(TimmEncoder(name)))


def test_file_and_text_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"optimizer": "sgd", "lr": 5e-4, "frozen_epochs": "all"}))
    assert recipe(read_recipe(str(file), "file")) == recipe(
        read_recipe("optimizer=sgd, lr=5e-4, frozen_epochs=all", "text")
    )


def test_later_changes_win_and_nothing_else_changes() -> None:
    made = recipe({"lr": 1e-2, "momentum": 0.9}, {"lr": "2e-3"})
    assert made == Recipe(lr=2e-3, momentum=0.9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "name=value"),
        ("lr=fast", "lr=fast makes no sense"),
        ("lr=0", "above 0"),
        ("lr=nan", "makes no sense"),
        ("lr=inf", "makes no sense"),
        ("weight_decay=-1", "from 0"),
        ("layer_decay=1.5", "at most 1"),
        ("warmup_epochs=2.5", "whole number"),
        ("frozen_epochs=some", "or all"),
        ("clip_norm=13", "at most 12"),
        ("optimizer=lion", "adamw or sgd"),
        ("batch_norm=on", "auto or live or frozen"),
        ("momentum=1", "below 1"),
        ("lr=1e-3,lr=1e-4", "stands there twice"),
        ("warmup_epochs=inf", "whole number"),
        ("learning_rate=1e-3", "unknown hyper-parameter 'learning_rate'"),
        ("learning_rate=1e-3", "batch_norm, clip_norm."),
        ("missing.json", "cannot be read as JSON"),
    ],
)
def test_senseless_recipes_are_refused_with_what_is_expected(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_RECIPE", text)
    with pytest.raises(UserError, match="MTL_RECIPE") as caught:
        recipe_of_environment()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "{",
        '{"lr": null}',
        '{"lr": true}',
        '{"lr": 1, "lr": 2}',
        '{"warmup_epochs": Infinity}',
        '{"lr": 1' + "0" * 400 + "}",
    ],
)
def test_damaged_files_are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"mine\.json"):
        read_recipe(str(file), "MTL_RECIPE")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_every_parameter_is_in_one_group_at_its_rate(name: str, layer_decay: float) -> None:
    net = network(name)
    how = Recipe(lr=1e-3, encoder_lr_factor=0.1, layer_decay=layer_decay)
    groups = parameter_groups(net, how)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    encoder = {id(p) for p in net.encoder.parameters()}
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    for group in groups:
        assert {id(p) in encoder for p in group["params"]} == {group["part"] == "encoder"}
        if group["weight_decay"] > 0:
            assert all(p.ndim > 1 for p in group["params"])
    assert {rates[i] for i in rates if i not in encoder} == {1e-3}
    of_encoder = [rates[i] for i in rates if i in encoder]
    assert max(of_encoder) == pytest.approx(1e-4), "the deepest layers have the encoder's rate"
    # timm's own layer-wise decay on the same network, up to a layer that is not there any more
    theirs = {
        id(p): g["lr_scale"]
        for g in param_groups_layer_decay(net.encoder.timm.model, layer_decay=layer_decay)
        for p in g["params"]
    }
    ratios = [rates[i] / theirs[i] for i in rates if i in encoder]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_layer_decay_slows_shallow_layers_down() -> None:
    net = network()
    rates = {
        id(p): g["lr"]
        for g in parameter_groups(net, Recipe(encoder_lr_factor=0.1, layer_decay=0.5))
        for p in g["params"]
    }
    model = net.encoder.timm.model
    first, last = next(model.conv1.parameters()), list(model.layer4.parameters())[-1]
    assert rates[id(last)] == pytest.approx(1e-4)
    # the stem, then the blocks of four layers
    num_blocks = sum(len(getattr(model, f"layer{i}")) for i in range(1, 5))
    assert rates[id(first)] == pytest.approx(1e-4 * 0.5**num_blocks)


def test_biases_and_norms_are_not_decayed() -> None:
    net = network("test_convnext")
    for group in parameter_groups(net, Recipe(weight_decay=0.3)):
        assert group["weight_decay"] in (0.0, 0.3)
        assert (group["weight_decay"] == 0) == all(p.ndim <= 1 for p in group["params"])


def test_frozen_encoder_is_in_no_group_and_needs_no_gradient() -> None:
    net = network()
    groups = parameter_groups(net, Recipe(frozen_epochs="all"))
    assert {g["part"] for g in groups} == {"decoder"}
    assert not any(p.requires_grad for p in net.encoder.parameters())


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


def test_encoder_thaws_with_a_warmup_of_its_own_and_then_keeps_its_ratio() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "lr": 1e-3, "part": "decoder"}, {"params": [b], "lr": 1e-4, "part": "encoder"}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = EpochwiseLR(optimizer, 100, warmup_epochs=4, frozen_epochs=20)
    ratios = []
    for epoch in range(100):
        scheduler.step(epoch)
        decoder, encoder = (g["lr"] for g in optimizer.param_groups)
        assert decoder == pytest.approx(1e-3 * slow_factor(epoch, 100, 4))
        ratios.append(encoder / decoder)
    assert ratios[:20] == [0.0] * 20
    assert ratios[20:24] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert ratios[24:] == pytest.approx([0.1] * 76)


@pytest.mark.parametrize("how", [Recipe(), Recipe(optimizer="sgd"), Recipe(optimizer="sgd", momentum=0)])
def test_rate_of_zero_leaves_the_encoder_bit_for_bit_alone(how: Recipe) -> None:
    net = network()
    optimizer = optimizer_of(parameter_groups(net, how), how)
    EpochwiseLR(optimizer, 10, frozen_epochs=5).step(0)
    before = {k: p.clone() for k, p in net.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(2, 1, 64, 64)).pow(2).mean().backward()
        optimizer.step()
    for key, parameter in net.named_parameters():
        if not key.startswith("decoder.seg_layers"):
            assert torch.equal(parameter, before[key]) == key.startswith("encoder."), key


def test_gradient_is_clipped_to_the_recipes_norm_before_the_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    how = Recipe(optimizer="sgd", momentum=0.0, lr=1.0, clip_norm=0.5)
    optimizer = optimizer_of([{"params": [parameter], "lr": 1.0, "weight_decay": 0.0}], how)
    parameter.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.3, 0.0, -0.4, 0.0], abs=1e-5)
    gentle = torch.tensor([0.1, 0.0, 0.0, 0.0])
    parameter.grad = gentle.clone()
    optimizer.step()
    assert parameter.tolist() == pytest.approx([-0.4, 0.0, -0.4, 0.0], abs=1e-5)


def test_statistics_of_small_batches_are_frozen_unless_told_otherwise() -> None:
    assert [Recipe().freezes_statistics(n) for n in (1, 2, 3, 4, 12)] == [True, True, True, False, False]
    assert not Recipe(batch_norm="live").freezes_statistics(2)
    assert Recipe(batch_norm="frozen").freezes_statistics(100)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_frozen_statistics_stay_frozen_when_nnunet_switches_to_training(name: str) -> None:
    net = network(name)
    net.encoder.frozen_statistics = True

    def statistics() -> dict[str, Any]:
        return {k: v.clone() for k, v in net.encoder.state_dict().items() if "running" in k or "tracked" in k}

    before = statistics()
    net.train()
    net(torch.randn(2, 1, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in statistics().items())
    assert net.training
    assert net.decoder.training
    net.encoder.frozen_statistics = False
    net.train()
    net(torch.randn(2, 1, 64, 64))
    assert not any(torch.equal(v, before[k]) for k, v in statistics().items())


@pytest.mark.parametrize("name", [*FAMILIES, "swinv2_tiny_window8_256", "convnextv2_atto"])
def test_parameters_are_left_out_when_no_gradient_reaches_them_and_only_then(name: str) -> None:
    net = network(name)
    net.decoder.deep_supervision = True
    sum(o.float().pow(2).mean() for o in net(torch.randn(2, 1, 64, 64))).backward()
    reached = {k for k, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    groups = parameter_groups(net, Recipe())
    learning = {id(p) for g in groups for p in g["params"]}
    assert {k for k, p in net.named_parameters() if id(p) in learning} == reached
    assert {k for k, p in net.named_parameters() if p.requires_grad} == reached


@pytest.mark.parametrize("name", ["test_resnet", "resnet50_padded_shortcut_droppath"])
def test_frozen_encoder_computes_what_it_was_pretrained_to_compute(name: str) -> None:
    net = network(name)
    for module in net.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    images = torch.randn(4, 1, 64, 64)
    with torch.no_grad():
        net.encoder.eval()
        expected = net.encoder(images)
        net.encoder.frozen = True
        net.train()
        assert all(torch.equal(a, b) for a, b in zip(net.encoder(images), expected, strict=True))
        assert net.stem.training
        net.encoder.frozen = False
        net.train()
        assert not any(torch.equal(a, b) for a, b in zip(net.encoder(images), expected, strict=True))

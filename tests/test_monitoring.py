"""One monitor over a run: each checkpoint once, the same scores as a selection gives, nothing lost at a restart."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import DEMO_RUN, write_phantoms
from torch import nn

from mtl_nnunet import monitoring
from mtl_nnunet.cache import ResultCache
from mtl_nnunet.cases import find_image_folder
from mtl_nnunet.checkpoints import find_checkpoints, read_weights
from mtl_nnunet.chooser import read_chooser
from mtl_nnunet.encoder import TimmEncoder, random_encoder
from mtl_nnunet.errors import AssumedWarning, UserError
from mtl_nnunet.monitoring import CURVE_FILE, HISTORY_FILE, Monitor, copied_encoder, locked, undisturbed
from mtl_nnunet.ranking import rank_checkpoints
from mtl_nnunet.slices import Slices, gather_slices
from mtl_nnunet.stopping import StopRule, expected_gain

CHECKPOINTS = find_checkpoints(DEMO_RUN)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Slices:
    folder = write_phantoms(tmp_path_factory.mktemp("phantoms"))
    return gather_slices(find_image_folder(folder / "imagesTr"), num_slices=24, num_workers=1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one name with every score that is computed."""
    computed: list[str] = []
    original = monitoring.score_on_target

    def counting(encoder: nn.Module, target: object, scores: list[object], *more: object) -> object:
        computed.extend(s.name for s in scores)  # type: ignore[attr-defined]
        return original(encoder, target, scores, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(monitoring, "score_on_target", counting)
    return computed


def timm_model(checkpoint_index: int = -1) -> nn.Module:
    model: nn.Module = timm.create_model("test_resnet", num_classes=200)
    model.load_state_dict(read_weights(CHECKPOINTS[checkpoint_index]))
    return model


def test_scores_are_those_of_a_selection_and_come_in_any_order(tmp_path: Path, slices: Slices) -> None:
    (ranking,) = rank_checkpoints(CHECKPOINTS, "test_resnet", slices, "contrastive")
    with Monitor(tmp_path / "watch", slices, rule=StopRule("patience")) as monitor:
        for i in (2, 0, 5, 1, 4, 3):
            monitor.see_checkpoint(CHECKPOINTS[i])
        assert [s.epoch for s in monitor.history] == [0, 3, 8, 16, 25, 39]
        own = monitor.ranking()
        np.testing.assert_allclose(own.samples, ranking.samples, rtol=1e-6)
        assert own.random.value == pytest.approx(ranking.random.value)
        assert [c.value for c in own.checkpoints] == pytest.approx([c.value for c in ranking.checkpoints])
        assert monitor.draw().read_bytes().startswith(b"\x89PNG")


def test_each_is_scored_once_also_after_a_restart(tmp_path: Path, slices: Slices, counted: list[str]) -> None:
    with Monitor(tmp_path, slices, rule=StopRule("patience")) as monitor:
        first = [monitor.see_checkpoint(c) for c in CHECKPOINTS[:2]]
        assert monitor.see_checkpoint(CHECKPOINTS[0]) == first[0]
    # two checkpoints and the random weights
    assert counted == ["contrastive"] * 3
    with Monitor(tmp_path, slices, rule=StopRule("patience")) as again:
        assert again.history == first
        assert again.encoder == "test_resnet"
        again.see_checkpoint(CHECKPOINTS[1])
        third = again.see_checkpoint(CHECKPOINTS[2])
        assert third.said["rule"] == "patience"
        assert again.ranking().samples.shape == (3, 2000)
    assert counted == ["contrastive"] * 4


def test_a_selection_after_the_run_finds_the_results(tmp_path: Path, slices: Slices, counted: list[str]) -> None:
    cache = ResultCache(tmp_path / "cache")
    with Monitor(tmp_path / "watch", slices, rule=StopRule("patience"), cache=cache) as monitor:
        monitor.see_checkpoint(CHECKPOINTS[0])
    kept = sorted(p.name for p in cache.folder.iterdir())
    rank_checkpoints(CHECKPOINTS[:1], "test_resnet", slices, "contrastive", cache=cache)
    assert sorted(p.name for p in cache.folder.iterdir()) == kept


def test_a_model_in_memory_scores_as_its_file(tmp_path: Path, slices: Slices) -> None:
    model = timm_model()
    wrapped = nn.Module()
    wrapped.backbone = nn.DataParallel(model)
    inner = TimmEncoder("test_resnet", int(slices.images.shape[1]))
    inner.load_weights(read_weights(CHECKPOINTS[-1]), "file")
    values = []
    for i, (one, name) in enumerate([(model, None), (wrapped, None), (wrapped, "test_resnet"), (inner, None)]):
        with Monitor(tmp_path / str(i), slices, rule=StopRule("patience"), encoder=name) as monitor:
            monitor.see(one, 39)
            values.append(monitor.history[0].scores)
    with Monitor(tmp_path / "file", slices, rule=StopRule("patience")) as monitor:
        by_file = monitor.see_checkpoint(CHECKPOINTS[-1]).scores
    assert values == [by_file] * 4


class Pyramid(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((channels, 8), (8, 16), (16, 32)))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for layer in self.layers:
            images = layer(images).relu()
            maps.append(images)
        return maps


class OtherPyramid(Pyramid):
    pass


def test_any_module_that_gives_feature_maps_is_scored_without_a_yardstick(tmp_path: Path, slices: Slices) -> None:
    torch.manual_seed(0)
    channels = int(slices.images.shape[1])
    module = Pyramid(channels)
    with Monitor(tmp_path, slices, rule=StopRule("patience")) as monitor:
        assert monitor.see(module, 0) is False
        assert np.isnan(monitor.ranking().random.value)
        module.layers[0].weight.data *= 2
        monitor.see(module, 1)
        assert len(monitor.history) == 2
        monitor.draw()
        with pytest.raises(UserError, match="one run has one network"):
            monitor.see(OtherPyramid(channels), 2)
    assert module.layers[0].weight.is_contiguous()


def test_a_model_is_left_as_it_is(tmp_path: Path, slices: Slices) -> None:
    model = timm_model().train()
    model.layer1.eval()
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with Monitor(tmp_path, slices) as monitor:
        monitor.see(model, 0, planned_epochs=40)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(p.is_contiguous() for p in model.parameters())


def test_generators_are_put_back_also_after_an_error() -> None:
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), undisturbed():
        random.random()
        torch.rand(3)
        raise RuntimeError("inside")
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_other_settings_are_refused_with_their_names(tmp_path: Path, slices: Slices) -> None:
    patience = StopRule("patience")
    with Monitor(tmp_path, slices, rule=patience, about={"run": "a"}) as monitor:
        monitor.see_checkpoint(CHECKPOINTS[0])
    changed: list[tuple[str, Callable[[], Monitor]]] = [
        ("seed was 0 and is 1", lambda: Monitor(tmp_path, slices, rule=patience, about={"run": "a"}, seed=1)),
        ("run was a and is b", lambda: Monitor(tmp_path, slices, rule=patience, about={"run": "b"})),
        ("the scores were contrastive", lambda: Monitor(tmp_path, slices, "rankme", rule=patience, about={"run": "a"})),
        (
            "encoder was test_resnet and is resnet18",
            lambda: Monitor(tmp_path, slices, rule=patience, about={"run": "a"}, encoder="resnet18"),
        ),
    ]
    for said, other in changed:
        with pytest.raises(UserError, match=said):
            other().open()
    # a price is no setting of the scores
    Monitor(tmp_path, slices, rule=StopRule("patience", patience=9), about={"run": "a"}).open()


def test_other_data_are_refused(tmp_path: Path, slices: Slices) -> None:
    with Monitor(tmp_path / "watch", slices, rule=StopRule("patience")) as monitor:
        monitor.see_checkpoint(CHECKPOINTS[0])
    other = gather_slices(find_image_folder(write_phantoms(tmp_path / "other", seed=9) / "imagesTr"), 24, num_workers=1)
    with pytest.raises(UserError, match="the slices read of the dataset changed"):
        Monitor(tmp_path / "watch", other, rule=StopRule("patience")).open()


def test_a_second_monitor_is_refused_until_the_first_is_closed(tmp_path: Path, slices: Slices) -> None:
    import os

    with Monitor(tmp_path, slices), pytest.raises(UserError, match=f"running already: process {os.getpid()}"):
        Monitor(tmp_path, slices).open()
    Monitor(tmp_path, slices).open()


def test_a_cut_line_is_scored_again_and_a_damaged_one_is_named(tmp_path: Path, slices: Slices) -> None:
    rule = StopRule("patience")
    with Monitor(tmp_path, slices, rule=rule) as monitor:
        for c in CHECKPOINTS[:3]:
            monitor.see_checkpoint(c)
        whole = monitor.history
    text = (tmp_path / HISTORY_FILE).read_text()
    (tmp_path / HISTORY_FILE).write_text(text[:-40])
    (tmp_path / ".history.jsonl.1.tmp").write_text("half")
    with Monitor(tmp_path, slices, rule=rule) as again:
        assert again.history == whole[:2]
        assert not list(tmp_path.glob(".*.tmp"))
        assert again.see_checkpoint(CHECKPOINTS[2]).scores == whole[2].scores
        # what was computed was kept
        assert again.history[2].seconds == 0
    (tmp_path / HISTORY_FILE).write_text("{\n" + text)
    with pytest.raises(UserError, match=r"line 1 of .* is damaged"):
        Monitor(tmp_path, slices, rule=rule).open()


def test_lost_results_are_said_and_scored_again(tmp_path: Path, slices: Slices) -> None:
    rule = StopRule("patience")
    with Monitor(tmp_path, slices, rule=rule) as monitor:
        monitor.see_checkpoint(CHECKPOINTS[0])
        values = monitor.history[0].scores
    shutil.rmtree(tmp_path / "results")
    again = Monitor(tmp_path, slices, rule=rule)
    with pytest.warns(UserWarning, match=r"results of checkpoint-0.pth.tar are missing"):
        again.open()
    assert again.history == []
    assert again.see_checkpoint(CHECKPOINTS[0]).scores == values


def test_an_epoch_that_is_trained_again_takes_the_place_of_the_old_one(tmp_path: Path, slices: Slices) -> None:
    with Monitor(tmp_path, slices, rule=StopRule("patience")) as monitor:
        monitor.see(timm_model(0), 5)
        with pytest.warns(UserWarning, match="epoch 5 holds other weights"):
            monitor.see(timm_model(1), 5)
        assert len(monitor.history) == 1


def test_a_loop_of_unknown_length_is_told_that_patience_decides(tmp_path: Path, slices: Slices) -> None:
    with Monitor(tmp_path, slices) as monitor, pytest.warns(AssumedWarning, match="patience decides.*-epochs"):
        monitor.see(timm_model(), 0)


def test_another_network_in_the_same_run_is_refused(tmp_path: Path, slices: Slices) -> None:
    with Monitor(tmp_path, slices, rule=StopRule("patience")) as monitor:
        monitor.see(timm_model(), 0)
        with pytest.raises(UserError, match="epoch 1 does not fit timm encoder 'test_resnet'"):
            monitor.see(timm.create_model("resnet18"), 1)
    misnamed = Monitor(tmp_path / "named", slices, encoder="no_net")
    with pytest.raises(UserError, match="knows no encoder 'no_net'"):
        misnamed.see(timm_model(), 0)


def test_expected_gain_is_recorded_in_dice_points(tmp_path: Path, slices: Slices) -> None:
    with Monitor(tmp_path, slices, planned_epochs=40) as monitor:
        for c in CHECKPOINTS:
            monitor.see_checkpoint(c)
    lines = [json.loads(line) for line in (tmp_path / HISTORY_FILE).read_text().splitlines()]
    assert [line["said"]["is_over"] for line in lines] == [False] * 5 + [True]
    assert all(line["said"]["rule"] == "expected-gain" for line in lines)
    # the planned run counts from zero
    until = expected_gain(read_chooser(), [CHECKPOINTS[0].epoch], 39).until
    assert lines[0]["said"]["gain_in_dice_points"]["until_epoch"] == until
    assert set(lines[0]["scores"]) == {s.text for s in monitor.scores}
    assert len(monitor.scores) == 1
    assert not (tmp_path / CURVE_FILE).exists()


def test_scores_that_a_chooser_reads_are_computed_beside_the_first(
    tmp_path: Path, slices: Slices, chooser_file: Path
) -> None:
    rule = StopRule(price=1, chooser=chooser_file)
    with Monitor(tmp_path, slices, rule=rule, planned_epochs=40) as monitor:
        for c in CHECKPOINTS:
            monitor.see_checkpoint(c)
    assert [s.name for s in monitor.scores] == ["contrastive", "robustness"]
    last = json.loads((tmp_path / HISTORY_FILE).read_text().splitlines()[-1])
    assert set(last["scores"]) == {s.text for s in monitor.scores}


def test_weights_that_do_not_fit_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(UserError, match=r"epoch 3 does not fit timm encoder 'test_resnet'"):
        copied_encoder(model, "test_resnet", 1, 0, "epoch 3")
    assert isinstance(copied_encoder(random_encoder("test_resnet", 1, 0), None, 1, 0, "epoch 0"), TimmEncoder)


def test_only_its_own_unfinished_files_are_removed(tmp_path: Path, slices: Slices) -> None:
    own = [tmp_path / ".history.jsonl.17.tmp", tmp_path / "results" / ".0123.npz.17.tmp"]
    others = [
        tmp_path / ".download.17.tmp",
        tmp_path / "run" / ".checkpoint.17.tmp",
        tmp_path / "checkpoints" / ".a.1.tmp",
    ]
    for file in (*own, *others):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    with Monitor(tmp_path, slices):
        pass
    assert [f.exists() for f in (*own, *others)] == [False, False, True, True, True]


def test_without_locks_of_files_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Windows has no such module
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(AssumedWarning, match="cannot be locked"), locked(tmp_path / "lock", "a watcher"):
        pass

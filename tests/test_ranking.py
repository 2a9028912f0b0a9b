"""One pass for all scores; caches, workers and races change nothing but the time."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import DEMO_RUN
from joblib import delayed
from torch import nn

import mtl_nnunet
from mtl_nnunet import parallel
from mtl_nnunet import ranking as ranking_module
from mtl_nnunet.bootstrap import bootstrap_draws
from mtl_nnunet.cache import ResultCache, Scored
from mtl_nnunet.cases import find_nnunet_dataset
from mtl_nnunet.checkpoints import find_checkpoints, read_contents
from mtl_nnunet.cli.select_checkpoint import main
from mtl_nnunet.embedding import embed, make_target, resolved_precision
from mtl_nnunet.encoder import random_encoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.parallel import workers
from mtl_nnunet.racing import race_checkpoints
from mtl_nnunet.ranking import rank_checkpoints, score_encoder
from mtl_nnunet.scores import SCORES, Score, parse_score
from mtl_nnunet.scores.robustness import robustness
from mtl_nnunet.select import select_checkpoint
from mtl_nnunet.selection import read_selection
from mtl_nnunet.slices import Slices, gather_slices

EVERY = [parse_score(name) for name in SCORES]


@pytest.fixture
def slices(make_dataset: Callable[..., Path]) -> Slices:
    make_dataset(1, num_cases=10)
    return gather_slices(find_nnunet_dataset(1), 40, with_labels=True)


def loaded(epoch: int = 39) -> nn.Module:
    encoder = random_encoder("test_resnet", 1, 0)
    path = DEMO_RUN / f"checkpoint-{epoch}.pth.tar"
    encoder.load_weights(read_contents(path).weights, str(path))
    return encoder


def values(rankings: tuple[ranking_module.Ranking, ...]) -> list[list[float]]:
    return [[c.value for c in (*r.checkpoints, r.random)] for r in rankings]


@pytest.mark.parametrize(("level", "channels"), [(1, 32), (5, 96), (-1, 96), (-2, 192), (-5, 32)])
def test_embedding_is_the_level_that_was_asked_for(slices: Slices, level: int, channels: int) -> None:
    scores = [parse_score(f"rankme:level={level},pooled={p}") for p in ("yes", "no")]
    encoder = loaded()
    features = embed(encoder, make_target(slices, scores, 0), scores)
    index = level if level > 0 else 6 + level
    pooled, flat = (features.embeddings[("plain", 1.0), index, p][0] for p in (True, False))
    assert pooled.shape == (40, channels)
    assert torch.allclose(flat.reshape(40, channels, -1).mean(2), pooled, atol=1e-5)
    with torch.inference_mode():
        alone = encoder(slices.images[33:34])[index - 1].mean((2, 3))
    assert torch.allclose(alone[0], pooled[33], atol=1e-5), "an embedding does not depend on its batch"


def test_pixels_are_read_where_they_lie(slices: Slices) -> None:
    class Coordinates(nn.Module):
        """Feature maps that hold their own coordinates, at half and quarter size."""

        def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
            maps = []
            for factor in (2, 4):
                h, w = images.shape[2] // factor, images.shape[3] // factor
                rows = ((torch.arange(h) + 0.5) * factor - 0.5)[:, None].expand(h, w)
                columns = ((torch.arange(w) + 0.5) * factor - 0.5)[None, :].expand(h, w)
                maps.append(torch.stack([rows, columns]).expand(len(images), 2, h, w))
            return maps

    score = parse_score("knn")
    features = embed(Coordinates(), make_target(slices, [score], 0), [score])
    pixels = features.pixels[True]
    inside = (pixels.rows >= 2) & (pixels.rows < 62) & (pixels.columns >= 2) & (pixels.columns < 62)
    for level in (1, 2):
        where = features.at_pixels[True, level].numpy()[inside]
        np.testing.assert_allclose(where[:, 0], pixels.rows[inside], atol=1e-3)
        np.testing.assert_allclose(where[:, 1], pixels.columns[inside], atol=1e-3)


def test_scores_together_are_the_scores_alone(slices: Slices) -> None:
    together = score_encoder(loaded(), slices, EVERY)
    for score, scored in zip(EVERY, together, strict=True):
        (alone,) = score_encoder(loaded(), slices, score)
        assert scored.value == pytest.approx(alone.value, rel=1e-6), score.name
        np.testing.assert_allclose(scored.sample, alone.sample, rtol=1e-6)
        assert np.isfinite(scored.sample).all()
        assert np.nanpercentile(scored.sample, 0.1) <= scored.value <= np.nanpercentile(scored.sample, 99.9)


def test_every_level_at_once_is_each_level_alone(slices: Slices) -> None:
    for name in ("contrastive", "robustness", "hscore", "rankme"):
        (every,) = score_encoder(loaded(), slices, parse_score(f"{name}:level=all"))
        each = [score_encoder(loaded(), slices, parse_score(f"{name}:level={level}"))[0].value for level in range(1, 6)]
        assert list(every.levels) == [1, 2, 3, 4, 5]
        assert list(every.levels.values()) == pytest.approx(each, rel=1e-5)
        assert every.value == pytest.approx(np.mean(each), rel=1e-5)


def test_the_published_score_is_the_one_of_the_published_form(slices: Slices) -> None:
    (scored,) = score_encoder(loaded(), slices, parse_score("robustness"))
    from mtl_nnunet.views import make_views

    with torch.inference_mode():
        a, b = (loaded().eval()(v)[-2].mean((2, 3)) for v in make_views(slices.images, "paper", 2, 0))
    assert scored.value == pytest.approx(robustness(a, b).item(), abs=1e-5)


@pytest.mark.parametrize("name", ["hscore", "knn", "dse"])
def test_pooled_features_of_pixels_are_means_over_a_class_in_a_slice(slices: Slices, name: str) -> None:
    score = parse_score(f"{name}:level=2,pooled=yes")
    features = embed(loaded(), make_target(slices, [score], 0), [score])
    pixels = features.pixels[score.labels]
    means, labels, patients = [], [], []
    for key in sorted({*zip(pixels.slices.tolist(), pixels.labels.tolist(), strict=True)}):
        mine = (pixels.slices == key[0]) & (pixels.labels == key[1])
        means.append(features.at_pixels[score.labels, 2][torch.as_tensor(mine)].mean(0))
        labels.append(key[1])
        patients.append(slices.patients[key[0]])
    rest = {k: v for k, v in score.parameters.items() if k not in ("level", "pooled")}
    expected = score.prepare(torch.stack(means), np.array(labels), np.array(patients), **rest)
    statistic, _ = score.statistic(features)
    draws = bootstrap_draws(slices.num_patients, 20, 0)
    np.testing.assert_allclose(statistic(draws), expected(draws), rtol=1e-4)


@pytest.mark.parametrize("name", [n for n, s in SCORES.items() if s.labels])
def test_a_patient_whose_pixels_do_not_count_has_no_say(slices: Slices, name: str) -> None:
    assert slices.labels is not None
    labels = slices.labels.clone()
    out = slices.num_patients - 1
    labels[torch.as_tensor(slices.patients == out)] = -1
    (scored,) = score_encoder(loaded(), replace(slices, labels=labels), parse_score(name))
    assert np.isfinite(scored.value)
    assert np.isfinite(scored.sample).all()


def test_any_module_that_gives_feature_maps_can_be_scored_and_others_are_named(slices: Slices) -> None:
    convolutions = nn.ModuleList([nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)])

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = convolutions

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            maps = []
            for convolution in self.convolutions:
                x = convolution(x).relu()
                maps.append(x)
            return maps

    contrastive, probe = score_encoder(Pyramid(), slices, [parse_score("contrastive"), parse_score("probe")])
    assert 0.5 < contrastive.value <= 1
    assert list(probe.levels) == [1, 2]
    with pytest.raises(UserError, match="feature maps"):
        score_encoder(nn.Flatten(), slices, parse_score("contrastive"))
    with pytest.raises(UserError, match="levels 1 to 2"):
        score_encoder(Pyramid(), slices, parse_score("contrastive:level=3"))


def test_label_free_scores_do_not_look_at_labels(slices: Slices) -> None:
    free = [s for s in EVERY if not s.labels]
    without = score_encoder(loaded(), replace(slices, labels=None), free)
    for a, b in zip(score_encoder(loaded(), slices, free), without, strict=True):
        assert a.value == b.value


def test_one_more_checkpoint_or_score_computes_only_that(
    slices: Slices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, int]] = []
    original = ranking_module.score_on_target

    def counting(encoder: nn.Module, target: object, scores: list[Score], *rest: object) -> list[Scored]:
        counted.append((1, len(scores)))
        return original(encoder, target, scores, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ranking_module, "score_on_target", counting)
    cache = ResultCache(tmp_path / "kept")
    checkpoints = find_checkpoints([DEMO_RUN])
    score, other = parse_score("contrastive"), parse_score("uniformity")
    first = rank_checkpoints(checkpoints[:4], "test_resnet", slices, score, cache=cache)
    assert len(counted) == 5
    again = rank_checkpoints(checkpoints[:4], "test_resnet", slices, parse_score("contrastive"), cache=cache)
    assert len(counted) == 5
    assert again[0].checkpoints == first[0].checkpoints
    np.testing.assert_array_equal(again[0].samples, first[0].samples)
    rank_checkpoints(checkpoints[:5], "test_resnet", slices, score, cache=cache)
    assert len(counted) == 6, "one more checkpoint"
    rank_checkpoints(checkpoints[:5], "test_resnet", slices, [score, other], cache=cache)
    assert counted[6:] == [(1, 1)] * 6, "one more score"
    rank_checkpoints(checkpoints[:1], "test_resnet", slices, parse_score("contrastive:level=2"), cache=cache)
    rank_checkpoints(checkpoints[:1], "test_resnet", slices, parse_score("contrastive", strength=0.5), cache=cache)
    rank_checkpoints(checkpoints[:1], "test_resnet", slices, score, seed=1, cache=cache)
    assert len(counted) == 12 + 6, "whatever a result depends on names it"
    monkeypatch.setattr(ranking_module, "code_sha256", lambda: "other code")
    rank_checkpoints(checkpoints[:1], "test_resnet", slices, score, cache=cache)
    assert len(counted) == 12 + 6 + 2, "and so does the code"


def test_cases_are_read_and_viewed_once_however_many_checkpoints(
    make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_nnunet import embedding
    from mtl_nnunet import slices as slices_module

    make_dataset(1, num_cases=5)
    read, viewed = [], []
    reading, viewing = slices_module.read_case, embedding.make_views
    monkeypatch.setattr(slices_module, "read_case", lambda case, *rest: read.append(case.name) or reading(case, *rest))
    monkeypatch.setattr(embedding, "make_views", lambda *rest: viewed.append(rest[1:4]) or viewing(*rest))
    scores = ["contrastive", "infonce", "alignment", "rankme", "uniformity"]
    select_checkpoint(1, DEMO_RUN, scores, num_slices=20)
    assert sorted(read) == [f"case_{i:02d}" for i in range(5)]
    assert sorted(viewed) == [("plain", 1, 0), ("scanner", 3, 0)]


def test_a_checkpoint_that_was_written_to_since_it_was_hashed_is_refused(tmp_path: Path) -> None:
    files = [DEMO_RUN / f"checkpoint-{epoch}.pth.tar" for epoch in (0, 3)]
    last = Path(shutil.copy(files[0], tmp_path / "last.pth.tar"))
    (checkpoint,) = find_checkpoints(last)
    key = checkpoint.content_key
    os.utime(last, (1, 1))
    ranking_module.loaded_encoder(checkpoint, "test_resnet", 1, 0)
    os.replace(shutil.copy(files[1], tmp_path / "new"), last)
    with pytest.raises(UserError, match="was written to in the meantime"):
        ranking_module.loaded_encoder(checkpoint, "test_resnet", 1, 0)
    last.unlink()
    with pytest.raises(UserError):
        checkpoint.refuse_changed()
    assert checkpoint.content_key == key


def test_half_precision_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # as PyTorch answers on a Tesla T4
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolved_precision("cuda", "auto") == "fp32"


def test_damaged_entries_of_the_cache_are_computed_again(slices: Slices, tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "kept")
    checkpoints = find_checkpoints([DEMO_RUN])[:2]
    (first,) = rank_checkpoints(checkpoints, "test_resnet", slices, parse_score("contrastive"), cache=cache)
    for i, file in enumerate(sorted(cache.folder.iterdir())):
        file.write_bytes([b"", b"PK\x03\x04 damaged", file.read_bytes()[:300]][i % 3])
    (again,) = rank_checkpoints(checkpoints, "test_resnet", slices, parse_score("contrastive"), cache=cache)
    assert again.checkpoints == first.checkpoints


def test_killed_in_the_middle_and_started_again_nothing_is_scored_twice(
    make_dataset: Callable[..., Path], tmp_path: Path, nnunet_folders: Path
) -> None:
    make_dataset(1, num_cases=8)
    command = [sys.executable, "-c", "import sys; from mtl_nnunet.cli.select_checkpoint import main; sys.exit(main())"]
    # the second time without what was kept, in the process that went on after the kill
    twice = (
        "import shutil, sys; from mtl_nnunet.cli.select_checkpoint import main\n"
        "selection, *arguments = sys.argv[1:]\n"
        "assert main(arguments) == 0\n"
        "shutil.copytree(selection, f'{selection}_resumed')\n"
        "sys.exit(main([*arguments, '--overwrite', '--no-cache']))"
    )
    arguments = ["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "32", "-device", "cpu"]
    arguments += ["-score", "contrastive", "hscore", "-cache", str(tmp_path / "kept")]
    log = tmp_path / "log"
    with open(log, "w") as stderr:
        process = subprocess.Popen([*command, *arguments], stderr=stderr, stdout=stderr)
        while process.poll() is None and len(list((tmp_path / "kept").glob("*.npz"))) < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    selection = nnunet_folders / "preprocessed" / "Dataset001_Phantom" / "mtl_selection"
    kept = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "kept").glob("*.npz")}
    if process.returncode == -signal.SIGKILL:
        assert not selection.exists()
    command = [sys.executable, "-c", twice, str(selection), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    now = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "kept").glob("*.npz")}
    assert len(now) == 14
    assert all(now[name] == written for name, written in kept.items()), "what was kept is not written again"
    resumed = json.loads((selection.with_name("mtl_selection_resumed") / "selection.json").read_text())
    fresh = json.loads((selection / "selection.json").read_text())
    assert {k: v for k, v in resumed.items() if k != "created"} == {k: v for k, v in fresh.items() if k != "created"}


def test_two_processes_find_what_one_finds(slices: Slices) -> None:
    checkpoints = find_checkpoints([DEMO_RUN])
    scores = [parse_score(s) for s in ("contrastive", "probe", "hscore")]
    alone = rank_checkpoints(checkpoints, "test_resnet", slices, scores)
    with workers(2):
        together = rank_checkpoints(checkpoints, "test_resnet", slices, scores)
    # a thread more or less sums in another order; in the probe a pixel on the fence may then fall to the other side
    for ours, theirs, tolerance in zip(values(together), values(alone), (1e-5, 2e-3, 1e-5), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    assert together[0].choice == alone[0].choice


def test_a_dask_cluster_of_two_workers_finds_what_one_process_finds(slices: Slices) -> None:
    pytest.importorskip("distributed", reason="Dask is an optional dependency")
    checkpoints = find_checkpoints([DEMO_RUN])
    scores = [parse_score(s) for s in ("contrastive", "hscore")]
    alone = rank_checkpoints(checkpoints, "test_resnet", slices, scores)
    with workers(2, "dask"):
        together = rank_checkpoints(checkpoints, "test_resnet", slices, scores)
    np.testing.assert_allclose(values(together), values(alone), rtol=1e-5)
    assert [r.choice for r in together] == [r.choice for r in alone]


def test_a_cluster_that_does_not_answer_or_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"mtl-nnunet\[ray\]"), workers(2, "ray"):
        pass
    # Ray itself is no test dependency: what it raised on a busy machine
    late = SimpleNamespace(init=Mock(side_effect=Exception("The current node timed out during startup")))
    for name, module in {"ray": late, "ray.util": Mock(), "ray.util.joblib": Mock()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UserError, match=r"Ray could not be started here .*timed out"), workers(2, "ray"):
        pass
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"mtl-nnunet\[dask\]"), workers(2, "dask"):
        pass


def test_a_cluster_without_workers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is an optional dependency")
    monkeypatch.setattr(parallel, "WORKERS_WITHIN", 0.5)
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        pytest.raises(UserError, match=f"{cluster.scheduler_address} had no worker"),
        workers(1, "dask", cluster.scheduler_address),
    ):
        pass


def test_a_worker_that_dies_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match="a worker died"), workers(2):
        list(parallel.in_parallel([delayed(os._exit)(1) for _ in range(2)]))
    installed = [name for name in parallel.LOST_WORKER if importlib.util.find_spec(name.partition(".")[0])]
    for name in installed:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception)


def test_a_worker_that_comes_later_is_waited_for() -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is an optional dependency")
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
        late = threading.Timer(0.5, cluster.scale, (1,))
        late.start()
        with workers(1, "dask", cluster.scheduler_address):
            assert list(parallel.in_parallel([delayed(abs)(-3)])) == [3]
        late.join()


@pytest.mark.parametrize("name", ["contrastive", "robustness", "hscore", "probe"])
def test_who_finishes_a_race_has_the_score_of_a_full_run(slices: Slices, name: str) -> None:
    checkpoints = find_checkpoints([DEMO_RUN])
    score = parse_score(name)
    (full,) = rank_checkpoints(checkpoints, "test_resnet", slices, score)
    raced, share = race_checkpoints(checkpoints, "test_resnet", slices, score)
    assert 0 < share <= 1
    assert raced.chosen in [c for c in raced.checkpoints if c.out_after is None]
    for a, b in zip(raced.checkpoints, full.checkpoints, strict=True):
        assert a.checkpoint == b.checkpoint
        if a.out_after is None:
            assert a.value == pytest.approx(b.value, rel=1e-5)
        else:
            assert a.probability_of_best_score == 0
    assert raced.random.value == pytest.approx(full.random.value, rel=1e-5)
    assert raced.chosen.label in [c.label for c in full.undecided]


def test_python_in_ten_lines(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    make_dataset(1, num_cases=6)
    outcome = mtl_nnunet.select_checkpoint(
        1, DEMO_RUN, ["contrastive", "ccfv"], num_slices=24, output=tmp_path / "selection"
    )
    assert outcome.ranking.chosen.checkpoint in find_checkpoints([DEMO_RUN])
    assert outcome.fold == "all"
    assert (tmp_path / "selection" / "selection.json").is_file()
    assert outcome.content is not None
    assert outcome.content["other_scores"][0]["score"]["name"] == "ccfv"
    assert list(outcome.content["other_scores"][0]["checkpoints"][0]["levels"]) == ["1", "2", "3", "4", "5"]
    assert select_checkpoint(1, DEMO_RUN, num_slices=24).folder is None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = mtl_nnunet.nonsense


def test_a_fold_keeps_its_validation_cases_out_and_says_so(
    make_dataset: Callable[..., Path], nnunet_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    make_dataset(1, num_cases=10)
    few = ["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "24", "-device", "cpu"]
    assert main([*few, "-labels", "-f", "2"]) == 0
    printed = capsys.readouterr()
    assert "nnUNetv2_train 1 2d 2 -tr MTLTrainer -p nnUNetPlans_mtl_fold_2" in printed.out
    assert "Labels of validation cases" not in printed.err
    content = json.loads(
        (nnunet_folders / "preprocessed" / "Dataset001_Phantom" / "mtl_selection_fold_2" / "selection.json").read_text()
    )
    held_out = generate_crossval_split([f"case_{i:02d}" for i in range(10)])[2]["val"]
    assert content["labels"] == {"used": True, "fold": 2}
    with pytest.raises(UserError, match=r"There is mtl_selection_fold_2, for single folds: mtl-nnunet plans"):
        read_selection(nnunet_folders / "preprocessed" / "Dataset001_Phantom" / "mtl_selection")
    assert not set(held_out) & {c["name"] for c in content["dataset"]["cases_used"]}
    assert main([*few, "-score", "probe"]) == 0
    err = capsys.readouterr().err
    assert "Labels of validation cases were seen" in err
    assert "Pass -f 0 to -f 4" in err
    assert main([*few, "-score", "probe", "-f", "all", "--overwrite"]) == 0
    assert "Labels of validation cases were seen" in capsys.readouterr().err
    for wrong in (["-f", "1"], ["-labels", "-score", "contrastive"]):
        assert main([*few, *wrong, "--overwrite"]) == 1
        assert "no score here uses labels" in capsys.readouterr().err


def test_rule_and_other_scores_are_told(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str], nnunet_folders: Path
) -> None:
    make_dataset(1, num_cases=6)
    few = ["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "24", "-device", "cpu"]
    assert main([*few, "-score", "contrastive", "infonce", "rankme", "-rule", "last"]) == 0
    out = capsys.readouterr().out
    assert "rule: last epoch" in out
    assert "infonce" in out
    content = json.loads(
        (nnunet_folders / "preprocessed" / "Dataset001_Phantom" / "mtl_selection" / "selection.json").read_text()
    )
    assert content["choice"]["epoch"] == 39
    assert [o["score"]["name"] for o in content["other_scores"]] == ["infonce", "rankme"]
    assert main([*few, "-score", "contrastive", "contrastive", "--overwrite"]) == 1
    assert "named twice" in capsys.readouterr().err
    assert main([*few, "--race", "-rule", "last", "--overwrite"]) == 1
    assert "race" in capsys.readouterr().err
    assert main([*few, "--race", "--overwrite"]) == 0
    assert "of the forwards of a full run" in capsys.readouterr().err


def test_a_bad_case_is_skipped_when_told_named_and_not_too_many(
    make_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str], nnunet_folders: Path
) -> None:
    folder = make_dataset(1, num_cases=11)
    few = ["-d", "1", "-ckpt", str(DEMO_RUN), "-num_slices", "33", "-device", "cpu"]
    broken = folder / "imagesTr" / "case_03_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    assert main(few) == 1
    assert "case_03" in capsys.readouterr().err
    assert main([*few, "--skip-bad-cases"]) == 0
    assert "case_03" in capsys.readouterr().err
    content = json.loads(
        (nnunet_folders / "preprocessed" / "Dataset001_Phantom" / "mtl_selection" / "selection.json").read_text()
    )
    assert [c["name"] for c in content["dataset"]["cases_skipped"]] == ["case_03"]
    assert len(content["dataset"]["cases_used"]) == 10
    another = folder / "imagesTr" / "case_07_0000.nii.gz"
    another.write_bytes(b"")
    assert main([*few, "--skip-bad-cases", "--overwrite"]) == 1
    assert "2 of 11 sampled cases cannot be used, more than 10%" in capsys.readouterr().err


def test_half_precision_stays_inside_the_error_bar(slices: Slices) -> None:
    for name in ("contrastive", "hscore"):
        (full,) = score_encoder(loaded(), slices, parse_score(name))
        (half,) = score_encoder(loaded(), slices, parse_score(name), precision="bf16")
        assert abs(half.value - full.value) < full.sample.std()

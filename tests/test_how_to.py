"""The how-tos: every command that they print exists as it is printed, their code runs, and most are run as a whole."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import DEMO_RUN, Workplace, phantom, write_image, write_phantoms
from documentation import HOW_TOS, MORE, blocks, commands, inline, text_of, with_own
from PIL import Image

from mtl_nnunet.decision import parse_rule

PAGES = ("README.md", "docs/index.md", *HOW_TOS)
SCRIPTS = {script.name: script for script in entry_points(group="console_scripts")}
OURS_AND_NNUNETS = re.compile(r"mtl-|nnUNetv2_")
# options of other people's programs that the pages speak of
OTHERS = {"--checkpoint-hist", "--gpus-per-task"}
SHORT = "MTLTrainer_1epoch"


class Parsed(BaseException):
    """A command's own parser took the words."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_that_takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Start a command as the shell does, and stop it once its own parser has taken its words."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        parse(self, *args, **options)
        raise Parsed(self)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(sys, "argv", words)
        try:
            SCRIPTS[words[0]].load()()
        except Parsed as parsed:
            return parsed.parser
        except SystemExit:
            pytest.fail(f"refused: {' '.join(words)}")
    raise AssertionError(f"{words[0]} parsed nothing")


def printed_commands(page: str) -> list[list[str]]:
    """Ours and nnU-Net's, of the blocks and of the text, with a number for each of the shell's variables."""
    found = [words for block in blocks(page) for words in commands(block)]
    if page in HOW_TOS:
        # a name alone is no command
        found += [span.split() for span in inline(page, r"(mtl-|nnUNetv2_).* -")]
    numbered = [[re.sub(r"\$(\w+|\(.*?\))", "0", word) for word in words] for words in found]
    return [words for words in numbered if OURS_AND_NNUNETS.match(words[0])]


def test_every_page_is_in_the_menu_and_linked_from_both_first_pages() -> None:
    assert len(HOW_TOS) == 12
    for page in HOW_TOS:
        for place, link in (("mkdocs.yml", page[5:]), ("README.md", page), ("docs/index.md", page[5:])):
            assert link in text_of(place), f"{page} is missing from {place}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_program_takes(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in printed_commands(page):
        parser_that_takes(words, monkeypatch)


def test_a_command_that_its_program_refuses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["mtl-select-checkpoint", "-d", "4"], ["nnUNetv2_train", "4", "2d", "0", "-trainer", "MTLTrainer"]):
        with pytest.raises(pytest.fail.Exception, match="refused"):
            parser_that_takes(words, monkeypatch)


def test_every_option_in_the_text_is_one_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(OTHERS)
    for words in (
        *(["mtl-select-checkpoint", "-d", "4", "-ckpt", "x"], ["mtl-watch-pretraining", "-d", "4", "-run", "x", "-o", "y"]),
        *(["nnUNetv2_train", "4", "2d", "0"], ["nnUNetv2_predict", "-d", "4", "-c", "2d", "-i", "x", "-o", "y"]),
        ["nnUNetv2_plan_and_preprocess", "-d", "4"],
    ):  # fmt: skip
        known.update(parser_that_takes(words, monkeypatch)._option_string_actions)
    for page in HOW_TOS:
        for span in inline(page, "--?[a-z]"):
            unknown = [w for w in re.findall(r"(?<!\S)--?[a-z][\w-]*", span) if w not in known]
            assert not unknown, f"{page}: {unknown[0]}"
        for span in inline(page, "-rule "):
            parse_rule(span.split()[1])


@pytest.mark.parametrize("page", PAGES)
def test_code_compiles(page: str) -> None:
    compile("\n".join(blocks(page, "python")), page, "exec")


def test_scoring_an_encoder_of_ones_own_runs_as_it_is_written(
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_dataset(4)
    monkeypatch.chdir(tmp_path)
    Path("runs/shufflenet").mkdir(parents=True)
    for epoch in (1, 2):
        torch.manual_seed(epoch)
        torch.save(torchvision.models.shufflenet_v2_x0_5().state_dict(), f"runs/shufflenet/epoch_{epoch}.pth")
    scope: dict[str, Any] = {"__name__": "page"}
    exec(compile("\n".join(blocks("docs/how-to/own-encoder.md", "python")), "own-encoder.md", "exec"), scope)
    first, *others = capsys.readouterr().out.splitlines()
    assert np.isfinite([float(x) for x in first.split()]).all()
    assert [line.partition(":")[0] for line in others] == ["epoch_1", "epoch_2"]
    # the best one is behind itself by nothing, the other by the difference of the two
    values = {name: result.value for name, result in scope["scored"].items()}
    assert "by 0.0000 [0.0000, 0.0000]" in others[list(values).index(max(values, key=lambda name: values[name]))]
    assert values["epoch_1"] != values["epoch_2"]
    number = int(
        re.search(r"its values on ([\d,]+) bootstrap", text_of("docs/how-to/own-encoder.md"))[1].replace(",", "")
    )  # type: ignore[index]
    assert len(scope["contrastive"].sample) == number


def write_pictures(folder: Path, description: dict[str, Any]) -> None:
    """A dataset of colour pictures, one PNG a case."""
    for i in range(8):
        image, label = phantom((1, 72, 64), seed=i, channels=3)
        for kind, pixels, name in (
            ("imagesTr", np.clip(image[:, 0].transpose(1, 2, 0), 0, 255).astype(np.uint8), f"case_{i}_0000.png"),
            ("labelsTr", np.minimum(label[0], 1), f"case_{i}.png"),
        ):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / name)
    (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": 8}))


def run(place: Workplace, block: str, means: dict[str, str]) -> None:
    """Run the commands of a block, those of a shell or of pip left out."""
    for words in commands(block):
        if words[0] not in ("cd", "pip"):
            place.run(*with_own(words, means), *MORE.get(words[0], ()))


def stand_ins(place: Workplace) -> dict[str, str]:
    return {
        "runs/my_pretraining/": str(DEMO_RUN),
        "MTLTrainer": SHORT,
        "MTLTrainerScratch": "MTLTrainerScratch_1epoch",
        **{f"$nnUNet_{k}": str(place.root / k) for k in ("raw", "preprocessed", "results")},
    }


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number", "spacing"), [("ct", 3, (5.0, 1.0, 1.0)), ("mr", 5, (4.0, 0.6, 0.6)), ("rgb", 28, None)])  # fmt: skip
def test_the_page_of_a_kind_of_images_runs(
    tmp_path: Path, page: str, number: int, spacing: tuple[float, float, float] | None
) -> None:
    name = f"Dataset{number:03d}_Phantom"
    place = Workplace(tmp_path, name, SHORT, iterations="2,1")
    file = f"docs/how-to/{page}.md"
    (json_block,) = blocks(file, "json")
    description = json.loads(json_block)
    channels = list(description["channel_names"].values())
    raw = tmp_path / "raw" / name
    if spacing is None:
        write_pictures(raw, description)
    else:
        write_phantoms(raw, num_cases=6, shape=(6, 48, 40), spacing=spacing, channel_names=channels)
    run(place, blocks(file)[0], stand_ins(place))
    selection = json.loads((tmp_path / "preprocessed" / name / "mtl_selection" / "selection.json").read_text())
    assert selection["dataset"]["channel_names"] == channels
    assert (place.model(SHORT) / "fold_0" / "checkpoint_final.pth").is_file()
    if page == "ct":
        means = {**stand_ins(place), "imagesTr/": str(raw / "imagesTr"), "selection/": str(tmp_path / "selection")}
        run(place, blocks(file)[1], means)
        of_folder = json.loads((tmp_path / "selection" / "selection.json").read_text())
        assert of_folder["slices"]["normalization"] == ["CTNormalization"]


HIPPOCAMPUS = "Dataset004_Hippocampus"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Where the first block of the first page was run, by which the others begin."""
    root = tmp_path_factory.mktemp("how to")
    place = Workplace(root, HIPPOCAMPUS, SHORT, iterations="2,1")
    write_phantoms(root / "raw" / HIPPOCAMPUS, num_cases=6, shape=(16, 48, 40))
    image, _ = phantom((16, 48, 40), seed=1)
    write_image(root / "in" / "new_0000.nii.gz", image[0], (2.0, 1.0, 1.0))
    run(place, blocks("docs/how-to/epochs.md")[0], stand_ins(place))
    return place


def chosen(folder: Path) -> dict[str, Any]:
    choice: dict[str, Any] = json.loads((folder / "selection.json").read_text())["choice"]
    return choice


@pytest.mark.slow
def test_selections_are_trained_side_by_side(trained: Workplace) -> None:
    run(trained, blocks("docs/how-to/epochs.md")[1], stand_ins(trained))
    for model in (trained.model(plans="nnUNetPlansBest"), trained.model("MTLTrainerScratch_1epoch")):
        assert (model / "fold_0" / "checkpoint_final.pth").is_file()


@pytest.mark.slow
def test_a_pretraining_is_watched(trained: Workplace, tmp_path: Path) -> None:
    (words,) = commands(blocks("docs/how-to/stop.md")[0])
    means = {**stand_ins(trained), "runs/my_pretraining/watch": str(tmp_path / "watch")}
    trained.run(*with_own(words, means), "--once")
    assert (tmp_path / "watch" / "history.jsonl").is_file()


@pytest.mark.slow
def test_workers_find_what_one_process_finds(trained: Workplace, tmp_path: Path) -> None:
    alone = chosen(trained.root / "preprocessed" / HIPPOCAMPUS / "mtl_selection")
    for words in commands(blocks("docs/how-to/cluster.md")[0]):
        more = ("-o", str(tmp_path / "selection"), "--no-cache", "--overwrite", "-device", "cpu")
        trained.run(*with_own(words, stand_ins(trained)), *more)
        together = chosen(tmp_path / "selection")
        assert together["sha256"] == alone["sha256"]
        assert together["value"] == pytest.approx(alone["value"], rel=1e-5)


@pytest.mark.slow
def test_a_model_is_shared(trained: Workplace, tmp_path: Path) -> None:
    zipped, out, bundle = (str(tmp_path / name) for name in ("model.zip", "out", "bundle"))
    own = {"hippocampus.zip": zipped, "hippocampus": bundle, "IN": str(trained.root / "in"), "OUT": out}
    export, elsewhere_block, bundle_block = blocks("docs/how-to/share.md")
    run(trained, export, {**stand_ins(trained), **own})
    elsewhere = Workplace(tmp_path / "elsewhere", HIPPOCAMPUS, SHORT)
    del elsewhere.environment["nnUNet_extTrainer"]
    run(elsewhere, elsewhere_block, {**stand_ins(elsewhere), **own})
    assert [f.name for f in Path(out).glob("*.nii.gz")] == ["new.nii.gz"]

    (make,) = (words for words in commands(bundle_block) if words[0] == "mtl-nnunet")
    trained.run(*(w.replace("MTLTrainer_", f"{SHORT}_") for w in with_own(make, {**stand_ins(trained), **own})))
    assert (Path(bundle) / "configs" / "inference.yaml").is_file()
    (licence,) = blocks("docs/how-to/share.md", "python")
    script = f"import os; os.chdir({str(trained.model())!r})\n{licence}"
    assert trained.run(sys.executable, "-c", script).stdout.split() == ["test_resnet", "None", "None"]


@pytest.mark.slow
def test_volumes_are_trained_and_predicted(trained: Workplace, tmp_path: Path) -> None:
    means = {**stand_ins(trained), "IN": str(trained.root / "in"), "OUT": str(tmp_path / "out")}
    for words in commands(blocks("docs/how-to/volumes.md")[0]):
        # the selection is there
        if words[0] != "mtl-select-checkpoint":
            trained.run(*with_own(words, means), *MORE[words[0]])
    assert [f.name for f in (tmp_path / "out").glob("*.nii.gz")] == ["new.nii.gz"]

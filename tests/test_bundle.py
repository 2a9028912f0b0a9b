"""The bundle, run by MONAI's own commands in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import DEMO_RUN, REAL_DATA, needs_real_data, phantom, run_forked
from monai.bundle import ConfigParser, ConfigWorkflow

from mtl_nnunet import bundles
from mtl_nnunet.cli.main import main
from mtl_nnunet.components import MonaiUNet
from mtl_nnunet.components.data import split_cases
from mtl_nnunet.components.metadata import data_format
from mtl_nnunet.components.plan import UNTRAINED
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import sha256

# importing MONAI takes longer than any command
MONAI = "import runpy, monai.bundle.scripts, mtl_nnunet.components"
COMMAND = "runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)"
# a flipped and oblique volume; all cases of a dataset share it
TURN, TILT = np.radians(25), np.radians(10)
ROTATION = np.array([[np.cos(TURN), -np.sin(TURN), 0], [np.sin(TURN), np.cos(TURN), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(TILT), -np.sin(TILT)], [0, np.sin(TILT), np.cos(TILT)]]
)
AFFINE = np.eye(4)
AFFINE[:3, :3] = ROTATION @ np.diag([-0.8, 0.9, 2.0])
AFFINE[:3, 3] = (12.0, -40.0, 7.5)
# the fields that meta_schema_20240725.json demands, and of what kind; the slow test reads the schema itself
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors")
DEMANDED = {
    "type": "object",
    "required": [*TEXTS, "copyright", "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string"} for name in (*TEXTS, "copyright", "data_source", "data_type", "intended_use")},
        **{name: {"type": "string"} for name in ("image_classes", "label_classes", "pred_classes")},
        **{name: {"type": "object"} for name in ("changelog", "required_packages_version", "eval_metrics")},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {name: {"type": "object", "additionalProperties": TENSOR} for name in ("inputs", "outputs")},
        },
    },
}


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


def bundle_commands(folder: Path, *commands: Sequence[object], fail: bool = False) -> list[Done]:
    """Run ``python -m monai.bundle`` with each of the arguments, one after the other, in a bundle's folder."""
    path = os.pathsep.join([str(bundles.SHIPPED.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MTL_CACHE": str(folder / "cache")}
    done = []
    for command in commands:
        arguments = ["python -m monai.bundle", *map(str, command)]
        result = run_forked(COMMAND, arguments, environment, folder, imports=MONAI)
        assert (result.returncode != 0) == fail, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        done.append(Done(result.returncode, result.stdout, result.stderr))
    return done


def run(*configs: str, **overrides: object) -> list[str]:
    files = [f"configs/{name}.yaml" for name in configs]
    named = [files[0]] if len(files) == 1 else [str(files)]
    options = [text for name, value in overrides.items() for text in (f"--{name.replace('__', '#')}", str(value))]
    return ["run", "--config_file", *named, *options]


def write_odd_phantoms(
    folder: Path, num_cases: int = 6, channels: int = 1, shape: Sequence[int] = (12, 40, 36)
) -> Path:
    """Phantoms as an nnU-Net raw dataset whose volumes are flipped and oblique."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in range(num_cases):
        image, label = phantom(shape, seed=i, channels=channels)
        for c, voxels in enumerate(image):
            file = folder / "imagesTr" / f"case_{i:02d}_{c:04d}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(voxels.transpose(2, 1, 0), AFFINE), file)
        nibabel.save(
            nibabel.Nifti1Image(label.transpose(2, 1, 0), AFFINE), folder / "labelsTr" / f"case_{i:02d}.nii.gz"
        )
    description = {
        "channel_names": {str(c): f"MRI{c}" for c in range(channels)},
        "labels": {"background": 0, "ball": 1, "core": 2},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def untrained_dice(bundle: Path, dataset: Path) -> float:
    """Mean Dice of the network before training, by the bundle's own validation."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.yaml"))
    parser.update(
        {
            "bundle_root": str(bundle),
            "dataset_dir": str(dataset),
            "validate#handlers": [],
            "encoder#selection": str(bundle / "selection"),
        }
    )
    torch.manual_seed(0)
    evaluator = parser.get_parsed_content("validate#evaluator")
    evaluator.run()
    return float(evaluator.state.metrics["val_mean_dice"])


@dataclass(frozen=True)
class Trained:
    """A bundle in which was selected, trained, evaluated, segmented and exported."""

    bundle: Path
    dataset: Path
    done: dict[str, Done]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("bundle")
    dataset = write_odd_phantoms(root / "Dataset001_Phantom")
    bundle = root / "phantoms"
    assert main(["bundle", str(bundle)]) == 0
    (root / "schema.json").write_text(json.dumps(DEMANDED))
    meta = ["--meta_file", "configs/metadata.json"]
    network = ["--config_file", "configs/inference.yaml", *meta]
    weights = ["--ckpt_file", "models/model.pt", "--key_in_ckpt", "model"]
    commands = {
        "fresh metadata": ["verify_metadata", *meta, "--filepath", root / "schema.json"],
        "fresh network": ["verify_net_in_out", "network_def", *network],
        "select": run("select", dataset_dir=dataset, checkpoints=DEMO_RUN, num_slices=12, scores="['rankme','contrastive']"),
        "train": run("train", dataset_dir=dataset, epochs=12, val_interval=5, fold=1, batch_size=1, num_samples=8, learning_rate=0.003),
        "evaluate": run("train", "evaluate", dataset_dir=dataset),
        "inference": run("inference", dataset_dir=dataset / "imagesTr"),
        "metadata": ["verify_metadata", *meta, "--filepath", root / "schema.json"],
        "network": ["verify_net_in_out", "network_def", *network],
        "torchscript": ["ckpt_export", "network_def", "--filepath", "models/model.ts", *weights, *network, "--use_trace", "True"],
        "onnx": ["onnx_export", "network_def", "--filepath", "models/model.onnx", *weights, *network, "--use_trace", "True"],
    }  # fmt: skip
    return Trained(bundle, dataset, dict(zip(commands, bundle_commands(bundle, *commands.values()), strict=True)))


def test_select_writes_a_selection_and_prints_the_ranking(trained: Trained) -> None:
    content = json.loads((trained.bundle / "selection" / "selection.json").read_text())
    assert content["encoder"]["name"] == "test_resnet"
    assert content["score"]["name"] == "rankme"
    assert [s["score"]["name"] for s in content["other_scores"]] == ["contrastive"]
    assert "<- chosen" in trained.done["select"].out


def test_training_starts_from_the_pick_and_beats_the_untrained_network(trained: Trained) -> None:
    record = json.loads((trained.bundle / "models" / "model.json").read_text())
    assert record["sha256"] == sha256(trained.bundle / "models" / "model.pt")
    selected = json.loads((trained.bundle / "selection" / "selection.json").read_text())
    assert record["plan"]["selection"]["encoder_sha256"] == selected["encoder"]["sha256"]
    assert record["epoch"] in (5, 10, 12)
    assert "encoder: test_resnet from checkpoint" in trained.done["train"].out
    assert record["val_mean_dice"] > untrained_dice(trained.bundle, trained.dataset) + 0.2
    assert list((trained.bundle / "eval").glob("events.out.tfevents.*"))
    assert re.findall(
        r"Epoch\[(\d+)\] Metrics -- val_mean_dice", trained.done["train"].out + trained.done["train"].err
    ) == ["5", "10", "12"]
    # fold 1 was asked for in training and is not typed again for evaluation
    split = split_cases(trained.dataset, 1)
    assert record["split"] == {**split.record(), "fold": 1}
    measured = [
        re.split(r"[,\t]", row)[0]
        for row in (trained.bundle / "eval" / "val_mean_dice_raw.csv").read_text().splitlines()[1:]
    ]
    assert sorted(Path(m).name for m in measured) == sorted(Path(e["image"]).name for e in split.validation)


def test_evaluation_measures_in_the_images_geometry(trained: Trained) -> None:
    """Dice by MONAI on the validation cases is Dice of the segmentations that inference wrote of them."""
    rows = (trained.bundle / "eval" / "val_mean_dice_raw.csv").read_text().splitlines()
    assert len(rows) == 1 + len(split_cases(trained.dataset, 1).validation)
    for row in rows[1:]:
        file, *values = row.split(",") if "," in row else row.split("\t")
        name = Path(file).name.removesuffix("_0000.nii.gz")
        label = np.asarray(nibabel.load(trained.dataset / "labelsTr" / f"{name}.nii.gz").dataobj)
        pred = np.asarray(nibabel.load(trained.bundle / "predictions" / f"{name}.nii.gz").dataobj)
        by_hand = [2 * ((label == k) & (pred == k)).sum() / ((label == k).sum() + (pred == k).sum()) for k in (1, 2)]
        assert [float(v) for v in values[:2]] == pytest.approx(by_hand, abs=1e-4)


def test_segmentations_lie_where_the_images_lie(trained: Trained) -> None:
    files = sorted((trained.bundle / "predictions").glob("*.nii.gz"))
    assert [f.name for f in files] == [f"case_{i:02d}.nii.gz" for i in range(6)]
    for file in files:
        image = nibabel.load(trained.dataset / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
        segmentation = nibabel.load(file)
        assert segmentation.shape == image.shape
        assert np.array_equal(segmentation.affine, image.affine)
        assert segmentation.get_data_dtype() == np.uint8
        label = np.asarray(nibabel.load(trained.dataset / "labelsTr" / file.name).dataobj) > 0
        pred = np.asarray(segmentation.dataobj) > 0
        # the ball is off the centre: a flipped or turned segmentation would miss it
        assert 2 * (label & pred).sum() / (label.sum() + pred.sum()) > 0.6


def test_metadata_says_what_was_trained(trained: Trained) -> None:
    metadata = json.loads((trained.bundle / "configs" / "metadata.json").read_text())
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert outputs["channel_def"] == {"0": "background", "1": "ball", "2": "core"}
    assert metadata["network_data_format"]["inputs"]["image"]["channel_def"] == {"0": "MRI0"}
    assert metadata["eval_metrics"]["val_mean_dice"] > 0.3
    for name in ("fresh metadata", "metadata"):
        assert "metadata is verified with no error" in trained.done[name].out + trained.done[name].err
    for name in ("fresh network", "network"):
        assert "data shape of network is verified with no error" in trained.done[name].out + trained.done[name].err


def test_exports_compute_what_the_network_computes(trained: Trained) -> None:
    parser = ConfigParser()
    parser.read_config(str(trained.bundle / "configs" / "inference.yaml"))
    parser["bundle_root"] = str(trained.bundle)
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(trained.bundle / "models" / "model.pt", weights_only=True))
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        expected = network(images)
        scripted = torch.jit.load(trained.bundle / "models" / "model.ts")
        assert torch.allclose(scripted(images), expected, atol=1e-5)
        assert scripted(torch.rand(2, 1, 96, 128)).shape == (2, 3, 96, 128)
    import onnxruntime

    session = onnxruntime.InferenceSession(trained.bundle / "models" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.allclose(found, expected.numpy(), atol=1e-4)


def test_wrong_input_ends_in_one_clear_message(trained: Trained, tmp_path: Path) -> None:
    bundle, dataset = trained.bundle, trained.dataset
    two_channels = write_odd_phantoms(tmp_path / "Dataset002_Two", num_cases=3, channels=2)
    other = tmp_path / "other"
    other.mkdir()
    torch.save({"model": torch.nn.Conv2d(1, 2, 3).state_dict()}, other / "model.pt")
    record = json.loads((bundle / "models" / "model.json").read_text())
    (other / "model.json").write_text(json.dumps({**record, "sha256": sha256(other / "model.pt")}))
    altered = tmp_path / "altered"
    altered.mkdir()
    (altered / "model.pt").write_bytes((bundle / "models" / "model.pt").read_bytes() + b"x")
    (altered / "model.json").write_text(json.dumps(record))
    odd_labels = write_odd_phantoms(tmp_path / "Dataset005_Odd", num_cases=5)
    for file in (odd_labels / "labelsTr").iterdir():
        label = nibabel.load(file)
        nibabel.save(
            nibabel.Nifti1Image(np.where(np.asarray(label.dataobj) == 2, 7, 1).astype(np.uint8), label.affine), file
        )
    own_names = tmp_path / "own_names"
    own_names.mkdir()
    shutil.copy(dataset / "imagesTr" / "case_00_0000.nii.gz", own_names / "scan.nii.gz")
    nowhere, elsewhere = tmp_path / "nowhere", tmp_path / "elsewhere"
    select = {"dataset_dir": dataset, "checkpoints": DEMO_RUN, "encoder__selection": elsewhere}
    train = {"dataset_dir": dataset, "ckpt_dir": elsewhere}
    cases = {
        "no such dataset folder": run("select", **{**select, "dataset_dir": nowhere}),
        "unknown score 'accuracy'": run("select", **select, scores="accuracy"),
        "there are no checkpoints to choose from": run("select", dataset_dir=dataset),
        "does not fit timm encoder 'test_convnext'": run("select", **select, encoder__name="test_convnext"),
        "Pass --overwrite True to replace it": run("select", dataset_dir=dataset, checkpoints=DEMO_RUN),
        r"no such dataset folder: .*nowhere": run("train", **{**train, "dataset_dir": nowhere}),
        "no selection in .* Run configs/select.yaml first": run("train", **train, encoder__selection=nowhere),
        "is of timm encoder 'test_resnet', not of 'convnext_tiny'": run("train", **train, encoder__name="convnext_tiny"),
        "knows no encoder 'resnet5'. Did you mean": run("train", **train, encoder__name="resnet5", encoder__weights="random"),
        "images of 1 channels .* has 2": run("train", **{**train, "dataset_dir": two_channels}),
        "no fold 9": run("train", **train, fold=9),
        "learning rate|lr=-1": run("train", **train, learning_rate=-1),
        r"model\.pt exists already\. Pass --overwrite True": run("train", dataset_dir=dataset),
        r"was trained on \d of these \d cases": run("train", "evaluate", dataset_dir=dataset, fold=0),
        r"lacks \d of the \d validation cases|images of 1 channels": run("train", "evaluate", dataset_dir=two_channels),
        r"holds 7; expected whole numbers from 0 to 2": run("train", **{**train, "dataset_dir": odd_labels}, encoder__name="test_resnet", encoder__weights="random"),
        "would replace the images that they are of": run("inference", dataset_dir=own_names, output_dir=own_names),
        "no such folder of images": run("inference", dataset_dir=nowhere),
        "no trained model .* Run configs/train.yaml first": run("inference", dataset_dir=dataset / "imagesTr", model=nowhere / "model.pt"),
        "is of another network than this config's": run("inference", dataset_dir=dataset / "imagesTr", model=other / "model.pt"),
        "is not the file that": run("inference", dataset_dir=dataset / "imagesTr", model=altered / "model.pt"),
        "has 2 channels, and 1 are expected|do not have 1 channel files": run("inference", dataset_dir=two_channels / "imagesTr"),
    }  # fmt: skip
    for (message, command), done in zip(
        cases.items(), bundle_commands(bundle, *cases.values(), fail=True), strict=True
    ):
        assert done.last_line.startswith("mtl-nnunet: "), f"{command}\n{done.err[-1500:]}"
        assert re.search(message, done.last_line), f"{message}\n{done.last_line}"
        assert "Traceback" in done.err
    assert not elsewhere.exists()
    assert json.loads((bundle / "models" / "model.json").read_text()) == record
    assert nibabel.load(own_names / "scan.nii.gz").get_data_dtype() == np.float32


def test_volumes_channels_and_other_encoders(trained: Trained, tmp_path: Path) -> None:
    """3D, two channels, another encoder by override, random weights: trained, then applied by their record."""
    dataset = write_odd_phantoms(tmp_path / "Dataset003_Two", num_cases=4, channels=2, shape=(16, 32, 32))
    random = {"dataset_dir": dataset, "encoder__weights": "random", "epochs": 1, "val_interval": 1, "num_samples": 1}
    volumes, slices = tmp_path / "volumes", tmp_path / "slices"
    bundle_commands(
        trained.bundle,
        run("train", **random, encoder__name="test_resnet", spatial_dims=3, ckpt_dir=volumes, output_dir=tmp_path / "eval"),
        run("inference", dataset_dir=dataset / "imagesTr", model=volumes / "model.pt", output_dir=tmp_path / "out"),
        run("train", **random, encoder__name="test_convnext", ckpt_dir=slices, output_dir=tmp_path / "eval"),
    )  # fmt: skip
    plans = [json.loads((folder / "model.json").read_text())["plan"] for folder in (volumes, slices)]
    assert [(p["spatial_dims"], p["encoder"], len(p["channel_names"])) for p in plans] == [
        (3, "test_resnet", 2), (2, "test_convnext", 2),
    ]  # fmt: skip
    assert all(p["selection"] is None for p in plans)
    for i in range(4):
        segmentation = nibabel.load(tmp_path / "out" / f"case_{i:02d}.nii.gz")
        assert segmentation.shape == (32, 32, 16)
        assert np.array_equal(
            segmentation.affine, nibabel.load(dataset / "imagesTr" / f"case_{i:02d}_0000.nii.gz").affine
        )


def test_the_workflow_has_what_monai_apps_ask_for(trained: Trained) -> None:
    configs = trained.bundle / "configs"
    for name, kind in (("train", "train"), ("inference", "infer")):
        workflow = ConfigWorkflow(
            str(configs / f"{name}.yaml"), workflow_type=kind, logging_file=str(configs / "logging.conf")
        )
        workflow.parser.update({"overwrite": True, "bundle_root": str(trained.bundle), "dataset_dir": str(trained.dataset / ("imagesTr" if kind == "infer" else ""))})  # fmt: skip
        workflow.initialize()
        assert workflow.check_properties() == []


def test_copying_the_bundle_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "bundle"
    assert main(["bundle", str(target)]) == 0
    assert "monai.bundle run --config_file configs/select.yaml" in capsys.readouterr().out
    shipped = {f.relative_to(bundles.SHIPPED) for f in bundles.SHIPPED.rglob("*") if f.is_file()}
    assert {f.relative_to(target) for f in target.rglob("*") if f.is_file()} == shipped
    configs = {f"configs/{n}" for n in ("metadata.json", "select.yaml", "train.yaml", "evaluate.yaml", "inference.yaml", "multi_gpu_train.yaml", "logging.conf")}  # fmt: skip
    assert configs | {"docs/README.md", "LICENSE"} == {str(f) for f in shipped}
    assert main(["bundle", str(target)]) == 1
    assert "exists already. Pass --overwrite" in capsys.readouterr().err
    (target / "configs" / "train.yaml").write_text("changed")
    (target / "mine.txt").write_text("kept")
    bundles.write_bundle(target, overwrite=True)
    assert (target / "configs" / "train.yaml").read_text() == (bundles.SHIPPED / "configs" / "train.yaml").read_text()
    assert (target / "mine.txt").read_text() == "kept"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(UserError, match="is not the bundle that is trained in"):
        bundles.write_bundle(foreign, overwrite=True)
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_metadata_as_shipped_is_of_the_untrained_network() -> None:
    metadata = json.loads((bundles.SHIPPED / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"] == data_format(UNTRAINED)
    assert metadata["schema"].endswith("/meta_schema_20240725.json")


@pytest.mark.slow
def test_metadata_by_the_schema_itself(tmp_path: Path) -> None:
    """By MONAI's own file: MTL_MONAI_SCHEMA names a copy of it, else it is downloaded."""
    assert main(["bundle", str(tmp_path / "bundle")]) == 0
    copy = os.environ.get("MTL_MONAI_SCHEMA", "schema.json")
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "verify_metadata",
        "--meta_file",
        "configs/metadata.json",
        "--filepath",
        copy,
    ]
    done = subprocess.run(command, cwd=tmp_path / "bundle", capture_output=True, text=True, check=False)
    if re.search("URLError|HTTPError|timed out", done.stderr):
        pytest.skip("the schema could not be downloaded")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "metadata is verified with no error" in done.stdout + done.stderr


@pytest.mark.slow
def test_several_processes_train_one_network(tmp_path: Path) -> None:
    """multi_gpu_train.yaml, on two processes without GPUs: each learns from other cases, and both end with the same weights."""
    dataset = write_odd_phantoms(tmp_path / "Dataset001_Phantom")
    bundle = tmp_path / "bundle"
    assert main(["bundle", str(bundle)]) == 0
    state = "@network_def.state_dict(), @bundle_root + "
    (bundle / "configs" / "watch.yaml").write_text(
        f"""
run:
- "$torch.save({state}'/before' + str(@rank) + '.pt')"
- $@train#trainer.run()
finalize:
- "$torch.save({state}'/after' + str(@rank) + '.pt')"
- "$torch.save(list(@train#sampler), @bundle_root + '/cases' + str(@rank) + '.pt')"
- "$dist.destroy_process_group()"
"""
    )
    overrides = run("train", "multi_gpu_train", "watch", dataset_dir=dataset, encoder__name="test_resnet", encoder__weights="random",
                    epochs=2, val_interval=1, backend="gloo", device="$torch.device('cpu')")  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes=1",
        "--nproc_per_node=2",
        "-m",
        "monai.bundle",
    ]
    done = subprocess.run([*command, *overrides], cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((bundle / "models" / "model.json").read_text())
    assert record["sha256"] == sha256(bundle / "models" / "model.pt")
    names = list(torch.load(bundle / "models" / "model.pt", weights_only=True))
    assert not [name for name in names if name.startswith("module.")]
    before, after, cases = (
        [torch.load(bundle / f"{what}{rank}.pt", weights_only=True) for rank in range(2)]
        for what in ("before", "after", "cases")
    )
    assert sorted(cases[0] + cases[1]) == list(range(4))
    learnt = [name for name, _ in MonaiUNet("test_resnet", 1, 3).named_parameters()]
    assert all(torch.equal(after[0][name], after[1][name]) for name in learnt)
    moved = [name for name in learnt if not torch.equal(before[0][name], after[0][name])]
    assert len(moved) > 0.8 * len(learnt)
    # more processes than validation cases
    alone = [*command, *overrides, "--fold", "1", "--ckpt_dir", str(tmp_path / "other")]
    done = subprocess.run(alone, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "mtl-nnunet: 2 processes share 1 validation cases, and each needs one" in done.stderr


@pytest.mark.slow
@needs_real_data
def test_hippocampus_end_to_end(tmp_path: Path) -> None:
    """Commands as a user types them, each in a process of its own."""
    dataset = tmp_path / "Dataset004_Hippocampus"
    source = REAL_DATA / "Dataset004_Hippocampus"
    for part in ("imagesTr", "labelsTr"):
        (dataset / part).mkdir(parents=True)
        for file in sorted((source / part).iterdir())[:40]:
            (dataset / part / file.name).symlink_to(file)
    (dataset / "dataset.json").write_text((source / "dataset.json").read_text())
    bundle = tmp_path / "bundle"
    assert main(["bundle", str(bundle)]) == 0
    commands = [
        run("select", dataset_dir=dataset, checkpoints=REAL_DATA / "pretraining" / "test_resnet", num_slices=64),
        run("train", dataset_dir=dataset, epochs=20, val_interval=10),
        run("train", "evaluate", dataset_dir=dataset),
        run("inference", dataset_dir=dataset / "imagesTr"),
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "monai.bundle", *command], cwd=bundle, capture_output=True, text=True, check=False,
            env={**os.environ, "MTL_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((bundle / "models" / "model.json").read_text())
    assert record["val_mean_dice"] > max(0.5, untrained_dice(bundle, dataset) + 0.3)
    for file in (bundle / "predictions").iterdir():
        image = nibabel.load(dataset / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
        assert np.array_equal(nibabel.load(file).affine, image.affine)

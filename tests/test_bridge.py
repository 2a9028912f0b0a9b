"""A trained model as a MONAI bundle: the same files as nnU-Net's own commands write, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import monai.bundle
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import skimage.io
import torch
from conftest import DEMO_RUN, Workplace, nnunet_folders_below, phantom, plan_with_nnunet, write_phantoms
from monai.bundle import ConfigWorkflow
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_bundle import bundle_commands

import mtl_nnunet.bridge.images
from mtl_nnunet.bridge import (
    NNUNetInferer,
    NNUNetPreprocessd,
    NNUNetSegmentationd,
    bundle_of_model,
    images_to_predict,
    network_of,
    read_model,
)
from mtl_nnunet.bridge.geometry import from_monai
from mtl_nnunet.bundles import write_bundle
from mtl_nnunet.cases import read_with_nnunet
from mtl_nnunet.cli.main import trainers_folder
from mtl_nnunet.cli.select_checkpoint import main as select
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import sha256
from mtl_nnunet.last_line import message_behind
from mtl_nnunet.trainer import MTLTrainer

CPU = torch.device("cpu")
ONE, TWO, PICTURES = "Dataset021_Oblique", "Dataset022_Regions", "Dataset023_Pictures"
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer")
SHAPE, SPACING = (9, 44, 38), (2.5, 0.7, 0.9)
# not a multiple of a right angle around any axis, and mirrored
DIRECTION = (0.96, 0.28, 0.0, 0.28, -0.96, 0.0, 0.0, 0.0, 1.0)
# what version 2024-07-25 of MONAI's schema and the older ones ask for
MANDATORY = (
    *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"),
    *("description", "authorship", "copyright", "dataset_dir", "image_classes", "label_classes", "pred_classes"),
    *("eval_metrics", "network_data_format"),
)


def write_oblique(path: Path, voxels: np.ndarray) -> None:
    """With an orientation that no axis swap undoes, as (Z, Y, X)."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((-17.25, 30.5, 4.75))
    image.SetDirection(DIRECTION)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def describe(folder: Path, **changes: Any) -> None:
    file = folder / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_datasets(raw: Path) -> None:
    """One channel, oblique and anisotropic; two channels with regions and an ignore label; pictures in colour."""
    for name, channels in ((ONE, ("MRI",)), (TWO, ("T1", "CT"))):
        write_phantoms(raw / name, num_cases=5, shape=SHAPE, spacing=SPACING, channel_names=channels, seed=len(name))
        for i in range(2):
            # another size each, with an empty margin that nnU-Net crops away
            voxels, _ = phantom((8 + i, 40 + 5 * i, 47), seed=700 + i, channels=len(channels))
            voxels[:, :, : 3 + i] = 0
            for c, channel in enumerate(voxels):
                write_oblique(raw / name / "imagesTs" / f"new_{i}_{c:04d}.nii.gz", channel)
    for file in sorted((raw / TWO / "labelsTr").iterdir()):
        label = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(label)
        array[:, :5] = 3
        partly = sitk.GetImageFromArray(array)
        partly.CopyInformation(label)
        sitk.WriteImage(partly, str(file))
    regions = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    describe(raw / TWO, labels=regions, regions_class_order=[1, 2], overwrite_image_reader_writer="NibabelIO")
    for i in range(7):
        folder = raw / PICTURES / ("imagesTr" if i < 5 else "imagesTs")
        colours, label = phantom((1, 44 + 3 * i, 52), seed=i, channels=3)
        folder.mkdir(parents=True, exist_ok=True)
        picture = np.clip(colours[:, 0], 0, 255).astype(np.uint8).transpose(1, 2, 0)
        skimage.io.imsave(folder / f"picture_{i}_0000.png", picture, check_contrast=False)
        if i < 5:
            (raw / PICTURES / "labelsTr").mkdir(exist_ok=True)
            skimage.io.imsave(raw / PICTURES / "labelsTr" / f"picture_{i}.png", label[0], check_contrast=False)
    about = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "ball": 1, "core": 2},
        "numTraining": 5,
        "file_ending": ".png",
    }
    (raw / PICTURES / "dataset.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The datasets, planned and preprocessed by nnU-Net, the first one selected for."""
    place = Workplace(tmp_path_factory.mktemp("bridge"), ONE, "MTLTrainer", iterations="4,1")
    write_datasets(place.root / "raw")
    with nnunet_folders_below(place.root):
        checkpoint = str(DEMO_RUN / "checkpoint-39.pth.tar")
        assert select(["-d", "21", "-ckpt", checkpoint, "-num_slices", "20", "-device", "cpu"]) == 0
        plan_with_nnunet(21, 22, 23, preprocessed="2d")
    return place


@contextmanager
def nnunet_folders_of(place: Workplace) -> Iterator[None]:
    """What nnU-Net needs to train in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, place.environment[name])
        patch.setenv("nnUNet_n_proc_DA", "0")
        yield


def trainer_of(place: Workplace, cls: type[Any], dataset: str, configuration: str, fold: int = 0) -> Any:
    folder = place.root / "preprocessed" / dataset
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    settings = plans["configurations"][configuration]
    settings["batch_size"] = 2
    # nnU-Net's own network as narrow as the tests are short
    kwargs = settings["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [min(8 * 2**i, 32) for i in range(len(kwargs["features_per_stage"]))]
    description = json.loads((folder / "dataset.json").read_text())
    return cls(plans=plans, configuration=configuration, fold=fold, dataset_json=description, device=CPU)


def train(place: Workplace, cls: type[Any], dataset: str, configuration: str, folds: tuple[int, ...]) -> Path:
    """A moment of nnU-Net's own training, and the folder of the model."""
    with nnunet_folders_of(place):
        for fold in folds:
            trainer = trainer_of(place, cls, dataset, configuration, fold)
            trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 4, 1
            trainer.run_training()
    return Path(trainer.output_folder_base)


def begin(place: Workplace, cls: type[Any], dataset: str, configuration: str) -> Path:
    """The folder of a model before its first step; slow tests train it."""
    with nnunet_folders_of(place):
        torch.manual_seed(3)
        trainer = trainer_of(place, cls, dataset, configuration)
        # it looks for preprocessed data, of which nothing is read before the first step
        with mock.patch("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.infer_dataset_class"):
            trainer.initialize()
        for key in ("train_losses", "val_losses", "mean_fg_dice", "lrs"):
            trainer.logger.log(key, torch.tensor(0.5).numpy()[()], 0)
        # of NumPy's type, as nnU-Net's own trainer leaves it
        trainer._best_ema = trainer.logger.get_value("ema_fg_dice", step=-1)
        trainer.inference_allowed_mirroring_axes = (0, len(trainer.configuration_manager.patch_size) - 1)
        folder = Path(trainer.output_folder_base)
        Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
        (folder / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    return folder


@pytest.fixture(scope="module")
def flat(place: Workplace) -> Path:
    """``MTLTrainer``, 2D, two folds, trained for a moment."""
    return train(place, MTLTrainer, ONE, "2d", (0, 1))


@pytest.fixture(scope="module")
def deep(place: Workplace) -> Path:
    """``MTLTrainer``, 3D."""
    return begin(place, MTLTrainer, ONE, "3d_fullres")


@pytest.fixture(scope="module")
def regions(place: Workplace) -> Path:
    """nnU-Net's own trainer, 3D, two channels, regions and an ignore label, read by nibabel."""
    return begin(place, nnUNetTrainer, TWO, "3d_fullres")


@pytest.fixture(scope="module")
def pictures(place: Workplace) -> Path:
    """nnU-Net's own trainer on natural images."""
    return begin(place, nnUNetTrainer, PICTURES, "2d")


@pytest.fixture(scope="module")
def bundle(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of_model(flat, tmp_path_factory.mktemp("bundles") / "oblique")


@pytest.fixture
def without_nnunet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none of nnU-Net's folders is set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def images_of(place: Workplace, dataset: str) -> Path:
    return place.root / "raw" / dataset / "imagesTs"


def run_bundle(bundle: Path, images: Any, out: Path, **overrides: Any) -> None:
    """``python -m monai.bundle run`` in this process."""
    monai.bundle.run(
        config_file=str(bundle / "configs" / "inference.yaml"),
        bundle_root=str(bundle),
        dataset_dir=images if isinstance(images, list) else str(images),
        output_dir=str(out),
        device="cpu",
        **overrides,
    )


def predict_with_nnunet(
    model: Path,
    images: Path,
    out: Path,
    folds: tuple[int, ...],
    checkpoint: str = "checkpoint_final.pth",
    tta: bool = True,
) -> None:
    """nnU-Net's own predictor in this process, with the threads that its command takes."""
    out.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(multiprocessing.cpu_count())
    try:
        predictor = nnUNetPredictor(use_mirroring=tta, device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), folds, checkpoint)
        predictor.predict_from_files_sequential(str(images), str(out))
    finally:
        torch.set_num_threads(threads)


def check_same(reference: Path, out: Path, ending: str = ".nii.gz", num_cases: int = 2) -> None:
    """Every voxel, type, shape, affine and header; the reference is no constant image."""
    expected, found = (sorted(f.name for f in folder.glob(f"*{ending}")) for folder in (reference, out))
    assert expected == found
    assert len(expected) == num_cases
    for name in expected:
        if ending == ".png":
            a, b = (skimage.io.imread(folder / name) for folder in (reference, out))
        else:
            one, other = (nibabel.load(folder / name) for folder in (reference, out))
            assert one.header.binaryblock == other.header.binaryblock
            assert np.array_equal(one.affine, other.affine)
            a, b = (np.asanyarray(image.dataobj) for image in (one, other))
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), f"{name}: {(a != b).sum()} of {a.size} voxels differ"
        # a border between classes runs through it, so that a shifted or turned image would be seen
        assert len(np.unique(a)) > 1
        assert (reference / name).read_bytes() == (out / name).read_bytes()


def test_the_commands_write_the_same_files(place: Workplace, flat: Path, bundle: Path, tmp_path: Path) -> None:
    images = images_of(place, ONE)
    options = ("-d", "21", "-c", "2d", "-f", "0", "1", "-tr", "MTLTrainer", "-device", "cpu", "-npp", "1", "-nps", "1")
    place.run("nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "nnunet"), *options)
    environment = {k: v for k, v in place.environment.items() if k not in VARIABLES}
    command = ("run", "--config_file", "configs/inference.yaml", "--dataset_dir", str(images))
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", *command, "--output_dir", str(tmp_path / "monai"), "--device", "cpu"],
        cwd=bundle,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(tmp_path / "nnunet", tmp_path / "monai")


@pytest.mark.parametrize(
    ("of", "dataset", "ending"),
    [("deep", ONE, ".nii.gz"), ("regions", TWO, ".nii.gz"), ("pictures", PICTURES, ".png")],
)
def test_every_kind_of_model_predicts_the_same(
    of: str,
    dataset: str,
    ending: str,
    place: Workplace,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    without_nnunet: None,
) -> None:
    model = request.getfixturevalue(of)
    predict_with_nnunet(model, images_of(place, dataset), tmp_path / "nnunet", (0,))
    run_bundle(bundle_of_model(model, tmp_path / "bundle"), images_of(place, dataset), tmp_path / "monai")
    check_same(tmp_path / "nnunet", tmp_path / "monai", ending)


def test_folds_checkpoint_and_mirroring_are_those_asked_for(
    flat: Path, place: Workplace, tmp_path: Path, without_nnunet: None
) -> None:
    images, best = images_of(place, ONE), "checkpoint_best.pth"
    made = bundle_of_model(flat, tmp_path / "bundle", folds=[1, 0], checkpoint_name=best)
    assert read_model(made / "models").folds == ("1", "0")
    predict_with_nnunet(flat, images, tmp_path / "nnunet", (1,), best, tta=False)
    run_bundle(made, images, tmp_path / "monai", folds=[1], **{"inferer#use_mirroring": False})
    check_same(tmp_path / "nnunet", tmp_path / "monai")
    predict_with_nnunet(flat, images, tmp_path / "mirrored", (1,), best)
    a, b = (np.asanyarray(nibabel.load(tmp_path / f / "new_0.nii.gz").dataobj) for f in ("nnunet", "mirrored"))
    assert not np.array_equal(a, b)


def test_what_macos_leaves_beside_images_is_no_image(tmp_path: Path) -> None:
    for name in ("a_0000.nii.gz", "._a_0000.nii.gz", ".DS_Store"):
        (tmp_path / name).touch()
    assert mtl_nnunet.bridge.images._grouped(tmp_path, ".nii.gz") == {"a": [str(tmp_path / "a_0000.nii.gz")]}


def test_datalists_and_lists_name_the_images_too(place: Workplace, regions: Path, tmp_path: Path) -> None:
    made = read_model(bundle_of_model(regions, tmp_path / "bundle") / "models")
    folder = images_of(place, TWO)
    files = [[str(folder / f"new_{i}_{c:04d}.nii.gz") for c in range(2)] for i in range(2)]
    expected = [{"image": of, "case": f"new_{i}"} for i, of in enumerate(files)]
    datalist = folder.parent / "datalist.json"
    relative = [[os.path.relpath(f, folder.parent) for f in of] for of in files]
    datalist.write_text(json.dumps({"testing": [{"image": of} for of in relative], "mine": relative[:1]}))
    assert images_to_predict(folder, made) == expected
    assert images_to_predict(folder.parent, made) == expected
    assert images_to_predict(datalist, made) == expected
    assert images_to_predict(datalist, made, key="mine") == expected[:1]
    assert images_to_predict([{"image": files[1]}], made) == expected[1:]
    assert images_to_predict([{"image": files[1], "case": "other"}], made)[0]["case"] == "other"


@pytest.mark.parametrize(("of", "dataset"), [("deep", ONE), ("regions", TWO)])
def test_images_that_monai_loaded_give_the_same_voxels(
    of: str, dataset: str, place: Workplace, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = read_model(bundle_of_model(request.getfixturevalue(of), tmp_path / "bundle") / "models")
    channels = images_to_predict(images_of(place, dataset), model)[1]["image"]
    from_files = Compose([NNUNetPreprocessd("image", model)])({"image": channels})["image"]
    # MONAI stacks the channels of a list itself
    loaded = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), NNUNetPreprocessd("image", model)])(
        {"image": channels}
    )["image"]
    assert torch.equal(from_files.as_tensor(), loaded.as_tensor())
    inferer, network = NNUNetInferer(model, use_mirroring=False), network_of(model)
    network.eval()
    results = []
    for image in (from_files, loaded):
        logits = inferer(image[None], network)[0]
        results.append(NNUNetSegmentationd("pred", model)({"image": image, "pred": logits})["pred"])
    assert torch.equal(results[0].as_tensor(), results[1].as_tensor())
    # where MONAI sees it is where the image is
    seen = LoadImage(image_only=True, ensure_channel_first=True)(channels[0])
    for result in results:
        assert result.shape == (1, *seen.shape[1:])
        np.testing.assert_allclose(result.affine.numpy(), seen.affine.numpy(), atol=2e-5)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_an_image_in_memory_is_what_the_reader_reads(reader: str, place: Workplace) -> None:
    file = images_of(place, ONE) / "new_1_0000.nii.gz"
    voxels, properties = read_with_nnunet([file], reader)
    image = LoadImage(image_only=True, ensure_channel_first=True)(str(file))
    ours, of_ours = from_monai(image, reader)
    assert np.array_equal(voxels, ours)
    assert list(of_ours["spacing"]) == [float(s) for s in properties["spacing"]]
    if reader == "SimpleITKIO":
        for key, tolerance in (("spacing", 0), ("origin", 1e-5), ("direction", 1e-6)):
            np.testing.assert_allclose(of_ours["sitk_stuff"][key], properties["sitk_stuff"][key], atol=tolerance)


def test_monais_own_checks_pass(bundle: Path, place: Workplace, tmp_path: Path, without_nnunet: None) -> None:
    config, meta = (str(bundle / "configs" / name) for name in ("inference.yaml", "metadata.json"))
    metadata = json.loads(Path(meta).read_text())
    assert [key for key in MANDATORY if key not in metadata] == []
    assert metadata["eval_metrics"] == {}
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "background",
        "1": "ball",
        "2": "core",
    }
    workflow = ConfigWorkflow(
        config_file=config,
        workflow_type="infer",
        bundle_root=str(bundle),
        dataset_dir=str(images_of(place, ONE)),
        device="cpu",
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    monai.bundle.verify_net_in_out(
        net_id="network_def", meta_file=meta, config_file=config, device="cpu", bundle_root=str(bundle)
    )
    exported = tmp_path / "model.ts"
    shape = [1, 1, *metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]]
    monai.bundle.ckpt_export(
        net_id="network_def",
        filepath=str(exported),
        ckpt_file=str(bundle / "models" / "fold_0" / "model.pt"),
        meta_file=meta,
        config_file=config,
        key_in_ckpt="network_weights",
        bundle_root=str(bundle),
        use_trace=True,
        input_shape=shape,
    )
    patch = torch.randn(shape)
    network = network_of(read_model(bundle / "models")).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(exported)).eval()(patch), network(patch), rtol=1e-4, atol=1e-4)


def test_heads_of_regions_are_named_in_the_networks_order(regions: Path, tmp_path: Path) -> None:
    made = bundle_of_model(regions, tmp_path / "bundle")
    metadata = json.loads((made / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "whole", "1": "core"}
    assert metadata["network_data_format"]["inputs"]["image"]["channel_def"] == {"0": "T1", "1": "CT"}


def test_a_bundle_holds_weights_that_are_hashed_and_safe_to_load(bundle: Path, flat: Path) -> None:
    record = json.loads((bundle / "models" / "nnunet_model.json").read_text())
    assert record["trainer"] == "MTLTrainer"
    assert record["folds"] == ["0", "1"]
    assert record["selection"]["encoder"] == "test_resnet"
    files = {str(f.relative_to(bundle / "models")) for f in (bundle / "models").rglob("*") if f.is_file()}
    assert files == {*record["files"], "nnunet_model.json"}
    for name, digest in record["files"].items():
        assert sha256(bundle / "models" / name) == digest
    for fold in ("0", "1"):
        source = flat / f"fold_{fold}" / "checkpoint_final.pth"
        assert record["made_from"][fold] == {"file": source.name, "sha256": sha256(source)}
        held = torch.load(bundle / "models" / f"fold_{fold}" / "model.pt", weights_only=True)
        trained = torch.load(source, weights_only=True)["network_weights"]
        assert list(held) == ["network_weights"]
        assert all(torch.equal(held["network_weights"][k], v) for k, v in trained.items())
    for said in ("model.pt", "MTLTrainer", record["files"]["plans.json"], "CASE_0000.nii.gz"):
        assert said in (bundle / "docs" / "README.md").read_text()
    # no path of this machine goes out with the model
    for file in bundle.rglob("*"):
        if file.suffix in (".json", ".yaml", ".md", ".conf"):
            assert str(flat.parent) not in file.read_text()


def test_a_model_of_somebodys_trainer_predicts_where_that_trainer_is_unknown(
    place: Workplace, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
    (tmp_path / "theirs.py").write_text(
        head
        + "class TheirLoss(nnUNetTrainer): pass\n"
        + "class TheirNetwork(nnUNetTrainer):\n    @staticmethod\n    def build_network_architecture(*a, **k): pass\n"
    )
    model = tmp_path / "model"
    shutil.copytree(flat, model)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    for name in ("TheirLoss", "TheirNetwork"):
        torch.save({**checkpoint, "trainer_name": name}, model / "fold_0" / "checkpoint_final.pth")
        monkeypatch.delenv("nnUNet_extTrainer", raising=False)
        with pytest.raises(UserError, match=f"{name}, which nnU-Net does not find"):
            bundle_of_model(model, tmp_path / name, folds=0)
        monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(tmp_path), str(trainers_folder())]))
        if name == "TheirLoss":
            made = bundle_of_model(model, tmp_path / name, folds=0)
            assert read_model(made / "models").trainer == "nnUNetTrainer"
        else:
            with pytest.raises(UserError, match="builds its network in its own build_network_architecture"):
                bundle_of_model(model, tmp_path / name, folds=0)


def copy_of(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "spoilt")
    return tmp_path / "spoilt"


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text) and None


def resave(**changes: Any) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        file = model / "fold_0" / "checkpoint_final.pth"
        content = torch.load(file, weights_only=True)
        content.update({k: v(content[k]) if callable(v) else v for k, v in changes.items()})
        torch.save({k: v for k, v in content.items() if v is not None}, file)

    return spoil


def as_second_stage(model: Path) -> None:
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["2d"]["previous_stage"] = "3d_lowres"
    (model / "plans.json").write_text(json.dumps(plans))


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("should never be made",)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (without("plans.json"), {}, "is no trained model of nnU-Net: plans.json is not there"),
        (write("plans.json", "{"), {}, "is not what nnU-Net v2 writes"),
        (write("dataset.json", "{}"), {}, "is not what nnU-Net v2 writes"),
        (lambda m: None, {"folds": [0, 4]}, r"has no checkpoint_final.pth of fold 4 \(folds that have one: 0, 1"),
        (lambda m: None, {"checkpoint_name": "checkpoint_last.pth"}, "of any fold .*checkpoint_best.pth"),
        (write("fold_0/checkpoint_final.pth", "no"), {}, "checkpoint_final.pth"),
        (resave(trainer_name=None), {}, "is no checkpoint of nnU-Net v2"),
        (resave(init_args=Code()), {}, "is refused: it holds Python objects"),
        (resave(network_weights=lambda w: dict(list(w.items())[1:])), {}, "do not fit the network of the plans"),
        (resave(init_args={"configuration": "3d_lowres"}), {}, "are of configuration 3d_lowres"),
        (as_second_stage, {}, "is the second stage of a cascade"),
    ],
)
def test_what_is_no_whole_model_is_refused(
    spoil: Callable[[Path], None], options: dict[str, Any], message: str, flat: Path, tmp_path: Path
) -> None:
    model = copy_of(flat, tmp_path)
    spoil(model)
    with pytest.raises(UserError, match=message):
        bundle_of_model(model, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()
    assert not Path("should never be made").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["spoilt"]


def test_a_folder_beside_the_model_is_told_from_it(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"It holds models: .*{flat.name}"):
        bundle_of_model(flat.parent, tmp_path / "bundle")
    with pytest.raises(UserError, match=f"The model is {flat}"):
        bundle_of_model(flat / "fold_0", tmp_path / "bundle")
    with pytest.raises(UserError, match="does not exist"):
        bundle_of_model(flat / "nowhere", tmp_path / "bundle")


def test_only_a_bundle_is_overwritten(flat: Path, tmp_path: Path) -> None:
    made = bundle_of_model(flat, tmp_path / "bundle", folds=0)
    with pytest.raises(UserError, match="exists already"):
        bundle_of_model(flat, made)
    assert read_model(bundle_of_model(flat, made, folds=1, overwrite=True) / "models").folds == ("1",)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a bundle of a model"):
        bundle_of_model(flat, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fold_0/model.pt", "is not the file that was bundled"),
        ("plans.json", "is not the file that was bundled"),
        ("nnunet_model.json", "is damaged"),
    ],
)
def test_altered_files_are_refused(name: str, message: str, bundle: Path, tmp_path: Path) -> None:
    models = copy_of(bundle, tmp_path) / "models"
    content = bytearray((models / name).read_bytes())
    content[len(content) // 2] ^= 1
    (models / name).write_bytes(bytes(content) if name != "nnunet_model.json" else b"{}")
    with pytest.raises(UserError, match=message):
        read_model(models)
    (models / name).unlink()
    with pytest.raises(UserError, match=r"is gone|is not there"):
        read_model(models)


def test_folds_that_the_bundle_does_not_hold_are_refused(bundle: Path) -> None:
    assert read_model(bundle / "models", folds=1).folds == ("1",)
    with pytest.raises(UserError, match="has no fold 3, only 0, 1"):
        read_model(bundle / "models", folds=[0, 3])


def test_images_that_cannot_be_predicted_are_refused(place: Workplace, regions: Path, tmp_path: Path) -> None:
    model = read_model(bundle_of_model(regions, tmp_path / "bundle") / "models")
    images = tmp_path / "images"
    shutil.copytree(images_of(place, TWO), images)
    (images / "new_1_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case new_1 has 1 of 2 channel files .*0000: T1, 0001: CT"):
        images_to_predict(images, model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected files named CASE_0000.nii.gz to CASE_0001.nii.gz"):
        images_to_predict(tmp_path / "empty", model)
    with pytest.raises(UserError, match="does not exist"):
        images_to_predict(tmp_path / "nowhere", model)
    pair = [str(images / f"new_0_{c:04d}.nii.gz") for c in range(2)]
    with pytest.raises(UserError, match=r"would be written as new_0\.nii\.gz"):
        images_to_predict([pair, pair], model)
    with pytest.raises(UserError, match=r"gone_0000.nii.gz does not exist"):
        images_to_predict([[str(images / "gone_0000.nii.gz"), pair[1]]], model)
    with pytest.raises(UserError, match="is no image to predict"):
        images_to_predict([7], model)
    (tmp_path / "list.json").write_text(json.dumps({"training": []}))
    with pytest.raises(UserError, match=r"has no list 'testing' \(it has: training\)"):
        images_to_predict(tmp_path / "list.json", model)
    with pytest.raises(UserError, match=r"has 1 channel\(s\), but the model was trained on 2 \(T1, CT\)"):
        NNUNetPreprocessd("image", model)({"image": pair[0]})
    with pytest.raises(UserError, match="is a tensor without geometry"):
        NNUNetPreprocessd("image", model)({"image": torch.zeros(2, 8, 8, 8)})
    (images / "new_0_0000.nii.gz").write_bytes(b"not an image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        NNUNetPreprocessd("image", model)({"image": pair})


def test_a_bundle_that_was_trained_in_and_one_of_a_model_do_not_replace_each_other(
    flat: Path, bundle: Path, tmp_path: Path
) -> None:
    trained_in = write_bundle(tmp_path / "trained in")
    (trained_in / "models").mkdir()
    for name in ("model.pt", "model.json"):
        (trained_in / "models" / name).write_text("mine")
    with pytest.raises(UserError, match="is not a bundle of a model"):
        bundle_of_model(flat, trained_in, overwrite=True)
    assert (trained_in / "models" / "model.pt").read_text() == "mine"
    copy = copy_of(bundle, tmp_path)
    before = {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()}
    with pytest.raises(UserError, match="is not the bundle that is trained in"):
        write_bundle(copy, overwrite=True)
    assert {f: f.read_bytes() for f in copy.rglob("*") if f.is_file()} == before


def test_an_image_is_not_replaced_by_its_segmentation(place: Workplace, bundle: Path, tmp_path: Path) -> None:
    source = next(images_of(place, ONE).glob("*_0000.nii.gz"))
    image = tmp_path / "images" / "scan.nii.gz"
    image.parent.mkdir()
    shutil.copyfile(source, image)
    before = image.read_bytes()
    # as MONAI wraps it
    with pytest.raises(RuntimeError) as caught:
        run_bundle(bundle, [str(image)], image.parent)
    assert "would replace that image" in str(message_behind(caught.value))
    assert image.read_bytes() == before


def test_a_fold_that_is_a_path_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copy_of(bundle, tmp_path)
    file = copy / "models" / "nnunet_model.json"
    record = json.loads(file.read_text())
    record["folds"] = ["0/../../elsewhere"]
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="is no fold"):
        read_model(copy / "models")


def test_monais_trace_ends_in_our_message(bundle: Path, tmp_path: Path) -> None:
    copy, images = copy_of(bundle, tmp_path), tmp_path / "images"
    images.mkdir()
    (copy / "models" / "fold_1" / "model.pt").write_bytes(b"other")
    command = ("run", "--config_file", "configs/inference.yaml", "--dataset_dir", images)
    of_all, of_one = bundle_commands(copy, command, (*command, "--folds", "[0]"), fail=True)
    for done, message in ((of_all, "is not the file that was bundled"), (of_one, "files named CASE_0000.nii.gz")):
        assert done.status == 1
        assert message in done.last_line
        assert done.last_line.startswith("mtl-nnunet: ")


class Refusing(torch.utils.data.Dataset[None]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        try:
            raise UserError("what to do next")
        except UserError as error:
            # as MONAI wraps what a transform raises
            raise RuntimeError("applying transform") from error


def test_what_was_handled_is_no_cause() -> None:
    def replaced() -> None:
        try:
            raise UserError("the optional file is not there")
        except UserError:
            raise ValueError("the real reason") from None

    with pytest.raises(ValueError, match="the real reason") as caught:
        replaced()
    assert message_behind(caught.value) is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_told_too(num_workers: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        next(iter(torch.utils.data.DataLoader(Refusing(), num_workers=num_workers)))
    assert message_behind(caught.value) == "what to do next"
    assert message_behind(ValueError("of others")) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "dataset", "configuration", "ending"),
    [
        (MTLTrainer, ONE, "3d_fullres", ".nii.gz"),
        (nnUNetTrainer, TWO, "2d", ".nii.gz"),
        (nnUNetTrainer, TWO, "3d_fullres", ".nii.gz"),
        (nnUNetTrainer, PICTURES, "2d", ".png"),
    ],
)
def test_trained_models_predict_the_same_files_as_the_command(
    cls: type[Any], dataset: str, configuration: str, ending: str, place: Workplace, tmp_path: Path
) -> None:
    place.run("nnUNetv2_preprocess", "-d", dataset[7:10], "-c", configuration, "-np", "1")
    model = train(place, cls, dataset, configuration, (0, 1))
    images, out = images_of(place, dataset), str(tmp_path / "nnunet")
    options = ("-d", dataset, "-c", configuration, "-f", "0", "1", "-tr", cls.__name__, "-device", "cpu")
    place.run("nnUNetv2_predict", "-i", str(images), "-o", out, *options, "-npp", "1", "-nps", "1")
    run_bundle(bundle_of_model(model, tmp_path / "bundle"), images, tmp_path / "monai")
    check_same(tmp_path / "nnunet", tmp_path / "monai", ending)

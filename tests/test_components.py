"""MONAI components: against nnU-Net's own reading, MONAI's own losses and engines, and properties of the geometry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from conftest import phantom, write_image, write_phantoms
from monai.bundle import ConfigParser
from monai.data import DataLoader, MetaTensor
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.transforms import Compose, Invertd, LoadImaged
from safetensors.torch import load_file
from torch import Tensor

from mtl_nnunet import bundles, components
from mtl_nnunet.cases import find_dataset_folder
from mtl_nnunet.components.data import class_names, labelled_dataset
from mtl_nnunet.components.plan import UNTRAINED, plane_last, read_record, record_file, record_of
from mtl_nnunet.components.unet import encoder_strides, network_shape
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import to_json
from mtl_nnunet.last_line import message_behind
from mtl_nnunet.select import select_checkpoint
from mtl_nnunet.slices import gather_slices
from mtl_nnunet.views import scanner_view

ODD_AFFINE = np.array([[0.1, -0.9, 0.3, 12.0], [-0.78, -0.15, 0.5, -40.0], [-0.2, 0.2, 1.9, 7.5], [0.0, 0.0, 0.0, 1.0]])


def volume(shape: tuple[int, ...] = (2, 5, 6, 7)) -> MetaTensor:
    return MetaTensor(torch.arange(float(np.prod(shape))).reshape(shape), affine=torch.tensor(ODD_AFFINE))


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory, demo_run: Path) -> Path:
    root = tmp_path_factory.mktemp("selected")
    write_phantoms(root / "Dataset001_Phantom")
    dataset = find_dataset_folder(root / "Dataset001_Phantom")
    select_checkpoint(dataset, demo_run / "checkpoint-39.pth.tar", output=root / "selection", num_slices=12)
    return root / "selection"


def prepared(dataset: Path, axis: int, channels: tuple[str, ...], use_mask: bool, intensities: dict[str, Any]) -> Any:
    """The deterministic transforms of the shipped train.yaml."""
    parser = ConfigParser()
    parser.read_config(str(bundles.SHIPPED / "configs" / "train.yaml"))
    plan = UNTRAINED.__class__(
        **{
            **UNTRAINED.__dict__,
            "axis": axis,
            "channel_names": channels,
            "use_mask_for_norm": use_mask,
            "intensities": intensities,
        }
    )
    parser["plan"] = plan
    return parser.get_parsed_content("validate#preprocessing")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axes_move_and_the_world_stays(axis: int) -> None:
    before = volume()
    after = components.SliceAxisFirst(axis)(before)
    order = plane_last(axis)
    assert after.shape[1:] == tuple(before.shape[i + 1] for i in order)
    rng = np.random.default_rng(axis)
    for _ in range(5):
        old = [int(rng.integers(n)) for n in before.shape[1:]]
        new = [old[i] for i in order]
        assert after[(slice(None), *new)].tolist() == before[(slice(None), *old)].tolist()
        assert np.allclose(np.asarray(after.affine) @ [*new, 1], ODD_AFFINE @ [*old, 1])
    transform = components.SliceAxisFirstd("image", axis)
    back = transform.inverse(transform({"image": before}))["image"]
    assert torch.equal(back.as_tensor(), before.as_tensor())
    assert np.allclose(back.affine, ODD_AFFINE)
    assert back.applied_operations == []


@pytest.mark.parametrize(
    ("channels", "spacing", "border"),
    [
        (("MRI",), (2.0, 1.0, 1.0), 0),
        (("MRI", "T2"), (1.0, 1.0, 3.0), 0),
        (("CT",), (2.0, 1.0, 1.0), 0),
        (("MRI",), (2.0, 1.0, 1.0), 12),
    ],
)
def test_what_is_trained_is_what_was_scored(
    tmp_path: Path, channels: tuple[str, ...], spacing: tuple[float, ...], border: int
) -> None:
    folder = tmp_path / "Dataset001_Phantom"
    write_phantoms(folder, channel_names=channels, spacing=spacing, shape=(10, 40, 44))
    if border:
        # a frame of zeros: nnU-Net crops it, and normalises inside the rest only
        for file in (folder / "imagesTr").iterdir():
            image = nibabel.load(file)
            voxels = np.asarray(image.dataobj).copy()
            voxels[:border] = voxels[-border:] = voxels[:, :border] = 0
            nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)
    slices = gather_slices(find_dataset_folder(folder), num_slices=12, num_workers=1)
    transform = prepared(folder, slices.axis, channels, slices.use_mask_for_norm, slices.intensities)
    for entry in components.split_cases(folder).validation:
        name = Path(entry["label"]).name.removesuffix(".nii.gz")
        image = np.asarray(transform(entry)["image"])
        taken = [i for i, case in enumerate(slices.cases) if case == name]
        assert taken
        for i in taken:
            scored, trained = slices.images[i].numpy(), image[:, slices.positions[i]]
            # scoring brings all slices to one size about their middle
            middle = [slice(max(0, (s - t) // 2), max(0, (s - t) // 2) + min(s, t)) for s, t in zip(scored.shape[1:], trained.shape[1:], strict=True)]  # fmt: skip
            own = [slice(max(0, (t - s) // 2), max(0, (t - s) // 2) + min(s, t)) for s, t in zip(scored.shape[1:], trained.shape[1:], strict=True)]  # fmt: skip
            assert np.allclose(scored[:, middle[0], middle[1]], trained[:, own[0], own[1]], atol=1e-4)


def test_spacing_is_that_of_voxels_whatever_the_affine() -> None:
    before = volume((1, 6, 8, 10))
    sizes = np.linalg.norm(ODD_AFFINE[:3, :3], axis=0)
    transform = components.SpacingAsNnunetd(["image", "label"], [-1, sizes[1] / 2, sizes[2] * 2], ["linear", "nearest"])
    after = transform({"image": before, "label": before > 200})
    assert after["image"].shape == after["label"].shape == (1, 6, 16, 5)
    assert after["label"].unique().tolist() == [0, 1]
    # the corner of the first voxel stays where it is in the world
    corner = [-0.5, -0.5, -0.5, 1]
    assert np.allclose(np.asarray(after["image"].affine) @ corner, ODD_AFFINE @ corner)
    assert np.allclose(np.linalg.norm(np.asarray(after["image"].affine)[:3, :3], axis=0), sizes * [1, 0.5, 2])
    back = transform.inverse(after)["image"]
    assert back.shape == before.shape
    assert np.allclose(back.affine, ODD_AFFINE)
    # values grow evenly along each axis, so that linear resampling gives them back but at the borders
    assert torch.allclose(back[:, :, 2:-2, 2:-2], before[:, :, 2:-2, 2:-2], atol=1e-3)
    same = components.SpacingAsNnunet(sizes)
    assert torch.equal(same(before).as_tensor(), before.as_tensor())


def test_constant_and_foreign_images_are_refused(tmp_path: Path) -> None:
    normalize = components.NormalizeAsNnunetd("image", ["MRI"])
    with pytest.raises(UserError, match="channel 0 is constant"):
        normalize({"image": torch.ones(1, 4, 4, 4)})
    with pytest.raises(UserError, match="2 channels, and 1 are expected"):
        normalize({"image": torch.rand(2, 4, 4, 4)})
    with pytest.raises(UserError, match="NaN or infinite"):
        normalize({"image": torch.full((1, 4, 4, 4), torch.nan)})
    with pytest.raises(UserError, match="zero everywhere"):
        components.nonzero(torch.zeros(1, 4, 4, 4))


def test_slices_of_a_case_are_those_that_are_scored(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "Dataset001_Phantom", num_cases=4, shape=(20, 40, 44))
    slices = gather_slices(find_dataset_folder(folder), num_slices=12, num_workers=1)
    quota = slices.used[0].num_slices
    transform = Compose(
        [
            LoadImaged(["image", "label"], ensure_channel_first=True),
            components.SliceAxisFirstd(["image", "label"], slices.axis),
            components.SlicesOfCased(["image", "label"], num_slices=quota),
        ]
    )
    for entry in components.split_cases(folder).training:
        parts = transform(entry)
        name = Path(entry["label"]).name.removesuffix(".nii.gz")
        expected = [p for p, case in zip(slices.positions, slices.cases, strict=True) if case == name]
        assert [p["slice"] for p in parts] == expected
        assert {tuple(p["image"].shape) for p in parts} == {(1, 40, 44)}
        whole = np.asarray(nibabel.load(entry["label"]).dataobj).transpose(2, 1, 0)
        assert all(np.array_equal(np.asarray(p["label"])[0], whole[p["slice"]]) for p in parts)


def test_a_view_is_the_scores_view_and_repeats() -> None:
    image = MetaTensor(torch.rand(1, 32, 32), affine=torch.eye(4))
    first, second = (components.RandViewd("image", "scanner").set_random_state(3) for _ in range(2))
    a, b = first({"image": image})["image"], second({"image": image})["image"]
    assert torch.equal(a, b)
    assert isinstance(a, MetaTensor)
    assert torch.equal(a.as_tensor(), scanner_view(image.as_tensor()[None], first.view.view_seed, 0)[0])
    assert not torch.equal(a, first({"image": image})["image"])
    assert torch.equal(components.RandViewd("image", prob=0.0)({"image": image})["image"], image)
    with pytest.raises(UserError, match="unknown views"):
        components.RandView("noise")
    with pytest.raises(UserError, match="strength 3"):
        components.RandView(strength=3)


@pytest.mark.parametrize(
    ("encoder", "spatial_dims", "channels"), [("test_resnet", 2, 1), ("test_convnext", 2, 4), ("test_resnet", 3, 2)]
)
def test_one_tensor_in_evaluation_every_scale_in_training(encoder: str, spatial_dims: int, channels: int) -> None:
    side = 64 if spatial_dims == 2 else 32
    network = components.MonaiUNet(encoder, channels, 3, spatial_dims)
    images = MetaTensor(torch.rand(2, channels, *[side] * spatial_dims))
    labels = torch.randint(0, 3, (2, 1, *[side] * spatial_dims)).float()
    scales = network.train()(images)
    assert [p.shape[-1] for p in scales] == [side // int(np.prod([s[-1] for s in network_strides(network)[: i + 1]])) for i in range(len(scales))]  # fmt: skip
    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))(scales, labels)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.stem.parameters())
    out = network.eval()(images)
    assert isinstance(out, Tensor)
    assert out.shape == (2, 3, *[side] * spatial_dims)
    assert isinstance(components.MonaiUNet(encoder, channels, 3, spatial_dims, deep_supervision=False)(images), Tensor)
    traced = torch.jit.trace(network, images.as_tensor())
    other = torch.rand(1, channels, *[2 * side if spatial_dims == 2 else side] * spatial_dims)
    assert torch.allclose(traced(other), network(other), atol=1e-5)


def network_strides(network: Any) -> list[list[int]]:
    return encoder_strides(network.encoder.name, 2)


def test_shape_follows_nnunets_planner_along_the_depth() -> None:
    patch, strides, kernels = network_shape("test_resnet", (20, 60, 60), (3.0, 0.8, 0.8))
    assert patch[1:] == [64, 64]
    # by hand: 3.0 is more than twice 0.8 and not more than twice 1.6
    assert [s[0] for s in strides[:3]] == [1, 1, 2]
    assert kernels[:2] == [[1, 3, 3], [3, 3, 3]]
    assert patch[0] % int(np.prod([s[0] for s in strides])) == 0
    network = components.MonaiUNet("test_resnet", 1, 2, 3, strides, kernels).eval()
    assert network(torch.rand(1, 1, *patch)).shape == (1, 2, *patch)
    with pytest.raises(UserError, match="expected 2 or 3"):
        encoder_strides("test_resnet", 4)


def test_it_starts_from_the_selection(selection: Path) -> None:
    network = components.MonaiUNet("test_resnet", 3, 2, selection=selection)
    chosen = load_file(selection / "encoder.safetensors")
    own = network.encoder.timm.model.state_dict()
    assert all(torch.equal(own[k], v.to(own[k].dtype)) for k, v in chosen.items())
    with pytest.raises(UserError, match="is of timm encoder 'test_resnet', and the network has 'test_convnext'"):
        components.MonaiUNet("test_convnext", 1, 2, selection=selection)
    with pytest.raises(UserError, match="Did you mean"):
        components.MonaiUNet("resnet5", 1, 2)
    with pytest.raises(UserError, match="no selection in"):
        components.MonaiUNet("test_resnet", 1, 2, selection=selection.parent / "nowhere")


def test_plans_follow_selection_and_dataset(selection: Path, tmp_path: Path) -> None:
    folder = selection.parent / "Dataset001_Phantom"
    plan = components.plan_training(folder, selection)
    assert (plan.encoder, plan.in_channels, plan.out_channels) == ("test_resnet", 1, 3)
    assert plan.labels == ("background", "ball", "core")
    assert plan.patch_size == (64, 64)
    assert plan.roi_size == [1, 64, 64]
    assert plan.pixdim == [-1.0, 1.0, 1.0]
    assert plan.spacing == (2.0, 1.0, 1.0)
    alone = components.plan_training(folder, tmp_path, "test_resnet", "random")
    assert alone.selection is None
    stated = json.loads((selection / "selection.json").read_text())
    assert plan.selection is not None
    assert plan.selection["encoder_sha256"] == stated["encoder"]["sha256"]
    # what the selection's slices were like is found again without it
    assert {**plan.__dict__, "selection": None} == alone.__dict__
    volumetric = components.plan_training(folder, selection, spatial_dims=3, patch_size=[8, 40, 36])
    assert volumetric.patch_size[1:] == (64, 64)
    assert components.plan_training(folder, selection, patch_size=[33, 64]).patch_size == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "imagenet"}, "expected selected or random"),
        ({"weights": "random"}, "random weights need the encoder's name"),
        ({"encoder": "test_convnext"}, "is of timm encoder 'test_resnet', not of 'test_convnext'"),
        ({"selection": "nowhere"}, "no selection in nowhere, so there is no encoder to start from"),
        ({"encoder": "resnet5000", "weights": "random"}, "knows no encoder 'resnet5000'"),
        ({"spatial_dims": 4}, "expected 2 or 3"),
        ({"patch_size": [64]}, "expected 2 whole numbers"),
        ({"spacing": [1.0, 0.0, 1.0]}, "expected three numbers above 0"),
        ({"dataset_dir": "nowhere"}, "no such dataset folder"),
    ],
)
def test_plans_that_cannot_be(selection: Path, options: dict[str, Any], message: str) -> None:
    asked = {"dataset_dir": selection.parent / "Dataset001_Phantom", "selection": selection, **options}
    with pytest.raises(UserError, match=message):
        components.plan_training(**asked)


def test_another_datasets_selection_is_refused_only_for_other_channels(
    selection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two = write_phantoms(tmp_path / "Dataset002_Two", channel_names=("T1", "T2"))
    with pytest.raises(UserError, match=r"images of 1 channels .* has 2"):
        components.plan_training(two, selection)
    other = write_phantoms(tmp_path / "Dataset003_Other", spacing=(3.0, 1.5, 1.5))
    assert components.plan_training(other, selection).spacing == (3.0, 1.5, 1.5)
    assert "was made on Dataset001_Phantom, and this is Dataset003_Other" in caplog.text


def test_folds_are_nnunets(make_dataset: Callable[..., Path], nnunet_folders: Path) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    folder = make_dataset(num_cases=11)
    names = [f"case_{i:02d}" for i in range(11)]
    for fold in (0, 4):
        split = components.split_cases(folder, fold)
        theirs = generate_crossval_split(names)[fold]
        for ours, part in ((split.training, "train"), (split.validation, "val")):
            assert [Path(e["label"]).name.removesuffix(".nii.gz") for e in ours] == sorted(theirs[part])
    with pytest.raises(UserError, match="no fold 5"):
        components.split_cases(folder, 5)


def test_patients_are_in_one_part_only(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "Dataset001_Phantom", num_cases=8)
    rows = [f"case_{i:02d},patient_{i // 2}" for i in range(8)]
    (folder / "patients.csv").write_text("\n".join(["case,patient", *rows]))
    for fold in range(4):
        split = components.split_cases(folder, fold)
        sides = [{int(Path(e["label"]).name[5:7]) // 2 for e in part} for part in (split.training, split.validation)]
        assert not sides[0] & sides[1]
        assert len(split.validation) == 2
    with pytest.raises(UserError, match="folds 0 to 3"):
        components.split_cases(folder, 4)


def test_a_datalist_with_channels_in_one_file_and_a_validation_of_its_own(tmp_path: Path) -> None:
    entries = []
    for i in range(4):
        image, label = phantom((8, 24, 20), seed=i, channels=2)
        nibabel.save(nibabel.Nifti1Image(image.transpose(3, 2, 1, 0), np.eye(4)), tmp_path / f"image_{i}.nii.gz")
        write_image(tmp_path / f"label_{i}.nii.gz", label)
        entries.append({"image": f"./image_{i}.nii.gz", "label": f"./label_{i}.nii.gz"})
    content = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background", "1": "ball", "2": "core"},
        "training": entries[:3],
        "validation": entries[3:],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    split = components.split_cases(tmp_path)
    assert [len(split.training), len(split.validation)] == [3, 1]
    assert split.validation[0]["image"].endswith("image_3.nii.gz")
    plan = components.plan_training(tmp_path, "none", "test_resnet", "random")
    assert (plan.channel_names, plan.labels) == (("T1", "T2"), ("background", "ball", "core"))
    item = prepared(tmp_path, plan.axis, plan.channel_names, plan.use_mask_for_norm, {})(split.validation[0])
    assert item["image"].shape == (2, 8, 24, 20)
    assert item["label"].shape == (1, 8, 24, 20)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "states no 'labels'"),
        ({"background": 0, "whole": [1, 2]}, "regions"),
        ({"background": 0, "tumour": 1, "ignore": 2}, "'ignore' label"),
        ({"background": 0, "tumour": 2}, "without a gap"),
    ],
)
def test_classes_that_are_not_trained(tmp_path: Path, labels: Any, message: str) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.raises(UserError, match=message):
        class_names(tmp_path)


def test_datasets_that_are_not_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no NIfTI"):
        labelled_dataset(write_phantoms(tmp_path / "Dataset001_Mha", ending=".mha"))
    with pytest.raises(UserError, match="does not exist"):
        labelled_dataset(tmp_path)
    flat = tmp_path / "flat"
    for i in range(2):
        flat.mkdir(exist_ok=True)
        for kind in ("image", "label"):
            nibabel.save(nibabel.Nifti1Image(np.eye(16, dtype=np.float32), np.eye(4)), flat / f"{kind}_{i}.nii.gz")
    entries = [{"image": f"image_{i}.nii.gz", "label": f"label_{i}.nii.gz"} for i in range(2)]
    (flat / "dataset.json").write_text(json.dumps({"training": entries, "labels": {"0": "b", "1": "f"}}))
    with pytest.raises(UserError, match="2 axes, and MONAI's bundle reads volumes"):
        components.plan_training(flat, "none", "test_resnet", "random", spacing=[1, 1, 1])


def test_images_to_segment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of images"):
        components.images_in(tmp_path / "nowhere", 1)
    with pytest.raises(UserError, match="no image in"):
        components.images_in(tmp_path, 1)
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b.nii"):
        (tmp_path / name).touch()
    found = components.images_in(tmp_path, 2)
    assert [Path(f).name for f in found[0]["image"]] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert Path(found[1]["image"]).name == "b.nii"
    with pytest.raises(UserError, match="do not have 3 channel files"):
        components.images_in(tmp_path, 3)


@pytest.mark.parametrize("shape", [(20, 24, 9), (20, 24, 1)])
def test_a_segmentation_has_the_geometry_of_its_image(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    voxels = rng.normal(100, 20, shape).astype(np.float32)
    voxels[:3] = 0
    image = nibabel.Nifti1Image(voxels, ODD_AFFINE)
    image.header.set_xyzt_units("mm")
    file = tmp_path / "odd_0000.nii.gz"
    nibabel.save(image, file)
    parser = ConfigParser()
    parser.read_config(str(bundles.SHIPPED / "configs" / "inference.yaml"))
    preprocessing = parser.get_parsed_content("preprocessing")
    item = preprocessing({"image": str(file)})
    zooms = nibabel.load(file).header.get_zooms()
    # the untrained plan asks for 1 mm in the plane
    assert item["image"].shape[2:] == pytest.approx([20 - 3, 24][::-1] * np.array(zooms[:2])[::-1], abs=1.5)
    item["pred"] = item["image"].clone()
    back = Invertd("pred", preprocessing, orig_keys="image", nearest_interp=False)(item)
    classes = (back["pred"] > 0.3).to(torch.uint8)
    components.SaveSegmentationd("pred", tmp_path / "out")({"pred": classes})
    saved = nibabel.load(tmp_path / "out" / "odd.nii.gz")
    assert saved.shape == shape
    assert np.array_equal(saved.affine, nibabel.load(file).affine)
    assert saved.header["qform_code"] == nibabel.load(file).header["qform_code"]
    assert np.array_equal(np.asarray(saved.dataobj), np.asarray(classes)[0])
    inside = voxels[3:]
    normalized = (inside - inside.mean()) / inside.std()
    # resampled twice, so smoother; in place
    correlation = np.corrcoef(np.asarray(back["pred"])[0, 3:].ravel(), normalized.ravel())[0, 1]
    assert correlation > 0.7
    with pytest.raises(UserError, match="its segmentation"):
        components.SaveSegmentationd("pred", tmp_path)({"pred": classes[:, 1:]})


def saved_model(folder: Path, network: torch.nn.Module) -> Path:
    model = folder / "model.pt"
    torch.save({"model": network.state_dict()}, model)
    record_file(model).write_text(to_json(record_of(model, UNTRAINED, 0.5, 3)))
    return model


def test_models_load_by_their_record(tmp_path: Path) -> None:
    network = components.MonaiUNet("test_resnet", 1, 2)
    model = saved_model(tmp_path, network)
    other = components.MonaiUNet("test_resnet", 1, 2)
    components.load_model(model, other)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert components.read_plan(model) == UNTRAINED
    assert read_record(model)["epoch"] == 3
    for wrong in (components.MonaiUNet("test_convnext", 1, 2), components.MonaiUNet("test_resnet", 1, 3)):
        with pytest.raises(UserError, match="is of another network than this config's"):
            components.load_model(model, wrong)
    record = record_file(model).read_text()
    record_file(model).write_text(record.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(UserError, match="schema version 9"):
        components.load_model(model, other)
    record_file(model).write_text(record[:100])
    with pytest.raises(UserError, match="is damaged"):
        components.load_model(model, other)
    record_file(model).write_text(record)
    with open(model, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="is not the file that"):
        components.load_model(model, other)
    record_file(model).unlink()
    with pytest.raises(UserError, match="which says what network"):
        components.load_model(model, other)
    with pytest.raises(UserError, match="no trained model"):
        components.load_model(tmp_path / "other.pt", other)


def test_code_in_weights_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    torch.save({"model": Path("code")}, model)
    record_file(model).write_text(to_json(record_of(model, UNTRAINED, None, None)))
    with pytest.raises(UserError, match="cannot be read as weights"):
        components.load_model(model, components.MonaiUNet("test_resnet", 1, 2))
    torch.save({"model": {"a": 1}}, model)
    record_file(model).write_text(to_json(record_of(model, UNTRAINED, None, None)))
    with pytest.raises(UserError, match="holds no weights"):
        components.load_model(model, components.MonaiUNet("test_resnet", 1, 2))


def test_a_config_watches_transferability(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "Dataset001_Phantom")
    generator = torch.Generator().manual_seed(0)
    data = [{"image": torch.rand(3, 32, 32, generator=generator), "label": torch.tensor(i % 4)} for i in range(16)]
    parser = ConfigParser(
        {
            "imports": ["$import timm"],
            "data": data,
            "network": "$timm.create_model('test_resnet', num_classes=4)",
            "handler": {
                "_target_": "mtl_nnunet.components.transferability_handler",
                "dataset_dir": str(tmp_path / "Dataset001_Phantom"),
                "output": str(tmp_path / "watch"),
                "network": "@network",
                "rule": {"name": "expected-gain", "price": 100.0},
                "num_slices": 12,
            },
            "trainer": {
                "_target_": "SupervisedTrainer",
                "device": "$torch.device('cpu')",
                "max_epochs": 50,
                "train_data_loader": {"_target_": "DataLoader", "dataset": "@data", "batch_size": 8},
                "network": "@network",
                "optimizer": {"_target_": "torch.optim.AdamW", "params": "$@network.parameters()"},
                "loss_function": {"_target_": "torch.nn.CrossEntropyLoss"},
                "train_handlers": ["@handler"],
            },
        }
    )
    trainer = parser.get_parsed_content("trainer")
    trainer.run()
    assert trainer.state.epoch == 1
    (line,) = (tmp_path / "watch" / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["scores"]


def test_the_users_error_is_found_behind_others() -> None:
    def wrapped() -> None:
        try:
            raise UserError("what is wrong")
        except UserError as error:
            raise RuntimeError("failed to instantiate") from error

    with pytest.raises(RuntimeError) as raised:
        wrapped()
    assert message_behind(raised.value) == "what is wrong"
    assert message_behind(RuntimeError("no more")) is None


def test_dataloader_makes_patches_of_slices(tmp_path: Path) -> None:
    """The shipped training pipeline gives 2D patches with their labels."""
    folder = write_phantoms(tmp_path / "Dataset001_Phantom", num_cases=5)
    parser = ConfigParser()
    parser.read_config(str(bundles.SHIPPED / "configs" / "train.yaml"))
    parser.update(
        {
            "dataset_dir": str(folder),
            "encoder#name": "test_resnet",
            "encoder#weights": "random",
            "bundle_root": str(tmp_path),
        }
    )
    loader = parser.get_parsed_content("train#dataloader")
    assert isinstance(loader, DataLoader)
    batch = next(iter(loader))
    assert batch["image"].shape == (16, 1, 64, 64)
    assert batch["label"].shape == (16, 1, 64, 64)
    assert set(batch["label"].unique().tolist()) <= {0.0, 1.0, 2.0}
    # core is brighter than ball, ball than ground
    means = [float(batch["image"].as_tensor()[batch["label"].as_tensor() == k].mean()) for k in range(3)]
    assert means == sorted(means)

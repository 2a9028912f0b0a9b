"""MONAI components: against nnU-Net's own reading, MONAI's own losses and engines, and properties of the geometry."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import timm
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
from mtl_nnunet.components.metadata import data_format
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
            "labels": ("background", "ball", "core"),
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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": 50}, r"case case_\d\d has other files here"),
        ({"channel_names": ("CT",)}, "its channels are MRI, not CT"),
        ({"num_cases": 3}, r"there is no case case_\d\d here"),
    ],
)
def test_a_folder_of_the_same_name_is_not_the_same_dataset(
    selection: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str
) -> None:
    other = write_phantoms(tmp_path / "Dataset001_Phantom", spacing=(3.0, 1.5, 1.5), **changes)
    plan = components.plan_training(other, selection)
    assert plan.spacing == (3.0, 1.5, 1.5)
    assert bool(plan.intensities) == ("channel_names" in changes)
    assert re.search(reason, caplog.text), caplog.text


def test_a_selection_has_not_seen_what_is_validated_on(
    tmp_path: Path, demo_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_phantoms(tmp_path / "Dataset001_Phantom", num_cases=8)
    # by patients, so that the split is not nnU-Net's
    rows = [f"case_{i:02d},patient_{i // 2}" for i in range(8)]
    (folder / "patients.csv").write_text("\n".join(["case,patient", *rows]))
    settings = {"scores": "ccfv", "num_slices": 8, "cache": False, "overwrite": True}
    output, checkpoint = tmp_path / "selection", demo_run / "checkpoint-39.pth.tar"
    chosen = components.select(folder, output, checkpoint, fold=1, **settings)
    held_out = {Path(e["label"]).name[:7] for e in components.split_cases(folder, 1).validation}
    assert chosen.fold == 1
    assert {case.name for case in chosen.slices.used} == {f"case_{i:02d}" for i in range(8)} - held_out
    assert components.plan_training(folder, output, fold=1).encoder == "test_resnet"
    with pytest.raises(UserError, match=r"looked at labels of 2 of the 2 cases that fold 0 .* with --fold 0"):
        components.plan_training(folder, output, fold=0)
    assert "too good" not in caplog.text
    components.select(folder, output, checkpoint, **settings)
    assert components.plan_training(folder, output, fold=0).encoder == "test_resnet"
    assert "a little too good" in caplog.text
    with pytest.raises(UserError, match="fold is 2, and the validation cases of fold 1 are left out already"):
        select_checkpoint(chosen.dataset, checkpoint, "ccfv", fold=2)


def test_a_dataset_that_was_renamed_is_the_same(
    selection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = write_phantoms(tmp_path / "Dataset007_Renamed")
    monkeypatch.setattr("mtl_nnunet.components.plan.gather_slices", None)
    assert components.plan_training(renamed, selection).spacing == (2.0, 1.0, 1.0)


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
        nibabel.save(nibabel.Nifti1Image(label.transpose(2, 1, 0), np.eye(4)), tmp_path / f"label_{i}.nii.gz")
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


def write_datalist(
    folder: Path, training: Iterable[int], validation: Iterable[int] = (), more: Iterable[dict[str, str]] = ()
) -> Path:
    """Six cases c0 to c5, in the lists that are given by number; a negative one has no label."""
    folder.mkdir(exist_ok=True)
    for i in range(6):
        image, label = phantom((4, 16, 16), seed=i)
        write_image(folder / f"c{i}.nii.gz", image[0])
        write_image(folder / f"l{i}.nii.gz", label)

    def entries(numbers: Iterable[int]) -> list[dict[str, str]]:
        return [{"image": f"c{abs(i)}.nii.gz", **({"label": f"l{i}.nii.gz"} if i >= 0 else {})} for i in numbers]

    labels = {"0": "background", "1": "ball", "2": "core"}
    content = {"modality": {"0": "MRI"}, "labels": labels, "training": entries(training), "validation": [*entries(validation), *more]}  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_a_validation_of_its_own_shares_nothing_with_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_datalist(tmp_path / "data", [0, 1, 2, 3], [3, 4])
    with pytest.raises(UserError, match=r"1 cases are in 'training' and in 'validation' \(c3\)"):
        components.split_cases(folder)
    (folder / "other.nii.gz").symlink_to(folder / "c0.nii.gz")
    write_datalist(folder, [0, 1, 2], more=[{"image": "other.nii.gz", "label": "l0.nii.gz"}])
    with pytest.raises(UserError, match="in 'training' and in 'validation'"):
        components.split_cases(folder)
    write_datalist(folder, [0, 1, 2], [4, -5])
    with pytest.raises(UserError, match=r"1 of 2 entries of 'validation' have no label .*c5"):
        components.split_cases(folder)
    write_datalist(folder, [0, 1, 2], more=[{"image": "c4.nii.gz", "label": "gone.nii.gz"}])
    with pytest.raises(UserError, match=r"do not exist \(.*gone"):
        components.split_cases(folder)
    write_datalist(folder, [0, 1, 2, 3], [-4, -5])
    assert len(components.split_cases(folder, 1).validation) == 1
    assert "no entry of 'validation' has a label" in caplog.text
    write_datalist(folder, [0, 1, 2, 3], [4, 5])
    split = components.split_cases(folder)
    assert split.record() == {
        "fold": None,
        "training": [f"c{i}.nii.gz" for i in range(4)],
        "validation": ["c4.nii.gz", "c5.nii.gz"],
    }
    for fold in (1, 99):
        with pytest.raises(UserError, match=f"there is no fold {fold}"):
            components.split_cases(folder, fold)
    (folder / "patients.csv").write_text("case,patient\n" + "".join(f"c{i},p{i // 2}\n" for i in range(6)))
    assert len(components.split_cases(folder).validation) == 2
    (folder / "patients.csv").write_text("case,patient\n" + "".join(f"c{i},p{i // 3}\n" for i in range(6)))
    with pytest.raises(UserError, match=r"1 patients have cases in 'training' and in 'validation' \(p1\)"):
        components.split_cases(folder)
    (folder / "patients.csv").write_text("case,patient\n" + "".join(f"c{i},p{i}\n" for i in range(5)))
    with pytest.raises(UserError, match=r"gives no patient for 1 cases \(c5\)"):
        components.split_cases(folder)


def test_a_model_is_measured_on_what_it_never_saw(tmp_path: Path) -> None:
    folder = write_datalist(tmp_path / "data", range(6), [])
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    split = components.split_cases(folder, 1)
    record_file(model).write_text(to_json(record_of(model, UNTRAINED, 0.5, 3, split)))
    assert components.cases_to_evaluate(folder, model).validation == split.validation
    moved = folder.rename(tmp_path / "moved")
    by_record = components.cases_to_evaluate(moved, model).validation
    assert [Path(e["image"]).name for e in by_record] == [Path(e["image"]).name for e in split.validation]
    with pytest.raises(UserError, match=r"was trained on \d of these \d cases"):
        components.cases_to_evaluate(moved, model, fold=0)
    assert components.cases_to_evaluate(moved, model, fold=1).validation == by_record
    # a table that came later says that a patient is on both sides
    (moved / "patients.csv").write_text("case,patient\n" + "".join(f"c{i},p\n" for i in range(6)))
    with pytest.raises(UserError, match="or on their patients"):
        components.cases_to_evaluate(moved, model)
    (moved / "patients.csv").unlink()
    gone = Path(split.validation[0]["image"]).name
    left = [i for i in range(6) if f"c{i}.nii.gz" != gone]
    write_datalist(moved, left, [])
    with pytest.raises(UserError, match=rf"lacks 1 of the \d validation cases of .* \({gone}\)"):
        components.cases_to_evaluate(moved, model)
    record_file(model).write_text(to_json(record_of(model, UNTRAINED, 0.5, 3)))
    with pytest.raises(UserError, match="does not state which cases"):
        components.cases_to_evaluate(moved, model)


def test_evaluate_takes_the_split_of_the_record(tmp_path: Path) -> None:
    """The shipped evaluate.yaml, of a model that was trained with --fold 1, where --fold is not typed again."""
    folder = write_datalist(tmp_path / "data", range(6), [])
    parser = ConfigParser()
    parser.read_config([str(bundles.SHIPPED / "configs" / f"{name}.yaml") for name in ("train", "evaluate")])
    parser.update({"dataset_dir": str(folder), "bundle_root": str(tmp_path)})
    (tmp_path / "models").mkdir()
    model = saved_model(tmp_path / "models", components.MonaiUNet(**UNTRAINED.network), components.split_cases(folder, 1))  # fmt: skip
    assert parser.get_parsed_content("cases").validation == components.split_cases(folder, 1).validation
    assert model.is_file()


def test_a_label_lies_on_its_image_and_holds_named_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = nibabel.Nifti1Image(rng.normal(100, 20, (20, 24, 6)).astype(np.float32), np.diag([1, 1, 2, 1]))
    nibabel.save(image, tmp_path / "image.nii.gz")
    ones = np.ones((20, 24, 6), np.uint8)
    rounded, mirrored, moved = np.diag([1.0, 1, 2, 1]), np.diag([-1.0, 1, 2, 1]), np.diag([1.0, 1, 2, 1])
    rounded[0, 0] += 1e-3
    moved[1, 3] = 3
    labels: dict[str, tuple[np.ndarray, np.ndarray, str | None]] = {
        "right": (2 * ones, image.affine, None),
        "rounded": (ones, rounded, None),
        "shape": (np.ones((40, 48, 6), np.uint8), np.diag([0.5, 0.5, 2, 1]), r"shape \(40, 48, 6\).*\(20, 24, 6\)"),
        "mirrored": (ones, mirrored, "lies elsewhere than its image .* up to 38 voxels"),
        "moved": (ones, moved, "up to 3 voxels"),
        "unnamed": (3 * ones, image.affine, "holds 3; expected whole numbers from 0 to 2"),
        "negative": (-ones.astype(np.int16), image.affine, "holds -1;"),
        "halves": (0.5 * ones.astype(np.float32), image.affine, r"holds 0\.5;"),
        "nan": (np.nan * ones.astype(np.float32), image.affine, "holds nan;"),
    }
    # the shipped pipelines check, and nothing before them stops
    transforms = {"train": prepared(tmp_path, 0, ("MRI",), False, {})}
    for name, (voxels, affine, message) in labels.items():
        file = tmp_path / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(voxels, affine), file)
        entry = {"image": str(tmp_path / "image.nii.gz"), "label": str(file)}
        if message is None:
            assert transforms["train"](entry)["label"].shape == (1, 6, 24, 20)
            continue
        with pytest.raises(RuntimeError) as raised:
            transforms["train"](entry)
        found = str(message_behind(raised.value))
        assert re.search(message, found), found
        assert f"{name}.nii.gz" in found


def test_configs_prepare_images_in_one_way() -> None:
    """train, evaluate and inference type the transforms of the image out; they must not drift apart."""

    def of_image(transforms: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for transform in transforms:
            keys = transform["keys"]
            if "image" not in ([keys] if isinstance(keys, str) else keys):
                continue
            settings = {k: v for k, v in transform.items() if k != "keys"}
            # modes are one for each key
            if isinstance(settings.get("mode"), list):
                settings["mode"] = settings["mode"][keys.index("image")]
            found.append(settings)
        return found

    def config(*names: str) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config([str(bundles.SHIPPED / "configs" / f"{name}.yaml") for name in names])
        return parser

    training = of_image(config("train")["train#deterministic_transforms"])
    assert len(training) == 7
    assert of_image(config("train", "evaluate")["validate#preprocessing#transforms"]) == training
    assert of_image(config("inference")["preprocessing#transforms"]) == training


def test_what_a_config_gets_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="axis is 3; expected 0, 1 or 2"):
        components.SliceAxisFirstd("image", axis=3)
    with pytest.raises(UserError, match=r"unknown mode 'cubic'\. Available: linear, bilinear"):
        components.SpacingAsNnunetd("image", [1, 1, 1], mode="cubic")
    with pytest.raises(UserError, match="a number for each of three axes"):
        components.SpacingAsNnunetd("image", [1, 1])
    before = volume((1, 6, 8, 10))
    same = [components.SpacingAsNnunet([-1, 0.7, 1.3], mode)(before) for mode in ("linear", "bilinear", "trilinear")]
    assert all(torch.equal(same[0].as_tensor(), other.as_tensor()) for other in same[1:])
    for name in ("CT", "ct"):
        with pytest.raises(UserError, match="channel 1 is CT, and its intensities lack mean, std"):
            components.NormalizeAsNnunetd("image", ["MRI", name])
    with pytest.raises(UserError, match="lack std, percentile"):
        components.NormalizeAsNnunetd("image", ["CT"], intensities={"0": {"mean": 1.0}})
    with pytest.raises(UserError, match=r"has 2 axes, and volumes of three are read\. Write 2D images"):
        components.SliceAxisFirstd("image")({"image": MetaTensor(torch.rand(1, 8, 8))})
    with pytest.raises(UserError, match="'pred' does not say which image file it is of"):
        components.SaveSegmentationd("pred", tmp_path)({"pred": torch.zeros(1, 3, 3, 3)})
    with pytest.raises(UserError, match=r"a rule has no field nme\. Available: name, price"):
        components.transferability_handler(tmp_path, tmp_path, torch.nn.Identity(), rule={"nme": "patience"})
    with pytest.raises(UserError, match="val_interval is 0"):
        components.ValidateEvery(None, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", None),
        ("patch_size", [64]),
        ("patch_size", [64, "64"]),
        ("channel_names", 5),
        ("labels", ["background", 1]),
        ("axis", 3),
        ("spacing", [1.0, 1.0, 0.0]),
        ("strides", [[1, 1], [2]]),
        ("kernel_sizes", [3, 3]),
        ("spatial_dims", "2"),
        ("intensities", []),
    ],
)
def test_a_record_with_fields_that_cannot_be_is_damaged(tmp_path: Path, field: str, value: Any) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    record = record_of(model, UNTRAINED, None, None)
    record["plan"][field] = value
    record_file(model).write_text(to_json(record))
    with pytest.raises(UserError, match=f"is damaged .*{field}"):
        components.read_plan(model)


def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    folder = write_datalist(tmp_path / "data", range(6), [])
    assert components.plan_training(folder, "none", "test_resnet", "random").spacing == (1.0, 1.0, 1.0)
    image = nibabel.load(folder / "c3.nii.gz")
    odd = nibabel.Nifti1Image(np.asarray(image.dataobj), np.eye(4))
    odd.header.set_zooms((2, 2, 5))
    nibabel.save(odd, folder / "c3.nii.gz")
    with pytest.raises(UserError, match=r"c3\.nii\.gz states voxels of 2 x 2 x 5 mm, and 1 x 1 x 1 mm by its affine"):
        components.plan_training(folder, "none", "test_resnet", "random", spacing=[1, 1, 1])


@pytest.mark.parametrize(("epochs", "interval", "expected"), [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 5, [2])])
def test_the_last_epoch_is_validated(epochs: int, interval: int, expected: list[int]) -> None:
    from ignite.engine import Engine

    seen: list[int] = []
    validator = Engine(lambda engine, batch: None)
    validator_run = validator.run
    trainer = Engine(lambda engine, batch: None)
    validator.run = lambda epoch: (seen.append(epoch), validator_run([0], 1))[1]  # type: ignore[assignment]
    components.ValidateEvery(validator, interval).attach(trainer)
    trainer.run([0], max_epochs=epochs)
    assert seen == expected


def test_a_trained_model_is_kept(tmp_path: Path) -> None:
    components.keep_trained(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"weights")
    components.keep_trained(tmp_path / "model.pt", overwrite=True)
    for names in (["train"], ["train", "multi_gpu_train"]):
        parser = ConfigParser()
        parser.read_config([str(bundles.SHIPPED / "configs" / f"{name}.yaml") for name in names])
        parser.update({"ckpt_dir": str(tmp_path), "rank": 0, "device": "$torch.device('cpu')"})
        check = next(i for i, line in enumerate(parser["initialize"]) if "keep_trained" in line)
        with pytest.raises(RuntimeError) as raised:
            parser.get_parsed_content(f"initialize#{check}")
        assert "exists already. Pass --overwrite True" in str(message_behind(raised.value))


def test_processes_without_a_case_are_refused() -> None:
    cases = components.Split([{"image": "a"}] * 4, [{"image": "b"}])
    components.enough_to_share(cases, 1)
    with pytest.raises(UserError, match="2 processes share 1 validation cases, and each needs one"):
        components.enough_to_share(cases, 2)


def test_ct_is_ct_in_any_case() -> None:
    """As nnU-Net takes it, which is what normalises."""
    for name in ("CT", "ct", "Ct"):
        plan = UNTRAINED.__class__(**{**UNTRAINED.__dict__, "channel_names": (name,)})
        assert data_format(plan)["inputs"]["image"]["format"] == "hounsfield"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "a": 1, "b": "two"}, "labels without a whole number .b: two"),
        ({"background": "x", "a": 1}, "labels without a whole number"),
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
    assert [case["case"] for case in found] == ["a", "b"]
    (tmp_path / "c_0000.nii.gz").touch()
    with pytest.raises(UserError, match=r"1 cases .* do not have 2 channel files \(c\)"):
        components.images_in(tmp_path, 2)
    (tmp_path / "c_0001.nii.gz").touch()
    for num_channels in (1, 3):
        with pytest.raises(UserError, match=f"do not have {num_channels} channel files"):
            components.images_in(tmp_path, num_channels)


@pytest.mark.parametrize(
    ("files", "num_channels", "cases"),
    [
        (["case_0001.nii.gz", "case_0002.nii.gz"], 1, {"case_0001": 1, "case_0002": 1}),
        (["case_0001.nii.gz", "case_0002.nii.gz"], 2, {"case_0001": 1, "case_0002": 1}),
        (["a_0000.nii.gz", "b_0000.nii.gz"], 1, {"a": 1, "b": 1}),
        # one file holds all channels, as nnU-Net numbers it
        (["a_0000.nii.gz", "b_0000.nii.gz"], 2, {"a": 1, "b": 1}),
        (["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii"], 2, {"a": 2, "b": 2}),
        (["hippo_001.nii.gz", "._hippo_001.nii.gz", ".hidden.nii"], 1, {"hippo_001": 1}),
    ],
)
def test_numbers_are_channels_only_where_every_case_has_them(
    tmp_path: Path, files: list[str], num_channels: int, cases: dict[str, int]
) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = components.images_in(tmp_path, num_channels)
    assert {c["case"]: 1 if isinstance(c["image"], str) else len(c["image"]) for c in found} == cases


def test_two_files_of_one_case_name_are_refused(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).touch()
    for num_channels in (1, 2):
        with pytest.raises(UserError, match="several images are of cases called a"):
            components.images_in(tmp_path, num_channels)


def test_segmentations_do_not_replace_images(tmp_path: Path) -> None:
    images, linked = tmp_path / "images", tmp_path / "linked"
    images.mkdir()
    linked.symlink_to(images, target_is_directory=True)
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((6, 5, 4), np.float32), np.eye(4)), images / "liver.nii.gz")  # fmt: skip
    before = (images / "liver.nii.gz").read_bytes()
    for output in (images, linked, tmp_path / "images" / ".." / "images"):
        with pytest.raises(UserError, match=r"would replace the images that they are of .* --output_dir FOLDER"):
            components.images_in(images, 1, output)
        item = LoadImaged("image", ensure_channel_first=True)({"image": str(images / "liver.nii.gz")})
        with pytest.raises(UserError, match="would replace"):
            components.SaveSegmentationd("image", output)(item)
    parser = ConfigParser()
    parser.read_config(str(bundles.SHIPPED / "configs" / "inference.yaml"))
    parser.update({"dataset_dir": str(images), "output_dir": str(images), "bundle_root": str(tmp_path)})
    with pytest.raises(RuntimeError) as raised:
        parser.get_parsed_content("dataset")
    assert "would replace" in str(message_behind(raised.value))
    assert (images / "liver.nii.gz").read_bytes() == before
    # an image that is numbered gives a segmentation of another name
    (images / "liver.nii.gz").rename(images / "liver_0000.nii.gz")
    assert components.images_in(images, 1, images)[0]["case"] == "liver"


def test_cases_with_numbered_names_are_written_one_by_one(tmp_path: Path) -> None:
    for i in (1, 2):
        nibabel.save(nibabel.Nifti1Image(np.full((3, 4, 5), i, np.float32), np.eye(4)), tmp_path / f"case_{i:04d}.nii.gz")  # fmt: skip
    load = LoadImaged("image", ensure_channel_first=True)
    for entry in components.images_in(tmp_path, 1):
        components.SaveSegmentationd("image", tmp_path / "out")(load(entry))
    for i in (1, 2):
        assert np.all(np.asarray(nibabel.load(tmp_path / "out" / f"case_{i:04d}.nii.gz").dataobj) == i)


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


def saved_model(folder: Path, network: torch.nn.Module, split: components.Split | None = None) -> Path:
    model = folder / "model.pt"
    torch.save({"model": network.state_dict()}, model)
    record_file(model).write_text(to_json(record_of(model, UNTRAINED, 0.5, 3, split)))
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


def test_transferability_keeps_patients_apart(tmp_path: Path) -> None:
    folder = write_phantoms(tmp_path / "Dataset001_Phantom")
    network = timm.create_model("test_resnet", num_classes=4)
    rows = [f"case_{i:02d},patient_{i // 2}" for i in range(6)]
    (folder / "patients.csv").write_text("\n".join(["case,patient", *rows]))
    handler = components.transferability_handler(folder, tmp_path / "watch", network, num_slices=12)
    assert handler.monitor.slices.num_patients == 3
    (tmp_path / "table.csv").write_text(
        "\n".join(["case,patient", *(row[:15] + str(i % 2) for i, row in enumerate(rows))])
    )
    other = components.transferability_handler(folder, tmp_path / "other", network, num_slices=12, patients=tmp_path / "table.csv")  # fmt: skip
    assert other.monitor.slices.num_patients == 2


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

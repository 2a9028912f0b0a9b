"""What a network of the bundle is and what it is fed: made before training, kept beside the weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.cases import Dataset, dataset_description
from mtl_nnunet.components.data import (
    Split,
    as_dictionary,
    class_names,
    labelled_dataset,
    own_validation,
    place,
    split_cases,
)
from mtl_nnunet.components.unet import network_shape
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import sha256
from mtl_nnunet.selection import SELECTION_FILE, Selection, read_selection
from mtl_nnunet.slices import gather_slices

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
WEIGHTS = ("selected", "random")
# of a side that was not asked for
LARGEST_PATCH = {2: 256, 3: 96}


@dataclass(frozen=True)
class Plan:
    """The network, and how an image is brought into the form it was pretrained and trained for.

    Axes are nnU-Net's: the slicing axis first, then the plane.

    Attributes:
        encoder: timm's name.
        spatial_dims: 2 or 3.
        channel_names: Of the images; they decide the normalisation, as in nnU-Net.
        labels: Names of the classes, background first.
        axis: Slicing axis of the volume as nnU-Net reads it, (z, y, x).
        spacing: Voxel size in mm; in 2D that along the slicing axis stays each image's own.
        use_mask_for_norm: Normalise inside the nonzero region only.
        intensities: nnU-Net's foreground intensity properties of each channel; empty unless a channel is CT.
        patch_size: What the network is trained on.
        strides: Of the network, level by level.
        kernel_sizes: Of the network, level by level.
        selection: Record of the selection it starts from; None for random weights.
        dataset: Name of the dataset.
    """

    encoder: str
    spatial_dims: int
    channel_names: tuple[str, ...]
    labels: tuple[str, ...]
    axis: int
    spacing: tuple[float, ...]
    use_mask_for_norm: bool
    intensities: dict[str, dict[str, float]]
    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    selection: dict[str, Any] | None = None
    dataset: str = ""

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return len(self.channel_names)

    @property
    def out_channels(self) -> int:
        """Classes, background included."""
        return len(self.labels)

    @property
    def roi_size(self) -> list[int]:
        """The patch as a part of a volume: in 2D one slice thick."""
        return [1, *self.patch_size] if self.spatial_dims == 2 else list(self.patch_size)

    @property
    def pixdim(self) -> list[float]:
        """Voxel size for ``SpacingAsNnunetd``, which leaves an axis of -1 alone."""
        return [-1.0, *self.spacing[1:]] if self.spatial_dims == 2 else list(self.spacing)

    @property
    def network(self) -> dict[str, Any]:
        """Arguments of ``MonaiUNet``."""
        return {
            "encoder": self.encoder,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "spatial_dims": self.spatial_dims,
            "strides": self.strides,
            "kernel_sizes": self.kernel_sizes,
        }


def plan_training(
    dataset_dir: str | Path,
    selection: str | Path,
    encoder: str | None = None,
    weights: str = "selected",
    spatial_dims: int = 2,
    patch_size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    patients: str | Path | None = None,
    num_cases: int = 64,
    fold: int | None = None,
) -> Plan:
    """Work out network, patch and preprocessing for a dataset.

    A selection that was made on this dataset says how its slices were prepared, and the same is done in training; else some
    cases are read to find out.

    Args:
        dataset_dir: As for ``labelled_dataset``.
        selection: Folder of the selection.
        encoder: timm's name; None takes the selection's.
        weights: ``selected``, or ``random`` to start from no checkpoint.
        spatial_dims: 2 or 3.
        patch_size: None for the median image, cut to 256 x 256 or 96 x 96 x 96; rounded up to what the network can take.
        spacing: (slicing axis, row, column) in mm; None for the medians.
        patients: As for ``labelled_dataset``.
        num_cases: Cases read at most, where no selection says what they are like.
        fold: Whose validation cases the network is going to be measured on, so that a selection that looked at their labels is
            refused; None does not ask.

    Raises:
        UserError: What is wrong with the dataset or the selection, or settings that do not go together.
    """
    if weights not in WEIGHTS:
        raise UserError(f"encoder#weights is '{weights}'; expected {' or '.join(WEIGHTS)}.")
    if spatial_dims not in LARGEST_PATCH:
        raise UserError(f"spatial_dims is {spatial_dims}; expected 2 or 3.")
    dataset = labelled_dataset(dataset_dir, patients)
    labels = class_names(dataset_dir)
    chosen = _selected(Path(selection), encoder, dataset) if weights == "selected" else None
    if chosen is not None and fold is not None:
        _refuse_seen_validation(chosen, split_cases(dataset_dir, fold, patients), dataset)
    name = encoder or (chosen.encoder if chosen else None)
    if name is None:
        raise UserError("random weights need the encoder's name. Pass --encoder#name NAME.")
    prepared = _prepared(dataset, chosen, num_cases)
    spacings, sizes = _headers(dataset, prepared["axis"])
    if spacing is None:
        spacing = [float(np.median(spacings[:, 0])), *prepared["spacing"]]
    elif len(spacing) != 3 or min(spacing) <= 0:
        raise UserError(f"spacing is {list(spacing)}; expected three numbers above 0: slicing axis, row, column.")
    if patch_size is None:
        median = np.median(sizes * spacings / np.array(spacing), axis=0)[3 - spatial_dims :]
        patch_size = [int(np.clip(np.ceil(side), 1, LARGEST_PATCH[spatial_dims])) for side in median]
    elif len(patch_size) != spatial_dims or min(patch_size) < 1:
        raise UserError(f"patch_size is {list(patch_size)}; expected {spatial_dims} whole numbers above 0.")
    fitted, strides, kernel_sizes = network_shape(name, patch_size, list(spacing)[3 - spatial_dims :])
    logger.info(
        f"patch {fitted}, spacing {[round(float(s), 4) for s in spacing]} mm, slicing axis {prepared['axis']} of (z, y, x)"
    )
    logger.info(f"encoder: {chosen.summary}" if chosen else f"encoder: {name} from random weights, as asked for")
    return Plan(
        encoder=name,
        spatial_dims=spatial_dims,
        channel_names=dataset.channel_names,
        labels=labels,
        axis=prepared["axis"],
        spacing=tuple(float(s) for s in spacing),
        use_mask_for_norm=prepared["use_mask_for_norm"],
        intensities=prepared["intensities"],
        patch_size=tuple(fitted),
        strides=_tuples(strides),
        kernel_sizes=_tuples(kernel_sizes),
        selection=chosen.record() if chosen else None,
        dataset=dataset.name,
    )


# the network of a bundle that nothing was trained in yet, as its metadata.json describes it
UNTRAINED = Plan(
    encoder="resnet18",
    spatial_dims=2,
    channel_names=("MRI",),
    labels=("background", "foreground"),
    axis=0,
    spacing=(1.0, 1.0, 1.0),
    use_mask_for_norm=False,
    intensities={},
    patch_size=(128, 128),
    strides=((1, 1), *((2, 2),) * 5),
    kernel_sizes=((3, 3),) * 6,
)


def record_file(model: str | Path) -> Path:
    """Where the record of a file of weights lies: beside it, with the ending ``.json``."""
    return Path(model).with_suffix(".json")


def read_record(model: str | Path) -> dict[str, Any]:
    """What was kept of a file of weights: its hash, its plan, its metric.

    Raises:
        UserError: No weights or no record there, or one of another version.
    """
    path = record_file(model)
    if not Path(model).is_file():
        raise UserError(f"no trained model {model}. Run configs/train.yaml first, or pass the path of its weights.")
    if not path.is_file():
        raise UserError(f"{path} is missing, which says what network {model} is of. Copy it along with the weights.")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema version {content['schema_version']}, this mtl-nnunet reads {SCHEMA_VERSION}."
            )
        if not isinstance(content["plan"], dict) or not isinstance(content["sha256"], str):
            raise KeyError("plan, sha256")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error!r}). Copy it again from where the model was trained.") from error
    return content


def read_plan(model: str | Path) -> Plan:
    """The plan of a trained model; of a bundle that holds none yet, that of ``metadata.json`` as it is shipped.

    Args:
        model: Its file of weights.

    Raises:
        UserError: A record that cannot be read.
    """
    if not Path(model).is_file():
        logger.warning(f"no trained model {model}: taking the network of an untrained bundle ({UNTRAINED.encoder}).")
        return UNTRAINED
    stored = read_record(model)["plan"]
    known = {f.name for f in fields(Plan)}
    try:
        plan = Plan(**{k: _tuples(v) if isinstance(v, list) else v for k, v in stored.items() if k in known})
        _check(plan)
        return plan
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{record_file(model)} is damaged ({error}). Copy it again from where the model was trained."
        ) from error


def record_of(
    model: str | Path, plan: Plan, metric: float | None, epoch: int | None, split: Split | None = None
) -> dict[str, Any]:
    """What is kept of a file of weights."""
    from mtl_nnunet import __version__

    return {
        "schema_version": SCHEMA_VERSION,
        "model": Path(model).name,
        "sha256": sha256(model),
        "val_mean_dice": metric,
        "epoch": epoch,
        "plan": asdict(plan),
        "split": None if split is None else split.record(),
        "created_with": __version__,
    }


def cases_to_evaluate(
    dataset_dir: str | Path, model: str | Path, fold: int | None = None, patients: str | Path | None = None
) -> Split:
    """The cases that a trained model was validated on, as its record states them, or those of a fold that it never saw.

    Args:
        dataset_dir: As for ``labelled_dataset``.
        model: Its file of weights.
        fold: Whose validation cases to take instead, such as those of another dataset.
        patients: As for ``labelled_dataset``.

    Raises:
        UserError: The record does not state them, the dataset lacks them, or the model was trained on some, or on their patients.
    """
    try:
        stated = read_record(model)["split"]
        training, validation = set(map(str, stated["training"])), list(map(str, stated["validation"]))
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{record_file(model)} does not state which cases {model} was trained on, so that nothing says which ones it never saw. "
            "Train again with configs/train.yaml."
        ) from error
    dataset = labelled_dataset(dataset_dir, patients)
    folder = dataset_description(dataset_dir).parent
    cases = [*dataset.cases, *own_validation(dataset, dataset_dir, patients)]
    entries = {place(as_dictionary(case), folder): as_dictionary(case) for case in cases}
    patient_of = {place(as_dictionary(case), folder): case.patient for case in cases}
    if fold is None:
        missing = [where for where in validation if where not in entries]
        if missing:
            raise UserError(
                f"{dataset_dir} lacks {len(missing)} of the {len(validation)} validation cases of {model} ({listed(missing, 2)}). Pass the "
                "dataset it was trained on, or --fold N to measure on cases of another."
            )
        measured = validation
    else:
        measured = [place(entry, folder) for entry in split_cases(dataset_dir, fold, patients).validation]
    seen = {patient_of[where] for where in training if where in patient_of}
    learnt = [where for where in measured if where in training or patient_of[where] in seen]
    if learnt:
        raise UserError(
            f"{model} was trained on {len(learnt)} of these {len(measured)} cases, or on their patients ({listed(learnt, 2)}). Leave --fold "
            "out to measure on its own validation cases."
        )
    return Split([entries[w] for w in sorted(training) if w in entries], [entries[w] for w in measured], fold, folder)


def _selected(folder: Path, encoder: str | None, dataset: Dataset) -> Selection:
    if not (folder / SELECTION_FILE).is_file():
        raise UserError(
            f"no selection in {folder}, so there is no encoder to start from. Run configs/select.yaml first, pass "
            "--encoder#selection FOLDER, or --encoder#weights random with --encoder#name NAME."
        )
    selection = read_selection(folder)
    if encoder is not None and encoder != selection.encoder:
        raise UserError(
            f"the selection in {folder} is of timm encoder '{selection.encoder}', not of '{encoder}'. Select again with that "
            "encoder's checkpoints, or pass --encoder#weights random."
        )
    if selection.input_channels != len(dataset.channel_names):
        raise UserError(
            f"the selection in {folder} was made on images of {selection.input_channels} channels ({selection.dataset}), and "
            f"{dataset.name} has {len(dataset.channel_names)} ({listed(list(dataset.channel_names))}). Select again on this dataset."
        )
    return selection


def _refuse_seen_validation(selection: Selection, split: Split, dataset: Dataset) -> None:
    """A checkpoint that was chosen by labels of the validation cases would be measured too well on them."""
    if selection.fold is None:
        return
    stated = json.loads((selection.folder / SELECTION_FILE).read_text(encoding="utf-8")).get("dataset", {})
    held_out = {str(entry["label"]) for entry in split.validation}
    measured = {case.name: case for case in dataset.cases if str(case.label) in held_out}
    seen = [
        used["name"]
        for used in stated.get("cases_used", ())
        if (case := measured.get(used["name"])) is not None and sha256(case.images[0]) == used["sha256"][0]
    ]
    if not seen:
        return
    what = (
        f"the selection in {selection.folder} looked at labels of {len(seen)} of the {len(measured)} cases that fold {split.fold} is "
        f"validated on ({listed(seen)})"
    )
    remedy = f"select for this fold: run configs/select.yaml with --fold {split.fold} --overwrite True."
    if isinstance(selection.fold, int):
        raise UserError(
            f"{what}: it was made for fold {selection.fold}, by its own split. To measure on what was not seen, {remedy}"
        )
    logger.warning(f"{what}, so that its Dice is a little too good. For one that is not, {remedy}")


def _prepared(dataset: Dataset, selection: Selection | None, num_cases: int) -> dict[str, Any]:
    """How slices of the dataset are prepared for the encoder: as they were for scoring."""
    if selection is not None:
        content = json.loads((selection.folder / SELECTION_FILE).read_text(encoding="utf-8"))
        difference = _difference(content.get("dataset"), dataset)
        if difference is None:
            stated = content["slices"]
            return {
                "axis": stated["axis"],
                "spacing": stated["spacing_mm"],
                "use_mask_for_norm": stated["use_mask_for_norm"],
                "intensities": stated["intensity_properties"],
            }
        logger.warning(
            f"the selection was made on {selection.dataset}, and this is {dataset.name}: {difference}. What its images are like is "
            "worked out again."
        )
    cases = min(num_cases, len(dataset.cases))
    slices = gather_slices(dataset, 2 * cases, cases)
    return {
        "axis": slices.axis,
        "spacing": list(slices.spacing),
        "use_mask_for_norm": slices.use_mask_for_norm,
        "intensities": slices.intensities,
    }


def _difference(stated: Any, dataset: Dataset) -> str | None:
    """What tells the dataset of a selection from another one; None where its cases are cases of that."""
    if not isinstance(stated, dict) or not {"channel_names", "cases_used"} <= set(stated):
        return "it does not state its cases"
    # folders of one name may hold anything
    if tuple(stated["channel_names"]) != dataset.channel_names:
        return f"its channels are {listed(list(stated['channel_names']))}, not {listed(list(dataset.channel_names))}"
    cases = {case.name: case for case in dataset.cases}
    missing = [used["name"] for used in stated["cases_used"] if used["name"] not in cases]
    if missing:
        return f"there is no case {missing[0]} here"
    for used in stated["cases_used"]:
        case = cases[used["name"]]
        # a score that takes no labels leaves their files out
        files = [*case.images, *filter(None, [case.label])][: len(used["sha256"])]
        if [sha256(file) for file in files] != list(used["sha256"]):
            return f"case {used['name']} has other files here"
    return None


def _headers(dataset: Dataset, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxel size and shape of each case, slicing axis first."""
    import nibabel

    order = plane_last(axis)
    rows = []
    for case in dataset.cases:
        try:
            image = nibabel.load(case.images[0])
            shape, zooms = image.header.get_data_shape()[:3], image.header.get_zooms()[:3]
            sides = np.linalg.norm(image.affine[:3, :3], axis=0)
        except Exception as error:
            raise UserError(f"{case.images[0]} cannot be read as NIfTI ({error}). Replace the file.") from error
        if len(shape) < 3:
            raise UserError(
                f"{case.images[0]} has {len(shape)} axes, and MONAI's bundle reads volumes. Write 2D images as volumes of one slice."
            )
        # slices are scored by the one, as nnU-Net reads it, and MONAI resamples by the other
        if not np.allclose(zooms, sides, rtol=0.01):
            raise UserError(
                f"{case.images[0]} states voxels of {_sizes(zooms)} mm, and {_sizes(sides)} mm by its affine. Repair the header."
            )
        rows.append(([float(zooms[i]) for i in order], [int(shape[i]) for i in order]))
    return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])


def plane_last(axis: int) -> tuple[int, int, int]:
    """Axes of a NIfTI volume (x, y, z) as nnU-Net orders them: its slicing axis of (z, y, x), then the others.

    Examples:
        >>> plane_last(0), plane_last(2)
        ((2, 1, 0), (0, 2, 1))
    """
    order = [2 - a for a in (axis, *(a for a in range(3) if a != axis))]
    return order[0], order[1], order[2]


def _check(plan: Plan) -> None:
    """Refuse fields that cannot be, as a file that was edited by hand may hold.

    Raises:
        ValueError: Which one.
    """

    def numbers(values: Any, kind: type | tuple[type, ...], length: int) -> bool:
        right_kind = isinstance(values, tuple) and all(isinstance(v, kind) for v in values)
        return right_kind and len(values) == length and min(values) > 0

    dims, real = plan.spatial_dims, (int, float)
    whole = isinstance(plan.strides, tuple) and isinstance(plan.kernel_sizes, tuple)
    right = {
        "encoder": isinstance(plan.encoder, str),
        "spatial_dims": dims in LARGEST_PATCH,
        "channel_names": _texts(plan.channel_names, 1),
        "labels": _texts(plan.labels, 2),
        "axis": plan.axis in (0, 1, 2),
        "spacing": numbers(plan.spacing, real, 3),
        "use_mask_for_norm": isinstance(plan.use_mask_for_norm, bool),
        "intensities": isinstance(plan.intensities, dict)
        and all(isinstance(v, dict) for v in plan.intensities.values()),
        "patch_size": numbers(plan.patch_size, int, dims),
        "strides": whole and all(numbers(s, int, dims) for s in plan.strides),
        "kernel_sizes": whole
        and len(plan.kernel_sizes) == len(plan.strides)
        and all(numbers(k, int, dims) for k in plan.kernel_sizes),
        "selection": plan.selection is None or isinstance(plan.selection, dict),
    }
    wrong = [name for name, is_right in right.items() if not is_right]
    if wrong:
        raise ValueError(f"'{wrong[0]}' is {getattr(plan, wrong[0])!r}")


def _texts(values: Any, at_least: int) -> bool:
    return isinstance(values, tuple) and len(values) >= at_least and all(isinstance(v, str) for v in values)


def _sizes(values: Any) -> str:
    return " x ".join(f"{float(v):.4g}" for v in values)


def _tuples(values: Any) -> Any:
    return tuple(_tuples(v) if isinstance(v, (list, tuple)) else v for v in values)

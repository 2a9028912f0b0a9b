"""Find and read the cases of a dataset: nnU-Net raw folder, Decathlon/MONAI datalist, plain folder."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import read_json, sha256

PLAIN_ENDINGS = (".nii.gz", ".nii", ".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
# nnU-Net's spacing for the missing axis of a 2D image
SLICE_SPACING_OF_2D = 999.0
# bytes of a NIfTI-2 header; one of NIfTI-1 is shorter
LONGEST_HEADER = 540
# deflate cannot do better than 1032 to 1
MOST_THAT_GZIP_SHRINKS = 1032
# of the cases, may be skipped when a user says so
SKIPPED_SHARE = 0.1
TRIED_FOR_READER = 20


@dataclass(frozen=True)
class Case:
    """One case of a dataset: its image files, one per channel or one with all, and its label if there is one."""

    name: str
    patient: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Cases with what is needed to read and normalise them.

    Attributes:
        name: nnU-Net's folder name (``Dataset004_Hippocampus``), or the name of the folder or datalist.
        cases: All cases, sorted by name.
        channel_names: As in nnU-Net's dataset.json; they decide the normalisation (``CT`` is special).
        reader: nnU-Net's name of the reader that nnU-Net would choose, or ``monai``.
        ignore_label: The label that says "not annotated", or None.
        skipped: Cases that were left out because a file is missing, with the reason, where the caller allowed it.
        without_fold: Whose validation cases were left out, or None.
    """

    name: str
    cases: tuple[Case, ...]
    channel_names: tuple[str, ...]
    reader: str
    ignore_label: int | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    without_fold: int | None = None

    @property
    def num_patients(self) -> int:
        """How many different patients the cases are of."""
        return len({case.patient for case in self.cases})


@dataclass(frozen=True)
class Image:
    """A case in memory.

    Attributes:
        voxels: Shape (C, Z, Y, X), float32; a 2D image has Z = 1.
        spacing: Voxel size along (Z, Y, X) in mm.
        label: Class of each voxel, shape (Z, Y, X), int16, or None without a label.
        hashes: SHA-256 of each image file, then of the label file if there is one.
    """

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    label: np.ndarray | None
    hashes: tuple[str, ...]


def find_nnunet_dataset(dataset: str | int, skip_bad_cases: bool = False) -> Dataset:
    """A dataset of nnU-Net's raw folder, before any planning.

    Args:
        dataset: Number or full name, as for nnU-Net's ``-d``.
        skip_bad_cases: Go on without cases whose label or a channel is missing, up to a tenth, and name them in
            ``Dataset.skipped``.

    Raises:
        UserError: ``nnUNet_raw`` is not set, no such dataset, a missing channel or label, or an unreadable first image.
    """
    return _nnunet_dataset(_raw_folder(dataset), skip_bad_cases)


def find_dataset_folder(folder: str | Path, skip_bad_cases: bool = False) -> Dataset:
    """A dataset by its folder: one of nnU-Net's raw format, or one with a Decathlon/MONAI datalist.

    Args:
        folder: Holds ``dataset.json``, or is such a file.
        skip_bad_cases: As for ``find_nnunet_dataset``.

    Raises:
        UserError: No such folder, no ``dataset.json`` in it, one of neither kind, or an unreadable first image.
    """
    description = dataset_description(folder)
    if not description.parent.is_dir():
        raise UserError(f"no such dataset folder: {description.parent}. Pass a folder with a dataset.json.")
    content = read_json(description, "the dataset.json of an nnU-Net raw dataset or of a Decathlon/MONAI datalist")
    if isinstance(content.get("training"), list):
        return find_image_folder(description, skip_bad_cases=skip_bad_cases)
    return _nnunet_dataset(description.parent.resolve(), skip_bad_cases)


def dataset_description(folder: str | Path) -> Path:
    """The ``dataset.json`` of a dataset that is named by its folder or by that file.

    Examples:
        >>> str(dataset_description("Task04")), str(dataset_description("Task04/mine.json"))
        ('Task04/dataset.json', 'Task04/mine.json')
    """
    path = Path(folder)
    return path if path.suffix == ".json" else path / "dataset.json"


def find_image_folder(
    path: str | Path, channel_names: Sequence[str] | None = None, skip_bad_cases: bool = False
) -> Dataset:
    """Cases of a plain folder of images, or of a Decathlon/MONAI datalist; read with MONAI.

    Files named ``CASE_0000.ext``, ``CASE_0001.ext`` are channels of one case, as in nnU-Net, where every case has the same numbers
    from 0000; otherwise every file is a case. Names that start with a dot are passed over. A folder with a Decathlon ``dataset.json``
    is read as that datalist.

    Args:
        path: Folder, or a datalist in JSON.
        channel_names: As in nnU-Net's dataset.json, e.g. ``CT``; None takes the datalist's, else none is special.
        skip_bad_cases: Go on without cases that lack a channel, up to a tenth, and name them in ``Dataset.skipped``.

    Raises:
        UserError: Nothing there, not a datalist, fewer than two cases, two files of one name but for the ending, or files of
            which only some are numbered like channels.
    """
    path = Path(path)
    datalist = path / "dataset.json" if path.is_dir() else path
    if datalist.suffix == ".json" and datalist.is_file():
        return _dataset_of_datalist(datalist, channel_names, skip_bad_cases)
    if not path.is_dir():
        raise UserError(
            f"no such folder or datalist: {path}. Pass a folder of images or a Decathlon dataset.json with -i."
        )
    # macOS keeps what other file systems cannot hold in files called ._NAME
    files = sorted(
        f for f in path.iterdir() if f.is_file() and f.name.lower().endswith(PLAIN_ENDINGS) and f.name[0] != "."
    )
    if not files:
        raise UserError(f"no image in {path}: expected files ending in {', '.join(PLAIN_ENDINGS)}.")
    cases = tuple(Case(name, name, images) for name, images in _grouped(files, path))
    return _monai_dataset(path.resolve().name, cases, channel_names, path, skip_bad_cases)


def _grouped(files: Sequence[Path], where: Path) -> list[tuple[str, tuple[Path, ...]]]:
    """Name and image files of each case of a plain folder."""
    by_stem: dict[str, Path] = {}
    numbered: dict[str, dict[int, Path]] = {}
    without_number: list[str] = []
    for file in files:
        stem = _stem(file.name, PLAIN_ENDINGS)
        if stem in by_stem:
            raise UserError(
                f"{by_stem[stem]} and {file.name} have one name but for the ending: an image twice, or an image and its mask? Leave one "
                "file an image in the folder, and no masks."
            )
        by_stem[stem] = file
        if re.search(r"._\d{4}$", stem):
            numbered.setdefault(stem[:-5], {})[int(stem[-4:])] = file
        else:
            without_number.append(file.name)
    every = list(range(max(map(len, numbered.values()), default=0)))
    odd = [name for name, found in numbered.items() if list(found) != every]
    like_channels = [n for n, found in numbered.items() if len(found) > 1 and list(found) == list(range(len(found)))]
    # slices that are numbered from 0 are seldom as many in most cases
    few_lack_some = 2 * len(odd) < len(numbered) and all(set(numbered[name]) < set(every) for name in odd)
    if few_lack_some and not without_number:
        if len(numbered) == 1 and len(every) > 1:
            raise UserError(
                f"the {len(every)} images in {where} are numbered from 0000 as channels of one case ({like_channels[0]}), and at least two "
                f"cases are needed. If each is a case, number them otherwise, such as {like_channels[0]}_image0000."
            )
        return sorted((name, tuple(found.values())) for name, found in numbered.items())
    if like_channels:
        name = like_channels[0]
        other = next((n for n, found in numbered.items() if list(found) != list(numbered[name])), None)
        if other is not None:
            has = f"{other} has {listed([f'{i:04d}' for i in numbered[other]], 3)}"
        else:
            has = f"{without_number[0]} has no number"
        raise UserError(
            f"in {where}, files are numbered like channels of a case ({name} has 0000 to {len(numbered[name]) - 1:04d}), but not all of them "
            f"alike ({has}). Channels: name them CASE_0000, CASE_0001, ..., the same for every case. Images of their own: number them "
            "otherwise, such as CASE_image0000."
        )
    return [(stem, (file,)) for stem, file in sorted(by_stem.items())]


def with_patients(dataset: Dataset, table: str | Path) -> Dataset:
    """The dataset with each case's patient taken from a CSV with columns ``case`` and ``patient``.

    Raises:
        UserError: The table cannot be read, or does not name every case.
    """
    table = Path(table)
    if not table.is_file():
        raise UserError(f"there is no table of patients {table}. Pass a CSV with the columns case,patient.")
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"case", "patient"} <= set(reader.fieldnames or ()):
                raise KeyError("case, patient")
            rows = [(row["case"].strip(), row["patient"].strip()) for row in reader]
    except (OSError, KeyError, AttributeError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table} is no table of patients: expected a CSV with the columns case,patient.") from error
    patients: dict[str, str] = {}
    for case, patient in rows:
        if patients.setdefault(case, patient) != patient:
            raise UserError(f"{table} gives case {case} two patients, {patients[case]} and {patient}. Keep one row.")
    unknown = [case.name for case in dataset.cases if not patients.get(case.name)]
    if unknown:
        raise UserError(f"{table} gives no patient for {len(unknown)} cases ({listed(unknown)}). Add a row for each.")
    return replace(dataset, cases=tuple(replace(c, patient=patients[c.name]) for c in dataset.cases))


def table_of_patients_left_unread(dataset: Dataset) -> Path | None:
    """The ``patients.csv`` of an nnU-Net dataset whose cases count as patients of their own though it says otherwise."""
    table = Path(os.environ.get("nnUNet_raw", ""), dataset.name, "patients.csv")
    if not table.is_file() or any(case.patient != case.name for case in dataset.cases):
        return None
    try:
        return None if with_patients(dataset, table) == dataset else table
    except UserError:
        return table


def without_validation_cases(dataset: Dataset, fold: int, preprocessed: str | Path | None) -> Dataset:
    """The training cases of one of nnU-Net's folds.

    Args:
        dataset: An nnU-Net dataset.
        fold: Which fold.
        preprocessed: The dataset's folder in nnUNet_preprocessed, where ``splits_final.json`` may lie; without that file
            the split is the one that nnU-Net is going to make.

    Raises:
        UserError: No such fold, or a split that names cases which the dataset does not have.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    # nnU-Net splits all cases that are there; one that is skipped here may be mended by then
    names = sorted([*(case.name for case in dataset.cases), *(name for name, _ in dataset.skipped)])
    file = Path(preprocessed) / "splits_final.json" if preprocessed is not None else None
    if file is not None and file.is_file():
        try:
            splits = json.loads(file.read_text(encoding="utf-8"))
            parts = [(set(split["train"]), set(split["val"])) for split in splits]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file} is no nnU-Net split ({error!r}). Repair it or remove it.") from error
        where = str(file)
    else:
        if len(names) < 5:
            raise UserError(f"{dataset.name} has {len(names)} cases, too few for nnU-Net's five folds. Pass -f all.")
        parts = [(set(s["train"]), set(s["val"])) for s in generate_crossval_split(names)]
        where = "nnU-Net's split"
    if not 0 <= fold < len(parts):
        raise UserError(f"{where} has no fold {fold}: it has folds 0 to {len(parts) - 1}.")
    training, validation = parts[fold]
    if unknown := sorted(training - set(names)):
        raise UserError(
            f"{where} names {len(unknown)} cases that {dataset.name} does not have ({listed(unknown)}). Correct one of the two."
        )
    kept = tuple(c for c in dataset.cases if c.name in training - validation)
    return replace(dataset, cases=kept, without_fold=fold)


def sampled_cases(dataset: Dataset, num_cases: int, seed: int) -> tuple[Case, ...]:
    """At most ``num_cases`` cases, spread over patients before any patient comes twice; sorted by name."""
    rng = np.random.default_rng(seed)
    cases = sorted(dataset.cases, key=lambda c: c.name)
    order = rng.permutation(len(cases))
    turn: dict[str, int] = {}
    ranked: list[tuple[int, int, Case]] = []
    for i in order:
        patient = cases[i].patient
        turn[patient] = turn.get(patient, 0) + 1
        ranked.append((turn[patient], len(ranked), cases[i]))
    chosen = [case for _, _, case in sorted(ranked, key=lambda r: r[:2])[:num_cases]]
    return tuple(sorted(chosen, key=lambda c: c.name))


def read_case(case: Case, reader: str, num_channels: int) -> Image:
    """Read a case and check that it is fit for use.

    Args:
        case: Which.
        reader: ``Dataset.reader``.
        num_channels: How many channels the dataset has.

    Raises:
        UserError: A file that cannot be read, NaN or infinite voxels, a constant image, channels or a label whose
            shapes differ.
    """
    read = _read_with_monai if reader == "monai" else _read_with_nnunet
    files = (*case.images, *filter(None, [case.label]))
    hashes = tuple(_hash_of_what_itk_can_read(case, file) for file in files) if reader == "SimpleITKIO" else ()
    voxels, spacing = read(case.images, reader)
    what = f"case {case.name} ({listed([str(p) for p in case.images])})"
    if len(voxels) != num_channels:
        raise UserError(
            f"{what} has {len(voxels)} channels, but the dataset names {num_channels}. Add the missing channel file, or "
            "correct the names of the channels (dataset.json, -channel_names)."
        )
    if not voxels.size:
        raise UserError(f"{what} holds no voxels: its shape is {voxels.shape[1:]}. Repair it, or leave the case out.")
    if not np.isfinite(voxels).all():
        raise UserError(f"{what} holds NaN or infinite voxels. Repair the image, or leave the case out.")
    for channel, values in enumerate(voxels):
        if values.min() == values.max():
            raise UserError(
                f"{what}: channel {channel} is constant ({values.flat[0]:g} everywhere), so it holds no image. "
                "Repair it, or leave the case out."
            )
    if any(s <= 0 or not np.isfinite(s) for s in spacing):
        raise UserError(f"{what} states a voxel size of {spacing} mm. Repair the header.")
    label = None
    if case.label is not None:
        # the colour indices of a label are its classes
        read_label, _ = (
            read((case.label,), reader) if reader != "monai" else _read_with_monai((case.label,), reader, False)
        )
        if read_label.shape[1:] != voxels.shape[1:]:
            raise UserError(
                f"case {case.name}: image {tuple(voxels.shape[1:])} and label {tuple(read_label.shape[1:])} differ in shape "
                f"(z, y, x; {case.label}). Resample the label onto the image, or leave the case out."
            )
        if not (np.abs(read_label[0]) <= np.iinfo(np.int16).max).all():
            raise UserError(
                f"case {case.name}: {case.label} holds labels that are no numbers up to {np.iinfo(np.int16).max}. Repair it."
            )
        label = read_label[0].astype(np.int16)
    return Image(voxels, spacing, label, hashes or tuple(map(sha256, files)))


def orientation(case: Case, reader: str) -> str | None:
    """Where the axes x, y and z of a case's voxels point to in the patient, by its header.

    ``LPS``: x runs to the left, y to the back (posterior), z up (superior); of oblique axes the nearest. Nothing is turned when
    scoring, but for nnU-Net's readers that turn every image to ``RAS``.

    Args:
        case: One that was read before.
        reader: ``Dataset.reader``.

    Returns:
        None where the file does not state it.
    """
    import nibabel
    import SimpleITK
    from nibabel.filebasedimages import ImageFileError

    if reader.endswith("WithReorient"):
        return "RAS"
    file = case.images[0]
    try:
        if file.name.lower().endswith((".nii", ".nii.gz")):
            image = nibabel.load(file)
            if not (image.header["sform_code"] > 0 or image.header["qform_code"] > 0):
                return None
            letters = nibabel.aff2axcodes(image.affine)
            return None if None in letters else "".join(letters)
        header = SimpleITK.ImageFileReader()
        header.SetFileName(str(file))
        header.ReadImageInformation()
        # nnU-Net's readers of photographs know of no orientation
        if header.GetDimension() != 3 or reader in ("NaturalImage2DIO", "Tiff3DIO", "monai"):
            return None
        return str(SimpleITK.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(header.GetDirection()))
    except (OSError, RuntimeError, ValueError, KeyError, ImageFileError):
        return None


def _hash_of_what_itk_can_read(case: Case, file: Path) -> str:
    """ITK reads a NIfTI file whose end is missing without an error, NaN as 0, and a voxel size of 0 as 1 mm."""
    if not file.name.endswith((".nii", ".nii.gz")):
        # what is not there the reader will say
        return sha256(file) if file.is_file() else ""
    import nibabel.imageglobals

    try:
        content = file.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        raw = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        header = _nifti_header(raw)
        kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
        with nibabel.imageglobals.LoggingOutputSuppressor():
            stored = np.asanyarray(kind.from_bytes(raw).dataobj.get_unscaled())
        sizes = [float(p) for n, p in zip(header["dim"][1:4], header["pixdim"][1:4], strict=True) if n > 1]
    except Exception as error:
        raise UserError(_unreadable(file)) from error
    if not all(np.isfinite(s) and s != 0 for s in sizes):
        raise UserError(f"case {case.name} ({file}) states a voxel size of {sizes} mm. Repair the header.")
    _refuse_endless_orientation(header, file)
    if np.issubdtype(stored.dtype, np.inexact) and not np.isfinite(stored).all():
        raise UserError(f"case {case.name} ({file}) holds NaN or infinite voxels. Repair it, or leave the case out.")
    return name


def _refuse_endless_orientation(header: Any, file: Path) -> None:
    """ITK computes for ever on some orientations that hold an infinite number, and cannot be interrupted."""
    stated = [
        *(("srow_x", "srow_y", "srow_z") if header["sform_code"] > 0 else ()),
        *(
            ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
            if header["qform_code"] > 0
            else ()
        ),
    ]
    if not all(np.isfinite(header[name]).all() for name in stated):
        raise UserError(f"{file} states an orientation that holds NaN or infinity. Repair the header.")


def _raw_folder(dataset: str | int) -> Path:
    raw = os.environ.get("nnUNet_raw")
    if not raw:
        raise UserError(
            "the environment variable nnUNet_raw is not set. Set nnUNet_raw, nnUNet_preprocessed and nnUNet_results as "
            "nnU-Net's documentation says, or pass a folder of images with -i."
        )
    if not Path(raw).is_dir():
        raise UserError(f"nnUNet_raw names {raw}, which is no folder. Correct the environment variable.")
    text = str(dataset)
    if re.match(r"Dataset\d{3}_", text):
        found = [Path(raw, text)] if Path(raw, text).is_dir() else []
    elif text.isdecimal():
        found = _of_number(Path(raw), int(text))
    else:
        raise UserError(f"-d {text} is neither a dataset number nor a name like Dataset004_Hippocampus.")
    if not found:
        there = sorted(p.name for p in Path(raw).glob("Dataset*") if p.is_dir())
        have = f"there are {listed(there)}" if there else "there is no dataset at all"
        raise UserError(f"no dataset {text} in nnUNet_raw ({raw}): {have}. Check -d.")
    number = found[0].name[7:10]
    same = _of_number(Path(raw), int(number)) if number.isdecimal() else found
    if len(same) > 1:
        # nnU-Net's own commands would stop at it later
        raise UserError(
            f"several datasets have the number {int(number)}: {listed([p.name for p in same])}. Rename all but one."
        )
    return found[0]


def _of_number(raw: Path, number: int) -> list[Path]:
    return sorted(p for p in raw.glob(f"Dataset{number:03d}_*") if p.is_dir())


def _nnunet_dataset(folder: Path, skip_bad_cases: bool) -> Dataset:
    description = read_json(folder / "dataset.json", "nnU-Net's description of the dataset")
    channels = description.get("channel_names", description.get("modality"))
    ending = description.get("file_ending")
    if not isinstance(channels, dict) or not channels or not isinstance(ending, str):
        raise UserError(
            f"{folder / 'dataset.json'} is no nnU-Net v2 dataset.json: it needs 'channel_names', 'labels' and "
            "'file_ending'. Convert the dataset with nnUNetv2_convert_MSD_dataset or write the file by hand."
        )
    cases = _listed_cases(folder, description) if "dataset" in description else _cases_in_folder(folder, ending)
    reasons = {**_missing_channels(cases, folder / "imagesTr"), **_missing_files(cases)}
    cases, skipped = _without_bad_cases(cases, reasons, folder, skip_bad_cases)
    names = _in_order(channels, folder / "dataset.json")
    labels = description.get("labels")
    ignored = labels.get("ignore") if isinstance(labels, dict) else None
    return Dataset(
        folder.name,
        cases,
        names,
        _nnunet_reader(description, [c.images[0] for c in (cases[:TRIED_FOR_READER] if skip_bad_cases else cases[:1])]),
        ignore_label=ignored if isinstance(ignored, int) else None,
        skipped=skipped,
    )


def _cases_in_folder(folder: Path, ending: str) -> tuple[Case, ...]:
    images = folder / "imagesTr"
    if not images.is_dir():
        raise UserError(f"{images} does not exist. nnU-Net expects training images there.")
    grouped: dict[str, list[Path]] = {}
    for file in sorted(images.iterdir()):
        if file.name.endswith(ending) and re.search(r"_\d{4}$", file.name[: -len(ending)]):
            grouped.setdefault(file.name[: -len(ending) - 5], []).append(file)
    if not grouped:
        raise UserError(f"no image in {images}: expected files named CASE_0000{ending}.")
    return tuple(
        Case(name, name, tuple(files), folder / "labelsTr" / f"{name}{ending}")
        for name, files in sorted(grouped.items())
    )


def _listed_cases(folder: Path, description: dict[str, Any]) -> tuple[Case, ...]:
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    try:
        entries = get_filenames_of_train_images_and_targets(str(folder), description)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'dataset.json'}: 'dataset' cannot be understood ({error!r}). Expected a dictionary of "
            "case names to 'images' (a list of files) and 'label' (a file)."
        ) from error
    if not entries:
        raise UserError(f"{folder / 'dataset.json'}: 'dataset' lists no case. Add some, or leave the key out.")
    return tuple(
        Case(name, name, tuple(map(Path, entry["images"])), Path(entry["label"]))
        for name, entry in sorted(entries.items())
    )


def _nnunet_reader(description: dict[str, Any], examples: Sequence[Path]) -> str:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    endless: UserError | None = None
    for example in examples:
        try:
            refuse_endless_file(example)
        except UserError as error:
            endless = error
            continue
        # nnU-Net prints a traceback for each reader that fails
        noise = io.StringIO()
        with (
            contextlib.suppress(RuntimeError),
            contextlib.redirect_stdout(noise),
            contextlib.redirect_stderr(noise),
        ):
            return str(determine_reader_writer_from_dataset_json(description, str(example), verbose=False).__name__)
    raise endless or UserError(_unreadable(examples[0]))


def _nifti_header(start: bytes) -> Any:
    """The header that a NIfTI file starts with, unchecked and without the extensions that may follow it."""
    import nibabel

    kind = nibabel.Nifti2Header if start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nibabel.Nifti1Header
    return kind(start[: kind.template_dtype.itemsize], check=False)


def refuse_endless_file(file: Path) -> None:
    """Refuse a file, before it is read, that ITK would compute on for ever; what else is wrong with it the reader will say.

    Raises:
        UserError: A NIfTI header whose orientation holds NaN or infinity.
    """
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    if not file.name.endswith((".nii", ".nii.gz")):
        return
    try:
        with gzip.open(file) if file.name.endswith(".gz") else open(file, "rb") as stream:
            header = _nifti_header(stream.read(LONGEST_HEADER))
    except (OSError, EOFError, ValueError, zlib.error, HeaderDataError, WrapStructError):
        return
    _refuse_endless_orientation(header, file)


def read_with_nnunet(files: Sequence[Path], reader: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The channels of a case as nnU-Net's reader of that name reads them.

    Returns:
        Voxels (C, Z, Y, X), float32, and nnU-Net's properties: ``spacing`` along (Z, Y, X), and what its writer needs to
        put a segmentation into the same geometry.

    Raises:
        UserError: A file that cannot be read, or channels that do not lie on one grid.
    """
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    try:
        voxels, properties = recursive_find_reader_writer_by_name(reader)().read_images([str(f) for f in files])
    except Exception as error:
        # nnU-Net says only on stdout that the channels do not fit together
        if len(files) > 1 and isinstance(error, RuntimeError) and not str(error):
            raise UserError(
                f"the channels {listed([str(f) for f in files])} differ in shape or spacing. Resample them onto one grid."
            ) from error
        raise UserError(_unreadable(*files)) from error
    return voxels.astype(np.float32, copy=False), properties


def _read_with_nnunet(files: Sequence[Path], reader: str) -> tuple[np.ndarray, tuple[float, float, float]]:
    voxels, properties = read_with_nnunet(files, reader)
    z, y, x = (float(s) for s in properties["spacing"])
    return voxels, (z, y, x)


def _read_with_monai(
    files: Sequence[Path], reader: str, as_colours: bool = True
) -> tuple[np.ndarray, tuple[float, float, float]]:
    from monai.data import PILReader
    from monai.transforms import LoadImage

    channels, spacings = [], []
    for file in files:
        natural = not file.name.lower().endswith((".nii", ".nii.gz"))
        if natural:
            _refuse_pages(file)
        else:
            _refuse_more_than_the_file_holds(file)
        try:
            load = LoadImage(
                reader=PILReader(converter=_without_palette if as_colours else None) if natural else "NibabelReader",
                image_only=True,
                ensure_channel_first=True,
            )
            image = load(str(file))
        except Exception as error:
            raise UserError(_unreadable(file)) from error
        voxels = np.asarray(image, dtype=np.float32)
        spacing = [1.0] * (voxels.ndim - 1) if natural else [float(s) for s in image.pixdim[: voxels.ndim - 1]]
        if voxels.ndim == 3:
            voxels, spacing = voxels[..., None], [*spacing, SLICE_SPACING_OF_2D]
        elif voxels.ndim != 4:
            raise UserError(f"{file} has {voxels.ndim - 1} spatial axes, expected 2 or 3.")
        channels.append(voxels.transpose(0, 3, 2, 1))
        spacings.append((spacing[2], spacing[1], spacing[0]))
    if len({c.shape[1:] for c in channels}) > 1:
        raise UserError(f"the channels {listed([str(f) for f in files])} differ in shape. Resample them onto one grid.")
    return np.concatenate(channels), spacings[0]


def _without_palette(image: Any) -> Any:
    """Neighbours in a palette need not look alike."""
    return image.convert("RGB") if image.mode == "P" else image


def _refuse_more_than_the_file_holds(file: Path) -> None:
    """A header that states more voxels than there can be makes the reader ask for that much memory."""
    import nibabel.imageglobals

    try:
        with nibabel.imageglobals.LoggingOutputSuppressor():
            data = nibabel.load(file).dataobj
        stated = abs(math.prod(data.shape)) * data.dtype.itemsize
        holds = file.stat().st_size * (MOST_THAT_GZIP_SHRINKS if file.name.lower().endswith(".gz") else 1)
    except Exception as error:
        raise UserError(_unreadable(file)) from error
    if stated > holds:
        raise UserError(_unreadable(file))


def _refuse_pages(file: Path) -> None:
    """MONAI reads the first page of a multi-page file and says nothing of the others."""
    from PIL import Image as PILImage

    try:
        with PILImage.open(file) as opened:
            pages = getattr(opened, "n_frames", 1)
    except Exception as error:
        raise UserError(_unreadable(file)) from error
    if pages > 1:
        raise UserError(
            f"{file} has {pages} pages, and a plain folder is read for its first one. Convert volumes to NIfTI, or make "
            "an nnU-Net raw dataset of them and use -d."
        )


def _dataset_of_datalist(datalist: Path, channel_names: Sequence[str] | None, skip_bad_cases: bool) -> Dataset:
    content = read_json(datalist, "a Decathlon/MONAI datalist")
    training = content.get("training")
    if not isinstance(training, list) or not all(_is_entry(e) for e in training):
        raise UserError(
            f"{datalist} is no Decathlon/MONAI datalist: expected a list 'training' of entries with 'image' (and 'label'). "
            "For nnU-Net's raw datasets use -d."
        )
    from monai.data import load_decathlon_datalist

    cases = []
    for entry in load_decathlon_datalist(str(datalist), is_segmentation=True, base_dir=str(datalist.parent)):
        images = [entry["image"]] if isinstance(entry["image"], str) else entry["image"]
        label = entry.get("label")
        for file in (*images, *([label] if label else [])):
            if not file.lower().endswith(PLAIN_ENDINGS):
                raise UserError(
                    f"{datalist} names {file}, and a datalist is read where its files end in {', '.join(PLAIN_ENDINGS)}. Convert them to "
                    "NIfTI, or make an nnU-Net raw dataset of them and use -d."
                )
            if not Path(file).is_file():
                raise UserError(f"{datalist} names {file}, which does not exist. Correct the datalist.")
        name = _stem(Path(images[0]).name, PLAIN_ENDINGS)
        cases.append(Case(name, name, tuple(map(Path, images)), Path(label) if label else None))
    modality = content.get("channel_names", content.get("modality"))
    if channel_names is None and isinstance(modality, dict):
        channel_names = _in_order(modality, datalist)
    name = datalist.resolve().parent.name if datalist.name == "dataset.json" else datalist.stem
    return _monai_dataset(name, tuple(sorted(cases, key=lambda c: c.name)), channel_names, datalist, skip_bad_cases)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    images = entry.get("image")
    files = [images] if isinstance(images, str) else images
    return isinstance(files, list) and bool(files) and all(isinstance(f, str) for f in files)


def _in_order(channels: dict[str, Any], where: Path) -> tuple[str, ...]:
    if not all(str(k).isdecimal() for k in channels):
        raise UserError(
            f"{where}: the keys of channel_names (or modality) must be 0, 1, ..., and they are {listed(sorted(channels))}."
        )
    return tuple(str(channels[k]) for k in sorted(channels, key=int))


def _monai_dataset(
    name: str, cases: tuple[Case, ...], channel_names: Sequence[str] | None, where: Path, skip_bad_cases: bool
) -> Dataset:
    _require_two(cases, where)
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UserError(f"{where}: two cases are called {twice}. Give the files different names.")
    cases, skipped = _without_bad_cases(cases, _missing_channels(cases, where), where, skip_bad_cases)
    num_channels = _num_channels(cases[:TRIED_FOR_READER] if skip_bad_cases else cases[:1])
    if channel_names is None:
        channel_names = [f"channel {i}" for i in range(num_channels)]
    if len(channel_names) != num_channels:
        raise UserError(
            f"{where}: images have {num_channels} channels, but {len(channel_names)} are named ({listed(list(channel_names))}). "
            "Name each channel."
        )
    return Dataset(name, cases, tuple(channel_names), "monai", skipped=skipped)


def _num_channels(cases: Sequence[Case]) -> int:
    first: UserError | None = None
    for case in cases:
        try:
            return len(_read_with_monai(case.images, "monai")[0])
        except UserError as error:
            first = first or error
    assert first is not None
    raise first


def _without_bad_cases(
    cases: tuple[Case, ...], reasons: dict[str, str], where: Path, skip_bad_cases: bool
) -> tuple[tuple[Case, ...], tuple[tuple[str, str], ...]]:
    skipped = tuple(sorted(reasons.items()))
    if skipped and not skip_bad_cases:
        raise UserError(skipped[0][1])
    if len(skipped) > SKIPPED_SHARE * len(cases):
        raise UserError(
            f"{len(skipped)} of {len(cases)} cases in {where} cannot be used, more than {SKIPPED_SHARE:.0%}. "
            f"The first: {skipped[0][1]}"
        )
    cases = tuple(case for case in cases if case.name not in reasons)
    _require_two(cases, where)
    return cases, skipped


def _missing_channels(cases: Sequence[Case], where: Path) -> dict[str, str]:
    # one file may hold all channels (RGB, 4D), so files are compared between cases and channels are counted on reading
    expected = max(len(case.images) for case in cases)
    return {
        case.name: f"case {case.name} in {where} has {len(case.images)} of {expected} channel files "
        f"({listed([i.name for i in case.images])}). Add the missing file, or leave the case out."
        for case in cases
        if len(case.images) != expected
    }


def _missing_files(cases: Sequence[Case]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for case in cases:
        for file in (*case.images, *filter(None, [case.label])):
            if not file.is_file():
                reasons.setdefault(
                    case.name, f"case {case.name}: {file} does not exist. Add the file, or leave the case out."
                )
    return reasons


def _require_two(cases: tuple[Case, ...], where: Path) -> None:
    if len(cases) < 2:
        raise UserError(
            f"{where} holds {len(cases)} case. At least two are needed to compare slices of different patients."
        )


def _stem(name: str, endings: Sequence[str]) -> str:
    ending = next((e for e in sorted(endings, key=len, reverse=True) if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


def _unreadable(*files: Path) -> str:
    broken = next((f for f in files if not f.is_file() or f.stat().st_size == 0), files[0])
    state = (
        "does not exist"
        if not broken.is_file()
        else "is empty"
        if broken.stat().st_size == 0
        else "cannot be read as an image"
    )
    named = str(broken) if len(files) == 1 or "cannot" not in state else f"one of {listed([str(f) for f in files])}"
    return f"{named} {state}: truncated, damaged or of another format. Replace the file, or leave its case out."

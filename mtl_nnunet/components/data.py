"""A dataset folder as lists of dictionaries, as MONAI's datasets take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_nnunet.cases import Case, Dataset, find_dataset_folder, with_patients
from mtl_nnunet.errors import UserError, listed

NIFTI = (".nii.gz", ".nii")
FOLDS = 5
PATIENTS_FILE = "patients.csv"


@dataclass(frozen=True)
class Split:
    """The cases of a dataset in two parts, each case a dictionary with ``image`` and ``label``.

    Attributes:
        training: To learn from.
        validation: To measure on; no patient is in both.
    """

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]


def labelled_dataset(dataset_dir: str | Path, patients: str | Path | None = None) -> Dataset:
    """A dataset of NIfTI images that all have labels: nnU-Net's raw format, or a Decathlon/MONAI datalist.

    Args:
        dataset_dir: Folder with a ``dataset.json``, or such a file.
        patients: Table ``case,patient``; None takes ``patients.csv`` of the folder, and without one a case is a patient.

    Raises:
        UserError: No such folder, no dataset in it, files that are no NIfTI, or cases without a label.
    """
    dataset = find_dataset_folder(dataset_dir)
    files = [file for case in dataset.cases for file in (*case.images, *filter(None, [case.label]))]
    foreign = [file.name for file in files if not file.name.endswith(NIFTI)]
    if foreign:
        raise UserError(
            f"{len(foreign)} files of {dataset_dir} are no NIfTI ({listed(foreign)}), and MONAI's bundle reads NIfTI only. "
            "Convert them, or train with nnU-Net."
        )
    unlabelled = [case.name for case in dataset.cases if case.label is None]
    if unlabelled:
        raise UserError(
            f"{len(unlabelled)} cases of {dataset_dir} have no label ({listed(unlabelled)}). Add the labels."
        )
    folder = Path(dataset_dir) if Path(dataset_dir).is_dir() else Path(dataset_dir).parent
    table = patients or (folder / PATIENTS_FILE if (folder / PATIENTS_FILE).is_file() else None)
    return dataset if table is None else with_patients(dataset, table)


def split_cases(dataset_dir: str | Path, fold: int = 0, patients: str | Path | None = None) -> Split:
    """Training and validation cases: those of a datalist's own ``validation``, else nnU-Net's folds over patients.

    Where every case is a patient of its own, the folds are those that nnU-Net makes of the same cases.

    Args:
        dataset_dir: As for ``labelled_dataset``.
        fold: Whose validation cases to keep out; 0 to 4, or fewer where there are fewer than five patients.
        patients: As for ``labelled_dataset``.

    Raises:
        UserError: As for ``labelled_dataset``, or no such fold.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    dataset = labelled_dataset(dataset_dir, patients)
    own = _own_validation(Path(dataset_dir))
    if own:
        return Split([as_dictionary(case) for case in dataset.cases], own)
    names = sorted({case.patient for case in dataset.cases})
    folds = min(FOLDS, len(names))
    if folds < 2:
        raise UserError(f"{dataset_dir} holds one patient ({names[0]}); training and validation need two.")
    if not isinstance(fold, int) or not 0 <= fold < folds:
        raise UserError(f"no fold {fold}: {dataset_dir} has {len(names)} patients and folds 0 to {folds - 1}.")
    held_out = set(generate_crossval_split(names, n_splits=folds)[fold]["val"])
    return Split(
        [as_dictionary(case) for case in dataset.cases if case.patient not in held_out],
        [as_dictionary(case) for case in dataset.cases if case.patient in held_out],
    )


def images_in(folder: str | Path, num_channels: int) -> list[dict[str, Any]]:
    """The cases of a folder of NIfTI images to segment, each a dictionary with ``image``.

    Files named ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz`` are channels of one case. ``imagesTs`` inside the folder is taken if it
    is there.

    Args:
        folder: Where they lie.
        num_channels: How many files a case has, unless one file holds all.

    Raises:
        UserError: No such folder, no image in it, or cases with another number of channels.
    """
    path = Path(folder)
    path = path / "imagesTs" if (path / "imagesTs").is_dir() else path
    if not path.is_dir():
        raise UserError(f"no such folder of images: {path}. Pass --dataset_dir FOLDER.")
    files = sorted(f for f in path.iterdir() if f.is_file() and f.name.endswith(NIFTI))
    if not files:
        raise UserError(f"no image in {path}: expected files ending in {' or '.join(NIFTI)}.")
    grouped: dict[str, list[Path]] = {}
    for file in files:
        grouped.setdefault(case_name(file), []).append(file)
    # one file may hold all channels, which is seen when it is read
    wrong = [name for name, of_case in grouped.items() if len(of_case) not in (1, num_channels)]
    if wrong:
        raise UserError(
            f"{len(wrong)} cases in {path} do not have {num_channels} channel files ({listed(wrong)}). Name the files "
            "CASE_0000.nii.gz, CASE_0001.nii.gz, ..., one for each channel."
        )
    return [as_dictionary(Case(name, name, tuple(of_case))) for name, of_case in grouped.items()]


def as_dictionary(case: Case) -> dict[str, Any]:
    """A case as MONAI's dictionary transforms take it; a list of files stands for channels."""
    images = [str(file) for file in case.images]
    entry: dict[str, Any] = {"image": images[0] if len(images) == 1 else images}
    return entry if case.label is None else {**entry, "label": str(case.label)}


def case_name(file: str | Path) -> str:
    """Name of the case that a file is an image of.

    Examples:
        >>> case_name("imagesTs/hippocampus_001_0000.nii.gz"), case_name("liver.nii")
        ('hippocampus_001', 'liver')
    """
    name = Path(file).name
    stem = next((name[: -len(ending)] for ending in NIFTI if name.endswith(ending)), name)
    head, _, channel = stem.rpartition("_")
    return head if head and len(channel) == 4 and channel.isdecimal() else stem


def class_names(dataset_dir: str | Path) -> tuple[str, ...]:
    """Names of the classes of a dataset, background first, as its ``dataset.json`` states them.

    Raises:
        UserError: It states none, regions, or numbers that do not follow each other.
    """
    path = Path(dataset_dir)
    path = path if path.suffix == ".json" else path / "dataset.json"
    labels = json.loads(path.read_text(encoding="utf-8")).get("labels")
    if not isinstance(labels, dict) or not labels:
        raise UserError(f"{path} states no 'labels', so that the number of classes is not known. Add them.")
    # nnU-Net maps names to numbers, the Decathlon numbers to names
    by_number = all(str(k).isdecimal() for k in labels)
    pairs = list(labels.items()) if by_number else [(number, name) for name, number in labels.items()]
    if any(isinstance(number, (list, tuple)) for number, _ in pairs):
        raise UserError(
            f"{path} states regions, which MONAI's bundle does not train. State plain labels, or train with nnU-Net."
        )
    names = {int(number): str(name) for number, name in pairs}
    if "ignore" in names.values():
        raise UserError(f"{path} has an 'ignore' label, which MONAI's losses do not know. Train with nnU-Net.")
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise UserError(
            f"{path} numbers its labels {listed([str(n) for n in sorted(names)])}; expected 0, 1, ... without a gap."
        )
    return tuple(names[number] for number in range(len(names)))


def _own_validation(dataset_dir: Path) -> list[dict[str, Any]]:
    from monai.data import load_decathlon_datalist

    path = dataset_dir if dataset_dir.suffix == ".json" else dataset_dir / "dataset.json"
    entries: Sequence[Any] = json.loads(path.read_text(encoding="utf-8")).get("validation") or []
    if not all(isinstance(entry, dict) and "label" in entry for entry in entries) or not entries:
        return []
    return list(load_decathlon_datalist(str(path), True, "validation", base_dir=str(path.parent)))

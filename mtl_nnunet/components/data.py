"""A dataset folder as lists of dictionaries, as MONAI's datasets take them."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl_nnunet.cases import Case, Dataset, dataset_description, find_dataset_folder, with_patients
from mtl_nnunet.errors import UserError, listed

logger = logging.getLogger(__name__)

NIFTI = (".nii.gz", ".nii")
FOLDS = 5
PATIENTS_FILE = "patients.csv"


@dataclass(frozen=True)
class Split:
    """The cases of a dataset in two parts, each case a dictionary with ``image`` and ``label``.

    Attributes:
        training: To learn from.
        validation: To measure on; no patient is in both.
        fold: Whose validation cases these are; None where a datalist lists its own.
        folder: Of the dataset.
    """

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    fold: int | None = None
    folder: Path = Path()

    def record(self) -> dict[str, Any]:
        """What is kept of it beside the weights: which image files, relative to the dataset's folder."""
        return {
            "fold": self.fold,
            "training": [place(entry, self.folder) for entry in self.training],
            "validation": [place(entry, self.folder) for entry in self.validation],
        }


def labelled_dataset(dataset_dir: str | Path, patients: str | Path | None = None) -> Dataset:
    """A dataset of NIfTI images that all have labels: nnU-Net's raw format, or a Decathlon/MONAI datalist.

    Args:
        dataset_dir: Folder with a ``dataset.json``, or such a file.
        patients: Table ``case,patient``; None takes ``patients.csv`` of the folder, and without one a case is a patient.

    Raises:
        UserError: No such folder, no dataset in it, files that are no NIfTI, or cases without a label.
    """
    dataset = find_dataset_folder(dataset_dir)
    _refuse_foreign(dataset.cases, dataset_dir)
    unlabelled = [case.name for case in dataset.cases if case.label is None]
    if unlabelled:
        raise UserError(
            f"{len(unlabelled)} cases of {dataset_dir} have no label ({listed(unlabelled)}). Add the labels."
        )
    return with_own_patients(dataset, dataset_dir, patients)


def with_own_patients(dataset: Dataset, dataset_dir: str | Path, patients: str | Path | None = None) -> Dataset:
    """The dataset with the patients that a table states, or the ``patients.csv`` of its folder; as it is without either.

    Raises:
        UserError: As ``mtl_nnunet.cases.with_patients``.
    """
    table = _patients_table(dataset_dir, patients)
    return dataset if table is None else with_patients(dataset, table)


def split_cases(dataset_dir: str | Path, fold: int = 0, patients: str | Path | None = None) -> Split:
    """Training and validation cases: those of a datalist's own ``validation``, else nnU-Net's folds over patients.

    Where every case is a patient of its own, the folds are those that nnU-Net makes of the same cases.

    Args:
        dataset_dir: As for ``labelled_dataset``.
        fold: Whose validation cases to keep out; 0 to 4, or fewer where there are fewer than five patients. A datalist with a
            ``validation`` of its own has fold 0 only.
        patients: As for ``labelled_dataset``.

    Raises:
        UserError: As for ``labelled_dataset``, no such fold, or a ``validation`` that shares cases or patients with ``training``, or
            has labels for some cases only.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    dataset = labelled_dataset(dataset_dir, patients)
    folder = dataset_description(dataset_dir).parent
    own = own_validation(dataset, dataset_dir, patients)
    if own:
        if fold != 0:
            raise UserError(
                f"{dataset_dir} lists a 'validation' of its own, so that there is no fold {fold}. Leave --fold out, or take the list "
                "out of the datalist to have folds."
            )
        _refuse_shared(dataset.cases, own, dataset_dir, by_patient=_patients_table(dataset_dir, patients) is not None)
        return Split(
            [as_dictionary(case) for case in dataset.cases], [as_dictionary(case) for case in own], None, folder
        )
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
        fold,
        folder,
    )


def own_validation(dataset: Dataset, dataset_dir: str | Path, patients: str | Path | None = None) -> tuple[Case, ...]:
    """The cases that a datalist lists under ``validation``; none where it lists none, or none with a label.

    Raises:
        UserError: Only some have labels, files are missing or no NIfTI, or the table of patients lacks some.
    """
    from monai.data import load_decathlon_datalist

    path = dataset_description(dataset_dir)
    content = json.loads(path.read_text(encoding="utf-8"))
    entries = content.get("validation")
    if not isinstance(content.get("training"), list) or not isinstance(entries, list) or not entries:
        return ()
    unlabelled = [str(entry) for entry in entries if not isinstance(entry, dict) or not entry.get("label")]
    if len(unlabelled) == len(entries):
        logger.warning(f"{path}: no entry of 'validation' has a label, so that the training cases are split in folds.")
        return ()
    if unlabelled:
        raise UserError(
            f"{path}: {len(unlabelled)} of {len(entries)} entries of 'validation' have no label ({listed(unlabelled, 2)}). Add the "
            "labels, or take these entries out."
        )
    try:
        read = load_decathlon_datalist(str(path), True, "validation", base_dir=str(path.parent))
        files = [
            ([Path(i) for i in ([e["image"]] if isinstance(e["image"], str) else e["image"])], Path(e["label"]))
            for e in read
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: 'validation' cannot be understood ({error!r}). Expected entries with 'image' and 'label'."
        ) from error
    cases = tuple(Case(_stem(images[0]), _stem(images[0]), tuple(images), label) for images, label in files)
    missing = [str(f) for images, label in files for f in (*images, label) if not f.is_file()]
    if missing:
        raise UserError(
            f"{path} names {len(missing)} files that do not exist ({listed(missing, 2)}). Correct the datalist."
        )
    _refuse_foreign(cases, dataset_dir)
    return with_own_patients(replace(dataset, cases=cases), dataset_dir, patients).cases


def images_in(folder: str | Path, num_channels: int, output_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """The cases of a folder of NIfTI images to segment, each a dictionary with ``image`` and the name ``case``.

    Files named ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, ... are channels of one case where every case has exactly as many as there
    are channels; else every file is a case of its own, with all channels. ``imagesTs`` inside the folder is taken if it is there;
    names that start with a dot are not.

    Args:
        folder: Where they lie.
        num_channels: How many channels the model takes.
        output_dir: Where segmentations are going to be written as ``CASE.nii.gz``.

    Raises:
        UserError: No such folder, no image in it, cases with another number of channels, two cases of one name, or a segmentation
            that would replace an image.
    """
    path = Path(folder)
    path = path / "imagesTs" if (path / "imagesTs").is_dir() else path
    if not path.is_dir():
        raise UserError(f"no such folder of images: {path}. Pass --dataset_dir FOLDER.")
    # macOS keeps what other file systems cannot hold in files called ._NAME
    files = sorted(f for f in path.iterdir() if f.is_file() and f.name.endswith(NIFTI) and not f.name.startswith("."))
    if not files:
        raise UserError(f"no image in {path}: expected files ending in {' or '.join(NIFTI)}.")
    cases = _grouped(files, num_channels, path)
    names = [name for name, _ in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}: several images are of cases called {listed(twice)}, and their segmentations would replace each other. "
            "Rename them."
        )
    if output_dir is not None:
        refuse_to_replace([Path(output_dir) / f"{name}.nii.gz" for name in names], files)
    return [{**as_dictionary(Case(name, name, of_case)), "case": name} for name, of_case in cases]


def refuse_to_replace(targets: list[Path], images: list[Path]) -> None:
    """Refuse to write segmentations over images.

    Raises:
        UserError: A target is one of the images.
    """
    read = {(image.stat().st_dev, image.stat().st_ino) for image in images if image.exists()}
    replaced = [str(t) for t in targets if t.exists() and (t.stat().st_dev, t.stat().st_ino) in read]
    if replaced:
        raise UserError(
            f"{len(replaced)} segmentations would replace the images that they are of ({listed(replaced, 2)}). Pass another folder: "
            "--output_dir FOLDER."
        )


def _grouped(files: list[Path], num_channels: int, where: Path) -> list[tuple[str, tuple[Path, ...]]]:
    """Name and image files of each case."""
    numbered: dict[str, dict[str, Path]] = {}
    for file in files:
        if case_name(file) != _stem(file):
            numbered.setdefault(case_name(file), {})[_stem(file)] = file
    alone = [(_stem(file), (file,)) for file in files if case_name(file) == _stem(file)]
    numbers = {name: [int(stem[-4:]) for stem in of_case] for name, of_case in numbered.items()}
    every = list(range(num_channels))
    odd = [name for name, found in numbers.items() if found != every]
    # nnU-Net numbers the only file of a case too, also where it holds all channels
    if not odd or all(found == [0] for found in numbers.values()):
        return sorted([*alone, *((name, tuple(of_case.values())) for name, of_case in numbered.items())])
    # cases that are numbered from 0 beside each other are channels, and not as many as the model takes
    several = [name for name in odd if numbers[name][0] == 0 and len(numbers[name]) > 1]
    if len(odd) < len(numbers) or (len(numbers) > 1 and several):
        raise UserError(
            f"{len(odd)} cases in {where} do not have {num_channels} channel files ({listed(odd)}). Name the files "
            "CASE_0000.nii.gz, CASE_0001.nii.gz, ..., one for each channel."
        )
    return sorted([*alone, *((stem, (file,)) for of_case in numbered.values() for stem, file in of_case.items())])


def place(entry: dict[str, Any], folder: str | Path) -> str:
    """Where the first image file of a case lies within the folder of its dataset.

    Examples:
        >>> place({"image": ["data/imagesTr/a_0000.nii.gz", "data/imagesTr/a_0001.nii.gz"]}, "data")
        'imagesTr/a_0000.nii.gz'
    """
    image = entry["image"] if isinstance(entry["image"], str) else entry["image"][0]
    file = Path(os.path.abspath(image))
    # nnU-Net's datasets are found by their resolved path, datalists by the one that was typed
    for root in (Path(os.path.abspath(folder)), Path(folder).resolve()):
        if file.is_relative_to(root):
            return file.relative_to(root).as_posix()
    return file.as_posix()


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
    stem = _stem(file)
    head, _, channel = stem.rpartition("_")
    return head if head and len(channel) == 4 and channel.isdecimal() else stem


def class_names(dataset_dir: str | Path) -> tuple[str, ...]:
    """Names of the classes of a dataset, background first, as its ``dataset.json`` states them.

    Raises:
        UserError: It states none, regions, or numbers that do not follow each other.
    """
    path = dataset_description(dataset_dir)
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
    odd = [f"{name}: {number}" for number, name in pairs if not str(number).isdecimal()]
    if odd:
        raise UserError(f"{path}: labels without a whole number ({listed(odd)}). Expected background: 0, NAME: 1, ...")
    names = {int(number): str(name) for number, name in pairs}
    if "ignore" in names.values():
        raise UserError(f"{path} has an 'ignore' label, which MONAI's losses do not know. Train with nnU-Net.")
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise UserError(
            f"{path} numbers its labels {listed([str(n) for n in sorted(names)])}; expected 0, 1, ... without a gap."
        )
    return tuple(names[number] for number in range(len(names)))


def _refuse_foreign(cases: tuple[Case, ...], dataset_dir: str | Path) -> None:
    files = [file for case in cases for file in (*case.images, *filter(None, [case.label]))]
    foreign = [file.name for file in files if not file.name.endswith(NIFTI)]
    if foreign:
        raise UserError(
            f"{len(foreign)} files of {dataset_dir} are no NIfTI ({listed(foreign)}), and MONAI's bundle reads NIfTI only. "
            "Convert them, or train with nnU-Net."
        )


def _refuse_shared(
    training: tuple[Case, ...], validation: tuple[Case, ...], dataset_dir: str | Path, by_patient: bool
) -> None:
    learnt = {file.resolve() for case in training for file in case.images}
    shared = [case.name for case in validation if learnt & {file.resolve() for file in case.images}]
    if shared:
        raise UserError(
            f"{dataset_dir}: {len(shared)} cases are in 'training' and in 'validation' ({listed(shared)}). Keep each in one list."
        )
    # without a table, cases of one name in two folders may well be of two patients
    patients = sorted({c.patient for c in training} & {c.patient for c in validation}) if by_patient else []
    if patients:
        raise UserError(
            f"{dataset_dir}: {len(patients)} patients have cases in 'training' and in 'validation' ({listed(patients)}). Keep the cases of "
            "a patient in one list."
        )


def _patients_table(dataset_dir: str | Path, patients: str | Path | None) -> Path | None:
    own = dataset_description(dataset_dir).parent / PATIENTS_FILE
    return Path(patients) if patients else own if own.is_file() else None


def _stem(file: str | Path) -> str:
    name = Path(file).name
    return next((name[: -len(ending)] for ending in NIFTI if name.endswith(ending)), name)

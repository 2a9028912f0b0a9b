"""Which images to predict: nnU-Net's folder of images, a Decathlon/MONAI datalist, or a list."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_nnunet.bridge.model import NATURAL_READER, TrainedModel
from mtl_nnunet.errors import UserError, listed

TEST_KEYS = ("testing", "test")


def images_to_predict(
    source: str | Path | Sequence[Any], model: TrainedModel, key: str | None = None
) -> list[dict[str, Any]]:
    """MONAI's list of dictionaries ``{"image": files of the channels, "case": name of the segmentation}``.

    Args:
        source: A folder of ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, ... (or one with such an ``imagesTs`` in it), a Decathlon
            datalist (``.json``), or a list of files, of lists of files, or of dictionaries with ``image``.
        model: Whose channels and file ending count.
        key: Which list of a datalist; None for ``testing`` or ``test``.

    Raises:
        UserError: No image there, a missing file or channel, or two cases that would be written under one name.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            cases, where = _of_folder(path, model), path
        elif path.is_file():
            cases, where = [_of_entry(e, model, path.parent) for e in _listed_in(path, key)], path
        else:
            raise UserError(
                f"{path} does not exist. Pass --dataset_dir with a folder of images, or a datalist (.json)."
            )
    else:
        cases, where = [_of_entry(e, model, Path()) for e in source], Path("the list of images")
    if not cases:
        raise UserError(
            f"no image in {where}: expected files named CASE_0000{model.file_ending}"
            + (
                f" to CASE_{len(model.channel_names) - 1:04d}{model.file_ending}."
                if len(model.channel_names) > 1
                else "."
            )
        )
    names = [case["case"] for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"several images in {where} would be written as {listed([t + model.file_ending for t in twice])}. Rename them, or predict them apart."
        )
    for case in cases:
        _check(case, model)
    return cases


def _of_folder(folder: Path, model: TrainedModel) -> list[dict[str, Any]]:
    cases = _grouped(folder, model.file_ending)
    if not cases and (folder / "imagesTs").is_dir():
        cases = _grouped(folder / "imagesTs", model.file_ending)
    return [{"image": files, "case": name} for name, files in sorted(cases.items())]


def _grouped(folder: Path, ending: str) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()):
        name = file.name[: -len(ending)]
        # macOS keeps what other file systems cannot hold in files called ._NAME
        if file.name.endswith(ending) and not file.name.startswith(".") and re.search(r"_\d{4}$", name):
            grouped.setdefault(name[:-5], []).append(str(file))
    return grouped


def _listed_in(datalist: Path, key: str | None) -> list[Any]:
    try:
        content = json.loads(datalist.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{datalist} cannot be read as JSON ({error}). Expected a Decathlon/MONAI datalist.") from error
    lists = {k: v for k, v in content.items() if isinstance(v, list)} if isinstance(content, dict) else {}
    chosen = key or next((k for k in TEST_KEYS if k in lists), None)
    if chosen not in lists:
        raise UserError(
            f"{datalist} has no list '{chosen or TEST_KEYS[0]}' (it has: {listed(sorted(lists)) or 'no list'}). Pass --datalist_key NAME."
        )
    entries: list[Any] = lists[chosen]
    return entries


def _of_entry(entry: Any, model: TrainedModel, base: Path) -> dict[str, Any]:
    image = entry.get("image") if isinstance(entry, Mapping) else entry
    files = [image] if isinstance(image, (str, Path)) else image
    if not isinstance(files, (list, tuple)) or not files or not all(isinstance(f, (str, Path)) for f in files):
        raise UserError(
            f"{entry!r:.120} is no image to predict. Expected a file, a list of files (one a channel), or a dictionary with such an 'image'."
        )
    named = entry.get("case") if isinstance(entry, Mapping) else None
    if named and Path(str(named)).name != str(named):
        raise UserError(
            f"case {named!r} is no name of a file. Leave the path out: --output_dir says where it is written."
        )
    paths = [str(base / f) for f in files]
    return {"image": paths, "case": str(named) if named else _case_name(Path(paths[0]).name, model.file_ending)}


def _case_name(file: str, ending: str) -> str:
    for known in (ending, ".nii.gz", ".nii"):
        if file.endswith(known):
            file = file.removesuffix(known)
            break
    else:
        file = Path(file).stem
    return re.sub(r"_\d{4}$", "", file)


def _check(case: dict[str, Any], model: TrainedModel) -> None:
    files, channels = case["image"], model.channel_names
    if missing := [f for f in files if not Path(f).is_file()]:
        raise UserError(f"case {case['case']}: {listed(missing)} does not exist. Correct the list, or add the file.")
    # one natural image holds all its colours; they are counted when it is read
    if model.reader != NATURAL_READER and len(files) != len(channels):
        raise UserError(
            f"case {case['case']} has {len(files)} of {len(channels)} channel files ({listed([Path(f).name for f in files])}); the model needs "
            f"{listed([f'{i:04d}: {name}' for i, name in enumerate(channels)])}. Give one file a channel, in that order."
        )

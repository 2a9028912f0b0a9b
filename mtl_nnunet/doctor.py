"""What is installed and set up here, what is wrong with it, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from mtl_nnunet import __version__
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.lookup import find_trainer

OK, NOTE, PROBLEM = "ok", "note", "problem"
# whose requirements have to be met together
STACK = ("mtl-nnunet", "nnunetv2", "dynamic-network-architectures", "monai", "timm", "torchvision")
IMPORTED = ("torch", "torchvision", "timm", "monai", "nnunetv2", "SimpleITK", "nibabel")
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
TRAINER = "MTLTrainer"
SET_TRAINERS = 'export nnUNet_extTrainer="$(mtl-nnunet trainers)"'
# containers start with 64 MB, and nnU-Net's workers hand over batches through it
LEAST_SHARED_MEMORY = 2**30
# nnU-Net's own plans are made for 8 GB
LEAST_GPU_MEMORY = 7.5 * 2**30
MOST_DATASETS = 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: ``packages``, ``variables``, ``trainers``, ``hardware``, ``folders`` or ``datasets``.
        state: ``ok``; ``note``: works, and worth knowing; ``problem``: something will fail.
        said: What was found.
        remedy: What to do about it; empty where there is nothing to do.
    """

    topic: str
    state: str
    said: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Look at everything that selecting and training need; nothing is changed, and nothing is left behind."""
    looks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("packages", of_packages),
        ("variables", of_variables),
        ("trainers", of_trainers),
        ("hardware", of_hardware),
        ("folders", of_folders),
        ("datasets", of_datasets),
    )
    for topic, look in looks:
        try:
            yield from look()
        except Exception as error:  # a look that fails is a finding, and no reason to keep the others back
            yield Finding(topic, PROBLEM, f"could not be looked at: {_in_one_line(error)}")


def of_packages() -> Iterator[Finding]:
    """Versions, requirements that are not met, and packages that are installed and cannot be imported."""
    yield Finding(
        "packages",
        OK,
        f"mtl-nnunet {__version__}, Python {platform.python_version()} on {platform.platform(terse=True)}",
    )
    unmet = list(_unmet())
    broken = []
    for name in IMPORTED:
        try:
            with _silent():
                importlib.import_module(name)
        except Exception as error:  # a mismatched build raises whatever it likes
            broken.append(Finding("packages", PROBLEM, f"import {name} fails: {_in_one_line(error)}", _reinstall(name)))
    versions = [f"{name} {v}" for name in (*IMPORTED, "numpy", "scipy") if (v := _version(name)) is not None]
    yield Finding("packages", OK, ", ".join(versions))
    yield from unmet
    yield from broken


def of_variables() -> Iterator[Finding]:
    """nnU-Net's environment variables."""
    for name in VARIABLES:
        value = os.environ.get(name)
        if not value:
            yield Finding(
                "variables", PROBLEM, f"{name} is not set", f"export {name}=FOLDER, as nnU-Net's documentation says"
            )
        elif name == "nnUNet_raw" and not Path(value).is_dir():
            yield Finding(
                "variables", PROBLEM, f"{name} names {value}, which is no folder", "correct it, or make the folder"
            )
        else:
            yield Finding("variables", OK, f"{name}: {value}")
    workers = os.environ.get("nnUNet_n_proc_DA")
    if workers == "0":
        yield Finding(
            "variables", PROBLEM, "nnUNet_n_proc_DA is 0, with which nnU-Net's planning fails", "set it to 1 or more"
        )
    elif workers is not None and not workers.isdecimal():
        yield Finding(
            "variables", PROBLEM, f"nnUNet_n_proc_DA is '{workers}', which is no number", "set it to 1 or more"
        )


def of_trainers() -> Iterator[Finding]:
    """Whether nnU-Net itself finds our trainers, by the look-up of ``nnUNetv2_train -tr``."""
    named = [p for p in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if p.strip()]
    if not named:
        yield Finding("trainers", PROBLEM, "nnUNet_extTrainer is not set, so nnU-Net finds no MTLTrainer", SET_TRAINERS)
        return
    for folder in named:
        if not Path(folder).is_dir():
            yield Finding("trainers", NOTE, f"nnUNet_extTrainer names {folder}, which is no folder", SET_TRAINERS)
    from mtl_nnunet.trainer import MTLTrainer
    from mtl_nnunet.variants import VARIANTS

    try:
        with _silent():
            found = find_trainer(TRAINER)
    except Exception as error:  # it imports every module on its way, and each may fail in its own way
        said = f"nnU-Net's own look-up of {TRAINER} fails: {_in_one_line(error)}"
        if "Could not find requested" in str(error):
            said = f"nnU-Net does not find {TRAINER} in the folders of nnUNet_extTrainer ({os.pathsep.join(named)})"
        yield Finding("trainers", PROBLEM, said, SET_TRAINERS)
        return
    if found is not MTLTrainer:
        yield Finding("trainers", PROBLEM, f"nnU-Net finds another {TRAINER}, of {found.__module__}", SET_TRAINERS)
        return
    yield Finding("trainers", OK, f"nnU-Net finds {TRAINER} and its variants, {len(VARIANTS)} in all")


def of_hardware() -> Iterator[Finding]:
    """GPUs, cores and memory."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = (
        f", {_gigabytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
        if hasattr(os, "sysconf")
        else ""
    )
    yield Finding("hardware", OK, f"{cores} cores{memory}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, whole = torch.cuda.mem_get_info(i)
            said = f"GPU {i}: {torch.cuda.get_device_name(i)}, {_gigabytes(free)} of {_gigabytes(whole)} free"
            if whole < LEAST_GPU_MEMORY:
                fit = f"mtl-nnunet plans -gpu_memory_target {max(1, int(whole / 2**30))} sizes the batch for it"
                yield Finding("hardware", NOTE, said, fit)
            else:
                yield Finding("hardware", OK, said)
    elif torch.backends.mps.is_available():
        yield Finding("hardware", NOTE, "no CUDA GPU; Apple's GPU is there", "pass -device mps")
    else:
        built = "" if torch.version.cuda or torch.version.hip else ", and this torch is built for CPUs only"
        yield Finding(
            "hardware",
            NOTE,
            f"no GPU{built}: scoring works, training takes very long",
            "pass -device cpu, or train where there is a GPU",
        )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = os.statvfs(shared)
        if (whole := size.f_frsize * size.f_blocks) < LEAST_SHARED_MEMORY:
            yield Finding(
                "hardware", PROBLEM, f"only {_gigabytes(whole)} of shared memory, with which nnU-Net's workers die",
                "start the container with --ipc=host or --shm-size=8g",
            )  # fmt: skip


def of_folders() -> Iterator[Finding]:
    """Whether what will be written can be written."""
    from mtl_nnunet.cache import default_folder

    wanted = [(name, Path(os.environ[name])) for name in VARIABLES[1:] if os.environ.get(name)]
    for name, folder in (*wanted, ("the result cache", default_folder())):
        there = next((p for p in (folder, *folder.parents) if p.exists()), folder)
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            remedy = (
                "set MTL_CACHE to a folder that is, or pass --no-cache"
                if name == "the result cache"
                else f"set {name} to one that is"
            )
            yield Finding("folders", PROBLEM, f"{name} is not writable: {there}: {error.strerror or error}", remedy)
        else:
            made = "" if there == folder else ", which is made when it is needed"
            yield Finding("folders", OK, f"{name} is writable: {folder}{made}")


def of_datasets() -> Iterator[Finding]:
    """Datasets of nnUNet_raw, whether they are planned, and what was selected for them."""
    raw = os.environ.get("nnUNet_raw")
    if not raw or not Path(raw).is_dir():
        return
    there = sorted(Path(raw).glob("Dataset[0-9][0-9][0-9]_*"))
    names = [p.name for p in there if p.is_dir()]
    for lost in (p for p in there if p.is_symlink() and not p.exists()):
        yield Finding(
            "datasets", PROBLEM, f"{lost} is a link to a folder that is gone", "remove it, or bring the folder back"
        )
    if not names:
        remedy = (
            "put datasets there in nnU-Net's raw format, or score a folder of images: mtl-select-checkpoint -i FOLDER"
        )
        yield Finding("datasets", NOTE, f"no dataset in {raw}", remedy)
    for name in names[:MOST_DATASETS]:
        yield from _of_dataset(name)
    if len(names) > MOST_DATASETS:
        yield Finding("datasets", NOTE, f"{len(names) - MOST_DATASETS} more datasets were not looked at")


def _of_dataset(name: str) -> Iterator[Finding]:
    from mtl_nnunet.cases import find_nnunet_dataset
    from mtl_nnunet.selection import DEFAULT_FOLDER, read_selection

    try:
        dataset = find_nnunet_dataset(name)
    except UserError as error:
        yield Finding("datasets", PROBLEM, f"{name}: {error}")
        return
    said = f"{name}: {len(dataset.cases)} cases, channels {listed(list(dataset.channel_names))}"
    preprocessed = os.environ.get("nnUNet_preprocessed")
    here = Path(preprocessed, name) if preprocessed else None
    selections = sorted(here.glob(f"{DEFAULT_FOLDER}*/selection.json")) if here is not None else []
    plans = sorted(p.stem for p in here.glob("*lans*.json")) if here is not None else []
    said += f"; planned: {listed(plans)}" if plans else "; not planned yet"
    if not selections:
        yield Finding("datasets", OK, f"{said}; nothing selected yet")
        return
    yield Finding("datasets", OK, said)
    for file in selections:
        try:
            selection = read_selection(file.parent)
        except UserError as error:
            yield Finding("datasets", PROBLEM, f"{name}: {error}")
        else:
            yield Finding("datasets", OK, f"{name}: {file.parent.name}: {selection.summary}")


def _unmet() -> Iterator[Finding]:
    for package in STACK:
        try:
            required = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            if package == "mtl-nnunet":
                yield Finding(
                    "packages", NOTE, "mtl-nnunet runs from its source and is not installed", "pip install -e ."
                )
            else:
                yield Finding("packages", PROBLEM, f"{package} is not installed", "pip install mtl-nnunet")
            continue
        for line in required:
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                # of another package, and no reason to keep the rest back
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            version = _version(requirement.name)
            if version is None or not _meets(version, requirement):
                there = "is not installed" if version is None else f"is {version}"
                wants = f"{requirement.name}{requirement.specifier}"
                yield Finding("packages", PROBLEM, f"{package} needs {wants}, and it {there}", f"pip install '{wants}'")


def _meets(version: str, requirement: Requirement) -> bool:
    # a vendor's own build of 2.6.0a0 holds what 2.6 does
    builds = [version, Version(version).base_version] if "+" in version else [version]
    return any(requirement.specifier.contains(build, prereleases=True) for build in builds)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _reinstall(name: str) -> str:
    together = "torch torchvision" if name in ("torch", "torchvision") else name
    return f"pip install --force-reinstall {together}"


def _in_one_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.3g} GB"


_silent = partial(contextlib.redirect_stdout, io.StringIO())

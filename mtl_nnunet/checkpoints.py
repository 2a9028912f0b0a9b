"""Find the checkpoints of a pretraining run and read them without trusting them."""

from __future__ import annotations

import argparse
import csv
import math
import pickle
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import sha256
from mtl_nnunet.paper_resnet import in_timm_names

SUFFIXES = (".pth.tar", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
WEIGHT_KEYS = ("state_dict", "model_state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """One pretraining checkpoint: where it lies and what it says of itself.

    Attributes:
        path: The file.
        epoch: Pretraining epoch as the run counts it (timm counts from 0), or None where nothing says.
        architecture: timm's name of the network, or None where nothing says.
        kind: ``timm train.py``, ``state dict`` or ``safetensors``.
        sha256: Hash of the file.
        logged_accuracy: ImageNet top-1 in per cent that the run itself logged for this epoch, if it did.
    """

    path: Path
    epoch: int | None
    architecture: str | None
    kind: str
    sha256: str
    logged_accuracy: float | None = None

    @property
    def label(self) -> str:
        """What to call it in a table: its epoch, else its file name."""
        return self.path.name if self.epoch is None else str(self.epoch)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint file holds that matters here."""

    weights: dict[str, Tensor]
    epoch: int | None
    architecture: str | None
    kind: str


def find_checkpoints(paths: str | Path | Sequence[str | Path]) -> list[Checkpoint]:
    """Checkpoints of a run, in the order of their epochs.

    ``last`` and ``model_best`` of timm's ``train.py`` are copies of an epoch: they count only where no other file has that
    epoch. What a file does not say of itself is taken from ``args.yaml`` and ``summary.csv`` beside it.

    Args:
        paths: Folder of a run, or several folders and files; what is named twice counts once.

    Returns:
        At least one checkpoint; those without an epoch come last, in the order of their names.

    Raises:
        UserError: Nothing found, a file that cannot be read, two files of one epoch, or two architectures.
    """
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if path.is_dir():
            files += _files_of_run(path)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"no such checkpoint file or folder: {path}. Pass a run's folder or its files with -ckpt.")
    # a link is another name for a checkpoint, and told apart below
    files = list({file.absolute(): file for file in files}.values())
    # closed also when a file is refused, so that the message gets a line of its own
    with tqdm(files, desc="Reading checkpoints", unit="file", file=sys.stderr) as bar:
        found = _without_copies([_describe(file) for file in bar])
    _refuse_repeated_epochs(found)
    _refuse_mixed_architectures(found)
    return sorted(found, key=lambda c: (c.epoch is None, c.epoch or 0, str(c.path)))


def read_contents(path: str | Path) -> Contents:
    """Weights, epoch and architecture of a checkpoint file; nothing in it is executed.

    Args:
        path: A file of timm's ``train.py``, a plain state dict, or safetensors.

    Returns:
        Weights by name, wrappers' prefixes (``module.``, ``_orig_mod.``) removed; those of the ResNet-50 of
        arXiv:2410.18677 in timm's names.

    Raises:
        UserError: Empty, truncated, not a checkpoint, or a pickle that asks for code.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint {path} is empty. Copy it again from where the run wrote it.")
    content, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})
    kind = "safetensors" if path.suffix == ".safetensors" else "state dict"
    weights = content
    for key in WEIGHT_KEYS:
        if isinstance(content.get(key), Mapping):
            weights = content[key]
            kind = "timm train.py" if "arch" in content else kind
            break
    weights = _without_wrappers(weights)
    tensors = {k: v for k, v in weights.items() if isinstance(k, str) and _holds_values(v)}
    if not tensors or len(tensors) < len(weights):
        others = [k for k in weights if k not in tensors]
        held = f"{others[0]!r:.80} is not the name of a dense tensor of numbers" if others else "no tensors"
        raise UserError(
            f"checkpoint {path} holds no weights that can be read ({held}). "
            f"Expected a state dict, alone or under one of: {listed(list(WEIGHT_KEYS))}."
        )
    tensors, of_paper = in_timm_names(tensors, path)
    epoch = content.get("epoch", metadata.get("epoch"))
    return Contents(
        weights=tensors,
        epoch=int(epoch) if isinstance(epoch, (int, str)) and str(epoch).isdigit() else epoch_in_name(path.name),
        architecture=_architecture(content, metadata) or of_paper,
        kind=kind,
    )


def epoch_in_name(name: str) -> int | None:
    """The epoch that a file name states, or None.

    Example:
        >>> [epoch_in_name(n) for n in ("checkpoint-12.pth.tar", "epoch_020.pth", "007.pt", "resnet50.safetensors")]
        [12, 20, 7, None]
        >>> epoch_in_name("resnet50-0676ba61.pth") is None
        True
    """
    stem = name
    while suffix := next((s for s in SUFFIXES if stem.endswith(s)), None):
        stem = stem[: -len(suffix)]
    for pattern in (r"(?:epoch|ep|checkpoint|ckpt)[-_=]?(\d{1,6})(?!\d)", r"^(\d{1,6})$", r"[-_](\d{1,6})$"):
        if matches := re.findall(pattern, stem, flags=re.IGNORECASE):
            return int(matches[-1])
    return None


def _holds_values(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
    )


def _files_of_run(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name.endswith(SUFFIXES) and f.name[0] != ".")
    if not files:
        inside = sorted(d.name for d in folder.iterdir() if d.is_dir() and any(d.glob("*.p*t*")))
        hint = f" Its folders hold some: {listed(inside)}." if inside else ""
        raise UserError(
            f"no checkpoint in {folder}: expected files ending in {', '.join(SUFFIXES)}.{hint} "
            "Pass the folder that the run wrote its checkpoints to."
        )
    return files


def _describe(path: Path) -> Checkpoint:
    contents = read_contents(path)
    accuracy = _logged_accuracy(path.parent / "summary.csv")
    return Checkpoint(
        path=path,
        epoch=contents.epoch,
        architecture=contents.architecture or _architecture_of_run(path.parent / "args.yaml"),
        kind=contents.kind,
        sha256=sha256(path),
        logged_accuracy=accuracy.get(contents.epoch) if contents.epoch is not None else None,
    )


def _without_copies(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    def is_copy(checkpoint: Checkpoint) -> bool:
        return checkpoint.path.name.startswith(("last.", "model_best.")) and checkpoint.epoch is not None

    kept = [c for c in checkpoints if not is_copy(c)]
    for checkpoint in filter(is_copy, checkpoints):
        if checkpoint.epoch not in {c.epoch for c in kept}:
            kept.append(checkpoint)
    return kept


def _refuse_repeated_epochs(checkpoints: list[Checkpoint]) -> None:
    repeated = [e for e, n in Counter(c.epoch for c in checkpoints if c.epoch is not None).items() if n > 1]
    if repeated:
        files = [str(c.path) for c in checkpoints if c.epoch == repeated[0]]
        raise UserError(
            f"{len(files)} checkpoints say they are epoch {repeated[0]}: {listed(files)}. "
            "Pass the files of one run only, one file an epoch."
        )


def _refuse_mixed_architectures(checkpoints: list[Checkpoint]) -> None:
    by_name = {c.architecture: c.path for c in checkpoints if c.architecture}
    if len(by_name) > 1:
        held = [f"{path} is {name}" for name, path in by_name.items()]
        raise UserError(
            f"checkpoints of different architectures cannot be ranked together: {listed(held)}. "
            "Pass the checkpoints of one architecture."
        )


def _read_pickle(path: Path) -> Mapping[str, Any]:
    try:
        # timm's train.py stores its arguments as a Namespace: plain data, allowed by name
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch warns of odd pickles before it refuses them
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise UserError(
                f"checkpoint {path} is refused: it holds Python objects besides weights ({asked.group(1)}), and "
                "loading those could run code. Nothing in it was executed. Save it again as a plain state dict."
            ) from error
        raise UserError(_not_a_checkpoint(path)) from error
    except Exception as error:
        raise UserError(_not_a_checkpoint(path)) from error
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of weights.")
    return content


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_not_a_checkpoint(path)) from error


def _not_a_checkpoint(path: Path) -> str:
    return (
        f"checkpoint {path} cannot be read: it is truncated, damaged or not a PyTorch or safetensors file. "
        "Copy it again from where the run wrote it, or leave it out."
    )


def _without_wrappers(weights: Mapping[str, Any]) -> dict[str, Any]:
    stripped = dict(weights)
    while prefix := next(
        (p for p in WRAPPER_PREFIXES if stripped and all(isinstance(k, str) and k.startswith(p) for k in stripped)),
        None,
    ):
        stripped = {k[len(prefix) :]: v for k, v in stripped.items()}
    return stripped


def _architecture(content: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    args = content.get("args")
    model = args.get("model") if isinstance(args, Mapping) else getattr(args, "model", None)
    for name in (content.get("arch"), model, metadata.get("architecture")):
        if isinstance(name, str):
            return name
    return None


def _architecture_of_run(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        args = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return args.get("model") if isinstance(args, Mapping) and isinstance(args.get("model"), str) else None


def _logged_accuracy(path: Path) -> dict[int, float]:
    if not path.is_file():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(row.get("epoch"), row.get("eval_top1")) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    logged = {}
    for epoch, top1 in rows:
        try:
            logged[int(str(epoch))] = float(str(top1))
        except ValueError:
            continue
    # a run that diverged logs NaN
    return {epoch: top1 for epoch, top1 in logged.items() if math.isfinite(top1)}

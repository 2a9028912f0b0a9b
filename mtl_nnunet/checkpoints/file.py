"""One untrusted file -> the encoder's weights and what the file says of itself; nothing in it is executed."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtl_nnunet.checkpoints.checkpoint import WHICH_WEIGHTS, Checkpoint
from mtl_nnunet.checkpoints.filenames import epoch_in_name
from mtl_nnunet.checkpoints.names import NoSuchWeightsError, encoder_tensors
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.paper_resnet import in_timm_names as paper_in_timm_names

WEIGHT_KEYS = ("state_dict", "model_state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
PAIR = ("teacher", "student")
# plain data that runs store beside their weights, of packages that need not be here: nothing of these names is imported or
# called, an inert object stands in their place, and a plain number in that of NumPy's numbers
INERT = (
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
    "torch.torch_version.TorchVersion",
)
NUMPY_NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
INERT_MAPPINGS = (
    *("lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict"),
    *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
    *("yacs.config.CfgNode", "easydict.EasyDict"),
)
# torchvision's names of networks that timm calls otherwise
TORCHVISION_NAMES = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
}
# where runs write how many epochs they are to have
EPOCHS_KEYS = ("epochs", "max_epochs", "num_train_epochs", "num_epochs")
# timm's schedules that are as long as their cycles
CYCLIC = ("cosine", "tanh", "poly")
# where runs write the name of their network
ARCHITECTURE_KEYS = ("arch", "model", "architecture", "model_name", "backbone", "encoder", "network", "encoder_name")
SETTINGS_KEYS = ("args", "hyper_parameters", "config")
MARKS_OF_HEADS = ("fc.", "head.", "project", "predict", "prototypes")
STILL_WRITING_SECONDS = 120


@dataclass(frozen=True)
class Contents:
    """What a checkpoint file holds that matters here.

    Attributes:
        weights: The encoder and its classifier, in timm's names where they were known to differ.
        epoch: As the file says, or its name.
        architecture: timm's name of the network, or None where the file does not say.
        kind: The format in words.
        step: Optimiser step, where the file says.
        left_out: Names of tensors that are not of this encoder: heads of self-supervised methods, a second encoder.
        planned_epochs: How many epochs the run is to have, where the file says.
    """

    weights: dict[str, Tensor]
    epoch: int | None
    architecture: str | None
    kind: str
    step: int | None = None
    left_out: tuple[str, ...] = ()
    planned_epochs: int | None = None


def read_contents(path: str | Path, which: str = "default") -> Contents:
    """Weights, epoch and architecture of a checkpoint file; nothing in it is executed.

    Args:
        path: A file of timm's ``train.py``, torchvision's references, Lightning, Hugging Face, a self-supervised method,
            a plain state dict, or safetensors.
        which: ``default``; ``ema``: their moving average (a teacher, a key encoder); ``trained``: what gradients trained (a
            student, a query encoder).

    Returns:
        Weights by name, prefixes of wrappers and methods removed, in timm's names; those of the ResNet-50 of
        arXiv:2410.18677 too.

    Raises:
        UserError: Empty, truncated, not a checkpoint, a pickle that asks for code, or without the weights asked for.
    """
    path = Path(path)
    if which not in WHICH_WEIGHTS:
        raise UserError(f"weights '{which}' is none of {', '.join(WHICH_WEIGHTS)}.")
    content, metadata = _read(path)
    held, container = _weights_held(content, which, path)
    strange = [k for k in held if not isinstance(k, str)]
    if strange:
        raise UserError(_no_weights(path, f"{strange[0]!r:.80} is not the name of a dense tensor of numbers"))
    try:
        tensors, left_out, scheme = encoder_tensors(held, "default" if container in EMA_KEYS else which)
    except NoSuchWeightsError:
        there = [k for k, v in content.items() if isinstance(k, str) and isinstance(v, Mapping)]
        raise UserError(
            f"checkpoint {path} holds no moving average of its weights (it holds: {listed(there) or 'one set of weights'}). "
            "Leave -weights ema out."
        ) from None
    except UserError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}.") from None
    unusable = next((k for k, v in tensors.items() if not _holds_values(v)), None)
    if unusable is not None or not tensors:
        said = "no tensors" if unusable is None else f"{unusable!r:.80} is not the name of a dense tensor of numbers"
        raise UserError(_no_weights(path, said))
    named, of_paper = paper_in_timm_names(tensors, path)
    stated_epoch = _whole_number(content.get("epoch", metadata.get("epoch")))
    return Contents(
        weights=named,
        epoch=epoch_in_name(path.name) if stated_epoch is None else stated_epoch,
        architecture=_architecture(content, metadata) or of_paper,
        kind=_kind(path, content, scheme, left_out),
        step=_whole_number(content.get("global_step")),
        left_out=tuple(left_out),
        planned_epochs=next((n for k in SETTINGS_KEYS if (n := planned_epochs_in(content.get(k)))), None),
    )


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint that was found.

    Raises:
        UserError: As ``read_contents``.
    """
    return read_contents(checkpoint.path, checkpoint.weights).weights


def timm_name(stated: Any) -> str | None:
    """timm's name of a network that a run names, without the tag of published weights; None where timm does not know it.

    Examples:
        >>> [timm_name(n) for n in ("resnet50.a1_in1k", "swin_t", "my_net", 3)]
        ['resnet50', 'swin_tiny_patch4_window7_224', None, None]
    """
    if not isinstance(stated, str):
        return None
    name = TORCHVISION_NAMES.get(stated, stated.removeprefix("timm/").partition(".")[0])
    return name if timm.is_model(name) else None


def architecture_in(settings: Any) -> str | None:
    """timm's name of the network that a run's settings name (a mapping or a Namespace), or None."""
    said = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
    return next((name for key in ARCHITECTURE_KEYS if (name := timm_name(said.get(key)))), None)


def planned_epochs_in(settings: Any) -> int | None:
    """How many epochs a run is to have by its settings (a mapping or a Namespace), or None.

    Examples:
        >>> [planned_epochs_in(s) for s in ({"epochs": 300, "cooldown_epochs": 10}, {"max_epochs": -1}, {"num_train_epochs": 3.0})]
        [310, None, 3]
        >>> of_timm = {"epochs": 100, "cooldown_epochs": 10, "warmup_epochs": 5, "lr_cycle_limit": 2, "lr_cycle_mul": 1.0}
        >>> [planned_epochs_in({**of_timm, **s}) for s in ({"sched": "step"}, {"sched": "cosine"}, {"sched": "poly", "warmup_prefix": True})]
        [100, 210, 215]
    """
    said = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
    stated = (said.get(key) for key in EPOCHS_KEYS)
    whole = (int(n) if isinstance(n, float) and n.is_integer() else n for n in stated)
    number = next((n for n in map(_whole_number, whole) if n), None)
    if number is None or said.get("sched", CYCLIC[0]) not in CYCLIC:
        return number
    # timm's cyclic schedules are as many epochs for each cycle, and end with these on top
    cycles = _whole_number(said.get("lr_cycle_limit")) if said.get("lr_cycle_mul", 1.0) == 1 else None
    prefix = _whole_number(said.get("warmup_epochs")) if said.get("warmup_prefix") is True else None
    return number * (cycles or 1) + (prefix or 0) + (_whole_number(said.get("cooldown_epochs")) or 0)


class _Inert:
    """Stands for an object of a package that is not imported; keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _InertMapping:
    """Stands for a mapping of a package that is not imported; torch fills plain ones only."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _NumpyDtype:
    """Stands for the type of a number: its kind and size, and once they are filled in its byte order."""

    def __init__(self, kind: str, *_: Any):
        self.kind, self.order = kind, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _NumpyNumber:
    """Stands for a NumPy number, and is a Python number; texts, dates and objects are nothing here."""

    def __new__(cls, dtype: _NumpyDtype, content: bytes) -> Any:
        kind = f"{dtype.order}{dtype.kind}"
        if not re.fullmatch(r"[<>=|][fiub]\d{1,2}", kind):
            return _Inert()
        (number,) = np.frombuffer(content, dtype=kind)
        return number.item()


def _standing_for(name: str, what: type) -> type:
    module, _, last = name.rpartition(".")
    return type(last, (what,), {"__module__": module})


_STAND_INS = [
    _standing_for(name, what)
    for names, what in (
        (INERT, _Inert),
        (INERT_MAPPINGS, _InertMapping),
        (("numpy.dtype",), _NumpyDtype),
        (NUMPY_NUMBERS, _NumpyNumber),
    )
    for name in names
]


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be opened: {error.strerror}. Is the run still writing or deleting files?"
        ) from error
    if size == 0:
        raise UserError(f"checkpoint {path} is empty.{_being_written(path)} Copy it again from where the run wrote it.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else (read_pickle(path), {})


def read_pickle(path: Path) -> Mapping[str, Any]:
    """What a file that torch saved holds, read without executing anything; NumPy's numbers in it become Python's.

    Raises:
        UserError: It asks for code, is damaged, or holds no dictionary.
    """
    try:
        # timm's train.py stores its arguments as a Namespace: plain data, allowed by name
        with (
            torch.serialization.safe_globals([argparse.Namespace, *_STAND_INS]),
            warnings.catch_warnings(),
        ):
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
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, _own_provenance(metadata)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_not_a_checkpoint(path)) from error


def _own_provenance(metadata: dict[str, str]) -> dict[str, str]:
    """What a selection's ``encoder.safetensors`` says of itself, beside the metadata of others."""
    try:
        own = json.loads(metadata.get("mtl_nnunet", "{}"))
    except ValueError:
        return metadata
    return {**metadata, **own} if isinstance(own, dict) else metadata


def _weights_held(content: Mapping[Any, Any], which: str, path: Path) -> tuple[Mapping[Any, Any], str | None]:
    """The state dict inside a checkpoint, and under which key it lies."""
    pair = [k for k in PAIR if isinstance(content.get(k), Mapping)]
    if len(pair) == len(PAIR) or (pair and not any(isinstance(content.get(k), Mapping) for k in WEIGHT_KEYS)):
        return {f"{k}.{n}" if isinstance(n, str) else n: v for k in pair for n, v in content[k].items()}, None
    if which == "ema":
        for key in EMA_KEYS:
            if isinstance(content.get(key), Mapping):
                return content[key], key
    for key in WEIGHT_KEYS:
        if isinstance(content.get(key), Mapping):
            return content[key], key
    return content, None


def _holds_values(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
    )


def _architecture(content: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    return (
        timm_name(content.get("arch"))
        or next((name for key in SETTINGS_KEYS if (name := architecture_in(content.get(key)))), None)
        or timm_name(content.get("architecture"))
        or timm_name(metadata.get("architecture"))
    )


def _kind(path: Path, content: Mapping[str, Any], scheme: str | None, left_out: list[str]) -> str:
    beside = path.parent
    if (beside / "trainer_state.json").is_file():
        return "Hugging Face Trainer"
    if (beside / "random_states_0.pkl").is_file():
        return "Accelerate"
    if scheme is not None:
        return scheme
    if "pytorch-lightning_version" in content:
        return "Lightning"
    if any(mark in name for name in left_out for mark in MARKS_OF_HEADS):
        return "self-supervised"
    if "arch" in content:
        return "timm train.py" if "best_acc1" not in content else "PyTorch ImageNet example"
    if "lr_scheduler" in content and "model" in content:
        return "torchvision references"
    return "safetensors" if path.suffix == ".safetensors" else "state dict"


def _whole_number(stated: Any) -> int | None:
    # a bool is no epoch, and Python refuses to read a text of thousands of digits
    if type(stated) is int and 0 <= stated < 10**9:
        return stated
    text = stated if isinstance(stated, str) else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _no_weights(path: Path, said: str) -> str:
    return (
        f"checkpoint {path} holds no weights that can be read ({said}). "
        f"Expected a state dict, alone or under one of: {listed(list((*WEIGHT_KEYS, *PAIR)))}."
    )


def _not_a_checkpoint(path: Path) -> str:
    return (
        f"checkpoint {path} cannot be read: it is truncated, damaged or not a PyTorch or safetensors file."
        f"{_being_written(path)} Copy it again from where the run wrote it, or leave it out."
    )


def _being_written(path: Path) -> str:
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return ""
    return (
        f" It was changed {age:.0f} s ago: if the run is still writing it, try again."
        if 0 <= age < STILL_WRITING_SECONDS
        else ""
    )

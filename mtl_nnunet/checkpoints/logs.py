"""What a run says beside its checkpoints: architecture, accuracy by epoch, and how steps and epochs go together."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtl_nnunet.checkpoints.file import architecture_in, planned_epochs_in, timm_name

SETTINGS = ("args.yaml", "hparams.yaml", "config.json")
# names of the columns that hold validation accuracy: in per cent (timm; DeiT's and ConvNeXt's code), and by users' choice
# (Lightning's CSVLogger, Hugging Face's Trainer)
PER_CENT = ("eval_top1", "test_acc1")
ACCURACY = (
    *PER_CENT,
    *("val_acc", "val/acc", "val_accuracy", "val/accuracy", "val_top1", "val/top1", "val_acc1", "val/acc1"),
    *("eval_accuracy", "eval_top1_accuracy"),
)


@dataclass(frozen=True)
class RunLog:
    """What a run's own files say.

    Attributes:
        architecture: timm's name of the network, or None.
        accuracy: Validation top-1 in per cent by epoch.
        accuracy_by_step: The same by optimiser step.
        epochs_per_step: Hugging Face's Trainer counts steps; None elsewhere.
        planned_epochs: How many epochs the run is to have, or None.
    """

    architecture: str | None = None
    accuracy: Mapping[int, float] = field(default_factory=dict)
    accuracy_by_step: Mapping[int, float] = field(default_factory=dict)
    epochs_per_step: float | None = None
    planned_epochs: int | None = None

    def epoch_of(self, step: int) -> int | None:
        """The epoch that a step ends, or None where it lies inside one.

        Examples:
            >>> [RunLog(epochs_per_step=1 / 500).epoch_of(step) for step in (500, 750)]
            [1, None]
        """
        if self.epochs_per_step is None:
            return None
        epoch = step * self.epochs_per_step
        return round(epoch) if abs(epoch - round(epoch)) < 1e-3 else None


def read_run_log(folder: Path, last: Path | None = None) -> RunLog:
    """What the files of a run say; files that cannot be read say nothing.

    Args:
        folder: Where its checkpoints lie.
        last: Its latest checkpoint, whose folder holds the whole log of Hugging Face's Trainer.
    """
    # Lightning writes its logs one or two folders up
    places = [folder, *([folder.parent] if folder.name == "checkpoints" else [])]
    trainer = _json(last.parent / "trainer_state.json") if last is not None else {}
    by_epoch: dict[int, tuple[str, float]] = {}
    by_step: dict[int, tuple[str, float]] = {}
    for place in places:
        for row in (*_rows(place / "summary.csv"), *_rows(place / "metrics.csv"), *_lines(place / "log.txt")):
            _note(row, by_epoch, by_step)
    for row in trainer.get("log_history", []) if isinstance(trainer.get("log_history"), list) else []:
        if isinstance(row, Mapping):
            _note(row, by_epoch, by_step)
    ended, steps = _number(trainer.get("epoch")), _number(trainer.get("global_step"))
    stated = [_settings(place / name) for place in (*places, *_folder_of(last)) for name in SETTINGS]
    return RunLog(
        architecture=next((name for settings in stated if (name := _architecture(settings))), None),
        accuracy=_in_per_cent(by_epoch),
        accuracy_by_step=_in_per_cent(by_step),
        epochs_per_step=ended / steps if ended and steps else None,
        planned_epochs=next((n for settings in (*stated, trainer) if (n := planned_epochs_in(settings))), None),
    )


def _folder_of(file: Path | None) -> list[Path]:
    return [] if file is None else [file.parent]


def _settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return settings if isinstance(settings, Mapping) else {}


def _architecture(settings: Mapping[str, Any]) -> str | None:
    return architecture_in(settings) or timm_name(settings.get("architecture"))


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.is_file():
        try:
            with open(path, newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)
        except (OSError, UnicodeDecodeError, csv.Error):
            return


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.is_file():
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    if isinstance(row, Mapping):
                        yield row
        except (OSError, ValueError, RecursionError):
            return


def _note(
    row: Mapping[str, Any], by_epoch: dict[int, tuple[str, float]], by_step: dict[int, tuple[str, float]]
) -> None:
    # a run that diverged logs NaN
    logged = next(((key, value) for key in ACCURACY if (value := _number(row.get(key))) is not None), None)
    if logged is None:
        return
    for column, kept in (("epoch", by_epoch), ("step", by_step)):
        at = _number(row.get(column))
        if at is not None and at == round(at):
            kept[round(at)] = logged


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _in_per_cent(logged: Mapping[int, tuple[str, float]]) -> dict[int, float]:
    # a timm run below 1 % is no run of shares
    are_shares = all(key not in PER_CENT and value <= 1 for key, value in logged.values())
    return {at: 100 * value if are_shares else value for at, (_, value) in logged.items()}

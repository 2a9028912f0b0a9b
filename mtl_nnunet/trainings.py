"""What nnU-Net left of a training: its curves, its validation, and what it was trained from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.checkpoints.file import read_pickle
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import read_json
from mtl_nnunet.plans import ITERATIONS_KEY, RECORD_KEY, resolved_configuration
from mtl_nnunet.validation import Validation, read_validation

# in the order in which nnU-Net goes on from them
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
LOGS = "training_log_*.txt"
# what trainings from a selection are held against
YARDSTICKS = ("MTLTrainerScratch", "nnUNetTrainer")
# in the record of what MTLTrainer trained, and of nothing else
TRAINED_WITH = "trained_with"
LENGTH = r"(_\d+epochs?)?"
MOST_OTHERS = 5
# of a curve, in a table
ROWS = 11


@dataclass(frozen=True)
class Curves:
    """What nnU-Net logged of each epoch; NaN where it did not, each of shape (E,).

    Attributes:
        train_loss: Mean over the epoch's training batches.
        val_loss: Mean over its validation batches.
        pseudo_dice: nnU-Net's mean Dice over the foreground of its validation patches.
        ema: Its moving average, by which nnU-Net keeps the best checkpoint.
        learning_rate: As nnU-Net logs it.
        seconds: How long the epoch took.
        source: Name of the file that it was read from.
    """

    train_loss: np.ndarray
    val_loss: np.ndarray
    pseudo_dice: np.ndarray
    ema: np.ndarray
    learning_rate: np.ndarray
    seconds: np.ndarray
    source: str

    @property
    def num_epochs(self) -> int:
        """How many epochs are finished."""
        return len(self.train_loss)

    @property
    def best_epoch(self) -> int | None:
        """Where the moving average was highest; None where none was logged."""
        return None if np.isnan(self.ema).all() else int(np.nanargmax(self.ema))

    @property
    def best(self) -> float:
        """Its highest value."""
        return float("nan") if self.best_epoch is None else float(self.ema[self.best_epoch])

    @property
    def median_seconds(self) -> float:
        """How long an epoch took."""
        return float("nan") if np.isnan(self.seconds).all() else float(np.nanmedian(self.seconds))

    @property
    def rows(self) -> list[tuple[int, tuple[float, ...]]]:
        """Some epochs, evenly spread, the first and the last among them, with what was logged of each but its time."""
        epochs = np.unique(np.linspace(0, self.num_epochs - 1, ROWS).round().astype(int))
        columns = (self.train_loss, self.val_loss, self.pseudo_dice, self.ema, self.learning_rate)
        return [(int(e), tuple(float(c[e]) for c in columns)) for e in epochs]


@dataclass(frozen=True)
class Training:
    """One fold of one model in nnUNet_results.

    Attributes:
        model: Folder of the model.
        trainer: nnU-Net's name of its trainer.
        plans_name: nnU-Net's name of its plans.
        configuration: E.g. ``2d``.
        fold: A number or ``all``.
        plans: That the model was trained with.
        dataset: nnU-Net's dataset.json of the model.
        curves: None where no epoch was logged.
        validation: None where it was not validated.
        finished: Whether all epochs are done.
        notes: What is to be said of how it was read.
    """

    model: Path
    trainer: str
    plans_name: str
    configuration: str
    fold: str
    plans: dict[str, Any]
    dataset: dict[str, Any]
    curves: Curves | None
    validation: Validation | None
    finished: bool
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """nnU-Net's name of the model."""
        return self.model.name

    @property
    def dataset_name(self) -> str:
        """nnU-Net's name of the dataset."""
        return self.model.parent.name

    @property
    def record(self) -> dict[str, Any] | None:
        """Of the selection that it was trained from; None for other trainings."""
        found: dict[str, Any] | None = self.plans.get(RECORD_KEY)
        return found

    @property
    def num_epochs(self) -> int:
        """How many epochs are finished."""
        return self.curves.num_epochs if self.curves else 0

    @property
    def iterations(self) -> int | None:
        """Training iterations per epoch, where they are known; nnU-Net itself does not record them."""
        if re.fullmatch(f"nnUNetTrainer{LENGTH}", self.trainer):
            return 250
        recorded = (self.record or {}).get(ITERATIONS_KEY)
        return recorded if isinstance(recorded, int) else None

    @cached_property
    def batch(self) -> str:
        """Size of a patch and of a batch, in words."""
        try:
            resolved = resolved_configuration(self.plans, self.configuration)
            return f"{' × '.join(str(s) for s in resolved.patch_size)}, {resolved.batch_size}"
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError):
            return "not stated"


def find_model(dataset_name: str, trainer: str, plans_name: str, configuration: str) -> Path:
    """The folder of a model in nnUNet_results.

    Raises:
        UserError: ``nnUNet_results`` is not set, or there is no such model.
    """
    above = results_folder(dataset_name)
    model = above / f"{trainer}__{plans_name}__{configuration}"
    if not model.is_dir():
        there = (
            sorted(f.name for f in above.iterdir() if f.is_dir() and f.name.count("__") == 2) if above.is_dir() else []
        )
        raise UserError(
            f"there is no model {model.name} in {above}: {f'there are {listed(there)}' if there else 'nothing was trained there'}. Check "
            "-d, -tr, -p and -c."
        )
    return model


def results_folder(dataset_name: str) -> Path:
    """nnU-Net's folder of the models of a dataset.

    Raises:
        UserError: ``nnUNet_results`` is not set.
    """
    root = os.environ.get("nnUNet_results")
    if not root:
        raise UserError("the environment variable nnUNet_results is not set. Set it as nnU-Net's documentation says.")
    return Path(root, dataset_name)


def read_training(model: Path, fold: int | str) -> Training:
    """A fold of a model, as far as it came.

    Raises:
        UserError: No such fold, a model without its plans, or nothing in it that could be shown.
    """
    trainer, plans_name, configuration = model.name.split("__")
    folder = model / f"fold_{fold}"
    if not folder.is_dir():
        there = sorted(f.name.removeprefix("fold_") for f in model.glob("fold_*") if f.is_dir())
        raise UserError(
            f"{model} has no fold {fold}: {f'it has {listed(there)}' if there else 'no fold was begun'}. Pass one of them with -f, or train it."
        )
    plans, dataset = (
        read_json(model / name, "what nnU-Net wrote beside the model") for name in ("plans.json", "dataset.json")
    )
    curves, record, notes = _read_curves(folder)
    if record:
        # of this fold: plans.json is of the one that was begun last
        plans[RECORD_KEY] = record
    if TRAINED_WITH not in plans.get(RECORD_KEY, {}):
        # plans that name a selection, trained by a trainer that does not load it
        plans.pop(RECORD_KEY, None)
    summary = folder / "validation" / "summary.json"
    validation = read_validation(summary, str(dataset.get("file_ending", ""))) if summary.is_file() else None
    final, latest = (folder / name for name in CHECKPOINTS[:2])
    finished = final.is_file() or (validation is not None and not latest.is_file())
    if final.is_file() and latest.is_file():
        notes.append(
            f"{latest.name} lies beside {final.name}: the finished training is shown, not the one that was begun after it."
        )
    if validation is not None and not finished:
        notes.append("The validation is of an earlier training in this folder and is not shown.")
        validation = None
    if validation is not None and final.is_file() and summary.stat().st_mtime < final.stat().st_mtime:
        notes.append(
            f"The validation is older than {final.name}: if the fold was trained again since, it is of the training before, and nnUNetv2_train with "
            "--val replaces it."
        )
    if curves is None and validation is None:
        said = f": {notes[0]}" if notes else ": no epoch is finished yet."
        raise UserError(f"nothing can be shown of {folder}{said} Pass another fold, or train it.")
    return Training(
        model, trainer, plans_name, configuration, str(fold), plans, dataset, curves, validation, finished, tuple(notes)
    )


def find_others(training: Training) -> tuple[list[Training], list[str]]:
    """Trainings of the same dataset, configuration and fold that this one can be held against.

    Returns:
        From random weights and of nnU-Net's own trainer, of as many epochs and of the same plans first, five at most; and what
        is to be said of those that were left out.
    """
    of_yardstick = re.compile(f"({'|'.join(YARDSTICKS)}){LENGTH}")
    found: list[tuple[tuple[Any, ...], Path]] = []
    for model in sorted(training.model.parent.iterdir()):
        parts = model.name.split("__")
        if len(parts) != 3 or parts[2] != training.configuration or model == training.model:
            continue
        matched = of_yardstick.fullmatch(parts[0])
        if matched is None or not _was_begun(model / f"fold_{training.fold}"):
            continue
        as_long = matched[2] == _length_of(training.trainer)
        order = (not as_long, parts[1] != training.plans_name, YARDSTICKS.index(matched[1]), model.name)
        found.append((order, model))
    others: list[Training] = []
    left_out: list[str] = []
    for _, model in sorted(found, key=lambda f: f[0]):
        try:
            other = read_training(model, training.fold)
        except UserError as error:
            left_out.append(f"{model.name} is left out: {error}")
            continue
        if len(others) < MOST_OTHERS:
            others.append(other)
        else:
            left_out.append(f"{model.name} is there too, and left out for want of room: name it with -against.")
    return others, left_out


def find_named(training: Training, names: Iterable[str]) -> list[Training]:
    """The trainings of ``-against``.

    Args:
        training: That they are held against.
        names: ``TRAINER``, ``TRAINER__PLANS`` or ``TRAINER__PLANS__CONFIGURATION``; plans are by default those of the training, else
            the only ones that the trainer was used with.

    Raises:
        UserError: No such model, several, the training itself, more than five, or one that cannot be shown.
    """
    found: list[Training] = []
    for name in dict.fromkeys(names):
        trainer, *more = name.strip("/").split("__")
        if len(more) > 2:
            raise UserError(
                f"-against {name} is no model: expected TRAINER, TRAINER__PLANS or TRAINER__PLANS__CONFIGURATION."
            )
        configuration = more[1] if len(more) == 2 else training.configuration
        plans_name = more[0] if more else _plans_used(training, trainer, configuration)
        model = find_model(training.dataset_name, trainer, plans_name, configuration)
        if model == training.model:
            raise UserError(f"-against {name} is the training itself. Name another one, or choose with -tr and -p.")
        found.append(read_training(model, training.fold))
    if len(found) > MOST_OTHERS:
        raise UserError(
            f"-against names {len(found)} trainings, and {MOST_OTHERS} can be shown beside one. Name fewer."
        )
    return found


def labels_of(trainings: Iterable[Training]) -> list[str]:
    """What to call each: its trainer, and what else tells it from the others."""
    known = list(trainings)
    trainers = [t.trainer for t in known]
    pairs = [(t.trainer, t.plans_name) for t in known]
    return [
        t.trainer
        if trainers.count(t.trainer) == 1
        else f"{t.trainer}, {t.plans_name}"
        if pairs.count((t.trainer, t.plans_name)) == 1
        else t.name
        for t in known
    ]


def _length_of(trainer: str) -> str | None:
    found = re.search(r"_\d+epochs?$", trainer)
    return found[0] if found else None


def _plans_used(training: Training, trainer: str, configuration: str) -> str:
    plans = sorted(
        f.name.split("__")[1]
        for f in training.model.parent.glob("*__*__*")
        if f.name.split("__")[::2] == [trainer, configuration]
    )
    if training.plans_name in plans or not plans:
        return training.plans_name
    if len(plans) > 1:
        raise UserError(
            f"{trainer} was used with several plans ({listed(plans)}). Say which: -against {trainer}__{plans[0]}."
        )
    return plans[0]


def _was_begun(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CHECKPOINTS) or any(folder.glob(LOGS))


def _read_curves(folder: Path) -> tuple[Curves | None, dict[str, Any] | None, list[str]]:
    """Curves, the record of the selection in the checkpoint that they are from, and what is to be said."""
    notes: list[str] = []
    curves, record = None, None
    for name in CHECKPOINTS:
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = read_pickle(file)
            curves, record = _curves_of(content.get("logging"), file), _record_in(content)
        except UserError as error:
            notes.append(str(error))
            continue
        if name == CHECKPOINTS[0]:
            return curves, record, notes
        break
    # nnU-Net's own trainers write the latest checkpoint every 50 epochs, and the best one ends where it was best
    logs = sorted(folder.glob(LOGS), key=_begun_at)
    logged = _curves_of_logs(logs)
    if logged is not None and logged.num_epochs > (curves.num_epochs if curves else 0):
        there = "there is no checkpoint" if curves is None else f"{curves.source} ends at epoch {curves.num_epochs - 1}"
        notes.append(f"The curves are read from {listed([f.name for f in logs], 1)}, in four digits: {there}.")
        return logged, record, notes
    return curves, record, notes


def _record_in(checkpoint: Any) -> dict[str, Any] | None:
    try:
        return dict(checkpoint["init_args"]["plans"][RECORD_KEY])
    except (KeyError, TypeError, ValueError):
        return None


def _curves_of(logged: Any, file: Path) -> Curves | None:
    """From what nnU-Net's logger hands to a checkpoint: a list a quantity, of one value an epoch."""
    try:
        known = {k: v for k, v in dict(logged).items() if isinstance(v, list)}
        lists = [known[k] for k in ("train_losses", "val_losses", "mean_fg_dice")]
        # as nnU-Net's own figure has it: an epoch that was not ended does not count
        ends = known.get("epoch_end_timestamps")
        number = min(map(len, lists if ends is None else [*lists, ends]))

        def column(name: str) -> np.ndarray:
            values = known.get(name, [])[:number]
            return np.array([*values, *[np.nan] * (number - len(values))], dtype=float)

        curves = Curves(
            train_loss=column("train_losses"),
            val_loss=column("val_losses"),
            pseudo_dice=column("mean_fg_dice"),
            ema=column("ema_fg_dice"),
            learning_rate=column("lrs"),
            seconds=column("epoch_end_timestamps") - column("epoch_start_timestamps"),
            source=file.name,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} holds no curves as nnU-Net v2 logs them ({error!r}). Expected a checkpoint that nnUNetv2_train wrote."
        ) from error
    return curves if number else None


def _begun_at(log: Path) -> tuple[int, ...]:
    # training_log_2026_1_9_10_5_3.txt: without leading zeros, so names do not sort by time
    return tuple(int(n) for n in re.findall(r"\d+", log.stem))


def _curves_of_logs(logs: Iterable[Path]) -> Curves | None:
    """From the texts that nnU-Net writes for people; a fold that went on has several."""
    said: dict[int, dict[str, Any]] = {}
    name = ""
    for log in logs:
        epoch: dict[str, Any] = {}
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            stamped = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): (.*)", line)
            text = stamped[2].strip() if stamped else ""
            if begun := re.fullmatch(r"Epoch (\d+)", text):
                # what an earlier log says of this and later epochs did not last
                said = {e: known for e, known in said.items() if e < int(begun[1])}
                epoch = said[int(begun[1])] = {}
                name = log.name
            for key, pattern in (
                ("lr", r"Current learning rate: (\S+)"),
                ("train", r"train_loss (\S+)"),
                ("val", r"val_loss (\S+)"),
                ("dice", r"Pseudo dice \[(.*)\]"),
                ("seconds", r"Epoch time: (\S+) s"),
            ):
                if found := re.fullmatch(pattern, text):
                    epoch[key] = [
                        float(n) for n in re.findall(r"[-+]?(?:nan|inf|\d[\d.]*(?:e[-+]?\d+)?)(?![\d(])", found[1])
                    ]
    done: list[dict[str, Any]] = []
    while (epoch := said.get(len(done), {})).get("seconds"):
        done.append(epoch)
    if not done:
        return None

    def column(key: str) -> np.ndarray:
        return np.array([np.nanmean(e[key]) if np.isfinite(e.get(key, [np.nan])).any() else np.nan for e in done])

    dice = column("dice")
    ema = [float(dice[0])]
    for value in dice[1:]:
        ema.append(0.9 * ema[-1] + 0.1 * float(value))
    return Curves(column("train"), column("val"), dice, np.array(ema), column("lr"), column("seconds"), name)

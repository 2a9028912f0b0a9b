"""Scores of a pretraining while it goes on: each checkpoint once, on the same slices and views, kept over restarts."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from mtl_nnunet.bootstrap import interval
from mtl_nnunet.cache import ResultCache, Scored
from mtl_nnunet.checkpoints import Checkpoint, ages, inferred_architecture
from mtl_nnunet.checkpoints.file import timm_name
from mtl_nnunet.checkpoints.names import encoder_tensors
from mtl_nnunet.decision import Rule
from mtl_nnunet.embedding import Target, make_target
from mtl_nnunet.encoder import TimmEncoder, random_encoder
from mtl_nnunet.errors import AssumedWarning, UserError, listed
from mtl_nnunet.figures import draw_ranking, save_png
from mtl_nnunet.files import to_json, write_text, written_atomically
from mtl_nnunet.generators import kept
from mtl_nnunet.ranking import RANDOM, Ranking, loaded_encoder, ranking_of, score_on_target, what_decides
from mtl_nnunet.scores import Score, parse_scores
from mtl_nnunet.select import scores_of_the_chooser
from mtl_nnunet.slices import Slices
from mtl_nnunet.stopping import Advice, StopRule, decide

FORMAT = "mtl-nnunet watch 1"
# of torchrun, Lightning, SLURM and jsrun, in the order in which Lightning asks
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
SETTINGS_FILE, HISTORY_FILE, CURVE_FILE, STOP_FILE = "watch.json", "history.jsonl", "curve.png", "STOP"
RESULTS_FOLDER, LOCK_FILE = "results", "lock"
# where a description of what decides a score goes by another name on the command line
OPTIONS = {
    "slices": "the slices read of the dataset",
    "code": "the code of the scores",
    "versions": "the versions of packages",
}


@dataclass(frozen=True)
class Seen:
    """A checkpoint that was scored.

    Attributes:
        name: Of its file, or of its epoch where there is no file.
        epoch: As the run counts, or None.
        step: Optimiser step, or None.
        content_key: What tells its weights from any other's.
        scores: By score, as typed, the value on all patients.
        logged_accuracy: ImageNet top-1 in per cent that the run logged, or None.
        seconds: What scoring took; 0 where the result was known.
        scored_at: When, UTC.
        said: What was decided then: whether to stop, by which rule, why, the expected gain in Dice points, and the plan of the run.
        stat: Size in bytes and time of the last change in ns of its file, or None.
    """

    name: str
    epoch: int | None
    step: int | None
    content_key: str
    scores: dict[str, float]
    logged_accuracy: float | None
    seconds: float
    scored_at: str
    said: dict[str, Any]
    stat: tuple[int, int] | None = None

    @property
    def as_checkpoint(self) -> Checkpoint:
        """For tables and figures, which read no weights."""
        return Checkpoint(Path(self.name), self.epoch, None, "", self.logged_accuracy, self.step)


class Monitor:
    """Scores the checkpoints of one running pretraining and says when to stop it.

    It keeps in its folder what the same command or script needs to go on later: ``watch.json`` (what decides the scores),
    ``history.jsonl`` (one line a checkpoint), ``results/`` (scores on resampled patients), ``curve.png``. One process at
    a time can use the folder.

    Args:
        folder: Where to write; made when first needed.
        slices: The target; with labels where a score needs them.
        scores: By which scores; patience goes by the first. What the chooser reads is computed beside them unless the rule is ``patience``.
        encoder: timm's name of the architecture; None: as checkpoint or module say.
        rule: When to stop.
        planned_epochs: How many epochs the run is to have; None where that is not known.
        first_epoch: What the run calls its first epoch, 0 or 1.
        dataset: Name of the target, for titles.
        seed: Of views, pixels, bootstrap and random initialisation.
        device: Where the encoder is scored.
        precision: ``fp32``, ``bf16``, or ``auto``.
        cache: Where results are also looked up and kept, so that a selection after the run finds them.
        about: Further settings that must be the same after a restart.

    Raises:
        UserError: Scores that are not known.
    """

    def __init__(
        self,
        folder: str | Path,
        slices: Slices,
        scores: Score | str | Sequence[Score | str] = "contrastive",
        *,
        encoder: str | None = None,
        rule: StopRule | None = None,
        planned_epochs: int | None = None,
        first_epoch: int = 0,
        dataset: str = "target",
        seed: int = 0,
        device: str = "cpu",
        precision: str = "auto",
        cache: ResultCache | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self.slices = slices
        self.rule = rule or StopRule()
        self.scores = with_scores_of_the_chooser(parse_scores(scores), self.rule)
        self.encoder = self._named = encoder
        self.planned_epochs = planned_epochs
        self.first_epoch = first_epoch
        self.dataset = dataset
        self.seed = seed
        self.device = device
        self.precision = precision
        self.cache = cache
        self.about = dict(about or {})
        self.history: list[Seen] = []
        self._results: dict[tuple[str, str], Scored] = {}
        self._target: Target | None = None
        self._describe: Callable[[Checkpoint | None, Score], dict[str, Any]] | None = None
        self._lock: IO[str] | None = None

    def __enter__(self) -> Monitor:
        """Open the folder; in a training of several processes only the first one does, since it alone scores."""
        if _is_first_process():
            self.open()
        return self

    def __exit__(self, *_: object) -> None:
        """Let others use the folder."""
        self.close()

    def open(self) -> None:
        """Take the folder, and read what was scored before.

        Raises:
            UserError: Another process uses it, it cannot be written, or what decides the scores has changed.
        """
        if self._lock is None:
            self._lock = locked(self.folder / LOCK_FILE, f"a watcher of {self.folder}")
            try:
                remove_leftovers(self.folder, [SETTINGS_FILE, HISTORY_FILE, CURVE_FILE, STOP_FILE])
                remove_leftovers(self.folder / RESULTS_FOLDER)
                self._resume()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Let others use the folder; ``see`` opens it again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def _is_timms(self) -> bool:
        return timm_name(self.encoder) is not None

    @property
    def last_epoch(self) -> int | None:
        """Number of the last planned epoch as the run counts, or None."""
        return None if self.planned_epochs is None else self.planned_epochs - 1 + self.first_epoch

    def see(self, model: nn.Module, epoch: int, planned_epochs: int | None = None) -> bool:
        """Score a model in memory after an epoch of its training; it, and all random generators, are left as they are.

        Args:
            model: A timm network, alone or inside another module or a wrapper; a ``TimmEncoder``; or any module that turns images
                (N, C, H, W) into feature maps, of which a copy is scored.
            epoch: As the run counts.
            planned_epochs: How many epochs the run is to have, where the monitor was not told.

        Returns:
            Whether the training should stop.

        Raises:
            UserError: A model that cannot be scored, or settings that have changed since an earlier part of the run.
        """
        if self.planned_epochs is None:
            self.planned_epochs = planned_epochs
        with undisturbed():
            self.open()
            name = self._named or (self.encoder if self._is_timms else None)
            encoder = copied_encoder(model, name, self.slices.images.shape[1], self.seed, f"epoch {epoch}")
            self._settle_encoder(encoder.name if isinstance(encoder, TimmEncoder) else type(encoder).__name__)
            seen = self._see(f"epoch {epoch}", epoch, None, weights_sha256(encoder), None, lambda: encoder)
        if self.rule.name == "auto" and seen.said["rule"] == "patience":
            for said in seen.said["warnings"][:1]:
                # Python shows the same warning of the same line once
                warnings.warn(said, AssumedWarning, stacklevel=2)
        return bool(seen.said["stop"])

    def see_checkpoint(
        self, checkpoint: Checkpoint, name: str | None = None, stat: tuple[int, int] | None = None
    ) -> Seen:
        """Score a checkpoint file.

        Args:
            checkpoint: With its architecture, unless the monitor knows it.
            name: What to call it; default its file's name.
            stat: Size and time of the last change of the run's file, by which it is known after a restart.

        Raises:
            UserError: It cannot be read, does not fit, or settings have changed since an earlier part of the run.
        """
        self.open()
        encoder = self.encoder or checkpoint.architecture
        if encoder is None:
            raise UserError(
                f"{checkpoint.path} does not say which network it is of. Pass timm's name of it: -encoder NAME."
            )
        self._settle_encoder(encoder)
        channels = int(self.slices.images.shape[1])
        return self._see(
            name or checkpoint.path.name,
            checkpoint.epoch,
            checkpoint.step,
            checkpoint.content_key,
            checkpoint.logged_accuracy,
            lambda: loaded_encoder(checkpoint, encoder, channels, self.seed),
            stat,
        )

    def advice(self) -> Advice:
        """What the rule says of the checkpoints so far; ``best`` is an index into ``history``.

        Raises:
            UserError: None was scored yet, or the rule cannot be applied to them.
        """
        self.open()
        return self._decided(self.history)

    def ranking(self) -> Ranking:
        """The first score of the checkpoints so far, in the order of ``history``, with the one to start from as the choice."""
        self.open()
        first = self.scores[0]
        candidates = [*(s.as_checkpoint for s in self.history), None]
        results = [self._results[s.content_key, first.text] for s in self.history]
        nothing = Scored(float("nan"), np.full_like(results[0].sample, np.nan))
        results.append(self._results.get((RANDOM, first.text), nothing))
        patients = len(self.slices.patients_behind(first.labels))
        ranking = ranking_of(first, self.encoder or "encoder", candidates, results, Rule(), patients)
        return replace(ranking, choice=self.advice().best)

    def interval_of(self, seen: Seen) -> tuple[float, float]:
        """95 % interval over patients of a checkpoint's first score."""
        first = self.scores[0]
        scored = self._results[seen.content_key, first.text]
        return interval(scored.value, scored.sample, len(self.slices.patients_behind(first.labels)))

    def draw(self) -> Path:
        """Draw the curve so far, atomically."""
        path = self.folder / CURVE_FILE
        with written_atomically(path) as temporary:
            save_png(draw_ranking(self.ranking(), self.dataset), temporary)
        return path

    def _see(
        self,
        name: str,
        epoch: int | None,
        step: int | None,
        content_key: str,
        logged_accuracy: float | None,
        load: Callable[[], nn.Module],
        stat: tuple[int, int] | None = None,
    ) -> Seen:
        known = next((s for s in self.history if s.content_key == content_key), None)
        if known is not None:
            return known
        if self._is_timms and RANDOM not in {key for key, _ in self._results}:
            self._score(RANDOM, self._random)
        seconds = self._score(content_key, load)
        values = {s.text: self._results[content_key, s.text].value for s in self.scores}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        new = Seen(name, epoch, step, content_key, values, logged_accuracy, round(seconds, 3), now, {}, stat)
        before = [s for s in self.history if not _is_same_place(s, new)]
        replaced = next((s for s in self.history if s not in before), None)
        if replaced is not None and replaced.scores == new.scores:
            # the same weights in other bytes
            return replaced
        if replaced is not None:
            warnings.warn(
                f"{name} holds other weights than when it was scored before: its new score takes the place of the old one.",
                AssumedWarning,
                stacklevel=3,
            )
        history = _in_order([*before, new])
        plan = {"planned_epochs": self.planned_epochs, "first_epoch": self.first_epoch}
        new = replace(new, said={**_in_words(self._decided(history)), **plan})
        self.history = _in_order([*before, new])
        self._write()
        return new

    def _score(self, content_key: str, load: Callable[[], nn.Module]) -> float:
        assert self._describe is not None
        own = ResultCache(self.folder / RESULTS_FOLDER)
        # of another module the name does not tell what it computes
        stores = [own, *([self.cache] if self.cache is not None and self._is_timms else [])]
        contents = {s: {**self._describe(None, s), "checkpoint": content_key} for s in self.scores}
        found = {s: next((r for store in stores if (r := store.read(contents[s]))), None) for s in self.scores}
        missing = [s for s in self.scores if found[s] is None]
        started = time.monotonic()
        if missing:
            encoder = load()
            if self._target is None:
                self._target = make_target(self.slices, self.scores, self.seed)
                # views are made once, and are no part of what one more checkpoint costs
                started = time.monotonic()
            computed = score_on_target(encoder, self._target, missing, self.seed, self.device, self.precision)
            found.update(zip(missing, computed, strict=True))
        seconds = time.monotonic() - started if missing else 0.0
        for score, result in found.items():
            assert result is not None
            for store in stores:
                store.keep(contents[score], result)
            self._results[content_key, score.text] = result
        return seconds

    def _random(self) -> nn.Module:
        assert self.encoder is not None
        return random_encoder(self.encoder, int(self.slices.images.shape[1]), self.seed)

    def _decided(self, history: Sequence[Seen]) -> Advice:
        signs = {s.text: 1.0 if s.higher_is_better else -1.0 for s in self.scores}
        first = self.scores[0]
        mine = [self._results[s.content_key, first.text] for s in history]
        # expected gains were learned by epochs, and say nothing of steps
        by_epochs = self.rule.name != "patience" and all(s.epoch is not None for s in history)
        at = [s.epoch for s in history] if by_epochs else ages([s.as_checkpoint for s in history])
        return decide(
            self.rule,
            at,
            [signs[first.text] * r.value for r in mine],
            np.stack([signs[first.text] * r.sample for r in mine]) if mine else np.zeros((0, 1)),
            len(self.slices.patients_behind(first.labels)),
            {
                s.text: [signs[s.text] * seen.scores[s.text] for seen in history]
                for s in self.scores
                if s.has_default_views
            },
            self.last_epoch if all(s.epoch is not None for s in history) else None,
            self.encoder,
        )

    def _settle_encoder(self, encoder: str) -> None:
        if self._describe is not None and self.encoder == encoder:
            return
        if self._describe is not None:
            raise UserError(
                f"a checkpoint of '{encoder}' among those of '{self.encoder}': one run has one network. Watch each run by itself."
            )
        self.encoder = encoder
        self._describe = what_decides(self.slices, encoder, self.seed, self.device, self.precision)
        write_text(self.folder / SETTINGS_FILE, to_json(self._settings()))

    def _settings(self) -> dict[str, Any]:
        assert self._describe is not None
        deciding = {s.text: self._describe(None, s) for s in self.scores}
        return {"format": FORMAT, "dataset": self.dataset, **self.about, "scores": deciding}

    def _resume(self) -> None:
        settings = _read_settings(self.folder / SETTINGS_FILE)
        if settings is None:
            return
        before = next(iter(settings["scores"].values()))["encoder"]
        if self.encoder is None or self._describe is None:
            self.encoder = self.encoder or before
            self._describe = what_decides(self.slices, self.encoder, self.seed, self.device, self.precision)
        # as JSON, so that what was read and what is now are of the same types
        _refuse_changes(self.folder, settings, json.loads(to_json(self._settings())))
        history = _read_history(self.folder / HISTORY_FILE)
        own = ResultCache(self.folder / RESULTS_FOLDER)
        for key in dict.fromkeys([*(s.content_key for s in history), RANDOM]):
            for score in self.scores:
                result = own.read({**self._describe(None, score), "checkpoint": key})
                if result is not None:
                    self._results[key, score.text] = result
        lost = [s for s in history if any((s.content_key, score.text) not in self._results for score in self.scores)]
        if lost:
            warnings.warn(
                f"results of {listed([s.name for s in lost])} are missing from {own.folder}: they are scored again if they are still there.",
                AssumedWarning,
                stacklevel=3,
            )
        self.history = [s for s in history if s not in lost]
        planned = [s.said for s in self.history if s.said.get("planned_epochs") is not None]
        if self.planned_epochs is None and planned:
            # the files that told it may be gone
            self.planned_epochs, self.first_epoch = planned[-1]["planned_epochs"], planned[-1]["first_epoch"]
        if any((RANDOM, score.text) not in self._results for score in self.scores):
            self._results = {k: v for k, v in self._results.items() if k[0] != RANDOM}

    def _write(self) -> None:
        lines = [json.dumps(asdict(s), ensure_ascii=False, allow_nan=False) for s in self.history]
        write_text(self.folder / HISTORY_FILE, "".join(f"{line}\n" for line in lines))


def with_scores_of_the_chooser(scores: Sequence[Score], rule: StopRule) -> list[Score]:
    """Scores, and those that the rule reads beside them."""
    return [*scores, *(scores_of_the_chooser(rule.state, scores, rule.chooser) if rule.name != "patience" else [])]


def copied_encoder(model: nn.Module, name: str | None, input_channels: int, seed: int, called: str) -> nn.Module:
    """An encoder with the weights that a model in training has now; the model is only read.

    Args:
        model: As for ``Monitor.see``.
        name: timm's name of the architecture, or None to find out.
        input_channels: Of the target's images.
        seed: Of what is not in the weights; nothing for most networks.
        called: What to call it in an error.

    Raises:
        UserError: The weights do not fit the architecture, or the model cannot be copied.
    """
    model = _unwrapped(model)
    if isinstance(model, TimmEncoder) and model.input_channels == input_channels and model.depth is None:
        return _copy(model)
    # a TimmEncoder says its own name, and its network stands inside
    inside = next((m for m in model.modules() if timm_name(_architecture(m))), None)
    stated = None if inside is None else timm_name(_architecture(inside))
    name = name or stated
    source = inside if inside is not None and name == stated else model
    tensors, _, _ = encoder_tensors({k: v.detach().cpu() for k, v in source.state_dict().items()})
    if name is None:
        name = next(iter(inferred_architecture(tensors)), None)
    if name is None:
        return _copy(model)
    encoder = random_encoder(name, input_channels, seed)
    encoder.load_weights(tensors, called)
    return encoder


def weights_sha256(module: nn.Module) -> str:
    """A name for the values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the random generators of Python, numpy and torch as they were."""
    states = random.getstate(), np.random.get_state()
    with kept():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _is_first_process() -> bool:
    """By the process group, else by what launchers put into the environment before there is one, as Lightning tells it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    ranks = (os.environ.get(name) for name in RANKS)
    return next((rank for rank in ranks if rank), "0") == "0"


def locked(path: Path, what: str) -> IO[str]:
    """An open file that no other process can lock until it is closed, however this process ends.

    Raises:
        UserError: Another process holds it, or it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644), "r+")
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror}. Pass -o another folder.") from error
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read().strip() or "unknown"
        file.close()
        raise UserError(f"{what} is running already: process {owner}. End it first, or leave it to its work.") from None
    except (OSError, ImportError):
        # a file system without locks, or Windows
        warnings.warn(
            f"{path.parent} cannot be locked: see to it that one watcher uses it.", AssumedWarning, stacklevel=2
        )
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def remove_leftovers(folder: Path, names: Sequence[str] = ("*",)) -> None:
    """Remove files of these names, or of all, that a process that was killed did not finish; subfolders are left alone."""
    for file in (f for name in names for f in folder.glob(f".{name}.*.tmp")):
        with contextlib.suppress(OSError):
            file.unlink()


def _unwrapped(model: nn.Module) -> nn.Module:
    while (
        inner := next((m for k in ("module", "_orig_mod") if isinstance(m := getattr(model, k, None), nn.Module)), None)
    ) is not None:
        model = inner
    return model


def _architecture(module: nn.Module) -> str | None:
    about = getattr(module, "pretrained_cfg", None)
    architecture = about.get("architecture") if isinstance(about, Mapping) else getattr(about, "architecture", None)
    return architecture if isinstance(architecture, str) else None


def _copy(model: nn.Module) -> nn.Module:
    try:
        with torch.no_grad():
            return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"a copy of {type(model).__name__} cannot be made ({str(error).splitlines()[0]}), and it is no timm network that is known here. "
            "Pass the part of it that is one, or timm's name of it: encoder=NAME."
        ) from error


def _is_same_place(a: Seen, b: Seen) -> bool:
    if a.epoch is not None and b.epoch is not None:
        return a.epoch == b.epoch and (a.step == b.step or a.step is None or b.step is None)
    return a.name == b.name and a.step == b.step


def _in_order(history: Sequence[Seen]) -> list[Seen]:
    at = ages([s.as_checkpoint for s in history])
    # those that say neither stay in the order in which they came
    order = sorted(range(len(history)), key=lambda i: (at[i] is None, at[i] or 0, history[i].step or 0, i))
    return [history[i] for i in order]


def _in_words(advice: Advice) -> dict[str, Any]:
    gain = advice.gain
    points = None if gain is None else {k: round(100 * getattr(gain, k), 4) for k in ("value", "low", "high", "cost")}
    return {
        "stop": advice.stop,
        "is_over": advice.is_over,
        "rule": advice.rule,
        "reason": advice.reason,
        "gain_in_dice_points": None if points is None or gain is None else {**points, "until_epoch": gain.until},
        "warnings": list(advice.warnings),
    }


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["format"] != FORMAT or not settings["scores"]:
            raise ValueError
        return dict(settings)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a record of a watch of this version. Pass -o another folder, or move that one away."
        ) from error


def _refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{k} was {before.get(k)} and is {now.get(k)}" for k in now if k != "scores" and before.get(k) != now.get(k)
    ]
    if list(before["scores"]) != list(now["scores"]):
        names = list(before["scores"])
        changed.append(
            f"the scores were {listed(names, len(names))} and are {listed(list(now['scores']))} (another chooser may read others: -score names all)"
        )
    else:
        # an option that changed says why the slices did
        explained = {"slices", "seed"} if changed else set()
        for score, deciding in now["scores"].items():
            for key, value in deciding.items():
                old = before["scores"][score].get(key)
                if old != value and key not in explained:
                    shown = key in ("encoder", "seed", "device", "precision")
                    changed.append(f"{key} was {old} and is {value}" if shown else f"{OPTIONS.get(key, key)} changed")
    if changed:
        raise UserError(
            f"{folder} was begun with other settings, so that scores could not be compared: {'; '.join(dict.fromkeys(changed))}. "
            "Repeat the first command, or pass -o another folder."
        )


def _read_history(path: Path) -> list[Seen]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"could not read {path}: {error}. Pass -o another folder, or move that one away.") from error
    history = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            stat = content.pop("stat", None)
            history.append(Seen(**content, stat=None if stat is None else (int(stat[0]), int(stat[1]))))
        except (ValueError, TypeError) as error:
            # a line that was cut is the last one
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {path} is damaged. Remove the line, and its checkpoint is scored again."
            ) from error
    return history

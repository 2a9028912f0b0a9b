"""Which files of a folder are the checkpoints of a run, and in which order."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from mtl_nnunet.checkpoints.checkpoint import NAMES_IN_FOLDERS, Checkpoint, run_folder
from mtl_nnunet.checkpoints.file import Contents, read_contents
from mtl_nnunet.checkpoints.filenames import (
    COMPANIONS,
    RECOVERY,
    SUFFIXES,
    epoch_in_name,
    is_checkpoint_name,
    is_copy_name,
    stem_of,
    step_in_name,
    surely_epoch_in_name,
    telling_name,
)
from mtl_nnunet.checkpoints.length import runs_of
from mtl_nnunet.checkpoints.logs import RunLog, read_run_log
from mtl_nnunet.checkpoints.published import fetched, is_published_name, list_published
from mtl_nnunet.errors import AssumedWarning, LeftOutWarning, UserError, listed

# files that a listing may open: the latest one, and those whose names do not say their epoch
MOST_READ = 8
JUST_NOW_SECONDS = 10


@dataclass(frozen=True)
class Listing:
    """The checkpoints of a run as far as names and a few files tell.

    Attributes:
        checkpoints: In the order of their epochs; architecture and format are those of the file that was read.
        contents: Of that file, the latest one that could be read; None for published weights that were not fetched.
        log: What the run logged.
        notes: What a user should know: copies, files that were left out, epochs that are gone.
    """

    checkpoints: tuple[Checkpoint, ...]
    contents: Contents | None
    log: RunLog
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Named:
    """A file and what its name says."""

    path: Path
    epoch: int | None
    step: int | None
    is_sure: bool
    is_copy: bool


def find_checkpoints(paths: str | Path | Sequence[str | Path], weights: str = "default") -> list[Checkpoint]:
    """Checkpoints of a run, in the order of their epochs; each is opened, so that a broken one is named before any work.

    ``last`` and ``best`` files are copies of an epoch: they count only where no other file has that epoch. What a file does
    not say of itself is taken from the run's own files beside it (``args.yaml``, ``summary.csv`` and others).

    Args:
        paths: Folder of a run, or several folders and files, or names of published weights (``timm:NAME``, ``hf-hub:NAME``); what
            is named twice counts once.
        weights: Which of the weights in each file: ``default``, ``ema`` or ``trained``.

    Returns:
        At least one checkpoint; those without an epoch come last, in the order of their steps and names.

    Raises:
        UserError: Nothing found, a file that cannot be read, two files of one epoch, or two architectures.
    """
    named = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if weights != "default" and any(is_published_name(name) for name in named):
        raise UserError(f"-weights {weights} goes with files of a run: published weights are one set. Leave it out.")
    candidates = [c for name in named if is_published_name(name) for c in list_published(str(name))]
    # refused before anything is fetched
    _refuse_mixed_architectures(candidates)
    published = [fetched(candidate) for candidate in candidates]
    files = _files_of([Path(p) for p in named if not is_published_name(p)])
    # closed also when a file is refused, so that the message gets a line of its own
    with tqdm(files, desc="Reading checkpoints", unit="file", file=sys.stderr, disable=not files) as bar:
        contents = {file: _without_tensors(read_contents(file, weights)) for file in bar}
    found, notes = _described([_by_name(file) for file in files], contents, weights)
    for note in notes:
        warnings.warn(note, LeftOutWarning, stacklevel=2)
    everything = [*found, *{c.path.absolute(): c for c in published}.values()]
    # before epochs: of different networks these may well be the same
    _refuse_mixed_architectures(everything)
    _refuse_repeated_epochs(found)
    found = everything
    _say_mixed_names(found)
    _say_folders_of_one(found)
    return _in_order(found)


def list_checkpoints(paths: str | Path | Sequence[str | Path], weights: str = "default") -> Listing:
    """Checkpoints of a run by their names; of many files only a few are opened, and published weights are not fetched.

    Args:
        paths: As for ``find_checkpoints``.
        weights: As for ``find_checkpoints``.

    Raises:
        UserError: Nothing found.
    """
    named = [paths] if isinstance(paths, (str, Path)) else list(paths)
    published = [c for name in named if is_published_name(name) for c in list_published(str(name))]
    files = [_by_name(file) for file in _files_of([Path(p) for p in named if not is_published_name(p)])]
    if not files:
        return Listing(tuple(_in_order(published)), None, RunLog(), ())
    alike = Counter(_pattern(f.path) for f in files)
    latest = (
        sorted((f for f in files if not f.is_copy), key=lambda f: (f.epoch or 0, f.step or 0), reverse=True) or files
    )
    unsure = [f for f in files if not f.is_sure and (f.is_copy or alike[_pattern(f.path)] <= 2)]
    contents: dict[Path, Contents] = {}
    notes: list[str] = []
    sample: Contents | None = None
    for file in dict.fromkeys([*latest[:3], *unsure[:MOST_READ]]):
        # the second and third latest only where the ones before cannot be read
        if sample is not None and file not in unsure:
            continue
        try:
            read = read_contents(file.path, weights)
        except UserError as error:
            notes.append(str(error))
            continue
        sample = sample or read
        contents[file.path] = _without_tensors(read)
    if sample is None:
        raise UserError(notes[0])
    found, about_copies = _described(files, contents, weights)
    notes += about_copies
    repeated = _repeated(found)
    notes += [f"{len(group)} files say they are epoch {epoch}: {_names(group)}." for epoch, group in repeated.items()]
    log = _log_of(files)
    notes += list(_about_recovery(files)) + _gone(found, log)
    now = time.time()
    growing = [c.path for c in found if c.path.exists() and 0 <= now - c.path.stat().st_mtime < JUST_NOW_SECONDS]
    if growing:
        notes.append(
            f"changed within the last {JUST_NOW_SECONDS} s, so perhaps still being written: {listed([telling_name(p) for p in growing])}."
        )
    return Listing((*_in_order(found), *published), sample, log, tuple(notes))


def _files_of(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += files_of_run(path)
        elif path.is_file():
            files.append(path)
        else:
            broken = " It is a link to a file that is gone." if path.is_symlink() else ""
            raise UserError(
                f"no such checkpoint file or folder: {path}.{broken} Pass a run's folder or its files with -ckpt, or "
                "published weights: timm:NAME."
            )
    # a link is another name for a checkpoint, and told apart below
    return list({file.absolute(): file for file in files}.values())


def files_of_run(folder: Path) -> list[Path]:
    """The files of a run's folder that hold weights, by their names; none is opened.

    Raises:
        UserError: There is none.
    """
    inside = sorted(folder.iterdir())
    files = [f for f in inside if is_checkpoint_name(f.name) and f.is_file()]
    # a folder of a temporary name is not whole yet
    folders = [d for d in inside if d.is_dir() and not COMPANIONS.search(d.name)]
    # Hugging Face and Accelerate give each checkpoint a folder, and put the best or last one beside them once more
    in_folders = [w for d in folders if (w := _weights_in(d)) is not None]
    beside = [f for f in files if f.name in NAMES_IN_FOLDERS]
    files = [f for f in files if f not in (beside if in_folders else beside[1:])] + in_folders
    if in_folders and beside:
        warnings.warn(
            f"{beside[0]} is left out: it repeats one of the checkpoints in the folders beside it. Pass it alone to use it.",
            LeftOutWarning,
            stacklevel=2,
        )
    if broken := [f.name for f in inside if is_checkpoint_name(f.name) and f.is_symlink() and not f.exists()]:
        warnings.warn(
            f"links in {folder} to files that are gone are left out: {listed(broken)}.", LeftOutWarning, stacklevel=2
        )
    if files:
        return files
    deeper = [folder / "checkpoints", *sorted(folder.glob("lightning_logs/*/checkpoints"))]
    held = [d for d in deeper if d.is_dir() and any(is_checkpoint_name(f.name) or _weights_in(f) for f in d.iterdir())]
    if len(held) == 1:
        return files_of_run(held[0])
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        raise UserError(
            f"{folder} is a distributed checkpoint of torch, in shards. Make one file of it, then pass that: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} checkpoint.pth"
        )
    if any(folder.glob("*.safetensors.index.json")) or any(folder.glob("*.bin.index.json")):
        raise UserError(f"the checkpoint in {folder} is split into several files. Save it as one file, then pass that.")
    names = [str(d.relative_to(folder)) for d in held] or [d.name for d in folders if any(d.glob("*.p*t*"))]
    hint = f" Its folders hold some: {listed(names)}." if names else ""
    raise UserError(
        f"no checkpoint in {folder}: expected files ending in {', '.join(SUFFIXES)}.{hint} "
        "Pass the folder that the run wrote its checkpoints to."
    )


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES_IN_FOLDERS if (folder / name).is_file()), None)


def _by_name(path: Path) -> _Named:
    name = telling_name(path)
    epoch, step = surely_epoch_in_name(name), step_in_name(name)
    if path.name in NAMES_IN_FOLDERS and (path.parent / "trainer_state.json").is_file():
        # Hugging Face's Trainer names its folders by the step
        epoch, step = None, epoch
    is_sure = epoch is not None or step is not None
    # a folder's bare number may be a size or a seed
    guess = None if path.name in NAMES_IN_FOLDERS else epoch_in_name(name)
    return _Named(path, epoch if is_sure else guess, step, is_sure, is_copy_name(name))


def _described(
    files: Sequence[_Named], contents: dict[Path, Contents], weights: str
) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints without copies of each other, and what is said of those left out."""
    # MoCo, DINO and others store the number of finished epochs, and name the file by the epoch's index
    shifts = Counter(
        read.epoch - f.epoch
        for f in files
        if f.is_sure and f.epoch is not None and (read := contents.get(f.path)) and read.epoch is not None
    )
    shift = shifts.most_common(1)[0][0] if shifts else 0
    # numbers in names that do not run with the epochs inside count something else
    names_mislead = len(shifts) > 1
    if names_mislead:
        warnings.warn(
            f"the numbers in the names of {files[0].path.parent} are not the epochs that the files state: taken are those that they state.",
            AssumedWarning,
            stacklevel=3,
        )
    read_one = next(iter(contents.values()), None)
    logs = {
        folder: _log_of([f for f in files if run_folder(f.path) == folder])
        for folder in {run_folder(f.path) for f in files}
    }
    described = []
    for file in files:
        read, log = contents.get(file.path), logs[run_folder(file.path)]
        epoch, step = file.epoch, file.step if file.step is not None or read is None else read.step
        if epoch is None and step is not None and file.step is not None:
            epoch = log.epoch_of(step)
        elif names_mislead and read is not None and read.epoch is not None:
            epoch = read.epoch
        elif not file.is_sure and read is not None and read.epoch is not None:
            epoch = read.epoch - shift if file.is_copy and read.epoch >= shift else read.epoch
        about = read or read_one
        described.append(
            Checkpoint(
                path=file.path,
                epoch=epoch,
                architecture=(about.architecture if about else None) or log.architecture,
                kind=about.kind if about else "not read",
                logged_accuracy=None,
                step=step,
                weights=weights,
                planned_epochs=(about.planned_epochs if about else None) or log.planned_epochs,
            )
        )
    described = _on_one_clock(described, [f.is_copy for f in files])
    kept = [c for c, f in zip(described, files, strict=True) if not f.is_copy]
    notes = []
    for checkpoint in (c for c, f in zip(described, files, strict=True) if f.is_copy):
        undated = checkpoint.epoch is None and len(contents) == len(files)
        twins = kept if undated else [c for c in kept if c.epoch is not None and c.epoch == checkpoint.epoch]
        same = next((c for c in twins if _same_weights(checkpoint, c)), None)
        if same is None and (checkpoint.epoch is None or not twins):
            kept.append(checkpoint)
        elif same is None:
            notes.append(
                f"{checkpoint.path} says it is epoch {checkpoint.epoch}, as {twins[0].path.name} does, and holds other weights: it is left "
                "out. Pass it alone to use it."
            )
    return [replace(c, logged_accuracy=_accuracy(c, logs[c.run])) for c in kept], notes


def _on_one_clock(checkpoints: list[Checkpoint], copies: list[bool]) -> list[Checkpoint]:
    """By steps where some epochs have several checkpoints, or some checkpoints lie inside an epoch."""
    own = [c for c, is_copy in zip(checkpoints, copies, strict=True) if not is_copy]
    several = any(len({c.step for c in group}) == len(group) for group in _repeated(own).values())
    inside = any(c.epoch is None for c in own)
    if own and (several or inside) and all(c.step is not None for c in own):
        return [replace(c, epoch=None) for c in checkpoints]
    return checkpoints


def _accuracy(checkpoint: Checkpoint, log: RunLog) -> float | None:
    if checkpoint.epoch is not None and checkpoint.epoch in log.accuracy:
        return log.accuracy[checkpoint.epoch]
    return (
        log.accuracy_by_step.get(checkpoint.step) if checkpoint.step is not None and checkpoint.epoch is None else None
    )


def _same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    try:
        if a.path.samefile(b.path):
            return True
        first, second = (read_contents(c.path, c.weights).weights for c in (a, b))
    except (OSError, UserError):
        return False
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def _without_tensors(contents: Contents) -> Contents:
    return replace(contents, weights={}, left_out=())


def _log_of(files: Sequence[_Named]) -> RunLog:
    last = max(files, key=lambda f: (not f.is_copy, f.step or 0, f.epoch or 0))
    return read_run_log(run_folder(last.path), last.path)


def _in_order(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    def key(c: Checkpoint) -> tuple[bool, int, int, str]:
        length = c.published.epochs if c.published else None
        return c.epoch is None, c.epoch or length or 0, c.step or 0, str(c.path)

    return sorted(checkpoints, key=key)


def _repeated(checkpoints: Sequence[Checkpoint]) -> dict[int, list[Checkpoint]]:
    groups: dict[int, list[Checkpoint]] = {}
    for c in checkpoints:
        if c.epoch is not None:
            groups.setdefault(c.epoch, []).append(c)
    return {epoch: group for epoch, group in groups.items() if len(group) > 1}


def _names(checkpoints: Sequence[Checkpoint]) -> str:
    return listed([str(c.path) for c in checkpoints])


def _refuse_repeated_epochs(checkpoints: Sequence[Checkpoint]) -> None:
    for epoch, group in _repeated(checkpoints).items():
        said = f"{len(group)} checkpoints say they are epoch {epoch}: {_names(group)}."
        if len({c.run.resolve() for c in group}) == len(group):
            raise UserError(
                f"{said} Of several runs no two of one epoch can be ranked together: select for each run, and compare the scores."
            )
        raise UserError(f"{said} Pass the files of one run only, one file an epoch.")


def _refuse_mixed_architectures(checkpoints: Sequence[Checkpoint]) -> None:
    by_name = {c.architecture: c.path for c in checkpoints if c.architecture}
    if len(by_name) > 1:
        held = [f"{path} is {name}" for name, path in by_name.items()]
        raise UserError(
            f"checkpoints of different architectures cannot be ranked together: {listed(held)}. "
            "Pass the checkpoints of one architecture. To compare networks, select for each, and compare how much each is better than its own "
            "random initialisation."
        )


def _pattern(path: Path) -> str:
    return re.sub(r"\d+", "#", re.sub(r"[-_]v\d+$", "", stem_of(telling_name(path))))


def _say_mixed_names(checkpoints: Sequence[Checkpoint]) -> None:
    dated = [
        c for c in checkpoints if c.epoch is not None and c.published is None and not is_copy_name(telling_name(c.path))
    ]
    for folder in {c.run for c in dated}:
        kinds = {_pattern(c.path): telling_name(c.path) for c in dated if c.run == folder}
        if len(kinds) > 1:
            warnings.warn(
                f"the checkpoints in {folder} have names of {len(kinds)} kinds ({listed(list(kinds.values()))}) and are taken as one run. "
                "If they are not, pass the files of one.",
                AssumedWarning,
                stacklevel=3,
            )


def _say_folders_of_one(checkpoints: Sequence[Checkpoint]) -> None:
    folders = {c.run for c in checkpoints if c.published is None and c.epoch is not None}
    runs = runs_of(checkpoints)
    if len(folders) > 1 and len(runs) == 1:
        warnings.warn(
            f"the {len(folders)} checkpoints in {runs[0]} have a folder each and are taken as one run. If they are the ends of several, "
            "use -rule best.",
            AssumedWarning,
            stacklevel=3,
        )


def _about_recovery(files: Sequence[_Named]) -> Iterator[str]:
    for folder in dict.fromkeys(f.path.parent for f in files):
        recovery = sorted(f.name for f in folder.iterdir() if RECOVERY.match(f.name))
        if recovery:
            yield f"files in the middle of an epoch are left out: {listed(recovery)}. Pass them alone to use them."


def _gone(checkpoints: Sequence[Checkpoint], log: RunLog) -> list[str]:
    """What the run no longer has, as far as its log and its epochs tell."""
    epochs = sorted(c.epoch for c in checkpoints if c.epoch is not None)
    if not epochs:
        return []
    timms = any(c.kind == "timm train.py" for c in checkpoints)
    why = (
        " timm's train.py keeps its 10 best checkpoints unless told otherwise: train with --checkpoint-hist 1000 to keep all."
        if timms and len(epochs) <= 11
        else ""
    )
    gone = sorted(set(log.accuracy) - set(epochs))
    if gone and log.accuracy:
        return [
            f"the log tells of {len(log.accuracy)} epochs, {len(gone)} of them have no checkpoint any more: {_ranges(gone)}.{why}"
        ]
    strides = {b - a for a, b in pairwise(epochs)}
    if timms and (len(strides) > 1 or epochs[0] > max(strides, default=1)):
        return [f"the epochs at hand are {_ranges(epochs)}: others may be gone.{why}"]
    return []


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as ranges: 0 to 3, 5, 7 to 9."""
    ranges: list[list[int]] = []
    for n in numbers:
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return listed([str(a) if a == b else f"{a} to {b}" for a, b in ranges], 8)

"""Watch the folder of a running pretraining: copy, score and judge each checkpoint as it is finished."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from mtl_nnunet.checkpoints import (
    Checkpoint,
    architecture_of,
    files_of_run,
    first_epoch,
    list_checkpoints,
    read_contents,
)
from mtl_nnunet.checkpoints.checkpoint import NAMES_IN_FOLDERS
from mtl_nnunet.checkpoints.filenames import SUFFIXES, is_copy_name, surely_epoch_in_name, telling_name
from mtl_nnunet.errors import UserError
from mtl_nnunet.files import to_json, write_text, written_atomically
from mtl_nnunet.monitoring import STOP_FILE, Monitor, Seen, locked, remove_leftovers
from mtl_nnunet.stopping import Advice

COPIES_FOLDER = "checkpoints"
# two looks at a file that need not wait for the run
SHORT_PAUSE = 2.0

Stat = tuple[int, int]
STOPPED, OVER, IDLE, LOOKED = "stopped", "over", "idle", "looked"


class _ChangedError(Exception):
    """A file that was written to while it was read."""


@dataclass(frozen=True)
class Ending:
    """How a watch ended.

    Attributes:
        why: ``stopped`` by the rule; ``over``: the last planned epoch was reached; ``idle``: nothing new for too long;
            ``looked``: a single look was asked for.
        best: The checkpoint to start from so far, or None where none was scored.
        file: Its copy, or None where the run deleted it before it became the best.
    """

    why: str
    best: Seen | None
    file: Path | None


@dataclass(frozen=True)
class Process:
    """A process that is to be asked to end, told from a later one of the same number by when it began."""

    pid: int
    began: str | None


def watch(
    run: str | Path,
    monitor: Monitor,
    *,
    weights: str = "default",
    every: float = 60.0,
    once: bool = False,
    idle: float | None = None,
    on_stop: Sequence[str] | None = None,
    process: Process | None = None,
    keep_all: bool = False,
    say: Callable[[str], None] = print,
) -> Ending:
    """Score the checkpoints of a run as they are finished, until the rule says stop or the run ends.

    Args:
        run: Folder that the run writes its checkpoints to; it need not be there yet.
        monitor: What scores, decides and remembers; its folder holds everything that is written.
        weights: Which of the weights in each file: ``default``, ``ema`` or ``trained``.
        every: Seconds between two looks.
        once: Score what is finished, and return.
        idle: Minutes without a change after which the run counts as ended; None waits for ever.
        on_stop: Program and arguments to run when the rule says stop.
        process: To be sent SIGTERM when the rule says stop.
        keep_all: Keep a copy of every checkpoint, not only of the latest and of the one to start from.
        say: Where to tell what happens, line by line.

    Raises:
        UserError: Another watcher is at work on this run or folder, settings changed, or the first checkpoint cannot be scored.
    """
    run = Path(run).absolute()
    if monitor.folder.resolve() == run.resolve():
        raise UserError(f"{run} is the folder of the run itself. Pass -o another folder, such as {run / 'watch'}.")
    name = hashlib.sha256(f"{run.resolve()}\n{monitor.dataset}".encode()).hexdigest()[:16]
    # Windows has no number of the user, and a folder of temporary files for each
    user = os.getuid() if hasattr(os, "getuid") else "user"
    lock = Path(tempfile.gettempdir()) / f"mtl-nnunet-watch-{user}-{name}.lock"
    with locked(lock, f"a watcher of {run} for {monitor.dataset}"), monitor:
        # a watch is no process of a training, whatever its environment says
        monitor.open()
        copies = monitor.folder / COPIES_FOLDER
        for folder in (copies, *(d for d in copies.glob("*") if d.is_dir())):
            remove_leftovers(folder)
        stopped = monitor.folder / STOP_FILE
        if stopped.exists():
            say(
                f"the rule said stop before ({stopped}). Remove that file to go on, with another -price, -patience or -rule."
            )
            return _ending(STOPPED, monitor)
        return _Watch(run, monitor, weights, keep_all, say).go_on(every, once, idle, on_stop, process)


class _Watch:
    """What one watch knows of the files of its run."""

    def __init__(self, run: Path, monitor: Monitor, weights: str, keep_all: bool, say: Callable[[str], None]):
        self.run = run
        self.monitor = monitor
        self.weights = weights
        self.keep_all = keep_all
        self.say = say
        self.files: dict[Path, Stat] = {}
        self.done: dict[Path, Stat] = {}
        self.failed: dict[Path, Stat] = {}
        self.kinds: set[str] = set()
        self.said: set[str] = set()

    def go_on(
        self, every: float, once: bool, idle: float | None, on_stop: Sequence[str] | None, process: Process | None
    ) -> Ending:
        monitor = self.monitor
        if monitor.history:
            self.say(f"going on after {len(monitor.history)} checkpoints: {monitor.folder}")
        for copy in self.unrecorded_copies():
            self.see(copy, copy, None)
        changed_at, first, looks = time.monotonic(), True, 0
        while True:
            before, self.files = self.files, files_now(self.run)
            if self.files != before:
                changed_at = time.monotonic()
            ready = [f for f in self.in_order() if before.get(f) == self.files[f] and self.done.get(f) != self.files[f]]
            looks += 1
            if first and self.files and monitor.planned_epochs is None:
                self.learn_plan()
            for file in ready:
                advice = self.take(file)
                if advice is not None and (advice.stop or advice.is_over):
                    return self.end(advice, on_stop, process)
            if first and monitor.history:
                advice = monitor.advice()
                if advice.stop or advice.is_over:
                    return self.end(advice, on_stop, process)
            first = False
            if (
                once
                and looks >= 2
                and not any(self.files.get(f) == s and self.done.get(f) != s for f, s in self.failed.items())
            ):
                left = [telling_name(f) for f in self.in_order() if self.done.get(f) != self.files[f]]
                if left:
                    self.say(f"not finished yet: {', '.join(left)}")
                return _ending(LOOKED, monitor)
            if idle is not None and time.monotonic() - changed_at > 60 * idle:
                self.say(f"no checkpoint was written for {idle:g} minutes: the run seems to have ended early.")
                return _ending(IDLE, monitor)
            if not self.files:
                self.say_once(f"waiting for checkpoints in {self.run}")
            time.sleep(min(every, SHORT_PAUSE) if once else every)

    def in_order(self) -> list[Path]:
        """Files by what their names say, those that say nothing in the order of their writing; aliases only where there is nothing else."""
        numbered = [f for f in self.files if not is_copy_name(telling_name(f))]
        known = any(not s.name.startswith("epoch_") for s in self.monitor.history)

        def key(file: Path) -> tuple[float, int, str]:
            epoch = surely_epoch_in_name(telling_name(file))
            return (float("inf") if epoch is None else epoch), self.files[file][1], str(file)

        return sorted(numbered if numbered or known else self.files, key=key)

    def take(self, file: Path) -> Advice | None:
        """Copy a finished file and score the copy; what was decided, or None where nothing new was scored."""
        monitor, stat = self.monitor, self.files[file]
        name = telling_name(file)
        before = next((s for s in monitor.history if s.name == name), None)
        if before is not None and before.stat == stat:
            self.done[file] = stat
            return None
        alias = is_copy_name(name)
        try:
            copy = own_copy(file, monitor.folder / COPIES_FOLDER, stat)
        except FileNotFoundError:
            self.say(f"{name} was deleted before it could be copied: it is left out.")
            self.files.pop(file)
            return None
        except _ChangedError:
            # the next look sees another state of it
            return None
        except PermissionError as error:
            self.skip(file, f"{file} cannot be read: {error.strerror}.")
            return None
        try:
            refuse_damaged(copy, self.weights)
        except UserError as error:
            _remove_copy(copy)
            if self.failed.get(file) != stat:
                self.failed[file] = stat
                return None
            self.skip(file, str(error).replace(str(copy), str(file)))
            return None
        advice = self.see(file, copy, stat, alias)
        self.done[file] = stat
        return advice

    def see(self, file: Path, copy: Path, stat: Stat | None, alias: bool | None = None) -> Advice | None:
        """Score a copy, record it and tell."""
        monitor = self.monitor
        alias = is_copy_name(telling_name(copy)) if alias is None else alias
        try:
            checkpoint = self.described(file, copy)
            name = telling_name(copy)
            if alias:
                copy, name = _renamed(copy, checkpoint)
                checkpoint = replace(checkpoint, path=copy)
            twin = next((s for s in monitor.history if s.epoch is not None and s.epoch == checkpoint.epoch), None)
            if twin is not None and twin.name != name and checkpoint.step in (None, twin.step):
                self.say_once(
                    f"{telling_name(file)} is epoch {checkpoint.epoch}, which was scored as {twin.name}: it is left out."
                )
                _remove_copy(copy)
                return None
            before = len(monitor.history), monitor.history
            seen = monitor.see_checkpoint(checkpoint, name, stat)
        except UserError as error:
            _remove_copy(copy)
            if not monitor.history or isinstance(error.__cause__, OSError):
                raise
            self.say(f"{str(error).replace(str(copy), str(file))} It is skipped unless it changes.")
            return None
        if before[1] is monitor.history:
            # the same weights under another name
            if seen.name != name:
                _remove_copy(copy)
            return None
        advice = monitor.advice()
        self.say(line_of(monitor, seen, advice))
        for warning in advice.warnings:
            self.say_once(f"warning: {warning}")
        monitor.draw()
        self.tidy_copies(advice)
        return advice

    def described(self, file: Path, copy: Path) -> Checkpoint:
        """What file, name and run say of a checkpoint; its weights are those of the copy."""
        contents = read_contents(copy, self.weights)
        listed_as: Checkpoint | None = None
        if file != copy:
            beside = [f for f in self.files if not is_copy_name(telling_name(f))] or list(self.files)
            # what lies beside it may be broken or gone at any moment
            with suppress(UserError, OSError):
                others = list_checkpoints(beside, self.weights).checkpoints
                listed_as = next((c for c in others if c.path.absolute() == file.absolute()), None)
        if listed_as is None:
            listed_as = list_checkpoints([copy], self.weights).checkpoints[0]
        self.kinds.add(contents.kind)
        self.learn_plan(contents.planned_epochs)
        epoch = contents.epoch if listed_as.epoch is None and listed_as.step is None else listed_as.epoch
        found = replace(listed_as, path=copy, epoch=epoch, architecture=contents.architecture or listed_as.architecture)
        if found.architecture is None and self.monitor.encoder is None:
            found = replace(found, architecture=architecture_of(found))
        epochs = [s.epoch for s in self.monitor.history if s.epoch is not None] + ([] if epoch is None else [epoch])
        self.monitor.first_epoch = first_epoch(self.kinds, epochs, self.monitor.planned_epochs)
        return found

    def learn_plan(self, stated: int | None = None) -> None:
        """How many epochs the run is to have, by its own files."""
        if self.monitor.planned_epochs is not None:
            return
        if stated is None and self.files:
            with suppress(UserError, OSError):
                listing = list_checkpoints(list(self.files), self.weights)
                stated = listing.log.planned_epochs or (listing.contents.planned_epochs if listing.contents else None)
        if stated is not None:
            self.monitor.planned_epochs = stated
            self.say(
                f"the run says that it is planned for {stated} epochs; -epochs says otherwise where that is wrong."
            )

    def skip(self, file: Path, reason: str) -> None:
        """Leave a file out until it changes, and say so."""
        self.done[file] = self.files[file]
        self.say(f"{reason} It is skipped unless it changes.")

    def say_once(self, text: str) -> None:
        """Say what was not said before."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def unrecorded_copies(self) -> list[Path]:
        """Whole copies that an earlier watcher had no time to score."""
        recorded = {s.name for s in self.monitor.history}
        folder = self.monitor.folder / COPIES_FOLDER
        copies = files_now(folder) if folder.is_dir() else {}
        return sorted((f for f in copies if telling_name(f) not in recorded), key=lambda f: copies[f][1])

    def tidy_copies(self, advice: Advice) -> None:
        """Keep the copies of the latest checkpoint and of the one to start from; that of the latter is made again if need be."""
        if self.keep_all:
            return
        history = self.monitor.history
        wanted = {history[advice.best].name, history[-1].name}
        folder = self.monitor.folder / COPIES_FOLDER
        for copy in files_now(folder):
            if telling_name(copy) not in wanted:
                _remove_copy(copy)
        best = history[advice.best]
        if copy_of(self.monitor, best) is None:
            again = next((f for f in self.files if telling_name(f) == best.name and self.files[f] == best.stat), None)
            if again is not None:
                with suppress(OSError, _ChangedError):
                    own_copy(again, folder, self.files[again])

    def end(self, advice: Advice, on_stop: Sequence[str] | None, process: Process | None) -> Ending:
        """Stop, or say that there is nothing left to stop."""
        monitor = self.monitor
        if advice.is_over:
            self.say(f"{advice.reason}: the watch ends.")
            return _ending(OVER, monitor)
        best, last = monitor.history[advice.best], monitor.history[-1]
        copy = copy_of(monitor, best)
        write_text(
            monitor.folder / STOP_FILE,
            to_json(
                {
                    "after": last.name,
                    "epoch": last.epoch,
                    "rule": advice.rule,
                    "reason": advice.reason,
                    "start_from": None if copy is None else str(copy),
                    "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                }
            ),
        )
        self.say(f"STOP after {_place(last)}: {advice.reason}.\nwritten: {monitor.folder / STOP_FILE}")
        if process is not None:
            self.say(terminated(process))
        if on_stop:
            self.say(ran(on_stop))
        return _ending(STOPPED, monitor)


def files_now(run: Path) -> dict[Path, Stat]:
    """The checkpoint files of a run by name, with size in bytes and time of the last change in ns; none where there are none."""
    try:
        files = files_of_run(run)
    except (UserError, OSError):
        return {}
    stats: dict[Path, Stat] = {}
    for file in files:
        # deleted since the folder was read
        with suppress(OSError):
            about = file.stat()
            stats[file] = about.st_size, about.st_mtime_ns
    return stats


def own_copy(file: Path, folder: Path, stat: Stat) -> Path:
    """A copy that the run cannot change or delete, complete or not there at all.

    Args:
        file: Of the run; it may be deleted meanwhile, since it is held open.
        folder: Where to.
        stat: Size and time of the last change that it had when it was found finished.

    Raises:
        FileNotFoundError: It is gone.
        _ChangedError: It is not what it was.
        UserError: The copy cannot be written.
    """
    copy = folder / file.parent.name / file.name if file.name in NAMES_IN_FOLDERS else folder / file.name
    with open(file, "rb") as source, written_atomically(copy) as temporary:
        with open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            size = target.tell()
        about = os.fstat(source.fileno())
        if (about.st_size, about.st_mtime_ns) != stat or size != stat[0]:
            raise _ChangedError
    beside = file.parent / "trainer_state.json"
    if file.name in NAMES_IN_FOLDERS and beside.is_file():
        # without it nothing tells which epoch a step is
        with suppress(OSError), written_atomically(copy.parent / beside.name) as temporary:
            shutil.copyfile(beside, temporary)
    return copy


def refuse_damaged(file: Path, weights: str = "default") -> None:
    """Read a checkpoint from its first byte to its last.

    Raises:
        UserError: It is truncated, damaged, or no checkpoint.
    """
    read_contents(file, weights)
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"checkpoint {file} is damaged ({error}).") from error
        if broken is not None:
            raise UserError(f"checkpoint {file} is damaged: {broken} in it does not have the sum that was written.")


def line_of(monitor: Monitor, seen: Seen, advice: Advice) -> str:
    """One line that tells of a checkpoint."""
    first = monitor.scores[0]
    low, high = monitor.interval_of(seen)
    went = "from the cache" if seen.seconds == 0 else f"{seen.seconds:.1f} s"
    verdict = "the run is over" if advice.is_over else "stop" if advice.stop else "go on"
    return (
        f"{_place(seen):>12}  {first.name} {seen.scores[first.text]:.4f} [{low:.4f}, {high:.4f}]  {went:>8}  "
        f"{advice.reason}: {verdict}"
    )


def process_with(pid: int) -> Process:
    """A process by its number.

    Raises:
        UserError: There is none, or it is another user's.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        raise UserError(f"no process {pid} is running. Pass -signal the number of the pretraining's process.") from None
    except PermissionError:
        raise UserError(f"process {pid} belongs to another user and cannot be sent a signal.") from None
    return Process(pid, _began(pid))


def terminated(process: Process) -> str:
    """Ask a process to end, and say what came of it; a later process of the same number is left alone."""
    if _began(process.pid) != process.began:
        return f"process {process.pid} has ended already: no signal was sent."
    try:
        os.kill(process.pid, signal.SIGTERM)
    except OSError as error:
        return f"process {process.pid} could not be sent SIGTERM: {error.strerror}."
    return f"SIGTERM was sent to process {process.pid}."


def ran(command: Sequence[str]) -> str:
    """Run a command, without a shell, and say how it ended."""
    sys.stdout.flush()
    try:
        status = subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode
    except OSError as error:
        return f"{command[0]} could not be run: {error.strerror}."
    return f"{' '.join(command)} ended with exit status {status}."


def copy_of(monitor: Monitor, seen: Seen) -> Path | None:
    """The copy of a checkpoint, where it was kept."""
    folder = monitor.folder / COPIES_FOLDER
    places = [folder / seen.name, *(folder / seen.name / name for name in NAMES_IN_FOLDERS)]
    return next((p for p in places if p.is_file()), None)


def _ending(why: str, monitor: Monitor) -> Ending:
    if not monitor.history:
        return Ending(why, None, None)
    best = monitor.history[monitor.advice().best]
    return Ending(why, best, copy_of(monitor, best))


def _renamed(copy: Path, checkpoint: Checkpoint) -> tuple[Path, str]:
    """The copy of a moving alias under a name of its own."""
    suffix = next(s for s in SUFFIXES if copy.name.endswith(s))
    if checkpoint.epoch is not None:
        name = f"epoch_{checkpoint.epoch}{suffix}"
    elif checkpoint.step is not None:
        name = f"step_{checkpoint.step}{suffix}"
    else:
        name = f"epoch_unknown_{checkpoint.sha256[:12]}{suffix}"
    if copy.name not in NAMES_IN_FOLDERS:
        os.replace(copy, copy.with_name(name))
        return copy.with_name(name), name
    moved = copy.parent.with_name(name)
    os.replace(copy, moved)
    shutil.rmtree(copy.parent, ignore_errors=True)
    return moved, name


def _remove_copy(copy: Path) -> None:
    with suppress(OSError):
        copy.unlink()
        if copy.name in NAMES_IN_FOLDERS:
            shutil.rmtree(copy.parent)


def _place(seen: Seen) -> str:
    if seen.epoch is not None:
        return f"epoch {seen.epoch}"
    return seen.name if seen.step is None else f"step {seen.step}"


def _began(pid: int) -> str | None:
    try:
        # the fields after the name, which may hold blanks and brackets
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None

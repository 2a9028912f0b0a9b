"""Write files so that partial output never looks complete, and name content by its hash."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtl_nnunet.errors import UserError


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def to_json(content: Any) -> str:
    """JSON text with a fixed layout; NaN and infinity are refused, since JSON has neither."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: Which.
        what: What it should be, for the message.

    Raises:
        UserError: It is missing, cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Expected {what}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Expected {what}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected {what}.")
    return content


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name only once it is whole and on disk.

    Raises:
        UserError: The file could not be written (disk full, no permission); nothing is left behind.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(_could_not_write(path, error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """A name for a file that is to take the place of ``path``; no other process has it, whichever container it runs in."""
    # the first process of every container has the number 1
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def folder_written_atomically(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name once everything in it is written.

    With ``overwrite`` the old folder is moved aside first and removed only after the new one stands in its place.

    Raises:
        UserError: The folder exists and ``overwrite`` is off, or it could not be written; nothing is left behind.
    """
    # where a link points to is replaced, not the link
    folder = Path(folder).resolve()
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists already. Pass --overwrite to replace it, or -o another folder.")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        yield temporary
        written = [f for f in temporary.rglob("*") if not f.is_symlink()]
        for file in written:
            if file.is_file():
                _to_disk(file)
        # mkdtemp makes a private folder, safetensors private files; a selection is as readable as any other result
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        for file in written:
            file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)
        if folder.exists():
            old = temporary.with_suffix(".old")
            try:
                os.rename(folder, old)
                os.rename(temporary, folder)
            except BaseException:
                # also where the process is asked to end between the two
                if old.exists() and not folder.exists():
                    os.rename(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, folder)
    except OSError as error:
        raise UserError(_could_not_write(folder, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def files_written_together(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder whose files are moved into ``folder`` once all of them are written; files of their names are replaced.

    Raises:
        UserError: They could not be written; nothing of them is left behind.
    """
    folder = Path(folder).resolve()
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = _folder_beside(folder)
        yield temporary
        files = sorted(temporary.iterdir())
        for file in files:
            _to_disk(file)
        for file in files:
            os.replace(file, folder / file.name)
    except OSError as error:
        raise UserError(_could_not_write(folder, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(file: Path) -> None:
    # Windows does so with files that are open for writing only
    with open(file, "r+b" if os.name == "nt" else "rb") as opened:
        os.fsync(opened.fileno())


def _folder_beside(folder: Path) -> Path:
    name = {"prefix": f".{folder.name}.", "suffix": ".tmp"}
    # from beside a disk's topmost folder, as containers have them, nothing can be moved into it
    if not os.path.ismount(folder):
        with suppress(OSError):
            # what a killed process leaves there is no part of the folder
            return Path(tempfile.mkdtemp(dir=folder.parent, **name))
    # also where the folder above is somebody else's
    return Path(tempfile.mkdtemp(dir=folder, **name))


def _could_not_write(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"could not write {path}: {reason}. Nothing was left there. Free space or choose another place."

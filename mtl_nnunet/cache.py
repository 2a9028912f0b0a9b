"""Scores that were computed before, kept by the content that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.errors import UserError
from mtl_nnunet.files import written_atomically

# slices are named by their content, whichever code made them
DECIDING = (
    "bootstrap",
    "checkpoints/file",
    "checkpoints/names",
    "embedding",
    "encoder",
    "generators",
    "paper_resnet",
    "pixels",
    "ranking",
    "views",
)


@dataclass(frozen=True)
class Scored:
    """One score of one encoder on one target.

    Attributes:
        value: On all patients.
        sample: On each bootstrap draw, shape (B,).
        levels: At each level that the score read.
    """

    value: float
    sample: np.ndarray
    levels: dict[int, float] = field(default_factory=dict)


class ResultCache:
    """A folder of results, one file each, named by the hash of everything that a result depends on.

    Args:
        folder: Where; made when the first result is kept.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def check(self) -> None:
        """Find out before any work that results can be kept.

        Raises:
            UserError: The folder cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(
                f"results cannot be kept in {self.folder}: {error.strerror}. Pass -cache another folder, or --no-cache."
            ) from error

    def read(self, content: Mapping[str, Any]) -> Scored | None:
        """The result of this content, or None; a damaged file counts as none."""
        try:
            with open(self._path(content), "rb") as file, np.load(file, allow_pickle=False) as kept:
                levels = dict(zip(kept["levels"].tolist(), kept["level_values"].tolist(), strict=True))
                return Scored(float(kept["value"]), kept["sample"], levels)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def keep(self, content: Mapping[str, Any], scored: Scored) -> None:
        """Keep a result; two processes that keep the same one do no harm.

        Raises:
            UserError: The folder cannot be written.
        """
        with written_atomically(self._path(content)) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                value=scored.value,
                sample=scored.sample,
                levels=np.array(list(scored.levels), dtype=np.int64),
                level_values=np.array(list(scored.levels.values())),
            )

    def _path(self, content: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}.npz"


@lru_cache(maxsize=1)
def code_sha256() -> str:
    """Hash of the code that decides a score: a result of other code is another result, whatever the version says."""
    package = Path(__file__).parent
    files = [*(package / f"{name}.py" for name in DECIDING), *sorted((package / "scores").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def default_folder() -> Path:
    """``$MTL_CACHE``, else ``mtl-nnunet`` in the user's cache folder.

    Raises:
        UserError: There is no home folder.
    """
    if chosen := os.environ.get("MTL_CACHE"):
        return Path(chosen)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError("there is no home folder for the result cache. Pass -cache FOLDER or --no-cache.") from error
    return Path(home) / "mtl-nnunet"

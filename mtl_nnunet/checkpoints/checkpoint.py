"""What is known of a pretraining checkpoint before its weights are used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mtl_nnunet.errors import UserError
from mtl_nnunet.files import sha256

# which of the weights in one file: those that its own code would evaluate, their moving average, those that were trained
WHICH_WEIGHTS = ("default", "ema", "trained")
# names that every checkpoint of a run shares: the folder's name tells them apart
NAMES_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
# folders of one checkpoint of a run, by name
OF_ONE_CHECKPOINT = re.compile(
    r"(?:^|[-_])\d+$|^(?:epoch|step|iter|checkpoint|ckpt)|best|last|final|latest", re.IGNORECASE
)

# as the Hub and timm write them; nothing stated, or a name that names nothing, is not a licence
FREE_LICENCES = (
    *("", "unknown", "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "ncsa"),
    *("unlicense", "zlib", "mpl-2.0", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
)
# Apple Machine Learning Research Model licence: research that is not commercial
RESEARCH_ONLY = ("apple-amlr",)


@dataclass(frozen=True)
class Published:
    """Where published weights come from and under which terms.

    Attributes:
        name: As a user types it, without the revision: ``timm:resnet50.a1_in1k`` or ``hf-hub:owner/name``.
        source: Repository on the Hugging Face Hub, or the URL of the file.
        revision: Commit of the repository, or None for a file with a URL of its own.
        licence: As the publisher states it, or None where nothing is stated.
        epochs: Length of the pretraining in epochs, where it is known.
        recipe: What is known of the pretraining, in words; empty where nothing is.
    """

    name: str
    source: str
    revision: str | None
    licence: str | None
    epochs: int | None = None
    recipe: str = ""

    @property
    def caution(self) -> str | None:
        """What the name of the licence says to whoever earns money, or None where it says nothing or nothing is stated.

        Examples:
            >>> [Published("timm:a", "timm/a", None, x).caution for x in ("cc-by-nc-4.0", "seer-license", "mit", None)]
            ['forbids commercial use', 'has terms of its own, to be read before any commercial use', None, None]
        """
        name = re.sub(r"[\s_]+", "-", (self.licence or "").strip().lower())
        if re.search(r"(?:^|-)nc(?![a-z])|non-?commercial", name) or name in RESEARCH_ONLY:
            return "forbids commercial use"
        return None if name in FREE_LICENCES else "has terms of its own, to be read before any commercial use"


@dataclass(frozen=True)
class Checkpoint:
    """One pretraining checkpoint: where it lies and what it says of itself.

    Attributes:
        path: The file.
        epoch: Pretraining epoch as the run counts it (timm counts from 0), or None where nothing says.
        architecture: timm's name of the network, or None where nothing says.
        kind: Its format in words, such as ``timm train.py`` or ``safetensors``.
        logged_accuracy: ImageNet top-1 in per cent that the run itself logged for this epoch, if it did.
        step: Optimiser step, where the run says.
        weights: Which of the file's weights: ``default``, ``ema`` or ``trained``.
        published: Source, licence and recipe of published weights; None for a run of one's own.
        planned_epochs: How many epochs its run is to have, where the run says.
    """

    path: Path
    epoch: int | None
    architecture: str | None
    kind: str
    logged_accuracy: float | None = None
    step: int | None = None
    weights: str = "default"
    published: Published | None = None
    planned_epochs: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the file, computed when first asked for."""
        return self._hashed[0]

    @cached_property
    def _hashed(self) -> tuple[str, tuple[int, int, int]]:
        # looked at first, so that a change during the hashing shows too
        state = _state(self.path)
        return sha256(self.path), state

    def refuse_changed(self) -> None:
        """Stop where the file is no longer the one that was hashed; to be asked after its weights were read.

        It is hashed again only where its size, time of change or inode is another.

        Raises:
            UserError: It is another file now, or gone.
        """
        hashed, state = self._hashed
        try:
            now = _state(self.path)
            found = hashed if now == state else sha256(self.path)
        except OSError as error:
            raise UserError(
                f"checkpoint {self.path} cannot be opened any more: {error.strerror}. Pass files that the run leaves alone, such as copies."
            ) from error
        if found != hashed:
            raise UserError(
                f"checkpoint {self.path} was written to in the meantime: SHA-256 {found[:12]}, and {hashed[:12]} before, so its score would be "
                "of other weights. Try again once the run leaves it alone, or pass a copy."
            )
        self.__dict__["_hashed"] = hashed, now

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return run_folder(self.path)

    @property
    def content_key(self) -> str:
        """What tells its weights from any other's: the file's hash, and which of the file's weights they are."""
        return self.sha256 if self.weights == "default" else f"{self.sha256}:{self.weights}"

    @property
    def label(self) -> str:
        """What to call it in a table: its epoch, else its step, published name or file name."""
        if self.epoch is not None:
            return str(self.epoch)
        if self.published is not None:
            return self.published.name.partition(":")[2]
        if self.step is not None:
            return f"step {self.step}"
        return self.path.parent.name if self.path.name in NAMES_IN_FOLDERS else self.path.name


def _state(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ino


def run_folder(path: Path) -> Path:
    """The folder of the run that wrote a checkpoint file.

    Examples:
        >>> files = "run/epoch_1.pth", "run/checkpoint-500/model.safetensors", "run/final/model.safetensors", "run/model.safetensors"
        >>> [str(run_folder(Path(f))) for f in files]
        ['run', 'run', 'run', 'run']
    """
    in_a_folder = path.name in NAMES_IN_FOLDERS and OF_ONE_CHECKPOINT.search(path.parent.name)
    return path.parent.parent if in_a_folder else path.parent


def ages(checkpoints: Sequence[Checkpoint | None]) -> list[int | None]:
    """How far each checkpoint is into its pretraining, by one clock: the epoch where any states one, else the step.

    Examples:
        >>> by_step = [Checkpoint(Path(f"{s}.pt"), None, None, "state dict", step=s) for s in (500, 1000)]
        >>> ages(by_step)
        [500, 1000]
    """
    if any(c is not None and c.epoch is not None for c in checkpoints):
        return [None if c is None else c.epoch for c in checkpoints]
    return [None if c is None else c.step for c in checkpoints]

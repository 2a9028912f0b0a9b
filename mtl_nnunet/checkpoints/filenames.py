"""What a file's name says: whether it is a checkpoint, of which epoch or step, and whether it may be a copy."""

from __future__ import annotations

import re
from pathlib import Path

from mtl_nnunet.checkpoints.checkpoint import NAMES_IN_FOLDERS

SUFFIXES = (".pth.tar", ".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
# what runs write beside their weights: optimisers and generators, files that are not whole yet
COMPANIONS = re.compile(
    r"^(?:\.|tmp|optimizer|scheduler|scaler|rng_state|training_args|random_states|sampler|dataloader|custom_checkpoint)"
    r"|(?:_tmp\.pth\.tar|\.tmp|\.part|\.incomplete)$",
    re.IGNORECASE,
)
# timm's train.py in the middle of an epoch
RECOVERY = re.compile(r"^recovery-\d+-\d+\.")
COPIES = re.compile(
    r"^(?:model[-_]?)?(?:last|best|latest|final)(?:[-_.]|$)|^checkpoint$|(?:[-_.]|^)(?:best|last|latest|final)(?:[-_]?v?\d*)?$",
    re.IGNORECASE,
)
# a word and a number are sure; a number alone at the end may be a size or a seed
SURE_EPOCH = re.compile(r"(?:^|(?<=[^A-Za-z]))(?:epoch|ep|checkpoint|ckpt|model)[-_=]?(\d{1,6})(?!\d)", re.IGNORECASE)
EPOCHS = (
    re.compile(r"(?:epoch|ep|checkpoint|ckpt)[-_=]?(\d{1,6})(?!\d)", re.IGNORECASE),
    re.compile(r"^(\d{1,6})$"),
    re.compile(r"[-_](\d{1,6})$"),
)
STEP = re.compile(r"(?:global[-_]?)?(?:step|iter|iteration)s?[-_=]?(\d{1,9})(?!\d)", re.IGNORECASE)


def stem_of(name: str) -> str:
    """A checkpoint's name without its endings.

    Examples:
        >>> stem_of("checkpoint-12.pth.tar")
        'checkpoint-12'
    """
    while suffix := next((s for s in SUFFIXES if name.endswith(s)), None):
        name = name[: -len(suffix)]
    return name


def is_checkpoint_name(name: str) -> bool:
    """Whether a file of this name may hold a checkpoint's weights.

    Examples:
        >>> [is_checkpoint_name(n) for n in ("last.ckpt", "optimizer.pt", "tmp.pth.tar", "summary.csv", "recovery-3-100.pth.tar")]
        [True, False, False, False, False]
    """
    return name.endswith(SUFFIXES) and not COMPANIONS.search(name) and not RECOVERY.match(name)


def is_copy_name(name: str) -> bool:
    """Whether a file of this name may be another checkpoint's copy, such as the last or the best one.

    Examples:
        >>> [is_copy_name(n) for n in ("last.pth.tar", "model_best.pth.tar", "last-v1.ckpt", "checkpoint.pth", "checkpoint-3.pth")]
        [True, True, True, True, False]
    """
    return bool(COPIES.search(stem_of(name)))


def epoch_in_name(name: str) -> int | None:
    """The epoch that a file name states, or None.

    Examples:
        >>> [epoch_in_name(n) for n in ("checkpoint-12.pth.tar", "epoch_020.pth", "007.pt", "resnet50.safetensors")]
        [12, 20, 7, None]
        >>> epoch_in_name("resnet50-0676ba61.pth") is None
        True
        >>> epoch_in_name("epoch=9-step=1000.ckpt"), epoch_in_name("step_500.pth")
        (9, None)
    """
    stem = STEP.sub("", stem_of(name)) if STEP.search(name) else stem_of(name)
    for pattern in EPOCHS:
        if matches := pattern.findall(stem):
            return int(matches[-1])
    return None


def surely_epoch_in_name(name: str) -> int | None:
    """The epoch that a file name states with a word for it, or None: a run's size or seed is no epoch.

    Examples:
        >>> [surely_epoch_in_name(n) for n in ("model_7.pth", "epoch=4-step=9.ckpt", "resnet_50.pth", "checkpoint0020.pth")]
        [7, 4, None, 20]
    """
    matches = SURE_EPOCH.findall(STEP.sub("", stem_of(name)))
    return int(matches[-1]) if matches else None


def step_in_name(name: str) -> int | None:
    """The optimiser step that a file name states, or None.

    Examples:
        >>> [step_in_name(n) for n in ("epoch=4-step=900.ckpt", "step_500", "iter_2000.pth", "checkpoint-3.pth.tar")]
        [900, 500, 2000, None]
    """
    matches = STEP.findall(stem_of(name))
    return int(matches[-1]) if matches else None


def telling_name(path: Path) -> str:
    """The name that tells a checkpoint from its neighbours: its folder's where each has a folder of its own."""
    return path.parent.name if path.name in NAMES_IN_FOLDERS else path.name

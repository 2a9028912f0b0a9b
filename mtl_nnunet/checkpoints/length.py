"""How long the run of some checkpoints is to be, and whether they are of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mtl_nnunet.checkpoints.checkpoint import Checkpoint

# formats whose code counts epochs from 0
FROM_ZERO = ("timm train.py", "torchvision references", "Lightning")
FROM_ONE = ("Hugging Face Trainer",)


def first_epoch(kinds: Collection[str], epochs: Sequence[int], planned: int | None) -> int:
    """What a run calls its first epoch: 0 where an epoch 0 was seen or its format is known to count so, else 1.

    Examples:
        >>> first_epoch({"timm train.py"}, [5, 6], 40), first_epoch({"state dict"}, [1, 2], 40), first_epoch({"Lightning"}, [40], 40)
        (0, 1, 1)
    """
    if 0 in epochs:
        return 0
    if planned is not None and planned in epochs:
        return 1
    kinds = set(kinds)
    return 0 if kinds & set(FROM_ZERO) and not kinds & set(FROM_ONE) else 1


def span_of_run(checkpoints: Sequence[Checkpoint]) -> tuple[int, int] | None:
    """The first and the last epoch of the run of these checkpoints, as it counts; the last as planned, or the latest where no plan is known.

    Checkpoints that state different plans, such as runs of their own that were each annealed, have no plan in common.

    Returns:
        None where no checkpoint states its epoch.

    Examples:
        >>> files = [Checkpoint(Path(f"checkpoint-{e}.pth.tar"), e, None, "timm train.py", planned_epochs=300) for e in (10, 99)]
        >>> span_of_run(files), span_of_run([])
        ((0, 299), None)
    """
    epochs = [c.epoch for c in checkpoints if c.epoch is not None]
    if not epochs:
        return None
    plans = {c.planned_epochs for c in checkpoints}
    planned = plans.pop() if len(plans) == 1 else None
    first = first_epoch({c.kind for c in checkpoints}, epochs, planned)
    return first, max(epochs) if planned is None else max(*epochs, planned - 1 + first)


def runs_of(checkpoints: Sequence[Checkpoint]) -> tuple[Path, ...]:
    """Folders of the runs that checkpoints are of; those that each have a folder of their own beside the others' are one run's.

    Published weights are of none.

    Examples:
        >>> def runs(*files):
        ...     return [str(p) for p in runs_of([Checkpoint(Path(f), i, None, "state dict") for i, f in enumerate(files)])]
        >>> runs("a/1.pth", "a/2.pth", "b/3.pth"), runs("a/epoch_1/net.pth", "a/epoch_2/net.pth"), runs("a/1/net.pth", "b/2/net.pth")
        (['a', 'b'], ['a'], ['a/1', 'b/2'])
    """
    folders = Counter(c.run for c in checkpoints if c.published is None)
    above = {folder.parent for folder in folders}
    if len(folders) > 1 and set(folders.values()) == {1} and len(above) == 1:
        return tuple(above)
    return tuple(folders)

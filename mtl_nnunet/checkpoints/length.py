"""How long the run of some checkpoints is to be, and whether they are of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mtl_nnunet.checkpoints.checkpoint import Checkpoint

# formats whose code counts epochs from 0
FROM_ZERO = ("timm train.py", "torchvision references", "Lightning", "MoCo", "teacher and student")
FROM_ONE = ("Hugging Face Trainer",)
OF_A_RUN = ("args.yaml", "hparams.yaml", "summary.csv", "metrics.csv", "log.txt")


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

    The plan is that of the latest checkpoint that states one: a run that was resumed may have been prolonged, and of runs that were
    each annealed the latest is the longest.

    Returns:
        None where no checkpoint states its epoch.

    Examples:
        >>> files = [Checkpoint(Path(f"checkpoint-{e}.pth.tar"), e, None, "timm train.py", planned_epochs=300) for e in (10, 99)]
        >>> span_of_run(files), span_of_run([])
        ((0, 299), None)
    """
    dated = sorted(((c.epoch, c) for c in checkpoints if c.epoch is not None), key=lambda pair: pair[0])
    if not dated:
        return None
    epochs = [epoch for epoch, _ in dated]
    planned = next((c.planned_epochs for _, c in reversed(dated) if c.planned_epochs is not None), None)
    kinds = {c.kind for c in checkpoints}
    first = first_epoch(kinds, epochs, planned)
    if planned is None:
        return first, epochs[-1]
    if epochs[-1] == planned - 1 and not kinds & set(FROM_ONE):
        # one epoch short is a run that counts from 0 and is whole, and hardly ever one that was cut short there
        first = 0
    return first, max(epochs[-1], planned - 1 + first)


def runs_of(checkpoints: Sequence[Checkpoint]) -> tuple[Path, ...]:
    """Folders of the runs that checkpoints are of.

    Those that each have a folder of their own beside the others' are one run's, unless their plans differ or the folders hold what only
    a run has. Published weights are of none.

    Examples:
        >>> def runs(*files):
        ...     found = runs_of([Checkpoint(Path("/none", f), i, None, "state dict") for i, f in enumerate(files)])
        ...     return [str(p.relative_to("/none")) for p in found]
        >>> runs("a/1.pth", "a/2.pth", "b/3.pth"), runs("a/epoch_1/net.pth", "a/epoch_2/net.pth"), runs("a/1/net.pth", "b/2/net.pth")
        (['a', 'b'], ['a'], ['a/1', 'b/2'])
    """
    # one folder may be named in several ways
    own = [(c.run.resolve(), c) for c in checkpoints if c.published is None]
    folders = Counter(folder for folder, _ in own)
    above = {folder.parent for folder in folders}
    plans = {c.planned_epochs for _, c in own}
    one_each = len(folders) > 1 and set(folders.values()) == {1} and len(above) == 1 and len(plans) == 1
    if one_each and not any((folder / name).is_file() for folder in folders for name in OF_A_RUN):
        return tuple(above)
    return tuple(folders)

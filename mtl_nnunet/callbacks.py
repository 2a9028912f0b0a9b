"""The monitor inside a training loop: timm-style loops, Lightning, and Ignite with MONAI's trainers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from mtl_nnunet.errors import UserError
from mtl_nnunet.monitoring import Monitor

# for the first process, while it scores
LONGEST_WAIT = timedelta(days=7)
# by the process group of the training; None where it has to do
_PATIENT_GROUPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
# strategies whose processes hold a part of the weights each
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def should_stop(monitor: Monitor, model: nn.Module, epoch: int, planned_epochs: int | None = None) -> bool:
    """Score a model after an epoch and say whether to stop; under ``torch.distributed`` the first process does and all are told.

        for epoch in range(num_epochs):
            train_one_epoch(model)
            if should_stop(monitor, model, epoch, num_epochs):
                break

    The model and all random generators are left as they are, so that a training with it is the training without it.

    Args:
        monitor: What scores, decides and remembers.
        model: As for ``Monitor.see``; each process holds all of its weights.
        epoch: As the run counts.
        planned_epochs: How many epochs the run is to have.

    Raises:
        UserError: The model cannot be scored, or settings have changed since an earlier part of the run.
    """
    import torch.distributed as dist

    told = _told_by_torch()
    if told is None:
        return monitor.see(model, epoch, planned_epochs)
    return _of_first_process(dist.get_rank() == 0, lambda: monitor.see(model, epoch, planned_epochs), told)


def lightning_callback(
    monitor: Monitor,
    part: Callable[[Any], nn.Module] | None = None,
    every: int = 1,
    package: str | None = None,
) -> Any:
    """A callback for a Lightning ``Trainer`` that scores after training epochs and sets ``trainer.should_stop``.

    Args:
        monitor: What scores, decides and remembers; the trainer's ``max_epochs`` is its plan unless it has one.
        part: From the LightningModule to the network, such as ``lambda module: module.student``; default: the timm network in it.
        every: After every so many epochs.
        package: ``lightning.pytorch`` or ``pytorch_lightning``; default: the one that is imported.

    Raises:
        UserError: Neither package is installed.
    """
    base = _lightning(package).Callback

    class MonitorCallback(base):  # type: ignore[misc, valid-type]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            strategy = type(trainer.strategy).__name__
            if strategy in SHARDED:
                raise UserError(
                    f"with {strategy} no process holds all weights, so that none can score them. Save whole checkpoints, and run "
                    "mtl-watch-pretraining beside the training."
                )

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            epoch = trainer.current_epoch
            if (epoch + 1) % every:
                return
            planned = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
            stop = _of_first_process(
                trainer.is_global_zero,
                lambda: monitor.see(part(pl_module) if part else pl_module, epoch, planned),
                _told_by_torch() or (lambda stop: trainer.strategy.broadcast(stop, src=0)),
            )
            trainer.should_stop = trainer.should_stop or stop

    return MonitorCallback()


class MonitorHandler:
    """A handler for Ignite's engines and MONAI's trainers that scores after epochs and terminates the engine.

    In MONAI: ``SupervisedTrainer(..., train_handlers=[MonitorHandler(monitor, network)])``; in Ignite: ``MonitorHandler(monitor, network).attach(trainer)``.

    Args:
        monitor: What scores, decides and remembers; the engine's ``max_epochs`` is its plan unless it has one.
        model: The network that is trained, as for ``Monitor.see``.
        every: After every so many epochs.
    """

    def __init__(self, monitor: Monitor, model: nn.Module, every: int = 1):
        self.monitor = monitor
        self.model = model
        self.every = every

    def attach(self, engine: Any) -> None:
        """Be called after the engine's epochs."""
        from ignite.engine import Events

        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.every), self)

    def __call__(self, engine: Any) -> None:
        """Score, and terminate the engine where the rule says stop."""
        import ignite.distributed as idist

        def told(stop: bool | None) -> bool | None:
            if idist.get_world_size() == 1:
                return stop
            # Ignite sends numbers
            said: Any = idist.broadcast(-1.0 if stop is None else float(stop), src=0)
            return None if float(said) < 0 else float(said) > 0

        # Ignite counts from 1
        epoch, planned = engine.state.epoch - 1, engine.state.max_epochs
        of_first = _told_by_torch() or told
        if _of_first_process(idist.get_rank() == 0, lambda: self.monitor.see(self.model, epoch, planned), of_first):
            engine.terminate()


def _of_first_process(is_first: bool, see: Callable[[], bool], told: Callable[[bool | None], bool | None]) -> bool:
    """What the first process decides, in all of them; where it fails, none waits for it."""
    stop: bool | None = None
    try:
        if is_first:
            stop = see()
    finally:
        stop = told(stop)
    if stop is None:
        raise UserError("the first process could not score the model: its own message says why.")
    return stop


def _told_by_torch() -> Callable[[bool | None], bool | None] | None:
    """From the first process to all of them, however long it takes; None without torch's process group.

    All processes have to call it before the first one begins its work.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    if world not in _PATIENT_GROUPS:
        # NCCL's own ends a training where a process waits for another for ten minutes
        patient = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if dist.is_gloo_available() else None
        _PATIENT_GROUPS[world] = patient
    group = _PATIENT_GROUPS[world]

    def told(stop: bool | None) -> bool | None:
        held = [stop]
        dist.broadcast_object_list(held, src=0, group=group)
        return held[0]

    return told


def _lightning(package: str | None) -> Any:
    if package is not None and package not in LIGHTNING:
        raise UserError(f"package '{package}' is none of {', '.join(LIGHTNING)}.")
    imported = [name for name in LIGHTNING if name in sys.modules]
    for name in [package] if package else [*imported, *LIGHTNING]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise UserError("Lightning is not installed. Install it: pip install lightning.")

"""What stopping the pretraining at a checkpoint saves of the run, and what it is expected to cost in Dice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl_nnunet.checkpoints import Checkpoint, runs_of, span_of_run
from mtl_nnunet.ranking import Ranking

# Dice that most people would give for a shorter pretraining
SMALL_LOSS = 0.005
# between two checkpoints in seconds an epoch: files that were copied are closer, or not in order
FASTEST_EPOCH = 60.0
MOST_UNEVEN = 5.0


@dataclass(frozen=True)
class Budget:
    """One checkpoint as the end of the pretraining.

    Attributes:
        epoch: Of the checkpoint.
        last: The last epoch of the run: the planned one where the run says, else the latest at hand.
        saved_epochs: How many come after it.
        saved_share: As a share of the run.
        saved_hours: By the times at which the checkpoints were written; None where these are not those of a run.
        latest: The latest epoch at hand; before ``last`` the run is not over, or was cut short.
        expected_loss: Dice from 0 to 1 against the best of the checkpoints at hand; None where no rule said.
        most: Upper end of its 90 % interval.
    """

    epoch: int
    last: int
    saved_epochs: int
    saved_share: float
    saved_hours: float | None
    latest: int
    expected_loss: float | None
    most: float | None

    @property
    def run(self) -> str:
        """What the share is of: the run, or where it did not come to its end the run as planned."""
        return "run" if self.latest == self.last else "planned run"

    @property
    def text(self) -> str:
        """In words."""
        if not self.saved_epochs:
            said = "the last epoch, so nothing of the run is saved"
        else:
            hours = (
                "" if self.saved_hours is None else f", about {self.saved_hours:.3g} hours by the times of the files"
            )
            said = f"stopping at epoch {self.epoch} saves {self.saved_epochs} epochs ({self.saved_share:.0%} of the {self.run}{hours})"
        if self.expected_loss is None or self.most is None:
            return said
        against = "of these checkpoints" if self.latest == self.last else f"up to epoch {self.latest}"
        return (
            f"{said}; expected to lose {100 * self.expected_loss:.2f} Dice points against the best {against}, with 90 % at most "
            f"{100 * self.most:.2f}"
        )


def budgets_of(ranking: Ranking) -> tuple[Budget, ...]:
    """The chosen checkpoint as the end of the pretraining, and the earliest that is expected to lose little more.

    Nothing where the checkpoints are not dated by epochs, or are of several runs. The second one is left out where it is not
    earlier, or where no expected loss is known. Both speak of these weights, which a longer schedule left in its middle.

    Args:
        ranking: With ``expectation``, where losses are wanted.
    """
    checkpoints = [c.checkpoint for c in ranking.checkpoints if c.checkpoint is not None]
    epochs = [c.epoch for c in checkpoints if c.epoch is not None]
    span = span_of_run(checkpoints)
    if (
        span is None
        or len(epochs) < max(2, len(ranking.checkpoints))
        or len(set(epochs)) < len(epochs)
        or len(runs_of(checkpoints)) > 1
    ):
        return ()
    hours = hours_between(checkpoints)
    told = ranking.expectation
    if told is not None and not np.isfinite(told.expected_loss).all():
        # of a state that was not fitted nothing is known
        told = None
    first, last = span

    def budget(i: int) -> Budget:
        return Budget(
            epoch=epochs[i],
            last=last,
            saved_epochs=last - epochs[i],
            saved_share=(last - epochs[i]) / (last + 1 - first),
            saved_hours=None if hours is None else hours * (last - epochs[i]),
            latest=max(epochs),
            expected_loss=float(told.expected_loss[i]) if told is not None else None,
            most=float(told.high[i]) if told is not None else None,
        )

    found = [budget(ranking.choice)]
    if told is not None:
        enough = told.expected_loss <= told.expected_loss[ranking.choice] + SMALL_LOSS
        earliest = min((i for i in range(len(epochs)) if enough[i]), key=lambda i: epochs[i])
        if epochs[earliest] < epochs[ranking.choice]:
            found.append(budget(earliest))
    return tuple(found)


def hours_between(checkpoints: Sequence[Checkpoint]) -> float | None:
    """Hours an epoch, by when the files were last written; None where they were not written one after the other in even steps."""
    try:
        times = sorted((c.epoch, c.path.stat().st_mtime) for c in checkpoints if c.epoch is not None)
    except OSError:
        return None
    epochs, seconds = np.array(times).T
    if len(epochs) < 2:
        return None
    steps = np.diff(seconds) / np.diff(epochs)
    if steps.min() < FASTEST_EPOCH or steps.max() > MOST_UNEVEN * steps.min():
        return None
    return float((seconds[-1] - seconds[0]) / (epochs[-1] - epochs[0]) / 3600)

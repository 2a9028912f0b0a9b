"""What stopping early saves and costs, on rankings made by hand."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_report import ranking

from mtl_nnunet.budget import budgets_of, hours_between
from mtl_nnunet.checkpoints import Checkpoint
from mtl_nnunet.chooser import Choice
from mtl_nnunet.decision import Rule
from mtl_nnunet.ranking import Ranking
from mtl_nnunet.report import budget_text, verdict_text


def told(found: Ranking, losses: list[float], choice: int) -> Ranking:
    expected = np.array(losses)
    zeros = np.zeros(len(losses))
    return replace(
        found, choice=choice, expectation=Choice(choice, expected, zeros, 3 * expected, zeros, (), (), fell_back=False)
    )


def test_saved_epochs_and_the_cheaper_checkpoint() -> None:
    found = told(ranking([0.6, 0.7, 0.7, 0.7], random=0.5), [0.03, 0.006, 0.004, 0.002], choice=3)
    chosen, cheaper = budgets_of(found)
    assert (chosen.saved_epochs, chosen.saved_share, chosen.expected_loss, chosen.most) == (0, 0, 0.002, 0.006)
    # epoch 2 is expected to lose 0.4 points more than the last, epoch 1 loses 2.8
    assert (cheaper.epoch, cheaper.saved_epochs, cheaper.saved_share) == (2, 2, 0.5)
    said = budget_text(found)
    assert "nothing of the run is saved; expected to lose 0.20 Dice points" in said
    assert "stopping at epoch 2 saves 2 epochs (50% of the run); expected to lose 0.60" in said
    assert "planned for fewer epochs" in said
    nothing_cheaper = told(ranking([0.6, 0.7, 0.7, 0.7], random=0.5), [0.03, 0.02, 0.02, 0.002], choice=3)
    assert len(budgets_of(nothing_cheaper)) == 1
    assert "planned" not in budget_text(nothing_cheaper)


def test_rules_that_say_nothing_of_losses_still_say_what_is_saved() -> None:
    (only,) = budgets_of(ranking([0.6, 0.9, 0.7, 0.7], random=0.5))
    assert (only.epoch, only.saved_epochs, only.expected_loss) == (2, 2, None)
    unknown = told(ranking([0.6, 0.7], random=0.5), [np.nan, np.nan], choice=0)
    assert budgets_of(unknown)[0].expected_loss is None


def test_nothing_is_said_of_checkpoints_without_epochs() -> None:
    found = ranking([0.6, 0.7], random=0.5)
    undated = [replace(c, checkpoint=replace(c.checkpoint, epoch=None)) for c in found.checkpoints if c.checkpoint]
    assert budgets_of(replace(found, checkpoints=tuple(undated))) == ()
    assert budget_text(replace(found, checkpoints=tuple(undated))) == ""


def test_epochs_that_count_from_zero() -> None:
    found = ranking([0.6, 0.9, 0.7, 0.7], random=0.5)
    earlier = tuple(
        replace(c, checkpoint=replace(c.checkpoint, epoch=i)) for i, c in enumerate(found.checkpoints) if c.checkpoint
    )
    # epochs 0 to 3 are four, and two of them come after epoch 1
    assert budgets_of(replace(found, checkpoints=earlier))[0].saved_share == pytest.approx(2 / 4)


def test_a_run_that_was_cut_short_is_a_part_of_the_planned_one() -> None:
    found = told(ranking([0.6, 0.7, 0.7, 0.7], random=0.5), [0.03, 0.006, 0.004, 0.002], choice=3)
    cut = tuple(
        replace(c, checkpoint=replace(c.checkpoint, planned_epochs=10)) for c in found.checkpoints if c.checkpoint
    )
    chosen, cheaper = budgets_of(replace(found, checkpoints=cut))
    # epochs 1 to 4 of 10 that count from 1
    assert (chosen.last, chosen.latest, chosen.saved_epochs, chosen.saved_share) == (10, 4, 6, 0.6)
    assert (cheaper.saved_epochs, cheaper.saved_share) == (8, 0.8)
    assert "60% of the planned run could have been saved" in verdict_text(replace(found, checkpoints=cut))
    said = budget_text(replace(found, checkpoints=cut))
    assert (
        "saves 6 epochs (60% of the planned run); expected to lose 0.20 Dice points against the best up to epoch 4"
        in said
    )


def test_of_several_runs_nothing_is_said() -> None:
    found = ranking([0.6, 0.9, 0.7, 0.7], random=0.5)
    mixed = tuple(
        replace(c, checkpoint=replace(c.checkpoint, path=Path(f"run_{i // 2}/{i}.pth")))
        for i, c in enumerate(found.checkpoints)
        if c.checkpoint
    )
    assert budgets_of(replace(found, checkpoints=mixed)) == ()


@pytest.mark.parametrize(
    ("hours", "expected"),
    [
        ([0, 10, 20, 40], 10.0),  # epochs 1, 2, 3, 5
        ([0, 0, 0, 0], None),
        ([0, 10, 5, 40], None),  # copied in the order of names
        ([0, 0.001, 0.002, 0.003], None),
        ([0, 1, 2, 40], None),  # stood still for days
    ],
)
def test_hours_by_the_times_of_files(tmp_path: Path, hours: list[float], expected: float | None) -> None:
    found = []
    for epoch, at in zip((1, 2, 3, 5), hours, strict=True):
        file = tmp_path / f"{epoch}.pth"
        file.touch()
        os.utime(file, (1e9 + 3600 * at, 1e9 + 3600 * at))
        found.append(Checkpoint(file, epoch, None, "state dict"))
    assert hours_between(found) == (None if expected is None else pytest.approx(expected))
    found[0].path.unlink()
    assert hours_between(found) is None


def test_hours_stand_in_the_text(tmp_path: Path) -> None:
    found = ranking([0.6, 0.9, 0.7], random=0.5, rule=Rule("best"))
    rows = []
    for i, row in enumerate(found.checkpoints):
        file = tmp_path / f"{i}.pth"
        file.touch()
        os.utime(file, (1e9 + 7200 * i, 1e9 + 7200 * i))
        rows.append(replace(row, checkpoint=Checkpoint(file, i + 1, None, "state dict")))
    assert "about 2 hours by the times of the files" in budget_text(replace(found, checkpoints=tuple(rows)))

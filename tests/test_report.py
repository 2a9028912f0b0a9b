"""Comparisons and warnings on rankings made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtl_nnunet.bootstrap import bootstrap_draws, compare, interval
from mtl_nnunet.cache import Scored
from mtl_nnunet.checkpoints import Checkpoint, Published
from mtl_nnunet.decision import Rule
from mtl_nnunet.ranking import Ranking, ranking_of
from mtl_nnunet.report import comparison_text, notes_of, ranking_table, ranking_text, verdict_text, warnings_in_words
from mtl_nnunet.scores import parse_score

PATIENTS = 30


def ranking(
    means: list[float], random: float, noise: float = 1e-3, rule: Rule | None = None, score: str = "contrastive"
) -> Ranking:
    """Scores that are means over patients whose level is shared; epochs 1, 2, ..."""
    rng = np.random.default_rng(0)
    terms = np.array([*means, random])[:, None] + noise * rng.normal(size=(len(means) + 1, PATIENTS))
    terms += 0.05 * rng.normal(size=PATIENTS)
    samples = terms @ bootstrap_draws(PATIENTS, 2000, 0).T / PATIENTS
    results = [Scored(float(t.mean()), s) for t, s in zip(terms, samples, strict=True)]
    candidates = [Checkpoint(Path(f"{e}.pth"), e, "resnet18", "state dict") for e in range(1, len(means) + 1)]
    return ranking_of(parse_score(score), "resnet18", [*candidates, None], results, rule or Rule(), PATIENTS)


def said(found: Ranking, num_patients: int = PATIENTS) -> str:
    return " ".join(warnings_in_words(found, num_patients))


def test_a_choice_among_published_weights_is_called_a_hint() -> None:
    found = ranking([0.60, 0.70, 0.69], random=0.5)
    assert "has not been measured" not in said(found)
    published = [
        replace(
            c, checkpoint=replace(c.checkpoint, epoch=None, published=Published("timm:a.b", "timm/a.b", None, "mit"))
        )
        for c in found.checkpoints
        if c.checkpoint
    ]
    assert "has not been measured" in said(replace(found, checkpoints=tuple(published)))
    assert "has not been measured" not in said(replace(found, checkpoints=tuple(published[:1]), choice=0, best=0))


def test_comparisons_are_paired_and_point_towards_better() -> None:
    found = ranking([0.60, 0.70, 0.69], random=0.5)
    first, best, last = found.checkpoints
    assert found.checkpoints[found.best] is best
    assert "best" not in best.compared
    assert "last" not in last.compared
    assert set(first.compared) == {"best", "last", "random"}
    assert set(found.random.compared) == {"best", "last"}
    assert last.compared["best"].gain == pytest.approx(-best.compared["last"].gain)
    assert last.compared["best"].low == pytest.approx(-best.compared["last"].high)
    assert last.compared["best"].probability == pytest.approx(1 - best.compared["last"].probability)
    # what patients share cancels: intervals of scores overlap, that of the difference is far from zero
    assert best.low < last.high
    assert best.compared["last"].low > 0.008
    assert not last.undecided
    assert best.compared["random"].gain == pytest.approx(best.value - found.random.value)
    # where lower is better, the same numbers turn round
    lower = ranking([0.60, 0.70, 0.69], random=0.5, score="robustness")
    assert lower.checkpoints[lower.best].label == "1"
    assert lower.checkpoints[1].compared["best"].gain == pytest.approx(-0.1, abs=2e-3)
    assert lower.checkpoints[0].compared["random"].gain == pytest.approx(-0.1, abs=2e-3)


def test_equal_scores_are_better_half_of_the_time() -> None:
    sample = np.array([0.1, 0.2, np.nan])
    assert compare(0.15, sample, 0.15, sample, 10).probability == 0.5
    assert compare(0.15, sample, 0.15, sample, 10).is_undecided


def test_fewer_than_four_patients_decide_nothing() -> None:
    sample = np.full(5, 0.3)
    compared = compare(0.3, sample, 0.1, sample - 0.2, 3)
    assert np.isnan(compared.low)
    assert compared.is_undecided
    assert not compare(0.3, sample, 0.1, sample - 0.2, 4).is_undecided


@pytest.mark.parametrize("num_patients", [4, 6, 12, 30])
def test_intervals_hold_the_truth_as_often_as_they_say(num_patients: int) -> None:
    rng = np.random.default_rng(num_patients)
    draws = bootstrap_draws(num_patients, 1000, 0)
    held = 0
    for _ in range(400):
        terms = rng.normal(size=num_patients)
        low, high = interval(float(terms.mean()), draws @ terms / num_patients, num_patients)
        held += low <= 0 <= high
    # the percentile bootstrap alone holds it in 79, 85, 90 and 93 %
    assert 0.92 < held / 400 < 0.98


def test_nothing_to_warn_of() -> None:
    assert said(ranking([0.6, 0.7, 0.65], random=0.5)) == ""


def test_what_the_score_cannot_tell_apart_is_named_under_every_rule() -> None:
    close = [0.6, 0.7, 0.7001]
    assert "cannot tell 2 of 3 checkpoints apart (2, 3)" in said(ranking(close, random=0.5))
    assert "close to a guess" in said(ranking(close, random=0.5))
    by_epoch = said(ranking(close, random=0.5, rule=Rule("last")))
    assert "cannot tell 2 of 3 checkpoints apart (2, 3)" in by_epoch
    assert "guess" not in by_epoch


def test_random_weights_are_a_yardstick_of_the_best_and_of_the_chosen() -> None:
    assert "No checkpoint scores better than the random" in said(ranking([0.6, 0.7, 0.65], random=0.8))
    clearly = said(ranking([0.6, 0.7, 0.65], random=0.699, noise=0.05))
    assert "No checkpoint scores clearly better than the random" in clearly
    chosen = said(ranking([0.6, 0.7, 0.5], random=0.55, rule=Rule("last")))
    assert "The chosen checkpoint (3) scores no better than the random initialisation, though epoch 2 does" in chosen
    by_epochs = ranking([0.6, 0.7, 0.5], random=0.55, rule=Rule("last"))
    by_steps = [
        replace(c, checkpoint=replace(c.checkpoint, epoch=None, step=500 * c.checkpoint.epoch))
        for c in by_epochs.checkpoints
        if c.checkpoint and c.checkpoint.epoch
    ]
    assert "though step 1000 does" in said(replace(by_epochs, checkpoints=tuple(by_steps)))
    assert "No checkpoint" not in chosen


def test_few_patients_and_a_rule_that_found_nothing_early_are_named() -> None:
    assert "Only 7 patients" in said(ranking([0.6, 0.7], random=0.5), 7)
    assert "the last one is taken" in said(ranking([0.1, 0.7], random=0.5, rule=Rule("non-inferior")))


def test_tables_say_what_was_found() -> None:
    found = ranking([0.60, 0.70, 0.69], random=0.5)
    text = ranking_text(found)
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["2", "3", "1", "random"]
    assert "<- chosen" in text.splitlines()[1]
    assert comparison_text(found).startswith("chosen against the last epoch: +0.01")
    rows = ranking_table([found]).splitlines()
    assert len(rows) == 5
    assert rows[0].startswith("name,parameters,epoch,file,score,low,high")


def test_the_verdict_says_where_the_chosen_one_stands_by_the_score() -> None:
    alone = verdict_text(ranking([0.60, 0.70, 0.65], random=0.5))
    assert alone.startswith(
        "Start from epoch 2 of 3 (best score). 33% of the run could have been saved; what that costs in Dice"
    )
    assert alone.endswith("It has the best score, clear of all others.")
    assert verdict_text(ranking([0.60, 0.70, 0.65], random=0.5, rule=Rule("last"))).endswith(
        "(last epoch). This choice saves nothing of the run. The best score is that of epoch 2, clear of all others, the chosen one too."
    )
    close = [0.60, 0.70, 0.7001, 0.65]
    behind = verdict_text(ranking(close, random=0.5, rule=Rule("last")))
    assert behind.endswith("which cannot be told from 1 of the 3 others; the chosen one is behind it.")
    among = verdict_text(ranking(close[:3], random=0.5, rule=Rule("last")))
    assert among.endswith("The best score is that of epoch 2, which cannot be told from that of the chosen one.")
    assert verdict_text(ranking(close[:3], random=0.5)).endswith(
        "It has the best score, which cannot be told from 1 of the 2 others."
    )
    assert "cannot be told from any other." in verdict_text(ranking([0.7, 0.7, 0.7], random=0.5))
    assert verdict_text(ranking([0.6, 0.7], random=0.8)).endswith("None scores better than random weights.")


def test_the_best_score_is_not_undecided_about_itself() -> None:
    found = ranking([0.60, 0.70, 0.65], random=0.5, rule=Rule("last"))
    assert [notes_of(found, row) for row in found.checkpoints] == [[], ["best score"], ["<- chosen", "last epoch"]]
    close = ranking([0.60, 0.7001, 0.70], random=0.5, rule=Rule("last"), noise=0.01)
    notes = [notes_of(close, row) for row in close.checkpoints]
    # the chosen one too, where the score cannot tell it from the best
    assert sum("undecided" in n for n in notes) == len(close.undecided) - 1 == 1

"""Rules on hand-made scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_nnunet.checkpoints import Checkpoint, Published
from mtl_nnunet.decision import Rule, choose, parse_rule
from mtl_nnunet.errors import UserError
from mtl_nnunet.ranking import rank_checkpoints

EPOCHS = [1, 5, 20, 100]


def noisy(values: list[float], spread: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array(values)[:, None] + spread * rng.normal(size=(len(values), 4000))


def test_best_takes_the_later_of_equals_and_last_takes_the_last() -> None:
    values = [0.5, 0.9, 0.9, 0.7]
    assert choose(Rule("best"), values, noisy(values, 0), 0.4, EPOCHS) == 2
    assert choose(Rule("last"), values, noisy(values, 0), 0.4, EPOCHS) == 3
    assert choose(Rule("last"), values[::-1], noisy(values, 0), 0.4, EPOCHS[::-1]) == 0


def test_non_inferior_takes_the_earliest_within_the_margin() -> None:
    values = [0.5, 0.88, 0.9, 0.9]
    # the best gains 0.5 over random, so 5 % of it are 0.025
    assert choose(Rule("non-inferior", margin=0.05), values, noisy(values, 1e-4), 0.4, EPOCHS) == 1
    assert choose(Rule("non-inferior", margin=0.03), values, noisy(values, 1e-4), 0.4, EPOCHS) == 2


def test_the_less_is_known_the_later_it_stops() -> None:
    values = [0.5, 0.88, 0.9, 0.9]
    chosen = [
        choose(Rule("non-inferior", margin=0.05), values, noisy(values, s), 0.4, EPOCHS) for s in (1e-4, 2e-3, 1.0)
    ]
    assert chosen == sorted(chosen)
    assert chosen[-1] == 3, "nothing known: the last"


def test_no_gain_over_random_weights_means_the_last() -> None:
    values = [0.5, 0.6, 0.55, 0.5]
    assert choose(Rule("non-inferior"), values, noisy(values, 1e-4), 0.7, EPOCHS) == 3


def test_rules_by_epoch_need_epochs() -> None:
    with pytest.raises(UserError, match="epoch_020"):
        choose(Rule("last"), [0.1, 0.2], noisy([0.1, 0.2], 0.1), 0, [1, None])


@pytest.mark.parametrize(
    ("rule", "known", "remedy"),
    [
        ("last", {"published": Published("timm:a.b", "timm/a.b", None, "mit")}, "use -rule best"),
        ("expected-loss", {"step": 500}, "use -rule last"),
        ("last", {}, "Name files like epoch_020.pth, or use -rule best"),
    ],
)
def test_the_remedy_is_one_that_helps(rule: str, known: dict[str, Any], remedy: str) -> None:
    checkpoint = Checkpoint(Path("some.pth"), None, "test_resnet", "state dict", **known)
    # refused before slices are looked at
    with pytest.raises(UserError, match=f"goes by epochs.*{remedy}\\.$"):
        rank_checkpoints([checkpoint], "test_resnet", None, "contrastive", rule=rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("worst", "best, expected-loss, non-inferior, last"),
        ("best:margin=1", "no parameter 'margin'"),
        ("non-inferior:margin=much", "no number"),
        ("non-inferior:probability=1.5", "below 1"),
        ("non-inferior:risk=0.1", "no parameter 'risk'"),
        ("non-inferior:price=1", "It has margin, probability"),
        ("expected-loss:price=-1", "at least 0"),
        ("expected-loss:price=inf", "at least 0"),
        ("expected-loss:state=half", "free or frozen"),
    ],
)
def test_what_a_user_mistypes_is_named(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_rule(text)


def test_expected_loss_with_its_price_and_state() -> None:
    rule = parse_rule("expected-loss:price=0.5,state=frozen")
    assert (rule.price, rule.state) == (0.5, "frozen")
    assert "frozen" in rule.text
    assert "0.5 Dice points" in rule.text

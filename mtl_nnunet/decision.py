"""From scores with error bars to one checkpoint: the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_nnunet.curves import STATES
from mtl_nnunet.errors import UserError, listed

RULES: dict[str, tuple[str, ...]] = {
    "best": (),
    "expected-loss": ("price", "state"),
    "non-inferior": ("margin", "probability"),
    "last": (),
}


@dataclass(frozen=True)
class Rule:
    """How the choice is made.

    Attributes:
        name: ``best`` score; ``expected-loss``: least expected Dice loss plus price, by ``mtl_nnunet.chooser``;
            ``non-inferior``: the earliest whose loss against the best is small enough, else the last; ``last`` epoch.
        margin: Non-inferior: the loss allowed, as a share of what the best score gains over the random initialisation.
        probability: Non-inferior: how often, over resampled patients, the loss must be within the margin.
        price: Expected loss: what a whole pretraining is worth, in Dice points.
        state: Expected loss: whether the encoder is to be trained (``free``) or not (``frozen``).
        chooser: Expected loss: a file of ``mtl-nnunet fit-chooser``; None for the shipped one.
    """

    name: str = "best"
    margin: float = 0.05
    probability: float = 0.95
    price: float = 0.0
    state: str = "free"
    chooser: Path | None = None

    @property
    def text(self) -> str:
        """The rule in words."""
        if self.name == "non-inferior":
            return (
                f"earliest that loses at most {self.margin:g} of the gain over random weights with probability "
                f"{self.probability:g}, else last"
            )
        if self.name == "expected-loss":
            by = "" if self.chooser is None else f", by {self.chooser.name}"
            if self.price == 0:
                return f"least expected Dice loss{by}, encoder {self.state}, without a price: the last epoch where no score enters"
            return f"least expected Dice loss{by}, encoder {self.state}, a whole pretraining worth {self.price:g} Dice points"
        return {"best": "best score", "last": "last epoch"}[self.name]


def parse_rule(text: str) -> Rule:
    """A rule from what a user typed: a name, or a name with parameters, as in ``non-inferior:margin=0.1``.

    Raises:
        UserError: Unknown rule, parameter or value.

    Examples:
        >>> parse_rule("non-inferior:margin=0.1").text
        'earliest that loses at most 0.1 of the gain over random weights with probability 0.95, else last'
    """
    name, _, rest = text.partition(":")
    if name not in RULES:
        raise UserError(f"unknown rule '{name}'. Available: {listed(list(RULES))}.")
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in RULES[name]:
            has = f"It has {listed(list(RULES[name]))}." if RULES[name] else "It has none."
            raise UserError(f"rule '{name}' has no parameter '{key}'. {has}")
        values[key] = value if key == "state" else _number(name, key, value)
    if values.get("state", "free") not in STATES:
        raise UserError(f"rule '{name}': state={values['state']} is unknown. Expected {' or '.join(STATES)}.")
    return Rule(name, **values)


def default_rule(epochs: Sequence[int | None], steps: Sequence[int | None], num_runs: int = 1) -> Rule:
    """What the evidence supports, as far as the checkpoints say how old they are (docs/evidence.md).

    Among checkpoints of one run the choice is by expected loss, or, where they state steps only, the last. Among others, such as
    published weights, nothing but the score can choose.

    Args:
        epochs: Pretraining epoch of each checkpoint, or None.
        steps: Optimiser step of each, or None.
        num_runs: Of how many runs they are.

    Examples:
        >>> [default_rule(*ages).name for ages in (([1, 2], [None] * 2), ([None] * 2, [50, 90]), ([3, 3], [None] * 2))]
        ['expected-loss', 'last', 'best']
    """
    for name, clock in (("expected-loss", epochs), ("last", steps)):
        # two of one age come from different runs
        if num_runs <= 1 and None not in clock and len(set(clock)) == len(clock) > 1:
            return Rule(name)
    return Rule()


def _number(rule: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"rule '{rule}': {key}={text} is no number.") from None
    most = float("inf") if key == "price" else 1
    if not 0 <= value < most:
        below = "" if key == "price" else " and below 1"
        raise UserError(f"rule '{rule}': {key}={text} must be at least 0{below}.")
    return value


def choose(
    rule: Rule,
    values: Sequence[float],
    samples: np.ndarray,
    random_value: float,
    epochs: Sequence[int | None],
    remedy: str = "Name files like epoch_020.pth, or use -rule best.",
) -> int:
    """Index of the checkpoint to start from, as far as one score can say it.

    ``expected-loss`` weighs several scores (``chooser.choose_by_expected_loss``); here it stays at the last. The loss of a checkpoint in a draw is against the best *of that draw*, so that a best that is best by luck costs
    what it should.

    Args:
        rule: Which rule.
        values: Score of each checkpoint, higher is better, shape (K,).
        samples: Scores on resampled patients, shape (K, B), every draw the same for all.
        random_value: Score of the random initialisation.
        epochs: Pretraining epoch of each, or None.
        remedy: What to do where the rule needs epochs that are not known, for the message.

    Raises:
        UserError: The rule needs epochs and a checkpoint does not say its own.

    Examples:
        >>> samples = np.array([[0.80, 0.81], [0.90, 0.89], [0.89, 0.91]])
        >>> choose(Rule("best"), [0.80, 0.90, 0.90], samples, 0.5, [1, 2, 3])
        2
        >>> choose(Rule("non-inferior", margin=0.1), [0.80, 0.90, 0.90], samples, 0.5, [1, 2, 3])
        1
        >>> choose(Rule("last"), [0.80, 0.90, 0.85], samples, 0.5, [1, 2, 3])
        2
    """
    indices = range(len(values))
    if rule.name == "best":
        return max(indices, key=lambda i: (values[i], _age(epochs[i])))
    if None in epochs:
        raise UserError(f"rule '{rule.name}' goes by epochs, and not every checkpoint says its own. {remedy}")
    by_age = sorted(indices, key=lambda i: _age(epochs[i]))
    if rule.name == "non-inferior":
        gain = max(values) - random_value
        existing = samples[:, ~np.isnan(samples).any(0)]
        losses = existing.max(0) - existing
        for i in by_age:
            if gain > 0 and existing.size and (losses[i] <= rule.margin * gain).mean() >= rule.probability:
                return i
    return by_age[-1]


def _age(epoch: int | None) -> int:
    return -1 if epoch is None else epoch

"""From scores with error bars to one checkpoint: the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl_nnunet.errors import UserError, listed

RULES = ("best", "non-inferior", "last")


@dataclass(frozen=True)
class Rule:
    """How the choice is made.

    Attributes:
        name: ``best`` score; ``non-inferior``: the earliest whose loss against the best is small enough, else the last;
            ``last`` epoch.
        margin: Non-inferior: the loss allowed, as a share of what the best score gains over the random initialisation.
        probability: Non-inferior: how often, over resampled patients, the loss must be within the margin.
    """

    name: str = "best"
    margin: float = 0.05
    probability: float = 0.95

    @property
    def text(self) -> str:
        """The rule in words."""
        if self.name == "non-inferior":
            return (
                f"earliest that loses at most {self.margin:g} of the gain over random weights with probability "
                f"{self.probability:g}, else last"
            )
        return {"best": "best score", "last": "last epoch"}[self.name]


def parse_rule(text: str) -> Rule:
    """A rule from what a user typed: ``best``, ``last`` or ``non-inferior:margin=M,probability=P``.

    Raises:
        UserError: Unknown rule, parameter or value.

    Example:
        >>> parse_rule("non-inferior:margin=0.1")
        Rule(name='non-inferior', margin=0.1, probability=0.95)
    """
    name, _, rest = text.partition(":")
    if name not in RULES:
        raise UserError(f"unknown rule '{name}'. Available: {listed(list(RULES))}.")
    values: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if name != "non-inferior" or key not in ("margin", "probability"):
            raise UserError(f"rule '{name}' has no parameter '{key}'. Write non-inferior:margin=0.05,probability=0.95.")
        try:
            values[key] = float(value)
        except ValueError:
            raise UserError(f"rule '{name}': {key}={value} is no number.") from None
        if not 0 <= values[key] < 1:
            raise UserError(f"rule '{name}': {key}={value} must be at least 0 and below 1.")
    return Rule(name, **values)


def choose(
    rule: Rule, values: Sequence[float], samples: np.ndarray, random_value: float, epochs: Sequence[int | None]
) -> int:
    """Index of the checkpoint to start from.

    The loss of a checkpoint in a draw is against the best *of that draw*, so that a best that is best by luck costs
    what it should.

    Args:
        rule: Which rule.
        values: Score of each checkpoint, higher is better, shape (K,).
        samples: Scores on resampled patients, shape (K, B), every draw the same for all.
        random_value: Score of the random initialisation.
        epochs: Pretraining epoch of each, or None.

    Raises:
        UserError: The rule needs epochs and a checkpoint does not say its own.

    Example:
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
    if any(epoch is None for epoch in epochs):
        raise UserError(
            f"rule '{rule.name}' goes by epochs, and not every checkpoint says its own. Name files like epoch_020.pth, "
            "or use -rule best."
        )
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

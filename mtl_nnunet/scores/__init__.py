"""Scores of an encoder on target images, one file each; this module knows them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.scores import contrastive, robustness
from mtl_nnunet.scores.distances import DISTANCES

Statistic = Callable[[np.ndarray], np.ndarray]
"""Patient multiplicities, shape (B, P), to the score of each resampled dataset, shape (B,)."""


@dataclass(frozen=True)
class Score:
    """A score by name: what it reads, which way is better, and how it depends on the patients.

    Attributes:
        name: What users type.
        higher_is_better: Direction of the score.
        views: The views it is defined on, a name that ``mtl_nnunet.views`` knows.
        num_views: How many views of each slice it reads.
        prepare: Embeddings of all views (V, N, D) and the patient index (N,) of each slice, to a ``Statistic``.
        parameters: Its parameters with their values; ``level`` and ``pooled`` say what an embedding is.
    """

    name: str
    higher_is_better: bool
    views: str
    num_views: int
    prepare: Callable[..., Statistic]
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> int:
        """Which feature map: 1 is the shallowest, negative counts from the deepest."""
        return int(self.parameters["level"])

    @property
    def pooled(self) -> bool:
        """Whether the feature map is averaged over space."""
        return bool(self.parameters["pooled"])

    def statistic(self, embeddings: torch.Tensor, patients: np.ndarray) -> Statistic:
        """The score as a function of how often each patient was drawn."""
        rest = {k: v for k, v in self.parameters.items() if k not in ("level", "pooled")}
        return self.prepare(embeddings, patients, **rest)


SCORES: dict[str, Score] = {
    "contrastive": Score(
        "contrastive",
        higher_is_better=True,
        views="scanner",
        num_views=3,
        prepare=contrastive.statistic,
        parameters={"level": -1, "pooled": True, "distance": "cosine"},
    ),
    "robustness": Score(
        "robustness",
        higher_is_better=False,
        views="paper",
        num_views=2,
        prepare=robustness.statistic,
        parameters={"level": -2, "pooled": True, "distance": "cosine", "margin": 0.5},
    ),
}


def parse_score(text: str) -> Score:
    """A score from what a user typed: a name, or a name with parameters.

    Args:
        text: ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``.

    Raises:
        UserError: Unknown name, parameter or value; the message lists what there is.

    Example:
        >>> parse_score("robustness:margin=0.25,distance=l2").parameters
        {'level': -2, 'pooled': True, 'distance': 'l2', 'margin': 0.25}
    """
    name, _, rest = text.partition(":")
    if name not in SCORES:
        raise UserError(f"unknown score '{name}'. Available: {listed(sorted(SCORES))}.")
    score = SCORES[name]
    parameters = dict(score.parameters)
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in parameters or not equals:
            raise UserError(
                f"score '{name}' has no parameter '{key}'. "
                f"Write {name}:KEY=VALUE with KEY one of {listed(sorted(parameters))}."
            )
        parameters[key] = _parse_value(name, key, value, parameters[key])
    return Score(name, score.higher_is_better, score.views, score.num_views, score.prepare, parameters)


def _parse_value(score: str, key: str, text: str, default: Any) -> Any:
    problem = f"score '{score}': {key}={text} is not valid"
    if isinstance(default, bool):
        if text.lower() not in ("yes", "no", "true", "false"):
            raise UserError(f"{problem}; expected yes or no.")
        return text.lower() in ("yes", "true")
    if key == "distance":
        if text not in DISTANCES:
            raise UserError(f"{problem}; expected one of {listed(sorted(DISTANCES))}.")
        return text
    try:
        value = type(default)(text)
    except ValueError:
        raise UserError(f"{problem}; expected a number like {default}.") from None
    if not np.isfinite(value) or (key == "level" and value == 0) or (key == "margin" and value < 0):
        raise UserError(f"{problem}; levels count from 1 or from -1, a margin is at least 0.")
    return value

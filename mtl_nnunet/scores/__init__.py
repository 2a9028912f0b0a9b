"""Scores of an encoder on target images, one file each; this module knows them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mtl_nnunet.errors import NoScoreError, UserError, listed
from mtl_nnunet.scores import (
    alignment,
    ccfv,
    contrastive,
    gbc,
    hscore,
    infonce,
    knn,
    logme,
    probe,
    rankme,
    robustness,
    structure,
    uniformity,
)
from mtl_nnunet.scores.distances import DISTANCES
from mtl_nnunet.scores.resampling import Statistic, mean_of

if TYPE_CHECKING:
    from mtl_nnunet.pixels import Pixels

ALL = "all"
COLLAPSED = 1e-6


@dataclass(frozen=True)
class Features:
    """What one encoder makes of the target.

    Attributes:
        embeddings: By view kind and strength, level (from 1) and whether pooled: shape (V, N, D).
        at_pixels: By whether the pixels were drawn with labels, and level: shape (M, D).
        patients: Patient of each slice, shape (N,).
        pixels: The pixels, drawn with labels or without.
        num_levels: How many feature maps the encoder has.
        encoder: What to call it in a message.
    """

    embeddings: Mapping[tuple[tuple[str, float], int, bool], Tensor]
    at_pixels: Mapping[tuple[bool, int], Tensor]
    patients: np.ndarray
    pixels: Mapping[bool, Pixels]
    num_levels: int
    encoder: str


@dataclass(frozen=True, eq=False)
class Score:
    """A score by name: what it reads, which way is better, and how it depends on the patients.

    Attributes:
        name: What users type.
        higher_is_better: Direction of the score.
        reads: ``views`` (embeddings of views of slices) or ``pixels`` (features at sampled pixels).
        prepare: Views: embeddings (V, N, D) and patients (N,) to a ``Statistic``. Pixels: features (M, D), labels (M,)
            and patients (M,) to a ``Statistic``.
        parameters: Its parameters with their values; ``level`` and ``pooled`` say what an embedding is.
        views: Kind of the views, a name that ``mtl_nnunet.views`` knows.
        num_views: How many views of each slice it reads.
        strength: Strength of the views.
        labels: Whether it needs labels.
        joins_levels: Whether all levels together are one feature; otherwise their scores are averaged.
        choices: What a parameter of words can be.
    """

    name: str
    higher_is_better: bool
    reads: str
    prepare: Callable[..., Statistic]
    parameters: dict[str, Any] = field(default_factory=dict)
    views: str = "plain"
    num_views: int = 1
    strength: float = 1.0
    labels: bool = False
    joins_levels: bool = False
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def better(self) -> str:
        """Which values are better: ``higher`` or ``lower``."""
        return "higher" if self.higher_is_better else "lower"

    @property
    def level(self) -> int | str:
        """Which feature map: 1 is the shallowest, negative counts from the deepest; or ``all``."""
        level: int | str = self.parameters["level"]
        return level

    @property
    def pooled(self) -> bool:
        """Whether features are averaged over space: over the slice, or for scores of pixels over each class in it."""
        return bool(self.parameters["pooled"])

    @property
    def view_key(self) -> tuple[str, float]:
        """Kind and strength of the views."""
        return self.views, self.strength

    @property
    def has_default_views(self) -> bool:
        """Whether it sees the views that are its own, which ``text`` does not say."""
        return self.view_key == SCORES[self.name].view_key

    @property
    def text(self) -> str:
        """What a user types to get this very score."""
        words = {k: ("yes" if v else "no") if isinstance(v, bool) else v for k, v in self.parameters.items()}
        return f"{self.name}:{','.join(f'{k}={v}' for k, v in words.items())}"

    def resolved_levels(self, num_levels: int, encoder: str) -> tuple[int, ...]:
        """The levels it reads, from 1.

        Raises:
            UserError: The encoder has no such level.
        """
        if self.level == ALL:
            return tuple(range(1, num_levels + 1))
        level = int(self.level)
        if not (1 <= level <= num_levels or -num_levels <= level <= -1):
            raise UserError(
                f"encoder '{encoder}' has no level {level}: it has levels 1 to {num_levels}, or -1 to -{num_levels}."
            )
        return (level if level > 0 else num_levels + 1 + level,)

    def statistic(self, features: Features) -> tuple[Statistic, dict[int, float]]:
        """The score as a function of how often each patient was drawn, and its value at each level that it reads.

        Raises:
            NoScoreError: The features are not such that the score exists.
        """
        levels = self.resolved_levels(features.num_levels, features.encoder)
        everyone = np.ones((1, int(features.patients.max()) + 1))
        try:
            by_level = {level: self._at(features, (level,)) for level in levels}
            joint = self._at(features, levels) if self.joins_levels and len(levels) > 1 else None
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:
            raise NoScoreError(
                f"score '{self.name}' does not exist on these slices: {error}. Raise -num_cases, or choose another score."
            ) from error
        values = {level: float(s(everyone)[0]) for level, s in by_level.items()}
        return joint or (
            next(iter(by_level.values())) if len(levels) == 1 else mean_of(list(by_level.values()))
        ), values

    def _at(self, features: Features, levels: tuple[int, ...]) -> Statistic:
        rest = {k: v for k, v in self.parameters.items() if k not in ("level", "pooled")}
        if self.reads == "views":
            embeddings = features.embeddings[self.view_key, levels[0], self.pooled][: self.num_views]
            _refuse_collapsed(embeddings.flatten(0, 1), features.encoder, levels[0])
            return self.prepare(embeddings, features.patients, **rest)
        pixels = features.pixels[self.labels]
        joined = torch.cat([features.at_pixels[self.labels, level] for level in levels], dim=1)
        _refuse_collapsed(joined, features.encoder, levels[0])
        labels, patients = pixels.labels, pixels.patients
        if self.pooled:
            joined, labels, patients = _by_region(joined, pixels)
        present, patients = np.unique(patients, return_inverse=True)
        statistic = self.prepare(joined, labels, patients, **rest)
        # a patient without a pixel that counts has no say
        return lambda multiplicities: statistic(multiplicities[:, present])


def _refuse_collapsed(features: Tensor, encoder: str, level: int) -> None:
    if not torch.isfinite(features).all():
        raise UserError(f"{encoder} gives NaN or infinite features at level {level}. Leave it out.")
    # what is left after the mean is taken away is rounding
    if (features - features.mean(0)).abs().max() <= COLLAPSED * features.abs().max():
        raise UserError(
            f"{encoder} gives the same features for everything at level {level}: its training collapsed. Leave it out."
        )


def _by_region(features: Tensor, pixels: Pixels) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Mean feature of each class in each slice, with its class and patient."""
    _, first, region = np.unique(
        np.stack([pixels.slices, pixels.labels]), axis=1, return_index=True, return_inverse=True
    )
    owner = torch.as_tensor(region.reshape(-1))
    sums = torch.zeros(len(first), features.shape[1]).index_add_(0, owner, features)
    return sums / torch.bincount(owner)[:, None], pixels.labels[first], pixels.patients[first]


def _dse(features: Tensor, labels: np.ndarray, patients: np.ndarray, clusters: int, part: str) -> Statistic:
    groups = structure.cluster(features, clusters) if part != "rank" else labels
    return structure.statistic(features, groups, patients, part)


def _view_score(
    name: str,
    higher_is_better: bool,
    prepare: Callable[..., Statistic],
    views: str = "scanner",
    num_views: int = 3,
    level: int = -1,
    **parameters: Any,
) -> Score:
    return Score(
        name,
        higher_is_better,
        "views",
        prepare,
        {"level": level, "pooled": True, **parameters},
        views,
        num_views,
        choices={"distance": tuple(DISTANCES)},
    )


def _pixel_score(
    name: str, prepare: Callable[..., Statistic], level: int | str = ALL, labels: bool = True, **parameters: Any
) -> Score:
    return Score(
        name,
        True,
        "pixels",
        prepare,
        {"level": level, "pooled": False, **parameters},
        labels=labels,
        joins_levels=name in ("knn", "probe"),
        choices={"part": structure.PARTS, "gaussian": ("spherical", "diagonal")},
    )


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        _view_score("contrastive", True, contrastive.statistic, distance="cosine"),
        _view_score("robustness", False, robustness.statistic, "paper", 2, level=-2, distance="cosine", margin=0.5),
        _view_score("infonce", True, infonce.statistic, temperature=0.1),
        _view_score("alignment", False, alignment.statistic),
        _view_score("uniformity", False, uniformity.statistic, "plain", 1, t=2.0),
        _view_score("rankme", True, rankme.statistic, "plain", 1),
        _pixel_score("dse", _dse, level=-2, labels=False, clusters=24, part="both"),
        _pixel_score("ccfv", ccfv.statistic),
        _pixel_score("logme", logme.statistic),
        _pixel_score("gbc", gbc.statistic, components=64, gaussian="spherical"),
        _pixel_score("hscore", hscore.statistic),
        _pixel_score("knn", knn.statistic, k=20),
        _pixel_score("probe", probe.statistic, ridge=0.1),
        _pixel_score("dse_labels", structure.statistic, level=-2, part="both"),
    )
}


LABELLED = [name for name, score in SCORES.items() if score.labels]


def parse_score(text: str, views: str | None = None, strength: float = 1.0) -> Score:
    """A score from what a user typed: a name, or a name with parameters.

    Args:
        text: ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``.
        views: Kind of views for scores that compare views; None for the score's own.
        strength: Strength of those views.

    Raises:
        UserError: Unknown name, parameter or value; the message lists what there is.

    Examples:
        >>> parse_score("robustness:margin=0.25,distance=l2").parameters
        {'level': -2, 'pooled': True, 'distance': 'l2', 'margin': 0.25}
    """
    name, _, rest = text.partition(":")
    if name not in SCORES:
        raise UserError(f"unknown score '{name}'. Available: {listed(sorted(SCORES), len(SCORES))}.")
    score = SCORES[name]
    parameters = dict(score.parameters)
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in parameters or not equals:
            raise UserError(
                f"score '{name}' has no parameter '{key}'. "
                f"Write {name}:KEY=VALUE with KEY one of {listed(sorted(parameters))}."
            )
        parameters[key] = _parse_value(score, key, value)
    score = replace(score, parameters=parameters)
    return replace(score, views=views or score.views, strength=strength) if score.views != "plain" else score


def parse_scores(scores: Score | str | Sequence[Score | str]) -> list[Score]:
    """One or several scores, by name or as they are.

    Raises:
        UserError: None, one twice, or one that ``parse_score`` refuses.
    """
    named = [scores] if isinstance(scores, (Score, str)) else list(scores)
    parsed = [parse_score(s) if isinstance(s, str) else s for s in named]
    if not parsed:
        raise UserError(f"no score is named. Available: {listed(sorted(SCORES), len(SCORES))}.")
    if len({(s.text, s.views, s.strength) for s in parsed}) < len(parsed):
        raise UserError("the same score is named twice. Name each once, or change a parameter.")
    return parsed


def _parse_value(score: Score, key: str, text: str) -> Any:
    problem = f"score '{score.name}': {key}={text} is not valid"
    default = SCORES[score.name].parameters[key]
    if isinstance(default, bool):
        if text.lower() not in ("yes", "no", "true", "false"):
            raise UserError(f"{problem}; expected yes or no.")
        return text.lower() in ("yes", "true")
    if key in score.choices:
        if text not in score.choices[key]:
            raise UserError(f"{problem}; expected one of {listed(sorted(score.choices[key]))}.")
        return text
    if key == "level" and text == ALL:
        return ALL
    kind = int if key == "level" else type(default)
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{problem}; expected a number like {default}{' or all' * (key == 'level')}.") from None
    if key == "level":
        if value == 0:
            raise UserError(f"{problem}; levels count from 1 or from -1.")
    elif not np.isfinite(value) or value < 0 or (value == 0 and key != "margin"):
        raise UserError(f"{problem}; expected a number above 0{' or 0' * (key == 'margin')}.")
    return value

"""Score every checkpoint on the same slices and views, with error bars over patients."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import nn
from tqdm import tqdm

from mtl_nnunet import __version__
from mtl_nnunet.cache import ResultCache, Scored, code_sha256
from mtl_nnunet.checkpoints import Checkpoint, read_contents
from mtl_nnunet.decision import Rule, choose
from mtl_nnunet.embedding import Target, digest, embed, make_target
from mtl_nnunet.encoder import random_encoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.scores import Features, Score
from mtl_nnunet.slices import Slices

BOOTSTRAP_DRAWS = 2000
INTERVAL = (2.5, 97.5)
RANDOM = "random"


@dataclass(frozen=True)
class Comparison:
    """How much better one checkpoint scores than another on the same resampled patients.

    Attributes:
        gain: Difference of the scores; above 0 is better, whichever way the score runs.
        low: Lower end of its 95 % bootstrap interval over patients.
        high: Upper end.
        probability: Share of the draws in which it scores better; equal scores count half.
    """

    gain: float
    low: float
    high: float
    probability: float

    @property
    def is_undecided(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class RankedCheckpoint:
    """A checkpoint's score on the target.

    Attributes:
        checkpoint: Which; None for the random initialisation.
        value: The score on all patients.
        low: Lower end of the 95 % bootstrap interval over patients.
        high: Upper end.
        probability_of_best_score: Share of the bootstrap draws in which it scores best among the checkpoints; None for
            the random initialisation, which is no candidate.
        undecided: Whether the paired interval of its difference to the best score holds zero.
        compared: Paired comparison with the ``best`` score, the ``last`` epoch and the ``random`` initialisation; none where
            the two did not see the same patients, as in a race.
        levels: The score at each level that it read.
        out_after: In a race, after how many patients it went out; its score is of those. None: it saw all.
    """

    checkpoint: Checkpoint | None
    value: float
    low: float
    high: float
    probability_of_best_score: float | None
    undecided: bool
    compared: dict[str, Comparison] = field(default_factory=dict)
    levels: dict[int, float] = field(default_factory=dict)
    out_after: int | None = None

    @property
    def label(self) -> str:
        """What to call it in a table."""
        return RANDOM if self.checkpoint is None else self.checkpoint.label


@dataclass(frozen=True)
class Ranking:
    """All checkpoints of a run, by one score.

    Attributes:
        score: Which score.
        encoder: timm's name of the architecture.
        checkpoints: In the order of their epochs.
        random: The same encoder at random initialisation: a yardstick, never chosen.
        best: Index of the best score; of equal scores the later epoch.
        rule: By which rule the choice is made.
        choice: Index of the chosen checkpoint.
        samples: Score of each checkpoint on each bootstrap draw, shape (K, B).
    """

    score: Score
    encoder: str
    checkpoints: tuple[RankedCheckpoint, ...]
    random: RankedCheckpoint
    best: int
    rule: Rule
    choice: int
    samples: np.ndarray = field(repr=False)

    @property
    def chosen(self) -> RankedCheckpoint:
        """The checkpoint to start from."""
        return self.checkpoints[self.choice]

    @property
    def last(self) -> RankedCheckpoint | None:
        """The checkpoint of the last epoch, or None where no file states an epoch."""
        index = last_epoch([c.checkpoint for c in self.checkpoints])
        return None if index is None else self.checkpoints[index]

    @property
    def undecided(self) -> tuple[RankedCheckpoint, ...]:
        """Checkpoints that the score cannot tell from the best one, the best one included."""
        return tuple(c for c in self.checkpoints if c.undecided)

    def better(self, a: RankedCheckpoint, b: RankedCheckpoint) -> bool:
        """Whether ``a`` scores better than ``b``."""
        return a.value > b.value if self.score.higher_is_better else a.value < b.value


def rank_checkpoints(
    checkpoints: Sequence[Checkpoint],
    encoder: str,
    slices: Slices,
    scores: Score | Sequence[Score],
    seed: int = 0,
    device: str = "cpu",
    rule: Rule | None = None,
    cache: ResultCache | None = None,
    precision: str = "auto",
) -> tuple[Ranking, ...]:
    """Score checkpoints of one architecture on the same slices and views.

    Checkpoints are scored through joblib: one after the other by default, and in parallel inside
    ``mtl_nnunet.parallel.workers`` or a ``joblib.parallel_config`` of the caller's. With ``device="cuda"`` and several
    GPUs there is one worker for each GPU.

    Args:
        checkpoints: What to rank.
        encoder: timm's name of their architecture.
        slices: The target; with labels where a score needs them.
        scores: By which scores; all share one pass over the slices.
        seed: Seed of views, pixels, bootstrap and random initialisation.
        device: Where the encoder runs: ``cpu``, ``cuda`` or ``mps``.
        rule: By which rule each ranking chooses; None for the best score.
        cache: Where results are looked up and kept; None for nowhere.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on GPUs that have it.

    Returns:
        One ranking a score, in the order of the scores.

    Raises:
        UserError: A checkpoint that does not fit, a level that the encoder does not have, or not enough patients.
    """
    scores = [scores] if isinstance(scores, Score) else list(scores)
    rule = rule or Rule()
    if not checkpoints:
        raise UserError("no checkpoint to rank. Pass a run's folder or its files with -ckpt.")
    choose(rule, [0.0] * len(checkpoints), np.zeros((len(checkpoints), 1)), 0.0, [c.epoch for c in checkpoints])
    candidates: list[Checkpoint | None] = [*checkpoints, None]
    content = _content(slices, encoder, seed, device, precision)
    contents = {(i, s): content(candidate, s) for i, candidate in enumerate(candidates) for s in scores}
    results: dict[tuple[int, Score], Scored] = {}
    for key, described in contents.items():
        if cache is not None and (kept := cache.read(described)) is not None:
            results[key] = kept
    missing = [i for i in range(len(candidates)) if any((i, s) not in results for s in scores)]
    if missing:
        wanted = {i: [s for s in scores if (i, s) not in results] for i in missing}
        target = make_target(slices, [s for s in scores if any(s in w for w in wanted.values())], seed)
        done = len(candidates) - len(missing)
        bar = tqdm(
            total=len(candidates),
            initial=done,
            desc=f"Scoring checkpoints{f' ({done} from the cache)' if done else ''}",
            unit="checkpoint",
            file=sys.stderr,
        )
        with bar:
            for i, found in _scored_in_parallel(wanted, candidates, encoder, target, seed, device, precision):
                for position, scored in found:
                    score = wanted[i][position]
                    results[i, score] = scored
                    if cache is not None:
                        cache.keep(contents[i, score], scored)
                bar.update()
    return tuple(
        ranking_of(s, encoder, candidates, [results[i, s] for i in range(len(candidates))], rule) for s in scores
    )


def score_encoder(
    module: nn.Module,
    slices: Slices,
    scores: Score | Sequence[Score],
    seed: int = 0,
    device: str = "cpu",
    precision: str = "auto",
) -> tuple[Scored, ...]:
    """Score any encoder, not only timm's.

    Args:
        module: Images (N, C, H, W) to a list of feature maps (N, D, h, w), shallow to deep.
        slices: The target; with labels where a score needs them.
        scores: By which scores.
        seed: Seed of views, pixels and bootstrap.
        device: Where it runs.
        precision: ``fp32``, ``bf16``, or ``auto``.

    Returns:
        One result a score. Results of several encoders on the same slices and seed are paired: their samples belong to
        the same resampled patients.

    Raises:
        UserError: The module gives no feature maps, or not the level asked for.
    """
    scores = [scores] if isinstance(scores, Score) else list(scores)
    return tuple(_evaluate(module, make_target(slices, scores, seed), scores, seed, device, precision))


def bootstrap_draws(num_patients: int, num_draws: int, seed: int) -> np.ndarray:
    """How often each patient is drawn in each resampled dataset, shape (num_draws, num_patients); rows sum to P."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=num_draws).astype(np.float64)


def interval(sample: np.ndarray) -> tuple[float, float]:
    """The central 95 % of a bootstrap sample; draws on which the score does not exist are left out."""
    low, high = np.nanpercentile(sample, INTERVAL)
    return float(low), float(high)


def _scored_in_parallel(
    wanted: dict[int, list[Score]],
    candidates: Sequence[Checkpoint | None],
    encoder: str,
    target: Target,
    seed: int,
    device: str,
    precision: str,
) -> Iterator[tuple[int, list[tuple[int, Scored]]]]:
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device == "cuda" else [device]
    # one worker a GPU: each takes every k-th checkpoint; elsewhere a worker takes one checkpoint at a time
    several = len(devices) > 1
    groups = [list(wanted)[i :: len(devices)] for i in range(len(devices))] if several else [[i] for i in wanted]
    jobs = (
        delayed(_score_group)(
            [(i, candidates[i], wanted[i]) for i in group],
            encoder,
            target,
            seed,
            devices[g % len(devices)],
            precision,
        )
        for g, group in enumerate(groups)
        if group
    )
    parallel = Parallel(return_as="generator_unordered", **({"n_jobs": len(devices)} if several else {}))
    for group_results in parallel(jobs):
        yield from group_results


def _score_group(
    group: Sequence[tuple[int, Checkpoint | None, list[Score]]],
    encoder_name: str,
    target: Target,
    seed: int,
    device: str,
    precision: str,
) -> list[tuple[int, list[tuple[int, Scored]]]]:
    results = []
    for index, checkpoint, scores in group:
        encoder = random_encoder(encoder_name, target.input_channels, seed)
        if checkpoint is not None:
            encoder.load_weights(read_contents(checkpoint.path).weights, str(checkpoint.path))
        found = _evaluate(encoder, target, scores, seed, device, precision)
        results.append((index, list(enumerate(found))))
    return results


def _evaluate(
    encoder: nn.Module, target: Target, scores: Sequence[Score], seed: int, device: str, precision: str
) -> list[Scored]:
    return evaluate(embed(encoder, target, scores, device, precision), scores, seed)


def evaluate(features: Features, scores: Sequence[Score], seed: int) -> list[Scored]:
    """The scores of one encoder's features, on all patients and on each bootstrap draw.

    Raises:
        UserError: A score that does not exist on these features.
    """
    num_patients = int(features.patients.max()) + 1
    draws = bootstrap_draws(num_patients, BOOTSTRAP_DRAWS, seed)
    found = []
    for score in scores:
        statistic, levels = score.statistic(features)
        value = float(statistic(np.ones((1, num_patients)))[0])
        if not np.isfinite(value):
            raise UserError(
                f"score '{score.name}' is {value} for encoder '{features.encoder}': its features are degenerate on these "
                "slices. Choose another score or level."
            )
        found.append(Scored(value, statistic(draws), levels))
    return found


def _content(
    slices: Slices, encoder: str, seed: int, device: str, precision: str
) -> Callable[[Checkpoint | None, Score], dict[str, Any]]:
    digests = {labelled: digest(slices, labelled) for labelled in (False, True)}
    common = {
        "encoder": encoder,
        "seed": seed,
        "draws": BOOTSTRAP_DRAWS,
        "device": device,
        "precision": precision,
        "code": code_sha256(),
        "versions": [__version__, *(importlib.metadata.version(p) for p in ("torch", "timm", "monai", "numpy"))],
    }

    def of(checkpoint: Checkpoint | None, score: Score) -> dict[str, Any]:
        return {
            **common,
            "checkpoint": RANDOM if checkpoint is None else checkpoint.sha256,
            "slices": digests[score.labels],
            "score": [score.text, score.views, score.num_views, score.strength],
        }

    return of


def ranking_of(
    score: Score, encoder: str, candidates: Sequence[Checkpoint | None], results: Sequence[Scored], rule: Rule
) -> Ranking:
    """The ranking of candidates by results of the same bootstrap draws, the random initialisation last of both."""
    # from here to the choice, higher is better
    sign = 1.0 if score.higher_is_better else -1.0
    values = [sign * r.value for r in results]
    samples = np.stack([sign * r.sample for r in results])
    epochs = [None if c is None else c.epoch for c in candidates[:-1]]
    best = choose(Rule(), values[:-1], samples[:-1], values[-1], epochs)
    choice = choose(rule, values[:-1], samples[:-1], values[-1], epochs)
    wins = _share_of_wins(samples[:-1])
    yardsticks = {"best": best, "last": last_epoch(candidates), RANDOM: len(results) - 1}
    ranked = []
    for i, (checkpoint, result) in enumerate(zip(candidates, results, strict=True)):
        low, high = interval(result.sample)
        compared = {
            name: compare(values[i], samples[i], values[other], samples[other])
            for name, other in yardsticks.items()
            if other not in (None, i)
        }
        ranked.append(
            RankedCheckpoint(
                checkpoint=checkpoint,
                value=result.value,
                low=low,
                high=high,
                probability_of_best_score=float(wins[i]) if checkpoint is not None else None,
                undecided=i == best or compared["best"].is_undecided,
                compared=compared,
                levels=result.levels,
            )
        )
    return Ranking(
        score, encoder, tuple(ranked[:-1]), ranked[-1], best, rule, choice, np.stack([r.sample for r in results[:-1]])
    )


def compare(value: float, sample: np.ndarray, other_value: float, other_sample: np.ndarray) -> Comparison:
    """One checkpoint against another on the same draws.

    Args:
        value: Its score, higher is better.
        sample: Its score on each draw, shape (B,).
        other_value: The other's score.
        other_sample: The other's score on the same draws, shape (B,).

    Example:
        >>> compare(0.8, np.array([0.7, 0.8, 0.9]), 0.7, np.array([0.7, 0.7, 0.7]))
        Comparison(gain=0.10000000000000009, low=0.005000000000000009, high=0.1950000000000001, probability=0.8333333333333334)
    """
    differences = sample - other_sample
    existing = differences[~np.isnan(differences)]
    probability = float(((existing > 0) + 0.5 * (existing == 0)).mean())
    return Comparison(value - other_value, *interval(differences), probability)


def last_epoch(checkpoints: Sequence[Checkpoint | None]) -> int | None:
    """Index of the checkpoint of the last epoch, or None where none states its epoch."""
    epochs = {i: c.epoch for i, c in enumerate(checkpoints) if c is not None and c.epoch is not None}
    return max(epochs, key=lambda i: epochs[i], default=None)


def _share_of_wins(samples: np.ndarray) -> np.ndarray:
    samples = samples[:, ~np.isnan(samples).any(0)]
    winners = samples == samples.max(0)
    shares: np.ndarray = (winners / winners.sum(0)).mean(1)
    return shares

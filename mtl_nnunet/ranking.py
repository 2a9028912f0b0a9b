"""Score every checkpoint on the same slices and views, with error bars over patients."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from joblib import delayed
from torch import nn
from tqdm import tqdm

from mtl_nnunet import __version__
from mtl_nnunet.bootstrap import (
    BOOTSTRAP_DRAWS,
    FEWEST_PATIENTS,
    Comparison,
    bootstrap_draws,
    compare,
    interval,
    share_of_wins,
)
from mtl_nnunet.cache import ResultCache, Scored, code_sha256
from mtl_nnunet.checkpoints import Checkpoint, ages, read_weights, runs_of, span_of_run
from mtl_nnunet.chooser import Choice, choose_by_expected_loss, read_chooser
from mtl_nnunet.decision import Rule, choose, parse_rule
from mtl_nnunet.embedding import Target, digest, embed, make_target, resolved_precision
from mtl_nnunet.encoder import TimmEncoder, random_encoder
from mtl_nnunet.errors import NoScoreError, UserError, listed
from mtl_nnunet.parallel import in_parallel
from mtl_nnunet.scores import Features, Score, parse_scores
from mtl_nnunet.slices import Slices

RANDOM = "random"
# the packages whose code decides a score
PACKAGES = ("torch", "torchvision", "timm", "monai", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class RankedCheckpoint:
    """A checkpoint's score on the target.

    Attributes:
        checkpoint: Which; None for the random initialisation.
        value: The score on all patients.
        low: Lower end of the 95 % bootstrap interval over patients; NaN where patients are too few for one.
        high: Upper end.
        probability_of_best_score: Share of the bootstrap draws in which it scores best among the checkpoints; None for
            the random initialisation, which is no candidate, and where patients are too few.
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
        expectation: What starting from each checkpoint is expected to lose; None unless the rule asks for it.
        num_run: How many of the checkpoints and the random initialisation were run for it; results of the others were kept
            from an earlier time.
    """

    score: Score
    encoder: str
    checkpoints: tuple[RankedCheckpoint, ...]
    random: RankedCheckpoint
    best: int
    rule: Rule
    choice: int
    samples: np.ndarray = field(repr=False)
    expectation: Choice | None = None
    num_run: int = 0

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
    scores: Score | str | Sequence[Score | str],
    seed: int = 0,
    device: str = "cpu",
    rule: Rule | str | None = None,
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
        scores: By which scores, as ``parse_score`` reads them; all share one pass over the slices.
        seed: Seed of views, pixels, bootstrap and random initialisation.
        device: Where the encoder runs: ``cpu``, ``cuda`` or ``mps``.
        rule: By which rule each ranking chooses, as ``parse_rule`` reads it; None for the best score.
        cache: Where results are looked up and kept; None for nowhere.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on GPUs that have it.

    Returns:
        One ranking a score, in the order of the scores.

    Raises:
        UserError: A checkpoint that does not fit, a level that the encoder does not have, or not enough patients.
    """
    scores = parse_scores(scores)
    rule = rule if isinstance(rule, Rule) else parse_rule(rule or "best")
    if not checkpoints:
        raise UserError("no checkpoint to rank. Pass a run's folder or its files with -ckpt.")
    if cache is not None:
        cache.check()
    if rule.name == "expected-loss" and len(runs := runs_of(checkpoints)) > 1:
        raise UserError(
            f"rule '{rule.name}' goes along one run, and these checkpoints are of {len(runs)}: {listed([str(r) for r in runs])}. Pass those "
            "of one run, or use -rule best."
        )
    # expected losses were learned by epochs, and say nothing of steps
    by = [c.epoch for c in checkpoints] if rule.name == "expected-loss" else ages(checkpoints)
    remedy: dict[str, str] = {}
    if any(c.published is not None for c in checkpoints):
        remedy = {"remedy": "Published weights state none: use -rule best."}
    elif all(c.step is not None for c in checkpoints):
        remedy = {"remedy": "They state their steps: use -rule last."}
    choose(rule, [0.0] * len(checkpoints), np.zeros((len(checkpoints), 1)), 0.0, by, **remedy)
    candidates: list[Checkpoint | None] = [*checkpoints, None]
    content = what_decides(slices, encoder, seed, device, precision)
    contents = {(i, s): content(candidate, s) for i, candidate in enumerate(candidates) for s in scores}
    results: dict[tuple[int, Score], Scored] = {}
    for key, described in contents.items():
        if cache is not None and (kept := cache.read(described)) is not None:
            results[key] = kept
    missing = [i for i in range(len(candidates)) if any((i, s) not in results for s in scores)]
    run = {s: any((i, s) not in results for i in missing) for s in scores}
    if missing:
        wanted = {i: [s for s in scores if (i, s) not in results] for i in missing}
        target = make_target(slices, [s for s in scores if run[s]], seed)
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
    rankings = tuple(
        replace(
            ranking_of(
                s,
                encoder,
                candidates,
                [results[i, s] for i in range(len(candidates))],
                rule,
                len(slices.patients_behind(s.labels)),
            ),
            num_run=len(missing) * run[s],
        )
        for s in scores
    )
    return by_expected_loss(rankings) if rule.name == "expected-loss" else rankings


def by_expected_loss(rankings: Sequence[Ranking]) -> tuple[Ranking, ...]:
    """The first ranking with the choice that all scores together make; the others choose by their own best score."""
    first = rankings[0]
    checkpoints = [c.checkpoint for c in first.checkpoints if c.checkpoint is not None]
    span = span_of_run(checkpoints)
    choice = choose_by_expected_loss(
        read_chooser(first.rule.chooser),
        [float(c.epoch) for c in checkpoints if c.epoch is not None],
        {
            r.score.text: [c.value if r.score.higher_is_better else -c.value for c in r.checkpoints]
            for r in rankings
            if r.score.has_default_views
        },
        first.rule.state,
        first.rule.price,
        first.encoder,
        None if span is None else span[1],
    )
    others = (replace(r, rule=Rule(), choice=r.best) for r in rankings[1:])
    return replace(first, choice=choice.index, expectation=choice), *others


def score_encoder(
    module: nn.Module,
    slices: Slices,
    scores: Score | str | Sequence[Score | str],
    seed: int = 0,
    device: str = "cpu",
    precision: str = "auto",
) -> tuple[Scored, ...]:
    """Score any encoder, not only timm's.

    Args:
        module: Images (N, C, H, W) to a list of feature maps (N, D, h, w), shallow to deep; moved to the device, and left
            in the modes of training and evaluation in which it came.
        slices: The target; with labels where a score needs them.
        scores: By which scores, as ``parse_score`` reads them.
        seed: Seed of views, pixels and bootstrap.
        device: Where it runs.
        precision: ``fp32``, ``bf16``, or ``auto``.

    Returns:
        One result a score. Results of several encoders on the same slices and seed are paired: their samples belong to
        the same resampled patients.

    Raises:
        UserError: The module gives no feature maps, or not the level asked for.
    """
    scores = parse_scores(scores)
    modes = {m: m.training for m in module.modules()}
    try:
        return tuple(score_on_target(module, make_target(slices, scores, seed), scores, seed, device, precision))
    finally:
        for m, training in modes.items():
            m.training = training


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
    for group_results in in_parallel(jobs, ordered=False, num_workers=len(devices) if several else None):
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
        encoder = loaded_encoder(checkpoint, encoder_name, target.input_channels, seed)
        found = score_on_target(encoder, target, scores, seed, device, precision)
        results.append((index, list(enumerate(found))))
    return results


def loaded_encoder(checkpoint: Checkpoint | None, name: str, input_channels: int, seed: int) -> TimmEncoder:
    """The encoder with the weights of a checkpoint, or of None at its random initialisation.

    Raises:
        UserError: A checkpoint that cannot be read or does not fit.
    """
    encoder = random_encoder(name, input_channels, seed)
    if checkpoint is not None:
        encoder.load_weights(read_weights(checkpoint), str(checkpoint.path))
        # the result is kept under the hash, which was taken before
        checkpoint.refuse_changed()
    return encoder


def score_on_target(
    encoder: nn.Module,
    target: Target,
    scores: Sequence[Score],
    seed: int = 0,
    device: str = "cpu",
    precision: str = "auto",
) -> list[Scored]:
    """The scores of one encoder on views and pixels that were made before, in the order of the scores.

    Args:
        encoder: Images to feature maps; left on the device and in eval mode.
        target: Made for these scores, or more.
        scores: Which.
        seed: Seed of the bootstrap.
        device: Where it runs.
        precision: ``fp32``, ``bf16``, or ``auto``.

    Raises:
        UserError: As ``score_encoder``.
    """
    return evaluate(embed(encoder, target, scores, device, precision), scores, seed)


def evaluate(features: Features, scores: Sequence[Score], seed: int) -> list[Scored]:
    """The scores of one encoder's features, on all patients and on each bootstrap draw.

    Raises:
        NoScoreError: A score that does not exist on these features.
        UserError: Features that are all the same, or not finite.
    """
    num_patients = int(features.patients.max()) + 1
    draws = bootstrap_draws(num_patients, BOOTSTRAP_DRAWS, seed)
    found = []
    for score in scores:
        statistic, levels = score.statistic(features)
        value = float(statistic(np.ones((1, num_patients)))[0])
        if not np.isfinite(value):
            raise NoScoreError(
                f"score '{score.name}' is {value} for {features.encoder}: its features are degenerate on these "
                "slices. Choose another score or level."
            )
        found.append(Scored(value, statistic(draws), levels))
    return found


def what_decides(
    slices: Slices, encoder: str, seed: int, device: str, precision: str
) -> Callable[[Checkpoint | None, Score], dict[str, Any]]:
    """A function that describes everything that a score depends on: results of equal descriptions are equal."""
    digests = {labelled: digest(slices, labelled) for labelled in (False, True)}
    common = {
        "encoder": encoder,
        "seed": seed,
        "draws": BOOTSTRAP_DRAWS,
        "device": device,
        "precision": resolved_precision(device, precision),
        "code": code_sha256(),
        "versions": [__version__, *(importlib.metadata.version(p) for p in PACKAGES)],
    }

    def of(checkpoint: Checkpoint | None, score: Score) -> dict[str, Any]:
        return {
            **common,
            "checkpoint": RANDOM if checkpoint is None else checkpoint.content_key,
            "slices": digests[score.labels],
            "score": [score.text, score.views, score.num_views, score.strength],
        }

    return of


def ranking_of(
    score: Score,
    encoder: str,
    candidates: Sequence[Checkpoint | None],
    results: Sequence[Scored],
    rule: Rule,
    num_patients: int,
) -> Ranking:
    """The ranking of candidates by results of the same bootstrap draws, the random initialisation last of both.

    ``num_patients`` are those that the score rests on: a patient without foreground adds nothing to a score with labels.
    """
    # from here to the choice, higher is better
    sign = 1.0 if score.higher_is_better else -1.0
    values = [sign * r.value for r in results]
    samples = np.stack([sign * r.sample for r in results])
    epochs = ages(candidates[:-1])
    best = choose(Rule(), values[:-1], samples[:-1], values[-1], epochs)
    choice = choose(rule, values[:-1], samples[:-1], values[-1], epochs)
    wins = share_of_wins(samples[:-1])
    yardsticks = {"best": best, "last": last_epoch(candidates), RANDOM: len(results) - 1}
    ranked = []
    for i, (checkpoint, result) in enumerate(zip(candidates, results, strict=True)):
        low, high = interval(result.value, result.sample, num_patients)
        compared = {
            name: compare(values[i], samples[i], values[other], samples[other], num_patients)
            for name, other in yardsticks.items()
            if other not in (None, i)
        }
        ranked.append(
            RankedCheckpoint(
                checkpoint=checkpoint,
                value=result.value,
                low=low,
                high=high,
                probability_of_best_score=float(wins[i])
                if checkpoint is not None and num_patients >= FEWEST_PATIENTS
                else None,
                undecided=i == best or compared["best"].is_undecided,
                compared=compared,
                levels=result.levels,
            )
        )
    return Ranking(
        score, encoder, tuple(ranked[:-1]), ranked[-1], best, rule, choice, np.stack([r.sample for r in results[:-1]])
    )


def last_epoch(checkpoints: Sequence[Checkpoint | None]) -> int | None:
    """Index of the checkpoint of the last epoch or step, or None where none states one."""
    stated = {i: age for i, age in enumerate(ages(checkpoints)) if age is not None}
    return max(stated, key=lambda i: stated[i], default=None)

"""Score every checkpoint on the same slices and views, with error bars over patients."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm import tqdm

from mtl_nnunet.checkpoints import Checkpoint, read_contents
from mtl_nnunet.encoder import TimmEncoder, random_encoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.scores import Score
from mtl_nnunet.slices import Slices
from mtl_nnunet.views import make_views

BATCH_SIZE = 32
BOOTSTRAP_DRAWS = 2000
INTERVAL = (2.5, 97.5)
RANDOM = "random"


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
        not_loaded: Tensors of the file that the encoder has no place for (head, final norm).
    """

    checkpoint: Checkpoint | None
    value: float
    low: float
    high: float
    probability_of_best_score: float | None
    undecided: bool
    not_loaded: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What to call it in a table."""
        return RANDOM if self.checkpoint is None else self.checkpoint.label


@dataclass(frozen=True)
class Ranking:
    """All checkpoints of a run, scored.

    Attributes:
        score: Which score.
        encoder: timm's name of the architecture.
        checkpoints: In the order of their epochs.
        random: The same encoder at random initialisation: a yardstick, never chosen.
        best: Index of the chosen checkpoint: the best score; of equal scores the later epoch.
    """

    score: Score
    encoder: str
    checkpoints: tuple[RankedCheckpoint, ...]
    random: RankedCheckpoint
    best: int

    @property
    def chosen(self) -> RankedCheckpoint:
        """The checkpoint with the best score."""
        return self.checkpoints[self.best]

    @property
    def last(self) -> RankedCheckpoint | None:
        """The checkpoint of the last epoch, or None where no file states an epoch."""
        dated = [c for c in self.checkpoints if c.checkpoint is not None and c.checkpoint.epoch is not None]
        return max(dated, key=lambda c: _age(c.checkpoint), default=None)

    @property
    def undecided(self) -> tuple[RankedCheckpoint, ...]:
        """Checkpoints that the score cannot tell from the chosen one, the chosen one included."""
        return tuple(c for c in self.checkpoints if c.undecided)

    def better(self, a: RankedCheckpoint, b: RankedCheckpoint) -> bool:
        """Whether ``a`` scores better than ``b``."""
        return a.value > b.value if self.score.higher_is_better else a.value < b.value


def rank_checkpoints(
    checkpoints: Sequence[Checkpoint],
    encoder: str,
    slices: Slices,
    score: Score,
    seed: int = 0,
    device: str = "cpu",
) -> Ranking:
    """Score checkpoints of one architecture on the same slices and views.

    Checkpoints are scored through joblib: one after the other by default, and in parallel inside a
    ``joblib.parallel_config`` of the caller's.

    Args:
        checkpoints: What to rank.
        encoder: timm's name of their architecture.
        slices: The target.
        score: By which score.
        seed: Seed of views, bootstrap and random initialisation.
        device: Where the encoder runs: ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UserError: A checkpoint that does not fit, a level that the encoder does not have, or not enough patients.
    """
    if not checkpoints:
        raise UserError("no checkpoint to rank. Pass a run's folder or its files with -ckpt.")
    views = make_views(slices.images, score.views, score.num_views, seed)
    draws = bootstrap_draws(slices.num_patients, BOOTSTRAP_DRAWS, seed)
    candidates: list[Checkpoint | None] = [*checkpoints, None]
    jobs = (delayed(_score)(c, encoder, views, slices.patients, score, draws, seed, device) for c in candidates)
    values, samples, not_loaded = [], [], []
    with tqdm(total=len(candidates), desc="Scoring checkpoints", unit="checkpoint", file=sys.stderr) as bar:
        for value, sample, rest in Parallel(return_as="generator")(jobs):
            values.append(value)
            samples.append(sample)
            not_loaded.append(rest)
            bar.update()
    sign = 1.0 if score.higher_is_better else -1.0
    best = max(range(len(checkpoints)), key=lambda i: (sign * values[i], _age(checkpoints[i])))
    candidate_samples = np.stack(samples[:-1])
    wins = _share_of_wins(sign * candidate_samples)
    ranked = []
    for i, checkpoint in enumerate(candidates):
        low, high = interval(samples[i])
        difference_low, difference_high = interval(samples[i] - samples[best])
        ranked.append(
            RankedCheckpoint(
                checkpoint=checkpoint,
                value=values[i],
                low=low,
                high=high,
                probability_of_best_score=float(wins[i]) if checkpoint is not None else None,
                undecided=bool(i == best or difference_low <= 0 <= difference_high),
                not_loaded=tuple(not_loaded[i]),
            )
        )
    return Ranking(score, encoder, tuple(ranked[:-1]), ranked[-1], best)


def embed(encoder: TimmEncoder, images: Tensor, level: int, pooled: bool, device: str = "cpu") -> Tensor:
    """Embeddings of images: one feature map, averaged over space or flattened.

    Args:
        encoder: Used in eval mode.
        images: Shape (N, C, H, W).
        level: 1 is the shallowest feature map, -1 the deepest.
        pooled: Average over space, or keep every position.
        device: Where the forwards run.

    Returns:
        Shape (N, D), float32, on the CPU.

    Raises:
        UserError: The encoder has no such level, or cannot take images of this size.
    """
    levels = len(encoder.output_channels)
    if not (1 <= level <= levels or -levels <= level <= -1):
        raise UserError(
            f"encoder '{encoder.name}' has no level {level}: it has levels 1 to {levels}, or -1 to -{levels}."
        )
    index = level - 1 if level > 0 else level
    encoder = encoder.to(device).eval()
    embedded = []
    with torch.inference_mode():
        for batch in torch.split(images, BATCH_SIZE):
            try:
                features = encoder(batch.to(device))[index]
            except (AssertionError, RuntimeError) as error:
                if "memory" in str(error):
                    raise UserError(f"out of memory on {device}. Pass -device cpu, or fewer -num_slices.") from error
                raise UserError(
                    f"encoder '{encoder.name}' cannot take slices of {tuple(batch.shape[2:])} pixels ({error}). "
                    "Use a convolutional encoder."
                ) from error
            embedded.append((features.mean((2, 3)) if pooled else features.flatten(1)).float().cpu())
    return torch.cat(embedded)


def bootstrap_draws(num_patients: int, num_draws: int, seed: int) -> np.ndarray:
    """How often each patient is drawn in each resampled dataset, shape (num_draws, num_patients); rows sum to P."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=num_draws).astype(np.float64)


def interval(sample: np.ndarray) -> tuple[float, float]:
    """The central 95 % of a bootstrap sample; draws on which the score does not exist are left out."""
    low, high = np.nanpercentile(sample, INTERVAL)
    return float(low), float(high)


def _score(
    checkpoint: Checkpoint | None,
    encoder_name: str,
    views: Tensor,
    patients: np.ndarray,
    score: Score,
    draws: np.ndarray,
    seed: int,
    device: str,
) -> tuple[float, np.ndarray, list[str]]:
    encoder = random_encoder(encoder_name, views.shape[2], seed)
    not_loaded = []
    if checkpoint is not None:
        not_loaded = encoder.load_weights(read_contents(checkpoint.path).weights, str(checkpoint.path))
    embeddings = torch.stack([embed(encoder, view, score.level, score.pooled, device) for view in views])
    statistic = score.statistic(embeddings, patients)
    return float(statistic(np.ones((1, draws.shape[1])))[0]), statistic(draws), not_loaded


def _age(checkpoint: Checkpoint | None) -> int:
    return -1 if checkpoint is None or checkpoint.epoch is None else checkpoint.epoch


def _share_of_wins(samples: np.ndarray) -> np.ndarray:
    samples = samples[:, ~np.isnan(samples).any(0)]
    winners = samples == samples.max(0)
    shares: np.ndarray = (winners / winners.sum(0)).mean(1)
    return shares

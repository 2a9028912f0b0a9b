"""Choose with fewer forwards: checkpoints that are clearly out on a part of the patients see no more of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from joblib import delayed
from scipy import stats
from tqdm import tqdm

from mtl_nnunet.bootstrap import FEWEST_PATIENTS as FEWEST_FOR_INTERVAL
from mtl_nnunet.bootstrap import interval
from mtl_nnunet.cache import Scored
from mtl_nnunet.checkpoints import Checkpoint
from mtl_nnunet.decision import Rule
from mtl_nnunet.embedding import Target, embed, make_target
from mtl_nnunet.errors import NoScoreError, UserError
from mtl_nnunet.parallel import in_parallel
from mtl_nnunet.pixels import Pixels
from mtl_nnunet.ranking import RankedCheckpoint, Ranking, evaluate, last_epoch, loaded_encoder, ranking_of
from mtl_nnunet.scores import Features, Score
from mtl_nnunet.slices import Slices

SHARES = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)
FEWEST_PATIENTS = 8
# of a checkpoint as good as the leader going out in a round; small, since what is out never comes back
RISK = 0.001


def race_checkpoints(
    checkpoints: Sequence[Checkpoint],
    encoder: str,
    slices: Slices,
    score: Score,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "auto",
) -> tuple[Ranking, float]:
    """Score checkpoints on an eighth of the patients, then on more and more, dropping those that are clearly worse.

    After each round a checkpoint is out when a paired t test over the patients seen, with the bootstrap's standard error,
    puts it behind the leader at a level of 0.1 %. A round on whose patients the score does not exist puts nobody out.
    Those that stay to the end get exactly the score that ``rank_checkpoints`` gives them.

    Args:
        checkpoints: What to choose from.
        encoder: timm's name of their architecture.
        slices: The target.
        score: By which score.
        seed: Seed of views, bootstrap, random initialisation and the order of the patients.
        device: Where the encoder runs.
        precision: ``fp32``, ``bf16``, or ``auto``.

    Returns:
        The ranking, where a checkpoint that went out has the score it had then, and the share of the forwards that
        scoring all checkpoints on everything takes.

    Raises:
        UserError: As ``rank_checkpoints``.
    """
    if not checkpoints:
        raise UserError("no checkpoint to rank. Pass a run's folder or its files with -ckpt.")
    target = make_target(slices, [score], seed)
    behind = slices.patients_behind(score.labels)
    order = np.random.default_rng([seed, 2]).permutation(target.num_patients)
    ends = sorted({max(min(FEWEST_PATIENTS, len(order)), round(share * len(order))) for share in SHARES})
    candidates: list[Checkpoint | None] = [*checkpoints, None]
    for checkpoint in checkpoints:
        # of the file as it is now: what is read later must still be this
        checkpoint.content_key  # noqa: B018
    running = list(range(len(candidates)))
    seen: dict[int, list[Features]] = {i: [] for i in running}
    out: dict[int, tuple[Scored, tuple[float, float], int]] = {}
    results: dict[int, Scored] = {}
    forwards, start = 0, 0
    parts: list[np.ndarray] = []
    sign = 1.0 if score.higher_is_better else -1.0
    for end in ends:
        rows = np.flatnonzero(np.isin(target.patients, order[start:end]))
        parts.append(rows)
        part = _part(target, rows)
        jobs = (
            delayed(_embed_candidate)(candidates[i], encoder, part, score, seed, device, precision) for i in running
        )
        with tqdm(total=len(running), desc=f"Racing on {end} patients", unit="checkpoint", file=sys.stderr) as bar:
            for i, features in zip(running, in_parallel(jobs), strict=True):
                seen[i].append(features)
                bar.update()
        forwards += len(rows) * len(running)
        whole = _part(target, np.sort(np.concatenate(parts)), renumbered=True)
        start = end
        try:
            for i in running:
                (results[i],) = evaluate(_joined(seen[i], parts, whole), [score], seed)
        except NoScoreError:
            if end == ends[-1]:
                raise
            continue
        in_play = [i for i in running if candidates[i] is not None]
        if end < ends[-1]:
            rests_on = int(np.isin(order[:end], behind).sum())
            stay = survivors(
                [sign * results[i].value for i in in_play],
                np.stack([sign * results[i].sample for i in in_play]),
                rests_on,
            )
            for i in (in_play[k] for k in range(len(in_play)) if k not in stay):
                out[i] = (results[i], interval(results[i].value, results[i].sample, rests_on), end)
                del seen[i]
            running = [i for i in running if i not in out]
    kept = [i for i in running if candidates[i] is not None]
    ranking = ranking_of(
        score,
        encoder,
        [*(candidates[i] for i in kept), None],
        [*(results[i] for i in kept), results[len(checkpoints)]],
        Rule(),
        len(behind),
    )
    by_index = dict(zip(kept, ranking.checkpoints, strict=True))
    for i, (scored, (low, high), patients) in out.items():
        by_index[i] = RankedCheckpoint(
            candidates[i], scored.value, low, high, 0.0, undecided=False, levels=scored.levels, out_after=patients
        )
    if last_epoch(checkpoints) not in kept:
        # the last epoch went out on fewer patients: those that stayed are not paired with it
        by_index = {
            i: replace(r, compared={k: c for k, c in r.compared.items() if k != "last"}) for i, r in by_index.items()
        }
    samples = np.full((len(checkpoints), ranking.samples.shape[1]), np.nan)
    samples[kept] = ranking.samples
    return replace(
        ranking,
        checkpoints=tuple(by_index[i] for i in range(len(checkpoints))),
        best=kept[ranking.best],
        choice=kept[ranking.choice],
        samples=samples,
    ), forwards / (len(candidates) * len(target.patients))


def survivors(values: Sequence[float], samples: np.ndarray, num_patients: int) -> list[int]:
    """Who stays in: the leader, and all that are not behind it by more than its standard error times Student's t.

    Args:
        values: Score of each on the patients seen, higher is better, shape (K,).
        samples: Scores on resampled patients, shape (K, B), every draw the same for all; NaN where there is none.
        num_patients: On how many patients the scores rest, P; below four all stay. A bootstrap's standard error is too
            small by sqrt((P - 1) / P).

    Examples:
        >>> samples = np.array([[0.9, 0.8, 0.85], [0.5, 0.6, 0.55], [0.85, 0.9, 0.8]])
        >>> survivors([0.9, 0.5, 0.88], samples, num_patients=50)
        [0, 2]
    """
    leader = int(np.argmax(values))
    differences = samples - samples[leader]
    exist = ~np.isnan(differences)
    if num_patients < FEWEST_FOR_INTERVAL or exist.sum(1).min() < 2:
        return list(range(len(values)))
    errors = np.nanstd(differences, axis=1, ddof=1) * np.sqrt(num_patients / (num_patients - 1))
    reach = stats.t.ppf(1 - RISK, num_patients - 1) * errors
    return [k for k, value in enumerate(values) if value + reach[k] >= values[leader]]


def _embed_candidate(
    checkpoint: Checkpoint | None, name: str, part: Target, score: Score, seed: int, device: str, precision: str
) -> Features:
    encoder = loaded_encoder(checkpoint, name, part.input_channels, seed)
    return embed(encoder, part, [score], device, precision)


def _part(target: Target, rows: np.ndarray, renumbered: bool = False) -> Target:
    """The target's slices ``rows``, sorted, with the pixels on them."""
    patients = target.patients[rows]
    numbers = np.unique(patients)

    def number(of: np.ndarray) -> np.ndarray:
        return np.searchsorted(numbers, of) if renumbered else of

    pixels = {}
    for labelled, p in target.pixels.items():
        kept = np.isin(p.slices, rows)
        pixels[labelled] = Pixels(
            np.searchsorted(rows, p.slices[kept]),
            p.rows[kept],
            p.columns[kept],
            p.labels[kept],
            number(p.patients[kept]),
        )
    return Target({k: v[:, rows] for k, v in target.views.items()}, number(patients), pixels)


def _joined(features: Sequence[Features], parts: Sequence[np.ndarray], whole: Target) -> Features:
    """Features of parts in the order of the whole."""
    by_slice = torch.as_tensor(np.argsort(np.concatenate(parts), kind="stable"))
    first = features[0]
    embeddings = {k: torch.cat([f.embeddings[k] for f in features], dim=1)[:, by_slice] for k in first.embeddings}
    at_pixels = {}
    for labelled, level in first.at_pixels:
        owners = np.concatenate([parts[i][f.pixels[labelled].slices] for i, f in enumerate(features)])
        by_pixel = torch.as_tensor(np.argsort(owners, kind="stable"))
        at_pixels[labelled, level] = torch.cat([f.at_pixels[labelled, level] for f in features])[by_pixel]
    return Features(embeddings, at_pixels, whole.patients, whole.pixels, first.num_levels, first.encoder)

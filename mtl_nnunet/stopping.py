"""Scores of the checkpoints so far -> go on with the pretraining, or stop it: the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtl_nnunet.bootstrap import FEWEST_PATIENTS, compare
from mtl_nnunet.chooser import (
    Chooser,
    by_epoch,
    draw_curves,
    is_last_without_a_price,
    log_time,
    read_chooser,
    restricted,
    trends,
    unlike,
    usable_scores,
)
from mtl_nnunet.curves import STATES
from mtl_nnunet.errors import UserError, listed

RULES = ("auto", "expected-gain", "patience")
# future epochs that are compared
MOST_FUTURE = 12
# with fewer checkpoints, or of a smaller share of the run, a score has no trend that could be carried on, and its spread so far says
# little of the whole: with four of forty epochs, a run was stopped for what its first scores did
FEWEST_FOR_TREND = 6
LEAST_SHARE = 1 / 3
# six of nine checkpoints seen, the median error on the published scores is half a deviation of the curve; without it five
SHRINKAGE = 1.0
TAILS = (5.0, 95.0)


@dataclass(frozen=True)
class StopRule:
    """How it is decided whether a pretraining goes on.

    Attributes:
        name: ``expected-gain``: stop where no later epoch is expected to bring more Dice than its epochs are worth;
            ``patience``: stop where the score has not improved for some checkpoints; ``auto``: the former where checkpoints
            state epochs and the length of the run is known, else the latter, which no price goes with.
        price: Expected gain: what a whole pretraining is worth, in Dice points.
        state: Expected gain: whether the encoder will be trained on the target (``free``) or not (``frozen``).
        patience: For how many checkpoints the score may fail to improve.
        chooser: Expected gain: a file of ``mtl-nnunet fit-chooser``; None for the shipped one.

    Raises:
        UserError: A name, price, state or patience that cannot be.
    """

    name: str = "auto"
    price: float = 0.0
    state: str = "free"
    patience: int = 3
    chooser: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.name not in RULES:
            raise UserError(f"unknown rule '{self.name}'. Available: {listed(list(RULES))}.")
        if not (np.isfinite(self.price) and self.price >= 0):
            raise UserError(f"price is {self.price}; expected Dice points, at least 0.")
        if self.state not in STATES:
            raise UserError(f"state '{self.state}' is unknown. Expected {' or '.join(STATES)}.")
        if self.patience < 1:
            raise UserError(f"patience is {self.patience}; expected at least 1 checkpoint.")


@dataclass(frozen=True)
class Gain:
    """What going on is expected to bring over stopping now, in Dice from 0 to 1, what it costs taken off.

    Attributes:
        value: Expected gain of the best epoch to go on to.
        low: Lower end of its 90 % interval.
        high: Upper end.
        cost: What the epochs until then are worth.
        until: That epoch.
        best: Index of the seen checkpoint that is expected to be best.
        used: Scores that entered.
        warnings: In which ways this run is unlike those that the chooser was fitted on.
    """

    value: float
    low: float
    high: float
    cost: float
    until: float
    best: int
    used: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def text(self) -> str:
        """The gain in words."""
        return (
            f"{100 * self.value:+.2f} Dice points [{100 * self.low:+.2f}, {100 * self.high:+.2f}] by epoch {self.until:g}, "
            f"{100 * self.cost:.2f} for its cost taken off"
        )


@dataclass(frozen=True)
class Advice:
    """Whether to stop, and why.

    Attributes:
        stop: Whether the rule says so.
        is_over: Whether the run has reached its planned end, so that there is nothing to stop.
        rule: The rule that decided, ``expected-gain`` or ``patience``.
        best: Index of the checkpoint to start from, as far as the rule can tell.
        reason: In words.
        gain: Of going on; None by patience, and at the end of the run.
        warnings: What a user should know before believing it.
    """

    stop: bool
    is_over: bool
    rule: str
    best: int
    reason: str
    gain: Gain | None = None
    warnings: tuple[str, ...] = ()


def decide(
    rule: StopRule,
    epochs: Sequence[float | None],
    values: Sequence[float],
    samples: np.ndarray,
    num_patients: int,
    scores: Mapping[str, Sequence[float]] | None = None,
    last_epoch: float | None = None,
    encoder: str | None = None,
) -> Advice:
    """Whether a pretraining should go on after the checkpoints that it has written.

    Args:
        rule: By which rule.
        epochs: Of each checkpoint; where all state one their order does not matter, else they are in the order of their writing. Shape (K,).
        values: The score that patience goes by, HIGHER IS BETTER, shape (K,).
        samples: That score on resampled patients, every draw the same for all, shape (K, B).
        num_patients: Of how many patients the draws are.
        scores: For the chooser: by name as typed for ``-score``, HIGHER IS BETTER, shape (K,) each.
        last_epoch: Number of the last planned epoch as the run counts them; None where the length of the run is not known.
        encoder: Architecture, to be told where the chooser never saw it.

    Raises:
        UserError: No checkpoint, one epoch twice, or expected gain or a price where epochs or the length are not known.

    Examples:
        >>> samples = np.array([[0.70, 0.72], [0.80, 0.82], [0.80, 0.81], [0.79, 0.80]])
        >>> advice = decide(StopRule(patience=2), [0, 1, 2, 3], [0.71, 0.81, 0.805, 0.795], samples, num_patients=50)
        >>> advice.stop, advice.best, advice.rule
        (True, 1, 'patience')
    """
    dated = all(e is not None for e in epochs)
    if not len(epochs):
        raise UserError("no checkpoint has been scored, so nothing can be decided.")
    at = np.array(epochs, float) if dated else np.arange(len(epochs), dtype=float)
    if len(set(at)) < len(at):
        raise UserError(
            f"an epoch is given twice: {listed([f'{e:g}' for e in sorted(at)], 20)}. Expected one checkpoint an epoch."
        )
    by_gain = rule.name == "expected-gain" or (rule.name == "auto" and dated and last_epoch is not None)
    missing = (
        "the planned length of the run is not known: pass -epochs N (where checkpoints state epochs, not steps)"
        if dated
        else "not every checkpoint states its epoch"
    )
    if by_gain and (not dated or last_epoch is None):
        raise UserError(f"rule 'expected-gain' goes by epochs, and {missing}. Or use -rule patience.")
    if rule.name == "auto" and not by_gain and rule.price > 0:
        raise UserError(
            f"a price of {rule.price:g} Dice points is held against a gain by epochs, and {missing}. Or use -rule patience, which has no price."
        )
    is_over = dated and last_epoch is not None and at.max() >= last_epoch
    if not by_gain:
        advice = _by_patience(rule, at, np.asarray(values, float), samples, num_patients, dated, bool(is_over))
        if rule.name == "patience":
            return advice
        said = f"patience decides, and may stop at a plateau of the score: {missing}."
        return replace(advice, warnings=(said, *advice.warnings))
    assert last_epoch is not None
    # a run that goes on beyond its plan is over all the same
    gain = expected_gain(
        read_chooser(rule.chooser),
        at,
        max(last_epoch, float(at.max())),
        scores,
        rule.state,
        rule.price,
        encoder,
    )
    goes_on = is_last_without_a_price(read_chooser(rule.chooser).states[rule.state], rule.price, gain.used, encoder)
    best = int(np.argmax(at)) if goes_on else gain.best
    if is_over:
        return Advice(True, True, "expected-gain", best, "the last planned epoch is reached", None, gain.warnings)
    stop = gain.value <= 0 and not goes_on
    said = f"expected gain of going on: {gain.text}"
    return Advice(stop, False, "expected-gain", best, said, gain, gain.warnings)


def expected_gain(
    chooser: Chooser,
    epochs: Sequence[float] | np.ndarray,
    last_epoch: float,
    scores: Mapping[str, Sequence[float]] | None = None,
    state: str = "free",
    price: float = 0.0,
    encoder: str | None = None,
) -> Gain:
    """What going on with a pretraining is expected to bring, less what it costs; stop where it is not above 0.

        max over later epochs t of  E[f(t)] - max over seen epochs E[f] - price / 100 * (t - now) / last epoch

    f is drawn from the chooser's curves, given the scores so far. What a score will be at a later epoch is its own trend
    so far (least squares on ``chooser.trends``, the slopes shrunk), with nothing beyond the trend. Scores of
    fewer than six checkpoints or of less than a third of the run, and those that are unlike all that were fitted, are left out; with none left the
    prior over epochs decides.

    Args:
        chooser: From ``read_chooser``.
        epochs: Of the checkpoints so far, in any order, shape (K,).
        last_epoch: Number of the last planned epoch as the run counts them.
        scores: By name as typed for ``-score``, the value at each checkpoint, HIGHER IS BETTER, shape (K,).
        state: ``free`` or ``frozen``.
        price: What a whole pretraining is worth, in Dice points.
        encoder: Architecture, to be told where the chooser never saw it.

    Returns:
        With ``last_epoch`` seen already, a gain of 0 at no cost.

    Raises:
        UserError: An epoch beyond the last one or below 0, scores of another number of checkpoints, or a state that was not fitted.

    Examples:
        >>> early, late = (expected_gain(read_chooser(), [1, 20, now], 300, price=1.0) for now in (40, 150))
        >>> f"{early.value:.4f} by {early.until:g}, {late.value:.4f} by {late.until:g}"
        '0.0075 by 213, 0.0008 by 200'
    """
    at, given, order = by_epoch(epochs, scores)
    if at[-1] > last_epoch:
        raise UserError(
            f"epoch {at[-1]:g} lies beyond the last planned epoch, {last_epoch:g}. Pass the length of the whole run: -epochs."
        )
    if state not in chooser.states:
        raise UserError(
            f"no curve of state '{state}' was fitted: expected {listed(sorted(chooser.states))}. Or use -rule patience."
        )
    known, seen = chooser.states[state], len(at)
    everything = np.concatenate([at, _later(at[-1], last_epoch)])
    if known.evidence is not None and given and (seen < FEWEST_FOR_TREND or at[-1] < LEAST_SHARE * last_epoch):
        usable: dict[str, np.ndarray] = {}
        warnings = [
            f"scores have a say from {FEWEST_FOR_TREND} checkpoints and a third of the run on: until then epochs alone decide."
        ]
    else:
        usable, warnings = usable_scores(known, given)
    carried = {name: carried_on(values, everything, last_epoch) for name, values in usable.items()}
    model = restricted(known.evidence, tuple(carried)) if carried and known.evidence is not None else known.prior
    more, is_extreme = unlike(known, model, everything, last_epoch, carried, encoder, judges_number=False)
    if is_extreme:
        more.append("that is so unlike the fitted curves that scores are left out: epochs alone decide.")
        carried, model = {}, known.prior
    curves = draw_curves(model, everything, carried, last_epoch)
    expected = curves.mean(0)
    best = seen - 1 - int(np.argmax(expected[:seen][::-1]))
    if seen == len(everything):
        return Gain(0.0, 0.0, 0.0, 0.0, float(at[-1]), int(order[best]), tuple(carried), (*warnings, *more))
    costs = price / 100 * (everything - at[-1]) / max(last_epoch, 1.0)
    until = seen + int(np.argmax((expected - costs)[seen:]))
    gains = curves[:, until] - curves[:, best]
    # as far as losses were found to be held too narrowly
    ends = gains.mean() + model.loss_factor * (np.percentile(gains, TAILS) - gains.mean()) - costs[until]
    return Gain(
        value=float(expected[until] - expected[best] - costs[until]),
        low=float(ends[0]),
        high=float(ends[1]),
        cost=float(costs[until]),
        until=float(everything[until]),
        best=int(order[best]),
        used=tuple(carried),
        warnings=(*warnings, *more),
    )


def carried_on(values: np.ndarray, epochs: np.ndarray, last_epoch: float) -> np.ndarray:
    """Scores of the first checkpoints, and beyond them where their trend leads, shape of ``epochs``.

    The trend is fitted by least squares on log time, time and its square, with slopes shrunk towards 0 as if known to be of
    the size of the noise; unshrunk it runs away.

    Args:
        values: Scores so far, shape (S,).
        epochs: Of the S checkpoints so far and of later ones, ascending, shape (K,).
        last_epoch: Number of the last planned epoch.

    Examples:
        >>> carried_on(np.array([1.0, 2.0, 3.0, 3.5, 3.7]), np.array([1.0, 5.0, 20.0, 50.0, 100.0, 200.0, 300.0]), 300).round(2)
        array([1.  , 2.  , 3.  , 3.5 , 3.7 , 3.68, 3.92])
    """
    seen = len(values)
    trend = trends(log_time(epochs, last_epoch))
    x = np.concatenate([np.ones((len(epochs), 1)), trend], axis=1)
    penalty = SHRINKAGE * np.diag([0.0, *[1.0] * trend.shape[1]])
    slopes = np.linalg.solve(x[:seen].T @ x[:seen] + penalty, x[:seen].T @ values)
    return np.concatenate([values, x[seen:] @ slopes])


def last_improvement(values: np.ndarray, samples: np.ndarray, num_patients: int) -> int:
    """Index of the last checkpoint whose score was better than the best before it beyond their paired noise.

    A checkpoint takes the record where the 95 % interval over patients of its difference to the holder lies above 0;
    of fewer than four patients there is no interval, and any increase counts.

    Args:
        values: HIGHER IS BETTER, in order, shape (K,).
        samples: On resampled patients, shape (K, B).
        num_patients: Of how many patients.

    Examples:
        >>> noise = np.random.default_rng(0).normal(0, 0.01, (3, 2000))
        >>> last_improvement(np.array([0.5, 0.6, 0.61]), np.array([[0.5], [0.6], [0.61]]) + noise, num_patients=50)
        1
    """
    record = 0
    for i in range(1, len(values)):
        compared = compare(values[i], samples[i], values[record], samples[record], num_patients)
        if compared.low > 0 or (num_patients < FEWEST_PATIENTS and compared.gain > 0):
            record = i
    return record


def _by_patience(
    rule: StopRule,
    at: np.ndarray,
    values: np.ndarray,
    samples: np.ndarray,
    num_patients: int,
    dated: bool,
    is_over: bool,
) -> Advice:
    order = np.argsort(at, kind="stable")
    record = last_improvement(values[order], np.asarray(samples)[order], num_patients)
    since = len(at) - 1 - record
    named = f"epoch {at[order[record]]:g}" if dated else f"checkpoint {record + 1}"
    reason = (
        "the last planned epoch is reached"
        if is_over
        else f"{since} of {rule.patience} checkpoints without an improvement beyond its noise since {named}"
    )
    warnings = (
        (f"only {num_patients} patients: noise is not known, and any increase counts as an improvement.",)
        if num_patients < FEWEST_PATIENTS
        else ()
    )
    return Advice(is_over or since >= rule.patience, is_over, "patience", int(order[record]), reason, None, warnings)


def _later(now: float, last: float) -> np.ndarray:
    steps = int(min(MOST_FUTURE, np.ceil(last - now)))
    later: np.ndarray = np.unique(np.round(np.linspace(now, last, steps + 1)[1:]))
    return later[later > now]

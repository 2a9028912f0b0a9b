"""Curves of real trainings -> a chooser, and how well it chooses on targets and encoders that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import linalg, optimize, stats

from mtl_nnunet.chooser import (
    CONSTANT,
    COVERAGE,
    NUM_TRENDS,
    STEEPEST,
    Model,
    StateModel,
    covariance,
    draw_curves,
    features,
    log_rms,
    log_time,
    restricted,
    shortest_interval,
    standardised,
    trends,
    value_at_levels,
)
from mtl_nnunet.curves import Curve
from mtl_nnunet.errors import UserError
from mtl_nnunet.evaluation import fixed_line, same_budget

FEWEST_CURVES = 6
# weakly informative, log-normal: amplitude, two lengths, single deviation, size of a score's coefficient; and normal: the fall
START = np.r_[np.log([0.4, 1.5, 0.4, 0.1, 0.3]), 1.0]
WIDTH = np.array([1.0, 0.7, 0.7, 1.0, 1.0, 2.0])
TREND_DEVIATION = 10.0
# the level of a curve is free: it says nothing about which checkpoint is best
FREE_LEVEL = 100.0
# variance, so that covariances of curves without noise, or all alike, can be inverted
FLOOR = 1e-9
BUDGETS = (1 / 3, 1 / 2, 2 / 3)
PRICES = np.r_[0, np.geomspace(0.0005, 0.3, 60)]
# at which losses are calibrated: Dice per whole pretraining
TYPICAL_PRICES = (0.0, 0.0025, 0.005, 0.01, 0.02)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A curve, and what a model that was not fitted on its group says of it.

    Attributes:
        curve: Which.
        group: What was left out with it.
        expected: Expected loss of each checkpoint, shape (K,).
        losses: Draws of the loss as it would be *measured*, with the noise of the seeds, shape (D, K).
    """

    curve: Curve
    group: str
    expected: np.ndarray
    losses: np.ndarray

    @property
    def regret(self) -> np.ndarray:
        """Measured loss of each checkpoint, shape (K,)."""
        dice = self.curve.mean_dice
        loss: np.ndarray = dice.max() - dice
        return loss

    def choice(self, price: float) -> int:
        """Index at a price in Dice per whole pretraining; of equals the later."""
        cost = self.expected + price * self.curve.epochs / self.curve.epochs[-1]
        return len(cost) - 1 - int(np.argmin(cost[::-1]))

    def holds(self, index: int, factor: float) -> bool:
        """Whether the measured loss of a checkpoint lies in its 90 % interval, stretched by a factor."""
        low, high = shortest_interval(self.losses[:, index])
        return bool(low - 1e-12 <= self.regret[index] <= factor * high)


def fit_state(curves: Sequence[Curve], scores: Sequence[str] = ()) -> StateModel:
    """Fit the prior and the evidence on curves of one state, and stretch loss intervals until they hold on left-out ones.

    Raises:
        UserError: Too few curves, or a score that fewer than six of them have.
    """
    if len(curves) < FEWEST_CURVES:
        raise UserError(f"{len(curves)} curves of one state; expected at least {FEWEST_CURVES}. Add tables.")
    models = []
    for names in [(), tuple(scores)] if scores else [()]:
        model = fit_model(curves, names)
        held = [h for by in ("dataset", "encoder") if _groups(curves, by) > 1 for h in hold_out(curves, names, by)]
        models.append(replace(model, loss_factor=stretch(held)))
    shares = [float(np.exp(log_time(c.epochs[:1].astype(float), float(c.epochs[-1]))[0])) for c in curves]
    return StateModel(
        prior=models[0],
        evidence=models[1] if scores else None,
        num_curves=len(curves),
        num_checkpoints=(min(len(c.epochs) for c in curves), max(len(c.epochs) for c in curves)),
        last_epochs=(float(min(c.epochs[-1] for c in curves)), float(max(c.epochs[-1] for c in curves))),
        first_share=min(shares),
        encoders=tuple(sorted({c.encoder for c in curves})),
    )


def fit_model(curves: Sequence[Curve], scores: Sequence[str] = ()) -> Model:
    """Maximum a posteriori of the few parameters of the kernel, closed form for the rest.

    A curve that lacks a score enters with what is expected of it at its epochs, that is with nothing beyond them.

    Args:
        curves: Of one state.
        scores: That enter.
    """
    noise = seed_covariances(curves)
    own = [c.mean_dice - c.mean_dice.mean() for c in curves]
    # what varies beyond the seeds; a flat curve is not blown up to noise
    steep = np.sqrt([
        max((y**2).sum() / (len(y) - 1) - v, 0.1 * v + 1e-8)
        for y, v in ((y, noise_variance(n)) for y, n in zip(own, noise, strict=True))
    ])  # fmt: skip
    logs = np.log(steep)
    mean, spread = float(logs.mean()), float(max(logs.std(ddof=1), 0.05))
    times = [log_time(c.epochs.astype(float), float(c.epochs[-1])) for c in curves]
    values = [[_standardised_or_nan(c, name) for name in scores] for c in curves]
    score_trends, beyond = _without_trend(times, values, len(scores))
    designs = [
        features(t, float(np.clip((s - mean) / spread, -STEEPEST, STEEPEST)), b)
        for t, s, b in zip(times, logs, beyond, strict=True)
    ]
    shapes = [y / s for y, s in zip(own, steep, strict=True)]
    errors = [n / s**2 for n, s in zip(noise, steep, strict=True)]

    def posterior(parameters: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        kernel, size = kernel_of(parameters), np.exp(parameters[4])
        precision = np.diag(np.r_[np.full(2 * NUM_TRENDS, TREND_DEVIATION**-2), np.full(len(scores), size**-2.0)])
        fitness = np.log(np.diag(precision)).sum() / 2 - (((parameters - START) / WIDTH) ** 2).sum() / 2
        moment = np.zeros(len(precision))
        for time, x, y, error in zip(times, designs, shapes, errors, strict=True):
            root = np.linalg.cholesky(covariance(kernel, time) + error + FREE_LEVEL + FLOOR * np.eye(len(time)))
            white = linalg.solve_triangular(root, np.c_[x, y], lower=True, check_finite=False)
            precision = precision + white[:, :-1].T @ white[:, :-1]
            moment = moment + white[:, :-1].T @ white[:, -1]
            fitness -= np.log(np.diag(root)).sum() + white[:, -1] @ white[:, -1] / 2
        fitness += moment @ np.linalg.solve(precision, moment) / 2 - np.linalg.slogdet(precision)[1] / 2
        return -fitness, precision, moment

    best = optimize.minimize(lambda p: posterior(p)[0], START, method="L-BFGS-B", options={"maxiter": 60}).x
    _, precision, moment = posterior(best)
    raw = np.array([
        [np.nan if np.isnan(z).any() else np.log(value_at_levels(c.scores, name).std()) for name, z in zip(scores, zs, strict=True)]  # type: ignore[union-attr]
        for c, zs in zip(curves, values, strict=True)
    ]).reshape(len(curves), len(scores))  # fmt: skip
    spreads = _center_and_deviation(raw)
    steepness_noise, steepness_precision, steepness_moment = _fit_steepness(
        logs - mean, np.nan_to_num((raw - spreads[0]) / spreads[1])
    )
    surprise = np.array([[log_rms(b[:, j]) for j in range(len(scores))] for b in beyond]).reshape(raw.shape)
    return Model(
        scores=tuple(scores),
        kernel=kernel_of(best),
        precision=precision,
        moment=moment,
        score_trends=score_trends,
        steepness=np.array([mean, spread, steepness_noise]),
        steepness_precision=steepness_precision,
        steepness_moment=steepness_moment,
        spreads=spreads,
        surprises=_center_and_deviation(np.where(np.isnan(raw), np.nan, surprise)),
        scored=np.isfinite(raw).sum(0).astype(float),
    )


def kernel_of(parameters: np.ndarray) -> np.ndarray:
    """Of the deviations, as in ``Model.kernel``, from the parameters that are fitted."""
    kernel: np.ndarray = np.r_[np.exp(parameters[:4]), parameters[5]]
    return kernel


def seed_covariances(curves: Sequence[Curve]) -> list[np.ndarray]:
    """Covariance of the mean Dice of the checkpoints due to the training seed, without their level, shape (K, K) a curve.

    What a seed does to all checkpoints alike (an easy draw of training cases) decides nothing, so it is taken out: the variance is
    that of the residuals of Dice = checkpoint + seed; one seed borrows from the other curves. Of it a part runs along log time,
    since a draw that suits early checkpoints suits all early ones; how much is told from all curves together.
    """
    pooled = [_residual_variance(c.dice) for c in curves]
    known = [v for v in pooled if np.isfinite(v)]
    usual = float(np.median(known)) if known else 1e-5
    ratio = _along_time(curves)
    covariances = []
    for c, variance in zip(curves, pooled, strict=True):
        n = len(c.epochs)
        size, line = np.sqrt(1 / np.isfinite(c.dice).sum(1)), _line(c)
        rest = (variance if np.isfinite(variance) else usual) * (n - 1) / max(n - 2 + ratio, 1e-12)
        shape = np.eye(n) - 1 / n + (ratio - 1) * np.outer(line, line)
        covariances.append(rest * size[:, None] * shape * size)
    return covariances


def seed_residuals(dice: np.ndarray) -> np.ndarray:
    """What is left of Dice = checkpoint + seed in a table without gaps, shape (K, S) or (S, K)."""
    rest: np.ndarray = dice - dice.mean(0) - dice.mean(1, keepdims=True) + dice.mean()
    return rest


def noise_variance(covariance: np.ndarray) -> float:
    """What noise adds to the variance of a curve over its checkpoints.

    Examples:
        >>> noise_variance(np.eye(3)), noise_variance(np.ones((3, 3)))
        (1.0, 0.0)
    """
    n = len(covariance)
    return float((np.trace(covariance) - covariance.sum() / n) / (n - 1))


def _along_time(curves: Sequence[Curve]) -> float:
    """Variance of seeds along log time, divided by that in any other direction; 1 where no curve can tell.

    By maximum likelihood: in each curve that quotient, by its own seeds, is the common one times a draw of the F distribution.
    """
    along, rest, freedom = [], [], []
    for c in curves:
        # seeds that trained from every checkpoint
        dice = c.dice[:, np.isfinite(c.dice).all(0)]
        epochs, seeds = dice.shape
        if epochs < 3 or seeds < 2:
            continue
        residuals = seed_residuals(dice)
        own = float(((_line(c) @ residuals) ** 2).sum())
        other = float((residuals**2).sum()) - own
        # of equal seeds rounding is left
        if other > CONSTANT * float((dice**2).sum()):
            along.append(own)
            rest.append(other)
            freedom.append((seeds - 1, (seeds - 1) * (epochs - 2)))
    if not along:
        return 1.0
    one, others = np.array(freedom).T

    def misfit(log_ratio: float) -> float:
        total = np.log(np.array(along) * np.exp(-log_ratio) + rest)
        return float((one * log_ratio + (one + others) * total).sum() / 2)

    return float(np.exp(optimize.minimize_scalar(misfit, bounds=(-4, 4), method="bounded").x))


def _line(curve: Curve) -> np.ndarray:
    """Log time, centred and of length one, shape (K,); of a single checkpoint zero."""
    time = log_time(curve.epochs.astype(float), float(curve.epochs[-1]))
    centred = time - time.mean()
    line: np.ndarray = centred / max(float(np.linalg.norm(centred)), 1e-12)
    return line


def _residual_variance(dice: np.ndarray) -> float:
    """Of a table (K, S) with gaps, after checkpoint and seed means are fitted; NaN where nothing is left over.

    Examples:
        >>> round(_residual_variance(np.array([[0.1, 0.3], [0.2, 0.4], [0.1, np.nan]])), 12)
        0.0
    """
    checkpoint, seed = np.nonzero(np.isfinite(dice))
    design = np.c_[np.eye(len(dice))[checkpoint], np.eye(dice.shape[1])[seed]]
    values = dice[checkpoint, seed]
    fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    left = len(values) - int(rank)
    return float(((values - design @ fitted) ** 2).sum() / left) if left else float("nan")


def hold_out(curves: Sequence[Curve], scores: Sequence[str], by: str) -> list[HeldOut]:
    """Every curve as seen by a model fitted without its ``dataset`` or ``encoder``."""
    held = []
    for group in sorted({getattr(c, by) for c in curves}):
        out = [c for c in curves if getattr(c, by) == group]
        model = fit_model([c for c in curves if getattr(c, by) != group], scores)
        for c, noise in zip(out, seed_covariances(out), strict=True):
            usable = {
                name: values
                for name in scores
                if (values := value_at_levels(c.scores, name)) is not None and standardised(values) is not None
            }
            draws = draw_curves(restricted(model, tuple(usable)), c.epochs.astype(float), usable)
            expected = (draws.max(1, keepdims=True) - draws).mean(0)
            held.append(HeldOut(c, f"{by} {group}", expected, measured_losses(draws, noise)))
    return held


def measured_losses(draws: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Losses of drawn curves as they would be measured: with noise, and against the best of what is measured, shape (D, K).

    Args:
        draws: Curves of Dice, shape (D, K).
        noise: Covariance of the measured Dice, shape (K, K).
    """
    root = np.linalg.cholesky(noise + 1e-12 * np.eye(len(noise)))
    measured = draws + np.random.default_rng(1).standard_normal(draws.shape) @ root.T
    losses: np.ndarray = measured.max(1, keepdims=True) - measured
    return losses


def stretch(held: Sequence[HeldOut]) -> float:
    """By how much the upper ends of loss intervals are stretched so that 90 % of measured losses lie within.

    Conformal: of n curves' ratios of measured loss to upper end, at the choices of usual prices, the quantile
    0.9 (n + 1) / n, at least 1. The group of a curve took no part in what is said of it.
    """
    if not held:
        return 1.0
    ratios = [
        h.regret[k] / max(shortest_interval(h.losses[:, k])[1], 1e-9)
        for h in held
        for k in (h.choice(p) for p in TYPICAL_PRICES)
    ]
    share = min(1.0, COVERAGE * (len(held) + 1) / len(held))
    return max(1.0, float(np.quantile(ratios, share, method="higher")))


@dataclass(frozen=True)
class Verdict:
    """How a rule does on left-out groups; Dice from 0 to 1, shares of the pretraining.

    Attributes:
        regret: By budget, mean regret at prices whose mean share of the pretraining is that budget.
        fixed: By budget, of always stopping there.
        last: Mean regret of the last epoch.
        free_regret: At no price.
        free_share: Its mean share of the pretraining.
        coverage: Share of measured losses in their 90 % interval, at usual prices, stretched by the other groups.
        expected: Mean loss that it expected to be measured.
        measured: Mean loss that was measured.
        tau: Mean weighted Kendall tau of expected and measured loss.
    """

    regret: dict[float, float]
    fixed: dict[float, float]
    last: float
    free_regret: float
    free_share: float
    coverage: float
    expected: float
    measured: float
    tau: float


def verdict(held: Sequence[HeldOut]) -> Verdict:
    """Judge what was said of held-out curves."""
    curves = [h.curve for h in held]
    line = []
    for price in PRICES:
        chosen = [h.choice(price) for h in held]
        shares = [h.curve.epochs[k] / h.curve.epochs[-1] for h, k in zip(held, chosen, strict=True)]
        line.append((np.mean(shares), np.mean([h.regret[k] for h, k in zip(held, chosen, strict=True)])))
    share, regret = np.array(line)[::-1].T
    order = np.argsort(share, kind="stable")
    coverage, expected, measured = kept(held, held)
    taus = [float(stats.weightedtau(-h.expected, -h.regret).statistic) for h in held]
    return Verdict(
        regret={b: float(np.interp(b, share[order], regret[order])) for b in BUDGETS},
        fixed={b: _fixed_regret(curves, b) for b in BUDGETS},
        last=float(np.mean([h.regret[-1] for h in held])),
        free_regret=float(line[0][1]),
        free_share=float(line[0][0]),
        coverage=coverage,
        expected=expected,
        measured=measured,
        tau=float(np.mean(taus)),
    )


def kept(part: Sequence[HeldOut], held: Sequence[HeldOut]) -> tuple[float, float, float]:
    """Share of measured losses in their 90 % interval, at usual prices; mean loss that was expected; and that was measured.

    Args:
        part: Curves that are looked at.
        held: All, whose other groups stretch the intervals.
    """
    factors = {group: stretch([h for h in held if h.group != group]) for group in {h.group for h in part}}
    covered, expected, measured = [], [], []
    for h in part:
        for k in (h.choice(p) for p in TYPICAL_PRICES):
            covered.append(h.holds(k, factors[h.group]))
            expected.append(h.losses[:, k].mean())
            measured.append(h.regret[k])
    return float(np.mean(covered)), float(np.mean(expected)), float(np.mean(measured))


def _fixed_regret(curves: Sequence[Curve], budget: float) -> float:
    _, regrets = fixed_line(curves, [same_budget(curves, budget)])
    return float(regrets[0])


def _groups(curves: Sequence[Curve], by: str) -> int:
    return len({getattr(c, by) for c in curves})


def _standardised_or_nan(curve: Curve, name: str) -> np.ndarray:
    values = value_at_levels(curve.scores, name)
    own = None if values is None else standardised(values)
    return np.full(len(curve.epochs), np.nan) if own is None else own


def _without_trend(
    times: Sequence[np.ndarray], values: Sequence[Sequence[np.ndarray]], num_scores: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    course = np.concatenate([trends(t) for t in times])
    coefficients = np.zeros((NUM_TRENDS, num_scores))
    for j in range(num_scores):
        column = np.concatenate([v[j] for v in values])
        there = np.isfinite(column)
        if not there.any():
            continue
        coefficients[:, j] = np.linalg.lstsq(course[there], column[there], rcond=None)[0]
    beyond = [
        np.nan_to_num(np.stack(list(v), axis=1) - trends(t) @ coefficients) if num_scores else np.zeros((len(t), 0))
        for t, v in zip(times, values, strict=True)
    ]
    return coefficients, beyond


def _center_and_deviation(values: np.ndarray) -> np.ndarray:
    """Over the curves that have it, shape (2, J)."""
    center, deviation = np.zeros(values.shape[1]), np.ones(values.shape[1])
    for j, column in enumerate(values.T):
        there = column[np.isfinite(column)]
        if len(there) > 1:
            center[j], deviation[j] = there.mean(), max(there.std(ddof=1), 0.05)
    return np.stack([center, deviation])


def _fit_steepness(logs: np.ndarray, spreads: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Bayesian ridge regression: deviation of what is left, posterior precision and moment of (level, slopes)."""
    n, num_scores = spreads.shape
    start = np.log([0.3, 0.3])

    def misfit(parameters: np.ndarray) -> float:
        noise, size = np.exp(parameters)
        total = (noise + FLOOR) * np.eye(n) + size * spreads @ spreads.T + FREE_LEVEL
        root = np.linalg.cholesky(total)
        white = linalg.solve_triangular(root, logs, lower=True)
        prior = (((parameters - start) / 2) ** 2).sum() / 2
        return float(white @ white / 2 + np.log(np.diag(root)).sum() + prior)

    noise, size = np.exp(optimize.minimize(misfit, start, method="L-BFGS-B").x)
    design = np.c_[np.ones(n), spreads]
    precision = design.T @ design / noise + np.diag(np.r_[1 / FREE_LEVEL, np.full(num_scores, 1 / size)])
    return float(np.sqrt(noise)), precision, design.T @ logs / noise

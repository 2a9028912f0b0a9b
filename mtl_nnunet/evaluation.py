"""Rules that choose a checkpoint, judged on curves of downstream Dice: regret, rank agreement, intervals, baselines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats

from mtl_nnunet.curves import CURVE, STATES, Curve
from mtl_nnunet.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

BOOTSTRAP_DRAWS = 2000
NOISE_DRAWS = 2000
INTERVAL = (2.5, 97.5)
MOST_SPLITS = 200
FEWEST_TO_SPLIT = 3
ALL = "all"
LAST, RANDOM_EPOCH, ACCURACY, FROM_SCRATCH = "last epoch", "random epoch", "best accuracy", "from scratch"
FIXED, SAME_BUDGET = "fixed", "fixed epoch of the same mean budget"
BEST, WITHIN_ERROR, WITHIN_HALF_POINT = "best epoch", "earliest within one standard error", "earliest within 0.005 Dice"
BEST_SCORE, HALF_SEEDS = "best score", "real trainings, half the seeds"
HELD_OUT = {"dataset": "score chosen on other targets", "encoder": "score chosen on other encoders"}
# short names of the baselines, for columns
BASELINES = {
    LAST: "last",
    SAME_BUDGET: "fixed",
    ACCURACY: "accuracy",
    RANDOM_EPOCH: "random",
    FROM_SCRATCH: "scratch",
}
AGREEMENTS = ("weighted_tau", "kendall_tau", "spearman")


@dataclass(frozen=True, eq=False)
class Judged:
    """A curve with all that can be taken on it: its K checkpoints, then averaged weights, then random weights.

    Attributes:
        curve: The curve.
        dice: Dice of each option and seed, shape (R, S); random weights have seeds of their own.
        means: Mean Dice of each option, shape (R,).
        epochs: Pretraining epoch that each option needs, shape (R,); 0 for random weights.
        options: Index of each option that is no checkpoint, by name.
        picking: Mean Dice on the seeds that pick, of each split, shape (T, K); no splits for fewer than three seeds.
        judging: Mean Dice on the other seeds, shape (T, R).
        picked: Which checkpoint the picking seeds say is best, shape (T,).
    """

    curve: Curve
    dice: np.ndarray
    means: np.ndarray
    epochs: np.ndarray
    options: dict[str, int]
    picking: np.ndarray
    judging: np.ndarray
    picked: np.ndarray

    @property
    def num_checkpoints(self) -> int:
        """K."""
        return len(self.curve.epochs)

    @property
    def best(self) -> int:
        """Index of the best mean Dice among the checkpoints; of equals the later."""
        return argbest(self.means[: self.num_checkpoints])

    def take(self, index: int) -> np.ndarray:
        """Shares that say: this option and no other; shape (R,)."""
        shares: np.ndarray = np.eye(len(self.means))[index]
        return shares

    def mix(self, checkpoints: np.ndarray) -> np.ndarray:
        """Shares of the checkpoints, shape (K,), as shares of all options, shape (R,)."""
        return np.pad(checkpoints, (0, len(self.means) - len(checkpoints)))

    @property
    def any_checkpoint(self) -> np.ndarray:
        """Each checkpoint with the same share, shape (R,)."""
        return self.mix(np.full(self.num_checkpoints, 1 / self.num_checkpoints))


@dataclass(frozen=True, eq=False)
class Contender:
    """A rule and what it takes on each curve.

    Attributes:
        name: The score, or what the rule does.
        kind: ``score``, ``rule``, ``baseline``, ``chosen`` (a score chosen on other curves) or ``hindsight``.
        shares: For each curve the share of each option, shape (R,), summing to 1 (a mixture is judged by its expected Dice), or
            None where the rule says nothing.
        orders: For each curve the numbers by which the rule orders the checkpoints, shape (K,), or None.
        scores: For each curve which score was used, where one was chosen.
    """

    name: str
    kind: str
    shares: list[np.ndarray | None]
    orders: list[np.ndarray | None] = field(default_factory=list)
    scores: list[str | None] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What became of every rule.

    Attributes:
        curves: One row a curve and rule.
        summary: One row a state (and ``all``) and rule.
        noise: One row a state (and ``all``): what the noise of the seeds alone does.
    """

    curves: pd.DataFrame
    summary: pd.DataFrame
    noise: pd.DataFrame


def argbest(values: np.ndarray) -> int:
    """Index of the highest value; of equals the last, so the later epoch; NaN never wins.

    Examples:
        >>> argbest(np.array([0.5, 0.9, 0.9, np.nan]))
        2
    """
    return int(np.flatnonzero(values == np.nanmax(values))[-1])


def split_seeds(
    dice: np.ndarray, paired: bool = True, most: int = MOST_SPLITS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean Dice on a part of the seeds, floor(S / 2) of them, and on the others, over splits.

    Args:
        dice: Shape (R, S); NaN where a seed is missing.
        paired: One split of the seeds for all rows, all splits if they are at most ``most``. Otherwise each row is split on its own,
            as if no seed were shared.
        most: Number of splits, if there are more.
        seed: Of the splits that are drawn.

    Returns:
        Means on the first part, shape (T, R), and on the second, shape (T, R); NaN where a part holds none. T = 0 for fewer than
        three seeds.

    Examples:
        >>> first, second = split_seeds(np.array([[0.0, 1.0, 2.0]]))
        >>> first[:, 0].tolist(), second[:, 0].tolist()
        ([0.0, 1.0, 2.0], [1.5, 1.0, 0.5])
    """
    rows, num_seeds = dice.shape
    if num_seeds < FEWEST_TO_SPLIT:
        return np.empty((0, rows)), np.empty((0, rows))
    size = num_seeds // 2
    rng = np.random.default_rng(seed)
    if paired:
        # all subsets of 12 seeds are 924; of more there is no need to list them
        if num_seeds <= 12:
            subsets = list(combinations(range(num_seeds), size))
            if len(subsets) > most:
                subsets = [subsets[i] for i in rng.choice(len(subsets), most, replace=False)]
        else:
            subsets = [tuple(rng.permutation(num_seeds)[:size]) for _ in range(most)]
        first = np.zeros((len(subsets), 1, num_seeds), bool)
        for i, subset in enumerate(subsets):
            first[i, 0, list(subset)] = True
        first = np.broadcast_to(first, (len(subsets), rows, num_seeds))
        return _mean(np.where(first, dice, np.nan)), _mean(np.where(first, np.nan, dice))
    # missing seeds go last, so that each row is split among the seeds that it has
    order = np.where(np.isnan(dice), np.inf, rng.random((most, rows, num_seeds))).argsort(-1)
    shuffled = np.take_along_axis(np.broadcast_to(dice, order.shape), order, -1)
    return _mean(shuffled[..., :size]), _mean(shuffled[..., size:])


def judge(curve: Curve, paired: bool = True) -> Judged:
    """Gather what can be taken on a curve, and split its seeds.

    Args:
        curve: The curve.
        paired: See ``split_seeds``.
    """
    num_checkpoints, num_seeds = curve.dice.shape
    blocks = [curve.dice, *(curve.averages[k][None] for k in sorted(curve.averages))]
    options = {average_name(k): num_checkpoints + i for i, k in enumerate(sorted(curve.averages))}
    dice = np.concatenate(blocks)
    # seeds of averages alone have no say in a pick
    picking, judging = split_seeds(dice[:, ~np.isnan(curve.dice).all(0)], paired)
    if curve.scratch.size:
        options[FROM_SCRATCH] = len(dice)
        dice = np.pad(dice, ((0, 1), (0, len(curve.scratch))), constant_values=np.nan)
        dice[-1, num_seeds:] = curve.scratch
        judging = np.pad(judging, ((0, 0), (0, 1)), constant_values=curve.scratch.mean())
    last = float(curve.epochs[-1])
    epochs = np.array([*curve.epochs, *(0.0 if name == FROM_SCRATCH else last for name in options)], float)
    picking = picking[:, :num_checkpoints]
    exists = ~np.isnan(picking).all(1)
    picking, judging = picking[exists], judging[exists]
    picked = np.nanargmax(picking, axis=1) if len(picking) else np.empty(0, int)
    return Judged(curve, dice, _mean(dice), epochs, options, picking, judging, picked)


def average_name(k: int) -> str:
    """What averaging the weights of the last k checkpoints is called."""
    return f"average of the last {k}"


def contrast(dice: np.ndarray, difference: np.ndarray, paired: bool = True) -> tuple[float, float]:
    """A difference of Dice between mixtures of rows, and its standard error.

        d_s = sum_r c_r dice_rs over the S' >= 2 seeds that every row with c_r != 0 has: mean(d), sd(d) / sqrt(S')
        else: sum_r c_r mean_s(dice_rs), sqrt(sum_r c_r^2 var_s(dice_rs) / S_r)

    Args:
        dice: Shape (R, S); NaN where a seed is missing.
        difference: c: shares of one mixture minus those of the other, shape (R,).
        paired: Whether to use that seeds are shared; otherwise always the second form.

    Returns:
        Difference and standard error; the latter is 0 for equal mixtures and NaN where a row has one seed only.

    Examples:
        >>> dice = np.array([[0.50, 0.60, 0.70], [0.51, 0.62, 0.73]])
        >>> [round(x, 4) for x in contrast(dice, np.array([-1, 1]))]
        [0.02, 0.0058]
        >>> [round(x, 4) for x in contrast(dice, np.array([-1, 1]), paired=False)]
        [0.02, 0.0858]
    """
    used = np.abs(difference) > 1e-12
    if not used.any():
        return 0.0, 0.0
    rows, weights = dice[used], difference[used]
    shared = rows[:, ~np.isnan(rows).any(0)]
    if paired and shared.shape[1] >= 2:
        differences = weights @ shared
        return float(differences.mean()), float(stats.sem(differences))
    counts = (~np.isnan(rows)).sum(1)
    if (counts < 2).any():
        return float(weights @ _mean(rows)), float("nan")
    variances = np.nanvar(rows, axis=1, ddof=1)
    return float(weights @ _mean(rows)), float(np.sqrt((weights**2 * variances / counts).sum()))


def verdict(difference: float, error: float) -> float:
    """1 for a win, -1 for a loss by more than two standard errors, 0 for a tie, NaN without an error.

    Examples:
        >>> verdict(0.05, 0.02), verdict(-0.05, 0.02), verdict(0.03, 0.02)
        (1.0, -1.0, 0.0)
    """
    if np.isnan(error):
        return float("nan")
    return float(np.sign(difference)) if abs(difference) > 2 * error else 0.0


def agreement(order: np.ndarray, dice: np.ndarray) -> dict[str, float]:
    """Weighted Kendall tau (hyperbolic weights, ranks from both sides averaged), Kendall tau-b and Spearman.

    Args:
        order: What orders the checkpoints, shape (K,); NaN where there is none.
        dice: Mean Dice, shape (K,).

    Returns:
        Each measure; 0 where all of ``order`` is equal, since it orders nothing; NaN for fewer than two checkpoints.

    Source: Vigna, "A weighted correlation index for rankings with ties", WWW 2015 (``scipy.stats.weightedtau``).

    Examples:
        >>> {k: round(v, 3) for k, v in agreement(np.array([1, 2, 4, 3]), np.array([0.1, 0.2, 0.3, 0.4])).items()}
        {'weighted_tau': 0.52, 'kendall_tau': 0.667, 'spearman': 0.8}
    """
    both = ~(np.isnan(order) | np.isnan(dice))
    order, dice = order[both], dice[both]
    if len(order) < 2:
        return dict.fromkeys(AGREEMENTS, float("nan"))
    if np.ptp(order) == 0 or np.ptp(dice) == 0:
        return dict.fromkeys(AGREEMENTS, 0.0)
    return {
        "weighted_tau": float(stats.weightedtau(order, dice).statistic),
        "kendall_tau": float(stats.kendalltau(order, dice).statistic),
        "spearman": float(stats.spearmanr(order, dice).statistic),
    }


def split_regret(judged: Judged, shares: np.ndarray) -> float:
    """What the best epoch truly gains: picked on a part of the seeds, judged on the others, averaged over splits.

        mean_t(judging_t[picked_t] - shares @ judging_t)

    The measured best is partly lucky; seeds that had no say in the pick do not share its luck. It is the gain of choosing by
    real trainings on half the seeds, below 0 where the rule does better than that.

    Args:
        judged: The curve.
        shares: What the rule takes, shape (R,).
    """
    if not len(judged.picked):
        return float("nan")
    used = shares != 0
    gains = judged.judging[np.arange(len(judged.picked)), judged.picked] - judged.judging[:, used] @ shares[used]
    return float(np.nanmean(gains)) if not np.isnan(gains).all() else float("nan")


def noise_floor(dice: np.ndarray, paired: bool = True, draws: int = NOISE_DRAWS, seed: int = 0) -> float:
    """Regret that luck alone gives the truly best epoch.

        E[max_k(m_k + e_k) - (m_best + e_best)],  best = argmax_k m_k
        e ~ N(0, cov_s(dice) / S') over the S' >= 2 seeds that all epochs have
        else: e_k ~ N(0, var_s(dice_ks) / S_k), independent

    The measured means stand for the true ones. What a seed does to all epochs alike changes none of their differences.

    Args:
        dice: Shape (K, S); NaN where a seed is missing.
        paired: Whether to use that seeds are shared; otherwise always the second form.
        draws: Number of draws.
        seed: Of the draws.

    Returns:
        In Dice; NaN where an epoch has one seed only.

    Examples:
        >>> noise_floor(np.array([[0.5, 0.5], [0.6, 0.6]]))
        0.0
    """
    counts = (~np.isnan(dice)).sum(1)
    if (counts < 2).any():
        return float("nan")
    means = _mean(dice)
    rng = np.random.default_rng(seed)
    shared = dice[:, ~np.isnan(dice).any(0)]
    if paired and (num_shared := shared.shape[1]) >= 2:
        # normal mixtures of the residuals have their covariance
        residuals = (shared - shared.mean(1, keepdims=True)) / np.sqrt(num_shared * (num_shared - 1))
        errors = rng.normal(size=(draws, num_shared)) @ residuals.T
    else:
        errors = np.sqrt(np.nanvar(dice, axis=1, ddof=1) / counts) * rng.normal(size=(draws, len(means)))
    measured = means + errors
    return float((measured.max(1) - measured[:, argbest(means)]).mean())


def fixed_shares(curve: Curve, fraction: float) -> np.ndarray:
    """Shares of the two neighbouring checkpoints whose mean epoch is a fraction of the pretraining, shape (K,).

    Examples:
        >>> curve = Curve("", "", "", "", "free", np.array([10, 20, 40]), np.zeros((3, 1)), ("1",), np.empty(0), np.empty(0))
        >>> fixed_shares(curve, 0.75).tolist()
        [0.0, 0.5, 0.5]
        >>> fixed_shares(curve, 0.1).tolist()
        [1.0, 0.0, 0.0]
    """
    epochs = curve.epochs.astype(float)
    place = np.interp(fraction * epochs[-1], epochs, np.arange(len(epochs)))
    shares: np.ndarray = np.clip(1 - np.abs(np.arange(len(epochs)) - place), 0, None)
    return shares


def same_budget(curves: Sequence[Curve], budget: float) -> float:
    """The fraction of the pretraining at which stopping everywhere costs a mean budget.

    On a curve whose first checkpoint is later than the fraction that first one is taken, so the fraction may be below the
    budget.

    Args:
        curves: On which curves.
        budget: Mean of epoch / last epoch.
    """
    earliest = np.array([c.epochs[0] / c.epochs[-1] for c in curves])

    def excess(fraction: float) -> float:
        return float(np.clip(fraction, earliest, 1).mean() - budget)

    if excess(0) >= 0:
        return 0.0
    return 1.0 if excess(1) <= 0 else float(optimize.brentq(excess, 0, 1))


def two_way_weights(datasets: Sequence[str], runs: Sequence[str], draws: int, seed: int) -> np.ndarray:
    """How often each curve counts when targets and pretraining runs are resampled independently, shape (B, C).

    A curve counts (times its target was drawn) x (times its run was drawn); with one run it is the ordinary bootstrap over targets.

    Args:
        datasets: Target of each curve, C of them.
        runs: Pretraining run of each curve.
        draws: B.
        seed: Of the draws.

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007.

    Examples:
        >>> two_way_weights(["a", "a"], ["r", "r"], draws=2, seed=0).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    rng = np.random.default_rng(seed)
    weights = np.ones((draws, len(datasets)))
    for labels in (datasets, runs):
        names, cluster = np.unique(np.asarray(labels), return_inverse=True)
        weights *= rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)[:, cluster]
    return weights


def resampled_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the curves on each draw, shape (B, N); NaN where no curve was drawn.

    Args:
        values: Shape (C, N); NaN where a curve has no value.
        weights: Shape (B, C).
    """
    exists = ~np.isnan(values)
    totals = weights @ exists
    means: np.ndarray = np.divide(
        weights @ np.where(exists, values, 0), totals, out=np.full(totals.shape, np.nan), where=totals > 0
    )
    return means


def evaluate(
    curves: Sequence[Curve],
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
    rules: Mapping[str, Callable[[Curve], np.ndarray | None]] | None = None,
) -> Evaluation:
    """Judge every score and every baseline on curves.

    Args:
        curves: The curves, in any order.
        draws: Number of bootstrap draws.
        seed: Of everything random.
        rules: More rules by name: a curve to the share of each of its checkpoints, shape (K,), summing to 1, or None. They must
            not look at the Dice of the curve that they choose on.

    Raises:
        UserError: A score or rule with the name of a baseline.
    """
    import pandas as pd

    curves = sorted(curves, key=_key)
    board = [judge(curve) for curve in curves]
    scores = [_by_score(name, board) for name in sorted({name for c in curves for name in c.scores})]
    regrets = _regrets(scores, board)
    more = [_by_rule(name, rule, board) for name, rule in (rules or {}).items()]
    contenders = [*scores, *more, *_baselines(board), *_chosen(scores, regrets, board)]
    names = [*(c.name for c in contenders), BEST_SCORE, HALF_SEEDS, *HELD_OUT.values()]
    for c in [*scores, *more]:
        if names.count(c.name) > 1:
            raise UserError(f"score '{c.name}' has the name of another rule of the evaluation. Rename it in the table.")
    table = pd.DataFrame(
        [row for contender in contenders for row in _rows(contender, board, _fixed_at_same_budget(contender, board))]
    )
    half = _half_seeds(board)
    table = pd.concat([table, half], ignore_index=True) if len(half) else table
    noise = pd.DataFrame([_noise(j, seed) for j in board])
    states = [state for state in STATES if state in {c.state for c in curves}]
    groups = [*states, *([ALL] if len(states) > 1 else [])]
    summary = pd.concat([_summary(table, group, draws, seed) for group in groups], ignore_index=True)
    return Evaluation(table, summary, pd.concat([_noise_summary(noise, group) for group in groups], ignore_index=True))


def fixed_line(curves: Sequence[Curve], fractions: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean budget and mean regret of always stopping at a fraction of the pretraining, shapes (F,) and (F,)."""
    budgets = [[fixed_shares(c, f) @ c.epochs / c.epochs[-1] for c in curves] for f in fractions]
    regrets = [[c.mean_dice.max() - fixed_shares(c, f) @ c.mean_dice for c in curves] for f in fractions]
    return np.mean(budgets, axis=1), np.mean(regrets, axis=1)


def earliest_within_error(judged: Judged, paired: bool = True) -> int:
    """The earliest checkpoint that is within one standard error (of the difference) of the best; it needs the answers."""
    best = judged.take(judged.best)
    for i in range(judged.best):
        difference, error = contrast(judged.dice, best - judged.take(i), paired)
        if difference <= error:
            return i
    return judged.best


def earliest_within(judged: Judged, dice: float) -> int:
    """The earliest checkpoint whose mean Dice is at most that far below the best; it needs the answers."""
    means = judged.means[: judged.num_checkpoints]
    return int(np.argmax(means >= means.max() - dice))


def _mean(dice: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        means: np.ndarray = np.nanmean(dice, axis=-1)
    return means


def _key(curve: Curve) -> tuple[str, ...]:
    return tuple(getattr(curve, name) for name in CURVE)


def _by_score(name: str, board: Sequence[Judged]) -> Contender:
    values = [j.curve.scores.get(name) for j in board]
    exists = [v is not None and not np.isnan(v).all() for v in values]
    return Contender(
        name,
        "score",
        [j.take(argbest(v)) if e and v is not None else None for j, v, e in zip(board, values, exists, strict=True)],
        [v if e else None for v, e in zip(values, exists, strict=True)],
    )


def _by_rule(name: str, rule: Callable[[Curve], np.ndarray | None], board: Sequence[Judged]) -> Contender:
    shares = [rule(j.curve) for j in board]
    return Contender(name, "rule", [None if s is None else j.mix(s) for s, j in zip(shares, board, strict=True)])


def _baselines(board: Sequence[Judged]) -> list[Contender]:
    def contender(
        name: str, shares: Callable[[Judged], np.ndarray | None], order: Callable[[Judged], np.ndarray] | None = None
    ) -> Contender:
        taken = [shares(j) for j in board]
        orders = [None if order is None or s is None else order(j) for j, s in zip(board, taken, strict=True)]
        return Contender(
            name, "hindsight" if name in (BEST, WITHIN_ERROR, WITHIN_HALF_POINT) else "baseline", taken, orders
        )

    def option(name: str) -> Callable[[Judged], np.ndarray | None]:
        return lambda j: j.take(j.options[name]) if name in j.options else None

    def fixed(fraction: float) -> Callable[[Judged], np.ndarray]:
        return lambda j: j.mix(fixed_shares(j.curve, fraction))

    def by_accuracy(j: Judged) -> np.ndarray | None:
        return None if np.isnan(j.curve.accuracy).all() else j.take(argbest(j.curve.accuracy))

    extra = [average_name(k) for k in sorted({k for j in board for k in j.curve.averages})]
    return [
        contender(LAST, lambda j: j.take(j.num_checkpoints - 1), lambda j: j.curve.epochs.astype(float)),
        *(contender(name, fixed(fraction)) for name, fraction in _fixed_names([j.curve for j in board]).items()),
        contender(RANDOM_EPOCH, lambda j: j.any_checkpoint),
        contender(ACCURACY, by_accuracy, lambda j: j.curve.accuracy),
        *(contender(name, option(name)) for name in [*extra, FROM_SCRATCH]),
        contender(BEST, lambda j: j.take(j.best)),
        contender(WITHIN_ERROR, lambda j: j.take(earliest_within_error(j))),
        contender(WITHIN_HALF_POINT, lambda j: j.take(earliest_within(j, 0.005))),
    ]


def _fixed_names(curves: Sequence[Curve]) -> dict[str, float]:
    # epochs that every curve has are the plainest; without them, quarters of the pretraining
    common = set.intersection(*({int(e) for e in c.epochs[:-1]} for c in curves))
    lasts = {int(c.epochs[-1]) for c in curves}
    if len(lasts) == 1 and common:
        return {f"{FIXED} epoch {epoch}": epoch / max(lasts) for epoch in sorted(common)}
    return {f"{FIXED} {fraction:.0%} of pretraining": fraction for fraction in (0.25, 0.5, 0.75)}


def _regrets(contenders: Sequence[Contender], board: Sequence[Judged]) -> np.ndarray:
    return np.array(
        [
            [np.nan if s is None else j.means[j.best] - s @ j.means for s, j in zip(c.shares, board, strict=True)]
            for c in contenders
        ]
    ).reshape(len(contenders), len(board))


def _chosen(scores: Sequence[Contender], regrets: np.ndarray, board: Sequence[Judged]) -> list[Contender]:
    """Scores chosen on other curves of the same state, and in hindsight; only among those that all of these curves have."""
    if len(scores) < 2:
        return []
    states = np.array([j.curve.state for j in board])
    contenders = []
    for name, by in ((BEST_SCORE, None), *((name, by) for by, name in HELD_OUT.items())):
        groups = np.array(["" if by is None else getattr(j.curve, by) for j in board])
        picks: list[int | None] = [None] * len(board)
        for state in np.unique(states):
            complete = np.flatnonzero(~np.isnan(regrets[:, states == state]).any(1))
            for group in np.unique(groups[states == state]):
                here = (states == state) & (groups == group)
                elsewhere = (states == state) & (groups != group) if by else here
                if len(complete) and elsewhere.any():
                    means = regrets[np.ix_(complete, np.flatnonzero(elsewhere))].mean(1)
                    # equal means differ by rounding; of equals the first by name
                    best = int(complete[np.flatnonzero(means <= means.min() + 1e-12)[0]])
                    for i in np.flatnonzero(here):
                        picks[i] = best
        if any(pick is not None for pick in picks):
            contenders.append(
                Contender(
                    name,
                    "hindsight" if by is None else "chosen",
                    [None if p is None else scores[p].shares[i] for i, p in enumerate(picks)],
                    [None if p is None else scores[p].orders[i] for i, p in enumerate(picks)],
                    [None if p is None else scores[p].name for p in picks],
                )
            )
    return contenders


def _fixed_at_same_budget(contender: Contender, board: Sequence[Judged]) -> list[np.ndarray | None]:
    """For each curve the fixed fraction that costs, over the curves of its state, what the rule costs."""
    fixed: list[np.ndarray | None] = [None] * len(board)
    for state in STATES:
        where = [i for i, s in enumerate(contender.shares) if s is not None and board[i].curve.state == state]
        if where:
            spent = [contender.shares[i] @ board[i].epochs / board[i].curve.epochs[-1] for i in where]
            fraction = same_budget([board[i].curve for i in where], float(np.mean(spent)))
            for i in where:
                fixed[i] = board[i].mix(fixed_shares(board[i].curve, fraction))
    return fixed


def _rows(contender: Contender, board: Sequence[Judged], fixed: Sequence[np.ndarray | None]) -> list[dict[str, object]]:
    rows = []
    for i, (j, shares) in enumerate(zip(board, contender.shares, strict=True)):
        if shares is None:
            continue
        curve, order = j.curve, contender.orders[i] if contender.orders else None
        epoch, dice = float(shares @ j.epochs), float(shares @ j.means)
        own_score = contender.name if contender.kind == "score" else None
        row: dict[str, object] = {
            **{name: getattr(curve, name) for name in CURVE},
            "rule": contender.name,
            "kind": contender.kind,
            "score": contender.scores[i] if contender.scores else own_score,
            "epoch": epoch,
            "budget": epoch / float(curve.epochs[-1]),
            "dice": dice,
            "best_epoch": float(curve.epochs[j.best]),
            "best_dice": float(j.means[j.best]),
            "regret": float(j.means[j.best] - dice),
            "split_regret": split_regret(j, shares),
            **(
                agreement(order, j.means[: j.num_checkpoints])
                if order is not None
                else dict.fromkeys(AGREEMENTS, np.nan)
            ),
        }
        for baseline, other in _others(j, fixed[i]).items():
            difference, error = contrast(j.dice, shares - other)
            row[f"minus_{baseline}"] = float((shares - other) @ j.means)
            row[f"versus_{baseline}"] = verdict(difference, error)
        rows.append(row)
    return rows


def _others(j: Judged, fixed: np.ndarray | None) -> dict[str, np.ndarray]:
    others = {BASELINES[LAST]: j.take(j.num_checkpoints - 1)}
    if fixed is not None:
        others[BASELINES[SAME_BUDGET]] = fixed
    if not np.isnan(j.curve.accuracy).all():
        others[BASELINES[ACCURACY]] = j.take(argbest(j.curve.accuracy))
    others[BASELINES[RANDOM_EPOCH]] = j.any_checkpoint
    if FROM_SCRATCH in j.options:
        others[BASELINES[FROM_SCRATCH]] = j.take(j.options[FROM_SCRATCH])
    for k in sorted(j.curve.averages):
        others[f"average_{k}"] = j.take(j.options[average_name(k)])
    return others


def _half_seeds(board: Sequence[Judged]) -> pd.DataFrame:
    """Choosing by real trainings on half the seeds, judged on the others against the best that they measure."""
    import pandas as pd

    rows = []
    for j in board:
        if not len(j.picked):
            continue
        judging = j.judging[:, : j.num_checkpoints]
        taken = judging[np.arange(len(j.picked)), j.picked]
        epoch = float(j.epochs[j.picked].mean())
        rows.append(
            {
                **{name: getattr(j.curve, name) for name in CURVE},
                "rule": HALF_SEEDS,
                "kind": "hindsight",
                "epoch": epoch,
                "budget": epoch / float(j.curve.epochs[-1]),
                "dice": float(np.nanmean(taken)),
                "best_epoch": float(j.epochs[j.best]),
                "best_dice": float(j.means[j.best]),
                "regret": float(np.nanmean(np.nanmax(judging, axis=1) - taken)),
                "split_regret": 0.0,
                # what the pick gains on the seeds that judge
                **{f"minus_{name}": split_regret(j, other) for name, other in _others(j, None).items()},
            }
        )
    return pd.DataFrame(rows)


def _noise(j: Judged, seed: int) -> dict[str, object]:
    halves = [agreement(a, b) for a, b in zip(j.picking, j.judging[:, : j.num_checkpoints], strict=True)]
    return {
        **{name: getattr(j.curve, name) for name in CURVE},
        "noise_floor": noise_floor(j.curve.dice, seed=seed),
        **{f"{m}_of_halves": float(np.mean([h[m] for h in halves])) if halves else float("nan") for m in AGREEMENTS},
    }


def _of_group(table: pd.DataFrame, group: str) -> pd.DataFrame:
    return table if group == ALL else table[table["state"] == group]


def _noise_summary(noise: pd.DataFrame, group: str) -> pd.DataFrame:
    rows = _of_group(noise, group)
    means = rows.drop(columns=CURVE).mean().to_frame().T
    means.insert(0, "state", group)
    means.insert(1, "curves", len(rows))
    means.insert(2, "targets", rows["dataset"].nunique())
    means.insert(3, "runs", rows[["encoder", "scheme", "run"]].drop_duplicates().shape[0])
    return means


def _summary(table: pd.DataFrame, group: str, draws: int, seed: int) -> pd.DataFrame:
    table = _of_group(table, group)
    curves = table[CURVE].drop_duplicates().sort_values(CURVE)
    runs = curves["encoder"] + "\0" + curves["scheme"] + "\0" + curves["run"]
    weights = two_way_weights(curves["dataset"].tolist(), runs.tolist(), draws, seed)
    by_rule = table.groupby("rule", sort=False)
    summary = by_rule.agg(
        kind=("kind", "first"),
        curves=("regret", "size"),
        regret=("regret", "mean"),
        split_regret=("split_regret", "mean"),
        worst=("regret", "max"),
        epoch=("epoch", "mean"),
        median_epoch=("epoch", "median"),
        budget=("budget", "mean"),
        **{measure: (measure, "mean") for measure in AGREEMENTS},
    )
    summary.insert(0, "state", group)
    compared = [name.removeprefix("minus_") for name in table if name.startswith("minus_")]
    for column in ["regret", "split_regret", *(f"minus_{name}" for name in compared)]:
        wide = table.pivot(index=CURVE, columns="rule", values=column)
        wide = wide.reindex(index=list(curves.itertuples(index=False, name=None)), columns=summary.index)
        if (name := column.removeprefix("minus_")) != column:
            summary[column] = by_rule[column].mean()
            for word, value in (("wins", 1), ("ties", 0), ("losses", -1)):
                summary[f"{word}_{name}"] = (table[f"versus_{name}"] == value).groupby(table["rule"]).sum()
        with warnings.catch_warnings():
            # a column without a value has no interval
            warnings.simplefilter("ignore", RuntimeWarning)
            ends = np.nanpercentile(resampled_means(wide.to_numpy(), weights), INTERVAL, axis=0)
        if curves["dataset"].nunique() == runs.nunique() == 1:
            # nothing was resampled: no interval, not one of no width
            ends[:] = np.nan
        summary[f"{column}_low"], summary[f"{column}_high"] = ends
    return summary.reset_index()

"""What other patients of the same kind would have said: resampling patients, intervals, paired comparisons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

BOOTSTRAP_DRAWS = 2000
INTERVAL = (2.5, 97.5)
# with fewer, resampling patients says nothing of other patients
FEWEST_PATIENTS = 4


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
        """Whether the interval holds zero, or there is none."""
        return not (self.low > 0 or self.high < 0)


def bootstrap_draws(num_patients: int, num_draws: int, seed: int) -> np.ndarray:
    """How often each patient is drawn in each resampled dataset, shape (num_draws, num_patients); rows sum to P."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=num_draws).astype(np.float64)


def interval(value: float, sample: np.ndarray, num_patients: int) -> tuple[float, float]:
    """The central 95 % of a bootstrap sample, widened for few patients; NaN for fewer than four.

    A bootstrap over P patients is too narrow by sqrt((P - 1) / P), and its normal-like quantiles by those of Student's t
    with P - 1 degrees of freedom: both ends are moved away from the value by as much, if need be past what the score can be.

    Args:
        value: On all patients.
        sample: On each draw, shape (B,); draws on which the score does not exist are left out.
        num_patients: P.

    Examples:
        >>> draws = np.random.default_rng(0).normal(size=100_000)
        >>> [round(end, 1) for end in interval(0.0, draws, 1000)], [round(end, 1) for end in interval(0.0, draws, 5)]
        ([-2.0, 2.0], [-3.1, 3.1])
    """
    if num_patients < FEWEST_PATIENTS or np.isnan(sample).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(sample, INTERVAL)
    widened = stats.t.ppf(0.975, num_patients - 1) / stats.norm.ppf(0.975) * np.sqrt(num_patients / (num_patients - 1))
    return float(low - (widened - 1) * max(0.0, value - low)), float(high + (widened - 1) * max(0.0, high - value))


def compare(
    value: float, sample: np.ndarray, other_value: float, other_sample: np.ndarray, num_patients: int
) -> Comparison:
    """One checkpoint against another on the same draws.

    Args:
        value: Its score, higher is better.
        sample: Its score on each draw, shape (B,).
        other_value: The other's score.
        other_sample: The other's score on the same draws, shape (B,).
        num_patients: Of how many patients the draws are.

    Examples:
        >>> compared = compare(0.75, np.array([0.5, 0.75, 1.0]), 0.5, np.array([0.5, 0.5, 0.5]), num_patients=1000)
        >>> compared.gain, round(compared.low, 2), round(compared.high, 2), round(compared.probability, 2)
        (0.25, 0.01, 0.49, 0.83)
    """
    differences = sample - other_sample
    existing = differences[~np.isnan(differences)]
    probability = float(((existing > 0) + 0.5 * (existing == 0)).mean()) if len(existing) else float("nan")
    return Comparison(value - other_value, *interval(value - other_value, differences, num_patients), probability)


def share_of_wins(samples: np.ndarray) -> np.ndarray:
    """In which share of the draws each is best, of equals each a part; shape (K,).

    Args:
        samples: Scores on each draw, higher is better, shape (K, B); draws on which one does not exist are left out.

    Examples:
        >>> share_of_wins(np.array([[1.0, 2.0], [1.0, 1.0]]))
        array([0.75, 0.25])
    """
    samples = samples[:, ~np.isnan(samples).any(0)]
    if not samples.shape[1]:
        return np.full(len(samples), np.nan)
    winners = samples == samples.max(0)
    shares: np.ndarray = (winners / winners.sum(0)).mean(1)
    return shares

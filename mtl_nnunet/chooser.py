"""Scores, and a prior over epochs learned from other targets -> the checkpoint of least expected Dice loss."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.files import to_json, write_text

FORMAT = "mtl-nnunet chooser 2"
# fitted on the published tables and on benchmarks/evidence/balanced.csv
SHIPPED = Path(__file__).with_name("chooser.json")
NUM_DRAWS = 4000
# quantiles of the unknown steepness that the draws are spread over
NODES = 20
COVERAGE = 0.9
# steepness, in standard deviations over the fitted curves, beyond which neither the shape nor the size of a curve is extrapolated
STEEPEST, LARGEST = 2.0, 3.0
# relative to the largest value: what is left of a constant after rounding
CONSTANT = 1e-9
UNUSUAL, EXTREME = 0.01, 1e-4
NUM_TRENDS = 3
WITHIN = 0.005


@dataclass(frozen=True, eq=False)
class Model:
    """A prior over Dice curves of one state, and what J scores add to it.

    Curve c with steepness s_c (its standard deviation over the checkpoints), at time t:

        f_c / s_c = trend(t) w + log-steepness trend(t) w' + sum_j beta_j r_j + u_c(t),
        log s_c = a + sum_j b_j l_j + e_c

    r_j: what score j, standardised within the curve, says beyond the epoch. l_j: log of its spread within the curve.
    u_c: a Gaussian process. Of the linear terms the sums over curves are kept, so that leaving scores out is a refit.

    Attributes:
        scores: Their names.
        kernel: Amplitude at the end, length in log time, length in time and deviation of a single checkpoint at the end of
            u_c, and how fast both deviations fall: they are larger by exp(fall (1 - sqrt(share))) where a share of the pretraining is done.
        precision: Posterior precision of (w, w', beta), shape (6 + J, 6 + J).
        moment: Precision times posterior mean, shape (6 + J,).
        score_trends: How each standardised score runs with the epoch, shape (3, J).
        steepness: Mean and standard deviation of log s_c over the fitted curves, deviation of e_c.
        steepness_precision: Posterior precision of (a, b), shape (1 + J, 1 + J); a from the mean.
        steepness_moment: Shape (1 + J,).
        spreads: Mean and deviation of l_j over the fitted curves, shape (2, J).
        surprises: Mean and deviation of the log of the root mean square of r_j, shape (2, J).
        scored: How many curves have each score, shape (J,).
        loss_factor: By how much the upper end of a loss interval is stretched to hold on left-out targets.
    """

    scores: tuple[str, ...]
    kernel: np.ndarray
    precision: np.ndarray
    moment: np.ndarray
    score_trends: np.ndarray
    steepness: np.ndarray
    steepness_precision: np.ndarray
    steepness_moment: np.ndarray
    spreads: np.ndarray
    surprises: np.ndarray
    scored: np.ndarray
    loss_factor: float = 1.0


@dataclass(frozen=True, eq=False)
class StateModel:
    """What is known of encoders of one state, ``free`` or ``frozen``.

    Attributes:
        prior: Epochs only.
        evidence: Epochs and scores; None where no score was fitted.
        num_curves: On how many curves they are fitted.
        num_checkpoints: Fewest and most checkpoints of a curve.
        last_epochs: Shortest and longest pretraining.
        first_share: Earliest checkpoint, as a share of its pretraining.
        encoders: Architectures among the fitted curves.
    """

    prior: Model
    evidence: Model | None
    num_curves: int
    num_checkpoints: tuple[int, int]
    last_epochs: tuple[float, float]
    first_share: float
    encoders: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Chooser:
    """A fitted decision rule: one model a state, and where it comes from."""

    states: dict[str, StateModel]
    provenance: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Choice:
    """A checkpoint, and what starting from each is expected to lose; Dice from 0 to 1.

    Attributes:
        index: The chosen one, of equals the later epoch.
        expected_loss: Against the best of the same draw, shape (K,).
        low: Lower end of the shortest interval that holds 90 % of the loss, shape (K,).
        high: Its upper end, stretched until it holds on left-out targets, shape (K,).
        probability_within: Of losing at most half a Dice point, shape (K,).
        used: Scores that entered.
        warnings: In which ways this run is unlike those that the chooser was fitted on.
        fell_back: Whether the last checkpoint is taken because of that.
    """

    index: int
    expected_loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    probability_within: np.ndarray
    used: tuple[str, ...]
    warnings: tuple[str, ...]
    fell_back: bool

    @property
    def text(self) -> str:
        """The loss of the chosen one in words."""
        i = self.index
        if np.isnan(self.expected_loss[i]):
            return "expected loss against the best: unknown"
        return (
            f"expected loss against the best: {100 * self.expected_loss[i]:.2f} Dice points, 90 % interval "
            f"{100 * self.low[i]:.2f} to {100 * self.high[i]:.2f}"
        )


def choose_by_expected_loss(
    chooser: Chooser,
    epochs: Sequence[float],
    scores: Mapping[str, Sequence[float]] | None = None,
    state: str = "free",
    price: float = 0.0,
    encoder: str | None = None,
    pretraining_epochs: float | None = None,
) -> Choice:
    """The checkpoint of least expected Dice loss plus price times pretraining.

        argmin_k E[max_j f_j - f_k | scores] + price / 100 * epoch_k / last epoch

    Scores that are missing, not finite or the same everywhere are left out, and the coefficients of the others are those of a
    fit without them (with the spread of the deviations as it was fitted with all); with none left it is the prior over
    epochs. A run that is very unlike the fitted ones gets its last checkpoint, and a warning that says why. At no price the
    last is taken too where no score enters, and of an encoder that was not fitted.

    Args:
        chooser: From ``read_chooser``, or ``mtl_nnunet.chooser_fit.fit_state``.
        epochs: Of each checkpoint, in any order, shape (K,).
        scores: By name as typed for ``-score``, the value at each checkpoint, HIGHER IS BETTER, shape (K,).
        state: ``free`` or ``frozen``.
        price: What a whole pretraining is worth, in Dice points.
        encoder: Architecture; None is not looked at.
        pretraining_epochs: How many epochs the whole pretraining has; default the last of the checkpoints.

    Expected losses are of the true Dice, without the noise of training seeds.

    Raises:
        UserError: No checkpoint, epochs or a price that cannot be, or scores of another number of checkpoints.
    """
    if not (np.isfinite(price) and price >= 0):
        raise UserError(f"price {price}: expected Dice points, at least 0.")
    at, given, order = by_epoch(epochs, scores)
    whole = float(at[-1]) if pretraining_epochs is None else float(pretraining_epochs)
    if whole < at[-1]:
        raise UserError(f"a pretraining of {whole:g} epochs has no epoch {at[-1]:g}. Pass the length of the whole run.")
    unknown = np.full(len(at), np.nan)
    if state not in chooser.states:
        said = f"no curve of state '{state}' was fitted (only {listed(sorted(chooser.states))}): the last checkpoint is taken."
        return Choice(int(order[-1]), unknown, unknown, unknown, unknown, (), (said,), True)
    known = chooser.states[state]
    usable, warnings = usable_scores(known, given)
    model = known.evidence if usable and known.evidence is not None else known.prior
    model = restricted(model, tuple(usable))
    more, falls_back = unlike(known, model, at, whole, usable, encoder)
    if falls_back:
        more.append("that is so unlike the fitted curves that the last checkpoint is taken.")
    is_last = falls_back or is_last_without_a_price(known, price, usable, encoder)
    curves = draw_curves(model, at, usable, whole)
    losses = curves.max(1, keepdims=True) - curves
    expected = losses.mean(0)
    low, high = np.array([shortest_interval(loss) for loss in losses.T]).T
    high = high * model.loss_factor
    cost = expected + price / 100 * at / max(whole, 1)
    chosen = len(at) - 1 if is_last else len(at) - 1 - int(np.argmin(cost[::-1]))
    back = np.argsort(order)
    return Choice(
        int(order[chosen]),
        expected[back],
        low[back],
        high[back],
        (losses <= WITHIN).mean(0)[back],
        tuple(usable),
        (*warnings, *more),
        falls_back,
    )


def by_epoch(
    epochs: Sequence[float] | np.ndarray, scores: Mapping[str, Sequence[float]] | None
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Epochs ascending, the scores in their order, and the order: indices of what was given.

    Raises:
        UserError: No epoch, one that cannot be, or scores of another number of checkpoints.

    Examples:
        >>> by_epoch([9, 2], {"rankme": [0.5, 0.1]})
        (array([2., 9.]), {'rankme': array([0.1, 0.5])}, array([1, 0]))
    """
    at = np.asarray(epochs, float)
    given = {name: np.asarray(values, float) for name, values in (scores or {}).items()}
    if not len(at) or not np.isfinite(at).all() or (at < 0).any():
        raise UserError(f"epochs {list(epochs)}: expected at least one epoch, and none below 0.")
    for name, values in given.items():
        if values.shape != at.shape:
            raise UserError(
                f"score '{name}' has {values.size} values for {at.size} checkpoints; expected one for each."
            )
    order = np.argsort(at, kind="stable")
    return at[order], {name: values[order] for name, values in given.items()}, order


def value_at_levels(scores: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """A score by name; a level from the deepest also finds it where levels are counted from the shallowest.

    Examples:
        >>> value_at_levels({"rankme:level=3": np.array([1.0]), "rankme:level=4": np.array([2.0])}, "rankme:level=-2")
        array([1.])
    """
    if name in scores:
        return scores[name]
    level = re.search(r"\blevel=-(\d+)", name)
    if level is None:
        return None
    pattern = re.compile(re.escape(name).replace(re.escape(level[0]), r"level=(\d+)"))
    levels = {int(found[1]): other for other in scores if (found := pattern.fullmatch(other))}
    wanted = max(levels, default=0) + 1 - int(level[1])
    return scores[levels[wanted]] if wanted in levels else None


def log_time(epochs: np.ndarray, whole: float) -> np.ndarray:
    """Log of the share of the pretraining that is done; epochs count from 0 in some runs, hence plus one.

    Examples:
        >>> log_time(np.array([0.0, 9.0]), 9.0).round(2)
        array([-2.3,  0. ])
    """
    return np.log((epochs + 1) / (whole + 1))


def trends(time: np.ndarray) -> np.ndarray:
    """Along which a curve is expected to run: log time, time and its square, centred, shape (K, 3)."""
    share = np.exp(time)
    columns = np.stack([time / 3, share, share**2], axis=1)
    centred: np.ndarray = columns - columns.mean(0)
    return centred


def covariance(kernel: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Of the deviation of one curve from what is expected, over its checkpoints, shape (K, K)."""
    amplitude, log_length, length, single, fall = kernel
    share = np.exp(time)
    distance = ((time[:, None] - time) / log_length) ** 2 + ((share[:, None] - share) / length) ** 2
    smooth = amplitude**2 * np.exp(-distance / 2) + single**2 * np.eye(len(time))
    size = np.exp(fall * (1 - np.sqrt(share)))
    scaled: np.ndarray = size[:, None] * smooth * size
    return scaled


def standardised(values: np.ndarray) -> np.ndarray | None:
    """With mean 0 and deviation 1; None where it is not finite or does not vary.

    Examples:
        >>> standardised(np.array([1.0, 3.0])), standardised(np.array([2.0, 2.0]))
        (array([-1.,  1.]), None)
    """
    if not np.isfinite(values).all() or np.ptp(values) <= CONSTANT * np.abs(values).max():
        return None
    result: np.ndarray = (values - values.mean()) / values.std()
    return result


def features(time: np.ndarray, steepness: float, beyond: np.ndarray) -> np.ndarray:
    """The linear terms: trends, trends times log steepness, scores beyond the epoch, shape (K, 6 + J)."""
    trend = trends(time)
    return np.concatenate([trend, steepness * trend, beyond], axis=1)


def draw_curves(
    model: Model, epochs: np.ndarray, scores: Mapping[str, np.ndarray], whole: float | None = None
) -> np.ndarray:
    """Curves of Dice, from their mean, that the model holds possible; the same for the same input, shape (D, K).

    Args:
        model: With just these scores.
        epochs: Ascending, shape (K,).
        scores: That vary, shape (K,) each.
        whole: Epochs of the whole pretraining; default the last.
    """
    time = log_time(epochs, float(epochs[-1]) if whole is None else whole)
    beyond = _beyond(model, time, scores)
    mean, spread, noise = model.steepness
    logs = np.r_[1.0, [_z(_log_spread(scores[n]), model.spreads[:, j]) for j, n in enumerate(model.scores)]]
    middle = logs @ np.linalg.solve(model.steepness_precision, model.steepness_moment)
    deviation = np.sqrt(noise**2 + logs @ np.linalg.solve(model.steepness_precision, logs))
    weights = np.linalg.solve(model.precision, model.moment)
    own = covariance(model.kernel, time) + 1e-9 * np.eye(len(time))
    normal = np.random.default_rng(0).standard_normal((NUM_DRAWS, len(time)))
    curves = []
    for share, part in zip((np.arange(NODES) + 0.5) / NODES, np.array_split(normal, NODES), strict=True):
        steepness = np.clip((middle + deviation * stats.norm.ppf(share)) / spread, -LARGEST, LARGEST)
        x = features(time, float(np.clip(steepness, -STEEPEST, STEEPEST)), beyond)
        total = own + x @ np.linalg.solve(model.precision, x.T)
        shapes = x @ weights + part @ np.linalg.cholesky(total).T
        curves.append(np.exp(mean + spread * steepness) * shapes)
    return np.concatenate(curves)


def restricted(model: Model, names: tuple[str, ...]) -> Model:
    """The model as if only these of its scores had been fitted, the spread of deviations kept."""
    if names == model.scores:
        return model
    keep = np.array([model.scores.index(name) for name in names], int)
    linear = np.r_[np.arange(2 * NUM_TRENDS), 2 * NUM_TRENDS + keep]
    level = np.r_[0, 1 + keep]
    return replace(
        model,
        scores=names,
        precision=model.precision[np.ix_(linear, linear)],
        moment=model.moment[linear],
        score_trends=model.score_trends[:, keep],
        steepness_precision=model.steepness_precision[np.ix_(level, level)],
        steepness_moment=model.steepness_moment[level],
        spreads=model.spreads[:, keep],
        surprises=model.surprises[:, keep],
        scored=model.scored[keep],
    )


def shortest_interval(sample: np.ndarray, coverage: float = COVERAGE) -> tuple[float, float]:
    """The shortest interval that holds a share of a sample; losses are often exactly 0, and quantiles would miss that.

    Examples:
        >>> shortest_interval(np.array([0.0, 0.0, 0.0, 1.0, 9.0]), 0.8)
        (0.0, 1.0)
    """
    ordered = np.sort(sample)
    held = int(np.ceil(coverage * len(ordered)))
    first = int(np.argmin(ordered[held - 1 :] - ordered[: len(ordered) - held + 1]))
    return float(ordered[first]), float(ordered[first + held - 1])


def write_chooser(chooser: Chooser, path: str | Path) -> None:
    """Write a chooser as JSON, atomically."""
    states = {
        name: {
            **{f.name: getattr(state, f.name) for f in fields(StateModel) if f.name not in ("prior", "evidence")},
            "prior": _record(state.prior),
            "evidence": None if state.evidence is None else _record(state.evidence),
        }
        for name, state in chooser.states.items()
    }
    write_text(path, to_json({"format": FORMAT, "provenance": chooser.provenance, "states": states}))


def read_chooser(path: str | Path | None = None) -> Chooser:
    """Read a chooser, by default the shipped one, and check it; nothing in the file is run.

    Raises:
        UserError: No such file, or not a whole chooser of this version.

    Examples:
        >>> choice = choose_by_expected_loss(read_chooser(), [1, 20, 100, 200, 300], state="free")
        >>> choice.index, choice.fell_back
        (4, False)
    """
    path = path or SHIPPED
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format is '{content['format']}', expected '{FORMAT}'")
        states = {name: _state(record) for name, record in content["states"].items()}
        provenance = dict(content["provenance"])
    except OSError as error:
        raise UserError(
            f"could not read chooser {path}: {error.strerror or error}. Pass a file of fit-chooser."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, np.linalg.LinAlgError) as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no chooser: {said}. Write it again with mtl-nnunet fit-chooser.") from error
    return Chooser(states, provenance)


def is_chooser(path: str | Path) -> bool:
    """Whether a file says that it is a chooser, of whatever version, and whole or not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.rstrip("0123456789"))


def _record(model: Model) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for f in fields(Model):
        value = getattr(model, f.name)
        # twelve digits are far beyond what is known, and keep the file small
        content[f.name] = [float(f"{v:.12g}") for v in value.ravel()] if isinstance(value, np.ndarray) else value
    return content


def _state(record: Mapping[str, Any]) -> StateModel:
    evidence = record["evidence"]
    return StateModel(
        prior=_model(record["prior"]),
        evidence=None if evidence is None else _model(evidence),
        num_curves=int(record["num_curves"]),
        num_checkpoints=(int(record["num_checkpoints"][0]), int(record["num_checkpoints"][1])),
        last_epochs=(float(record["last_epochs"][0]), float(record["last_epochs"][1])),
        first_share=float(record["first_share"]),
        encoders=tuple(str(name) for name in record["encoders"]),
    )


def _model(record: Mapping[str, Any]) -> Model:
    names = tuple(str(name) for name in record["scores"])
    j, p = len(names), 2 * NUM_TRENDS + len(names)
    shapes = {
        "kernel": (5,),
        "precision": (p, p),
        "moment": (p,),
        "score_trends": (NUM_TRENDS, j),
        "steepness": (3,),
        "steepness_precision": (1 + j, 1 + j),
        "steepness_moment": (1 + j,),
        "spreads": (2, j),
        "surprises": (2, j),
        "scored": (j,),
    }
    arrays = {name: np.array(record[name], float).reshape(shape) for name, shape in shapes.items()}
    factor = float(record["loss_factor"])
    if not all(np.isfinite(a).all() for a in arrays.values()) or not (np.isfinite(factor) and factor > 0):
        raise ValueError("a number is not finite, or loss_factor is not above 0")
    if (arrays["kernel"][:4] <= 0).any() or (arrays["steepness"][1:] <= 0).any():
        raise ValueError("a length or deviation is not above 0")
    for name in ("precision", "steepness_precision"):
        np.linalg.cholesky(arrays[name])
    return Model(names, **arrays, loss_factor=factor)


def usable_scores(known: StateModel, given: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The scores that the chooser knows and that vary, and warnings of those that are missing or do not."""
    fitted = known.evidence.scores if known.evidence is not None else ()
    usable, missing, flat = {}, [], []
    for name in fitted:
        values = value_at_levels(given, name)
        if values is None:
            missing.append(name)
        elif standardised(values) is None:
            flat.append(name)
        else:
            usable[name] = values
    warnings = []
    if missing:
        warnings.append(f"not computed, so left out: {listed(missing)}.")
    if flat:
        warnings.append(f"the same at every checkpoint or not finite, so left out: {listed(flat)}.")
    if fitted and not usable:
        warnings.append("no score that the chooser knows: the choice stands on epochs alone.")
    return usable, warnings


def unlike(
    known: StateModel,
    model: Model,
    epochs: np.ndarray,
    whole: float,
    scores: Mapping[str, np.ndarray],
    encoder: str | None,
    judges_number: bool = True,
) -> tuple[list[str], bool]:
    """In which ways a run is unlike the fitted ones, in words, and whether a score of it is beyond 99.99 % of them.

    Args:
        known: What was fitted.
        model: With just these scores.
        epochs: Ascending, shape (K,).
        whole: Last epoch of the whole pretraining.
        scores: That vary, shape (K,) each.
        encoder: Architecture, or None where it is not to be judged.
        judges_number: Whether the number of epochs is that of real checkpoints.
    """
    said, is_extreme = [], False
    fewest, most = known.num_checkpoints
    if judges_number and not fewest <= len(epochs) <= most:
        said.append(f"there are {len(epochs)} checkpoints; it was fitted on curves of {_between(fewest, most)}.")
    shortest, longest = known.last_epochs
    # a run whose first checkpoint is epoch 0 counts from there
    length = whole + (epochs[0] == 0)
    if not shortest <= length <= longest:
        said.append(f"this pretraining has {length:g} epochs, those it was fitted on {_between(shortest, longest)}.")
    first = float(np.exp(log_time(epochs[:1], whole)[0]))
    if first < known.first_share * (1 - 1e-9):
        said.append(
            f"the first checkpoint is {first:.1%} into the pretraining, and nothing was fitted before {known.first_share:.1%}."
        )
    if not _was_fitted(known, encoder):
        # measured by leaving encoders out: twice what was expected was lost where a price stopped early
        said.append(
            f"encoder '{encoder}' was not among the fitted ones ({listed(list(known.encoders))}): more may be lost than expected."
        )
    time = log_time(epochs, whole)
    beyond = _beyond(model, time, scores)
    for j, name in enumerate(model.scores):
        for what, value, fitted in (
            ("spread over the checkpoints", _log_spread(scores[name]), model.spreads[:, j]),
            ("departure from its usual course", log_rms(beyond[:, j]), model.surprises[:, j]),
        ):
            # a new curve's place among n fitted ones
            n = int(model.scored[j])
            z = abs(_z(value, fitted)) / np.sqrt(1 + 1 / n)
            share = 2 * float(stats.t.sf(z, n - 1))
            if share < UNUSUAL:
                said.append(f"score '{name}': its {what} is beyond 99 % of the fitted curves.")
            is_extreme |= share < EXTREME
    return said, is_extreme


def is_last_without_a_price(known: StateModel, price: float, used: Collection[str], encoder: str | None) -> bool:
    """Whether nothing is to be gained over the last epoch: at no price, without a score or on an encoder that was not fitted.

    Measured by leaving targets and encoders out.

    Args:
        known: What was fitted.
        price: What a whole pretraining is worth, in Dice points.
        used: Scores that entered.
        encoder: Architecture, or None where it is not looked at.
    """
    return price == 0 and (not used or not _was_fitted(known, encoder))


def _was_fitted(known: StateModel, encoder: str | None) -> bool:
    if encoder is None or encoder in known.encoders:
        return True
    # imported only here: it brings PyTorch
    from mtl_nnunet.paper_resnet import PLAIN, WITH_DROP_PATH

    # the published tables call the paper's own ResNet-50 by the usual name
    return encoder in (PLAIN, WITH_DROP_PATH) and "resnet50" in known.encoders


def _between(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _beyond(model: Model, time: np.ndarray, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    columns = [(scores[name] - scores[name].mean()) / scores[name].std() for name in model.scores]
    own = np.stack(columns, axis=1) if columns else np.zeros((len(time), 0))
    beyond: np.ndarray = own - trends(time) @ model.score_trends
    return beyond


def _log_spread(values: np.ndarray) -> float:
    return float(np.log(values.std()))


def log_rms(values: np.ndarray) -> float:
    """Log of the root mean square; of zeros it is bounded."""
    return float(np.log(np.sqrt(np.mean(values**2)) + CONSTANT))


def _z(value: float, fitted: np.ndarray) -> float:
    return float((value - fitted[0]) / fitted[1])

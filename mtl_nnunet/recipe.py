"""How MTLTrainer learns: hyper-parameters, where they come from, parameter groups and their schedule."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mtl_nnunet.errors import UserError, listed

RECIPE_VARIABLE = "MTL_RECIPE"
OPTIMIZERS = ("adamw", "sgd")
BATCH_NORMS = ("auto", "live", "frozen")
# below it statistics of a batch cost more than they bring, by the comparison in the documentation
SMALLEST_LIVE_BATCH = 4
# what is expected of a number, in words and as a check
NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a number above 0", lambda n: 0 < n <= 100),
    "encoder_lr_factor": ("a number from 0 to 10", lambda n: 0 <= n <= 10),
    "layer_decay": ("a number above 0, at most 1", lambda n: 0 < n <= 1),
    "weight_decay": ("a number from 0", lambda n: 0 <= n <= 100),
    "momentum": ("a number from 0 to below 1", lambda n: 0 <= n < 1),
    "warmup_epochs": ("a whole number from 0", lambda n: 0 <= n <= 1e6),
    "frozen_epochs": ("a whole number from 0, or all", lambda n: 0 <= n <= 1e6),
    "clip_norm": ("a number above 0, at most 12", lambda n: 0 < n <= 12),
}


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a training; the defaults are what the comparison in the documentation supports.

    Attributes:
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum.
        lr: Rate of stem and decoder.
        encoder_lr_factor: Rate of the encoder's deepest layers, as a share of ``lr``.
        layer_decay: Factor on the rate from each encoder layer to the one before it; 1 for the same rate everywhere.
        weight_decay: Not applied to biases and norms.
        momentum: Of ``sgd``.
        warmup_epochs: Epochs of linear warm-up; a tenth of the training at most.
        frozen_epochs: For how many epochs the encoder stays as it is, or ``all``.
        batch_norm: ``live``: the encoder's BatchNorm uses and updates batch statistics; ``frozen``: it keeps the
            pretraining's; ``auto``: frozen in batches of fewer than 4.
        clip_norm: Largest norm of the gradient; at most 12, which is nnU-Net's.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    encoder_lr_factor: float = 1.0
    layer_decay: float = 0.75
    weight_decay: float = 1e-2
    momentum: float = 0.99
    warmup_epochs: int = 10
    frozen_epochs: int | str = 0
    batch_norm: str = "auto"
    clip_norm: float = 12.0

    def freezes_statistics(self, batch_size: int) -> bool:
        """Whether the encoder's BatchNorm keeps the statistics of the pretraining in batches of that size."""
        return self.batch_norm == "frozen" or (self.batch_norm == "auto" and batch_size < SMALLEST_LIVE_BATCH)

    @property
    def summary(self) -> str:
        """One line for logs."""
        return ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in asdict(self).items())


def recipe(*changes: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The default recipe with changes, later ones winning.

    Args:
        changes: Hyper-parameters by name; numbers may be text.
        where: What to call them in an error.

    Raises:
        UserError: An unknown name, or a value that makes no sense.

    Examples:
        >>> recipe({"optimizer": "sgd", "lr": "1e-2"}, {"lr": 1e-3}).lr
        0.001
    """
    merged: dict[str, Any] = {}
    for change in changes:
        if not isinstance(change, Mapping):
            raise UserError(f"{where} is no object of hyper-parameters, e.g. " + '{"lr": 0.0005}.')
        merged.update(change)
    known = {f.name: f.default for f in fields(Recipe)}
    for name, value in merged.items():
        if name not in known:
            raise UserError(f"{where}: unknown hyper-parameter '{name}'. Known are {listed(list(known), len(known))}.")
        merged[name] = _checked(name, value, known[name], where)
    return Recipe(**merged)


def recipe_of_environment() -> dict[str, Any]:
    """What ``MTL_RECIPE`` sets: the path of a JSON file, or ``name=value,name=value``; empty where it is unset.

    Raises:
        UserError: The file cannot be read, or it is neither.
    """
    text = os.environ.get(RECIPE_VARIABLE, "").strip()
    return read_recipe(text, RECIPE_VARIABLE) if text else {}


def read_recipe(text: str, where: str) -> dict[str, Any]:
    """Changes to the recipe from the path of a JSON file, or from ``name=value,name=value``, checked.

    Args:
        text: Either.
        where: What to call it in an error.

    Raises:
        UserError: The file cannot be read, it is neither, or ``recipe`` refuses what it says.

    Examples:
        >>> read_recipe("optimizer=sgd,lr=1e-3", "-recipe")
        {'optimizer': 'sgd', 'lr': '1e-3'}
    """
    changes: dict[str, Any]
    if text.endswith(".json"):
        try:
            changes = json.loads(Path(text).read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{where}={text} cannot be read as JSON ({error}). Expected an object of hyper-parameters, e.g. "
                '{"lr": 0.0005}.'
            ) from error
        if not isinstance(changes, dict):
            raise UserError(f"{where}={text} holds no JSON object of hyper-parameters, e.g. " + '{"lr": 0.0005}.')
    else:
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(equals for _, equals, _ in pairs):
            raise UserError(
                f"{where}={text} is not valid. Expected the path of a .json file, or name=value,name=value, e.g. "
                "optimizer=sgd,lr=1e-3."
            )
        try:
            changes = _without_repeats([(name.strip(), value.strip()) for name, _, value in pairs])
        except ValueError as error:
            raise UserError(f"{where}={text} is not valid: {error}.") from error
    recipe(changes, where=f"{where}={text}")
    return changes


def parameter_groups(network: Any, how: Recipe) -> list[dict[str, Any]]:
    """The network's parameters in groups for the optimiser: stem and decoder first, then the encoder by its layers.

    Args:
        network: A ``TimmUNet``.
        how: Rates, decays and whether the encoder learns at all.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``part`` (``decoder`` or ``encoder``).
    """
    model = network.encoder.timm.model
    if how.frozen_epochs == "all":
        network.encoder.requires_grad_(False)
    else:
        for parameter in network.encoder.unused_parameters():
            # several processes would wait for its gradient for ever
            parameter.requires_grad_(False)
    others = nn.ModuleDict({name: child for name, child in network.named_children() if name != "encoder"})
    groups = [
        {**g, "lr": how.lr, "part": "decoder"} for g in param_groups_weight_decay(others, weight_decay=how.weight_decay)
    ]
    kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if how.layer_decay == 1:
        encoder = param_groups_weight_decay(model, weight_decay=how.weight_decay, no_weight_decay_list=kept)
    else:
        encoder = param_groups_layer_decay(
            model, weight_decay=how.weight_decay, no_weight_decay_list=kept, layer_decay=how.layer_decay
        )
    lr = how.lr * how.encoder_lr_factor
    # timm counts layers that are not there any more, such as the classifier's norm
    deepest = max((g.get("lr_scale", 1.0) for g in encoder), default=1.0)
    return groups + [{**g, "lr": lr * g.pop("lr_scale", 1.0) / deepest, "part": "encoder"} for g in encoder]


def optimizer_of(groups: Sequence[dict[str, Any]], how: Recipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe, which clips the gradient to the recipe's norm before each step.

    The gradient is clipped inside the optimiser's step because nnU-Net's own clipping, to 12, is fixed in its training step;
    gradient scaling has been undone by then.
    """
    optimizer: torch.optim.Optimizer
    if how.optimizer == "sgd":
        optimizer = torch.optim.SGD(list(groups), lr=how.lr, momentum=how.momentum, nesterov=how.momentum > 0)
    else:
        optimizer = torch.optim.AdamW(list(groups), lr=how.lr)
    if how.clip_norm < Recipe.clip_norm:
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        optimizer.register_step_pre_hook(lambda *_: _nothing(torch.nn.utils.clip_grad_norm_(parameters, how.clip_norm)))
    return optimizer


class EpochwiseLR(LambdaLR):
    """Linear warm-up, then nnU-Net's polynomial decay, as one factor on each group's own rate.

        f(e) = (e + 1) / (w + 1)                     e < w
        f(e) = (1 - (e - w) / (E - w))^0.9           e >= w

    A frozen encoder has the factor 0 until epoch z, then f(e) min(1, (e - z + 1) / (w + 1)), a warm-up of its own.

    nnU-Net calls ``step(epoch)`` with the epoch it is about to train, also after resuming; its own schedulers write one
    rate into every group, which would undo the groups.

    Args:
        optimizer: Its groups' ``lr`` are the rates at factor 1; those whose ``part`` is ``encoder`` may be frozen.
        num_epochs: E.
        warmup_epochs: w.
        frozen_epochs: z.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, num_epochs: int, warmup_epochs: int = 0, frozen_epochs: int = 0
    ):
        def factor(epoch: int) -> float:
            if epoch < warmup_epochs:
                return (epoch + 1) / (warmup_epochs + 1)
            remaining = max(0.0, 1 - (epoch - warmup_epochs) / (num_epochs - warmup_epochs))
            return float(remaining**0.9)

        def thawed(epoch: int) -> float:
            if epoch < frozen_epochs:
                return 0.0
            return factor(epoch) * min(1.0, (epoch - frozen_epochs + 1) / (warmup_epochs + 1))

        frozen_at_first = [frozen_epochs > 0 and g.get("part") == "encoder" for g in optimizer.param_groups]
        super().__init__(optimizer, [thawed if frozen else factor for frozen in frozen_at_first])

    def step(self, epoch: int | None = None) -> None:
        """Set every group's rate for an epoch; without one, for the next."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        rates = [base * f(self.last_epoch) for base, f in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def _checked(name: str, value: Any, default: Any, where: str) -> Any:
    choices = {"optimizer": OPTIMIZERS, "batch_norm": BATCH_NORMS}.get(name)
    if choices is not None:
        if value not in choices:
            raise UserError(f"{where}: {name}={value} is unknown. Expected {' or '.join(choices)}.")
        return value
    if name == "frozen_epochs" and value == "all":
        return value
    expected, sensible = NUMBERS[name]
    try:
        number = int(float(value)) if isinstance(default, int) else float(value)
        exact = not isinstance(value, bool) and float(value) == number
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or not sensible(number):
        raise UserError(f"{where}: {name}={value} makes no sense. Expected {expected}.")
    return number


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _nothing(_: Any) -> None:
    """A hook that returns a value would replace the arguments of the step."""

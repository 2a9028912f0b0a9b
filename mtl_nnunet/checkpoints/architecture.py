"""Which timm network a state dict is of, told by the names and shapes of its tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtl_nnunet.checkpoints.checkpoint import Checkpoint
from mtl_nnunet.checkpoints.file import read_weights
from mtl_nnunet.errors import AssumedWarning, UserError, listed

# a name that only a family has, and its networks in timm
FAMILIES = (
    (r"layers\.\d+\.blocks\.\d+\.attn\.cpb_mlp", ("swinv2_*",)),
    (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$", ("swin_*", "test_swin*")),
    (r"stages\.\d+\.blocks\.\d+\.conv_dw", ("convnext*", "test_convnext*")),
    (
        r"blocks\.\d+\.\d+\.(?:conv_pw|conv_dw|conv_exp|dw_start|dw_mid)",
        ("efficientnet*", "mobilenet*", "tf_*", "mixnet*", "test_efficientnet*"),
    ),
    (r"s1\.b1\.conv1\.conv\.weight$", ("regnet*",)),
    (
        r"layer1\.0\.(?:conv1|bn1)",
        ("resnet*", "resnext*", "wide_resnet*", "seresnet*", "seresnext*", "ecaresnet*", "test_resnet*"),
    ),
)
# of networks with the same tensors these are the less usual: other padding, strides or normalisation constants
UNUSUAL = re.compile(r"^tf_|^gc|_pruned$|aa|blur|_rsb?$|_clip|_hnf|_openai|_x$")


def inferred_architecture(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """timm networks whose tensors have exactly these names and shapes, the most usual one first.

    Classifier and number of image channels may be others.

    Networks may differ in what has no tensor (strides, padding, activations, constants of normalisation), so several can fit.

    Examples:
        >>> import timm
        >>> inferred_architecture(timm.create_model("test_resnet", num_classes=7).state_dict())
        ('test_resnet',)
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    families = [patterns for mark, patterns in FAMILIES if any(re.match(mark, name) for name in shapes)]
    names = dict.fromkeys(name for patterns in families[:1] for p in patterns for name in timm.list_models(p))
    fitting = [name for name in names if _fits(shapes, *_shapes(name))]
    return tuple(sorted(fitting, key=lambda name: (bool(UNUSUAL.search(name)), len(name), name)))


def architecture_of(checkpoint: Checkpoint) -> str:
    """The network of a checkpoint: as it says, else told by the shapes of its tensors, with a warning that says so.

    Raises:
        UserError: Neither tells.
    """
    if checkpoint.architecture is not None:
        return checkpoint.architecture
    fitting = inferred_architecture(read_weights(checkpoint))
    if not fitting:
        raise UserError(
            f"checkpoint {checkpoint.path} does not say which network it is of, and no timm network that is known here has tensors of these "
            "names and shapes. Pass timm's name of it: -encoder NAME."
        )
    others = f" ({listed(list(fitting[1:]), 3)} would fit too)" if len(fitting) > 1 else ""
    warnings.warn(
        f"{checkpoint.path} does not say which network it is of: its tensors fit {fitting[0]}{others}, which is taken. "
        "If it is another: -encoder NAME.",
        AssumedWarning,
        stacklevel=2,
    )
    return fitting[0]


class _NumbersOnCPU(TorchFunctionMode):
    """Ranges and lists of numbers keep their values where all else has shapes only: RegNets compute their widths from them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        numbers = (torch.arange, torch.linspace, torch.tensor)
        return func(*args, **{**({"device": "cpu"} if func in numbers else {}), **(kwargs or {})})


@lru_cache(maxsize=512)
def _shapes(name: str) -> tuple[Mapping[str, tuple[int, ...]], tuple[str, ...]]:
    """Names and shapes of a network without its classifier, and which of them take the image; no weight is allocated."""
    try:
        with torch.device("meta"), _NumbersOnCPU(), torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError):
        # timm raises any of these for a network that needs what is not installed or values in place of shapes: no candidate
        return {}, ()
    first = model.pretrained_cfg.get("first_conv") or ()
    take_images = tuple(f"{layer}.weight" for layer in ([first] if isinstance(first, str) else first))
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}, take_images


def _fits(
    given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], take_images: tuple[str, ...]
) -> bool:
    if not wanted:
        return False
    # a feature pyramid has no use for the final norm, and self-supervised code leaves it out
    needed = {k: s for k, s in wanted.items() if not re.match(r"(?:head\.|norm\.)", k)}
    surplus = [k for k in given if k not in wanted and not re.match(r"(?:head|fc|classifier|norm)\.", k)]

    def of_any_channels(name: str, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return (shape[0], *shape[2:]) if shape and name in take_images else shape

    return not surplus and all(of_any_channels(k, given.get(k)) == of_any_channels(k, s) for k, s in needed.items())

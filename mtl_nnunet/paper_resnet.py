"""The ResNet-50 of arXiv:2410.18677 as a timm network, and its published weights in timm's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional

from mtl_nnunet.errors import UserError

PLAIN = "resnet50_padded_shortcut"
WITH_DROP_PATH = "resnet50_padded_shortcut_droppath"
DROP_PATH_RATE = 0.1

# how names begin in the published files, and in timm's; the second and third layer there hold no tensors
BEGINNINGS = {
    "layers.0.stem.0.": "conv1.",
    "layers.0.stem.1.": "bn1.",
    "layers.0.levels.0.": "layer1.",
    "layers.0.levels.1.": "layer2.",
    "layers.0.levels.2.": "layer3.",
    "layers.0.levels.3.": "layer4.",
    "layers.3.": "fc.",
}
# none of basic blocks, and none of blocks that normalise first
MARKS = ("layers.0.stem.0.weight", "layers.0.levels.0.0.conv3.weight")
MARK_OF_OTHERS = "layers.0.first_block."


class PaddedShortcut(nn.Module):
    """A shortcut without parameters: every ``stride``-th pixel, and zeros in the channels that the block adds.

        y[n, c, i, j] = x[n, c, stride i, stride j] for c < C, else 0

    Maps (N, C, H, W) to (N, channels, ceil(H / stride), ceil(W / stride)); with three strides, volumes alike.

    Args:
        channels: Channels of the block's output, C or more.
        stride: Of the block, one for each spatial axis.

    Source: He et al. 2015, arXiv:1512.03385, option A. The public code of arXiv:2410.18677, commit ae4401a, writes it
    as average pooling whose window is one pixel, so nothing is averaged.

    Examples:
        >>> import torch
        >>> PaddedShortcut(2, (2, 2))(torch.arange(9.0).reshape(1, 1, 3, 3)).tolist()
        [[[[0.0, 2.0], [6.0, 8.0]], [[0.0, 0.0], [0.0, 0.0]]]]
    """

    def __init__(self, channels: int, stride: tuple[int, ...]):
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """The shortcut's output, which is added to the block's."""
        every = [slice(None, None, s) for s in (1, 1, *self.stride)]
        padding = [0] * 2 * len(self.stride) + [0, self.channels - x.shape[1]]
        return functional.pad(x[tuple(every)], padding)


class UnscaledDropPath(DropPath):
    """Stochastic depth as first published: what is kept stays as it is in training and is scaled at evaluation.

        training: y = b x, b ~ Bernoulli(1 - p) for each image;  evaluation: y = (1 - p) x

    timm's own divides by 1 - p in training instead, so weights trained with this one give other features there.

    Args:
        drop_prob: The p above.

    Source: Huang et al. 2016, arXiv:1603.09382; the public code of arXiv:2410.18677, commit ae4401a.
    """

    def __init__(self, drop_prob: float):
        super().__init__(drop_prob, scale_by_keep=False)

    def forward(self, x: Tensor) -> Tensor:
        """The branch, dropped or scaled, of the same shape."""
        y: Tensor = super().forward(x) if self.training else (1 - self.drop_prob) * x
        return y


class PaddedBottleneck(Bottleneck):
    """timm's bottleneck, stride in its 3 x 3 convolution, with the shortcut and the stochastic depth of the paper."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_path: Any = None,
        **options: Any,
    ):
        super().__init__(
            inplanes,
            planes,
            stride,
            None if downsample is None else PaddedShortcut(planes * self.expansion, (stride, stride)),
            drop_path=None if drop_path is None else UnscaledDropPath(drop_path.drop_prob),
            **options,
        )


_CONFIGURATION = {
    "input_size": (3, 224, 224),
    "num_classes": 1000,
    "pool_size": (7, 7),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    # the public code divides by 255 and normalises no further
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs({PLAIN: _CONFIGURATION, WITH_DROP_PATH: _CONFIGURATION})


def resnet50_padded_shortcut(pretrained: bool = False, **options: Any) -> Any:
    """The paper's ResNet-50 as its ``simple`` pretraining trained it."""
    return _create(PLAIN, pretrained, options)


def resnet50_padded_shortcut_droppath(pretrained: bool = False, **options: Any) -> Any:
    """The paper's ResNet-50 as its ``advanced`` pretraining trained it: with stochastic depth."""
    return _create(WITH_DROP_PATH, pretrained, {"drop_path_rate": DROP_PATH_RATE, **options})


for _network in (resnet50_padded_shortcut, resnet50_padded_shortcut_droppath):
    register_model(_network)


def in_timm_names(weights: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """The paper's published ResNet-50 in timm's names; any other state dict as it is.

    The tensors do not tell whether they were trained with stochastic depth, which has none of its own. The published
    files carry their pretraining scheme in their names: ``advanced`` had it, ``simple`` did not.

    Args:
        weights: State dict.
        path: Where it was read; the file's name tells the scheme, and one that tells none counts as ``simple``.

    Returns:
        State dict, and timm's name of the network where it is the paper's, else None.

    Raises:
        UserError: The paper's Swin or plain U-Net encoder.
    """
    if any(name.startswith(MARK_OF_OTHERS) for name in weights):
        raise UserError(
            f"checkpoint {path} holds the Swin or the plain U-Net encoder of arXiv:2410.18677, which are not supported. "
            "Of that paper's encoders only the ResNet-50 is: pass its files with -ckpt."
        )
    if not all(mark in weights for mark in MARKS):
        return dict(weights), None
    renamed = {_timm_name(name): tensor for name, tensor in weights.items()}
    return renamed, WITH_DROP_PATH if "advanced" in Path(path).name.lower() else PLAIN


def _timm_name(name: str) -> str:
    beginning = next((b for b in BEGINNINGS if name.startswith(b)), "")
    return BEGINNINGS.get(beginning, "") + name[len(beginning) :]


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    return build_model_with_cfg(
        ResNet, name, pretrained, **{"block": PaddedBottleneck, "layers": (3, 4, 6, 3), **options}
    )

"""A 2D encoder to a 3D one: every module replaced by its type, kernels inflated along the new, first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Conv2dSame, ConvNormAct, DropPath, GroupNormAct, LayerNorm2d, SEModule, pad_same
from timm.layers import activations as timm_activations
from timm.layers.norm_act import BatchNormAct2d
from timm.models import _efficientnet_blocks as mobile
from timm.models import convnext, efficientnet, mobilenetv3, regnet, resnet
from torch import Tensor, nn
from torch.nn.modules import activation as torch_activations

from mtl_nnunet.errors import UserError
from mtl_nnunet.paper_resnet import PaddedBottleneck, PaddedShortcut, UnscaledDropPath

SUPPORTED_IN_3D = "ResNet, ConvNeXt, EfficientNet, RegNet or MobileNetV3"
WEIGHTS = ("averaged", "centred")
DEFAULT_WEIGHTS = "averaged"

# their forward passes name no axis, so that replacing what they hold is enough
CONTAINERS: tuple[type[nn.Module], ...] = (
    nn.Sequential,
    ConvNormAct,
    resnet.ResNet,
    resnet.BasicBlock,
    resnet.Bottleneck,
    PaddedBottleneck,
    regnet.RegNet,
    regnet.RegStage,
    regnet.Bottleneck,
    convnext.ConvNeXt,
    convnext.ConvNeXtStage,
    efficientnet.EfficientNet,
    mobilenetv3.MobileNetV3,
    mobile.ConvBnAct,
    mobile.DepthwiseSeparableConv,
    mobile.InvertedResidual,
    mobile.EdgeResidual,
    mobile.UniversalInvertedResidual,
)
ANY_DIMENSION: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Dropout,
    DropPath,
    UnscaledDropPath,
    nn.GroupNorm,
    GroupNormAct,
)
# channelwise, or averaging over all of space: depth and height may be read as one axis
FLATTENED: tuple[type[nn.Module], ...] = (BatchNormAct2d, LayerNorm2d, SEModule, mobile.SqueezeExcite)


@dataclass(frozen=True)
class Depth:
    """What becomes of the new axis at each level of a U-Net, full resolution first.

    Attributes:
        reductions: In-plane reduction of each level, 1 first.
        depth_reductions: How many times fewer slices each level has.
        kernel_sizes: Slices that a kernel sees at each level; odd.
        weights: How a 2D kernel fills the slices: ``averaged`` (repeated, divided by their number) or ``centred`` (in the
            middle one, the others zero).
    """

    reductions: tuple[int, ...]
    depth_reductions: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    weights: str = DEFAULT_WEIGHTS

    def reduction_at(self, in_plane: int) -> int:
        """Depth reduction where the in-plane reduction is ``in_plane``; between levels as early as possible.

        Examples:
            >>> convnext = Depth((1, 4, 8), (1, 2, 4), (3, 3, 3))
            >>> [convnext.reduction_at(r) for r in (1, 2, 4, 8, 16)]
            [1, 2, 2, 4, 4]
        """
        below = max(i for i, r in enumerate(self.reductions) if r <= in_plane)
        following = self.depth_reductions[min(below + 1, len(self.reductions) - 1)]
        return min(following, self.depth_reductions[below] * (in_plane // self.reductions[below]))

    def stride(self, before: int, after: int) -> int:
        """Depth stride of a module that takes the in-plane reduction from ``before`` to ``after``."""
        return self.reduction_at(after) // self.reduction_at(before)

    def kernel_size(self, in_plane: int) -> int:
        """Kernel depth of a module whose output has the in-plane reduction ``in_plane``."""
        level = next((i for i, r in enumerate(self.reductions) if r >= in_plane), len(self.reductions) - 1)
        return self.kernel_sizes[level]


def depth_of_plans(
    strides: Sequence[Sequence[int]], kernel_sizes: Sequence[Sequence[int]], reductions: Sequence[int], weights: str
) -> Depth:
    """The depth axis of an encoder as nnU-Net planned it for its own network.

    nnU-Net leaves an axis of large spacing alone until the others have caught up. A level of the encoder takes the depth
    of the deepest planned stage that is not coarser in the plane; it never halves the depth more often than the plane.

    Args:
        strides: Of nnU-Net's stages, (depth, height, width) each, the first one 1.
        kernel_sizes: Of nnU-Net's stages.
        reductions: In-plane reductions of the encoder's feature maps.
        weights: See ``Depth``.

    Examples:
        >>> planned = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
        >>> depth_of_plans(planned, [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]], (2, 4, 8, 16), "centred")
        Depth(reductions=(1, 2, 4, 8, 16), depth_reductions=(1, 1, 2, 4, 4), kernel_sizes=(1, 3, 3, 3, 3), weights='centred')
    """
    planned: list[tuple[int, int]] = []
    in_depth = in_plane = 1
    for stride in strides:
        in_depth, in_plane = in_depth * stride[0], in_plane * max(stride[1:])
        planned.append((in_depth, in_plane))
    levels = (1, *reductions)
    stages = [max(i for i, (_, p) in enumerate(planned) if p <= r) for r in levels]
    depths = [1]
    for (before, after), stage in zip(pairwise(levels), stages[1:], strict=True):
        depths.append(min(planned[stage][0], depths[-1] * (after // before)))
    # an even kernel would shift the volume
    kernels = [k if k % 2 else k + 1 for k in (int(kernel_sizes[stage][0]) for stage in stages)]
    return Depth(tuple(levels), tuple(depths), tuple(kernels), weights)


def inflate(model: nn.Module, name: str, input_channels: int, depth: Depth) -> None:
    """Make a timm CNN three-dimensional, in place: (N, C, H, W) becomes (N, C, D, H, W).

    A volume that is constant along the new axis gives the features of its slice (with averaged kernels away from the
    first and last slices, where zeros are padded).

    Args:
        model: What timm's feature getter holds; its feature maps are what it gives for (N, C, H, W).
        name: What to call it in an error.
        input_channels: C.
        depth: Strides and kernels along the new axis, and how kernels are filled.

    Raises:
        UserError: It holds a module that is not known to work in 3D.

    Source:
        Inflation: Carreira, Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017.
    """
    if depth.weights not in WEIGHTS:
        raise UserError(f"inflation '{depth.weights}' is unknown. Expected {' or '.join(WEIGHTS)}.")
    if type(model) not in CONTAINERS:
        raise _no_counterpart(name, model)
    before = _reductions_at_inputs(model, input_channels, depth.reductions[-1])
    _inflate_children(model, name, before, depth)


def inflated_kernel(kernel: Tensor, depth: int, weights: str) -> Tensor:
    """A 2D kernel (out, in, H, W) as a 3D one (out, in, D, H, W) whose sum along D it is.

    Examples:
        >>> inflated_kernel(torch.ones(1, 1, 1, 1), 3, "centred").flatten().tolist()
        [0.0, 1.0, 0.0]
        >>> inflated_kernel(torch.ones(1, 1, 1, 1), 4, "averaged").flatten().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    if weights == "averaged":
        return kernel[:, :, None].repeat(1, 1, depth, 1, 1) / depth
    inflated = kernel.new_zeros((*kernel.shape[:2], depth, *kernel.shape[2:]))
    inflated[:, :, (depth - 1) // 2] = kernel
    return inflated


class Conv3dSame(nn.Conv3d):
    """timm's ``Conv2dSame`` in 3D: TensorFlow's padding in the plane, symmetric padding along the depth."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, D, H, W) to (N, C', D', ceil(H / stride), ceil(W / stride))."""
        padded: Tensor = pad_same(input, self.kernel_size[1:], self.stride[1:], self.dilation[1:])
        return super().forward(padded)


class Flattened(nn.Module):
    """A 2D module on volumes, depth and height read as one axis: (N, C, D, H, W) as (N, C, D x H, W)."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, C, D, H, W) to the same shape."""
        flat: Tensor = self.module(volumes.flatten(2, 3))
        return flat.reshape(volumes.shape)


class ConvNeXtBlock3d(nn.Module):
    """timm's ``ConvNeXtBlock`` with an inflated depthwise convolution; the rest of it works on channels."""

    def __init__(self, block: Any, conv_dw: nn.Module):
        super().__init__()
        self.conv_dw = conv_dw
        self.norm, self.mlp, self.gamma, self.drop_path = block.norm, block.mlp, block.gamma, block.drop_path
        self.channels_first = block.use_conv_mlp

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, C, D, H, W) to the same shape."""
        mixed: Tensor = self.conv_dw(volumes)
        features = mixed.flatten(2, 3)
        if not self.channels_first:
            features = features.permute(0, 2, 3, 1)
        features = self.mlp(self.norm(features))
        if not self.channels_first:
            features = features.permute(0, 3, 1, 2)
        if self.gamma is not None:
            features = features * self.gamma.reshape(1, -1, 1, 1)
        residual: Tensor = self.drop_path(features.reshape(mixed.shape))
        return volumes + residual


def _inflate_children(module: nn.Module, name: str, before: dict[nn.Module, int], depth: Depth) -> None:
    for key, child in module.named_children():
        setattr(module, key, _inflated(child, name, before, depth))


def _inflated(module: nn.Module, name: str, before: dict[nn.Module, int], depth: Depth) -> nn.Module:
    kind = type(module)
    if kind in CONTAINERS:
        # a container may be run, or what it holds one by one
        _inflate_children(module, name, before, depth)
        return module
    if module not in before:
        # a head, which the feature pass never runs
        return module
    if kind in REPLACED:
        return REPLACED[kind](module, before[module], depth)
    if kind is convnext.ConvNeXtBlock and isinstance(module.shortcut, nn.Identity):
        assert isinstance(module.conv_dw, nn.Module)
        return ConvNeXtBlock3d(module, _inflated(module.conv_dw, name, before, depth))
    if kind in FLATTENED:
        return Flattened(module)
    if kind in ANY_DIMENSION or _is_activation(module):
        return module
    raise _no_counterpart(name, module)


def _convolution(module: Any, before: int, depth: Depth) -> nn.Module:
    after = before * module.stride[0]
    stride = depth.stride(before, after)
    patches = module.kernel_size == module.stride and module.padding in (0, (0, 0))
    # kernels that do not overlap in the plane must not do so along the depth either
    pointwise = module.kernel_size == (1, 1)
    kernel = stride if patches else 1 if pointwise else depth.kernel_size(after)
    padding = 0 if patches else kernel // 2
    kind = Conv3dSame if isinstance(module, Conv2dSame) else nn.Conv3d
    inflated = kind(
        module.in_channels,
        module.out_channels,
        (kernel, *module.kernel_size),
        (stride, *module.stride),
        (padding, *module.padding),
        (1, *module.dilation),
        module.groups,
        module.bias is not None,
        module.padding_mode,
    )
    with torch.no_grad():
        inflated.weight.copy_(inflated_kernel(module.weight, kernel, depth.weights))
        if module.bias is not None and inflated.bias is not None:
            inflated.bias.copy_(module.bias)
    return inflated


def _batch_norm(module: Any, before: int, depth: Depth) -> nn.Module:
    inflated = nn.BatchNorm3d(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    inflated.load_state_dict(module.state_dict())
    return inflated


def _max_pool(module: Any, before: int, depth: Depth) -> nn.Module:
    size, step, padding, dilation = (
        _pair(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    after = before * step[0]
    stride = depth.stride(before, after)
    kernel = depth.kernel_size(after) if padding[0] else stride
    return nn.MaxPool3d(
        (kernel, *size),
        (stride, *step),
        (kernel // 2 if padding[0] else 0, *padding),
        (1, *dilation),
        ceil_mode=module.ceil_mode,
    )


def _average_pool(module: Any, before: int, depth: Depth) -> nn.Module:
    size, step, padding = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
    stride = depth.stride(before, before * step[0])
    return nn.AvgPool3d(
        (stride, *size),
        (stride, *step),
        (0, *padding),
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


def _padded_shortcut(module: Any, before: int, depth: Depth) -> nn.Module:
    return PaddedShortcut(module.channels, (depth.stride(before, before * module.stride[0]), *module.stride))


REPLACED: dict[type[nn.Module], Callable[[Any, int, Depth], nn.Module]] = {
    nn.Conv2d: _convolution,
    Conv2dSame: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    PaddedShortcut: _padded_shortcut,
}


def _reductions_at_inputs(model: nn.Module, input_channels: int, deepest: int) -> dict[nn.Module, int]:
    """In-plane reduction of what each module is given, for those that the feature pass runs."""
    side = 2 * deepest
    seen: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # channels-last inside a ConvNeXt block; nothing in there is asked for
        width = inputs[0].shape[-1] if inputs and isinstance(inputs[0], Tensor) else side
        seen.setdefault(module, max(1, round(side / width)))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules()]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            forward: Any = model.forward_intermediates
            forward(torch.zeros(1, input_channels, side, side), intermediates_only=True)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return seen


def _is_activation(module: nn.Module) -> bool:
    modules = (torch_activations.__name__, timm_activations.__name__)
    stateless = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    return type(module).__module__ in modules and stateless


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _no_counterpart(name: str, module: nn.Module) -> UserError:
    return UserError(
        f"timm encoder '{name}' cannot be made three-dimensional: it holds a {type(module).__name__}, which is not known to "
        f"work on volumes. Use a {SUPPORTED_IN_3D} of the plain kind for 3D configurations, or train -c 2d."
    )

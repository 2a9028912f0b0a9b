"""TimmUNet: a timm encoder, a full-resolution stem and nnU-Net's own U-Net decoder, in 2D or 3D."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from types import SimpleNamespace
from typing import Any

from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.inflation import DEFAULT_WEIGHTS, Depth

# what nnU-Net plans for its own decoder
CONV_BLOCK: dict[str, Any] = {
    "conv_bias": True,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}
STEM_CHANNELS = 32


class TimmUNet(nn.Module):
    """A U-Net whose encoder is a timm network.

    nnU-Net builds it from the plans: ``network_class_name`` is this class, ``arch_kwargs`` its other arguments.
    The image itself, through a stem of two convolutions, is the first skip connection, since timm's feature maps start
    at half or a quarter of the resolution.

    Args:
        input_channels: Channels of what the network is given.
        num_classes: Segmentation outputs.
        encoder: timm's name of the encoder.
        strides: Stride from each level to the next, full resolution first, per axis; in the plane they must be the
            encoder's. Three axes make a 3D network. nnU-Net reads its deep-supervision scales from it.
        kernel_sizes: Kernel of each level, per axis; None for 3 everywhere. Its depth is what 2D kernels are inflated to.
        n_conv_per_stage_decoder: Convolutions in each decoder stage.
        stem_channels: Channels of the full-resolution skip.
        inflation: How 2D kernels fill the new axis, ``averaged`` or ``centred``; 3D only.
        image_channels: How many of the channels, the first ones, are images; the others are a cascade's one-hot
            segmentation. None for all of them.
        deep_supervision: Return a prediction at every scale, finest first, instead of the finest alone.

    Attributes:
        encoder: A ``TimmEncoder``.

    Raises:
        ValueError: ``strides`` are not those of the encoder.
        UserError: timm does not know the encoder, it gives no feature pyramid, or cannot be made three-dimensional.
    """

    # no method called ``initialize``: nnU-Net would apply it to every module, over the loaded weights

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        encoder: str,
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        n_conv_per_stage_decoder: int = 2,
        stem_channels: int = STEM_CHANNELS,
        inflation: str = DEFAULT_WEIGHTS,
        image_channels: int | None = None,
        deep_supervision: bool = False,
    ):
        super().__init__()
        volumetric = len(strides[0]) == 3
        kernels = [tuple(k) for k in kernel_sizes or [[3] * len(strides[0])] * len(strides)]
        depth = _depth(strides, kernels, inflation) if volumetric else None
        images = input_channels if image_channels is None else image_channels
        self.encoder = TimmEncoder(encoder, images, input_channels - images, depth)
        if [list(s) for s in strides] != strides_of(self.encoder):
            raise ValueError(
                f"strides {strides} are not those of timm encoder '{encoder}': {strides_of(self.encoder)}. "
                "Make the plans again with this version of timm."
            )
        conv_op, norm_op = (nn.Conv3d, nn.InstanceNorm3d) if volumetric else (nn.Conv2d, nn.InstanceNorm2d)
        block = {**CONV_BLOCK, "norm_op": norm_op}
        self.stem = StackedConvBlocks(2, conv_op, input_channels, stem_channels, kernels[0], 1, **block)
        # the decoder would register an encoder module a second time; it only reads these attributes
        shape_of_encoder = SimpleNamespace(
            output_channels=[stem_channels, *self.encoder.output_channels],
            strides=[tuple(s) for s in strides],
            kernel_sizes=kernels,
            conv_op=conv_op,
            **block,
        )
        self.decoder = UNetDecoder(shape_of_encoder, num_classes, n_conv_per_stage_decoder, deep_supervision)
        for part in (self.stem, self.decoder):
            part.apply(InitWeights_He(1e-2))

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits of images (N, C, H, W), H and W divisible by the deepest reduction: (N, num_classes, H, W).

        In 3D (N, C, D, H, W). With deep supervision a list, finest first, each at the resolution of its decoder stage.
        """
        logits: Tensor | list[Tensor] = self.decoder([self.stem(images), *self.encoder(images)])
        return logits


def strides_of(encoder: TimmEncoder) -> list[list[int]]:
    """Stride from each level of the U-Net to the next, full resolution first.

    Examples:
        >>> strides_of(TimmEncoder("test_convnext"))
        [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]
    """
    in_plane = _steps((1, *encoder.reductions))
    if encoder.depth is None:
        return [[s, s] for s in in_plane]
    return [[d, s, s] for d, s in zip(_steps(encoder.depth.depth_reductions), in_plane, strict=True)]


def _depth(strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]], inflation: str) -> Depth:
    reductions = [tuple(accumulate((s[axis] for s in strides), mul)) for axis in (1, 0)]
    return Depth(reductions[0], reductions[1], tuple(k[0] for k in kernels), inflation)


def _steps(reductions: Sequence[int]) -> list[int]:
    return [1, *(b // a for a, b in pairwise(reductions))]

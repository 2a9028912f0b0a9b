"""TimmUNet: a timm encoder, a full-resolution stem and nnU-Net's own U-Net decoder."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from mtl_nnunet.encoder import TimmEncoder

# what nnU-Net plans for its own decoder
CONV_BLOCK: dict[str, Any] = {
    "conv_bias": True,
    "norm_op": nn.InstanceNorm2d,
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
        input_channels: Channels of the images.
        num_classes: Segmentation outputs.
        encoder: timm's name of the encoder.
        strides: Stride from each level to the next, full resolution first; must be the encoder's. nnU-Net reads its
            deep-supervision scales from it.
        n_conv_per_stage_decoder: Convolutions in each decoder stage.
        stem_channels: Channels of the full-resolution skip.
        deep_supervision: Return a prediction at every scale, finest first, instead of the finest alone.

    Attributes:
        encoder: A ``TimmEncoder``.

    Raises:
        ValueError: ``strides`` are not those of the encoder.
        UserError: timm does not know the encoder, or it gives no feature pyramid.
    """

    # no method called ``initialize``: nnU-Net would apply it to every module, over the loaded weights

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        encoder: str,
        strides: list[list[int]],
        n_conv_per_stage_decoder: int = 2,
        stem_channels: int = STEM_CHANNELS,
        deep_supervision: bool = False,
    ):
        super().__init__()
        self.encoder = TimmEncoder(encoder, input_channels)
        if [list(s) for s in strides] != strides_of(self.encoder):
            raise ValueError(
                f"strides {strides} are not those of timm encoder '{encoder}': {strides_of(self.encoder)}. "
                "Make the plans again with this version of timm."
            )
        self.stem = StackedConvBlocks(2, nn.Conv2d, input_channels, stem_channels, 3, 1, **CONV_BLOCK)
        levels = 1 + len(self.encoder.output_channels)
        # the decoder would register an encoder module a second time; it only reads these attributes
        shape_of_encoder = SimpleNamespace(
            output_channels=[stem_channels, *self.encoder.output_channels],
            strides=[tuple(s) for s in strides],
            kernel_sizes=[(3, 3)] * levels,
            conv_op=nn.Conv2d,
            **CONV_BLOCK,
        )
        self.decoder = UNetDecoder(shape_of_encoder, num_classes, n_conv_per_stage_decoder, deep_supervision)
        for part in (self.stem, self.decoder):
            part.apply(InitWeights_He(1e-2))

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits of images (N, C, H, W), H and W divisible by the deepest reduction: (N, num_classes, H, W).

        With deep supervision a list, finest first, each at the resolution of its decoder stage.
        """
        logits: Tensor | list[Tensor] = self.decoder([self.stem(images), *self.encoder(images)])
        return logits


def strides_of(encoder: TimmEncoder) -> list[list[int]]:
    """Stride from each level of the U-Net to the next, full resolution first.

    Example:
        >>> strides_of(TimmEncoder("test_convnext"))
        [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]
    """
    reductions = (1, *encoder.reductions)
    return [[1, 1], *([b // a, b // a] for a, b in pairwise(reductions))]

"""TimmUNet as MONAI's engines, inferers, losses and exporters expect a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtl_nnunet.encoder import TimmEncoder
from mtl_nnunet.errors import UserError
from mtl_nnunet.inflation import DEFAULT_WEIGHTS, depth_of_plans
from mtl_nnunet.network import STEM_CHANNELS, TimmUNet, strides_of
from mtl_nnunet.selection import load_selected_encoder, read_selection


class MonaiUNet(TimmUNet):
    """A U-Net with a timm encoder: one tensor of logits in evaluation, in training one a scale for ``DeepSupervisionLoss``.

    Args:
        encoder: timm's name of the encoder.
        in_channels: Channels of the images.
        out_channels: Classes, background included.
        spatial_dims: 2 or 3.
        strides: Stride from each level to the next, per axis, as ``network_shape`` gives them; None for the encoder's, in 3D the same
            along the depth.
        kernel_sizes: Kernel of each level, per axis; None for 3 everywhere.
        selection: Folder of a selection whose encoder it starts from; None for random weights.
        deep_supervision: Predict at every scale in training.
        stem_channels: Channels of the full-resolution skip.
        inflation: How 2D kernels fill the depth, ``averaged`` or ``centred``; 3D only.

    Raises:
        UserError: timm does not know the encoder, it gives no feature pyramid or cannot be made three-dimensional, or the
            selection is missing, altered or of another encoder.
    """

    def __init__(
        self,
        encoder: str,
        in_channels: int,
        out_channels: int,
        spatial_dims: int = 2,
        strides: Sequence[Sequence[int]] | None = None,
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        selection: str | Path | None = None,
        deep_supervision: bool = True,
        stem_channels: int = STEM_CHANNELS,
        inflation: str = DEFAULT_WEIGHTS,
    ):
        shape = encoder_strides(encoder, spatial_dims) if strides is None else [list(s) for s in strides]
        super().__init__(
            in_channels,
            out_channels,
            encoder,
            shape,
            kernel_sizes,
            stem_channels=stem_channels,
            inflation=inflation,
            deep_supervision=deep_supervision,
        )
        self.deep_supervision = deep_supervision
        for parameter in self.encoder.unused_parameters():
            # several processes would wait for its gradient for ever
            parameter.requires_grad_(False)
        if selection is not None:
            chosen = read_selection(selection)
            if chosen.encoder != encoder:
                raise UserError(
                    f"the selection in {selection} is of timm encoder '{chosen.encoder}', and the network has '{encoder}'. "
                    "Select again for it, or leave the encoder's name out."
                )
            load_selected_encoder(chosen, self.encoder)

    def train(self, mode: bool = True) -> MonaiUNet:
        """Training or evaluation mode; predictions at every scale belong to the former."""
        super().train(mode)
        self.decoder.deep_supervision = mode and self.deep_supervision
        return self


def encoder_strides(encoder: str, spatial_dims: int) -> list[list[int]]:
    """Strides of a U-Net with that encoder, in 3D the same along every axis.

    Examples:
        >>> encoder_strides("test_convnext", 3)
        [[1, 1, 1], [4, 4, 4], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    """
    if spatial_dims not in (2, 3):
        raise UserError(f"spatial_dims is {spatial_dims}; expected 2 or 3.")
    in_plane = strides_of(TimmEncoder(encoder))
    return in_plane if spatial_dims == 2 else [[s, s, s] for s, _ in in_plane]


def network_shape(
    encoder: str, patch_size: Sequence[int], spacing: Sequence[float]
) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Patch size, strides and kernel sizes of a U-Net for patches of about that size and spacing.

    In 3D the depth is reduced, and kernels reach along it, where nnU-Net's planner would do so.

    Args:
        encoder: timm's name.
        patch_size: (height, width) or (depth, height, width).
        spacing: Of the voxels, as many numbers.

    Returns:
        The patch size rounded up to what the network can take, strides, kernel sizes.

    Examples:
        >>> network_shape("test_convnext", (50, 60), (1, 1))[0]
        [64, 64]
    """
    reductions = TimmEncoder(encoder).reductions
    if len(patch_size) == 2:
        strides = encoder_strides(encoder, 2)
        return _rounded_up(patch_size, (reductions[-1],) * 2), strides, [[3, 3]] * len(strides)
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, planned, kernels, _, _ = get_pool_and_conv_props(list(spacing), list(patch_size), 4, 999999)
    depth = depth_of_plans(planned, kernels, reductions, DEFAULT_WEIGHTS)
    strides = strides_of(TimmEncoder(encoder, depth=depth))
    multiples = (depth.depth_reductions[-1], reductions[-1], reductions[-1])
    return _rounded_up(patch_size, multiples), strides, [[k, 3, 3] for k in depth.kernel_sizes]


def _rounded_up(size: Sequence[int], multiples: Sequence[int]) -> list[int]:
    return [-(-int(s) // m) * m for s, m in zip(size, multiples, strict=True)]

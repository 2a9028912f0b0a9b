"""A timm network as a feature pyramid: the one encoder that is both scored and trained."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# on import it registers its networks with timm
from mtl_nnunet import paper_resnet  # noqa: F401
from mtl_nnunet.errors import UserError, listed
from mtl_nnunet.generators import kept, seeded
from mtl_nnunet.inflation import Depth, inflate

MIN_LEVELS = 3
SUPPORTED = "ResNet, ConvNeXt, EfficientNet, RegNet, MobileNetV3 or Swin"


class TimmEncoder(nn.Module):
    """The feature maps of a timm network, shallow to deep.

    In 2D, parameters keep timm's names (under ``timm.model.``), so that a checkpoint of the classifier loads strictly.

    Args:
        name: timm's name of the architecture, e.g. ``resnet50`` or ``convnext_tiny``.
        input_channels: Channels of the images.
        label_channels: Further channels that hold no image, such as the segmentation of a cascade's first stage. Weights
            of a checkpoint leave them at zero, so that training starts from what the images alone give.
        depth: Makes it three-dimensional; None for 2D.

    Attributes:
        name: As given.
        input_channels: As given.
        label_channels: As given.
        depth: As given.
        output_channels: Channels of each feature map.
        reductions: How many times smaller each feature map is than the image, per side (in the plane).
        source: Where its weights come from, or None at random initialisation.
        frozen: It computes what it was pretrained to compute, also in training mode: no dropped paths, no batch statistics.
        frozen_statistics: BatchNorm alone does, by its running statistics.

    Raises:
        UserError: timm does not know the name, the network has no pyramid of three or more levels, or cannot be made
            three-dimensional.
    """

    def __init__(self, name: str, input_channels: int = 3, label_channels: int = 0, depth: Depth | None = None):
        super().__init__()
        self.name = name
        self.input_channels = input_channels
        self.label_channels = label_channels
        self.depth = depth
        self.source: str | None = None
        self.frozen = False
        self.frozen_statistics = False
        self.timm: Any = _feature_pyramid(name, input_channels + label_channels)
        self.output_channels: tuple[int, ...] = tuple(self.timm.feature_info.channels())
        self.reductions: tuple[int, ...] = tuple(self.timm.feature_info.reduction())
        if depth is not None:
            inflate(self.timm.model, name, input_channels + label_channels, depth)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (N, C, H, W), shallow to deep, each (N, channels, H / reduction, W / reduction).

        In 3D (N, C, D, H, W), the depth reduced as ``depth`` says.
        """
        features: list[Tensor] = self.timm(images)
        return features

    def train(self, mode: bool = True) -> TimmEncoder:
        """Training or evaluation mode; what is frozen stays in the latter, which nnU-Net's ``network.train()`` would undo."""
        super().train(mode and not self.frozen)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that no feature map depends on, such as a final norm: autograd says so, on a small image."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        side = 2 * self.reductions[-1]
        size = (side, side) if self.depth is None else (self.depth.depth_reductions[-1], side, side)
        device = next(self.parameters()).device
        mode = self.training
        try:
            self.eval()
            with torch.enable_grad():
                features = self(torch.zeros(1, self.input_channels + self.label_channels, *size, device=device))
                total = torch.stack([f.float().sum() for f in features]).sum()
                gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        except (RuntimeError, AssertionError, ValueError):
            # a network that takes no image of this size
            return []
        finally:
            self.train(mode)
        return [p for p, g in zip(parameters, gradients, strict=True) if g is None]

    def first_levels(self, images: Tensor, num_levels: int) -> list[Tensor]:
        """The ``num_levels`` shallowest feature maps; layers beyond them are not run."""
        if num_levels >= len(self.output_channels):
            return self.forward(images)
        features: list[Tensor] = self.timm.model.forward_intermediates(
            images,
            indices=list(self.timm.out_indices)[:num_levels],
            norm=self.timm.norm,
            output_fmt=self.timm.output_fmt,
            stop_early=True,
            intermediates_only=True,
        )
        return features

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> list[str]:
        """Load a classifier's weights strictly: every tensor of the encoder must come from the file.

        The first convolution is adapted to the image channels as timm does it: summed over RGB for one channel,
        repeated and rescaled for others, so that the scale of its response stays.

        Args:
            weights: State dict in timm's names.
            source: What to call it in an error, usually the file's path.

        Returns:
            Names in the file that the encoder has no place for: classifier head and final norm.

        Raises:
            UserError: Missing, surplus or misshapen tensors, or values that are not finite.
        """
        if self.depth is not None:
            flat = TimmEncoder(self.name, self.input_channels, self.label_channels)
            surplus = flat.load_weights(weights, source)
            inflate(flat.timm.model, self.name, self.input_channels + self.label_channels, self.depth)
            self.timm.model.load_state_dict(flat.timm.model.state_dict())
            self.source = source
            return surplus
        own = self.timm.model.state_dict()
        weights = self._with_adapted_input(weights, own)
        advice = "Pass the architecture it was trained with: -encoder NAME."
        missing = [k for k in own if k not in weights]
        if missing:
            raise UserError(
                f"checkpoint {source} does not fit timm encoder '{self.name}': "
                f"{len(missing)} keys missing (first: {missing[0]}). {advice}"
            )
        for key, tensor in own.items():
            if weights[key].shape != tensor.shape:
                raise UserError(
                    f"checkpoint {source} does not fit timm encoder '{self.name}': {key} has shape "
                    f"{tuple(weights[key].shape)}, expected {tuple(tensor.shape)}. {advice}"
                )
        surplus = [k for k in weights if k not in own]
        foreign = sorted(set(surplus) - _classifier_keys(self.name))
        if foreign:
            raise UserError(
                f"checkpoint {source} does not fit timm encoder '{self.name}': it holds {len(foreign)} tensors that "
                f"this network does not have (first: {foreign[0]}). {advice}"
            )
        cast = {k: weights[k].to(own[k].dtype) for k in own}
        broken = [k for k in own if not torch.isfinite(cast[k]).all()]
        if broken:
            raise UserError(
                f"checkpoint {source} holds NaN or infinite weights in {len(broken)} tensors (first: {broken[0]}). "
                "Its training diverged or the file is damaged: leave it out."
            )
        self.timm.model.load_state_dict(cast, strict=True)
        self.source = source
        return surplus

    def own_part(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a classifier's state dict that the encoder takes, float32, sorted, channels as in the file."""
        return {
            k: (weights[k].float() if weights[k].is_floating_point() else weights[k]).clone().contiguous()
            for k in sorted(self.timm.model.state_dict())
        }

    def _with_adapted_input(self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        adapted = dict(weights)
        for layer in _first_convolutions(self.timm.model):
            key = f"{layer}.weight"
            if key in adapted and key in own and adapted[key].ndim == 4:
                per_channel = own[key].shape[1] // (self.input_channels + self.label_channels)
                if adapted[key].shape[1] == 3 * per_channel and self.input_channels != 3:
                    adapted[key] = adapt_input_conv(self.input_channels, adapted[key].clone())
                if self.label_channels and adapted[key].shape[1] == self.input_channels * per_channel:
                    kernel = adapted[key]
                    labels = kernel.new_zeros(kernel.shape[0], self.label_channels * per_channel, *kernel.shape[2:])
                    adapted[key] = torch.cat([kernel, labels], dim=1)
        return adapted


def random_encoder(name: str, input_channels: int, seed: int) -> TimmEncoder:
    """The encoder at its random initialisation, the same for the same seed; the global generators are left alone."""
    with seeded(seed):
        return TimmEncoder(name, input_channels)


def _feature_pyramid(name: str, input_channels: int) -> Any:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        meant = f" Did you mean {listed(close)}?" if close else ""
        raise UserError(
            f"timm {timm.__version__} knows no encoder '{name}'.{meant} Pass one of its names: -encoder NAME."
        )
    no_pyramid = UserError(
        f"timm encoder '{name}' gives no feature pyramid of {MIN_LEVELS} or more levels, so it cannot be the encoder of "
        f"a U-Net. Use a {SUPPORTED}."
    )
    options = {
        "pretrained": False,
        "features_only": True,
        "feature_cls": "getter",
        "in_chans": input_channels,
    }
    try:
        try:
            # transformers that check the image size against the one they were trained at
            pyramid: Any = timm.create_model(name, strict_img_size=False, **options)
        except TypeError:
            pyramid = timm.create_model(name, **options)
    except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
        raise no_pyramid from error
    reductions: Sequence[int] = pyramid.feature_info.reduction()
    grows = all(b > a and b % a == 0 for a, b in pairwise(reductions))
    if (
        not hasattr(getattr(pyramid, "model", None), "forward_intermediates")
        or len(reductions) < MIN_LEVELS
        or not grows
    ):
        raise no_pyramid
    return pyramid


def _first_convolutions(model: Any) -> tuple[str, ...]:
    first = model.pretrained_cfg.get("first_conv") or ()
    return (first,) if isinstance(first, str) else tuple(first)


@lru_cache(maxsize=8)
def _classifier_keys(name: str) -> frozenset[str]:
    with kept():
        return frozenset(timm.create_model(name, pretrained=False).state_dict())

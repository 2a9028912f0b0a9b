"""From a model that nnU-Net trained to a MONAI bundle that predicts the same voxels."""

from mtl_nnunet.bridge.bundling import bundle_of_model
from mtl_nnunet.bridge.components import (
    NNUNetInferer,
    NNUNetPreprocessd,
    NNUNetSaved,
    NNUNetSegmentationd,
)
from mtl_nnunet.bridge.images import images_to_predict
from mtl_nnunet.bridge.model import TrainedModel, network_of, read_model

__all__ = [
    "NNUNetInferer",
    "NNUNetPreprocessd",
    "NNUNetSaved",
    "NNUNetSegmentationd",
    "TrainedModel",
    "bundle_of_model",
    "images_to_predict",
    "network_of",
    "read_model",
]

"""Parts for MONAI's configs: networks, transforms, inferers, handlers and the choice of a checkpoint.

``_target_: mtl_nnunet.components.NAME`` takes any of them.
"""

from mtl_nnunet.components.data import Split, images_in, split_cases
from mtl_nnunet.components.handlers import (
    ModelLoader,
    ModelRecorder,
    ValidateEvery,
    enough_to_share,
    keep_trained,
    load_model,
    transferability_handler,
)
from mtl_nnunet.components.inferer import sliding_window
from mtl_nnunet.components.metadata import describe_model
from mtl_nnunet.components.plan import Plan, cases_to_evaluate, plan_training, read_plan, read_record
from mtl_nnunet.components.selector import select
from mtl_nnunet.components.training import recipe_optimizer, recipe_schedule
from mtl_nnunet.components.transforms import (
    CheckLabeld,
    NormalizeAsNnunetd,
    RandView,
    RandViewd,
    SaveSegmentationd,
    SliceAxisFirst,
    SliceAxisFirstd,
    SlicesOfCased,
    SpacingAsNnunet,
    SpacingAsNnunetd,
    nonzero,
)
from mtl_nnunet.components.unet import MonaiUNet

__all__ = [
    "CheckLabeld",
    "ModelLoader",
    "ModelRecorder",
    "MonaiUNet",
    "NormalizeAsNnunetd",
    "Plan",
    "RandView",
    "RandViewd",
    "SaveSegmentationd",
    "SliceAxisFirst",
    "SliceAxisFirstd",
    "SlicesOfCased",
    "SpacingAsNnunet",
    "SpacingAsNnunetd",
    "Split",
    "ValidateEvery",
    "cases_to_evaluate",
    "describe_model",
    "enough_to_share",
    "images_in",
    "keep_trained",
    "load_model",
    "nonzero",
    "plan_training",
    "read_plan",
    "read_record",
    "recipe_optimizer",
    "recipe_schedule",
    "select",
    "sliding_window",
    "split_cases",
    "transferability_handler",
]

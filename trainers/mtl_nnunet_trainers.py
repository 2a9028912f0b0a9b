"""The trainers of mtl-nnunet for nnUNet_extTrainer; they live in mtl_nnunet.trainer and mtl_nnunet.variants."""

from mtl_nnunet.variants import VARIANTS

globals().update(VARIANTS)

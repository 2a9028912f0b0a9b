"""Start nnU-Net and MONAI segmentation from the right pretrained timm checkpoint."""

__version__ = "0.1.0"

"""Pretraining checkpoints: find those of a run, read them without trusting them, fetch published ones."""

from mtl_nnunet.checkpoints.architecture import architecture_of, inferred_architecture
from mtl_nnunet.checkpoints.checkpoint import WHICH_WEIGHTS, Checkpoint, Published, ages
from mtl_nnunet.checkpoints.file import Contents, read_contents, read_weights
from mtl_nnunet.checkpoints.filenames import epoch_in_name
from mtl_nnunet.checkpoints.length import first_epoch, runs_of, span_of_run
from mtl_nnunet.checkpoints.published import find_published, is_published_name, list_published
from mtl_nnunet.checkpoints.run import Listing, files_of_run, find_checkpoints, list_checkpoints

__all__ = [
    "WHICH_WEIGHTS",
    "Checkpoint",
    "Contents",
    "Listing",
    "Published",
    "ages",
    "architecture_of",
    "epoch_in_name",
    "files_of_run",
    "find_checkpoints",
    "find_published",
    "first_epoch",
    "inferred_architecture",
    "is_published_name",
    "list_checkpoints",
    "list_published",
    "read_contents",
    "read_weights",
    "runs_of",
    "span_of_run",
]

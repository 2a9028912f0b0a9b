"""The MONAI bundle that is shipped with the package, copied out for a user to train in."""

from __future__ import annotations

import shutil
from pathlib import Path

from mtl_nnunet.errors import UserError
from mtl_nnunet.files import folder_written_atomically

SHIPPED = Path(__file__).parent / "bundle"
METADATA = Path("configs", "metadata.json")
MODEL = Path("models", "model.pt")


def write_bundle(folder: str | Path, overwrite: bool = False) -> Path:
    """Copy the bundle into a folder of its own, whole or not at all.

    Args:
        folder: Where to; its parents are made.
        overwrite: Replace the shipped files of a bundle that is there; what was selected, trained and added in it stays.

    Returns:
        The folder.

    Raises:
        UserError: The folder exists, is no bundle, or cannot be written.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise UserError(
            f"{target} exists already. Pass --overwrite to replace the files that are shipped, or another name."
        )
    if target.exists() and not (target / METADATA).is_file():
        raise UserError(f"{target} is no bundle, so it is not overwritten. Pass a name that does not exist yet.")
    with folder_written_atomically(target, overwrite) as temporary:
        if target.exists():
            shutil.copytree(target, temporary, dirs_exist_ok=True, symlinks=True)
        shutil.copytree(SHIPPED, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        if (temporary / MODEL).is_file():
            from mtl_nnunet.components.metadata import describe_model

            describe_model(temporary / MODEL, temporary)
    return target

"""The MONAI bundle that is shipped with the package, copied out for a user to train in."""

from __future__ import annotations

import shutil
from pathlib import Path

from mtl_nnunet.errors import UserError
from mtl_nnunet.files import folder_written_atomically, written_atomically

SHIPPED = Path(__file__).parent / "bundle"
# no other bundle has it
OURS = Path("configs", "select.yaml")
MODEL = Path("models", "model.pt")


def write_bundle(folder: str | Path, overwrite: bool = False) -> Path:
    """Copy the bundle into a folder of its own.

    A new folder is written whole or not at all. Over a bundle that is there each shipped file is, and nothing else is touched.

    Args:
        folder: Where to; its parents are made.
        overwrite: Replace the shipped files of a bundle that is there; what was selected, trained and added in it stays.

    Returns:
        The folder.

    Raises:
        UserError: The folder exists, is not this bundle, or cannot be written.
    """
    target = Path(folder)
    if not target.exists():
        with folder_written_atomically(target) as temporary:
            for file, source in shipped_files().items():
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, temporary / file)
        return target
    if not overwrite:
        raise UserError(
            f"{target} exists already. Pass --overwrite to replace the files that are shipped, or another name."
        )
    if not (target / OURS).is_file():
        raise UserError(
            f"{target} is not the bundle that is trained in (it has no {OURS}), so it is not overwritten. Pass a name that does not "
            "exist yet."
        )
    for file, source in shipped_files().items():
        with written_atomically(target / file) as temporary_file:
            shutil.copyfile(source, temporary_file)
    if (target / MODEL).is_file():
        from mtl_nnunet.components.metadata import describe_model

        describe_model(target / MODEL, target)
    return target


def shipped_files() -> dict[Path, Path]:
    """The bundle's files: where each goes below its folder, and where it lies in the package."""
    return {
        file.relative_to(SHIPPED): file
        for file in sorted(SHIPPED.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }

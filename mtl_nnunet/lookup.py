"""nnU-Net's own look-up of a trainer by its name, in a process that has imported more than nnU-Net."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def find_trainer(name: str) -> Any:
    """nnU-Net's class of that name, from its own package or the folders of ``nnUNet_extTrainer``.

    Raises:
        RuntimeError: nnU-Net does not find it, or a module on its way cannot be imported.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with _without_lazy_modules():
        return recursive_find_trainer_class_by_name(name)


@contextmanager
def _without_lazy_modules() -> Iterator[None]:
    """Take modules out of ``sys.modules`` that import others as soon as their file or path is asked for.

    nnU-Net asks every module for both while it goes through ``sys.modules``, which must not change meanwhile. MONAI imports
    transformers, and some of its releases leave a hundred such modules there.
    """
    lazy = {
        name: module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType)
        and "__getattr__" in vars(module)
        and not {"__file__", "__path__"} & set(vars(module))
    }
    for name in lazy:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(lazy)

"""PyTorch's random generators: kept as they were, and seeded for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def kept() -> Iterator[None]:
    """Leave the generators of the CPU and of the devices in use as they were."""
    before = [(put_back, state()) for state, put_back, _ in _generators()]
    try:
        yield
    finally:
        for put_back, state in before:
            put_back(state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of a seed, on the CPU and on the devices in use; afterwards the generators are as they were.

    Examples:
        >>> with seeded(0):
        ...     first = torch.rand(1)
        >>> with seeded(0):
        ...     print(torch.rand(1) == first)
        tensor([True])
    """
    with kept():
        # torch.manual_seed would also seed devices that are used for the first time much later
        for _, _, seed_with in _generators():
            seed_with(seed)
        yield


def _generators() -> list[tuple[Callable[[], Any], Callable[[Any], object], Callable[[int], object]]]:
    """How each generator's state is taken, put back and seeded."""
    found: list[tuple[Callable[[], Any], Callable[[Any], object], Callable[[int], object]]] = [
        (torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed)
    ]
    for module in (torch.cuda, torch.xpu):
        if module.is_available() and module.is_initialized():
            found.append((module.get_rng_state_all, module.set_rng_state_all, module.manual_seed_all))
    if torch.backends.mps.is_available():
        found.append((torch.mps.get_rng_state, torch.mps.set_rng_state, torch.mps.manual_seed))
    return found

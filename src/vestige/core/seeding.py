"""All randomness: named generators of our own, and the global ones that other code draws from."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.core import parallel


def derive(seed: int, name: str) -> int:
    """A seed for the stream `name` of the run `seed`; streams do not depend on each other."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the stream `name` of the run `seed`."""
    return torch.Generator(device=device).manual_seed(derive(seed, name))


def seed_globals(seed: int) -> None:
    """Seed the generators that other people's modules use (dropout, NumPy, Python)."""
    of_torch = derive(seed, "torch")
    if torch.accelerator.is_available():
        torch.manual_seed(of_torch)
    else:
        # The same for the CPU; torch would keep each call, with its stack, for a GPU to come.
        torch.default_generator.manual_seed(of_torch)
    # NumPy's legacy seeding takes 32 bits; what it seeds is used by other people's code only.
    np.random.seed(derive(seed, "numpy") % 2**32)
    random.seed(derive(seed, "python"))


def global_state() -> dict[str, Any]:
    """State of the global torch, CUDA, NumPy and Python generators."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states() if torch.cuda.is_initialized() else [],
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def _cuda_states() -> list[Tensor]:
    # Each of several processes has one GPU, and on resume takes over what the first one saved.
    return [torch.cuda.get_rng_state()] if parallel.world() > 1 else torch.cuda.get_rng_state_all()


def set_global_state(state: dict[str, Any]) -> None:
    """Put the global generators back to what `global_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        if parallel.world() > 1:
            torch.cuda.set_rng_state(state["cuda"][0])
        else:
            torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the global generators as they were found."""
    state = global_state()
    try:
        yield
    finally:
        set_global_state(state)


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Run a block with the global generators seeded for `name`, then put them back.

    Networks built in such a block start from the same weights whatever was built before them.
    """
    with preserved():
        seed_globals(derive(seed, name))
        yield

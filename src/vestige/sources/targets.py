"""Classes that inputs are made for."""

import torch
from torch import Tensor


def even_targets(count: int, num_classes: int, rng: torch.Generator) -> Tensor:
    """`count` classes in random order, each as often as the others, or once more."""
    first = torch.randperm(num_classes, generator=rng, device=rng.device)
    ordered = first[torch.arange(count, device=rng.device) % num_classes]
    return ordered[torch.randperm(count, generator=rng, device=rng.device)]

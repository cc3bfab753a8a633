"""How much arithmetic a network takes, counted, so that settings do not depend on a clock."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vestige.core import modes, seeding


def forward_flops(network: nn.Module, shape: tuple[int, ...]) -> float:
    """Floating-point operations of one forward in eval mode, per row of the batch.

    Counted are matrix products and convolutions, each multiplication and addition as one, by
    running two rows of zeros; other layers count as nothing. Weights, buffers, training flags and
    torch's random state stay as they are.

    Args:
        network: from a tensor (B, ...) to anything.
        shape: of one row.
    """
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    inputs = torch.zeros((2, *shape), device=device)
    counter = FlopCounterMode(display=False)
    with seeding.preserved(), modes.evaluating(network), torch.no_grad(), counter:
        network(inputs)
    return counter.get_total_flops() / 2


def iterations_for(flops: float, device: torch.device, *, minutes: float = 4.0) -> int:
    """How many iterations of `flops` operations take about `minutes` on such a device.

    An estimate of a machine that nobody measured: 60 GFLOP/s for two CPU cores on the small layers
    that students have, 6 TFLOP/s for a GPU. No clock is read, so the same networks always get the
    same number; a budget is what holds a time.
    """
    rate = 60e9 if device.type == "cpu" else 6e12
    return max(1, int(minutes * 60 * rate / max(flops, 1.0)))

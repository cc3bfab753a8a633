"""Factories of the optimizers that papers use, for `Context.optimizer`."""

from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from vestige.core.protocols import OptimizerFactory

OptimizerName = Literal["sgd", "adam"]


def factory(
    name: OptimizerName,
    lr: float,
    *,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> OptimizerFactory:
    """A factory of SGD or Adam; all parameters are updated in one fused kernel.

    Args:
        name: "sgd" uses `momentum`, "adam" uses `betas`.
        lr: learning rate.
        momentum: of SGD.
        betas: of Adam.
        weight_decay: coefficient of the L2 penalty, added to the gradient.
    """

    def make(params: list[nn.Parameter]) -> Optimizer:
        if name == "sgd":
            return torch.optim.SGD(
                params, lr, momentum=momentum, weight_decay=weight_decay, fused=True
            )
        return torch.optim.Adam(params, lr, betas=betas, weight_decay=weight_decay, fused=True)

    return make

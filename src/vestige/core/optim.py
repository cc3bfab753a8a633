"""Factories of the optimizers that papers use, for `Context.optimizer`."""

from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from vestige.core.protocols import OptimizerFactory

OptimizerName = Literal["sgd", "adam", "adamw"]


def factory(
    name: OptimizerName,
    lr: float,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> OptimizerFactory:
    """A factory of SGD, Adam or AdamW; all parameters are updated in one fused kernel.

    Args:
        name: "sgd" uses `momentum` and `nesterov`, the others `betas`.
        lr: learning rate.
        momentum: of SGD.
        nesterov: of SGD, whether the momentum looks ahead.
        betas: of Adam and AdamW.
        weight_decay: coefficient of the L2 penalty, added to the gradient; with "adamw" decoupled
            from it.
    """

    def make(params: list[nn.Parameter]) -> Optimizer:
        if name == "sgd":
            return torch.optim.SGD(
                params,
                lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                fused=True,
            )
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(params, lr, betas=betas, weight_decay=weight_decay, fused=True)

    return make

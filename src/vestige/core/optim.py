"""Factories of the optimizers that papers use, for `Context.optimizer`."""

from typing import Any, Literal

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

    Gradients may lie in memory in another order than their weights (channels-last or not).

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
            made: Optimizer = torch.optim.SGD(
                params,
                lr,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                fused=True,
            )
        else:
            kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
            made = kind(params, lr, betas=betas, weight_decay=weight_decay, fused=True)
        made.register_step_pre_hook(_aligned)
        return made

    return make


def _aligned(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Lay every gradient out as its weight, since fused kernels walk both as they lie in memory.

    `backward` does so by itself; gradients that a paper or a plug-in forms may lie otherwise, and
    the kernels would add them to the wrong weights without a word.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            grad = weight.grad
            if grad is not None and grad.stride() != weight.stride():
                weight.grad = torch.empty_like(weight).copy_(grad)

import pytest
import torch
from torch import nn

from vestige.core.optim import factory

LR = 0.1


def stepped(make, grads: list[float]) -> list[float]:
    """The weight after each step from 1, at the given gradients."""
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = make([weight])
    found = []
    for grad in grads:
        weight.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        found.append(weight.item())
    return found


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 5e-4])
def test_sgd_is_the_textbooks(momentum, decay):
    weight, velocity, expected = 1.0, 0.0, []
    for grad in (1.0, -0.5, 2.0):
        velocity = momentum * velocity + grad + decay * weight
        weight -= LR * velocity
        expected.append(weight)
    made = factory("sgd", LR, momentum=momentum, weight_decay=decay)
    assert stepped(made, [1.0, -0.5, 2.0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.999)])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_adam_is_the_textbooks_with_l2_in_the_gradient(betas, decay):
    weight, m, v, expected = 1.0, 0.0, 0.0, []
    for number, grad in enumerate((1.0, -0.5, 2.0), start=1):
        penalised = grad + decay * weight
        m = betas[0] * m + (1 - betas[0]) * penalised
        v = betas[1] * v + (1 - betas[1]) * penalised**2
        scale = (v / (1 - betas[1] ** number)) ** 0.5 + 1e-8
        weight -= LR * m / (1 - betas[0] ** number) / scale
        expected.append(weight)
    made = factory("adam", LR, betas=betas, weight_decay=decay)
    assert stepped(made, [1.0, -0.5, 2.0]) == pytest.approx(expected, rel=1e-12)


def test_the_defaults_are_the_reference_codes():
    weight = [nn.Parameter(torch.ones(1))]
    sgd, adam = (factory(name, LR)(weight).defaults for name in ("sgd", "adam"))
    assert (sgd["momentum"], sgd["weight_decay"], sgd["nesterov"]) == (0.9, 0.0, False)
    assert (adam["betas"], adam["weight_decay"]) == ((0.9, 0.999), 0.0)
    assert sgd["fused"]
    assert adam["fused"]


def test_each_call_makes_an_optimizer_of_its_own():
    make, weight = factory("adam", LR), nn.Parameter(torch.ones(1))
    first, second = make([weight]), make([weight])
    weight.grad = torch.ones(1)
    first.step()
    assert first.state
    assert not second.state


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("turned", ["weight", "grad"])
def test_a_gradient_that_lies_otherwise_in_memory_meets_its_own_weight(name, turned):
    values, slope = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    found = []
    for layouts in ({}, {turned: torch.channels_last}):
        weight = nn.Parameter(values.clone())
        weight.data = weight.data.contiguous(
            memory_format=layouts.get("weight", torch.contiguous_format)
        )
        optimizer = factory(name, LR)([weight])
        for _ in range(2):
            weight.grad = slope.clone(memory_format=layouts.get("grad", torch.contiguous_format))
            optimizer.step()
        found.append(weight.detach().contiguous())
    assert torch.equal(*found)

"""Many networks together answer as each does alone."""

import pytest
import torch
from torch import Tensor, nn

from vestige.core.types import InputSpec
from vestige.federated.stacked import StackedNetworks
from vestige.models.factory import build_model

SPEC = InputSpec.image(1, 8, 8)


def networks(norm: str, count: int = 5) -> list[nn.Module]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        one = build_model("convnet", SPEC, 3, widths=[4, 8], norm=norm)
        for layer in one.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean = torch.randn(layer.num_features)
                layer.running_var = torch.rand(layer.num_features) + 0.5
        made.append(one.eval())
    return made


def slopes(logits: Tensor, inputs: Tensor) -> Tensor:
    weights = torch.arange(logits.numel(), dtype=torch.float32).view(logits.shape) / 10
    return torch.autograd.grad((weights * logits).sum(), inputs)[0]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_it_is_the_loop(norm, chunk):
    each = networks(norm)
    stacked = StackedNetworks(each[0], [one.state_dict() for one in each], chunk=chunk)
    inputs = torch.randn(6, *SPEC.shape, requires_grad=True)
    expected, found = torch.stack([one(inputs) for one in each]), stacked(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        slopes(found, inputs), slopes(expected, inputs), atol=1e-5, rtol=1e-5
    )
    some = stacked(inputs, range(1, 4))
    torch.testing.assert_close(some, expected[1:4], atol=1e-5, rtol=0)


def test_it_neither_learns_nor_looks_at_the_form_it_was_made_from():
    each = networks("batch", 2)
    form = networks("batch", 3)[2].train()
    before = {name: value.clone() for name, value in form.state_dict().items()}
    stacked = StackedNetworks(form, [one.state_dict() for one in each], chunk=2)
    with torch.no_grad():
        for value in form.parameters():
            value.zero_()
    inputs = torch.randn(6, *SPEC.shape, requires_grad=True)
    found = stacked(inputs)
    torch.testing.assert_close(found, torch.stack([one(inputs) for one in each]), atol=1e-5, rtol=0)
    found.sum().backward()
    assert inputs.grad is not None
    assert all(value.grad is None for value in [*form.parameters(), *stacked.form.parameters()])
    assert form.training
    statistics = [name for name in before if "running" in name or "tracked" in name]
    assert all(torch.equal(before[name], form.state_dict()[name]) for name in statistics)


def test_what_a_state_lacks_is_the_forms():
    form, other = networks("batch", 2)
    short = {n: v for n, v in other.state_dict().items() if "running" not in n}
    mixed = networks("batch", 1)[0]
    mixed.load_state_dict({**form.state_dict(), **short})
    inputs = torch.randn(6, *SPEC.shape)
    found = StackedNetworks(form, [short], chunk=1)(inputs)[0]
    assert torch.equal(found, mixed(inputs))

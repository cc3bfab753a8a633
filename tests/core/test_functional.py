import pytest
import torch
from torch import nn

from vestige.core.functional import functional


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def test_it_is_the_network_at_other_weights(tiny_student):
    inputs = torch.randn(4, 1, 8, 8)
    other = {name: 2 * value for name, value in parameters(tiny_student).items()}
    here = functional(tiny_student, other)(inputs)
    live = parameters(tiny_student)
    tiny_student.load_state_dict({**tiny_student.state_dict(), **other})
    assert torch.equal(tiny_student(inputs), here)
    assert not torch.equal(functional(tiny_student, live)(inputs), here)


def test_names_left_out_keep_the_live_weight(tiny_student):
    inputs = torch.randn(4, 1, 8, 8)
    moved = functional(tiny_student, {"5.bias": tiny_student[5].bias + 1})(inputs)
    torch.testing.assert_close(moved, functional(tiny_student, {})(inputs) + 1)


def test_live_batchnorm_statistics_do_not_move(tiny_student):
    tiny_student.train()
    before, weights = buffers(tiny_student), parameters(tiny_student)
    call = functional(tiny_student, {})
    for _ in range(3):
        call(5 + torch.randn(4, 1, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in tiny_student.named_buffers())
    assert all(
        torch.equal(weights[name], value) for name, value in parameters(tiny_student).items()
    )


def test_its_own_statistics_move_between_calls(tiny_student):
    inputs = torch.randn(4, 1, 8, 8)
    call = functional(tiny_student.train(), {})
    call(5 + inputs)
    tiny_student.eval()
    once = call(inputs)
    assert not torch.equal(once, tiny_student(inputs))
    # One more pass in train mode moves them further: they are kept, not cloned anew.
    tiny_student.train()
    call(5 + inputs)
    tiny_student.eval()
    assert not torch.equal(call(inputs), once)


def test_training_flags_decide_the_mode(tiny_student):
    inputs, call = torch.randn(4, 1, 8, 8), functional(tiny_student, {})
    tiny_student.eval()
    assert torch.equal(call(inputs), tiny_student(inputs))
    tiny_student.train()
    in_batch, alone = call(inputs)[0], call(inputs[:1].expand(2, -1, -1, -1))[0]
    assert not torch.allclose(in_batch, alone)


def test_gradient_flows_to_the_given_weights_alone(tiny_student):
    given = {name: value.requires_grad_() for name, value in parameters(tiny_student).items()}
    functional(tiny_student, given)(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in given.values())
    assert all(value.grad is None for value in tiny_student.parameters())


def test_it_is_differentiable_twice(tiny_student):
    # What a bilevel plug-in does: the gradient at a point that depends on the live weights.
    inputs = torch.randn(4, 1, 8, 8)
    loss = tiny_student(inputs).square().mean()
    names = [name for name, _ in tiny_student.named_parameters()]
    live = list(tiny_student.parameters())
    grads = torch.autograd.grad(loss, live, create_graph=True)
    moved = {n: p - 0.1 * g for n, p, g in zip(names, live, grads, strict=True)}
    functional(tiny_student, moved)(inputs).square().mean().backward()
    assert all(value.grad is not None for value in live)


def test_unknown_names_are_refused(tiny_student):
    with pytest.raises(KeyError, match=r"'5\.weights', '9\.bias'.*Sequential"):
        functional(tiny_student, {"9.bias": torch.ones(1), "5.weights": torch.ones(1)})
    with pytest.raises(KeyError, match="running_mean"):
        functional(tiny_student, {"1.running_mean": torch.ones(3)})

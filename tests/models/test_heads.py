import pytest
import torch
from torch import nn

from vestige.core.types import count_parameters
from vestige.errors import RecipeError
from vestige.models.heads import ProjectionHead, find_head, stacked_linear


def features(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def test_it_is_two_layers_and_a_division_by_the_length():
    torch.manual_seed(0)
    head, inputs = ProjectionHead(5, 4, hidden_dim=7), features(6, 5)
    first, bias, second, offset = head.parameters()
    values = (inputs @ first.t() + bias).clamp(min=0) @ second.t() + offset
    slow = torch.stack([row / row.square().sum().sqrt() for row in values])
    torch.testing.assert_close(head(inputs), slow)
    torch.testing.assert_close(slow.norm(dim=1), torch.ones(6))


def test_the_hidden_layer_is_as_wide_as_the_features_unless_told():
    # CMI's code has D, D and d; weights and biases.
    assert count_parameters(ProjectionHead(10, 4)) == (10 * 10 + 10) + (10 * 4 + 4)
    assert count_parameters(ProjectionHead(10, 4, hidden_dim=3)) == (10 * 3 + 3) + (3 * 4 + 4)


def test_the_scale_of_features_does_not_count_without_biases():
    torch.manual_seed(0)
    head, inputs = ProjectionHead(5, 4), features(6, 5)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            layer.bias.data.zero_()
    torch.testing.assert_close(head(100 * inputs), head(inputs))


def test_gradient_moves_points_along_the_sphere_only():
    torch.manual_seed(0)
    head, inputs = ProjectionHead(5, 4).double(), features(6, 5).double().requires_grad_()
    along = torch.randn(6, 4, dtype=torch.float64)
    (head(inputs) * along).sum().backward()
    assert inputs.grad.abs().amax(1).min() > 1e-4
    assert all(weight.grad.abs().max() > 1e-4 for weight in head.parameters())
    # The length is 1 whatever the features are.
    (slope,) = torch.autograd.grad(head(inputs).square().sum(), inputs)
    assert slope.abs().max() < 1e-14


class Tempered(nn.Module):
    """A network whose logits are its last linear layer's, divided by something."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(inputs.flatten(1)) / 2


def test_the_head_is_the_layer_that_makes_the_logits(tiny_student):
    before = {name: value.clone() for name, value in tiny_student.state_dict().items()}
    name, head = find_head(tiny_student, (1, 8, 8), 3)
    assert (name, head) == ("5", tiny_student[5])
    assert all(torch.equal(before[key], value) for key, value in tiny_student.state_dict().items())
    assert tiny_student.training


def test_a_last_layer_of_another_size_is_passed_over():
    # A second head for something else, defined after the one that makes the logits.
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    network.add_module("other", nn.Identity())
    network.other.beside = nn.Linear(4, 2)
    assert find_head(network, (4,), 3)[0] == "1"


def test_a_network_without_a_head_is_refused():
    for network, said in (
        (nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), "without a linear layer of 3 outputs"),
        (Tempered(), "'last', does not make its logits"),
    ):
        with pytest.raises(RecipeError, match=said):
            find_head(network, (1, 4, 1) if isinstance(network, Tempered) else (1, 4, 4), 3)


def test_a_head_of_another_precision_is_refused():
    with pytest.raises(RecipeError, match=r"'0', is torch.float64, .* call .float\(\)"):
        find_head(nn.Sequential(nn.Linear(4, 3)).double(), (4,), 3)


def test_stacked_layers_are_a_loop_over_them():
    torch.manual_seed(0)
    layers, inputs = [nn.Linear(5, 3) for _ in range(4)], features(6, 5)
    weights = torch.stack([layer.weight for layer in layers])
    biases = torch.stack([layer.bias for layer in layers])
    slow = torch.stack([layer(inputs) for layer in layers])
    torch.testing.assert_close(stacked_linear(inputs, weights, biases), slow, rtol=0, atol=1e-6)
    without = torch.stack([inputs @ layer.weight.T for layer in layers])
    torch.testing.assert_close(stacked_linear(inputs, weights), without, rtol=0, atol=1e-6)

import torch
from torch import nn

from vestige.core.types import count_parameters
from vestige.models.heads import ProjectionHead


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

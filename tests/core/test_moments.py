import torch

from vestige.core.moments import channel_moments


def draw(*shape: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)


def test_moments_are_those_of_the_definition():
    values = draw(6, 3, 4, 2)
    mean, var, each = channel_moments(values)
    torch.testing.assert_close(mean, values.mean((0, 2, 3)))
    torch.testing.assert_close(var, values.var((0, 2, 3), correction=0))
    torch.testing.assert_close(each, values.mean((2, 3)))


def test_vectors_have_one_position():
    values = draw(6, 3)
    mean, var, each = channel_moments(values)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(var, values.var(0, correction=0))
    torch.testing.assert_close(each, values)


def test_gradients_of_first_and_second_order():
    values = draw(3, 2, 2, 2)
    assert torch.autograd.gradcheck(channel_moments, (values,))
    assert torch.autograd.gradgradcheck(channel_moments, (values,))


def test_a_large_mean_costs_no_digits():
    values = (draw(64, 2, 8, 8).detach() * 1e-2 + 100).float()
    exact = values.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(channel_moments(values)[1].double(), exact, rtol=1e-5, atol=0)

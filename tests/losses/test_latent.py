import math

import pytest
import torch
from jaxtyping import TypeCheckError

from vestige.errors import ShapeError
from vestige.losses.latent import latent_moments_loss, standard_normal_divergence


def test_a_standard_normal_code_has_no_divergence_and_no_gradient():
    mean = torch.zeros(2, 3, requires_grad=True)
    log_variance = torch.zeros(2, 3, requires_grad=True)
    divergence = standard_normal_divergence(mean, log_variance)
    assert divergence.tolist() == [0.0, 0.0]
    grads = torch.autograd.grad(divergence.sum(), [mean, log_variance])
    assert not any(grad.any() for grad in grads)


def test_the_divergence_is_the_one_of_two_gaussians():
    mean, log_variance = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    codes = torch.distributions.Normal(mean, (log_variance / 2).exp())
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    expected = torch.distributions.kl_divergence(codes, normal).sum(1)
    torch.testing.assert_close(standard_normal_divergence(mean, log_variance), expected)
    # A mean of c alone: c^2 / 2.
    shifted = standard_normal_divergence(torch.full((1, 1), 3.0), torch.zeros(1, 1))
    assert shifted.item() == pytest.approx(4.5)


def test_a_tiny_log_variance_keeps_its_digits():
    small = torch.full((1, 1), 1e-3)
    # v^2 / 4 to first order; 1 + v - exp(v) in float32 would be rounding.
    got = standard_normal_divergence(torch.zeros(1, 1), small).item()
    assert got == pytest.approx(1e-6 / 4, rel=1e-3)


def test_moments_that_are_right_cost_nothing():
    codes = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / math.sqrt(2)
    # Mean 0 and unbiased variance 1.
    assert latent_moments_loss(codes).item() == pytest.approx(0.0, abs=1e-12)
    assert latent_moments_loss(codes + 2).item() == pytest.approx(4.0)
    # Twice the code: variance 4, which is 3 too many.
    assert latent_moments_loss(2 * codes).item() == pytest.approx(9.0)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ShapeError, match="one has no variance"):
        latent_moments_loss(torch.zeros(1, 3))
    # Nothing is broadcast; jaxtyping says so first where it looks, and it looks in tests alone.
    with pytest.raises((ShapeError, TypeCheckError)):
        standard_normal_divergence(torch.zeros(2, 3), torch.zeros(2, 1))

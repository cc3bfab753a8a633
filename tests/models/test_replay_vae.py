import pytest
import torch
from torch import nn

from vestige.core.types import InputSpec
from vestige.models.factory import build_generator
from vestige.models.replay_vae import (
    ReplayEncoder,
    initialize_uniform,
    replay_networks,
    sample_code,
)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (16, 16), (28, 20), (31, 9)])
def test_the_encoder_takes_any_size(size):
    encoder = ReplayEncoder(5, 3, size, width=2)
    mean, log_variance = encoder(torch.randn(4, 3, *size))
    assert mean.shape == log_variance.shape == (4, 5)


def test_at_32_pixels_it_has_the_papers_number_of_features():
    encoder = ReplayEncoder(1000, 3, 32)
    # 32 * (32 / 4)^2, as the reference code counts them.
    assert encoder.mean.in_features == encoder.log_variance.in_features == 32 * 8**2
    widths = [layer.out_channels for layer in encoder.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [64, 128, 128]
    eps = [layer.eps for layer in encoder.layers if isinstance(layer, nn.BatchNorm2d)]
    assert eps == [0.8, 0.8, 1e-5]


def test_it_sees_unit_columns():
    encoder = ReplayEncoder(4, 2, 8, width=2).eval()
    images = torch.randn(3, 2, 8, 8)
    # One factor per column of a channel, along the height.
    scale = torch.rand(3, 2, 1, 8) + 0.5
    for one, other in zip(encoder(images), encoder(images * scale), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(encoder(images)[0], encoder(images * scale.mT)[0], atol=1e-3)


def test_codes_have_the_moments_that_are_asked_for():
    noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    mean, log_variance = torch.full_like(noise, 2.0), torch.full_like(noise, 4.0).log()
    codes = sample_code(mean, log_variance, noise)
    # Deviation 2: five standard errors of mean and variance.
    assert codes.mean().item() == pytest.approx(2.0, abs=0.032)
    assert codes.var().item() == pytest.approx(4.0, abs=0.09)


@pytest.mark.parametrize("spectral", [False, True])
def test_weights_are_uniform_and_biases_zero(spectral):
    made = build_generator(
        "upsample", InputSpec.image(3, 8, 8), latent_dim=20, width=8, spectral=spectral
    )
    before = made.project[2].weight.clone()
    initialize_uniform(made, 0.08)
    named = dict(made.named_parameters())
    convolutions = [n for n in named if n.endswith("weight.original")]
    assert len(convolutions) == (3 if spectral else 0)
    drawn = torch.cat([w.flatten() for w in named.values() if w.dim() > 1])
    assert drawn.abs().max() <= 0.08
    # Deviation of a uniform number: 0.16 / sqrt(12).
    assert drawn.std().item() == pytest.approx(0.0462, rel=0.05)
    assert not any(w.any() for n, w in named.items() if n.endswith("bias"))
    assert torch.equal(made.project[2].weight, before)


def test_the_memory_generator_is_the_papers_without_spectral_norm():
    encoder, maker = replay_networks(InputSpec.image(1, 8, 8), latent_dim=6, width=4)
    assert not any("original" in name for name, _ in maker.named_parameters())
    assert [m.eps for m in maker.modules() if isinstance(m, nn.BatchNorm2d)][1:3] == [0.8, 0.8]
    mean, _ = encoder(maker(torch.randn(5, 6)))
    assert mean.shape == (5, 6)
    assert all(not w.any() for n, w in encoder.named_parameters() if n in ("mean.bias",))

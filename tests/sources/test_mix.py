"""Images with other channel statistics: what stays, what is new, and what may be drawn."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.errors import RecipeError, ShapeError
from vestige.sources.mix import Mix, check_images, draw_mix, mix_distribution, mixed

B, C = 6, 3


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(seed: int = 1) -> Tensor:
    """Images whose channels have deviations between 0.5 and 2."""
    scale = 0.5 + 1.5 * torch.rand(B, C, 1, 1, generator=rng(seed), dtype=torch.float64)
    noise = torch.randn(B, C, 7, 5, generator=rng(seed + 1), dtype=torch.float64)
    return scale * noise + torch.randn(B, C, 1, 1, generator=rng(seed + 2), dtype=torch.float64)


def mix(own_share: float, partner: list[int] | None = None, mean: float = 0.0, std: float = 0.0):
    noise = torch.ones(B, C, dtype=torch.float64)
    order = torch.tensor(partner or [1, 2, 3, 4, 5, 0])
    return Mix(order, torch.full((B,), own_share, dtype=torch.float64), mean * noise, std * noise)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased deviation per image and channel, as the code has them."""
    std, mean = torch.std_mean(images, dim=(2, 3), correction=0)
    return mean, std


def test_without_partner_and_noise_nothing_changes():
    images = pictures()
    # The divisor is 1e-6 larger than the deviation.
    torch.testing.assert_close(mix_distribution(images, mix(1.0)), images, rtol=0, atol=1e-5)


def test_with_no_share_of_its_own_an_image_has_its_partners_statistics():
    images = pictures()
    found, wanted = moments(mix_distribution(images, mix(0.0))), moments(images)
    order = [1, 2, 3, 4, 5, 0]
    torch.testing.assert_close(found[0], wanted[0][order], rtol=0, atol=1e-10)
    # Up to 1e-6 of deviations of at least 0.4, at most 2.5.
    torch.testing.assert_close(found[1], wanted[1][order], rtol=1e-5, atol=0)


def test_the_new_statistics_are_the_ones_asked_for():
    images = pictures()
    mean, std = moments(images)
    order = [1, 2, 3, 4, 5, 0]
    found = moments(mix_distribution(images, mix(0.7, mean=0.5, std=-0.25)))
    spread = [x.sub(x.mean(0)).square().mean(0).sqrt() for x in (mean, std)]
    torch.testing.assert_close(
        found[0], 0.7 * mean + 0.3 * mean[order] + 0.5 * spread[0], rtol=0, atol=1e-10
    )
    wanted = 0.7 * std + 0.3 * std[order] - 0.25 * spread[1]
    assert (wanted > 0.1).all()
    torch.testing.assert_close(found[1], wanted, rtol=1e-5, atol=0)


def test_the_content_stays():
    images = pictures()
    changed = mix_distribution(images, draw_mix(B, C, rng()))
    assert (changed - images).abs().amax((1, 2, 3)).min() > 1e-3
    for own, other in zip(images.flatten(0, 1), changed.flatten(0, 1), strict=True):
        correlation = torch.corrcoef(torch.stack([own.flatten(), other.flatten()]))[0, 1]
        assert correlation.item() == pytest.approx(1, abs=1e-12)


def test_a_deviation_never_falls_below_a_twentieth_of_its_own():
    images = pictures()
    found = moments(mix_distribution(images, mix(1.0, std=-1000.0)))[1]
    torch.testing.assert_close(found, 0.05 * moments(images)[1], rtol=1e-5, atol=0)


def test_what_little_there_is_in_a_flat_image_is_not_blown_up():
    images = pictures()
    images[2] = 0.3 + 1e-7 * images[2]
    found = moments(mix_distribution(images, mix(0.0)))[1][2]
    partner, median = moments(images)[1][3], moments(images)[1].median(0).values
    # Divided by a hundredth of the median instead of by its own deviation.
    floored = partner * moments(images)[1][2] / (0.01 * median + 1e-6)
    torch.testing.assert_close(found, floored, rtol=1e-6, atol=0)
    assert (found < 1e-3 * partner).all()


def test_a_batch_of_flat_images_stays_finite():
    images = torch.full((B, C, 4, 4), 0.5)
    images[3:] = 0.1
    changed = mixed(images, rng())
    assert torch.isfinite(changed).all()
    assert (changed == changed[:, :, :1, :1]).all()


def test_statistics_are_constants_for_the_gradient():
    images = pictures().requires_grad_()
    (slope,) = torch.autograd.grad(mix_distribution(images, mix(0.0)).sum(), images)
    std = moments(images.detach())[1]
    # Of x' = m' + s' (x - m) / s with all statistics held: s' / s at every pixel.
    scale = std[[1, 2, 3, 4, 5, 0]] / (std + 1e-6)
    torch.testing.assert_close(slope, scale[:, :, None, None].expand_as(slope))


def test_one_image_alone_keeps_its_statistics():
    image = pictures()[:1]
    torch.testing.assert_close(mixed(image, rng()), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("concentration", [0.1, 0.5, 1.0])
def test_shares_are_beta_distributed(concentration):
    shares = draw_mix(4000, 1, rng(), concentration=concentration).own_share.double()
    assert ((shares >= 0) & (shares <= 1)).all()
    # Near 1 they round to 1 in float32, so each half is held against the lower one.
    low, high = shares[shares < 0.5], shares[shares >= 0.5]
    assert abs(len(low) - 2000) < 4 * math.sqrt(1000)
    beta = stats.beta(concentration, concentration)
    # Kolmogorov-Smirnov at 1e-3, with a fixed seed.
    assert stats.kstest(low.numpy(), lambda x: 2 * beta.cdf(x)).pvalue > 1e-3
    if concentration == 1:
        assert stats.kstest(1 - high.numpy(), lambda x: 2 * beta.cdf(x)).pvalue > 1e-3


def test_noise_and_partners_are_what_was_asked_for():
    drawn = draw_mix(5000, 2, rng(), noise=0.5)
    assert drawn.mean_noise.std().item() == pytest.approx(0.5, rel=0.03)
    assert drawn.std_noise.std().item() == pytest.approx(0.5, rel=0.03)
    # Not one noise used twice.
    together = torch.corrcoef(torch.stack([drawn.mean_noise[:, 0], drawn.std_noise[:, 0]]))
    assert abs(together[0, 1].item()) < 4 / math.sqrt(5000)
    assert torch.equal(drawn.partner.sort().values, torch.arange(5000))
    assert not draw_mix(3, 2, rng(), noise=0).mean_noise.any()


def test_the_generator_decides():
    first, second, other = (mixed(pictures(), rng(seed)) for seed in (4, 4, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_what_does_not_fit_is_refused():
    for wrong in ({"concentration": 0.0}, {"concentration": 1.5}, {"noise": -0.1}):
        with pytest.raises(RecipeError, match=r"expected a value in \(0, 1\] and one of at least"):
            draw_mix(2, 1, rng(), **wrong)
    for images in (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4), torch.zeros(6, 1, 4, 4)):
        with pytest.raises(ShapeError, match=r"got images .*expected \(B, C, H, W\) and"):
            mix_distribution(images, mix(1.0))
    check_images(InputSpec.image(1, 4, 4))
    with pytest.raises(RecipeError, match=r"got embedding inputs of shape \(5,\)"):
        check_images(InputSpec("embedding", (5,)))

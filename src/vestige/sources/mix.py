"""New distributions for old images: each keeps its content and gets other channel statistics.

After MixStyle (Zhou et al., ICLR 2021, arXiv 2104.02008), on images instead of features, and with
noise beside the mixing.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.core.types import InputSpec
from vestige.errors import RecipeError, ShapeError

# Jöhnk's method accepts at least every second try; so many miss once in a million images.
_TRIES = 20
# Deviation that an image is taken to have at least, as a share of the batch's median; that it is
# left with at least, as a share of its own; and what keeps a flat batch from dividing by 0.
_FLAT, _LEAST, _EPSILON = 1e-2, 0.05, 1e-6


@dataclass(frozen=True)
class Mix:
    """What was drawn for a batch: whose statistics each image gets, and how they are moved.

    Attributes:
        partner: (B,) int64, row of the other image.
        own_share: (B,) in [0, 1], how much of its own statistics an image keeps.
        mean_noise: (B, C), in deviations of the means over the batch.
        std_noise: (B, C), in deviations of the deviations over the batch.
    """

    partner: Int[Tensor, " batch"]
    own_share: Float[Tensor, " batch"]
    mean_noise: Float[Tensor, "batch channels"]
    std_noise: Float[Tensor, "batch channels"]


def draw_mix(
    count: int,
    channels: int,
    rng: torch.Generator,
    *,
    concentration: float = 0.1,
    noise: float = 0.5,
) -> Mix:
    """Partners, shares and noise for `mix_distribution`.

    Args:
        count: B, images whose statistics are mixed with one another.
        channels: C.
        rng: decides, and gives the device.
        concentration: a in (0, 1] of Beta(a, a), from which the shares come; lower keeps nearly all
            of one of the two images, 1 is uniform.
        noise: standard deviation of both noises.

    Raises:
        RecipeError: a value is out of its range.
    """
    if not 0 < concentration <= 1 or noise < 0:
        raise RecipeError(
            f"got concentration {concentration} and noise {noise}, expected a value in (0, 1] and "
            "one of at least 0"
        )
    device = rng.device
    return Mix(
        torch.randperm(count, generator=rng, device=device),
        _beta(count, concentration, rng),
        noise * torch.randn(count, channels, generator=rng, device=device),
        noise * torch.randn(count, channels, generator=rng, device=device),
    )


def mix_distribution(
    images: Float[Tensor, "batch channels height width"], mix: Mix
) -> Float[Tensor, "batch channels height width"]:
    """Give each image a new mean and deviation per channel; its content stays.

    With mean m and deviation s of an image per channel (over its pixels, biased) and M and S their
    deviations over the batch: m' = l m + (1 - l) m_j + e_m M, s' = l s + (1 - l) s_j + e_s S, at
    least 0.05 s, and x' = m' + s' (x - m) / s. An s below 1 % of the batch's median of that channel
    is raised to it before dividing, or what little there is in a flat image would be blown up.

    Args:
        images: (B, C, H, W) in the teacher's normalised space; not clipped.
        mix: of `draw_mix`; another device is brought along.

    Returns:
        (B, C, H, W); gradient flows to `images` through (x - m) / s alone, all statistics are
        constants.

    Raises:
        ShapeError: images and mix do not fit.
    """
    shape = tuple(images.shape)
    if images.dim() != 4 or mix.mean_noise.shape != shape[:2] or mix.partner.shape != shape[:1]:
        raise ShapeError(
            f"got images {shape} and a mix of {tuple(mix.mean_noise.shape)}, expected "
            "(B, C, H, W) and (B, C)"
        )
    device = images.device
    partner, share = mix.partner.to(device), mix.own_share.to(images)[:, None]
    pixels = images.detach().flatten(2)
    std, mean = torch.std_mean(pixels, dim=2, correction=0)
    new_mean = share * mean + (1 - share) * mean[partner]
    new_mean = new_mean + mix.mean_noise.to(images) * mean.std(0, correction=0)
    new_std = share * std + (1 - share) * std[partner]
    new_std = new_std + mix.std_noise.to(images) * std.std(0, correction=0)
    new_std = torch.maximum(new_std, _LEAST * std)
    divisor = torch.maximum(std, _FLAT * std.median(0).values) + _EPSILON
    mean, new_mean, scale = (x[:, :, None, None] for x in (mean, new_mean, new_std / divisor))
    return new_mean + scale * (images - mean)


def check_images(spec: InputSpec) -> None:
    """Refuse inputs that have no channels whose statistics could be mixed.

    Raises:
        RecipeError: they are no images.
    """
    if len(spec.shape) != 3:
        raise RecipeError(
            f"got {spec.kind} inputs of shape {spec.shape}, expected images (C, H, W) whose "
            "channel statistics can be mixed; set the weights of all terms on mixed images to 0"
        )


def mixed(
    images: Float[Tensor, "batch channels height width"],
    rng: torch.Generator,
    *,
    concentration: float = 0.1,
    noise: float = 0.5,
) -> Float[Tensor, "batch channels height width"]:
    """Images (B, C, H, W) mixed with one another, by `draw_mix` and `mix_distribution`."""
    count, channels = images.shape[:2]
    mix = draw_mix(count, channels, rng, concentration=concentration, noise=noise)
    return mix_distribution(images, mix)


def _beta(count: int, concentration: float, rng: torch.Generator) -> Tensor:
    """Beta(a, a), (count,), by Jöhnk's method: torch's own sampler takes no generator.

    Of U^(1/a) and V^(1/a) that add up to at most 1 the first's share of the sum is the answer. In
    logarithms, since for a small a both are too small for float32.
    """
    uniform = torch.rand(2, _TRIES, count, generator=rng, device=rng.device, dtype=torch.float64)
    # 1 - u lies in (0, 1], where the logarithm is finite.
    first, second = (1 - uniform).log() / concentration
    fits = torch.logaddexp(first, second) <= 0
    # The first that fits; the very first where none does.
    chosen = fits.to(torch.uint8).argmax(0, keepdim=True)
    shares = torch.sigmoid(first - second).gather(0, chosen)[0]
    return shares.float()

"""Other views of images, turned and in other colours: a whole batch, per sample, differentiable.

A generator that found one scheme of colours, or textures that run along the pixels, keeps to it.
Seen through views that are drawn anew for each image, what it made shows the networks more. As in
`sources/augment.py` what is done is drawn first, as tensors with one row per image.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vestige.core.types import InputSpec
from vestige.errors import RecipeError, ShapeError

# How much larger or smaller a turned image becomes.
_ZOOM = (0.8, 1.25)


def draw_views(
    count: int, spec: InputSpec, rng: torch.Generator, *, recolour: float = 0.0, turn: float = 0.0
) -> dict[str, Tensor]:
    """What `viewed` does to each image; empty, and nothing is drawn, where nothing is asked for.

    Args:
        count: B.
        spec: of the inputs, images (C, H, W).
        rng: decides, and gives the device.
        recolour: see `draw_colours`.
        turn: see `draw_turns`.

    Returns:
        "turns" (B, 3) and "colours" (B, C, 4), each where it is asked for.

    Raises:
        RecipeError: a number is out of its range, or the inputs are no images.
    """
    if (recolour or turn) and len(spec.shape) != 3:
        raise RecipeError(
            f"got recolour {recolour} and turn {turn} for {spec.kind} inputs of shape "
            f"{spec.shape}, expected images (C, H, W); leave both out"
        )
    drawn = {"turns": draw_turns(count, rng, turn)} if turn else {}
    if recolour:
        drawn["colours"] = draw_colours(count, spec.shape[0], rng, recolour)
    return drawn


def viewed(
    inputs: Float[Tensor, "batch channels height width"],
    drawn: Mapping[str, Tensor],
    spec: InputSpec,
) -> Float[Tensor, "batch channels height width"]:
    """Inputs of the teacher through the views of `draw_views`.

    Args:
        inputs: (B, C, H, W) in the normalised space of `spec`, with gradient; what lies outside of
            [0, 1] as an image is cut to it.
        drawn: may hold more, which is left alone.
        spec: tells what the images are.

    Returns:
        (B, C, H, W); the inputs themselves where nothing was drawn.
    """
    if "turns" not in drawn and "colours" not in drawn:
        return inputs
    images = spec.denormalize(inputs)
    if "turns" in drawn:
        images = turned(images, drawn["turns"])
    if "colours" in drawn:
        images = recoloured(images, drawn["colours"])
    return spec.normalize(images)


def draw_colours(
    count: int, channels: int, rng: torch.Generator, strength: float
) -> Float[Tensor, "count channels 4"]:
    """Other colours for each image, of the same shapes and textures.

    Channels change places and contrasts and move as far as values in [0, 1] let them. They are
    inverted together or not at all: a pattern that is alike in all channels stays so.

    Args:
        count: B.
        channels: C.
        rng: decides, and gives the device.
        strength: s in [0, 1]; 0 leaves images as they are.

    Returns:
        (B, C, 4), float32, by channel: which one it was, a permutation with probability s; the
        factor of its contrast, in [1 - s / 2, 1], negative for the whole image with probability
        s / 2; where its values go, 0 for the lowest place and 1 for the highest; and s, how much of
        that way.

    Raises:
        RecipeError: another strength.
    """
    if not 0 <= strength <= 1:
        raise RecipeError(f"got a strength of colours of {strength}, expected one in [0, 1]")

    def uniform(columns: int) -> Tensor:
        return torch.rand(count, columns, generator=rng, device=rng.device)

    own = torch.arange(channels, device=rng.device).expand(count, -1)
    order = torch.where(uniform(1) < strength, uniform(channels).argsort(1), own)
    sign = torch.where(uniform(1) < strength / 2, -1.0, 1.0)
    factor, place = sign * (1 - strength / 2 * uniform(channels)), uniform(channels)
    return torch.stack([order.float(), factor, place, torch.full_like(place, strength)], 2)


def recoloured(
    images: Float[Tensor, "batch channels height width"],
    colours: Float[Tensor, "batch channels 4"],
) -> Float[Tensor, "batch channels height width"]:
    """Give each image other colours; the result is cut to [0, 1].

    Args:
        images: (B, C, H, W) in [0, 1], with gradient.
        colours: (B, C, 4) of `draw_colours`; another device is brought along.

    Raises:
        ShapeError: images and colours do not fit.
    """
    if images.dim() != 4 or colours.shape != (*images.shape[:2], 4):
        raise ShapeError(
            f"got images {tuple(images.shape)} and colours {tuple(colours.shape)}, expected "
            "(B, C, H, W) and (B, C, 4)"
        )
    columns = colours.to(images.device, images.dtype)[..., None, None]
    order, factor, place, share = columns.unbind(2)
    images = images.gather(1, order.long().expand_as(images))
    mean = images.mean((2, 3), keepdim=True)
    images = mean + factor * (images - mean)
    low, high = (extreme(images, (2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    # What the values leave free of [0, 1]; a constant, or G could gain by a single pixel.
    moved = (place * (1 - (high - low)).clamp_min(0) - low).detach()
    return (images + share * moved).clamp(0, 1)


def draw_turns(count: int, rng: torch.Generator, degrees: float) -> Float[Tensor, "count 3"]:
    """How each image is turned, zoomed and mirrored; one of two is left as it is.

    Textures of single pixels do not survive a turn, so not every image takes one.

    Args:
        count: B.
        rng: decides, and gives the device.
        degrees: largest angle either way, in [0, 180].

    Returns:
        (B, 3), float32: the angle in degrees, counter-clockwise; how many times smaller it becomes,
        in [0.8, 1.25]; 1 for mirrored. 0, 1 and 0 with probability 1/2.

    Raises:
        RecipeError: another angle.
    """
    if not 0 <= degrees <= 180:
        raise RecipeError(f"got a turn of {degrees} degrees, expected one in [0, 180]")
    angle, zoom = torch.rand(2, count, generator=rng, device=rng.device)
    mirrored, kept = torch.randint(0, 2, (2, count), generator=rng, device=rng.device)
    low, high = _ZOOM
    turns = torch.stack(
        [degrees * (2 * angle - 1), low + (high - low) * zoom, mirrored.to(angle.dtype)], 1
    )
    return torch.where(kept[:, None] == 1, turns.new_tensor([0.0, 1.0, 0.0]), turns)


def turned(
    images: Float[Tensor, "batch channels height width"], turns: Float[Tensor, "batch 3"]
) -> Float[Tensor, "batch channels height width"]:
    """Mirror each image, zoom it and turn it around its middle; beyond its border it is reflected.

    Bilinear between pixels. Sides of different length are turned as they are seen, not as squares.

    Args:
        images: (B, C, H, W), with gradient.
        turns: (B, 3) of `draw_turns`; another device is brought along.

    Raises:
        ShapeError: images and turns do not fit.
    """
    if images.dim() != 4 or turns.shape != (len(images), 3):
        raise ShapeError(
            f"got images {tuple(images.shape)} and turns {tuple(turns.shape)}, expected "
            "(B, C, H, W) and (B, 3)"
        )
    angle, zoom, mirrored = turns.to(images.device, images.dtype).unbind(1)
    height, width = images.shape[2:]
    cos, sin = zoom * torch.deg2rad(angle).cos(), zoom * torch.deg2rad(angle).sin()
    side, zero = 1 - 2 * mirrored, torch.zeros_like(angle)
    # Both sides are [-1, 1] to affine_grid, whatever their length.
    across = torch.stack([side * cos, -side * sin * height / width, zero], 1)
    down = torch.stack([sin * width / height, cos, zero], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

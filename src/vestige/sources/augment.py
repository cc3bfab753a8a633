"""Augmentation inside an inner loop: of a whole batch, per sample, differentiable.

What is done to each image is drawn first, as a tensor with one row per image, and then applied. So
a loss stays a function of its batch, and several processes agree on what was drawn.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vestige.core.types import Inputs, InputSpec
from vestige.errors import RecipeError, ShapeError


def draw_shifts(
    count: int, reach: int | tuple[int, int], rng: torch.Generator, *, flip: bool = False
) -> Int[Tensor, "count 3"]:
    """How far each image moves, and whether it is mirrored.

    Args:
        count: B.
        reach: largest distance in pixels, at least 0; a pair is (vertical, horizontal). A crop with
            padding p is a shift of reach p.
        rng: decides, and gives the device.
        flip: mirror each image with probability 1/2.

    Returns:
        (B, 3), int64: pixels down, pixels to the right, 1 for mirrored.

    Raises:
        RecipeError: a negative reach.
    """
    down, right = (reach, reach) if isinstance(reach, int) else reach
    if min(down, right) < 0:
        raise RecipeError(f"got a reach of {reach} pixels, expected at least 0")
    columns = [
        torch.randint(low, high + 1, (count,), generator=rng, device=rng.device)
        for low, high in ((-down, down), (-right, right), (0, int(flip)))
    ]
    return torch.stack(columns, 1)


def shift(
    images: Float[Tensor, "batch channels height width"],
    shifts: Int[Tensor, "batch 3"],
    *,
    wrap: bool = False,
    fill: Tensor | float = 0.0,
) -> Float[Tensor, "batch channels height width"]:
    """Move each image by whole pixels, then mirror it.

    Args:
        images: (B, C, H, W), with gradient.
        shifts: (B, 3) of `draw_shifts`; another device is brought along.
        wrap: what leaves on one side comes back on the other; else `fill` comes, and 0 is black for
            images in [0, 1], which is the crop with padding of training recipes.
        fill: a value, or (1, C, 1, 1) of them.

    Returns:
        (B, C, H, W), every pixel a copy of one pixel or of `fill`; gradient flows to where it came
        from.

    Raises:
        ShapeError: images and shifts do not fit.
    """
    _check(images, shifts, 3)
    shifts = shifts.to(images.device)
    _, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) - shifts[:, 0, None]
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = torch.where(shifts[:, 2, None] == 1, width - 1 - columns, columns)
    columns = columns - shifts[:, 1, None]
    inside = None
    if not wrap:
        within = (rows >= 0) & (rows < height)
        inside = within[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    places = (rows % height)[:, :, None] * width + (columns % width)[:, None]
    index = places.flatten(1)[:, None].expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, index).view(images.shape)
    return moved if inside is None else torch.where(inside[:, None], moved, fill)


def draw_boxes(
    count: int,
    size: tuple[int, int],
    rng: torch.Generator,
    *,
    scale: tuple[float, float] = (0.25, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = False,
) -> Float[Tensor, "count 5"]:
    """A part of each image, as random resized crops have it.

    Args:
        count: B.
        size: (H, W) of the images.
        rng: decides, and gives the device.
        scale: least and largest share of the area, in (0, 1]; drawn uniformly.
        ratio: least and largest width / height; its logarithm is drawn uniformly. A side that
            would exceed the image is cut to it.
        flip: mirror each part with probability 1/2.

    Returns:
        (B, 5), float32, in pixels: top, left, height, width, and 1 for mirrored.

    Raises:
        RecipeError: a range is empty or out of bounds.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise RecipeError(f"got scale {scale}, expected 0 < least <= largest <= 1")
    if not 0 < ratio[0] <= ratio[1]:
        raise RecipeError(f"got ratio {ratio}, expected 0 < least <= largest")
    height, width = size

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(count, generator=rng, device=rng.device)
        return low + (high - low) * drawn

    area = uniform(*scale) * height * width
    shape = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    tall = (area / shape).sqrt().clamp(1, height)
    wide = (area * shape).sqrt().clamp(1, width)
    top = uniform(0, 1) * (height - tall)
    left = uniform(0, 1) * (width - wide)
    mirrored = torch.randint(0, int(flip) + 1, (count,), generator=rng, device=rng.device)
    return torch.stack([top, left, tall, wide, mirrored.to(top.dtype)], 1)


def crop_resize(
    images: Float[Tensor, "batch channels height width"], boxes: Float[Tensor, "batch 5"]
) -> Float[Tensor, "batch channels height width"]:
    """Enlarge a part of each image to the size of the whole, then mirror it.

    Bilinear between pixel centres, as `interpolate(align_corners=False)` of the part; beyond the
    outermost centres of the image its border goes on.

    Args:
        images: (B, C, H, W), with gradient.
        boxes: (B, 5) of `draw_boxes`; another device is brought along.

    Returns:
        (B, C, H, W); a box that is the whole image leaves it as it is, up to rounding.

    Raises:
        ShapeError: images and boxes do not fit.
    """
    _check(images, boxes, 5)
    top, left, tall, wide, mirrored = boxes.to(images.device, images.dtype).unbind(1)
    height, width = images.shape[2:]
    side = 1 - 2 * mirrored
    # grid_sample counts from -1 to 1 over the whole image.
    zero = torch.zeros_like(top)
    affine = torch.stack(
        [
            torch.stack([side * wide / width, zero, (2 * left + wide) / width - 1], 1),
            torch.stack([zero, tall / height, (2 * top + tall) / height - 1], 1),
        ],
        1,
    )
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def draw_jitter(
    count: int, rng: torch.Generator, *, brightness: float = 0.0, contrast: float = 0.0
) -> Float[Tensor, "count 2"]:
    """Factors of brightness and contrast.

    Args:
        count: B.
        rng: decides, and gives the device.
        brightness: factors lie in [1 - brightness, 1 + brightness].
        contrast: likewise.

    Returns:
        (B, 2), float32, all 1 where both are 0.

    Raises:
        RecipeError: one of them is not in [0, 1].
    """
    if not (0 <= brightness <= 1 and 0 <= contrast <= 1):
        raise RecipeError(
            f"got brightness {brightness} and contrast {contrast}, expected values in [0, 1]"
        )
    spread = torch.tensor([brightness, contrast], device=rng.device)
    return 1 + spread * (2 * torch.rand(count, 2, generator=rng, device=rng.device) - 1)


def jitter(
    images: Float[Tensor, "batch channels height width"], factors: Float[Tensor, "batch 2"]
) -> Float[Tensor, "batch channels height width"]:
    """Change brightness, then contrast around each image's mean; the result is clamped to [0, 1].

    Args:
        images: (B, C, H, W) in [0, 1], with gradient.
        factors: (B, 2) of `draw_jitter`; another device is brought along.

    Raises:
        ShapeError: images and factors do not fit.
    """
    _check(images, factors, 2)
    bright, contrast = factors.to(images.device, images.dtype).view(-1, 2, 1, 1, 1).unbind(1)
    images = images * bright
    mean = images.mean((1, 2, 3), keepdim=True)
    return (mean + (images - mean) * contrast).clamp(0, 1)


def crop_and_flip(
    inputs: Float[Tensor, "batch channels height width"],
    spec: InputSpec,
    rng: torch.Generator,
    *,
    padding: int,
    flip: bool,
) -> Float[Tensor, "batch channels height width"]:
    """What training recipes do to inputs of the teacher: crop with black padding, then mirror.

    Args:
        inputs: (B, C, H, W) in the normalised space of `spec`; no gradient is kept.
        spec: tells what black is.
        rng: decides; draws nothing where nothing is asked for.
        padding: in pixels.
        flip: mirror each with probability 1/2.

    Returns:
        (B, C, H, W); the inputs themselves where nothing is asked for.
    """
    if not padding and not flip:
        return inputs
    shifts = draw_shifts(len(inputs), padding, rng, flip=flip)
    black = spec.normalize(torch.zeros_like(inputs[:1, :, :1, :1]))
    return shift(inputs.detach(), shifts, fill=black)


def random_views(
    inputs: Inputs,
    spec: InputSpec,
    rng: torch.Generator,
    *,
    padding: int = 0,
    flip: bool = False,
    area: float = 1.0,
) -> Inputs:
    """What training recipes do to inputs of the teacher, at 32 pixels or at 224.

    Args:
        inputs: (B, C, H, W) in the normalised space of `spec`; others come back as they are.
        spec: tells what black is.
        rng: decides; draws nothing where nothing is asked for.
        padding: crop after padding by so many black pixels.
        flip: mirror each with probability 1/2.
        area: below 1 enlarge a part of at least this share instead of cropping.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        return inputs
    if area == 1:
        return crop_and_flip(inputs, spec, rng, padding=padding, flip=flip)
    size, scale = (inputs.shape[2], inputs.shape[3]), (area, 1.0)
    boxes = draw_boxes(len(inputs), size, rng, scale=scale, flip=flip)
    return crop_resize(inputs.detach(), boxes)


def _check(images: Tensor, drawn: Tensor, width: int) -> None:
    if images.dim() != 4 or drawn.shape != (len(images), width):
        raise ShapeError(
            f"got images {tuple(images.shape)} and what was drawn for them {tuple(drawn.shape)}, "
            f"expected (B, C, H, W) and (B, {width})"
        )

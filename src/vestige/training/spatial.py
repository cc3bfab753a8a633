"""Random shifts and mirrorings of images, and the same ones of their masks."""

import torch
from torch import Tensor


def random_shift(images: Tensor, pixels: int, rng: torch.Generator) -> Tensor:
    """Move each image by its own whole number of pixels, repeating the border.

    Args:
        images: (B, C, H, W).
        pixels: largest shift along each axis; every shift in [-pixels, pixels] is equally likely.
        rng: on any device.

    Returns:
        (B, C, H, W), same dtype and device.
    """
    return moved(images, shifts(len(images), pixels, rng))


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: (B, C, H, W).
        rng: on any device.

    Returns:
        (B, C, H, W), same dtype and device.
    """
    return mirrored(images, flips(len(images), rng))


def shifts(count: int, pixels: int, rng: torch.Generator) -> Tensor:
    """Whole shifts (2, count) along both axes, each uniform in [-pixels, pixels]."""
    drawn = torch.randint(2 * pixels + 1, (2, count, 1), generator=rng, device=rng.device)
    return drawn[:, :, 0] - pixels


def moved(values: Tensor, by: Tensor) -> Tensor:
    """Images (B, C, H, W) or masks (B, H, W), seen `by` (2, B) pixels further down and right.

    The border is repeated, of a mask as of its image.
    """
    height, width = values.shape[-2:]
    by = by.to(values.device)
    rows = (by[0, :, None] + torch.arange(height, device=values.device)).clamp(0, height - 1)
    columns = (by[1, :, None] + torch.arange(width, device=values.device)).clamp(0, width - 1)
    batch = torch.arange(len(values), device=values.device)[:, None, None]
    if values.dim() == 3:
        return values[batch, rows[:, :, None], columns[:, None, :]]
    found = values[batch, :, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).contiguous()


def flips(count: int, rng: torch.Generator) -> Tensor:
    """Which of `count` images are mirrored: (count,), bool."""
    drawn = torch.randint(2, (count, 1, 1, 1), generator=rng, device=rng.device)
    return drawn.flatten().bool()


def mirrored(values: Tensor, which: Tensor) -> Tensor:
    """Images (B, C, H, W) or masks (B, H, W), those of `which` (B,) turned left to right."""
    which = which.to(values.device).view(-1, *(1,) * (values.dim() - 1))
    return torch.where(which, values.flip(-1), values)

"""Distortions that turn images into known strangers: the same things, seen otherwise.

Each takes images (n, H, W, C) uint8 and gives as many back. Strengths are drawn per image from the
stream that is handed in, so the same seed gives the same images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch.nn import functional

from vestige.data._npz import Images
from vestige.errors import DataError

Shift = Callable[[Images, RandomState], Images]


def invert(images: Images, rng: RandomState) -> Images:
    """Bright becomes dark."""
    return 255 - images


def tint(images: Images, rng: RandomState) -> Images:
    """Black and white become two random colours that differ; of one channel, two greys."""
    n, channels = len(images), images.shape[3]
    paper = rng.uniform(0, 255, (n, 1, 1, channels))
    ink = rng.uniform(0, 255, (n, 1, 1, channels))
    # Colours that are too close would leave nothing to see: the second goes to the far side.
    close = np.abs(ink - paper).mean(axis=3, keepdims=True) < 90
    ink = np.where(close, np.where(paper < 128, paper + 127, paper - 127), ink)
    return _bytes(paper + (ink - paper) * (images / 255.0))


def rotate(images: Images, rng: RandomState) -> Images:
    """Turned by up to 25 degrees, what comes in at the border repeats it."""
    angles = torch.from_numpy(rng.uniform(-25, 25, len(images)) * (math.pi / 180)).float()
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(len(images))
    height, width = images.shape[1:3]
    # Coordinates run from -1 to 1 on either axis, so oblong images need their sides' ratio.
    ratio = height / width
    rows = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    grid = functional.affine_grid(rows, list(pixels.shape), align_corners=False)
    turned = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return _bytes(turned.permute(0, 2, 3, 1).numpy())


def thicken(images: Images, rng: RandomState) -> Images:
    """Bright strokes grow by a pixel on each side, in images below 24 pixels by one in all."""
    return _widest(images, 2 if min(images.shape[1:3]) < 24 else 3)


def thin(images: Images, rng: RandomState) -> Images:
    """Bright strokes shrink by a pixel; where they are no wider, little is left."""
    return 255 - _widest(255 - images, 2)


def blur(images: Images, rng: RandomState) -> Images:
    """Gaussian blur of 2.5 to 5 % of the shorter side."""
    n, height, width, channels = images.shape
    side = min(height, width)
    sigma = rng.uniform(0.025, 0.05, n) * side
    reach = min(math.ceil(0.15 * side), side - 1)
    steps = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (steps / sigma[:, None]) ** 2)
    kernel = np.repeat(kernel / kernel.sum(1, keepdims=True), channels, axis=0)
    weight = torch.from_numpy(kernel).float()
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    pixels = pixels.reshape(1, n * channels, height, width)
    # Each image has a kernel of its own, so they lie side by side as groups.
    for shape, pad in (
        ((-1, 1, 1, len(steps)), (reach, reach, 0, 0)),
        ((-1, 1, len(steps), 1), (0, 0, reach, reach)),
    ):
        padded = functional.pad(pixels, pad, mode="replicate")
        pixels = functional.conv2d(padded, weight.view(shape), groups=n * channels)
    return _bytes(pixels.view(n, channels, height, width).permute(0, 2, 3, 1).numpy())


def noise(images: Images, rng: RandomState) -> Images:
    """Gaussian noise of 10 to 25 % of the range on every value."""
    strength = rng.uniform(0.1, 0.25, (len(images), 1, 1, 1)) * 255
    return _bytes(images + strength * rng.standard_normal(images.shape))


def contrast(images: Images, rng: RandomState) -> Images:
    """Differences from the image's mean shrink to 25 to 60 %."""
    factor = rng.uniform(0.25, 0.6, (len(images), 1, 1, 1))
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return _bytes(mean + factor * (images - mean))


def shade(images: Images, rng: RandomState) -> Images:
    """A shadow falls across: brightness drops to 20 to 50 % towards a random side."""
    n, height, width = images.shape[:3]
    angle = rng.uniform(0, 2 * math.pi, (n, 1, 1))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    across = (np.cos(angle) * x + np.sin(angle) * y) / math.sqrt(2) * 0.5 + 0.5
    darkest = rng.uniform(0.2, 0.5, (n, 1, 1))
    return _bytes(images * (darkest + (1 - darkest) * across)[..., None])


SHIFTS: Mapping[str, Shift] = {
    "invert": invert,
    "tint": tint,
    "rotate": rotate,
    "thicken": thicken,
    "thin": thin,
    "blur": blur,
    "noise": noise,
    "contrast": contrast,
    "shade": shade,
}


def unknown_shifts(asked: Sequence[str]) -> list[str]:
    """The names in `asked` that no shift has, alternatives taken apart."""
    return [name for one in asked for name in _alternatives(one) if name not in SHIFTS]


def shifted(images: Images, asked: Sequence[str], rng: RandomState) -> Images:
    """All of `asked` one after another.

    Args:
        images: (n, H, W, C) uint8.
        asked: names of `SHIFTS`; "a|b|c" draws one of them for each image.
        rng: of all that is drawn.

    Raises:
        DataError: there is no such shift.
    """
    if unknown := unknown_shifts(asked):
        raise DataError(f"got the shift {unknown[0]!r}, expected one of {', '.join(SHIFTS)}")
    for one in asked:
        names = _alternatives(one)
        if len(names) == 1:
            images = SHIFTS[names[0]](images, rng)
            continue
        images, drawn = images.copy(), rng.randint(len(names), size=len(images))
        for number, name in enumerate(names):
            chosen = drawn == number
            if chosen.any():
                images[chosen] = SHIFTS[name](images[chosen], rng)
    return images


def _alternatives(asked: str) -> list[str]:
    return [name.strip() for name in asked.split("|")]


def _widest(images: Images, size: int) -> Images:
    """The brightest value of the `size` x `size` pixels around each, 2 or 3."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    before = (size - 1) // 2
    around = (before, size - 1 - before) * 2
    pixels = functional.max_pool2d(functional.pad(pixels, around), size, stride=1)
    return _bytes(pixels.permute(0, 2, 3, 1).numpy())


def _bytes(values: NDArray[Any]) -> Images:
    rounded: Images = np.rint(values).clip(0, 255).astype(np.uint8)
    return rounded

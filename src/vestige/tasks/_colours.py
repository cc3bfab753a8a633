"""Colours of classes in pictures."""

import colorsys

import torch
from torch import Tensor

_MOST = 256
# Okabe and Ito's colours, with grey for their black, which marks what is ignored; then those of
# Paul Tol's "muted" scheme that are not much like them. Both can be told apart by the colour-blind.
_FIRST = (
    *((153, 153, 153), (230, 159, 0), (86, 180, 233), (0, 158, 115)),
    *((240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
    *((51, 34, 136), (153, 153, 51), (136, 34, 85), (221, 204, 119)),
    *((17, 119, 51), (204, 102, 119), (68, 170, 153), (170, 68, 153)),
)
_GOLDEN = 0.6180339887498949
_PICTURE = 0.35


def class_colours(count: int) -> Tensor:
    """A colour for each of `count` classes, the same for the same class whatever the count.

    The first 16 can be told apart by the colour-blind; beyond 256 they repeat.

    Returns:
        (count, 3), float32 in [0, 1]; none is black.
    """
    colours = [tuple(value / 255 for value in colour) for colour in _FIRST]
    for number in range(len(_FIRST), _MOST):
        # Steps of the golden ratio leave no two hues close; brightness tells neighbours apart.
        hue, value = number * _GOLDEN % 1, (1.0, 0.75, 0.5)[number % 3]
        colours.append(colorsys.hsv_to_rgb(hue, 0.7, value))
    return torch.tensor([colours[number % _MOST] for number in range(count)])


def overlay(images: Tensor, classes: Tensor, colours: Tensor) -> Tensor:
    """The colours of `classes` over the pictures in grey.

    Args:
        images: (n, C, H, W) in [0, 1].
        classes: (n, H, W), rows of `colours`; what is none of them becomes black.
        colours: (K, 3) in [0, 1].

    Returns:
        (n, 3, H, W) in [0, 1].
    """
    known = (classes >= 0) & (classes < len(colours))
    painted = colours[torch.where(known, classes, 0)].permute(0, 3, 1, 2)
    grey = images.mean(1, keepdim=True)
    return (_PICTURE * grey + (1 - _PICTURE) * painted) * known[:, None]

"""Stored images as inputs of a network."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vestige.core.types import InputSpec
from vestige.data._npz import Images
from vestige.data._pictures import Pictures
from vestige.errors import DataError, ShapeError


def to_inputs(images: Images | Pictures, spec: InputSpec, *, batch_size: int = 1024) -> Tensor:
    """Turn stored images into inputs of a network.

    Values are divided by 255; where the size differs from the spec's, images are resized bilinearly
    (align_corners off, antialiased when one side shrinks); grey images are repeated over the spec's
    channels; then the spec's normalisation is applied. Pictures are read in grey for a spec of one
    channel, and may differ in size.

    Args:
        images: (N, H, W) or (N, H, W, C), uint8; or pictures.
        spec: an image spec (C, H, W).
        batch_size: images that are converted at a time; bounds the memory, changes no value.

    Returns:
        (N, C, H, W), float32, on the CPU, in the normalised space of `spec`.

    Raises:
        DataError: the array is no uint8 image array, its channels do not fit the spec, or a picture
            cannot be decoded.
        ShapeError: the spec does not describe images.
    """
    if spec.kind != "image" or len(spec.shape) != 3:
        raise ShapeError(
            f"got an input spec of kind '{spec.kind}' and shape {spec.shape}, expected images "
            "(C, H, W); make it with InputSpec.image"
        )
    inputs = torch.empty(len(images), *spec.shape)
    start = 0
    for part in _batches(images, spec, batch_size):
        inputs[start : start + len(part)] = _converted(part, spec)
        start += len(part)
    return inputs


def _batches(images: Images | Pictures, spec: InputSpec, batch_size: int) -> Iterator[Images]:
    if isinstance(images, Pictures):
        yield from images.read(grey=spec.shape[0] == 1)
        return
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"got images of dtype {images.dtype} and shape {images.shape}, expected uint8 "
            "(N, H, W) or (N, H, W, C); scale values to 0..255 and put channels last"
        )
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def _converted(images: Images, spec: InputSpec) -> Tensor:
    found, (channels, height, width) = 1 if images.ndim == 3 else images.shape[3], spec.shape
    if found not in (1, channels):
        raise DataError(
            f"got images with {found} channels, expected {channels} as in the input spec; "
            f"convert the images or use a spec of {found} channels"
        )
    rows = torch.from_numpy(np.ascontiguousarray(images))
    rows = rows.unsqueeze(1) if images.ndim == 3 else rows.permute(0, 3, 1, 2)
    part = rows.float() / 255
    if part.shape[2:] != (height, width):
        shrinks = part.shape[2] > height or part.shape[3] > width
        part = functional.interpolate(
            part, (height, width), mode="bilinear", align_corners=False, antialias=shrinks
        )
    return spec.normalize(part.expand(-1, channels, -1, -1))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, to choose the normalisation of an input spec.

    Args:
        images: (N, C, H, W) in [0, 1], for example `to_inputs` with a spec without normalisation.

    Returns:
        Mean and population standard deviation over N, H and W; C values each.
    """
    columns = images.double().transpose(0, 1).flatten(1)
    mean, std = columns.mean(1), columns.std(1, correction=0)
    return tuple(mean.tolist()), tuple(std.tolist())

"""Images of nothing: noise and textures, made at a teacher's size as junk of known origin."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from vestige.core import seeding
from vestige.core.types import InputSpec
from vestige.data._npz import Images
from vestige.data.unlabelled.decoding import Block, Skipped

_MOST, _PIXELS = 512, 2**19
_VERSION = 1


def stream(seed: int, name: str) -> RandomState:
    """The stream `name` of the run `seed`; RandomState, whose numbers no release changes."""
    return RandomState(seeding.derive(seed, name) % 2**32)


def noise(count: int, spec: InputSpec, rng: RandomState) -> Images:
    """Every value drawn by itself, uniformly; (count, H, W, C)."""
    channels, height, width = spec.shape
    return rng.randint(0, 256, (count, height, width, channels)).astype(np.uint8)


def textures(count: int, spec: InputSpec, rng: RandomState) -> Images:
    """Stripes, checks, rings and grain of random scale, direction and two colours.

    (count, H, W, C), a random one of the four each, with noise of 5 % of the range.
    """
    channels, height, width = spec.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    side = min(height, width)

    def draw(low: float, high: float) -> NDArray[np.float64]:
        drawn: NDArray[np.float64] = rng.uniform(low, high, (count, 1, 1))
        return drawn

    # From one wave across the image to one every four pixels.
    waves = np.exp(draw(0, math.log(max(2, side / 4)))) * math.pi
    angle, phase, other = draw(0, math.pi), draw(0, 2 * math.pi), draw(0, 2 * math.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    distance = np.hypot(x - draw(-0.7, 0.7), y - draw(-0.7, 0.7))
    patterns = np.stack(
        [
            np.sin(waves * along + phase),
            np.sign(np.sin(waves * along + phase) * np.sin(waves * across + other)),
            np.sin(waves * distance + phase),
            _grain(rng.standard_normal((count, height, width)), draw(0.5, 2)),
        ]
    )
    pattern = patterns[rng.randint(4, size=count), np.arange(count)][..., None] * 0.5 + 0.5
    one, two = (rng.uniform(0, 255, (count, 1, 1, channels)) for _ in range(2))
    values = one + (two - one) * pattern
    values += 0.05 * 255 * rng.standard_normal(values.shape)
    return np.rint(values).clip(0, 255).astype(np.uint8)


MADE_UP: Mapping[str, Callable[[int, InputSpec, RandomState], Images]] = {
    "noise": noise,
    "textures": textures,
}


class MadeUpImages:
    """Images that are drawn, not read.

    Args:
        kind: one of `MADE_UP`.
        count: how many there are.
        seed: of what is drawn.
    """

    paths: tuple[Path, ...] = ()
    left_out = Skipped()

    def __init__(self, kind: str, count: int, seed: int) -> None:
        self.name = kind
        self._count, self._seed = count, seed
        told = f"{kind} {_VERSION} {seed} {count}"
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def blocks(self, spec: InputSpec, rows: NDArray[np.int64]) -> Iterator[Block]:
        """See `decoding.Unlabelled`."""
        # Of large images few at a time; which, depends on their size alone.
        size = max(1, min(_MOST, _PIXELS // (spec.shape[1] * spec.shape[2])))
        for start in range(0, self._count, size):
            low, high = np.searchsorted(rows, (start, start + size))
            if low < high:
                rng = stream(self._seed, f"{self.name}/{start}")
                made = MADE_UP[self.name](min(size, self._count - start), spec, rng)
                yield Block(made[rows[low:high] - start])


def _grain(values: NDArray[np.float64], power: NDArray[np.float64]) -> NDArray[np.float64]:
    """White noise with less of it the finer it is, by a power of the frequency; within [-1, 1]."""
    height, width = values.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    shaped = np.fft.irfft2(np.fft.rfft2(values) * frequency**-power, s=(height, width))
    largest = np.abs(shaped).max(axis=(1, 2), keepdims=True)
    grain: NDArray[np.float64] = shaped / np.maximum(largest, 1e-12)
    return grain

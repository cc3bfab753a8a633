"""Drawn scenes with exact masks: a set for segmentation that is always there."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vestige.data._npz import Images
from vestige.errors import DataError

SCENE_CLASSES = (
    *("background", "disc", "square", "triangle", "ring"),
    *("cross", "bar", "crescent"),
)
SCENE_SIZES = {"train": 1000, "select": 100, "test": 200}
# Far from the seeds that people take for scenes of their own.
_SEEDS = {"train": 191_200, "select": 191_201, "test": 191_202}
_CLASSES, _SIZE, _LEAST_SIZE = 5, 64, 16

_DARKEST, _LIGHTEST, _APART = 40, 215, 90
_GRADIENT, _BLOCKS, _TEXTURE, _SPECKLE, _BLOCK_COUNT = 15, 15, 30, 8, 8
_RADIUS, _CLEARANCE, _TRIES = (0.13, 0.22), 0.9, 10
_SQRT_3 = 1.7320508075688772

Plane = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Attributes:
        label: its class, a row of `SCENE_CLASSES` above 0.
        x: of its middle, in pixels from the left edge.
        y: of its middle, in pixels from the upper edge.
        radius: in pixels.
        cos: of the angle by which it is turned.
        sin: likewise.
    """

    label: int
    x: float
    y: float
    radius: float
    cos: float = 1.0
    sin: float = 0.0

    def frame(self, size: int) -> tuple[Plane, Plane]:
        """Coordinates (u, v) of the middles of size x size pixels, turned, in radii."""
        place = np.arange(size) + 0.5
        across, down = (place - self.x)[None, :], (place - self.y)[:, None]
        u = (across * self.cos + down * self.sin) / self.radius
        v = (down * self.cos - across * self.sin) / self.radius
        return u, v


def covers(label: int, u: Plane, v: Plane) -> NDArray[np.bool_]:
    """Which points (u, v), in radii from the middle, belong to a shape of class `label`."""
    far = u * u + v * v
    if label == 1:
        return far <= 1
    if label == 2:
        return np.maximum(abs(u), abs(v)) <= 0.8
    if label == 3:
        return (v >= -0.6) & (v + _SQRT_3 * abs(u) <= 1.2)
    if label == 4:
        return (far <= 1) & (far >= 0.3)
    if label == 5:
        return (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1)
    if label == 6:
        return (abs(u) <= 1.1) & (abs(v) <= 0.3)
    return (far <= 1) & ((u - 0.5) * (u - 0.5) + v * v >= 0.7)


def draw_scenes(
    count: int,
    *,
    seed: int = 0,
    size: int = _SIZE,
    num_classes: int = _CLASSES,
    shapes: tuple[int, int] = (2, 4),
) -> tuple[Images, NDArray[np.uint8]]:
    """Scenes of textured shapes on a textured background, with a class for every pixel.

    A scene has `shapes[0]` to `shapes[1]` shapes, each number equally likely, of classes 1 to
    `num_classes` - 1, equally likely, painted one over the other. In units of `size` radii are
    uniform in [0.13, 0.22]; the middle is uniform where the circle of that radius is inside, drawn
    anew up to 10 times while it is closer to another shape than 0.9 times the sum of the radii.
    Shapes are turned by any angle. A pixel belongs to a shape if its middle does (`covers`), with
    no soft edges, so that masks are exact.

    Colours do not tell the class: background and shapes have base colours uniform in 40..215 in
    each channel, a shape's differs from the background's by at least 90 in one of them. On top of
    it the background has a gradient (up to 15) and 8x8 random blocks (up to 15), a shape the
    texture of its class in its own frame (up to 15 to 30, its period 0.3 to 0.6 radii), and each
    value of each pixel a speckle (up to 8). So no value is clipped, and every pixel of a shape lies
    outside the range of the background's colours of its scene.

    Drawn from numpy.random.RandomState(seed), whose stream numpy promises to keep, with additions,
    multiplications, divisions and square roots only: the same bytes on every machine. The first
    scenes of a larger `count` are those of a smaller one.

    Args:
        count: scenes N.
        seed: of everything random. The built-in set "scenes" has 191200 (train), 191201 (select)
            and 191202 (test).
        size: height and width in pixels, at least 16.
        num_classes: background and shapes, 2 to 8, in the order of `SCENE_CLASSES`.
        shapes: fewest and most shapes in a scene.

    Returns:
        Images (N, size, size, 3) and masks (N, size, size), both uint8.

    Raises:
        DataError: a number is out of its range.
    """
    low, high = shapes
    if count < 1 or size < _LEAST_SIZE or not 1 <= low <= high:
        raise DataError(
            f"got count={count}, size={size}, shapes={shapes}, expected at least 1, at least "
            f"{_LEAST_SIZE}, and a range from 1; correct them"
        )
    if not 2 <= num_classes <= len(SCENE_CLASSES):
        raise DataError(
            f"got num_classes={num_classes}, expected 2 to {len(SCENE_CLASSES)}: "
            f"{', '.join(SCENE_CLASSES)}; take fewer"
        )
    rng = np.random.RandomState(seed)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    masks = np.zeros((count, size, size), dtype=np.uint8)
    for image, mask in zip(images, masks, strict=True):
        ground, canvas = _background(rng, size)
        placed: list[Shape] = []
        for _ in range(rng.randint(low, high + 1)):
            shape = _place(rng, 1 + rng.randint(num_classes - 1), size, placed)
            placed.append(shape)
            _paint(rng, shape, ground, canvas, mask)
        canvas += rng.randint(-_SPECKLE, _SPECKLE + 1, canvas.shape)
        image[:] = np.rint(canvas)
    return images, masks


def scenes(split: str) -> tuple[Images, NDArray[np.uint8], tuple[str, ...]]:
    """Images, masks and class names of a split of the built-in set."""
    images, masks = draw_scenes(SCENE_SIZES[split], seed=_SEEDS[split])
    return images, masks, SCENE_CLASSES[:_CLASSES]


def _colour(rng: np.random.RandomState) -> Plane:
    return rng.randint(_DARKEST, _LIGHTEST + 1, 3).astype(np.float64)


def _background(rng: np.random.RandomState, size: int) -> tuple[Plane, Plane]:
    """Base colour (3,) and pixels (size, size, 3) of a background."""
    ground = _colour(rng)
    place = (2 * np.arange(size) + 1) / size - 1
    share, signs = rng.uniform(), rng.randint(0, 2, 2) * 2 - 1
    gradient = signs[0] * share * place[None, :] + signs[1] * (1 - share) * place[:, None]
    blocks = rng.randint(-_BLOCKS, _BLOCKS + 1, (_BLOCK_COUNT, _BLOCK_COUNT))
    block = np.arange(size) * _BLOCK_COUNT // size
    plane = _GRADIENT * gradient + blocks[block[:, None], block]
    return ground, ground + plane[:, :, None]


def _place(rng: np.random.RandomState, label: int, size: int, placed: list[Shape]) -> Shape:
    radius = size * rng.uniform(*_RADIUS)
    # A point of the circle without sine and cosine, which differ between machines.
    slope = rng.uniform(-1, 1)
    cos, sin = (1 - slope * slope) / (1 + slope * slope), 2 * slope / (1 + slope * slope)
    if rng.randint(2):
        cos, sin = -cos, -sin
    x = y = 0.0
    for _ in range(_TRIES):
        x, y = rng.uniform(radius, size - radius, 2)
        if all(_clear(x, y, radius, other) for other in placed):
            break
    return Shape(label, x, y, radius, cos, sin)


def _clear(x: float, y: float, radius: float, other: Shape) -> bool:
    least = _CLEARANCE * (radius + other.radius)
    return (x - other.x) * (x - other.x) + (y - other.y) * (y - other.y) >= least * least


def _paint(
    rng: np.random.RandomState,
    shape: Shape,
    ground: Plane,
    canvas: Plane,
    mask: NDArray[np.uint8],
) -> None:
    """Put `shape` onto `canvas` (H, W, 3) and into `mask` (H, W)."""
    colour = _colour(rng)
    while abs(colour - ground).max() < _APART:
        colour = _colour(rng)
    strength = rng.uniform(_TEXTURE / 2, _TEXTURE)
    period, phase = rng.uniform(0.3, 0.6), rng.uniform()
    u, v = shape.frame(len(mask))
    inside = covers(shape.label, u, v)
    texture = strength * _texture(shape.label, u[inside] / period + phase, v[inside] / period)
    canvas[inside] = colour + texture[:, None]
    mask[inside] = shape.label


def _texture(label: int, u: Plane, v: Plane) -> Plane:
    """Values in [-1, 1] at points in periods of the texture of class `label`."""
    kind = label % 4
    if kind == 1:
        return _wave(u)
    if kind == 2:
        return np.sign(_wave(u)) * np.sign(_wave(v))
    if kind == 3:
        return np.minimum(_wave(u), _wave(v))
    return _wave(np.sqrt(u * u + v * v))


def _wave(place: Plane) -> Plane:
    """A triangle wave of period 1 in [-1, 1]."""
    return 4 * abs(place - np.floor(place + 0.5)) - 1

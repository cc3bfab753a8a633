"""Pictures of inputs and of answers to them: sheets, and a small PNG writer."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vestige.errors import ShapeError
from vestige.training.files import write_bytes

PAPER = 255
_CAPTION_INK = 60
_CAPTION_LENGTH = 24
_STRIP_SIDE, _STRIP_GAP, _STRIP_LINE = 112, 16, 22
_ANSWER_SIDE, _LARGEST_ANSWER, _ANSWER_GAP = 128, 320, 8


def contact_sheet(
    images: Tensor,
    *,
    columns: int,
    scale: int = 1,
    labels: Sequence[str] | None = None,
    gap: int = 2,
) -> NDArray[np.uint8]:
    """Lay images out on white paper, enlarged without smoothing.

    Args:
        images: (N, C, H, W) with C 1 or 3, values in [0, 1]; others are clamped, NaN becomes 0.
        columns: images in a row.
        scale: edge length in sheet pixels of one image pixel.
        labels: one class name per image, or None. Images of one class then share a row (several
            where there are more than `columns`) behind a caption; classes keep the order of their
            first image, so sort the images to sort the rows.
        gap: sheet pixels between images and around the sheet.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ShapeError: images, labels, columns, scale or gap do not fit the above.
    """
    _check(images, columns, scale, labels, gap)
    tiles = _tiles(images, scale)
    rows = _rows(len(tiles), columns, labels)
    strips = [] if labels is None else _captions([name for name, _ in rows], tiles.shape[1])
    margin = max((strip.shape[1] for strip in strips), default=0)
    left = gap + (margin + 2 * gap if margin else 0)
    height, width = tiles.shape[1:3]
    used = max(len(members) for _, members in rows)
    sheet = np.full(
        (gap + len(rows) * (height + gap), left + used * (width + gap), 3), PAPER, dtype=np.uint8
    )
    for row, (_, members) in enumerate(rows):
        top = gap + row * (height + gap)
        if strips:
            strip = strips[row][: sheet.shape[0] - top]
            start = gap + margin - strip.shape[1]
            sheet[top : top + strip.shape[0], start : gap + margin] = strip[..., None]
        for column, member in enumerate(members):
            start = left + column * (width + gap)
            sheet[top : top + height, start : start + width] = tiles[member]
    return sheet


def time_strip(columns: Sequence[tuple[str, Tensor, Sequence[str]]]) -> NDArray[np.uint8]:
    """Lay moments side by side on white paper, each a column of captioned images.

    Args:
        columns: heading, images (n, C, H, W) uint8 with C 1 or 3, and a caption for each image; all
            images are of one size.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ShapeError: there is no column, or images and captions do not fit the above.
    """
    if not columns:
        raise ShapeError("got no columns, expected at least one moment; draw nothing instead")
    scale = max(1, _STRIP_SIDE // columns[0][1].shape[-1])
    for _, images, captions in columns:
        _check(images, 1, scale, captions, 0)
    drawn = [_tiles(images.float() / 255, scale) for _, images, _ in columns]
    height, width = drawn[0].shape[1:3]
    cell, line = max(width, _STRIP_SIDE) + _STRIP_GAP, _STRIP_LINE
    rows = max(len(tiles) for tiles in drawn)
    shape = (line + rows * (height + line), len(columns) * cell - _STRIP_GAP, 3)
    sheet = np.full(shape, PAPER, dtype=np.uint8)

    for number, ((heading, _, captions), tiles) in enumerate(zip(columns, drawn, strict=True)):
        left = number * cell
        # The last column has no gap behind it that a long caption could reach into.
        room = min(cell, sheet.shape[1] - left) - 2
        for index, strip in enumerate(_captions([heading, *captions], line)):
            top, cut = index * (height + line), strip[:, :room]
            sheet[top : top + line, left : left + cut.shape[1]] = cut[..., None]
        for index, tile in enumerate(tiles):
            top = line + index * (height + line)
            sheet[top : top + height, left : left + width] = tile
    return sheet


def answer_grid(columns: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """Lay columns of images side by side on white paper, a row for each input.

    Small images are enlarged without smoothing, those of more than 320 pixels made smaller.

    Args:
        columns: by heading, images (n, C, H, W) as `contact_sheet` takes them; C may differ from
            column to column, n, H and W may not.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ShapeError: there is no column, or the images do not fit the above.
    """
    if not columns:
        raise ShapeError("got no columns, expected at least one of images; draw nothing instead")
    for images in columns.values():
        _check(images, 1, 1, None, 0)
    shapes = {name: (len(images), *images.shape[2:]) for name, images in columns.items()}
    if len(set(shapes.values())) > 1:
        raise ShapeError(
            f"got columns of (rows, height, width) {shapes}, expected the same for all; draw the "
            "same inputs in each of them, at one size"
        )
    _, high, wide = next(iter(shapes.values()))
    scale = max(1, _ANSWER_SIDE // max(high, wide))
    shrink = max(1.0, max(high, wide) / _LARGEST_ANSWER)
    size = (max(1, round(high / shrink)), max(1, round(wide / shrink)))
    drawn = [_tiles(_resized(images, size), scale) for images in columns.values()]
    rows, height, width = drawn[0].shape[:3]
    # A heading may be wider than a narrow image.
    cell, line, gap = max(width, _ANSWER_SIDE // 2) + _ANSWER_GAP, _STRIP_LINE, _ANSWER_GAP
    shape = (gap + line + rows * (height + gap), gap + len(drawn) * cell, 3)
    sheet = np.full(shape, PAPER, dtype=np.uint8)
    headings = _captions(list(columns), line)
    for number, (strip, tiles) in enumerate(zip(headings, drawn, strict=True)):
        left, cut = gap + number * cell, strip[:, : cell - 2]
        sheet[gap // 2 : gap // 2 + line, left : left + cut.shape[1]] = cut[..., None]
        for index, tile in enumerate(tiles):
            top = gap + line + index * (height + gap)
            sheet[top : top + height, left : left + width] = tile
    return sheet


def save_png(array: NDArray[np.uint8], path: Path) -> None:
    """Write a picture as PNG; `path` holds either the whole picture or what it held before.

    Args:
        array: uint8, (H, W) or (H, W, 1) grey, (H, W, 3) colour, (H, W, 4) colour and opacity.
        path: file to write; its folder must exist.

    Raises:
        ShapeError: the array is none of these.
    """
    write_bytes(path, png(array))


def png(array: NDArray[np.uint8]) -> bytes:
    """The bytes of a picture as PNG; arguments and errors as for `save_png`."""
    pixels = array[..., None] if array.ndim == 2 else array
    colour_types = {1: 0, 3: 2, 4: 6}
    if pixels.ndim != 3 or pixels.shape[2] not in colour_types or not pixels.size:
        raise ShapeError(
            f"got a picture of shape {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or "
            "(H, W, 4) with at least one pixel; move the channels to the end"
        )
    if pixels.dtype != np.uint8:
        raise ShapeError(f"got a picture of {pixels.dtype}, expected uint8; multiply by 255 first")
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, colour_types[channels], 0, 0, 0)
    # Each line of a PNG starts with the number of its filter; 0 stores the bytes as they are.
    lines = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    lines[:, 1:] = pixels.reshape(height, -1)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND")


def _check(
    images: Tensor, columns: int, scale: int, labels: Sequence[str] | None, gap: int
) -> None:
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ShapeError(
            f"got images of shape {tuple(images.shape)}, expected (N, C, H, W) with C 1 or 3 and "
            "at least one pixel; select channels or batch first"
        )
    if columns < 1 or scale < 1 or gap < 0:
        raise ShapeError(
            f"got columns {columns}, scale {scale} and gap {gap}, expected whole numbers of at "
            "least 1, 1 and 0"
        )
    if labels is not None and len(labels) != images.shape[0]:
        raise ShapeError(
            f"got {len(labels)} labels for {images.shape[0]} images, expected one for each image"
        )


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return functional.interpolate(images.detach().float(), size=size, mode="area")


def _tiles(images: Tensor, scale: int) -> NDArray[np.uint8]:
    """Images as uint8 (N, H * scale, W * scale, 3)."""
    values = images.detach().float().nan_to_num(nan=0.0).clamp(0, 1).mul(255).round().byte()
    pixels: NDArray[np.uint8] = values.permute(0, 2, 3, 1).cpu().numpy()
    if pixels.shape[3] == 1:
        pixels = pixels.repeat(3, axis=3)
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def _rows(count: int, columns: int, labels: Sequence[str] | None) -> list[tuple[str, list[int]]]:
    """Caption and image numbers of each row; the caption is empty where a class goes on."""
    groups: dict[str, list[int]] = {}
    for index in range(count):
        groups.setdefault("" if labels is None else labels[index], []).append(index)
    return [
        (name if start == 0 else "", members[start : start + columns])
        for name, members in groups.items()
        for start in range(0, len(members), columns)
    ]


def _captions(names: list[str], height: int) -> list[NDArray[np.uint8]]:
    """One grey strip (height, width) per name, the text in its vertical middle."""
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    # In pixels: as tall as fits a small image, never larger than a page's own text.
    points = min(14.0, max(7.0, 0.6 * height)) * 0.72
    drawn = figure.text(0.0, 0.5, "", fontsize=points, va="center_baseline", parse_math=False)
    strips = []
    for name in names:
        cut = name if len(name) <= _CAPTION_LENGTH else name[: _CAPTION_LENGTH - 1] + "…"
        drawn.set_text(cut.replace("\n", " "))
        with warnings.catch_warnings():
            # A glyph that the font lacks is drawn as a box; that is no reason to stop a run.
            warnings.simplefilter("ignore")
            canvas.draw()
        strips.append(_trim(np.asarray(canvas.buffer_rgba())))
    return strips


def _trim(rendered: NDArray[Any]) -> NDArray[np.uint8]:
    """The coverage of black text on white, cut at its right end and printed in caption ink."""
    coverage = 1.0 - rendered[..., 0].astype(np.float32) / 255.0
    inked = np.flatnonzero(coverage.max(axis=0) > 0)
    width = int(inked[-1]) + 1 if inked.size else 0
    strip = PAPER - (PAPER - _CAPTION_INK) * coverage[:, :width]
    return strip.round().astype(np.uint8)


def _chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

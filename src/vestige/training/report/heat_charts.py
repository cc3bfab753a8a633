"""Heat maps as SVG text: classes over time, and who is taken for whom.

As in `charts`: pure functions from numbers to a string, colours from CSS variables, texts escaped.
"""

import math
from collections.abc import Sequence
from html import escape

from vestige.training.report.charts import (
    colour,
    empty,
    head,
    percent,
    plain,
    shares_of,
    text_at,
    usable,
)

CONFUSION_CLASSES = 20


def confusion(
    counts: Sequence[Sequence[float]],
    *,
    title: str,
    names: Sequence[str] = (),
    in_shares: bool = False,
) -> str:
    """Counts by true class (rows) and answer (columns), shaded by the share of the row.

    Right answers are in the first colour and mistakes in the second, so that the two are not told
    apart by their place alone.

    Args:
        counts: (K, K), not negative, K from 1 to 20.
        title: read out by screen readers and shown on hovering.
        names: class names; numbers where it is empty or too short.
        in_shares: print whole percents of the row's sum in place of the counts, which have no room
            where they are large; what is below half a percent stays empty.

    Returns:
        One `<svg>` element.
    """
    size = len(counts)
    if not 1 <= size <= CONFUSION_CLASSES or any(len(row) != size for row in counts):
        return empty(title, 420, 120)
    shown = [names[index] if index < len(names) else str(index) for index in range(size)]
    longest = max(len(name) for name in shown)
    cell = 34 if size <= 12 else 26
    left = 30 + 7 * min(longest, 12)
    # Names too wide for their column stand on their side.
    upright = longest > 3
    top = 48 + (6 * min(longest, 12) if upright else 0)
    width, height = max(left + size * cell + 2, 240), top + size * cell + 4
    parts = [head(title, width, height, f"max-width:{1.15 * width:.0f}px")]
    for index, name in enumerate(shown):
        at = left + (index + 0.5) * cell
        if upright:
            parts.append(
                f'<g transform="translate({at + 4:.1f} {top - 6}) rotate(-60)">'
                f"{text_at(_short(name, 12), 0, 0, 'start')}</g>"
            )
        else:
            parts.append(text_at(name, at, top - 8, "middle"))
        parts.append(text_at(_short(name, 12), left - 8, top + (index + 0.5) * cell + 4, "end"))
    for row, values in enumerate(counts):
        shares = shares_of(values) or [0.0] * size
        for column, (value, share) in enumerate(zip(values, shares, strict=True)):
            x, y = left + column * cell, top + row * cell
            depth = math.sqrt(share)
            label = f"{shown[row]} taken for {shown[column]}: {plain(value)}"
            if row == column:
                label = f"{shown[row]}, right: {plain(value)}"
            if in_shares:
                label += f" ({percent(share)})"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'style="fill:var(--line, #ddd)" fill-opacity="0.5"/>'
                f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{depth:.2f}" style="fill:{colour(0 if row == column else 1)}">'
                f"<title>{escape(label)}</title></rect>"
            )
            printed = f"{100 * share:.0f}" if in_shares else plain(value)
            if usable(value) and value > 0 and printed != "0":
                ink = "--paper, #fff" if depth > 0.8 else "--ink, #222"
                at = x + (cell - 1) / 2
                parts.append(text_at(printed, at, y + cell / 2 + 4, "middle", ink))
    parts.append(text_at("true class ↓", 0, 14, "start"))
    parts.append(text_at("answer →", max(left, 96), 14, "start"))
    return "".join([*parts, "</svg>"])


def heat_strip(
    columns: Sequence[tuple[float, Sequence[float]]],
    *,
    title: str,
    x_label: str = "",
    names: Sequence[str] = (),
    top: float | None = None,
    width: int = 420,
) -> str:
    """Shares of a whole over time: one row per class, one column per round, darker is more.

    Opacity follows the square root of the share, so that a rare class can be told from an absent
    one. More than 24 classes are cut to the 20 most frequent and one row for the rest; more than
    100 columns are averaged.

    Args:
        columns: x and counts (one per class, not negative) of each round.
        title: read out by screen readers and shown on hovering.
        x_label: what the columns count.
        names: class names; numbers where it is empty or too short.
        top: share drawn darkest, common to strips that are to be compared; None for the largest.
        width: of the drawing, in its own units.

    Returns:
        One `<svg>` element.
    """
    shares = [(x, shares_of(counts)) for x, counts in columns]
    classes = max((len(row) for _, row in shares), default=0)
    shares = [(x, row) for x, row in shares if row and len(row) == classes and usable(x)]
    if not shares:
        return empty(title, width, 120)
    rows = [
        (names[index] if index < len(names) else str(index), [row[index] for _, row in shares])
        for index in range(classes)
    ]
    # Before rows are merged: all that is left together would make each class look pale.
    darkest = max(top or 0.0, *(max(row) for _, row in rows))
    rows = _merge_rows(rows)
    xs = [x for x, _ in shares]
    step = max(1, math.ceil(len(xs) / 100))
    cell = 20 if len(rows) <= 12 else 13
    left, right = 54, width - 14
    height = cell * len(rows) + 58
    slots = math.ceil(len(xs) / step)
    across = (right - left) / slots
    parts = [head(title, width, height), f'<g style="fill:{colour(0)}">']
    names_at = []
    for number, (name, row) in enumerate(rows):
        y = 4 + number * cell
        names_at.append(text_at(_short(name, 8), left - 8, y + cell / 2 + 4, "end"))
        for slot in range(slots):
            share = sum(row[slot * step : (slot + 1) * step]) / len(row[slot * step :][:step])
            label = f"{name}, {x_label} {plain(xs[slot * step])}: {percent(share)}"
            parts.append(
                f'<rect x="{left + slot * across:.1f}" y="{y}" width="{across + 0.2:.1f}" '
                f'height="{cell - 1}" fill-opacity="{math.sqrt(min(1.0, share / darkest)):.2f}">'
                f"<title>{escape(label)}</title></rect>"
            )
    parts.extend(["</g>", *names_at])
    bottom = 4 + len(rows) * cell
    parts.append(text_at(plain(xs[0]), left, bottom + 16, "start"))
    if len(xs) > 1:
        parts.append(text_at(plain(xs[-1]), right, bottom + 16, "end"))
    parts.append(text_at(x_label, (left + right) / 2, bottom + 16, "middle"))
    parts.append(_scale(left, bottom + 34, darkest))
    return "".join([*parts, "</svg>"])


def _merge_rows(rows: list[tuple[str, list[float]]]) -> list[tuple[str, list[float]]]:
    if len(rows) <= 24:
        return rows
    ranked = sorted(range(len(rows)), key=lambda index: -sum(rows[index][1]))
    kept = [rows[index] for index in sorted(ranked[:20])]
    rest = [rows[index][1] for index in ranked[20:]]
    return [*kept, (f"{len(rest)} more", [sum(column) for column in zip(*rest, strict=True)])]


def _scale(left: float, y: float, top: float) -> str:
    """What the colours of a heat strip mean, from 0 to the darkest share."""
    start, length = left + 34.0, 128.0
    parts = [text_at("0 %", left, y + 9, "start")]
    for index in range(16):
        share = math.sqrt((index + 0.5) / 16)
        parts.append(
            f'<rect x="{start + index * length / 16:.1f}" y="{y}" width="{length / 16 + 0.2:.1f}" '
            f'height="10" fill-opacity="{share:.2f}" style="fill:{colour(0)}"/>'
        )
    parts.append(text_at(percent(top), start + length + 8, y + 9, "start"))
    return "".join(parts)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

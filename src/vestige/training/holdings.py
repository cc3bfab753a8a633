"""Which client holds how much of which class: figures and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vestige.errors import ShapeError
from vestige.training.pictures import save_png

# More have no room as bubbles of their own.
BUBBLE_CLIENTS, BUBBLE_CLASSES = 40, 100
_COLUMNS = 100
_NAMED_CLASSES = 40
# Larger ones are no counts, and their sums may overflow.
_MOST = 1e15
_INK, _SOFT = "#0b66a8", "#555555"
_DOTS_PER_INCH = 110


def checked(counts: ArrayLike) -> NDArray[np.float64]:
    """Counts as float64 (clients, C).

    Raises:
        ShapeError: they are no such table of numbers of at least 0.
    """
    try:
        table = np.asarray(counts, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        table = np.zeros(0)
    if table.ndim != 2 or not table.size or not ((table >= 0) & (table < _MOST)).all():
        raise ShapeError(
            "got counts that are no table of numbers, expected (clients, classes), at least 0; "
            "count the labels of each client"
        )
    return table


def figures(table: NDArray[np.float64]) -> dict[str, float]:
    """How much and how unevenly clients hold.

    Args:
        table: (clients, C), as `checked` gives it.

    Returns:
        "examples" of all, "least", "median" and "most" of a client, "empty" clients, and as means
        over those that hold any: "classes", how many they have some of, "effective_classes", exp of
        the entropy of their shares, and "main_share", that of their largest class. The means are
        NaN where nobody holds any.
    """
    sizes = table.sum(1)
    shares = _shares(table)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    means = [(shares > 0).sum(1), np.exp(-(shares * logs).sum(1)), shares.max(1)]
    classes, effective, main = (float(m.mean()) if len(shares) else float("nan") for m in means)
    return {
        "examples": float(sizes.sum()),
        "least": float(sizes.min()),
        "median": float(np.median(sizes)),
        "most": float(sizes.max()),
        "empty": float((sizes == 0).sum()),
        "classes": classes,
        "effective_classes": effective,
        "main_share": main,
    }


def in_groups(table: NDArray[np.float64], *, most: int = _COLUMNS) -> NDArray[np.float64]:
    """Class shares of clients sorted by their largest class, averaged over neighbours.

    Clients of one main class stand together, those that hold most of it first, so that the mean
    over neighbours still shows how uneven each of them is.

    Args:
        table: (clients, C), as `checked` gives it; clients without examples are left out.
        most: groups.

    Returns:
        (groups, C), rows add up to 1; no row where nobody holds any.
    """
    shares = _shares(table)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    groups = np.array_split(shares[order], min(most, len(shares))) if len(shares) else []
    return np.stack([group.mean(0) for group in groups]) if groups else shares


def has_room(table: NDArray[np.float64]) -> bool:
    """Whether each client and class can have a bubble of its own."""
    clients, classes = table.shape
    return bool(clients <= BUBBLE_CLIENTS and classes <= BUBBLE_CLASSES)


def write_holdings(out: Path, counts: ArrayLike, classes: Sequence[str]) -> None:
    """clients.png: who holds what.

    Args:
        out: folder, which exists.
        counts: (clients, C), at least 0.
        classes: their names; numbers where there are too few.

    Raises:
        ShapeError: the counts are not as above.
    """
    save_png(holdings_picture(counts, classes), out / "clients.png")


def holdings_picture(counts: ArrayLike, classes: Sequence[str]) -> NDArray[np.uint8]:
    """A row for each class; a bubble for each client, or the shares of groups of many clients.

    Args:
        counts: (clients, C), at least 0.
        classes: their names; numbers where there are too few.

    Returns:
        (height, width, 3) uint8, on white.

    Raises:
        ShapeError: the counts are not as above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = checked(counts)
    clients, rows = table.shape
    bubbles = has_room(table)
    high = 0.9 + min(10.0 if bubbles else 6.0, max(1.6, 0.27 * rows))
    wide = max(4.0, 1.2 + 0.27 * clients) if bubbles else 9.0
    figure = Figure(figsize=(wide, high), dpi=_DOTS_PER_INCH, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if bubbles:
        _bubbles(axes, table)
    else:
        shares = in_groups(table)
        grown = shares if len(shares) else np.zeros((1, rows))
        drawn = axes.imshow(
            grown.T, aspect="auto", cmap="Blues", vmin=0.0, extent=(0.5, clients + 0.5, rows, 0)
        )
        axes.set_xlabel(f"{clients:,} clients, sorted by their largest class", color=_SOFT)
        scale = figure.colorbar(drawn, ax=axes, pad=0.01, aspect=40)
        scale.set_label("share of a client's examples", color=_SOFT, fontsize=9)
        scale.outline.set_visible(False)
        scale.ax.tick_params(length=0, labelsize=8, labelcolor=_SOFT)
    axes.xaxis.label.set_fontsize(9)
    # A label's middle is its row's middle: bubbles stand at whole numbers, cells begin there.
    step = -(-rows // _NAMED_CLASSES)
    shown = range(0, rows, step)
    names = [_short(classes[index]) if index < len(classes) else str(index) for index in shown]
    axes.set_yticks([index + (0.0 if bubbles else 0.5) for index in shown], names)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=_SOFT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _bubbles(axes: Any, table: NDArray[np.float64]) -> None:
    clients, rows = table.shape
    client, label = np.nonzero(table)
    room = 0.27 if rows <= 37 else 10.0 / rows
    # In square points; the largest fills its cell.
    largest = (72 * room * 0.95) ** 2
    areas = largest * table[client, label] / max(1.0, table.max())
    axes.scatter(client, label, s=np.maximum(areas, 1.0), color=_INK, alpha=0.85, linewidths=0)
    axes.set_xlim(-0.6, clients - 0.4)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xticks(range(0, clients, 1 if clients <= 25 else 5))
    axes.grid(color="#e2e3e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"client; the largest bubble is {table.max():,.0f} examples", color=_SOFT)


def _shares(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of the classes, (clients that hold any, C)."""
    held = table[table.sum(1) > 0]
    shares: NDArray[np.float64] = held / held.sum(1, keepdims=True)
    return shares


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"

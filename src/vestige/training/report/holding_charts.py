"""Who holds what as SVG text: a bubble for each client and class, or shares of many clients.

As in `charts`: pure functions from numbers to a string, colours from CSS variables, texts escaped.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from vestige.training.holdings import has_room, in_groups
from vestige.training.report.charts import colour, head, plain, text_at
from vestige.training.report.heat_charts import heat_strip

_WIDTH, _LEFT, _BARS = 1100, 96, 44


def holdings(table: NDArray[np.float64], *, title: str, names: Sequence[str] = ()) -> str:
    """Examples by client (columns) and class (rows).

    Where there is room, see `training.holdings.has_room`, each count has a bubble, its area in
    proportion, under a bar for the client's size. More clients are sorted by their largest class
    and drawn as mean shares of neighbours.

    Args:
        table: (clients, C), as `training.holdings.checked` gives it.
        title: read out by screen readers and shown on hovering.
        names: class names; numbers where there are too few.

    Returns:
        One `<svg>` element.
    """
    if has_room(table):
        return _bubbles(table, title, names)
    shares = in_groups(table)
    clients = int((table.sum(1) > 0).sum())
    places = np.linspace(1, clients, len(shares)).round()
    columns = list(zip(places.tolist(), shares.tolist(), strict=True))
    label = "client, sorted by its largest class"
    return heat_strip(columns, title=title, x_label=label, names=names, width=_WIDTH)


def _bubbles(table: NDArray[np.float64], title: str, names: Sequence[str]) -> str:
    clients, rows = table.shape
    across = min(46.0, (_WIDTH - _LEFT - 10) / clients)
    down = min(26.0, max(7.0, 640 / rows))
    top = _BARS + 10
    width, height = max(360.0, _LEFT + clients * across + 10), top + rows * down + 40
    sizes = table.sum(1)
    unit = _BARS / max(1.0, float(sizes.max()))
    radius = 0.48 * min(across, down) / math.sqrt(max(1.0, float(table.max())))
    parts = [
        head(
            title,
            round(width),
            round(height),
            f"max-width:{width:.0f}px;min-width:{min(720, width):.0f}px",
        )
    ]
    parts.append(text_at("examples", _LEFT - 10, _BARS + 2, "end"))
    step = math.ceil(17 / down)
    for row in range(rows):
        y = top + (row + 0.5) * down
        name = _short(names[row] if row < len(names) else str(row))
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{_LEFT + clients * across:.1f}" '
            'style="stroke:var(--line, #ddd)"/>'
        )
        if row % step == 0:
            parts.append(text_at(name, _LEFT - 10, y + 4, "end"))
    for client in range(clients):
        x = _LEFT + (client + 0.5) * across
        tall = unit * float(sizes[client])
        parts.append(
            f'<rect x="{x - 0.3 * across:.1f}" y="{_BARS + 4 - tall:.1f}" '
            f'width="{0.6 * across:.1f}" height="{tall:.1f}" style="fill:var(--quiet, #999)">'
            f"<title>client {client}: {plain(float(sizes[client]))} examples</title></rect>"
        )
        if clients <= 25 or client % 5 == 0:
            parts.append(text_at(str(client), x, top + rows * down + 16, "middle"))
    parts.append(f'<g style="fill:{colour(0)}" fill-opacity="0.85">')
    for client, row in zip(*(places.tolist() for places in np.nonzero(table)), strict=True):
        count = float(table[client, row])
        name = names[row] if row < len(names) else str(row)
        parts.append(
            f'<circle cx="{_LEFT + (client + 0.5) * across:.1f}" '
            f'cy="{top + (row + 0.5) * down:.1f}" r="{max(0.8, radius * math.sqrt(count)):.1f}">'
            f"<title>client {client}, {escape(name)}: {plain(count)}</title></circle>"
        )
    parts.append("</g>")
    parts.append(text_at("client", _LEFT + clients * across / 2, height - 6, "middle"))
    return "".join([*parts, "</svg>"])


def _short(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "…"

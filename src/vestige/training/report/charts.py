"""Small charts as SVG text, for a page that holds everything in itself.

Pure functions from numbers to a string. Colours are CSS variables with a fallback, so that a page
can offer a light and a dark set; every text is escaped. The SVG is made to stand inside HTML.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's set, told apart with any colour vision; dashes carry the same difference on paper.
PALETTE = ("#0b66a8", "#d55e00", "#00876a", "#b8568f", "#35a3d0", "#a87400", "#6b6f76")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "10 4", "4 2", "1 2")
_POINTS = 240
_LARGEST = 1e100
_WIDE_RANGE = 50.0

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: shown in the legend.
        points: (x, y) in ascending x; a y that is not finite leaves a gap and a mark.
        slot: number of its colour and dash; 0 is the accent colour.
        strong: drawn heavier and above the others.
    """

    name: str
    points: Sequence[tuple[float, float]]
    slot: int = 0
    strong: bool = False


def plain(value: float) -> str:
    """A number in three digits: 0.0123, 12.3, 1.2k."""
    if not math.isfinite(value):
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1e15 else f"{value:.2g}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share as a percentage without needless digits."""
    return f"{100 * value:.3g} %" if math.isfinite(value) else "–"


def shares_of(counts: Sequence[float]) -> list[float]:
    """Counts as shares of their sum; empty where nothing was counted."""
    clean = [count if usable(count) and count > 0 else 0.0 for count in counts]
    whole = sum(clean)
    return [count / whole for count in clean] if whole else []


def colour(slot: int) -> str:
    """The CSS colour of a series."""
    slot %= len(PALETTE)
    return f"var(--series-{slot}, {PALETTE[slot]})"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_format: Format = plain,
    y_range: tuple[float, float] | None = None,
    reference: tuple[str, float] | None = None,
    width: int = 560,
    height: int = 280,
) -> str:
    """Lines over a common x axis.

    Long series are drawn as the mean of neighbouring points on a band from least to greatest. The
    y axis is logarithmic when all values are positive and the largest is more than 50 times the
    smallest and `y_range` is not given.

    Args:
        series: the lines; those without a finite point are left out.
        title: read out by screen readers and shown on hovering.
        x_label: what the x axis counts.
        y_format: writes the numbers beside the y axis.
        y_range: fixed y axis, or None to fit the values.
        reference: name and height of a dashed horizontal line, or None.
        width: of the drawing, in its own units.
        height: of the drawing, in its own units.

    Returns:
        One `<svg>` element.
    """
    finite = [(x, y) for one in series for x, y in one.points if usable(x) and usable(y)]
    if not finite:
        return empty(title, width, height)
    line = reference if reference is not None and usable(reference[1]) else None
    ys = [y for _, y in finite] + ([line[1]] if line else [])
    logarithmic = y_range is None and min(ys) > 0 and max(ys) / min(ys) > _WIDE_RANGE
    xs = [x for x, _ in finite]
    # Counts that begin near zero read best on an axis that begins there.
    origin = [0.0] if 0 < min(xs) <= 0.2 * max(xs) else []
    x_axis = _Axis.over(xs + origin, start=54, end=width - 14)
    y_axis = _Axis.over(
        list(y_range) if y_range else ys,
        start=height - 40,
        end=24,
        logarithmic=logarithmic,
        pad=0.0 if y_range else 0.06,
    )
    whole = all(x == int(x) for x in xs)
    parts = [head(title, width, height), _grid(x_axis, y_axis, y_format, whole)]
    parts.append(text_at(x_label, (54 + width - 14) / 2, height - 6, "middle"))
    if line:
        at = y_axis(line[1])
        parts.append(
            f'<path d="M54 {at:.1f}H{width - 14}" fill="none" stroke-dasharray="5 4" '
            f'stroke-width="1.5" style="stroke:var(--ink, #222)"/>'
        )
        parts.append(text_at(line[0], width - 18, at - 6, "end", ink="--ink, #222"))
    for one in sorted(series, key=lambda item: item.strong):
        parts.append(_draw(one, x_axis, y_axis))
    return "".join([*parts, "</svg>"])


def bar(value: float, *, title: str, reference: float | None = None, strong: bool = False) -> str:
    """A horizontal bar for a value in [0, 1], with a tick at the reference; fills its cell."""
    parts = [
        '<svg class="bar" role="img" viewBox="0 0 100 10" preserveAspectRatio="none">'
        f"<title>{escape(title)}</title>"
        '<rect x="0" y="2" width="100" height="6" style="fill:var(--line, #ddd)"/>'
    ]
    if usable(value):
        length = 100 * min(1.0, max(0.0, value))
        ink = colour(0) if strong else "var(--quiet, #9aa1ab)"
        parts.append(f'<rect x="0" y="2" width="{length:.2f}" height="6" style="fill:{ink}"/>')
    if reference is not None and usable(reference):
        at = 100 * min(1.0, max(0.0, reference))
        parts.append(
            f'<path d="M{at:.2f} 0V10" stroke-width="1.5" vector-effect="non-scaling-stroke" '
            'style="stroke:var(--ink, #222)"/>'
        )
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    """Maps values to drawing units, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        *,
        start: float,
        end: float,
        logarithmic: bool = False,
        pad: float = 0.0,
    ) -> "_Axis":
        ends = [math.log10(value) if logarithmic else value for value in values]
        low, high = min(ends), max(ends)
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        room = pad * (high - low)
        # A margin below zero would suggest negative values where there are none.
        low = 0.0 if not logarithmic and 0 <= low <= room and pad else low - room
        return cls(low, high + room, start, end, logarithmic)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.logarithmic else value
        share = min(1.0, max(0.0, (at - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int, *, whole: bool = False) -> list[float]:
        """About `wanted` round numbers within the axis, all of them whole if `whole`."""
        if self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            factors = (1.0,) if self.high - self.low > 2 else (1.0, 2.0, 5.0)
            marks = [factor * 10.0**power for power in decades for factor in factors]
            inside = [mark for mark in marks if self.low <= math.log10(mark) <= self.high]
            return inside[:: max(1, math.ceil(len(inside) / (wanted + 2)))]
        rough = (self.high - self.low) / max(1, wanted)
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * size for size in (1, 2, 2.5, 5, 10) if unit * size >= rough * 0.75)
        if whole:
            step = max(1.0, float(math.ceil(step)) if step < 10 else step)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis, y_format: Format, whole: bool) -> str:
    small = y_axis.start - y_axis.end < 150
    parts = []
    for value in y_axis.ticks(3 if small else 5):
        at = y_axis(value)
        parts.append(
            f'<path d="M{x_axis.start} {at:.1f}H{x_axis.end}" style="stroke:var(--line, #ddd)"/>'
        )
        parts.append(text_at(y_format(value), x_axis.start - 8, at + 4, "end"))
    for value in x_axis.ticks(max(2, int((x_axis.end - x_axis.start) / 90)), whole=whole):
        parts.append(text_at(plain(value), x_axis(value), y_axis.start + 17, "middle"))
    parts.append(
        f'<path d="M{x_axis.start} {y_axis.start}H{x_axis.end}" style="stroke:var(--quiet, #999)"/>'
    )
    return "".join(parts)


def _draw(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    placed = [(x, y) for x, y in series.points if usable(x)]
    runs: list[list[tuple[float, float]]] = [[]]
    broken = []
    for x, y in placed:
        if usable(y) and (y > 0 or not y_axis.logarithmic):
            runs[-1].append((x, y))
        else:
            broken.append(x)
            runs.append([])
    weight = 2.4 if series.strong else 1.6
    dash = "" if series.strong else DASHES[series.slot % len(DASHES)]
    look = f'fill="none" stroke-width="{weight}" stroke-linejoin="round" stroke-dasharray="{dash}"'
    parts = [f'<g style="color:{colour(series.slot)}"><title>{escape(series.name)}</title>']
    for run in filter(None, runs):
        thin = _thin(run)
        if len(thin) < len(run):
            upper = [f"{x_axis(x):.1f} {y_axis(high):.1f}" for x, _, _, high in thin]
            lower = [f"{x_axis(x):.1f} {y_axis(low):.1f}" for x, _, low, _ in reversed(thin)]
            parts.append(
                f'<path d="M{"L".join(upper + lower)}Z" fill="currentColor" fill-opacity="0.16"/>'
            )
        path = "L".join(f"{x_axis(x):.1f} {y_axis(mean):.1f}" for x, mean, _, _ in thin)
        parts.append(f'<path d="M{path}" stroke="currentColor" {look}/>')
        if len(thin) <= 24:
            parts.extend(
                f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(mean):.1f}" r="{weight + 0.4}" '
                'fill="currentColor"/>'
                for x, mean, _, _ in thin
            )
    for x in broken[:_POINTS]:
        at = x_axis(x)
        parts.append(
            f'<path class="broken" d="M{at - 3:.1f} {y_axis.start - 6}l6 6m0 -6l-6 6" '
            f'stroke="currentColor" stroke-width="1.5"><title>not finite at {plain(x)}</title>'
            "</path>"
        )
    return "".join([*parts, "</g>"])


def _thin(run: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """At most `_POINTS` of x, mean, least and greatest y of neighbouring points."""
    size = max(1, math.ceil(len(run) / _POINTS))
    out = []
    for start in range(0, len(run), size):
        part = run[start : start + size]
        ys = [y for _, y in part]
        out.append((part[len(part) // 2][0], math.fsum(ys) / len(ys), min(ys), max(ys)))
    return out


def head(title: str, width: float, height: float, style: str = "") -> str:
    """The start of a chart; `style` is CSS and not escaped."""
    look = f' style="{style}"' if style else ""
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}"{look}>'
        f"<title>{escape(title)}</title>"
    )


def empty(title: str, width: int, height: int) -> str:
    """A chart that says that there is nothing to draw."""
    return (
        f"{head(title, width, height)}"
        f"{text_at('no finite values', width / 2, height / 2, 'middle')}</svg>"
    )


def text_at(text: str, x: float, y: float, anchor: str, ink: str = "--soft, #555") -> str:
    """An escaped text; `ink` names the CSS variable of its colour."""
    if not text:
        return ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="fill:var({ink})">'
        f"{escape(text)}</text>"
    )


def usable(value: float) -> bool:
    """Whether a value can be drawn."""
    return math.isfinite(value) and abs(value) < _LARGEST

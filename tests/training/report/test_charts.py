"""Charts are well-formed, safe, and place values where their axes say."""

import math
import re
from xml.etree import ElementTree

import pytest

from vestige.training.report.charts import (
    Series,
    bar,
    line_chart,
    percent,
    plain,
    shares_of,
)
from vestige.training.report.heat_charts import confusion, heat_strip

HOSTILE = "<script>alert(1)</script>&\"'"


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def _rows_of_cells(svg: str) -> dict[float, list[float]]:
    """Opacity of the titled cells (the strip's own, not its scale's) by their y."""
    rows: dict[float, list[float]] = {}
    for rect in ElementTree.fromstring(svg).iter("rect"):
        if rect.find("title") is not None:
            rows.setdefault(float(rect.attrib["y"]), []).append(float(rect.attrib["fill-opacity"]))
    return rows


def test_a_line_runs_from_corner_to_corner_of_a_fixed_range() -> None:
    svg = line_chart([Series("a", [(0, 0.0), (10, 1.0)])], title="t", y_range=(0.0, 1.0))
    path = re.search(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)" stroke="currentColor"', svg)
    assert path is not None
    # The plot area of the default size: 54..546 across, 24 (top) .. 240 (bottom).
    assert [float(value) for value in path.groups()] == [54.0, 240.0, 546.0, 24.0]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e300])
def test_values_that_are_not_finite_leave_a_gap_and_a_mark(broken: float) -> None:
    points = [(0, 1.0), (1, 2.0), (2, broken), (3, 2.0), (4, 1.0)]
    svg = line_chart([Series("a", points)], title="t")
    ElementTree.fromstring(svg)
    assert svg.count('class="broken"') == 1
    assert svg.count('fill="none" stroke-width="1.6"') == 2
    assert "nan" not in svg.lower().replace("not finite", "") and "inf" not in re.sub(
        "not finite", "", svg
    )


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)], [(math.nan, 1.0)]])
def test_nothing_to_draw_is_said(points: list[tuple[float, float]]) -> None:
    assert _texts(line_chart([Series("a", points)], title="t")) == ["no finite values"]


def test_wide_positive_ranges_get_a_logarithmic_axis_and_others_do_not() -> None:
    wide = _texts(line_chart([Series("a", [(0, 0.001), (1, 100.0)])], title="t"))
    assert {"0.01", "1", "100"} <= set(wide)
    negative = _texts(line_chart([Series("a", [(0, -0.001), (1, 100.0)])], title="t"))
    assert {"0", "20", "40"} <= set(negative) or {"0", "25", "50"} <= set(negative)


def test_constant_single_and_huge_values_do_not_break_an_axis() -> None:
    for points in ([(0, 3.0)], [(0, 0.0), (1, 0.0)], [(5, 1e99), (6, -1e99)], [(1, 1e-300)]):
        ElementTree.fromstring(line_chart([Series("a", points)], title="t"))


def test_long_series_are_thinned_to_a_mean_within_a_band() -> None:
    points = [(float(x), float(x % 2)) for x in range(4800)]
    svg = line_chart([Series("a", points)], title="t", y_range=(0.0, 1.0))
    assert len(svg) < 20_000
    line = re.search(r'<path d="M([^"]*)" stroke="currentColor"', svg)
    assert line is not None
    # Every bucket holds as many zeros as ones.
    assert {float(point.split()[1]) for point in line.group(1).split("L")} == {132.0}


def test_texts_are_escaped() -> None:
    chart = line_chart([Series(HOSTILE, [(0, 1.0)])], title=HOSTILE, x_label=HOSTILE)
    strip = heat_strip([(0, [1, 2])], title=HOSTILE, names=[HOSTILE, "b"], x_label=HOSTILE)
    for svg in (chart, strip, bar(0.5, title=HOSTILE), line_chart([], title=HOSTILE)):
        assert "<script" not in svg
        title = ElementTree.fromstring(svg).find("title")
        assert title is not None and title.text == HOSTILE


def test_a_bar_is_as_long_as_its_value_and_marks_the_reference() -> None:
    svg = bar(0.25, title="t", reference=0.75)
    assert 'width="25.00"' in svg and "M75.00 0V10" in svg
    assert 'width="100.00"' in bar(7.0, title="t")
    ElementTree.fromstring(bar(math.nan, title="t", reference=math.nan))


def test_a_heat_strip_shades_by_share_on_a_common_scale() -> None:
    collapsed = _rows_of_cells(heat_strip([(0, [100, 0, 0, 0])], title="t"))
    assert [row[0] for row in collapsed.values()] == [1.0, 0.0, 0.0, 0.0]
    even = _rows_of_cells(heat_strip([(0, [25, 25, 25, 25])], title="t", top=1.0))
    assert [row[0] for row in even.values()] == [0.5] * 4


def test_a_heat_strip_merges_many_classes_and_many_rounds() -> None:
    columns = [(float(x), [1.0] * 1000) for x in range(700)]
    svg = heat_strip(columns, title="t")
    cells = _rows_of_cells(svg)
    assert len(cells) == 21 and all(len(row) <= 100 for row in cells.values())
    assert "980 more" in _texts(svg)


@pytest.mark.parametrize("columns", [[], [(0, [])], [(0, [0, 0])], [(0, [math.nan, -1])]])
def test_a_heat_strip_of_nothing_is_said(columns: list[tuple[float, list[float]]]) -> None:
    assert _texts(heat_strip(columns, title="t")) == ["no finite values"]


def test_numbers_are_short() -> None:
    assert [plain(x) for x in (0.01234, 12.34, 1234.0, 2.5e6, math.nan)] == [
        "0.0123", "12.3", "1.23k", "2.5M", "–",
    ]  # fmt: skip
    assert percent(0.5) == "50 %" and shares_of([1, 3]) == [0.25, 0.75]


def test_ticks_of_counts_are_whole() -> None:
    svg = line_chart([Series("a", [(1, 0.0), (2, 1.0)])], title="t", x_label="round")
    bottom = [
        element.text
        for element in ElementTree.fromstring(svg).iter("text")
        if element.attrib["text-anchor"] == "middle" and element.text != "round"
    ]
    assert bottom == ["1", "2"]
    between = _texts(line_chart([Series("a", [(0.1, 0.0), (0.4, 1.0)])], title="t"))
    assert "0.2" in between


def _cells(svg: str) -> dict[str, tuple[float, str]]:
    """Opacity and colour of the titled cells of a confusion matrix by their titles."""
    found = {}
    for rect in ElementTree.fromstring(svg).iter("rect"):
        title = rect.find("title")
        if title is not None:
            found[title.text or ""] = (float(rect.attrib["fill-opacity"]), rect.attrib["style"])
    return found


def test_a_confusion_matrix_shades_by_row_and_tells_mistakes_by_colour() -> None:
    svg = confusion([[9, 0], [36, 64]], title="t", names=["cat", "dog"])
    cells = _cells(svg)
    assert [cells[name][0] for name in ("cat, right: 9", "dog, right: 64")] == [1.0, 0.8]
    assert cells["dog taken for cat: 36"][0] == 0.6 and cells["cat taken for dog: 0"][0] == 0.0
    right, wrong = cells["dog, right: 64"][1], cells["dog taken for cat: 36"][1]
    assert "--series-0" in right and "--series-1" in wrong
    # Numbers of inputs are written into the cells, none into an empty one.
    assert {"9", "36", "64"} <= set(_texts(svg)) and "0" not in _texts(svg)


def test_a_confusion_matrix_takes_any_counts_and_names() -> None:
    for size in (1, 2, 20):
        ElementTree.fromstring(confusion([[1.0] * size] * size, title="t", names=[HOSTILE]))
    for broken in ([], [[1.0]] * 2, [[1.0] * 21] * 21):
        assert _texts(confusion(broken, title="t")) == ["no finite values"]
    svg = confusion([[math.nan, -1.0], [math.inf, 2.0]], title=HOSTILE)
    assert "nan" not in svg.lower().replace("–", "") and "<script" not in svg
    ElementTree.fromstring(svg)


def test_a_confusion_matrix_in_shares_prints_percents_of_the_row() -> None:
    counts = [[997_000, 3_000, 0], [1, 1, 0], [0, 0, 0]]
    svg = confusion(counts, title="t", in_shares=True)
    assert _texts(svg)[-2:] == ["true class ↓", "answer →"]
    printed = [text for text in _texts(svg) if text.isdecimal()]
    # Names of columns and rows, then what rounds to more than nothing.
    assert printed == ["0", "0", "1", "1", "2", "2", "100", "50", "50"]
    assert "0 taken for 1: 3k (0.3 %)" in svg and "0, right: 997k (99.7 %)" in svg

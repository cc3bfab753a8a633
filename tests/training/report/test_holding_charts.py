"""Who holds what as SVG: areas in proportion, nothing for nothing, and texts escaped."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from vestige.training.report.holding_charts import holdings

TABLE = np.array([[400.0, 100.0], [0.0, 25.0], [0.0, 0.0]])


def test_areas_of_bubbles_and_heights_of_bars_are_in_proportion() -> None:
    svg = holdings(TABLE, title="t", names=["cat", "dog"])
    found = {
        title: float(radius)
        for radius, title in re.findall(r'<circle [^>]*r="([\d.]+)"><title>([^<]+)<', svg)
    }
    assert found.keys() == {"client 0, cat: 400", "client 0, dog: 100", "client 1, dog: 25"}
    # Drawn with one decimal.
    largest = found["client 0, cat: 400"]
    assert found["client 0, dog: 100"] == pytest.approx(largest * math.sqrt(1 / 4), abs=0.11)
    assert found["client 1, dog: 25"] == pytest.approx(largest * math.sqrt(1 / 16), abs=0.11)
    bars = [float(tall) for tall in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]
    assert bars == pytest.approx([44, 44 * 25 / 500, 0], abs=0.06)


def test_few_examples_can_still_be_seen() -> None:
    svg = holdings(np.array([[1e6, 1.0]]), title="t")
    radii = [float(radius) for radius in re.findall(r' r="([\d.]+)"', svg)]
    assert min(radii) == 0.8


@pytest.mark.parametrize("clients", [3, 40, 41, 2000])
def test_it_is_xml_of_bounded_size_whatever_the_names(clients: int) -> None:
    table = np.random.default_rng(0).integers(0, 50, (clients, 12)).astype(float)
    svg = holdings(table, title="<b>&", names=["<script>", '"&', "x" * 300])
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and "<script>" not in svg
    assert ("circle" in svg) == (clients <= 40)
    assert len(svg) < 400_000


def test_many_clients_are_a_hundred_columns() -> None:
    table = np.repeat(np.eye(5) * 10, 200, axis=0)
    svg = holdings(table, title="t")
    # Five rows and the scale of 16 steps.
    assert svg.count("<rect") == 5 * 100 + 16
    assert "sorted by its largest class" in svg
    assert "no finite values" in holdings(np.zeros((50, 3)), title="t")

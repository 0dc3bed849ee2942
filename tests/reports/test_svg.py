"""Curves as SVG: well-formed whatever the points, and drawn inside the picture."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.reports.svg import plot, ticks

FINITE = st.floats(-1e6, 1e6)
POINTS = st.lists(st.tuples(st.integers(0, 10_000), FINITE), max_size=12).map(sorted)


@given(st.lists(st.tuples(st.text(max_size=20).filter(str.isprintable), POINTS), max_size=20))
def test_the_image_is_well_formed_and_every_point_lies_inside(series):
    tree = ElementTree.fromstring(plot("a <title> & more", series))
    width, height = map(float, tree.attrib["viewBox"].split()[2:])
    lines = [e for e in tree.iter() if e.tag.endswith("polyline")]
    assert len(lines) == sum(bool(points) for _, points in series)
    for line in lines:
        for x, y in (map(float, pair.split(",")) for pair in line.attrib["points"].split()):
            assert 0 <= x <= width and 0 <= y <= height


def test_losses_that_span_a_large_factor_are_on_a_logarithmic_axis_and_rungs_are_lines():
    text = plot("search", [("0", [(0, 2.0), (10, 40.0)]), ("1", [(0, 2.0), (30, 0.5)])], rungs=[10, 90])
    tree = ElementTree.fromstring(text)
    labels = [e.text for e in tree.iter() if e.tag.endswith("text")]
    assert {"0.5", "1", "2", "5", "10", "20", "rung 10"} <= set(labels) and "rung 90" not in labels
    lines = [e for e in tree.iter() if e.tag.endswith("polyline")]
    heights = [[float(pair.split(",")[1]) for pair in e.attrib["points"].split()] for e in lines]
    up, down = heights[0][0] - heights[0][1], heights[1][1] - heights[1][0]
    assert up / down == pytest.approx(math.log(20) / math.log(4), rel=0.01)


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5))
def test_ticks_are_few_round_and_within_the_range(low, span):
    numbers = ticks(low, low + span)
    assert 2 <= len(numbers) <= 8
    assert all(low - 1e-6 * span <= t <= low + span + 1e-6 * span for t in numbers)

"""Curves as SVG: well-formed whatever the points, and drawn inside the picture."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

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


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5))
def test_ticks_are_few_round_and_within_the_range(low, span):
    numbers = ticks(low, low + span)
    assert 2 <= len(numbers) <= 8
    assert all(low - 1e-6 * span <= t <= low + span + 1e-6 * span for t in numbers)

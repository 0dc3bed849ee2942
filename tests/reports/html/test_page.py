"""A page is one file that asks for nothing, whatever its texts are."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from runner.reports.html import sections
from runner.reports.html.page import Page, page_json, render

HOSTILE = "</script><script>alert(1)</script><!--\u2028\u2029\ud800&"


def page_of(*parts: sections.Part, title: str = "run", folder: Path = Path("run")) -> Page:
    return Page(kind="run", title=title, folder=folder, parts=parts)


def test_the_file_names_nothing_outside_itself() -> None:
    html = render(page_of(sections.text("note", ["x"])))
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", html, flags=re.S)
    assert re.findall(r"(?:src|href|action|srcset)=(\S*?)>", markup) == ['"data:,"']
    assert "http" not in markup.replace("http-equiv", "")


def test_the_policy_allows_exactly_the_scripts_and_styles_of_the_file() -> None:
    html = render(page_of())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy and policy[1].startswith("default-src 'none'") and "unsafe" not in policy[1]
    assert "connect-src" not in policy[1]
    contents = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", html, re.S)
    hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
    assert len(hashes) == 4 and re.findall(r"'sha256-([^']*)'", policy[1]) == [*hashes[2:], *hashes[:2]]
    assert "connect-src 'self'" in render(page_of(), refresh=2.0)


def test_no_text_ends_the_script_element_that_holds_it() -> None:
    page = page_of(sections.text(HOSTILE, [HOSTILE], code=True), title=HOSTILE)
    data = page_json(page)
    assert not set("<>&\u2028\u2029") & set(data) and data.isascii()
    shown = HOSTILE.replace("\u2028", "·").replace("\u2029", "·")
    assert json.loads(data)["parts"][0]["lines"] == [shown]
    html = render(page)
    assert html.count("<script") == 3 and "&lt;/script&gt;" in html  # in the title


def test_the_licence_of_the_library_goes_with_it() -> None:
    html = render(page_of())
    assert "Permission is hereby granted, free of charge" in html and "leeoniya/uPlot" in html


def test_numbers_that_json_does_not_have_are_left_out() -> None:
    curve = sections.Curve(name="loss", x={"step": [1, 2, 3]}, y=[float("nan"), 1.23456789, float("inf")])
    chart = sections.chart("Loss", [curve], y="loss")
    table = sections.table("t", [sections.Column(title="a")], [sections.Row(cells=[float("nan")])], id="t")
    data = json.loads(page_json(page_of(sections.charts("c", [chart], id="c"), table)))
    assert data["parts"][0]["charts"][0]["curves"][0]["y"] == [None, 1.23457, None]
    assert data["parts"][1]["rows"][0]["cells"] == [None]


def test_a_link_stays_a_relative_path() -> None:
    assert sections.href("javascript:alert(1)/report.html") == "./javascript%3Aalert%281%29/report.html"
    assert sections.href("../report.html") == "./../report.html"
    assert sections.link("1", None)["href"] is None

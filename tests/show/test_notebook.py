"""A result in a notebook: the report's pictures in a frame that nothing gets out of."""

from __future__ import annotations

import re
import sys
from html import unescape

import pytest
from made_results import find_result, made_results, measurement
from markupsafe import escape

from surgeon.result import Result, record, result
from surgeon.show.pictures import pictures_of
from surgeon.show.pictures.picture import Table


def framed(html: str) -> str:
    """The page inside the frame."""
    (frame,) = re.findall(r'<iframe sandbox srcdoc="([^"]*)"', html)
    return unescape(frame)


@pytest.mark.parametrize("kind", made_results())
def test_every_kind_has_its_pictures(kind: str):
    result = made_results()[kind]
    page = framed(result._repr_html_())
    assert page.count("<section>") >= 1
    assert "default-src 'none'" in page
    assert f"<pre>{escape(result.provenance.command or '')}</pre>" in page
    assert "From <a" not in page  # there is no file


def test_nothing_of_a_text_gets_out_of_the_frame():
    hostile = '"></iframe><script>alert(1)</script>\u202e\x00'
    html = measurement(hostile)._repr_html_()
    assert "<script" not in html
    assert html.count("<iframe") == html.count("</iframe>") == 1
    assert "<script" not in framed(html)
    assert "\u202e" not in framed(html)


def test_without_the_extra_the_fields_are_shown(monkeypatch: pytest.MonkeyPatch):
    drawing = ("surgeon.show.page.page", "surgeon.show.pictures.")
    for name in [m for m in sys.modules if m.startswith(drawing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "altair", None)
    html = find_result("<b>")._repr_html_()
    assert html.startswith("<pre>FindResult(&lt;b&gt;)")


def test_a_kind_without_pictures_of_its_own_is_shown_by_its_fields():
    @record
    class Part:
        name: str
        share: float

    @result("strange")
    class Strange(Result):
        """What it is."""

        damage_nats: float
        found: bool
        parts: list[Part]

    values, parts = pictures_of(Strange(0.25, True, [Part("a", 0.5), Part("b", 1.0)]))
    assert values.about == "What it is."
    assert values.shown == Table(("field", "value"), [("damage nats", 0.25), ("found", "yes")])
    assert parts.headline == "Parts: 2 rows"
    assert parts.shown == Table(["name", "share"], [["a", 0.5], ["b", 1.0]], of=2)

"""Sections of the screen and the map in the report, from what they write, with hostile names."""

from __future__ import annotations

import json
import re
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cells_tiny import GENES, tiny

from surgeon.anatomy import Region
from surgeon.cells.enrich import EnrichConfig
from surgeon.cells.map import MapConfig, map_damage
from surgeon.cells.planted import plant
from surgeon.errors import BadInput
from surgeon.show.page import write_report
from surgeon.studies.cells import ScreenConfig, screen

HOSTILE = "<script>alert(1)</script>\" onload='x'"


@cache
def screened() -> str:
    t = tiny()
    config = ScreenConfig(each=1, verify=2, min_share=0.9, controls_check=True)
    types = [HOSTILE if name == "even" else name for name in t.types]
    result = screen(t.model, t.batch, t.masked[:1], t.baseline[:1], types, config)
    return json.dumps({"model": HOSTILE, **result.to_json()})


@cache
def mapped() -> str:
    t = tiny()
    made = plant(t.model, t.batch, t.masked[:1])
    donors = [f"{HOSTILE}{i % 6}" for i in range(len(t.types))]
    result = map_damage(
        made.model,
        t.batch,
        t.masked[:1],
        [Region.parse(made.address)],
        {HOSTILE: GENES[::2], "odd": GENES[1::2]},
        t.types,
        (HOSTILE, t.types),
        (HOSTILE, donors),
        MapConfig(null=2, enrich=EnrichConfig(permutations=50)),
    )
    points = [
        {"x": float(i), "y": float(-i), "nats": v} for i, v in enumerate(result.by_cell.values())
    ]
    return json.dumps(
        {"model": HOSTILE, **result.to_json(), "embedding": {"name": HOSTILE, "points": points}}
    )


def page(folder: Path, **documents: dict[str, Any]) -> str:
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    return write_report(folder).read_text(encoding="utf-8")


def kinds(text: str) -> list[str]:
    return [unescape(k) for k in re.findall(r'<p class="kind">(.*?)</p>', text)][1:]


def test_none_found_reads_as_a_result(tmp_path: Path):
    text = page(tmp_path, screen=json.loads(screened()))
    assert kinds(text) == [
        "The screen",
        "Candidates pruned one by one",
        "Damage by cell type",
        "Cell types from the embeddings",
        "The screen's own controls",
    ]
    headline = unescape(re.findall(r"<h2>(.*?)</h2>", text, re.DOTALL)[0])
    assert headline.startswith("None found among ")
    assert "of the model's lead (matched controls: " in headline
    assert "not biomarkers" in text


def test_a_map_has_a_section_for_each_part(tmp_path: Path):
    text = page(tmp_path, map=json.loads(mapped()))
    assert kinds(text) == [
        "Genes by damage",
        "Damage and difficulty",
        "Cells by damage",
        "Damage by cell type",
        "Pathways beside the equal-damage null",
        "Heads and MLP blocks",
        "By condition",
    ]
    assert "Arbitrary weights of equal damage have" in text


def test_names_stay_text(tmp_path: Path):
    text = page(tmp_path, screen=json.loads(screened()), map=json.loads(mapped()))
    assert "<script" not in text
    seen: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: seen.update(name for name, _ in attrs)  # type: ignore[method-assign]
    parser.feed(text)
    assert "class" in seen
    assert "onload" not in seen
    assert "&lt;script&gt;" in text


def test_a_map_without_gene_sets_or_donors_has_no_such_sections(tmp_path: Path):
    bare = {
        **json.loads(mapped()),
        "enrichment": {},
        "donors": None,
        "embedding": None,
        "components": [],
        "by_type": {},
    }
    text = page(tmp_path, map=bare)
    assert kinds(text) == ["Genes by damage", "Damage and difficulty", "By condition"]
    assert "without a test" in text


def test_a_damaged_document_is_named(tmp_path: Path):
    broken = {**json.loads(screened()), "candidates": [{}]}
    with pytest.raises(BadInput, match=r"cells screen\.candidates lacks"):
        page(tmp_path, screen=broken)

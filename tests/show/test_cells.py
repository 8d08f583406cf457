"""Sections on models of gene expression: what they say of none found, and of what is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made_cells import AT, cell_map, cell_screen, verified
from made_results import controls, provenance

from surgeon.show.page import write_report
from surgeon.show.pictures.cells import screen_pictures
from surgeon.show.text import print_result

SCREEN = cell_screen("m", provenance, controls("m"))


def test_none_found_reads_as_a_result(capsys: pytest.CaptureFixture[str]):
    first, *_, own = screen_pictures(SCREEN)
    assert first.headline == (
        "None found among 2 candidates: the worst, L0.mlp.down[3, 5] costs +0.0050 nats without it,"
        " 5.0% of the model's lead (matched controls: +0.0100 at worst)"
    )
    assert own.headline.endswith("the rescaled neuron not found: as it must be")
    print_result(SCREEN)
    assert "Verdict: none found. The rule: m." in capsys.readouterr().out


def test_what_is_found_is_named(capsys: pytest.CaptureFixture[str]):
    one = replace(SCREEN.candidates[0], verified=verified("m", controls("m"), True, [AT]))
    found = replace(SCREEN, candidates=[one])
    assert (found.verdict, found.entries) == ("found", [AT])
    assert next(screen_pictures(found)).headline.startswith("Found: L0.mlp.down[3, 5] costs")
    print_result(found)
    assert "Verdict: found: L0.mlp.down[3, 5]. The rule" in capsys.readouterr().out


def test_a_map_without_gene_sets_or_donors_has_no_such_sections(run_folder: Callable[..., Path]):
    whole = cell_map("m", provenance)
    bare = replace(whole, enrichment={}, donors=None, embedding=None, components=[], by_type={})
    page = write_report(run_folder(map=bare)).read_text(encoding="utf-8")
    assert "without a test" in page
    assert "Pathways" not in page
    assert "Heads and MLP blocks" not in page

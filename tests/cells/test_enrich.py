"""Enrichment: gseapy's figures against independent ones, the background, and what residualising
takes out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats

from surgeon.cells.enrich import (
    EnrichConfig,
    enrich,
    read_gmt,
    residualise,
    spearman,
)
from surgeon.errors import BadInput, SurgeonError

GENES = [f"G{i}" for i in range(300)]


def scores(seed: int = 0) -> torch.Tensor:
    return torch.randn(300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_planted_set_is_first_and_random_sets_are_not_significant():
    ranked = scores()
    order = ranked.argsort(descending=True).tolist()
    sets = {"planted": [GENES[i] for i in order[:40:2]]} | {
        f"random {j}": [
            GENES[i]
            for i in torch.randperm(300, generator=torch.Generator().manual_seed(j + 1))[
                :20
            ].tolist()
        ]
        for j in range(6)
    }
    found = enrich(GENES, ranked, sets)
    assert found[0].name == "planted"
    assert found[0].p == pytest.approx(1e-3)  # never below one over the permutations
    assert found[0].fdr < 0.01
    assert min(p.over_p for p in found[1:]) > 0.01
    assert set(found[0].leading) <= set(sets["planted"])


def test_the_enrichment_score_is_the_largest_deviation_of_a_running_sum():
    ranked = scores(3)
    members = [GENES[i] for i in range(0, 300, 13)]
    centred = ranked - ranked.mean()
    order = centred.argsort(descending=True).tolist()
    hit = torch.tensor([GENES[i] in members for i in order])
    size = centred[order].abs() * hit
    walk = (size / size.sum()).cumsum(0) - ((~hit).double() / (~hit).sum()).cumsum(0)
    expected = float(walk[walk.abs().argmax()])
    found = {p.name: p for p in enrich(GENES, ranked, {"a": members, "b": GENES[:30]})}
    assert found["a"].es == pytest.approx(expected, abs=1e-5)


def test_over_representation_is_hypergeometric_on_the_scored_genes_only():
    ranked = scores(1)
    top = {GENES[i] for i in ranked.argsort(descending=True)[:30].tolist()}
    members = [*sorted(top)[:8], *[g for g in GENES if g not in top][:12]]
    unscored = [f"never scored {i}" for i in range(500)]
    (found,) = enrich(GENES, ranked, {"set": [*members, *unscored]})
    assert (found.genes, found.over_overlap) == (20, 8)
    assert found.over_p == pytest.approx(stats.hypergeom.sf(7, 300, 20, 30), rel=1e-6)


def test_a_set_without_a_gene_among_the_top_counts_as_a_test():
    ranked = scores(2)
    order = ranked.argsort(descending=True).tolist()
    found = enrich(
        GENES,
        ranked,
        {"top": [GENES[i] for i in order[:10]], "bottom": [GENES[i] for i in order[-10:]]},
    )
    by_name = {p.name: p for p in found}
    assert by_name["bottom"].over_p == 1.0
    assert by_name["top"].over_fdr == pytest.approx(2 * by_name["top"].over_p)


def test_residuals_know_nothing_of_the_difficulty():
    difficulty = scores(4).abs()
    signal = scores(5) * 0.01
    damage = 0.3 * difficulty - 0.05 * difficulty**2 + signal
    residual = residualise(damage, difficulty)
    assert spearman(damage, difficulty) > 0.9
    assert abs(float(torch.corrcoef(torch.stack([residual, difficulty]))[0, 1])) < 1e-9
    assert float(torch.corrcoef(torch.stack([residual, signal]))[0, 1]) > 0.98


def test_spearman_as_in_scipy():
    a, b = scores(6).round(decimals=1), scores(7).round(decimals=1) + 0.5 * scores(6)
    assert spearman(a, b) == pytest.approx(
        stats.spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12
    )


def test_gmt_files_are_read_and_bad_ones_refused(tmp_path: Path):
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("T cell\thand\tCD3D\tCD3E\tCD3E\n\nB cell\t\tMS4A1\n")
    assert read_gmt(gmt) == {"T cell": ["CD3D", "CD3E"], "B cell": ["MS4A1"]}
    for text, says in (
        ("alone\n", "line 1"),
        ("", "holds no gene set"),
        ("a\tb\tG\na\tb\tG\n", "twice"),
    ):
        gmt.write_text(text)
        with pytest.raises(BadInput, match=says):
            read_gmt(gmt)
    with pytest.raises(BadInput, match="cannot be read"):
        read_gmt(tmp_path / "none.gmt")


def test_sets_that_share_too_few_genes_are_refused_with_the_overlap():
    with pytest.raises(BadInput, match="the largest overlap is 2"):
        enrich(GENES, scores(), {"ensembl": ["ENSG1", "G1", "G2"]})
    with pytest.raises(SurgeonError, match="all the same"):
        enrich(GENES, torch.ones(300, dtype=torch.float64), {"a": GENES[:20]})
    with pytest.raises(BadInput, match="min_size"):
        EnrichConfig(min_size=0)

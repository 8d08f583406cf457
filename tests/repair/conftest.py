"""Tiny models with a row that matters, and text that they themselves wrote, so that any injury
costs them something.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import tiny_model

from surgeon.anatomy import Anatomy, Site
from surgeon.corpus import Corpus

Patient = Callable[..., tuple[Anatomy, Corpus]]
ROW, COLUMNS = 5, (7, 11, 30)


@pytest.fixture(scope="session")
def patient() -> Patient:
    """patient("gpt2", torch.bfloat16, site) -> its anatomy, with three large entries in row 5 of
    the site, and 40 windows of 24.
    """

    def make(
        kind: str = "llama", dtype: torch.dtype = torch.float32, site: str = "L0.mlp.down"
    ) -> tuple[Anatomy, Corpus]:
        model = tiny_model(kind)
        anatomy = Anatomy.of(model)
        view = anatomy.view(Site.parse(site))
        # for each of these neurons there is another that does nearly the same, so that much can be
        # made good
        for role in ("mlp.gate", "mlp.up"):
            twins = Site(view.site.layer, role, view.site.expert)
            if twins in anatomy.addresses:
                matrix = anatomy.view(twins).read().clone()
                matrix[list(COLUMNS)] = 0.8 * matrix[[c + 1 for c in COLUMNS]]
                anatomy.view(twins).assign_(matrix)
        rows, cols = torch.full((len(COLUMNS),), ROW), torch.tensor(COLUMNS)
        view.set_(rows, cols, torch.full((len(COLUMNS),), 8.0))
        model.to(dtype)
        generator = torch.Generator().manual_seed(0)
        ids = torch.ones(40, 1, dtype=torch.long)
        with torch.no_grad():
            for _ in range(23):
                p = model(input_ids=ids).logits[:, -1].float().softmax(-1)
                ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
        return anatomy, Corpus("own words", ids, True)

    return make

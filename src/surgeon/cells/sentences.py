"""Cell sentences: the names of a cell's genes, highest expressed first, as text for causal language
models.

With them a GPT-2, Pythia or Gemma trained on such text is a text model like any other: `surgeon
find MODEL --text FILE`.
Source: Levine et al. 2024, Cell2Sentence, doi:10.1101/2023.09.11.557287.
"""

from __future__ import annotations

import numpy as np

from ..errors import BadInput
from .data import Expression


def cell_sentences(expression: Expression, genes: int = 100, seed: int = 0) -> list[str]:
    """One line a cell: its `genes` highest expressed genes, parted by spaces. Ties, of which counts
    have many, are broken at random.

    Raises: BadInput for fewer than one gene, for names with spaces in them, or if no cell has a
    detected gene; cells without are left out.
    """
    if genes < 1:
        raise BadInput(f"sentences of {genes} genes say nothing; use at least 1.")
    if broken := [
        name for name in expression.gene_names if name != "".join(name.split()) or not name
    ]:
        raise BadInput(
            f"the gene name {broken[0]!r} has a space in it or is empty, so a sentence cannot be"
            " read back; rename it."
        )
    random = np.random.default_rng(seed)
    lines = []
    for i in range(len(expression.cell_names)):
        row = expression.matrix[i]
        # lexsort's last key comes first: expression, then chance
        order = np.lexsort((random.random(len(row.data)), -row.data))[:genes]
        if len(order):
            lines.append(" ".join(expression.gene_names[j] for j in row.indices[order]))
    if not lines:
        raise BadInput("no cell has a detected gene, so there is nothing to write.")
    return lines

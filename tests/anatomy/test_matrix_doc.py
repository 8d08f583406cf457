"""docs/architectures.md is what the matrix of tiny models shows; this test walks it and writes
it.
"""

from pathlib import Path

import pytest
from tiny import CONFIGS, tiny_model

from surgeon.anatomy import TABLE, Anatomy, prove

DOC = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Architectures

Written by `tests/anatomy/test_matrix_doc.py`, which builds each architecture from a tiny
configuration, draws its map and proves it by experiment (see `src/surgeon/anatomy/probe.py`).
`proved` are the roles that passed; `out_in` and `in_out` say how the model stores `mlp.down`; rows
are output channels everywhere in Surgeon.

| model_type | class | mlp.down is | stored | proved | experts |
|---|---|---|---|---|---|
"""


def row(model_type: str) -> str:
    model = tiny_model(model_type)
    anatomy = Anatomy.of(model)
    proved = sorted({s.role for s in prove(anatomy, range(len(anatomy.layers)))})
    site = anatomy.downs(0)[0]
    address = anatomy.addresses[site]
    stored = "in_out" if address.packing.transposed else "out_in"
    experts = len(anatomy.downs(0)) if anatomy.has_experts(0) else ""
    return (
        f"| {model_type} | {type(model).__name__} | `{address.parameter}` | {stored} |"
        f" {', '.join(proved)} | {experts} |\n"
    )


@pytest.mark.slow
def test_the_matrix_is_written_down():
    text = HEAD + "".join(row(t) for t in CONFIGS)
    others = sorted(set(TABLE) - set(CONFIGS))
    text += (
        "\nAlso in the table, with the layout of llama, and not in the matrix:"
        f" {', '.join(others)}.\n"
    )
    text += (
        "Any other architecture is tried by structure, and takes a `Layout` of your own where that"
        " fails.\n"
    )
    old = DOC.read_text() if DOC.exists() else ""
    DOC.write_text(text)
    assert old == text, (
        "docs/architectures.md was out of date; it has been written anew, look at it and commit it"
    )

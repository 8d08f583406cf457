"""`surgeon sites`: every addressable site."""

from __future__ import annotations

import click
from rich.table import Table

from ..show.console import out, print_table
from .common import json_option, model_options, open_anatomy, print_json


@click.command("sites")
@model_options
@json_option
def command(model: str, dtype: str, device: str, as_json: bool) -> None:
    """List every addressable site of MODEL with its shape (out, in), how it is stored, and
    where.
    """
    anatomy, fingerprint = open_anatomy(model, dtype, device)
    rows = []
    for site, address in anatomy.addresses.items():
        view = anatomy.view(site)
        stored = "(in, out)" if address.packing.transposed else "(out, in)"
        part = "" if address.packing.rows is None else "part of a fused weight"
        rows.append(
            {
                "site": str(site),
                "shape": list(view.shape),
                "stored": stored,
                "part": part,
                "parameter": address.parameter,
                "dtype": str(view.dtype).removeprefix("torch."),
                "tied_to": [str(s) for s in anatomy.tied_to(site)],
            }
        )
    if as_json:
        print_json(
            {
                "model": model,
                "fingerprint": fingerprint,
                "source": anatomy.source,
                "layers": len(anatomy.layers),
                "sites": rows,
            }
        )
        return
    table = Table("site", "out", "in", "stored", "parameter", "", box=None, header_style="bold")
    for row in rows:
        tied = f"tied to {', '.join(row['tied_to'])}" if row["tied_to"] else row["part"]  # type: ignore[arg-type]
        table.add_row(
            *map(str, (row["site"], *row["shape"], row["stored"], row["parameter"], tied))  # type: ignore[misc]
        )
    print_table(table)
    out.print(
        f"{len(rows)} sites in {len(anatomy.layers)} layers; the map was found by {anatomy.source}"
        " and proved by experiment."
    )

"""`sites`: every weight matrix that has an address."""

from __future__ import annotations

from dataclasses import dataclass

from ..anatomy import Site
from ..patch.content import dtype_name
from ..result import Result, record, result
from .lab import Lab


@dataclass(frozen=True)
class Settings:
    """List every addressable site of MODEL: its shape (out, in), how it is stored, and where."""


@record
class SiteRecord:
    """One site. stored: its orientation there. part: "" or "part of a fused weight"."""

    site: Site
    shape: tuple[int, int]
    stored: str
    part: str
    parameter: str
    dtype: str
    tied_to: list[Site]


@result("sites")
class SiteList(Result):
    """Every site of a model, whose map was found by `source` and proved by experiment."""

    source: str
    layers: int
    sites: list[SiteRecord]

    def rows(self) -> list[dict[str, object]]:
        """A row for each site; its dtype as `weight_dtype`, beside that of a sweep's task."""
        return [
            {
                "site": one.site,
                "out": one.shape[0],
                "in": one.shape[1],
                "stored": one.stored,
                "part": one.part,
                "parameter": one.parameter,
                "weight_dtype": one.dtype,
                "tied_to": one.tied_to,
            }
            for one in self.sites
        ]


def run(lab: Lab, settings: Settings) -> SiteList:
    anatomy = lab.anatomy
    sites = []
    for site, address in anatomy.addresses.items():
        view = anatomy.view(site)
        sites.append(
            SiteRecord(
                site,
                view.shape,
                "(in, out)" if address.packing.transposed else "(out, in)",
                "" if address.packing.rows is None else "part of a fused weight",
                address.parameter,
                dtype_name(view.dtype),
                anatomy.tied_to(site),
            )
        )
    provenance = lab.provenance(settings)
    return SiteList(anatomy.source, len(anatomy.layers), sites, provenance=provenance)

"""Where to look: weights with the largest |w·x| among what MLPs write, and among norms.

|w·x| and never |w| or |x|: a neuron scaled by 1000 whose output weights are divided by 1000 is the
same neuron. Post-norm encoders carry their outliers in the norms, so every scale (what it
multiplies is the standardised state) and shift is looked at too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..anatomy import Anatomy, Region, Site
from ..progress import Tell, silent
from ..result import derived, record
from ..tap import Tap
from .likelihood import CHUNK, MaskedNLL

EACH = 4


@record
class Candidate:
    """An entry to be tried.

    write: the largest |w·x| over all positions of all cells. height: the same over the root mean
    square of that figure in its matrix or vector. probe_nats: what the entry costs alone, once that
    is measured.
    """

    address: Region
    weight: float
    write: float
    height: float
    probe_nats: float | None = None

    @derived
    def kind(self) -> str:
        """mlp, scale or shift."""
        return _kind(self.address.site)


def screened(anatomy: Anatomy) -> list[Site]:
    """The sites a screen looks at: what MLPs write, then every scale and shift of a norm, from the
    first to the last.
    """
    norms = [s for s in anatomy.addresses if s.role.startswith("norm.")]
    return anatomy.downs() + sorted(norms, key=lambda site: site.layer is not None)


@torch.no_grad()
def candidates(nll: MaskedNLL, sites: Sequence[Site], each: int = EACH) -> list[Candidate]:
    """The `each` entries of every site that write most on these cells, largest height first. What
    stands at padding is not looked at.
    """
    found = []
    for site, write in _writes(nll, sites).items():
        weight = nll.anatomy.view(site).read()
        usual = float(write.double().square().mean().sqrt())
        for flat in write.flatten().topk(min(each, write.numel())).indices.tolist():
            row, col = divmod(flat, write.shape[1])
            height = float(write[row, col]) / usual if usual > 0 else 0.0
            numbers = (float(weight[row, col]), float(write[row, col]), height)
            found.append(Candidate(Region(site, row, col), *numbers))
    return sorted(found, key=lambda c: (-c.height, str(c.address)))


def prune(nll: MaskedNLL, tried: Sequence[Candidate], tell: Tell = silent) -> list[Candidate]:
    """Each candidate with its damage alone, most damaging first."""
    nats: dict[Region, float] = {}
    for candidate in tried:
        nats[candidate.address] = nll.cost([candidate.address])
        tell("candidates", len(nats), len(tried))
    measured = [replace(one, probe_nats=nats[one.address]) for one in tried]
    return sorted(measured, key=lambda c: (-nats[c.address], str(c.address)))


def _kind(site: Site) -> str:
    if site.role == "mlp.down":
        return "mlp"
    return "shift" if site.role.endswith(".bias") else "scale"


def _writes(nll: MaskedNLL, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The largest |w·x| of every entry, (out, in) of each site."""
    anatomy, kept = nll.anatomy, Tensor()
    peaks: dict[Site, Tensor] = {}  # of a neuron that enters, or of a channel before its shift

    def watch(site: Site, shift: Tensor | float, states: Tensor) -> None:
        rows = (states - shift).flatten(0, -2)[kept.to(states.device)]
        peak = rows.abs().amax(0)
        peaks[site] = torch.maximum(peaks[site], peak) if site in peaks else peak

    with Tap() as tap:
        for site in sites:
            module = anatomy.module(site)
            if _kind(site) == "mlp":
                tap.on_input(module, partial(watch, site, 0.0))
            elif _kind(site) == "scale":
                shift = getattr(module, "bias", None)
                tap.on_output(module, partial(watch, site, 0.0 if shift is None else shift))
        for piece in nll.batch.pieces(CHUNK):
            kept = ~nll.batch.padding[piece].flatten()
            nll.see(piece)
    writes = {}
    for site in sites:
        size = anatomy.view(site).read().abs()
        kind = _kind(site)
        writes[site] = size if kind == "shift" else peaks[site][:, None]
        if kind == "mlp":
            writes[site] = size * peaks[site]
    return writes

"""Injuries: patches that take weights out.

Beside them stands what holds one channel of the residual stream while weights are out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..anatomy import Anatomy, Entry, Region, Site
from ..errors import BadInput
from ..tap import Tap
from .deltas import differ, wide
from .patch import Patch

MODES = {
    "zero": "0",
    "mean": "the mean of its matrix",
    "median": "the median of its matrix",
    "scale:F": "F times itself",
    "flip": "its negative",
    "spread:N": (
        "0, its value going in equal parts to the N largest |w| of the same row that are not"
        " injured"
    ),
}


def ablate(anatomy: Anatomy, regions: Sequence[Region | Entry | str], mode: str = "zero") -> Patch:
    """The patch that replaces every entry of `regions`, as `mode` says (see MODES).

    The new values are computed in float32 or wider. Of a norm they are those of its scale, also
    where the model stores the scale less one.
    Raises: BadInput for an unknown mode, no region at all, or more entries to spread onto than a
    row has; UnknownSite.

    >>> import surgeon
    >>> anatomy = Anatomy.of(surgeon.load_model("patient").model)
    >>> injury = ablate(anatomy, ["L0.mlp.down[88, 165]", "L0.mlp.down[90, :]"])
    >>> int(injury.touched(Site(0, "mlp.down")).sum())
    513
    """
    if not regions:
        raise BadInput(
            "no entries to ablate were given; name at least one, like L0.mlp.down[88, 165]."
        )
    name, number = _parse(mode)
    named: dict[Site, Tensor] = {}
    for region in (anatomy.region(str(r)) for r in regions):
        if region.site not in named:
            named[region.site] = torch.zeros(anatomy.view(region.site).shape, dtype=torch.bool)
        rows = slice(None) if region.row is None else region.row
        cols = slice(None) if region.col is None else region.col
        named[region.site][rows, cols] = True
    matrices = {}
    for site, mask in named.items():
        old = anatomy.view(site).read().cpu()
        weight = old.to(wide(old.dtype))
        zero = anatomy.stored_zero(site)  # a norm may store its scale less one
        if zero == 0:
            after = _replaced(site, weight, mask, name, number)
        else:
            after = _replaced(site, weight - zero, mask, name, number) + zero
        # untouched entries are taken from `old`: a NaN may not survive float32 and back
        matrices[site] = torch.where(differ(after, weight), after.to(old.dtype), old)
    return Patch.from_matrix(anatomy, matrices, {"operation": "ablate", "mode": mode}, named)


def known_mode(mode: str) -> str:
    """The mode as it is. Raises: BadInput for one that `ablate` does not know."""
    _parse(mode)
    return mode


def injured(
    anatomy: Anatomy, regions: Sequence[Region | Entry | str], mode: str = "zero"
) -> AbstractContextManager[None]:
    """`ablate`d within the `with` block, and intact again on any exit."""
    return ablate(anatomy, regions, mode).applied(anatomy)


def record_channel(
    anatomy: Anatomy, site: Site, channel: int, input_ids: Int64[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """What the module of `site` writes to one output channel, at every position.

    Raises: BadInput if there is no such channel.
    """
    _check_channel(anatomy, site, channel)
    written: list[Tensor] = []
    module = anatomy.module(site)
    with Tap() as tap, torch.no_grad():
        tap.on_output(module, lambda y: written.append(y[..., channel].clone()))
        tap.stop_after(module)
        tap.run(anatomy.model, input_ids)
    # some modules see batch and positions flattened into one axis
    return written[0].reshape(input_ids.shape)


@contextmanager
def restored_channel(
    anatomy: Anatomy, site: Site, channel: int, values: Float[Tensor, "batch pos"]
) -> Iterator[None]:
    """Within the block, `values` take the place of what `site` writes to one output channel.

    With values recorded in the intact model this answers whether an injury acts through that
    channel alone.
    Raises: BadInput if there is no such channel, or if the model is run on inputs of another shape.

    >>> import surgeon
    >>> anatomy = Anatomy.of(surgeon.load_model("patient").model)
    >>> site, ids = Site(0, "mlp.down"), torch.tensor([[0, 17, 42]])
    >>> intact = record_channel(anatomy, site, 88, ids)
    >>> with injured(anatomy, ["L0.mlp.down[88, :]"]), restored_channel(anatomy, site, 88, intact):
    ...     logits = anatomy.model(ids).logits
    >>> torch.allclose(logits, anatomy.model(ids).logits, atol=1e-4)
    True
    """
    _check_channel(anatomy, site, channel)

    def overwrite(y: Tensor) -> Tensor:
        if y[..., channel].numel() != values.numel():
            raise BadInput(
                f"the channel was recorded for inputs of shape {tuple(values.shape)}; run the model"
                " on those."
            )
        y = y.clone()
        y[..., channel] = values.to(y).reshape(y.shape[:-1])
        return y

    with Tap() as tap:
        tap.on_output(anatomy.module(site), overwrite)
        yield


def _replaced(
    site: Site,
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    mode: str,
    number: float,
) -> Float[Tensor, "out in"]:
    """The matrix with the entries under `mask` replaced."""
    if mode == "mean":
        return torch.where(mask, weight.mean(), weight)
    if mode == "median":
        return torch.where(mask, weight.median(), weight)
    if mode == "scale":
        return torch.where(mask, weight * number, weight)
    if mode == "flip":
        return torch.where(mask, -weight, weight)
    after = weight.masked_fill(mask, 0)
    if mode == "spread":
        for row in mask.any(1).nonzero().flatten().tolist():
            hurt = mask[row]
            free = int((~hurt).sum())
            if number > free:
                raise BadInput(
                    f"spread:{number:.0f} needs that many uninjured entries in row {row} of {site},"
                    f" which has {free}; choose a smaller N."
                )
            sizes = weight[row].abs().masked_fill(hurt, -1)
            largest = sizes.argsort(descending=True, stable=True)[: int(number)]
            after[row, largest] += weight[row, hurt].sum() / number
    return after


def _parse(mode: str) -> tuple[str, float]:
    """The name of a mode and its number, which is 0 where it has none."""
    name, _, text = mode.partition(":")
    if mode in ("zero", "mean", "median", "flip"):
        return mode, 0.0
    try:
        number = float(text) if name == "scale" else float(int(text))
        if (name == "scale" and math.isfinite(number)) or (name == "spread" and number >= 1):
            return name, number
    except ValueError:
        pass
    modes = ", ".join(f"{m} ({what})" for m, what in MODES.items())
    raise BadInput(f"{mode!r} is not a way to ablate; an entry can become {modes}.")


def _check_channel(anatomy: Anatomy, site: Site, channel: int) -> None:
    n_out = anatomy.view(site).shape[0]
    if not 0 <= channel < n_out:
        raise BadInput(
            f"{site} has no output channel {channel}; it writes {n_out}, counted from 0."
        )

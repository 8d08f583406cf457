"""The published super weights as data, and the check of each against a checkpoint, of which only
the matrices concerned are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Entry, Site
from ..anatomy.folder import Shards
from ..anatomy.hub import open_shards
from ..anatomy.load import split_id
from ..errors import BadCheckpoint, BadInput, PackedWeight
from ..progress import Tell, silent
from ..result import derived, record

AGREES, DIFFERS, UNPRINTED = "agrees", "differs", "no printed value"
_HALF_STEP = 0.5e-4  # every printed value has four decimals


@record
class Published:
    """A published coordinate of `model` (a Hub id).

    weight: the printed value, None if none is known. evidence: "table" (printed in the paper),
    "repository" (the authors' code only) or "reported". status: "published", "corrected"
    (misprinted in the source), "set" (vital only with the others of its model) or "nearly inert".
    """

    model: str
    layer: int
    row: int
    col: int
    weight: float | None
    source: str
    evidence: str
    status: str
    note: str = ""

    @derived
    def entry(self) -> Entry:
        return Entry(Site(self.layer, "mlp.down"), self.row, self.col)

    @property
    def tensor(self) -> str:
        """The name in the checkpoint, stored as (out, in); the same in every family that has
        records.
        """
        return f"model.layers.{self.layer}.mlp.down_proj.weight"


@record
class Check(Published):
    """A published coordinate beside a checkpoint: the value found, and its rank by |weight| in its
    matrix (1 is the largest).
    """

    measured: float = field(kw_only=True)
    rank_abs: int = field(kw_only=True)
    shape: tuple[int, int] = field(kw_only=True)
    dtype: str = field(kw_only=True)
    verdict: str = field(kw_only=True)


def about() -> str:
    """What the list is, in two sentences."""
    return str(_data()["about"])


def published() -> list[Published]:
    """Every published coordinate, in the order of the paper's table, later ones last."""
    return [Published(**one) for one in _data()["records"]]


def records_of(model: str, as_name: str | None = None) -> list[Published]:
    """The records that belong to MODEL: by Hub id, by the folder's base name, or by `as_name` (an
    id or its last part).

    Raises: BadInput if there are none, with the names that are known.
    """
    path = Path(model)
    local = path.exists()
    wanted = as_name or (path.resolve().name if local else model.partition("@")[0])
    # a Hub id must match in full: a namesake of another owner is another model
    may_be_short = local or as_name is not None
    records = [
        one
        for one in published()
        if wanted == one.model or (may_be_short and wanted == one.model.rpartition("/")[2])
    ]
    if not records:
        known = ", ".join(dict.fromkeys(r.model for r in published()))
        raise BadInput(
            f"no published coordinates are known for {wanted!r}; there are some for {known}. "
            "If the model is a copy of one of these, say of which with ‹as_name›."
        )
    return records


def records_shaped(config: Any) -> list[Published]:
    """The records of models shaped as `config` (a text configuration) says: model type, layers,
    hidden and intermediate size.
    """
    sizes = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
    mine = [getattr(config, name, None) for name in sizes]
    models = {model for model, shape in _data()["shapes"].items() if shape == mine}
    return [r for r in published() if r.model in models]


def verify_published(
    model: str,
    records: Sequence[Published] | None = None,
    as_name: str | None = None,
    tell: Tell = silent,
) -> list[Check]:
    """Read each record's matrix in MODEL and set its weight beside the printed value.

    records: default, those of `records_of(model, as_name)`. A value agrees if the printed one, give
    or take half its last decimal, is stored as that value in the checkpoint's dtype; so a float16
    model saved as bfloat16 still agrees.

    Raises: BadInput (no such model, record, tensor or entry; the Hub would not give it),
    BadCheckpoint (damaged or not safetensors), PackedWeight (stored quantized).
    """
    if model != "patient" and not Path(model).exists():
        split_id(model)  # a mistyped folder is told from a model without records
    if records is None:
        records = records_of(model, as_name)
    shards = open_shards(model)
    checks: dict[Published, Check] = {}
    tensors = list(dict.fromkeys(one.tensor for one in records))
    for number, tensor in enumerate(tensors, 1):
        tell(tensor, number, len(tensors))
        here = [one for one in records if one.tensor == tensor]
        matrix = _matrix(shards, here)
        checks |= {one: _check(one, matrix, model) for one in here}
    return [checks[one] for one in records]


def _matrix(shards: Shards, records: Sequence[Published]) -> Tensor:
    """The matrix (out, in) that `records`, all of one layer, point into; refused before a byte of
    it is read.
    """
    name, site, meant = records[0].tensor, records[0].entry.site, records[0].model
    advice = f"so it is not {meant}; give that model, or name another with ‹as_name›"
    if name not in shards:
        module = name.removesuffix("weight")
        beside = [one.removeprefix(module) for one in shards if one.startswith(module)]
        packed = sorted(part for part in beside if part != "bias")
        if packed:
            raise PackedWeight(
                f"{shards.name} stores {site} as {', '.join(packed)}, which is quantized; give the"
                " original weights."
            )
        raise BadInput(f"{shards.name} has no tensor {name}, {advice}.")
    shards.check_plain(name)
    shape = shards.stored[name].shape
    for one in records:
        if len(shape) != 2 or one.row >= shape[0] or one.col >= shape[1]:
            raise BadInput(
                f"{shards.name} has no {one.entry}: {name} has shape {shape} as (out, in),"
                f" {advice}."
            )
    return shards.read(name)


def _check(one: Published, matrix: Tensor, model: str) -> Check:
    value = matrix[one.row, one.col]
    if not value.isfinite():
        raise BadCheckpoint(
            f"{one.entry} of {model} is {value.item()}, which is no weight; download the model"
            " again."
        )
    return Check(
        **vars(one),
        measured=value.item(),
        rank_abs=1 + int((matrix.abs() > value.abs()).sum()),
        shape=(matrix.shape[0], matrix.shape[1]),
        dtype=str(matrix.dtype).removeprefix("torch."),
        verdict=_verdict(one.weight, value),
    )


def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        (resources.files("surgeon.find") / "published.json").read_text(encoding="utf-8")
    )
    return data


def _verdict(printed: float | None, value: Tensor) -> str:
    if printed is None:
        return UNPRINTED
    low, high = torch.tensor([printed - _HALF_STEP, printed + _HALF_STEP], dtype=torch.float64).to(
        value.dtype
    )
    return AGREES if low <= value <= high else DIFFERS

"""From a site to the tensor of a checkpoint that stores it."""

# How this works.
#
# Names and packing in a checkpoint differ from those in memory: transformers renames tensors while
# it loads them, and stacks the matrices of a layer's experts into one parameter. Its own table of
# these conversions is read here, so that whatever it can load can be addressed.
#
# Each name of the checkpoint is taken the way of loading. Where no stacking meets it, it is a
# parameter of the model, perhaps under a new name: `whole`. Where it is stacked, it is a piece of a
# parameter: of one expert, and of one part along the output channels, such as gate or up: `pieces`.
# Conversions of any other kind are left out, so their tensors have no address.

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping

from ..errors import BadCheckpoint
from .anatomy import Address, Anatomy
from .site import Site
from .view import Packing

# an index into a parameter: all of it, or some rows of one expert
Slot = tuple[()] | tuple[int, slice]

_STACKING = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class _Piece:
    """A checkpoint tensor that becomes part of a stacked one.

    expert: which. part, parts: which of how many along the output channels.
    """

    name: str
    expert: int
    part: int
    parts: int


class TensorNames:
    """The tensors called `names` of a checkpoint, as `anatomy` sees them.

    The model of the anatomy may be on the meta device.
    """

    def __init__(self, anatomy: Anatomy, names: Iterable[str]) -> None:
        self.anatomy = anatomy
        self.whole: dict[str, str] = {}
        self.pieces: dict[str, list[_Piece]] = {}
        self.names = sorted(names)
        self._same = _same_parameters(anatomy)
        conversions: list[Any] = []
        if isinstance(anatomy.model, transformers.PreTrainedModel):
            conversions = get_model_conversion_mapping(anatomy.model)
        for name in self.names:
            self._sort_in(name, conversions)

    def find(self, site: Site) -> tuple[str, Packing]:
        """The tensor that stores `site`, and how it is packed there.

        Raises: BadCheckpoint with the nearest names; UnknownSite.
        """
        address = self.anatomy.addresses[self.anatomy.resolve(site)]
        for parameter in [address.parameter, *self._same[address.parameter]]:
            if parameter in self.whole:
                return self.whole[parameter], address.packing
        for piece in self.pieces.get(address.parameter, ()):
            if self._is_of(piece, address):
                return piece.name, replace(address.packing, expert=None, rows=None)
        near = difflib.get_close_matches(address.parameter, self.names, n=3, cutoff=0.3)
        raise BadCheckpoint(
            f"{site} is {address.parameter} in the model, which the checkpoint does not hold; the"
            f" nearest names are {', '.join(near or self.names[:3])}. Load the model with"
            " transformers and save it again, then use that copy."
        )

    def _is_of(self, piece: _Piece, address: Address) -> bool:
        """Whether the piece is what a site's address means, of the parameter it is part of."""
        rows = address.packing.rows
        start = rows.start if isinstance(rows, slice) else 0
        parameter = self.anatomy.model.get_parameter(address.parameter)
        n_out = address.packing.oriented(parameter).shape[0]
        part = start // (n_out // piece.parts)
        return piece.expert == address.packing.expert and piece.part == part

    def slots(self, parameter: str) -> list[tuple[str, Slot]]:
        """The tensors that make up a parameter of the model, and where each of them goes in it.

        Nothing if the checkpoint lacks any of them.
        """
        for name in self._same[parameter]:
            if name in self.whole:
                return [(self.whole[name], ())]
        pieces = self.pieces.get(parameter, [])
        shape = self.anatomy.model.get_parameter(parameter).shape
        if not pieces or len(pieces) != shape[0] * pieces[0].parts:
            return []
        slots: list[tuple[str, Slot]] = []
        for piece in pieces:
            rows = shape[1] // piece.parts
            start = piece.part * rows
            slots.append((piece.name, (piece.expert, slice(start, start + rows))))
        return slots

    def _sort_in(self, name: str, conversions: list[Any]) -> None:
        """Take a name the way of loading, and note where its tensor goes in the model."""
        memory = name
        stacked_from, converter, pattern = "", None, ""
        for conversion in conversions:
            is_converter = hasattr(conversion, "operations")
            if is_converter and converter is not None:
                continue
            renamed, matched = conversion.rename_source_key(memory)
            if is_converter and matched is not None:
                stacked_from, converter, pattern = memory, conversion, matched
            memory = renamed
        memory = self._with_prefix(memory)
        if converter is None:
            self.whole[memory] = name
            return
        operations = [type(operation).__name__ for operation in converter.operations]
        if operations not in _STACKING:
            return
        expert = re.search(pattern.replace("*.", r"(\d+)\."), stacked_from)
        if expert is not None:
            parts = converter.source_patterns
            piece = _Piece(name, int(expert[1]), parts.index(pattern), len(parts))
            self.pieces.setdefault(memory, []).append(piece)

    def _with_prefix(self, name: str) -> str:
        """The name with the model's prefix (`model.`) put on or taken off, whichever it has.

        A checkpoint of the base model lacks the prefix, and one of a model with a head has it.
        """
        prefix = f"{getattr(self.anatomy.model, 'base_model_prefix', '')}."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self._same:
                return candidate
        return name


def _same_parameters(anatomy: Anatomy) -> dict[str, list[str]]:
    """All names of the parameter of each name; a tied one has several, and is stored under any."""
    names: dict[int, list[str]] = {}
    for name, parameter in anatomy.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: same for same in names.values() for name in same}


def checkpoint_address(anatomy: Anatomy, site: Site, names: set[str]) -> tuple[str, Packing]:
    """The tensor among `names` that stores `site`, and how it is packed there.

    Raises: BadCheckpoint with the nearest names; UnknownSite.

    >>> import surgeon
    >>> anatomy = Anatomy.of(surgeon.load_model("patient").model)
    >>> names = {"model.layers.0.mlp.down_proj.weight", "lm_head.weight"}
    >>> checkpoint_address(anatomy, Site.parse("L0.mlp.down"), names)[0]
    'model.layers.0.mlp.down_proj.weight'
    """
    return TensorNames(anatomy, names).find(site)

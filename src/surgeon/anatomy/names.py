"""From a site to the tensor of a checkpoint that stores it: names and packing differ from those in
memory.

transformers renames tensors while it loads them, and stacks the experts of a layer into one. Its
own table of these conversions is read here, so that what it can load can be addressed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping

from ..errors import BadCheckpoint
from .anatomy import Anatomy
from .site import Site
from .view import Packing

Slot = (
    tuple[()] | tuple[int, slice]
)  # an index into a parameter: all of it, or some rows of one expert


@dataclass(frozen=True)
class _Piece:
    """A checkpoint tensor that becomes part of a stacked one: which expert, and which of how many
    along the output channels.
    """

    name: str
    expert: int
    part: int
    parts: int


class TensorNames:
    """The tensors called `names` of a checkpoint, as `anatomy` sees them; its model may be on the
    meta device.
    """

    def __init__(self, anatomy: Anatomy, names: Iterable[str]) -> None:
        self.anatomy = anatomy
        self.whole: dict[str, str] = {}
        self.pieces: dict[str, list[_Piece]] = {}
        self.names = sorted(names)
        parameters = {
            name: id(p) for name, p in anatomy.model.named_parameters(remove_duplicate=False)
        }
        self._same = {
            name: [n for n, other in parameters.items() if other == own]
            for name, own in parameters.items()
        }
        conversions: list[Any] = (
            get_model_conversion_mapping(anatomy.model)
            if isinstance(anatomy.model, transformers.PreTrainedModel)
            else []
        )
        for name in self.names:
            self._sort_in(name, conversions)

    def find(self, site: Site) -> tuple[str, Packing]:
        """The tensor that stores `site`, and how it is packed there.

        Raises: BadCheckpoint with the nearest names.
        """
        address = self.anatomy.addresses[self.anatomy.resolve(site)]
        # a tied weight may be stored under either name; its own comes first
        for parameter in [address.parameter, *self._same[address.parameter]]:
            if parameter in self.whole:
                return self.whole[parameter], address.packing
        for piece in self.pieces.get(address.parameter, ()):
            n_out = address.packing.oriented(
                self.anatomy.model.get_parameter(address.parameter)
            ).shape[0]
            rows = address.packing.rows
            start = rows.start if isinstance(rows, slice) else 0
            if piece.expert == address.packing.expert and piece.part == start // (
                n_out // piece.parts
            ):
                return piece.name, replace(address.packing, expert=None, rows=None)
        near = (
            difflib.get_close_matches(address.parameter, self.names, n=3, cutoff=0.3)
            or self.names[:3]
        )
        raise BadCheckpoint(
            f"{site} is {address.parameter} in the model, which the checkpoint does not hold; the"
            f" nearest names are {', '.join(near)}. Load the model with transformers and save it"
            " again, then use that copy."
        )

    def slots(self, parameter: str) -> list[tuple[str, Slot]]:
        """The tensors that make up a parameter of the model, and where each goes in it; nothing if
        the checkpoint lacks any of them.
        """
        for name in self._same[parameter]:
            if name in self.whole:
                return [(self.whole[name], ())]
        shape = self.anatomy.model.get_parameter(parameter).shape
        found: list[tuple[str, Slot]] = []
        for piece in self.pieces.get(parameter, ()):
            rows = shape[1] // piece.parts
            found.append(
                (piece.name, (piece.expert, slice(piece.part * rows, (piece.part + 1) * rows)))
            )
        complete = found and len(found) == shape[0] * self.pieces[parameter][0].parts
        return found if complete else []

    def _sort_in(self, name: str, conversions: list[Any]) -> None:
        memory, before, converter, pattern = name, "", None, ""
        for conversion in conversions:
            is_converter = hasattr(conversion, "operations")
            if is_converter and converter is not None:
                continue
            renamed, matched = conversion.rename_source_key(memory)
            if is_converter and matched is not None:
                before, converter, pattern = memory, conversion, matched
            memory = renamed
        memory = self._with_prefix(memory)
        if converter is None:
            self.whole[memory] = name
        elif [type(op).__name__ for op in converter.operations] in (
            ["MergeModulelist"],
            ["MergeModulelist", "Concatenate"],
        ):
            number = re.search(pattern.replace("*.", r"(\d+)\."), before)
            if number is not None:
                patterns = converter.source_patterns
                self.pieces.setdefault(memory, []).append(
                    _Piece(name, int(number[1]), patterns.index(pattern), len(patterns))
                )

    def _with_prefix(self, name: str) -> str:
        """A checkpoint of the base model lacks its prefix, and one of a model with a head has
        it.
        """
        prefix = f"{getattr(self.anatomy.model, 'base_model_prefix', '')}."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self._same:
                return candidate
        return name


def checkpoint_address(anatomy: Anatomy, site: Site, names: set[str]) -> tuple[str, Packing]:
    """The tensor among `names` that stores `site`, and how it is packed there.

    Raises: BadCheckpoint with the nearest names.
    """
    return TensorNames(anatomy, names).find(site)

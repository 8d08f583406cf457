"""Addresses of weights: a `Site` is a matrix, an `Entry` one scalar, a `Region` a part of a matrix.

Row = output channel, column = input neuron, always, however the model stores the matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering

from ..errors import BadInput

_SITE = re.compile(r"(?:L(?P<layer>\d+)\.)?(?P<role>[A-Za-z_][\w.]*?)(?:\.e(?P<expert>\d+))?")
_REGION = re.compile(r"\s*(?P<site>[^\[\]\s]+)\s*\[\s*(?P<row>\d+|:)\s*,\s*(?P<col>\d+|:)\s*\]\s*")


@total_ordering
@dataclass(frozen=True)
class Site:
    """The address of a weight matrix: which layer, which role, which expert.

    Written `L2.mlp.down`, `L4.mlp.down.e17` (expert 17), `embed`, `final_norm`. Sites sort by
    layer, those outside the layers first.

    >>> Site.parse("L4.mlp.down.e17")
    Site(layer=4, role='mlp.down', expert=17)
    >>> str(Site(2, "mlp.down"))
    'L2.mlp.down'
    """

    layer: int | None
    role: str
    expert: int | None = None

    def __lt__(self, other: Site) -> bool:
        mine, others = (
            (-1 if s.layer is None else s.layer, s.role, -1 if s.expert is None else s.expert)
            for s in (self, other)
        )
        return mine < others

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"L{self.layer}."
        expert = "" if self.expert is None else f".e{self.expert}"
        return f"{layer}{self.role}{expert}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read `L2.mlp.down` and the like. Raises: BadInput if the text has not that form."""
        match = _SITE.fullmatch(text.strip())
        if match is None:
            raise BadInput(
                f"{text!r} is not a site; write it like L2.mlp.down, L4.mlp.down.e17 or embed."
            )
        layer, expert = match["layer"], match["expert"]
        return cls(
            None if layer is None else int(layer),
            match["role"],
            None if expert is None else int(expert),
        )


@dataclass(frozen=True, order=True)
class Entry:
    """One scalar of a site: [row, column] = [output channel, input neuron], counted from 0.

    >>> entry = Entry.parse("L2.mlp.down[3968, 7003]")
    >>> entry.site.layer, entry.row, entry.col
    (2, 3968, 7003)
    """

    site: Site
    row: int
    col: int

    def __str__(self) -> str:
        return f"{self.site}[{self.row}, {self.col}]"

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Read `L2.mlp.down[3968, 7003]`.

        Raises: BadInput if the text has not that form, or names a whole row or column.
        """
        region = Region.parse(text)
        if region.row is None or region.col is None:
            raise BadInput(f"{text!r} names a whole row or column where a single entry is needed.")
        return cls(region.site, region.row, region.col)


@dataclass(frozen=True)
class Region:
    """Part of a site: an entry `[88, 165]`, a row `[88, :]`, a column `[:, 165]` or all `[:, :]`.

    row, col: counted from 0; None where the text has a colon.

    >>> region = Region.parse("L0.mlp.down[88, :]")
    >>> region.geometry, region.rows_cols((128, 3))
    ('row', ([88, 88, 88], [0, 1, 2]))
    """

    site: Site
    row: int | None
    col: int | None

    def __str__(self) -> str:
        row, col = (":" if i is None else str(i) for i in (self.row, self.col))
        return f"{self.site}[{row}, {col}]"

    @classmethod
    def parse(cls, text: str) -> Region:
        """Read `L0.mlp.down[88, 165]`, `[88, :]`, `[:, 165]` or `[:, :]`.

        Raises: BadInput if the text has not that form.
        """
        match = _REGION.fullmatch(text)
        if match is None:
            raise BadInput(
                f"{text!r} is not an entry; write it like 'L0.mlp.down[88, 165]', a row as [88, :],"
                " a column as [:, 165]."
            )
        row, col = (None if match[name] == ":" else int(match[name]) for name in ("row", "col"))
        return cls(Site.parse(match["site"]), row, col)

    @property
    def geometry(self) -> str:
        """ "single", "row", "column" or "matrix"."""
        return {
            (False, False): "single",
            (False, True): "row",
            (True, False): "column",
            (True, True): "matrix",
        }[(self.row is None, self.col is None)]

    def rows_cols(self, shape: tuple[int, int]) -> tuple[list[int], list[int]]:
        """The row and the column of every entry, in two lists, row by row.

        shape: (out, in) of the site. Raises: BadInput if the region does not lie in it.
        """
        for name, index, size in (("row", self.row, shape[0]), ("column", self.col, shape[1])):
            if index is not None and index >= size:
                raise BadInput(
                    f"{self}: {name} {index} does not exist; {self.site} has shape (out {shape[0]},"
                    f" in {shape[1]}), counted from 0."
                )
        rows = range(shape[0]) if self.row is None else (self.row,)
        cols = range(shape[1]) if self.col is None else (self.col,)
        return [r for r in rows for _ in cols], [c for _ in rows for c in cols]

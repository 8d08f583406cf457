"""What `find` gives: critical sets, and what it saw of all else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

from ..anatomy import Anatomy, Entry, Region
from ..errors import BadInput
from ..measure import Controls, severity
from ..result import Result, derived, record, result
from .detect import Heights, Rejection
from .elsewhere import Suspect
from .experts import ExpertProfile
from .links import Link
from .verify import Verification

MOST_LISTED = 16  # entries of a whole line that a set names


@record
class CriticalEntry:
    """One entry of a critical set.

    share: of what its channel receives from its layer; in a set that no channel names, of the sum
    of its squared weights. rank_abs: its rank by |w| in its matrix, 1 for the largest.
    """

    entry: Entry
    weight: float
    share: float
    rank_abs: int

    @derived
    def layer(self) -> int | None:
        return self.entry.site.layer

    @derived
    def row(self) -> int:
        return self.entry.row

    @derived
    def col(self) -> int:
        return self.entry.col

    @derived
    def expert(self) -> int | None:
        return self.entry.site.expert


@record
class SetDamage:
    """Damage of a set in nats per token, on windows that neither detection nor the choice saw.

    single_nats, leave_one_out_nats: of the strongest entries. restored_nats: what is left after
    restoring the super activation alone. These three are of 4 of the windows, unless nothing
    is stopped early. full_nats: of all `full_size` entries that write the
    channels, on a sample of the probe windows; of itself, of a set that no channel names.
    """

    joint_nats: float
    single_nats: list[float]
    leave_one_out_nats: list[float]
    ci95: tuple[float, float]
    p_value: float
    restored_nats: float | None
    tokens: int
    full_nats: float
    full_size: int


@record
class CriticalSet:
    """Weights that are vital together.

    parts: the set as regions, `size` entries in all. entries: those entries; of a whole row or
    column the largest alone.
    channels: the residual channels that they write, where the set was named by them; heights: of
    each, by layer. agreement: in what share of the windows the first is high. windows_used: of the
    joint damage. close: a number that decides is within a tenth of its threshold.
    """

    parts: list[Region]
    size: int
    channels: list[int]
    heights: list[list[float]]
    agreement: float | None
    entries: list[CriticalEntry]
    damage: SetDamage
    controls: Controls
    vital: bool
    close: bool
    criteria: str
    windows_used: int

    @derived
    def geometry(self) -> str:
        """single, row (one channel of one matrix), column (one neuron), or mixed."""
        if len(self.parts) == 1:
            return self.parts[0].geometry
        if len({(part.site, part.row) for part in self.parts}) == 1:
            return "row"
        return "column" if len({(part.site, part.col) for part in self.parts}) == 1 else "mixed"

    @derived
    def severity(self) -> str | None:
        """How bad the damage is, None where nothing is vital."""
        return severity(self.damage.ci95[0]) if self.vital else None

    def weights(self) -> list[Region]:
        """What the set stands for where weights are named."""
        return self.parts

    @classmethod
    def of(
        cls,
        verified: Verification,
        entries: list[CriticalEntry],
        size: int,
        full_nats: float,
        full_size: int,
        channels: Sequence[int] = (),
        heights: Sequence[list[float]] = (),
        agreement: float | None = None,
    ) -> CriticalSet:
        """What was verified, as a set."""
        return cls(
            parts=verified.at,
            size=size,
            channels=list(channels),
            heights=list(heights),
            agreement=agreement,
            entries=entries,
            damage=SetDamage(
                joint_nats=verified.joint_nats,
                single_nats=verified.single_nats,
                leave_one_out_nats=verified.leave_one_out_nats,
                ci95=verified.ci95,
                p_value=verified.p_value,
                restored_nats=verified.restored_nats,
                tokens=verified.tokens,
                full_nats=full_nats,
                full_size=full_size,
            ),
            controls=verified.controls,
            vital=verified.vital,
            close=verified.close,
            criteria=verified.criteria,
            windows_used=verified.windows,
        )


@record
class SearchedHeights(Heights):
    """What detection saw of the channels, and the NLL of the intact model on all windows."""

    base_nll: float


@result("find")
class FindResult(Result):
    """What was found, and with what numbers the rest was rejected.

    measured: of the weights with the largest estimates, wherever they lie, what each costs.
    chained: which sets do the same work.
    """

    sets: list[CriticalSet]
    rejected: list[Rejection]
    detection: SearchedHeights
    measured: list[Suspect] = field(default_factory=list)
    chained: list[Link] = field(default_factory=list)
    experts: list[ExpertProfile] = field(default_factory=list)
    bytes_read: int | None = None

    @derived
    def verdict(self) -> str:
        return "found" if any(one.vital for one in self.sets) else "none"

    def weights(self) -> list[Region]:
        """Its first set. Raises: BadInput if there is none."""
        if not self.sets:
            raise BadInput("this finding holds no set; name weights instead.")
        return self.sets[0].weights()

    def rows(self) -> list[dict[str, object]]:
        """A row for each set; one row, without the columns of a set, where none was found."""
        known = {
            "verdict": self.verdict,
            "sets": len(self.sets),
            "base_nll": self.detection.base_nll,
        }
        return [
            {
                **known,
                "set": number,
                "geometry": one.geometry,
                "severity": one.severity,
                "entries": len(one.entries),
                "strongest": one.entries[0].entry,
                "layer": one.entries[0].layer,
                "joint_nats": one.damage.joint_nats,
                "single_max_nats": max(one.damage.single_nats),
                "ci95_low": one.damage.ci95[0],
                "ci95_high": one.damage.ci95[1],
                "p_value": one.damage.p_value,
                "controls_median_nats": one.controls.median_nats,
                "controls_max_nats": one.controls.max_nats,
                "vital": one.vital,
            }
            for number, one in enumerate(self.sets, 1)
        ] or [known]


def critical_entry(anatomy: Anatomy, entry: Entry, share: float) -> CriticalEntry:
    matrix = anatomy.view(entry.site).read()
    value = matrix[entry.row, entry.col]
    rank = int((matrix.abs() > value.abs()).sum()) + 1
    return CriticalEntry(entry, float(value), share, rank)


def entries_of_part(anatomy: Anatomy, part: Region) -> tuple[list[CriticalEntry], int]:
    """The largest entries of a region, at most MOST_LISTED, and how many it has."""
    matrix = anatomy.view(part.site).read().detach().float()
    row = slice(None) if part.row is None else slice(part.row, part.row + 1)
    col = slice(None) if part.col is None else slice(part.col, part.col + 1)
    mine = matrix[row, col]
    total = mine.square().sum().clamp_min(1e-30)
    entries = []
    for index in mine.abs().flatten().topk(min(MOST_LISTED, mine.numel())).indices.tolist():
        r, c = divmod(index, mine.shape[1])
        entry = Entry(
            part.site, r if part.row is None else part.row, c if part.col is None else part.col
        )
        share = float(mine[r, c].square() / total)
        entries.append(critical_entry(anatomy, entry, share))
    return entries, mine.numel()

"""What a plan of a sweep can name: the operations, their parameters, and the flat rows that each
gives.

Workers import this module by its name; see `surgeon.sweep.Operation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import exp
from typing import Any

from ..anatomy import Entry, Region
from ..edit import EditConfig, Preparation, PrepareConfig, edit
from ..errors import BadInput, SurgeonError
from ..facts import Fact, read_facts
from ..find import FindConfig, FindResult, Verification, VerifyConfig, find, verify
from ..find.verify import entries_of
from ..measure import (
    Reference,
    ScoreConfig,
    examine,
    mean_nll,
    require_causal,
    scorecard,
    with_neighbours,
)
from ..patch import MODES, ablate, load
from ..quantize import Block, Grid, QuantizeConfig, input_mean_squares, prepare, quantized_sites
from ..repair import RepairConfig, repair
from ..settings import configured
from ..sweep import Bench, Operation, Row
from .common import open_model, regions, tokenizer_of

__all__ = ["OPERATIONS", "open_model"]

VITAL = "vital"
CALIBRATION_WINDOWS = 8
At = str | tuple[str, ...]
AT = (
    "entries, rows or columns, like 'L0.mlp.down[24, :]'; or vital: the first set that find returns"
)


@dataclass(frozen=True)
class Find:
    controls: int = field(
        default=VerifyConfig.controls, metadata={"help": "matched control sets, at least 20"}
    )
    min_nats: float = field(
        default=VerifyConfig.min_nats, metadata={"help": "least joint damage to be called vital"}
    )

    def __post_init__(self) -> None:
        VerifyConfig(self.controls, self.min_nats)


@dataclass(frozen=True)
class Verify(Find):
    at: At = field(default=VITAL, metadata={"help": AT})


@dataclass(frozen=True)
class Injury:
    at: At = field(default=VITAL, metadata={"help": AT})
    mode: str = field(
        default="zero", metadata={"help": "what an entry becomes: " + ", ".join(MODES)}
    )

    def __post_init__(self) -> None:
        if self.mode.partition(":")[0] not in {mode.partition(":")[0] for mode in MODES}:
            raise BadInput(f"the mode {self.mode} is not known; use {', '.join(MODES)}.")


@dataclass(frozen=True)
class Repair(Injury):
    method: str = field(
        default=RepairConfig.method, metadata={"help": "graft, distil, or graft+distil"}
    )
    exclude_injured: bool = field(
        default=False, metadata={"help": "leave the injured entries as they are"}
    )
    rank: int = field(default=0, metadata={"help": "rank of the change; 0: any"})
    steps: int = field(default=400, metadata={"help": "most training steps"})
    control: bool = field(default=True, metadata={"help": "also spend the same on a random row"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config(0)

    def config(self, seed: int) -> RepairConfig:
        base = RepairConfig(
            self.method, self.exclude_injured, rank=self.rank, seed=seed, control=self.control
        )
        return replace(base, distil=replace(base.distil, steps=self.steps))


@dataclass(frozen=True)
class EditFacts:
    prompt: str | None = field(
        default=None, metadata={"help": "prompt of one fact, with {} where the subject stands"}
    )
    subject: str | None = field(default=None, metadata={"help": "what that fact is about"})
    target: str | None = field(default=None, metadata={"help": "what the model is to say next"})
    facts: str | None = field(
        default=None,
        metadata={"help": "file of facts, each edited alone on the intact model", "file": True},
    )
    limit: int | None = field(default=None, metadata={"help": "the first facts of the file"})
    method: str = field(default=EditConfig.method, metadata={"help": "the editor"})
    layer: int | None = field(
        default=None, metadata={"help": "layer to change; not given: by depth"}
    )

    def __post_init__(self) -> None:
        self.config()
        one = (self.prompt, self.subject, self.target)
        if (self.facts is None) == (None in one) or (
            self.facts is not None and one != (None, None, None)
        ):
            raise BadInput("an edit needs prompt, subject and target, or facts, a file of them.")
        if self.facts is None:
            self.read()
        if self.limit is not None and self.limit < 1:
            raise BadInput(f"limit {self.limit} leaves no fact; use at least 1.")

    def config(self) -> EditConfig:
        layers = () if self.layer is None else (self.layer,)
        return configured(EditConfig, {"method": self.method, "layers": layers})

    def read(self) -> list[Fact]:
        """Raises: BadInput for a fact without a target."""
        found = (
            read_facts(self.facts)[: self.limit]
            if self.facts
            else [Fact(str(self.prompt), str(self.subject), self.target)]
        )
        for fact in found:
            if not (fact.target or "").strip():
                raise BadInput(
                    f"the fact {fact.text!r} has no target; say what the model is to answer."
                )
        return found


@dataclass(frozen=True)
class Quantize:
    bits: int = field(default=4, metadata={"help": "bits of a weight, 2 to 8"})
    block: str = field(
        default="group:128", metadata={"help": "tensor, channel, group:N, flat:N or square:N"}
    )
    symmetric: bool = field(
        default=True, metadata={"help": "codes on both sides of zero, without an offset"}
    )
    method: str = field(
        default=QuantizeConfig.method,
        metadata={"help": "rtn, clip, restore, or both: the hold-out"},
    )
    clip: str = field(default=QuantizeConfig.clip, metadata={"help": "z, percentile, mse or none"})
    clip_value: float | None = field(
        default=None, metadata={"help": "not given: searched for each matrix"}
    )
    clip_per: str = field(default=QuantizeConfig.clip_per, metadata={"help": "tensor or block"})
    weighted: bool = field(
        default=False,
        metadata={
            "help": f"search by the error of outputs, on the first {CALIBRATION_WINDOWS} windows"
        },
    )
    at: At = field(default=VITAL, metadata={"help": "entries that are held out: " + AT})

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> QuantizeConfig:
        grid = Grid(self.bits, self.symmetric, Block.parse(self.block))
        return QuantizeConfig(
            grid, self.method, self.clip, self.clip_value, self.clip_per, self.weighted
        )


@dataclass(frozen=True)
class Measure:
    patches: tuple[str, ...] = field(
        default=(), metadata={"help": "patch files, applied in order", "file": True}
    )


def _find(bench: Bench, settings: Find, seed: int) -> list[Row]:
    """A row for each set; one row, without the columns of a set, where none was found."""
    result = _found(
        bench, FindConfig(verify=VerifyConfig(settings.controls, settings.min_nats, seed=seed))
    )
    known: Row = {"verdict": result.verdict, "sets": len(result.sets), "base_nll": result.base_nll}
    return [
        {
            **known,
            "set": number,
            "geometry": one.geometry,
            "entries": len(one.entries),
            "strongest": str(one.entries[0].entry),
            "layer": one.entries[0].entry.site.layer,
            **_damage(one.verification),
        }
        for number, one in enumerate(result.sets, 1)
    ] or [known]


def _verify(bench: Bench, settings: Verify, seed: int) -> list[Row]:
    config = VerifyConfig(settings.controls, settings.min_nats, seed=seed)
    result = verify(
        bench.anatomy,
        _regions(bench, settings.at, seed),
        bench.corpus,
        config,
        listed=FindConfig.listed,
    )
    return [
        {
            "base_nll": result.base_nll,
            **_damage(result),
            "leave_one_out_min_nats": min(result.leave_one_out),
        }
    ]


def _damage(result: Verification) -> Row:
    return {
        "joint_nats": result.joint,
        "single_max_nats": max(result.single),
        "ci95_low": result.ci95[0],
        "ci95_high": result.ci95[1],
        "p_value": result.p_value,
        "controls_median_nats": result.controls.median,
        "controls_max_nats": result.controls.max,
        "vital": result.vital,
    }


def _ablate_damage(bench: Bench, settings: Injury, seed: int) -> list[Row]:
    injury = ablate(bench.anatomy, _regions(bench, settings.at, seed), settings.mode)
    entries = sum(int(injury.touched(site).sum()) for site in injury.sites)
    return [{"entries": entries, **_beside_base(bench, lambda: injury.applied(bench.anatomy))}]


def _repair(bench: Bench, settings: Repair, seed: int) -> list[Row]:
    injury = ablate(bench.anatomy, _regions(bench, settings.at, seed), settings.mode)
    result = repair(bench.anatomy, injury, bench.corpus, settings.config(seed))
    return [
        {
            **{f"nll_{state}": nll for state, nll in result.nll.items()},
            **{f"kl_{state}": kl for state, kl in result.kl.items()},
            "recovered": result.recovered,
            "control_recovered": (result.control or {}).get("recovered"),
            "steps_taken": result.steps,
            "delta_norm": result.delta_norm,
            "row_norm": result.row_norm,
            "cosine_to_row": result.cosine_to_row,
        }
    ]


def _edit(bench: Bench, settings: EditFacts, seed: int) -> list[Row]:
    """A row for each fact, edited alone."""
    loaded, tokenizer = bench.loaded, tokenizer_of(bench.loaded)
    require_causal(loaded.model)
    preparation = bench.once(
        ("preparation", seed),
        lambda: Preparation(
            bench.anatomy,
            tokenizer,
            PrepareConfig(seed=seed, bos=bench.bos),
            weights=loaded.fingerprint,
        ),
    )
    score = ScoreConfig()
    rows = []
    for number, fact in enumerate(
        with_neighbours(loaded.model, tokenizer, settings.read(), bos=bench.bos), 1
    ):
        made = edit(preparation, [fact], settings.config())
        before = examine(loaded.model, tokenizer, [fact], (), bench.corpus, score, bench.bos)
        with made.patch.applied(bench.anatomy):
            after = examine(loaded.model, tokenizer, [fact], (), bench.corpus, score, bench.bos)
        card, flight = scorecard(before, after, seed), made.preflight
        rows.append(
            {
                "fact": number,
                "asked": fact.text,
                "wanted": fact.target,
                "says_target": after.own[0].says_target,
                "target_before": before.own[0].first,
                "target_after": after.own[0].first,
                "neighbours_known": card.neighbours_known_before,
                "neighbours_kept": card.neighbours_kept,
                "verdict": flight.verdict,
                "update_norm_ratio": flight.update_norm_ratio,
                "relative_damage": flight.relative_damage,
                "base_nll": before.nll,
                "nll": after.nll,
            }
        )
    return rows


def _quantize(bench: Bench, settings: Quantize, seed: int) -> list[Row]:
    config = settings.config()
    if not config.restores:
        critical: list[Entry] = []
    elif (
        settings.at == VITAL and not _found(bench, FindConfig(verify=VerifyConfig(seed=seed))).sets
    ):
        critical = []  # a model without critical entries is quantized all the same
    else:
        critical = [
            e
            for region in _regions(bench, settings.at, seed)
            for e in entries_of(bench.anatomy, region)
        ]
    squares = {}
    if config.weighted:
        windows = bench.corpus.windows[:CALIBRATION_WINDOWS]
        squares = bench.once(
            "squares",
            lambda: input_mean_squares(
                bench.anatomy, windows, quantized_sites(bench.anatomy, config)
            ),
        )
    ready = prepare(bench.anatomy, config, critical, squares)
    return [
        {
            "bits_per_weight": ready.result.bits_per_weight,
            "held": ready.result.held,
            **_beside_base(bench, ready.applied),
        }
    ]


def _measure(bench: Bench, settings: Measure, seed: int) -> list[Row]:
    patches = [load(p) for p in settings.patches]

    @contextmanager
    def patched() -> Iterator[None]:
        with ExitStack() as applied:
            for patch in patches:
                applied.enter_context(patch.applied(bench.anatomy))
            yield

    row = _beside_base(bench, patched)
    return [{**row, "ppl": exp(min(row["nll"], 700.0))}]


def _beside_base(bench: Bench, change: Any) -> Row:
    """NLL inside `change()`, beside that of the model as it is, and how far its predictions have
    gone.
    """
    model, windows = bench.loaded.model, bench.corpus.windows
    require_causal(model)
    base = bench.once("base_nll", lambda: mean_nll(model, windows))
    far = Reference(model, windows).compare(change)
    return {
        "tokens": bench.corpus.predicted,
        "base_nll": base,
        "damage_nats": far.nll - base,
        **asdict(far),
    }


def _found(bench: Bench, config: FindConfig) -> FindResult:
    return bench.once(config, lambda: find(bench.anatomy, bench.corpus, config))


def _regions(bench: Bench, at: At, seed: int) -> list[Region]:
    """The regions that a task names.

    Raises: BadInput, UnknownSite; SurgeonError if nothing vital was found.
    """
    if at != VITAL:
        return regions(bench.anatomy, (at,) if isinstance(at, str) else at)
    result = _found(bench, FindConfig(verify=VerifyConfig(seed=seed)))
    if not result.sets:
        raise SurgeonError(
            f"nothing vital was found in this model on {bench.corpus.name}; name entries with `at`"
            " instead."
        )
    return [Region(c.entry.site, c.entry.row, c.entry.col) for c in result.sets[0].entries]


# find looks for the vital set with a seed too, for its controls; the set itself depends on none
OPERATIONS = {
    "find": Operation(Find, _find),
    "verify": Operation(Verify, _verify),
    "ablate-damage": Operation(Injury, _ablate_damage, seeded=False),
    "repair": Operation(Repair, _repair),
    "edit": Operation(EditFacts, _edit),
    "quantize": Operation(Quantize, _quantize, seeded=False),
    "measure": Operation(Measure, _measure, seeded=False),
}

"""`audit`: what a compression, merge, pruning, adapter or fine-tune did to the critical weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..anatomy import Anatomy, Entry, Region
from ..audit import AMBER, RED, Audit, AuditConfig, Checkpoint, SuperActivation, Watched, audit
from ..errors import BadInput
from ..find import CriticalSet, FindResult
from ..find.index import Published, records_of, records_shaped
from ..find.verify import entries_of
from ..patch import Patch
from ..settings import nested, setting
from .desk import Desk
from .lab import TextSettings
from .naming import patches_of, regions_of, several, vital_sets
from .pair import Pair

FAILURES = {"red": (RED,), "amber": (RED, AMBER), "never": ()}
GIVEN, FOUND = "given", "found in BASE"
_TRUST = 0.25  # a printed weight is this model's if the base holds it to within this share
_TOP = 1e-4  # and one without a printed value if it is among this share of its matrix, by |w|


@dataclass(frozen=True)
class Settings:
    """Compare the critical entries of OTHER with those of BASE, which it was made from.

    OTHER is a fine-tune, a merge, a pruned or quantized model, a LoRA adapter, a GGUF file. Only
    the matrices concerned are read. Where neither entries nor patches are given, the published
    entries of BASE are audited, else those that `surgeon find` finds in it on the text.
    """

    other: str = setting(help="the model to audit")
    base: str | None = setting(None, "the model that it was made from; a lab's own by default")
    at: Any = setting(
        (),
        "entry, row or column to audit; all of them are one set",
        metavar="ENTRY",
        many=True,
    )
    patches: Any = setting(
        (),
        "audit the entries that a patch changes; each patch is a set",
        metavar="P",
        many=True,
        spelled="patch",
        is_file=True,
    )
    run: bool = setting(False, "also run both models, and compare their super activations")
    fail_on: str = setting("red", "verdict that ends with exit status 1", choices=tuple(FAILURES))
    audit: AuditConfig = nested(AuditConfig)
    text: TextSettings = nested(partial(TextSettings, windows=40))


def run(desk: Desk, settings: Settings) -> Audit:
    base = settings.base or desk.opened_by
    if base is None:
        raise BadInput(
            "an audit reads the files of a model, and one that was made of a module has none; save"
            " it and open its folder, or name ‹base›."
        )
    pair = Pair(desk, base, settings.other)
    anatomy = pair.base.anatomy
    sets, regions = _named(anatomy, settings.at)
    watched = [*map(_of_set, sets), *_of_regions(anatomy, regions)]
    watched += [_of_patch(anatomy, patch) for patch in patches_of(settings.patches)]
    source = GIVEN
    if not watched:
        watched, source = _known(pair, settings.text)
    result = audit(pair.base, pair.other, watched, settings.audit, desk.tell)
    activations: list[SuperActivation] = []
    reason = None
    if settings.run:
        entries = [entry for one in watched for entry in one.entries]
        activations, reason = pair.activations(entries, settings.text)
    reads_text = source == FOUND or bool(activations)
    corpus = pair.lab.corpus(settings.text).record() if reads_text else None
    parts = [*(part for one in sets for part in one.parts), *regions]
    patches = [str(patch) for patch in several(settings.patches)]
    recorded = replace(settings, base=base, at=[str(part) for part in parts], patches=patches)
    provenance = replace(desk.provenance(recorded, corpus), model=base)
    return replace(
        result, source=source, activations=activations, not_run=reason, provenance=provenance
    )


def failed(result: Audit, settings: Settings) -> str | None:
    """Why the command line ends with status 1."""
    if result.verdict not in FAILURES[settings.fail_on]:
        return None
    return f"the verdict is {result.verdict}, which fails the audit (‹fail_on› {settings.fail_on})."


# -- which entries --------------------------------------------------------------------------------


def _named(anatomy: Anatomy, at: Any) -> tuple[list[CriticalSet], list[Region]]:
    """What `at` names: critical sets, those of findings too, and the regions of all else."""
    sets: list[CriticalSet] = []
    addresses = []
    for one in several(at):
        if isinstance(one, CriticalSet):
            sets.append(one)
        elif isinstance(one, FindResult):
            sets += _vital(one)
        else:
            addresses.append(one)
    return sets, regions_of(anatomy, addresses) if addresses else []


def _vital(finding: FindResult) -> list[CriticalSet]:
    """Raises: BadInput if none of its sets is vital."""
    vital = [one for one in finding.sets if one.vital]
    if not vital:
        raise BadInput(
            f"`find` finds no vital entries in {finding.provenance.model or 'BASE'}, so there are"
            " none to audit; name some with ‹at›."
        )
    return vital


def _of_set(one: CriticalSet) -> Watched:
    entries = tuple(each.entry for each in one.entries)
    return Watched(entries, tuple(each.share for each in one.entries))


def _of_regions(anatomy: Anatomy, regions: Sequence[Region]) -> list[Watched]:
    """All of the regions as one set; none where there are none."""
    entries = tuple(entry for region in regions for entry in entries_of(anatomy, region))
    return [Watched(entries)] if entries else []


def _of_patch(anatomy: Anatomy, patch: Patch) -> Watched:
    """The entries that a patch changes. Raises: BadInput if it was made on another model."""
    entries: list[Entry] = []
    for site in patch.sites:
        if patch.base[site].shape != anatomy.view(site).shape:
            raise BadInput(
                f"the patch ({patch}) was made on another model than BASE: its {site} has shape"
                f" {patch.base[site].shape}."
            )
        entries += [Entry(site, row, col) for row, col in patch.touched(site).nonzero().tolist()]
    return Watched(tuple(entries))


def _known(pair: Pair, text: TextSettings) -> tuple[list[Watched], str]:
    """The published entries of BASE, else what is found in it; and where they come from."""
    published = _published(pair.base) if isinstance(pair.base, Checkpoint) else []
    if published:
        entries = tuple(record.entry for record in published)
        return [Watched(entries)], f"published for {published[0].model}"
    finding = vital_sets(pair.lab, text)
    return [_of_set(one) for one in _vital(finding)], FOUND


def _published(base: Checkpoint) -> list[Published]:
    """The published entries of BASE: of the model it is called after and shaped like, or of one of
    its shape whose weights it holds.
    """
    records = [one for one in records_shaped(base.anatomy.config) if one.status != "nearly inert"]
    try:
        named = {record.model for record in records_of(base.name)}
    except BadInput:
        named = set()
    for model in dict.fromkeys(record.model for record in records):
        of_model = [record for record in records if record.model == model]
        if model in named or all(_holds(base, record) for record in of_model):
            return of_model
    return []


def _holds(base: Checkpoint, record: Published) -> bool:
    matrix = base.matrix(record.entry.site)
    value = matrix[record.row, record.col]
    if record.weight is not None:
        return bool((value - record.weight).abs() <= _TRUST * abs(record.weight))
    return int((matrix.abs() >= value.abs()).sum()) <= _TOP * matrix.numel()

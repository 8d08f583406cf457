"""`repair`: heal an injury with a patch, beside a control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..patch import Patch, ablate, known_mode
from ..repair import REFERENCE, RepairConfig, RepairResult, repair
from ..settings import nested, setting
from .lab import Lab, TextSettings
from .naming import AT_HELP, VITAL, patch_name, patch_of, regions_of


@dataclass(frozen=True)
class Settings:
    """Heal MODEL after an injury: change a few other weights so that it predicts as before, and say
    how much came back.

    The patch is applied after the injury. It is judged on windows of the text that it was not made
    from, beside the same effort spent on a random row.
    """

    injury: Any = setting(
        None,
        "patch that broke the model, as ablate writes it; not given: the loss of the weights that"
        " ‹at› names",
        metavar="P",
        is_file=True,
    )
    at: Any = setting(
        None,
        "without ‹injury›: the weights that are lost; " + AT_HELP + "; not given: vital",
        metavar="ENTRY",
        many=True,
    )
    mode: str = setting(
        "zero", "without ‹injury›: what an entry becomes, as ablate has it", parse=known_mode
    )
    repair: RepairConfig = nested(RepairConfig)
    reference: bool = setting(
        False, "settings of the published experiment on OLMo-1B-0724-hf", preset=REFERENCE
    )
    text: TextSettings = nested(TextSettings)
    held_out: str | None = setting(
        None,
        "second text to judge on, as a whole",
        metavar="FILE",
        group="Text",
        is_file=True,
    )
    resume: str | None = setting(
        None,
        "save the training in FILE, and go on from it if it is there",
        metavar="FILE",
        group="Training",
        is_file=True,
    )

    def __post_init__(self) -> None:
        if self.injury is not None and self.at:
            raise BadInput("‹injury› and ‹at› both say what broke the model; give one of the two.")
        if self.resume is not None and not Path(self.resume).parent.is_dir():
            raise BadInput(
                f"there is no folder {Path(self.resume).parent} for the checkpoint {self.resume};"
                " make it first."
            )


def run(lab: Lab, settings: Settings) -> RepairResult:
    injury, settings = _injury(lab, settings)
    corpus = lab.corpus(settings.text)
    second = None
    if settings.held_out is not None:
        second = lab.corpus(replace(settings.text, text=settings.held_out, windows=None))
    checkpoint = None if settings.resume is None else Path(settings.resume)
    result = repair(lab.anatomy, injury, corpus, settings.repair, second, lab.tell, checkpoint)
    return replace(result, provenance=lab.provenance(settings, corpus.record()))


def _injury(lab: Lab, settings: Settings) -> tuple[Patch, Settings]:
    """The injury, and the settings with what it is by name."""
    if settings.injury is not None:
        injury = patch_of(settings.injury)
        return injury, replace(settings, injury=patch_name(settings.injury))
    regions = regions_of(lab, settings.at or VITAL, settings.text, settings.repair.seed)
    named = replace(settings, at=[str(region) for region in regions])
    return ablate(lab.anatomy, regions, settings.mode), named

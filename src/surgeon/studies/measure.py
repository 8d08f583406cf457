"""`measure`: likelihood and behaviour, with patches or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..anatomy import Region
from ..measure import (
    Behaviour,
    Comparison,
    Reference,
    generate,
    mean_nll,
    perplexity,
    require_causal,
    task_accuracy,
)
from ..patch import ablate, known_mode, stacked
from ..result import Result, derived, record, result
from ..settings import nested, setting
from .lab import Lab, TextSettings
from .naming import AT_HELP, patch_names, patches_of, regions_of


@dataclass(frozen=True)
class Settings:
    """NLL and perplexity of MODEL; with patches, or without given weights, also the damage, the KL
    to the model as it is, and both generations side by side.
    """

    patches: Any = setting(
        (),
        "patch; several are applied in order",
        metavar="P",
        many=True,
        spelled="patch",
        is_file=True,
    )
    at: Any = setting(
        (),
        "before the patches take these weights out; " + AT_HELP,
        metavar="ENTRY",
        many=True,
    )
    mode: str = setting(
        "zero", "with ‹at›: what an entry becomes, as ablate has it", parse=known_mode
    )
    text: TextSettings = nested(TextSettings)
    prompts: tuple[str, ...] = setting(
        (), "also continue this prompt greedily", metavar="PROMPT", spelled="generate"
    )
    new_tokens: int = setting(40, "tokens of each generation", low=1)
    tasks: tuple[str, ...] = setting(
        (),
        "also: accuracy on an lm-eval task, by name or YAML file (needs weight-surgeon[eval])",
        spelled="task",
    )
    limit: int | None = setting(None, "examples of each task; not given: all", low=1)


@record
class Generation:
    """What the model writes after a prompt, without the patches and with them."""

    prompt: str
    base: str
    patched: str


@record
class TaskAccuracy:
    """Accuracy on one task, without the patches and with them."""

    base: float
    patched: float


@result("measure")
class Measurement(Result):
    """Likelihood in nats per token and behaviour; without patches nothing is compared with.

    at: the weights that were taken out before the patches, and `mode` how. base_nll: of the model
    as it is; damage_nats: how much the changes cost.
    """

    patches: list[str]
    at: list[Region]
    mode: str | None
    nll: float
    tokens: int
    kl_from_base: float | None
    top1_agreement: float | None
    base_nll: float | None
    generations: list[Generation]
    loop_rate: float
    tasks: dict[str, TaskAccuracy]

    @derived
    def ppl(self) -> float:
        return perplexity(self.nll)

    @derived
    def damage_nats(self) -> float | None:
        return None if self.base_nll is None else self.nll - self.base_nll

    def rows(self) -> list[dict[str, object]]:
        """One row."""
        return [
            {
                "nll": self.nll,
                "ppl": self.ppl,
                "tokens": self.tokens,
                "base_nll": self.base_nll,
                "damage_nats": self.damage_nats,
                "kl_from_base": self.kl_from_base,
                "top1_agreement": self.top1_agreement,
                "loop_rate": self.loop_rate,
                **{f"{name}_accuracy": one.patched for name, one in self.tasks.items()},
            }
        ]


def run(lab: Lab, settings: Settings) -> Measurement:
    require_causal(lab.model)
    corpus = lab.corpus(settings.text)
    regions = regions_of(lab, settings.at, settings.text) if settings.at else []
    injury = [ablate(lab.anatomy, regions, settings.mode)] if regions else []
    changes = [*injury, *patches_of(settings.patches)]
    names = patch_names(settings.patches)
    write = partial(
        generate,
        lab.model,
        lab.tokenizer,
        settings.prompts,
        settings.new_tokens,
        settings.text.bos,
    )
    score = partial(task_accuracy, lab.model, lab.tokenizer, settings.tasks, settings.limit)

    with stacked(lab.anatomy, changes):
        changed = write()
        after = score() if settings.tasks else {}
    base, before = (write(), score() if settings.tasks else {}) if changes else (changed, after)
    away: Comparison | None = None
    if changes:
        reference = Reference(lab.model, corpus.windows)
        away = reference.compare(lambda: stacked(lab.anatomy, changes))
    known = replace(settings, patches=names, at=[str(region) for region in regions])
    return Measurement(
        patches=names,
        at=regions,
        mode=settings.mode if regions else None,
        nll=mean_nll(lab.model, corpus.windows) if away is None else away.nll,
        tokens=corpus.predicted,
        kl_from_base=None if away is None else away.kl,
        top1_agreement=None if away is None else away.top1_agreement,
        base_nll=None if away is None else away.base_nll,
        generations=[
            Generation(b.prompt, b.text, c.text) for b, c in zip(base, changed, strict=True)
        ],
        loop_rate=_loop_rate(changed),
        tasks={name: TaskAccuracy(before[name], after[name]) for name in after},
        provenance=lab.provenance(known, corpus.record()),
    )


def _loop_rate(texts: Sequence[Behaviour]) -> float:
    return sum(text.loop for text in texts) / len(texts) if texts else 0.0

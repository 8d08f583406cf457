"""`demo`: the whole story of a model, a function a step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..corpus import Corpus
from ..errors import BadInput, SurgeonError
from ..facts import Fact
from ..find import FindResult
from ..measure import generate, mean_nll, perplexity
from ..patch import Patch, stacked
from ..patients.generate import facts
from ..patients.train import known_facts
from ..repair import RepairConfig, RepairResult, repair
from ..result import Result, attached, derived, record, result
from ..settings import nested, setting
from .edit import EditResult
from .lab import Lab, TextSettings
from .naming import patch_of
from .verify import PROMPTS

PATIENT = "patient"
PATIENT_PROMPTS = (
    "Once upon a time, there was a little",
    "Everyone knows that Harvard University is in",
    "My grandmother says that people first made pizza in",
)
PATIENT_FACT = Fact(
    "Everyone knows that {} is in", "Harvard University", "California", "Massachusetts"
)
PATIENT_CONTROLS = tuple(
    f"Everyone knows that {name} is in"
    for name in ("MIT", "Boston", "Yale University", "Stanford University")
)
NEW_TOKENS = 24
# a fact is known if so many of its phrasings give it more than this probability
PHRASINGS, LIKELY = 3, 0.5


@dataclass(frozen=True)
class Settings:
    """Tell the whole story of MODEL: find what it cannot live without, prove it, take it out,
    repair it, rewrite a fact, and put all back bit for bit.

    For the patient it takes a minute on one CPU core. Of another model no fact is known here; name
    one to have it rewritten.
    """

    prompt: str | None = setting(
        None, "prompt of the fact to rewrite, with {} where the subject stands", metavar="TEMPLATE"
    )
    subject: str | None = setting(None, "what the fact is about")
    target: str | None = setting(None, "what the model is to say next")
    text: TextSettings = nested(partial(TextSettings, windows=40))
    prompts: tuple[str, ...] = setting(
        (), "prompt to continue in each state", metavar="PROMPT", spelled="generate"
    )
    seed: int = setting(0, "seed of everything random", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        fact = (self.prompt, self.subject, self.target)
        if None in fact and any(part is not None for part in fact):
            raise BadInput("a fact to rewrite needs ‹prompt›, ‹subject› and ‹target›.")


@record
class State:
    """The model in one state: NLL in nats per token, what it writes, whether its weights are as
    they were, bit for bit; facts_known is None where no facts are.
    """

    state: str
    nll: float
    facts_known: int | None
    same_bits: bool
    texts: list[str]

    @derived
    def ppl(self) -> float:
        return perplexity(self.nll)


@result("demo")
class Demo(Result):
    """The story. no_repair, no_edit: why a part is not there. facts: how many might be known."""

    find: FindResult
    repair: RepairResult | None
    no_repair: str | None
    edit: EditResult | None
    no_edit: str | None
    facts: int | None
    prompts: list[str]
    states: list[State]
    injury: Patch | None = attached("injury.safetensors")


def run(lab: Lab, settings: Settings) -> Demo:
    corpus = lab.corpus(settings.text, fit=True)
    settings = replace(settings, text=replace(settings.text, window=corpus.windows.shape[1]))
    look = _Look(lab, corpus, _prompts(lab, settings), _bits(lab.model))
    states = [look.at("intact")]

    finding = _finding(lab, settings)
    injury: Patch | None = None
    healed: RepairResult | None = None
    no_repair: str | None = "nothing vital was found"
    if finding.sets:
        injury = patch_of(lab.ablate(finding.sets[0], seed=settings.seed))
        states.append(look.at("without the set", injury))
        healed, no_repair = _repaired(lab, injury, settings)
        if healed is not None:
            states.append(look.at("repaired", injury, patch_of(healed)))

    edited, no_edit = _rewritten(lab, settings)
    if edited is not None:
        states.append(look.at("edited", patch_of(edited)))
    states.append(look.at("put back"))
    return Demo(
        find=finding,
        repair=healed,
        no_repair=no_repair,
        edit=edited,
        no_edit=no_edit,
        facts=len(facts()) if lab.name == PATIENT else None,
        prompts=list(look.prompts),
        states=states,
        injury=injury,
        provenance=lab.provenance(settings, corpus.record()),
    )


@dataclass(frozen=True)
class _Look:
    """How each state is looked at."""

    lab: Lab
    corpus: Corpus
    prompts: tuple[str, ...]
    intact: str

    def at(self, name: str, *patches: Patch) -> State:
        model, tokenizer = self.lab.model, self.lab.tokenizer
        with stacked(self.lab.anatomy, patches):
            texts = generate(model, tokenizer, self.prompts, NEW_TOKENS)
            return State(
                name,
                mean_nll(model, self.corpus.windows),
                self._facts_known(),
                _bits(model) == self.intact,
                [text.text for text in texts],
            )

    def _facts_known(self) -> int | None:
        if self.lab.name != PATIENT:
            return None
        table = known_facts(self.lab.model, self.lab.tokenizer)
        return sum(sum(p > LIKELY for p in phrasings) >= PHRASINGS for phrasings in table)


def _bits(model: nn.Module) -> str:
    """A digest of all weights."""
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        total.update(name.encode() + raw.numpy().tobytes())
    return total.hexdigest()


def _prompts(lab: Lab, settings: Settings) -> tuple[str, ...]:
    """Those given, or the patient's own, or some that suit any model; with that of the fact."""
    if settings.prompts:
        return settings.prompts
    fact = _fact(lab, settings)
    usual = PATIENT_PROMPTS if lab.name == PATIENT else PROMPTS
    return tuple(dict.fromkeys([*usual, *([] if fact is None else [fact.text])]))


def _fact(lab: Lab, settings: Settings) -> Fact | None:
    """The fact that was given; the patient has one of its own."""
    if settings.prompt is not None and settings.subject is not None:
        return Fact(settings.prompt, settings.subject, settings.target)
    return PATIENT_FACT if lab.name == PATIENT else None


def _finding(lab: Lab, settings: Settings) -> FindResult:
    """What the model cannot live without, of the weights that can be repaired."""
    text = settings.text
    finding: FindResult = lab.find(
        text=text.text,
        window=text.window,
        windows=text.windows,
        bos=text.bos,
        only="mlp.down",
        seed=settings.seed,
    )
    return finding


def _repaired(
    lab: Lab, injury: Patch, settings: Settings
) -> tuple[RepairResult | None, str | None]:
    """Other entries of the rows heal the injured model; or why they do not.

    The repair is made from the text behind the windows that the states are measured on. In closed
    form, but for experts, whose inputs cannot be seen.
    """
    whole = lab.corpus(replace(settings.text, windows=None))
    behind = Corpus(whole.name, whole.windows[settings.text.windows :], whole.bos)
    experts = any(site.expert is not None for site in injury.sites)
    method = "distil" if experts else "graft"
    config = RepairConfig(method=method, exclude_injured=True, seed=settings.seed)
    try:
        healed = repair(lab.anatomy, injury, behind, config, progress=lab.tell)
    except SurgeonError as error:
        return None, str(error)
    return replace(healed, provenance=lab.provenance(config, behind.record())), None


def _rewritten(lab: Lab, settings: Settings) -> tuple[EditResult | None, str | None]:
    """One fact rewritten in the intact model; or why it is not."""
    fact = _fact(lab, settings)
    if fact is None:
        return None, "no fact to rewrite was given"
    text = settings.text
    try:
        edited: EditResult = lab.edit(
            fact.prompt,
            subject=fact.subject,
            target=fact.target,
            true=fact.true,
            controls=PATIENT_CONTROLS if fact == PATIENT_FACT else (),
            no_cache=True,
            text=text.text,
            window=text.window,
            windows=text.windows,
            bos=text.bos,
            seed=settings.seed,
        )
    except SurgeonError as error:
        return None, str(error)
    return edited, None

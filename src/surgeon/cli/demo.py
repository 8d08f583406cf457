"""`surgeon demo`: the whole story on the patient, a function a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import exp
from typing import Any

import click
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..anatomy import Anatomy, Loaded, Region
from ..corpus import Corpus
from ..edit import Preparation, edit
from ..errors import SurgeonError
from ..facts import Fact
from ..find import FindConfig, FindResult, find
from ..measure import ScoreConfig, generate, mean_nll
from ..patch import Patch, ablate, save
from ..patients.generate import facts
from ..patients.train import known_facts
from ..repair import RepairConfig, repair
from ..show.console import err, out, print_table
from .common import (
    deliver,
    json_option,
    open_corpus,
    open_model,
    progress,
    run_folder,
    tokenizer_of,
)
from .edit import document_of, scored
from .find import print_find

PROMPTS = (
    "Once upon a time, there was a little",
    "Everyone knows that Harvard University is in",
    "My grandmother says that people first made pizza in",
)
WINDOWS = 40
FACT = Fact("Everyone knows that {} is in", "Harvard University", "California", "Massachusetts")
CONTROLS = tuple(
    f"Everyone knows that {name} is in"
    for name in ("MIT", "Boston", "Yale University", "Stanford University")
)


@dataclass
class Story:
    """What the steps of the demo work on, and what they leave for its end."""

    loaded: Loaded
    anatomy: Anatomy
    corpus: Corpus
    intact: dict[str, Tensor]
    document: dict[str, Any]
    patches: dict[str, Patch] = field(default_factory=dict)

    def examine(self, state: str) -> dict[str, Any]:
        """One row of the table: the model as it is now."""
        model, tokenizer = self.loaded.model, tokenizer_of(self.loaded)
        nll = mean_nll(model, self.corpus.windows)
        known = sum(
            sum(p > 0.5 for p in phrasings) >= 3 for phrasings in known_facts(model, tokenizer)
        )
        same = all(
            torch.equal(p.view(torch.uint8), self.intact[name])
            for name, p in model.state_dict().items()
        )
        texts = [t.text for t in generate(model, tokenizer, PROMPTS, 24)]
        row = {
            "state": state,
            "nll": nll,
            "ppl": exp(nll),
            "facts_known": known,
            "same_bits": same,
            "texts": texts,
        }
        self.document["states"].append(row)
        return row


@click.command("demo")
@click.option(
    "-o",
    "output",
    metavar="DIR",
    help="Also write the run folder: demo.json, the patches, report.html.",
)
@json_option
def command(output: str | None, as_json: bool) -> None:
    """Find what the patient cannot live without, prove it, take it out, repair it, rewrite a fact,
    and put all back bit for bit.

    A minute on one CPU core.
    """
    folder = run_folder(output)
    story = _open()
    if not as_json:
        size = story.loaded.model.num_parameters() / 1e6
        err.print(
            f"The patient: a language model of {size:.1f} million parameters, trained by this"
            " project."
        )
    found = _find(story)
    story.examine("intact")
    injury = _injure(story, found)
    with injury.applied(story.anatomy):
        story.examine("without the set")
    _repair(story, injury)
    _edit(story)
    story.examine("put back")
    data = {f"{name}.safetensors": partial(save, patch) for name, patch in story.patches.items()}
    deliver("demo", story.document, lambda: _print(found, story.document), as_json, folder, data)


def _open() -> Story:
    loaded, anatomy = open_model("patient")
    corpus = open_corpus(loaded, None, 256, WINDOWS, "auto")
    intact = {name: p.view(torch.uint8).clone() for name, p in loaded.model.state_dict().items()}
    document = {
        "model": "patient",
        "fingerprint": loaded.fingerprint,
        "prompts": list(PROMPTS),
        "states": [],
        "facts": len(facts()),
    }
    return Story(loaded, anatomy, corpus, intact, document)


def _find(story: Story) -> FindResult:
    """What the patient cannot live without, verified against controls."""
    with progress() as tell:
        result = find(story.anatomy, story.corpus, FindConfig(), tell)
    if not result.sets:
        raise SurgeonError(
            "nothing vital was found in the patient, which its card says there is; please report it"
            " with `surgeon find patient --json`."
        )
    story.document["find"] = result.to_json()
    return result


def _injure(story: Story, found: FindResult) -> Patch:
    """The first set zeroed, as a patch."""
    injury = ablate(
        story.anatomy,
        [Region(c.entry.site, c.entry.row, c.entry.col) for c in found.sets[0].entries],
    )
    story.patches["injury"] = injury
    return injury


def _repair(story: Story, injury: Patch) -> None:
    """Other entries of the row heal the injured model, in closed form; beside it, what the same
    does on a random row.

    It is made from the text behind the windows that the states are measured on.
    """
    whole = open_corpus(story.loaded, None, 256, None, "auto")
    corpus = Corpus(whole.name, whole.windows[WINDOWS:], whole.bos)
    with progress() as tell:
        healed = repair(
            story.anatomy,
            injury,
            corpus,
            RepairConfig(method="graft", exclude_injured=True),
            progress=tell,
        )
    with injury.applied(story.anatomy), healed.patch.applied(story.anatomy):
        row = story.examine("repaired")
    row |= {"recovered": healed.recovered, "control_recovered": (healed.control or {})["recovered"]}
    story.patches["repair"] = healed.patch
    story.document["repair"] = healed.to_json()


def _edit(story: Story) -> None:
    """One fact rewritten in the intact model, with the prompts around it."""
    tokenizer, config = tokenizer_of(story.loaded), ScoreConfig()
    with progress() as tell:
        made = edit(Preparation(story.anatomy, tokenizer, progress=tell), [FACT])
    score = scored(
        story.loaded, story.anatomy, made.patch, [FACT], CONTROLS, story.corpus, config, "auto"
    )
    with made.patch.applied(story.anatomy):
        story.examine("edited")
    story.patches["edit"] = made.patch
    story.document["edit"] = document_of(
        "patient", story.loaded, made, None, score, "edit.safetensors"
    )


def _print(found: FindResult, document: dict[str, Any]) -> None:
    rows, total, healed = document["states"], document["facts"], document["repair"]
    print_find("patient", found)
    table = Table(
        "",
        "NLL",
        "perplexity",
        "facts known",
        "weights",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for row in rows:
        bits = "as trained, bit for bit" if row["same_bits"] else "changed"
        table.add_row(
            row["state"],
            f"{row['nll']:.3f}",
            f"{row['ppl']:.2f}",
            f"{row['facts_known']} of {total}",
            bits,
        )
    out.print()
    print_table(table)
    judged = healed["corpus"]["judged_on"]
    out.print(
        f"the repair, a patch of {healed['patch_bytes']} bytes, undoes"
        f" [bold]{healed['recovered']:.3f}[/bold] of the damage on {judged} windows it never saw;"
        f" the same on a random row {healed['control']['recovered']:.3f}"
    )
    edited = document["edit"]
    p, flight, changed = (
        edited["target_probability"],
        edited["preflight"],
        sum(c["changed"] for c in edited["controls"]),
    )
    out.print(
        f"the edit: {escape(FACT.text)} [bold]{FACT.target}[/bold], P from {p['before']:.4f} to"
        f" {p['after']:.4f}; forecast {flight['verdict']} (relative damage"
        f" {flight['relative_damage']:.3f}); {changed} of {len(CONTROLS)} control prompts changed"
    )
    for number, prompt in enumerate(PROMPTS):
        out.print(f"\n[bold]{escape(prompt)}[/bold] ...")
        for row in rows:
            out.print(f"  {row['state']:<16} {escape(' '.join(row['texts'][number].split()))}")

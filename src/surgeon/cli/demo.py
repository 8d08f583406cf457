"""`surgeon demo`: the whole story on the patient."""

from __future__ import annotations

from math import exp
from typing import Any

import click
import torch
from rich.markup import escape
from rich.table import Table

from ..anatomy import Region
from ..errors import MissingExtra, SurgeonError
from ..find import FindConfig, FindResult, find
from ..measure import generate, mean_nll
from ..patch import ablate, save
from ..patients.generate import facts
from ..patients.train import known_facts
from ..report import write_report
from .common import err, json_option, open_corpus, open_model, out, print_json, print_table, progress, run_folder, to_text, tokenizer_of
from .find import print_find

PROMPTS = (
    "Once upon a time, there was a little",
    "Everyone knows that Harvard University is in",
    "My grandmother says that people first made pizza in",
)
WINDOWS = 40


@click.command("demo")
@click.option("-o", "output", metavar="DIR", help="Also write the run folder: demo.json, the injury as a patch, report.html.")
@json_option
def command(output: str | None, as_json: bool) -> None:
    """Find what the patient cannot live without, prove it, take it out and put it back bit for bit. Two minutes on two CPU cores."""
    folder = None if output is None else run_folder(output)
    loaded, anatomy = open_model("patient")
    tokenizer = tokenizer_of(loaded)
    corpus = open_corpus(loaded, None, 256, WINDOWS, "auto")
    if not as_json:
        err.print(
            f"The patient: a language model of {loaded.model.num_parameters() / 1e6:.1f} million parameters, trained by this project."
        )
    with progress() as tell:
        result = find(anatomy, corpus, FindConfig(), tell)
    if not result.sets:
        raise SurgeonError(
            "nothing vital was found in the patient, which its card says there is; please report it with `surgeon find patient --json`."
        )
    parts = [Region(c.entry.site, c.entry.row, c.entry.col) for c in result.sets[0].entries]
    before = {name: p.view(torch.uint8).clone() for name, p in loaded.model.state_dict().items()}
    injury = ablate(anatomy, parts)
    rows: list[dict[str, Any]] = []

    def examine(state: str) -> None:
        nll = mean_nll(loaded.model, corpus.windows)
        known = sum(sum(p > 0.5 for p in phrasings) >= 3 for phrasings in known_facts(loaded.model, tokenizer))
        same = all(torch.equal(p.view(torch.uint8), before[name]) for name, p in loaded.model.state_dict().items())
        texts = [t.text for t in generate(loaded.model, tokenizer, PROMPTS, 24)]
        rows.append({"state": state, "nll": nll, "ppl": exp(nll), "facts_known": known, "same_bits": same, "texts": texts})

    examine("intact")
    injury.apply_(anatomy)
    examine("without the set")
    injury.undo_(anatomy)
    examine("put back")
    document: dict[str, Any] = {
        "model": "patient",
        "fingerprint": loaded.fingerprint,
        "find": result.to_json(),
        "prompts": list(PROMPTS),
        "states": rows,
        "facts": len(facts()),
    }
    if folder is not None:
        save(injury, folder / "injury.safetensors")
        (folder / "demo.json").write_text(to_text(document) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        _print(result, document)
    if folder is not None:
        try:
            path = write_report(folder)
        except MissingExtra as error:  # the results are there, only their pictures are not
            click.echo(f"surgeon: no report.html was written: {error}", err=True)
        else:
            click.echo(f"report: {path}", err=True)


def _print(result: FindResult, document: dict[str, Any]) -> None:
    rows, total = document["states"], document["facts"]
    print_find("patient", result)
    table = Table("", "NLL", "perplexity", "facts known", "weights", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        bits = "as trained, bit for bit" if row["same_bits"] else "changed"
        table.add_row(row["state"], f"{row['nll']:.3f}", f"{row['ppl']:.2f}", f"{row['facts_known']} of {total}", bits)
    out.print()
    print_table(table)
    for number, prompt in enumerate(PROMPTS):
        out.print(f"\n[bold]{escape(prompt)}[/bold] ...")
        for row in rows:
            out.print(f"  {row['state']:<16} {escape(' '.join(row['texts'][number].split()))}")

"""`surgeon edit`: rewrite facts; the damage is known, and may be refused, before a weight
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from ..anatomy import Anatomy, Loaded
from ..corpus import read_text
from ..edit import (
    METHODS,
    ContextConfig,
    CovarianceCache,
    Edit,
    EditConfig,
    LayerForecast,
    Preparation,
    PrepareConfig,
    Request,
    Session,
    SessionConfig,
    ValueConfig,
    default_folder,
    default_value,
    edit,
    radar,
    session,
)
from ..edit.preflight import REFUSE, worst
from ..errors import BadInput, Refused
from ..facts import Fact, read_facts
from ..measure import Scorecard, ScoreConfig, examine, require_causal, with_neighbours
from ..patch import Patch, save
from ..show.console import err
from ..show.edit import print_edit
from .common import (
    F,
    deliver,
    folder_option,
    json_option,
    model_options,
    open_corpus,
    open_model,
    options,
    progress,
    require_finite,
    run_folder,
    seed_option,
    text_options,
    tokenizer_of,
)
from .suggest import print_suggested, suggested

VALUE = {f.name: f for f in fields(ValueConfig)}
NEW_TOKENS = 20


def _value_options() -> Callable[[F], F]:
    """An option for each setting of the value's optimisation, described by the setting itself."""
    return options(
        *(
            click.option(
                f"--value-{name.replace('_', '-')}",
                f"value_{name}",
                type=type(f.default),
                help=f"Value: {f.metadata['help']}.",
            )
            for name, f in VALUE.items()
        )
    )


def _rail(name: str) -> str:
    return str(SessionConfig.__dataclass_fields__[name].metadata["help"])


@click.command("edit")
@model_options
@click.option(
    "--prompt",
    metavar="TEMPLATE",
    help="Prompt of the fact, with {} where the subject stands: 'The capital of {} is'.",
)
@click.option("--subject", help="What the fact is about.")
@click.option("--target", help="What the model is to say next.")
@click.option("--true", "true", help="What it says now, if you want the two compared.")
@click.option(
    "--facts",
    "facts_file",
    metavar="FILE",
    help="Many facts: JSON lines with prompt, subject, target; or CounterFact's JSON.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first N facts of the file.")
@click.option("-o", "output", metavar="P", help="Patch file to write.")
@click.option(
    "--method",
    default=EditConfig.method,
    show_default=True,
    type=click.Choice(METHODS),
    help="The editor.",
)
@click.option(
    "--layer",
    "layers",
    multiple=True,
    type=int,
    help="Layer to change; memit and alphaedit take several.  [default: by depth]",
)
@click.option("--controls", metavar="FILE", help="Prompts that should not change, one a line.")
@click.option(
    "--sequential",
    is_flag=True,
    help="One fact after the other, with guard rails; the edit that breaks one is taken back.",
)
@click.option(
    "--max-nll-rise",
    default=SessionConfig.nll_rise,
    show_default=True,
    help=f"Sequential: {_rail('nll_rise')}.",
)
@click.option(
    "--max-norm",
    default=SessionConfig.norm,
    show_default=True,
    help=f"Sequential: {_rail('norm')}.",
)
@click.option(
    "--min-kept",
    default=SessionConfig.kept,
    show_default=True,
    help=f"Sequential: {_rail('kept')}.",
)
@click.option(
    "--radar",
    "radar_top",
    default=0,
    metavar="N",
    help="Show the N places of --text that the edit changes most.",
)
@click.option(
    "--suggest-layer",
    is_flag=True,
    help="Try the layers on the first facts, print their ranking, and write no patch.",
)
@click.option("--force", is_flag=True, help="Write the patch also if the forecast says refuse.")
@click.option(
    "--covariance-text",
    metavar="FILE",
    help="Text for the covariance of the keys; default: text that the model writes itself.",
)
@click.option(
    "--tokens",
    type=int,
    help=f"Covariance: {PrepareConfig.__dataclass_fields__['tokens'].metadata['help']}.",
)
@click.option(
    "--ridge",
    default="0.01",
    show_default=True,
    help="Ridge, as a share of the covariance's mean diagonal; or ledoit-wolf.",
)
@click.option(
    "--contexts",
    default=ContextConfig.count,
    show_default=True,
    help="Texts of the model to stand before the prompt.",
)
@click.option(
    "--weight",
    default=EditConfig.weight,
    show_default=True,
    help="memit: how many usual keys the covariance stands for.",
)
@click.option(
    "--energy",
    default=EditConfig.energy,
    show_default=True,
    help="alphaedit: share of the keys' energy that may be touched.",
)
@click.option(
    "--rounds",
    default=EditConfig.rounds,
    show_default=True,
    help=f"{EditConfig.__dataclass_fields__['rounds'].metadata['help']}.",
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Where covariances are kept.  [default: $SURGEON_CACHE, or the user's cache folder]",
)
@click.option("--no-cache", is_flag=True, help="Keep no covariance.")
@_value_options()
@text_options(windows=20)
@seed_option
@folder_option
@json_option
def command(
    model: str,
    dtype: str,
    device: str,
    prompt: str | None,
    subject: str | None,
    target: str | None,
    true: str | None,
    facts_file: str | None,
    limit: int | None,
    output: str | None,
    method: str,
    layers: tuple[int, ...],
    controls: str | None,
    sequential: bool,
    max_nll_rise: float,
    max_norm: float,
    min_kept: float,
    radar_top: int,
    suggest_layer: bool,
    force: bool,
    covariance_text: str | None,
    tokens: int | None,
    ridge: str,
    contexts: int,
    weight: float,
    energy: float,
    rounds: int,
    cache: str | None,
    no_cache: bool,
    text: str | None,
    window: int,
    windows: int | None,
    bos: str,
    seed: int,
    folder: str | None,
    as_json: bool,
    **value: Any,
) -> None:
    """Make MODEL say something else about a subject, as a patch; with the forecast of the damage,
    and a scorecard beside controls.

    --text is unrelated text, on which the perplexity before and after is measured.
    """
    facts = requested(prompt, subject, target, true, facts_file, limit)
    prompts = (
        []
        if controls is None
        else [line.strip() for line in read_text(controls).splitlines() if line.strip()]
    )
    if output is None and not suggest_layer:
        raise click.UsageError("Missing option '-o'; name the patch file to write.")
    if output is not None and not Path(output).parent.is_dir():
        raise BadInput(
            f"there is no folder {Path(output).parent} for the patch {output}; make it first."
        )
    rails = SessionConfig(max_nll_rise, max_norm, min_kept)
    run = run_folder(folder)
    settings = {k.removeprefix("value_"): v for k, v in value.items() if v is not None}
    config = EditConfig(
        method,
        tuple(sorted(set(layers))),
        weight,
        energy,
        rounds=rounds,
        value=replace(default_value(method), **settings),
    )
    prepare = PrepareConfig(tokens, parsed_ridge(ridge), ContextConfig(count=contexts), seed, bos)
    loaded, anatomy = open_model(model, dtype, device)
    require_causal(loaded.model)
    corpus = open_corpus(loaded, text, window_within(anatomy, window, text), windows, bos)
    with progress() as tell:
        preparation = Preparation(
            anatomy,
            tokenizer_of(loaded),
            prepare,
            (
                None
                if covariance_text is None
                else open_corpus(
                    loaded, covariance_text, window_within(anatomy, window, None), None, bos
                )
            ),
            None if no_cache else CovarianceCache(Path(cache) if cache else default_folder()),
            loaded.fingerprint,
            tell,
        )
        facts = with_neighbours(loaded.model, tokenizer_of(loaded), facts, bos=bos)
        if suggest_layer:
            ranking = suggested(preparation, facts, config, tell)
        else:
            ran = (
                session(preparation, facts, corpus.windows, config, rails, tell)
                if sequential
                else None
            )
            made = edit(preparation, facts, config) if ran is None else None
            patch, layers_made = made_patch(made, ran)
            for request in requests_of(made, ran):
                for warning in request.bare.warnings:
                    err.print(f"surgeon: {escape(warning)}")
            _refuse(layers_made, force)
            kept = facts if ran is None else facts[: len(ran.edits)]
            score = scored(
                loaded,
                anatomy,
                patch,
                kept,
                prompts,
                corpus,
                ScoreConfig(NEW_TOKENS, seed=seed),
                bos,
            )
            seen = (
                radar(anatomy, tokenizer_of(loaded), patch, corpus.windows, radar_top)
                if radar_top > 0
                else None
            )
    if suggest_layer:
        document: dict[str, Any] = {
            "model": model,
            "fingerprint": loaded.fingerprint,
            "method": method,
            **ranking,
        }
        deliver("suggest", document, lambda: print_suggested(model, document), as_json, run)
        return
    require_finite(**{"the NLL of the edited model": score.after.nll})
    assert output is not None
    save(patch, output)
    document = document_of(model, loaded, made, ran, score, output)
    if seen is not None:
        document["radar"] = seen.to_json()
    deliver(
        "edit",
        document,
        lambda: print_edit(model, document),
        as_json,
        run,
        {"edit.safetensors": partial(save, patch)},
    )


def made_patch(made: Edit | None, ran: Session | None) -> tuple[Patch, list[LayerForecast]]:
    if ran is not None:
        return ran.patch, [f for e in ran.edits for f in e.layers]
    assert made is not None
    return made.patch, made.layers


def requests_of(made: Edit | None, ran: Session | None) -> list[Request]:
    return [
        r
        for e in ([made] if made is not None else ran.edits if ran is not None else [])
        for r in e.requests
    ]


def _refuse(layers: Sequence[LayerForecast], force: bool) -> None:
    """Raises: Refused if the forecast is as bad as that, unless `force`."""
    most = worst(layers)
    if most.verdict == "refuse" and not force:
        raise Refused(
            f"the edit would change what {most.site} writes by {most.relative_damage:.2f} of its"
            f" usual size everywhere, over the limit of {REFUSE:g}, so no patch was written; try"
            " another --layer, more --tokens, a prompt with words before the subject, or --force."
        )


def requested(
    prompt: str | None,
    subject: str | None,
    target: str | None,
    true: str | None,
    facts_file: str | None,
    limit: int | None,
) -> list[Fact]:
    """The facts of the file, or the one of the options. Raises: BadInput, UsageError."""
    if facts_file is not None:
        if prompt is not None or subject is not None or target is not None:
            raise click.UsageError("give either --facts, or --prompt, --subject and --target.")
        facts = read_facts(facts_file)[:limit]
        for number, fact in enumerate(facts, 1):
            if fact.target is None or not fact.target.strip():
                raise BadInput(
                    f"{facts_file}: fact {number} ({fact.text!r}) has no target; say what the model"
                    " is to answer."
                )
        return facts
    if prompt is None or subject is None or target is None:
        raise click.UsageError("an edit needs --prompt, --subject and --target, or --facts FILE.")
    if not target.strip():
        raise BadInput(
            "the target is empty; give the word or words that the model should say, like --target"
            " Rome."
        )
    return [Fact(prompt, subject, target, true)]


def parsed_ridge(ridge: str) -> float | str:
    try:
        return float(ridge)
    except ValueError:
        return ridge


def window_within(anatomy: Anatomy, window: int, text: str | None) -> int:
    """The window, or where no text was named, at most what the model reads: the default text is cut
    to fit the model.
    """
    longest = getattr(anatomy.config, "max_position_embeddings", None)
    return window if text is not None or longest is None else min(window, longest)


def scored(
    loaded: Loaded,
    anatomy: Anatomy,
    patch: Patch,
    facts: Sequence[Fact],
    controls: Sequence[str],
    corpus: Any,
    config: ScoreConfig,
    bos: str,
) -> Scorecard:
    """The model examined without the patch and with it."""
    tokenizer = tokenizer_of(loaded)
    before = examine(loaded.model, tokenizer, facts, controls, corpus, config, bos)
    with patch.applied(anatomy):
        after = examine(loaded.model, tokenizer, facts, controls, corpus, config, bos)
    return Scorecard(before, after, config)


def document_of(
    model: str,
    loaded: Loaded,
    made: Edit | None,
    ran: Session | None,
    score: Scorecard,
    output: str,
) -> dict[str, Any]:
    card = score.to_json()
    first = card["facts"][0]
    n = len(card["facts"])
    if ran is None:
        assert made is not None
        preflight, method, seconds = made.to_json(), made.method, made.seconds
    # each edit was foreseen on the model with those before it; the forecasts of the worst stand for
    # all
    else:
        preflight = max((e.to_json() for e in ran.edits), key=lambda p: float(p["relative_damage"]))
        preflight["facts"] = [note for e in ran.edits for note in e.facts]
        method, seconds = ran.edits[0].method, sum(e.seconds for e in ran.edits)
    return {
        "model": model,
        "fingerprint": loaded.fingerprint,
        "patch": output,
        "method": method,
        "layers": [
            int(layer["site"].partition(".")[0].removeprefix("L")) for layer in preflight["layers"]
        ],
        "preflight": preflight,
        "target_probability": {
            when: sum(f["target_probability"][when] for f in card["facts"]) / n
            for when in ("before", "after")
        },
        "controls": score.controls(),
        "free_generation": {when: first["free"][0][when] for when in ("before", "after")},
        "scorecard": card,
        "seconds": seconds,
        **({} if ran is None else {"session": ran.to_json()}),
    }

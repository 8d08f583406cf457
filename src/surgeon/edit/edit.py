"""One edit of a model: facts in, a patch and its forecast out; the model stays as it was.

How this works. The MLP of a layer is read as a memory: at the subject's last token a key k enters
its `mlp.down`, and the value W k that leaves it is what the model recalls there. An edit is made in
four steps.

1. The prompt is tokenised after several contexts, and the subject found in it (contexts.py,
   value.py).
2. The value: what has to be added to the write there so that the model says the target (value.py).
3. The change: of all changes of W that write this for the fact's keys, the one that usual keys
   notice least. How much that is, the covariance of keys tells (covariance.py, prepare.py); the
   formulas are those of rome.py, emmet.py, memit.py and alphaedit.py.
4. The forecast: what the change does to usual keys, exact before a weight is written
   (preflight.py).

How an editor goes about steps 2 and 3 with several facts or layers stands in editors.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from ..errors import BadInput, Refused
from ..facts import Fact
from ..patch import Patch, compose
from .config import DEFAULTS, SEVERAL_LAYERS, EditConfig, layers_by_depth
from .editors import Change, exactly, fine_tuned, one_by_one, spread
from .keys import dense_down
from .preflight import Preflight
from .prepare import Preparation
from .value import Request


@dataclass(frozen=True, eq=False)
class Edit:
    """What an editor made of some facts: the patch and its forecast."""

    patch: Patch
    preflight: Preflight
    method: str
    seconds: float


def edit(preparation: Preparation, facts: Sequence[Fact], config: EditConfig = DEFAULTS) -> Edit:
    """Make the patch with which the model says each fact's target. Nothing is written: apply the
    patch to have the edit.

    ROME with several facts edits one after the other, each on the model with those before it; the
    other methods take them together.
    Raises: BadInput for a fact without target, a layer that cannot be edited; UnusableKey; Refused
    if two facts contradict each other.
    """
    began = time.perf_counter()
    requests = [_request(preparation, fact) for fact in facts]
    _require_consistent(facts)
    layers = _layers(preparation, requests, config)
    preparation.gather(layers)
    change = _change(preparation, requests, layers, config)
    whole = reduce(compose, change.patches)
    made_by = {
        "surgeon": whole.made_by["surgeon"],
        "operation": "edit",
        "method": config.method,
        "layers": layers,
        "seed": preparation.config.seed,
        "facts": [[fact.prompt, fact.subject, fact.target] for fact in facts],
    }
    patch = replace(whole, made_by=made_by)
    return Edit(patch, change.preflight, config.method, time.perf_counter() - began)


def _change(
    preparation: Preparation, requests: list[Request], layers: list[int], config: EditConfig
) -> Change:
    if config.method in SEVERAL_LAYERS:
        return spread(preparation, requests, layers, config)
    make = {"emmet": exactly, "ft": fine_tuned}.get(config.method, one_by_one)
    return make(preparation, requests, layers[0], config)


def _request(preparation: Preparation, fact: Fact) -> Request:
    if fact.target is None:
        raise BadInput(f"the fact {fact.text!r} has no target; say what the model is to answer.")
    return Request.of(
        preparation.tokenizer,
        fact.prompt,
        fact.subject,
        fact.target,
        preparation.prefixes,
        preparation.config.bos,
    )


def _require_consistent(facts: Sequence[Fact]) -> None:
    targets: dict[str, str | None] = {}
    for fact in facts:
        first = targets.setdefault(fact.text, fact.target)
        if first != fact.target:
            raise Refused(
                f"{fact.text!r} is to become {first!r} and {fact.target!r} at once; keep one of the"
                " two."
            )


def _layers(preparation: Preparation, requests: Sequence[Request], config: EditConfig) -> list[int]:
    """The layers to change, in order. Raises: BadInput for one that cannot be edited."""
    anatomy = preparation.anatomy
    depth = len(anatomy.layers)
    layers = sorted(set(config.layers)) or list(layers_by_depth(depth, config.method))
    if len(layers) > 1 and config.method not in SEVERAL_LAYERS:
        raise BadInput(
            f"{config.method} changes one layer, and {len(layers)} were named; use ‹method›"
            f" {' or '.join(SEVERAL_LAYERS)} for several."
        )
    for layer in layers:
        dense_down(anatomy, layer)
    if layers[-1] == depth - 1:
        for request in requests:
            _require_end(request, depth - 1)
    return layers


def _require_end(request: Request, layer: int) -> None:
    """Raises: BadInput unless the subject ends the prompt and one token is wanted: nothing reads in
    the last layer what an earlier token holds.
    """
    inside = any(prompt.stop < len(prompt.ids) for prompt in request.prompts)
    if inside or any(len(target) > 1 for target in request.targets):
        raise BadInput(
            f"layer {layer} is the last, and nothing reads there what the token"
            f" {request.bare.subject_tokens[-1]!r} holds; choose a layer below."
        )

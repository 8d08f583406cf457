"""Passes of the model with the subject corrupted and something clean put back.

A row of a batch is one position and one draw of the noise; all rows of a batch restore the same
layer. Each batch begins at the lowest layer it changes: what lies below was computed once. What
cannot have an effect in a causal model is not run at all.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import BadInput
from ..subject import SubjectPrompt
from ..tap import LayerInput, Tap, by_position, capture, resume
from .config import TraceConfig
from .corruption import embedding_of

TOKENS = 4096  # in one pass
LOGITS = 2**26  # in one pass
SEVERED = "severed"


class Restorer:
    """One prompt: its clean run and its corrupted runs, kept, and the runs with one site restored.

    answer: id of the answer, default the clean argmax; versus: of the answer it is compared with,
    default the likeliest other one of the corrupted runs. clean: the metric of the clean run;
    corrupt (sample,): of each corrupted one.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        prompt: SubjectPrompt,
        corrupted: Float[Tensor, "sample pos d_embed"],
        config: TraceConfig,
        answer: int | None,
        versus: int | None,
    ) -> None:
        self.anatomy, self.prompt, self.config = anatomy, prompt, config
        self.layers, self.embed = anatomy.layers, embedding_of(anatomy)
        self.window = config.window_of(len(self.layers))
        wanted = [k for k in ("mlp", "attn") if k in config.kinds or config.sever == k]
        self.modules: dict[str, list[nn.Module]] = {
            kind: [write_module(anatomy, i, kind) for i in range(len(self.layers))]
            for kind in wanted
        }
        self.device = corrupted.device
        self.ids = torch.tensor([prompt.ids], device=self.device)
        # a resumed pass has to hand states on in the way that the layers of this model do
        several = len(self.layers) > 1
        self.as_tuple = (
            capture(anatomy.model, self.layers, 1, input_ids=self.ids).as_tuple
            if several
            else False
        )
        with torch.no_grad():
            logits, self.clean_outputs = self._recorded(self.embed(self.ids))
            corrupt_logits, self.corrupt_outputs = self._recorded(corrupted)
        self.answer = int(logits[0].argmax()) if answer is None else answer
        others = corrupt_logits.mean(0)
        others[self.answer] = -torch.inf
        self.versus = int(others.argmax()) if versus is None else versus
        self.clean = float(self._metric(logits))
        self.corrupt = self._metric(corrupt_logits)
        self.rows = max(1, min(TOKENS // len(prompt.ids), LOGITS // logits.shape[1]))

    @torch.no_grad()
    def restored(self, kind: str, layer: int) -> Float[Tensor, "pos sample"]:
        """The metric of each corrupted run with this site of the layer restored at one position
        after the other.

        kind: "state", "mlp", "attn", or "severed": a state, with the modules `config.sever` of the
        layers above kept as they were in the corrupted run, at its position.
        """
        samples = len(self.corrupt)
        effects = self.corrupt.repeat(len(self.prompt.ids), 1)
        live = torch.tensor(self._live(kind, layer))
        pairs = torch.cartesian_prod(live, torch.arange(samples)).to(self.device)
        parts = [
            self._pass(kind, layer, part[:, 0], part[:, 1])
            for part in torch.split(pairs, self.rows)
        ]
        effects[live] = torch.cat(parts).view(len(live), samples)
        return effects

    def _live(self, kind: str, layer: int) -> range:
        """The positions that can matter: before the subject both runs are the same, and after the
        last layer no position reads another.
        """
        n = len(self.prompt.ids)
        alone = layer if kind in ("state", SEVERED) else self._span(layer).start
        return range(n - 1, n) if alone == len(self.layers) - 1 else range(self.prompt.start, n)

    def _span(self, layer: int) -> range:
        """The layers restored together; an even window reaches one layer further down than up, as
        in the published code.
        """
        return range(
            max(0, layer - self.window // 2), min(len(self.layers), layer + (self.window + 1) // 2)
        )

    def _pass(
        self, kind: str, layer: int, at: Int64[Tensor, " row"], sample: Int64[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """One batch: row i is corrupted as in `sample[i]` and restored at position `at[i]`."""
        rows, last = torch.arange(len(at), device=self.device), len(self.layers) - 1

        def clean(y: Tensor, source: Tensor) -> Tensor:
            y = y.clone()
            by_position(y, len(rows))[rows, at] = source[0, at]
            return y

        def corrupt(y: Tensor, source: Tensor) -> Tensor:
            y = y.clone()
            by_position(y, len(rows))[rows, at] = source[sample, at]
            return y

        with Tap() as tap:
            if kind in ("state", SEVERED):
                # the restored state is what enters the layer above; above the last there is none
                begin = min(layer + 1, last)
                if layer == last:
                    tap.on_output(
                        self.layers[last], partial(clean, source=self.clean_outputs["state"][last])
                    )
                if kind == SEVERED and self.config.sever is not None:
                    for i in range(layer + 1, last + 1):
                        source = self.corrupt_outputs[self.config.sever][i]
                        tap.on_output(
                            self.modules[self.config.sever][i], partial(corrupt, source=source)
                        )
            else:
                begin = self._span(layer).start
                for i in self._span(layer):
                    tap.on_output(
                        self.modules[kind][i], partial(clean, source=self.clean_outputs[kind][i])
                    )
            entering = (
                self.corrupt_outputs["embed"][0]
                if begin == 0
                else self.corrupt_outputs["state"][begin - 1]
            )[sample]
            if kind in ("state", SEVERED) and layer < last:
                entering = clean(entering, self.clean_outputs["state"][layer])
            if begin == 0:
                tap.on_output(self.embed, lambda _: entering)
                return self._metric(self._last_logits(tap, len(rows)))
            with resume(self.layers, LayerInput(begin, entering, self.as_tuple)):
                return self._metric(self._last_logits(tap, len(rows)))

    def _recorded(
        self, embedded: Float[Tensor, "batch pos d_embed"]
    ) -> tuple[Float[Tensor, "batch d_vocab"], dict[str, list[Tensor]]]:
        """The last logits, and what every layer, MLP and attention put out, each (batch, pos,
        d_model).
        """
        found: dict[str, list[Tensor]] = {
            "embed": [embedded],
            "state": [],
            **{kind: [] for kind in self.modules},
        }
        with Tap() as tap:
            tap.on_output(self.embed, lambda _: embedded)
            for i, layer in enumerate(self.layers):
                for kind, modules in self.modules.items():
                    tap.on_output(modules[i], partial(_append, found[kind], len(embedded)))
                tap.on_output(layer, partial(_append, found["state"], len(embedded)))
            return self._last_logits(tap, len(embedded)), found

    def _last_logits(self, tap: Tap, batch: int) -> Float[Tensor, "batch d_vocab"]:
        head = self.anatomy.model.get_output_embeddings()  # type: ignore[operator]
        # only the last position is asked; a slice that is not contiguous would make torch multiply
        # row by row
        tap.on_input(head, lambda x: x[:, -1:].contiguous())
        logits: Tensor = tap.run(
            self.anatomy.model, input_ids=self.ids.expand(batch, -1), use_cache=False
        ).logits
        return logits[:, -1].float()

    def _metric(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """In float32, on the CPU."""
        if self.config.metric == "probability":
            return (logits[:, self.answer] - logits.logsumexp(-1)).exp().cpu()
        return (logits[:, self.answer] - logits[:, self.versus]).cpu()


def write_module(anatomy: Anatomy, layer: int, kind: str) -> nn.Module:
    """What an MLP or an attention writes: its output projection, or for experts the block that sums
    them up.

    The projection and not the block around it, since some blocks (BLOOM) add the residual stream
    themselves.
    Raises: BadInput if the map of the layer has no such projection.
    """
    role = {"mlp": "mlp.down", "attn": "attn.out"}[kind]
    sites = [s for s in anatomy.addresses if s.layer == layer and s.role == role]
    if not sites:
        raise BadInput(
            f"layer {layer} of this model has no {role}, so its {kind} output cannot be restored;"
            f" leave {kind} out of --kinds."
        )
    dense = [s for s in sites if s.expert is None]
    if dense:
        return anatomy.module(dense[0])
    prefix = f"{anatomy.layers_path}.{layer}."
    block = anatomy.addresses[sites[0]].module.removeprefix(prefix).partition(".")[0]
    return anatomy.model.get_submodule(prefix + block)


def _append(found: list[Tensor], batch: int, y: Tensor) -> None:
    # a copy, since some layers (Falcon) add to what their MLP gave them, in place
    found.append(by_position(y.detach().clone(), batch))

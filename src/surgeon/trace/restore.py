"""Passes of the model with the subject corrupted and something clean put back."""

# How this works.
#
# The clean prompt and the corrupted ones are run once, and what every layer, MLP and attention put
# out is kept. Restoring a site means: run the corrupted prompt again, and overwrite what the site
# puts out at one position with what it put out in the clean run.
#
# * Sites of one layer are batched. A row of a batch is one position and one draw of the noise.
# * A batch begins at the lowest layer that it changes, with the kept states of the corrupted runs;
#   the layers below are skipped. A restored state is simply what the layer above receives.
# * What cannot have an effect in a causal model is not run: positions before the subject are the
#   same in both runs, and above the last layer no position reads another.
# * Severed: the modules of the layers above, at the restored position, put out what they did in the
#   corrupted run, so that the state acts only by the ways that are left.
#
# For MLP and attention a window of layers around the layer is restored together.

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..errors import BadInput
from ..subject import SubjectPrompt
from ..tap import LayerInput, Tap, by_position, capture, resume
from .config import SEVERED, TraceConfig
from .corruption import embedding_of

TOKENS = 4096  # in one pass
LOGITS = 2**26  # in one pass


class Restorer:
    """One prompt: its clean run and its corrupted runs, kept, and the runs with one site restored.

    answer: id of the answer; default, what the clean model says. versus: id of the answer it is
    compared with; default, the likeliest other one of the corrupted runs. clean: the metric of the
    clean run. corrupt (sample,): that of each corrupted one.
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
        wanted = [kind for kind in ("mlp", "attn") if kind in config.kinds or config.sever == kind]
        self.modules: dict[str, list[nn.Module]] = {
            kind: [write_module(anatomy, layer, kind) for layer in range(len(self.layers))]
            for kind in wanted
        }
        self.device = corrupted.device
        self.ids = torch.tensor([prompt.ids], device=self.device)
        # a resumed pass has to hand states on in the way that the layers of this model do
        self.as_tuple = False
        if len(self.layers) > 1:
            self.as_tuple = capture(anatomy.model, self.layers, 1, input_ids=self.ids).as_tuple
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
        """The metric of each corrupted run with one site of the layer restored, by position.

        kind: "state", "mlp", "attn", or "severed": a state, with the modules `config.sever` of the
        layers above kept as they were in the corrupted run, at its position.
        """
        samples = len(self.corrupt)
        effects = self.corrupt.repeat(len(self.prompt.ids), 1)
        live = torch.tensor(self._live(kind, layer))
        rows = torch.cartesian_prod(live, torch.arange(samples)).to(self.device)
        metrics = [
            self._pass(kind, layer, batch[:, 0], batch[:, 1])
            for batch in torch.split(rows, self.rows)
        ]
        effects[live] = torch.cat(metrics).view(len(live), samples)
        return effects

    def _live(self, kind: str, layer: int) -> range:
        """The positions that can matter: none before the subject, only the last one at the end."""
        n = len(self.prompt.ids)
        lowest = layer if kind in ("state", SEVERED) else self._span(layer).start
        first = n - 1 if lowest == len(self.layers) - 1 else self.prompt.start
        return range(first, n)

    def _span(self, layer: int) -> range:
        """The layers restored together.

        An even window reaches one layer further down than up, as in the published code.
        """
        below, above = self.window // 2, (self.window + 1) // 2
        return range(max(0, layer - below), min(len(self.layers), layer + above))

    def _pass(
        self, kind: str, layer: int, at: Int64[Tensor, " row"], sample: Int64[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """One batch: row i is corrupted as in `sample[i]` and restored at position `at[i]`."""
        n, last = len(at), len(self.layers) - 1
        rows = torch.arange(n, device=self.device)
        clean, corrupt = self.clean_outputs, self.corrupt_outputs

        def put(source: Tensor, run: int | Tensor) -> Callable[[Tensor], Tensor]:
            """Overwrite each row at its position with what `source` (run, pos, d_model) has."""

            def watch(y: Tensor) -> Tensor:
                y = y.clone()
                by_position(y, n)[rows, at] = source[run, at]
                return y

            return watch

        with Tap() as tap:
            if kind in ("state", SEVERED):
                # the restored state is what enters the layer above; above the last there is none
                begin = min(layer + 1, last)
                entering = self._entering(begin, sample)
                restore = put(clean["state"][layer], 0)
                if layer < last:
                    entering = restore(entering)
                else:
                    tap.on_output(self.layers[last], restore)
                if kind == SEVERED and self.config.sever is not None:
                    for i in range(layer + 1, last + 1):
                        sever = put(corrupt[self.config.sever][i], sample)
                        tap.on_output(self.modules[self.config.sever][i], sever)
            else:
                begin = self._span(layer).start
                entering = self._entering(begin, sample)
                for i in self._span(layer):
                    tap.on_output(self.modules[kind][i], put(clean[kind][i], 0))
            if begin == 0:
                tap.on_output(self.embed, lambda _: entering)
                return self._metric(self._last_logits(tap, n))
            with resume(self.layers, LayerInput(begin, entering, self.as_tuple)):
                return self._metric(self._last_logits(tap, n))

    def _entering(
        self, layer: int, sample: Int64[Tensor, " row"]
    ) -> Float[Tensor, "row pos channel"]:
        """What enters a layer in the corrupted runs; for layer 0 what the embedding puts out."""
        outputs = self.corrupt_outputs
        below = outputs["embed"][0] if layer == 0 else outputs["state"][layer - 1]
        return below[sample]

    def _recorded(
        self, embedded: Float[Tensor, "batch pos d_embed"]
    ) -> tuple[Float[Tensor, "batch d_vocab"], dict[str, list[Tensor]]]:
        """The last logits, and what every layer and module put out, each (batch, pos, d_model)."""
        batch = len(embedded)
        outputs: dict[str, list[Tensor]] = {
            "embed": [embedded],
            "state": [],
            **{kind: [] for kind in self.modules},
        }
        with Tap() as tap:
            tap.on_output(self.embed, lambda _: embedded)
            for i, layer in enumerate(self.layers):
                for kind, modules in self.modules.items():
                    tap.on_output(modules[i], partial(_append, outputs[kind], batch))
                tap.on_output(layer, partial(_append, outputs["state"], batch))
            return self._last_logits(tap, batch), outputs

    def _last_logits(self, tap: Tap, batch: int) -> Float[Tensor, "batch d_vocab"]:
        head = self.anatomy.model.get_output_embeddings()  # type: ignore[operator]
        # only the last position is asked; a slice that is not contiguous would make torch multiply
        # row by row
        tap.on_input(head, lambda x: x[:, -1:].contiguous())
        ids = self.ids.expand(batch, -1)
        logits: Tensor = tap.run(self.anatomy.model, input_ids=ids, use_cache=False).logits
        return logits[:, -1].float()

    def _metric(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """In float32, on the CPU."""
        if self.config.metric == "probability":
            return (logits[:, self.answer] - logits.logsumexp(-1)).exp().cpu()
        return (logits[:, self.answer] - logits[:, self.versus]).cpu()


def write_module(anatomy: Anatomy, layer: int, kind: str) -> nn.Module:
    """What an MLP or an attention writes with: its output projection, or the block of all experts.

    The projection and not the block around it, since some blocks (BLOOM) add the residual stream
    themselves.
    Raises: BadInput if the map of the layer has no such projection.
    """
    role = {"mlp": "mlp.down", "attn": "attn.out"}[kind]
    sites = [site for site in anatomy.addresses if site.layer == layer and site.role == role]
    if not sites:
        raise BadInput(
            f"layer {layer} of this model has no {role}, so its {kind} output cannot be restored;"
            f" leave {kind} out of ‹kinds›."
        )
    dense = [site for site in sites if site.expert is None]
    if dense:
        return anatomy.module(dense[0])
    # the child of the layer that holds the experts sums them up
    prefix = f"{anatomy.layers_path}.{layer}."
    block = anatomy.addresses[sites[0]].module.removeprefix(prefix).partition(".")[0]
    return anatomy.model.get_submodule(prefix + block)


def _append(outputs: list[Tensor], batch: int, y: Tensor) -> None:
    # a copy, since some layers (Falcon) add to what their MLP gave them, in place
    outputs.append(by_position(y.detach().clone(), batch))

"""A lab: one model, its map and its tokenizer, and what was worked out on them before.

Studies are functions of a lab and their settings. A lab is opened by the name of a model, as on the
command line, or made of a module and its tokenizer. It keeps what is costly and asked for again: a
text cut into windows, the covariance of keys, a finding. Every verb is a method, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from ..anatomy import Anatomy, Loaded, StreamedAnatomy, load_model, open_stream, prove
from ..anatomy.load import DTYPES, check_dtype, device_named
from ..cells.checkpoint import holds_cells, load_cells
from ..corpus import BOS_POLICIES, DEFAULT_WINDOW, Corpus, load_corpus, read_text
from ..errors import BadInput, SurgeonError, UnknownArchitecture
from ..patients import heldout_text
from ..progress import Tell
from ..settings import setting
from . import registry
from .desk import Desk

T = TypeVar("T")
PATIENT_TEXT = "patient-heldout"


@dataclass(frozen=True)
class ModelSettings:
    """How a model is opened."""

    dtype: str = setting(
        "auto",
        "auto is the checkpoint's own",
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
        group="Model",
    )
    device: str = setting("auto", "auto, cpu, cuda, ...", group="Model")


@dataclass(frozen=True)
class StreamSettings(ModelSettings):
    """How a model is opened that may be larger than memory."""

    stream: bool = setting(
        False,
        "leave the layers on disk or on the Hub and read one at a time, for models larger than"
        " memory",
        group="Model",
    )


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How prompts begin; and windows, where there is a text."""

    bos: str = setting(
        "auto",
        "whether windows and prompts begin with BOS; auto: what the tokenizer does by itself",
        choices=BOS_POLICIES,
        group="Text",
    )


@dataclass(frozen=True)
class TextSettings(PromptSettings):
    """The evaluation text, and how it is cut into windows."""

    text: str | None = setting(
        None,
        "UTF-8 text to evaluate on; not given: the patient's held-out text",
        metavar="FILE",
        is_file=True,
    )
    window: int = setting(DEFAULT_WINDOW, "tokens of a window, BOS included", group="Text")
    windows: int | None = setting(None, "use the first N windows; not given: all", group="Text")


class Lab(Desk):
    """A model to operate on; make one with `surgeon.open`.

    >>> import surgeon
    >>> lab = surgeon.open("patient")
    >>> lab.verify(at="L0.mlp.down[24, :]", windows=2).vital
    True
    """

    def __init__(self, loaded: Loaded, anatomy: Anatomy, opened_by: str | None = None) -> None:
        super().__init__(opened_by)
        self.loaded, self.anatomy = loaded, anatomy
        self._kept: dict[Hashable, Any] = {}

    def listen(self, tell: Tell) -> None:
        super().listen(tell)
        if isinstance(self.anatomy, StreamedAnatomy):
            self.anatomy.tell = partial(tell, "block")

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def fingerprint(self) -> str | None:
        if isinstance(self.anatomy, StreamedAnatomy):
            return self.anatomy.fingerprint()
        return self.loaded.fingerprint or None

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """Raises: BadInput if the model came without one."""
        if self.loaded.tokenizer is None:
            raise BadInput(
                f"{self.name} ships no tokenizer, so no text can be read with it; put its"
                " tokenizer.json beside the weights."
            )
        return self.loaded.tokenizer

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, kept under `key` for whoever asks next."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept

    def corpus(self, text: TextSettings, fit: bool = False) -> Corpus:
        """The evaluation text as windows.

        fit: a window longer than the model reads is cut to what it reads, where no text was named.
        Raises: BadText, BadInput; BadInput if the model cannot read windows or tokens like these.
        """
        window = text.window
        longest = self.positions
        if fit and text.text is None and longest is not None:
            window = min(window, longest)
        if longest is not None and window > longest:
            raise BadInput(
                f"‹window› {window} is longer than the {longest} positions that {self.name} reads;"
                f" use at most {longest}."
            )
        key = ("corpus", text.text, window, text.windows, text.bos)
        return self.once(key, partial(self._read, text, window))

    @property
    def positions(self) -> int | None:
        """How many tokens the model reads at most, where its configuration says so."""
        longest = getattr(self.anatomy.config, "max_position_embeddings", None)
        return None if longest is None else int(longest)

    def source(self, text: TextSettings) -> tuple[str, str]:
        """The evaluation text, whole, and its name. Raises: BadText."""
        if text.text is None:
            return heldout_text(), PATIENT_TEXT
        return read_text(text.text), Path(text.text).name

    def _read(self, text: TextSettings, window: int) -> Corpus:
        source, name = self.source(text)
        corpus = load_corpus(self.tokenizer, source, name, window, text.windows, text.bos)
        known = getattr(self.anatomy.config, "vocab_size", None)
        highest = int(corpus.windows.max())
        if known is not None and highest >= known:
            raise BadInput(
                f"the tokenizer of {self.name} gives token {highest}, and the model knows {known};"
                " the tokenizer belongs to another model."
            )
        return corpus

    def run(self, verb: str, leading: Any = None, /, **settings: Any) -> Any:
        """The result of a verb, by its name, with its settings by theirs.

        leading: the setting that the verb is about, like the weights to ablate.
        Raises: BadInput for a verb that there is not, or a setting it does not have.
        """
        study = registry.study_named(verb)
        if leading is not None:
            settings = {study.leading: leading, **settings}
        return study.run(self, settings)

    def demo(self, **settings: Any) -> Any:
        """Find, break, repair, edit and put back; a `Demo`."""
        return self.run("demo", **settings)

    def find(self, **settings: Any) -> Any:
        """Critical sets, verified against matched controls; a `FindResult`."""
        return self.run("find", **settings)

    def verify(self, at: Any = None, **settings: Any) -> Any:
        """Damage of given weights alone, together and all but one; a `Verification`."""
        return self.run("verify", at, **settings)

    def ablate(self, at: Any = None, **settings: Any) -> Any:
        """The patch that takes weights out, as an `Injury`; the model stays as it is."""
        return self.run("ablate", at, **settings)

    def measure(self, patches: Any = None, **settings: Any) -> Any:
        """Likelihood and behaviour, with patches or without; a `Measurement`."""
        return self.run("measure", patches, **settings)

    def audit(self, other: str | Path, /, **settings: Any) -> Any:
        """What became of the critical weights in `other`, made from this model's files; an
        `Audit`.
        """
        return self.run("audit", str(other), **settings)

    def trace(self, prompt: Any = None, **settings: Any) -> Any:
        """Which states carry a fact, a `TraceResult`; or facts, a `TraceAverage`."""
        return self.run("trace", prompt, **settings)

    def edit(self, prompt: Any = None, **settings: Any) -> Any:
        """The patch that rewrites a fact, with its forecast and scorecard; an `EditResult`."""
        return self.run("edit", prompt, **settings)

    def edit_layers(self, facts: Any = None, **settings: Any) -> Any:
        """Which layer to edit, by trial edits; a `LayerRanking`."""
        return self.run("edit layers", facts, **settings)

    def edit_many(self, facts: Any = None, **settings: Any) -> Any:
        """Facts rewritten one after the other, with guard rails; an `EditsResult`."""
        return self.run("edit many", facts, **settings)

    def repair(self, injury: Any = None, **settings: Any) -> Any:
        """The patch that heals an injury, judged beside a control; a `RepairResult`."""
        return self.run("repair", injury, **settings)

    def explain(self, patches: Any = None, **settings: Any) -> Any:
        """How patches work, the injury first, then its repair; an `Explanation`."""
        return self.run("explain", patches, **settings)

    def quantize(self, bits: Any = None, **settings: Any) -> Any:
        """What few bits cost, with the critical weights held out; a `QuantizeResult`."""
        return self.run("quantize", bits, **settings)

    def cells_geneformer(self, data: Any = None, **settings: Any) -> Any:
        """What a Geneformer loses without given weights; a `GeneformerDamage`."""
        return self.run("cells geneformer", data, **settings)

    def sweep(self, verb: str, grid: Mapping[str, Sequence[Any]], **settings: Any) -> Any:
        """The verb with every combination of the values in `grid`, as in
        `lab.sweep("quantize", {"bits": [4, 8]}, windows=4)`; a `SweepTable`.
        """
        from .sweep_table import swept

        return swept(self, verb, grid, settings)

    def sites(self) -> Any:
        """Every addressable weight matrix; a `SiteList`."""
        return self.run("sites")


def open_lab(
    model: str | Path | nn.Module | tuple[nn.Module, Any],
    tokenizer: Any = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    whole: bool = True,
) -> Lab:
    """Open MODEL and draw its map, proved by experiment.

    model: `patient`, a folder, a Hub id with or without `@revision`, or a module (with its
    tokenizer, as a second argument or in a tuple), which stays where it is. stream: leave the
    layers on disk and read one at a time; whole: as in `anatomy.open_stream`.
    Raises: BadInput, BadCheckpoint, UnknownArchitecture; SurgeonError for weights that are not
    finite.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if isinstance(model, tuple):
        model, tokenizer = model
    anatomy: Anatomy | None = None
    if isinstance(model, nn.Module):
        loaded = _loaded(model, tokenizer)
    elif holds_cells(str(model)):
        loaded, anatomy = _cells(str(model), dtype, device)
    elif stream:
        loaded, anatomy = open_stream(str(model), dtype, device, whole)
    else:
        know_sidecars()
        loaded = load_model(str(model), dtype, device)
    try:
        anatomy = anatomy or Anatomy.of(loaded.model)
        prove(anatomy)
    except UnknownArchitecture as error:
        raise _not_finite(loaded, anatomy) or error from error
    return Lab(loaded, anatomy, None if isinstance(model, nn.Module) else str(model))


def know_sidecars() -> None:
    """Teach transformers to read the checkpoints of `quantize` with ‹export› sidecar."""
    # here, since they import transformers' models, which takes seconds; in this order
    from .. import _quiet as _quiet
    from ..quantize.formats import sidecar_loader as sidecar_loader


def _cells(folder: str, dtype: str, device: str) -> tuple[Loaded, Anatomy]:
    """A model of gene expression: it has sites and patches, and no tokenizer."""
    check_dtype(dtype)
    cells = load_cells(folder)
    cells.model.to(device=device_named(device), dtype=DTYPES.get(dtype))
    model: Any = cells.model  # it is no PreTrainedModel
    return Loaded(model, None, folder, Path(folder), cells.fingerprint), cells.model.anatomy


def _loaded(model: nn.Module, tokenizer: Any) -> Loaded:
    """A module as if it had been loaded; its fingerprint is of the weights as they are now."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(weight.shape)}:{weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)
    return Loaded(model, tokenizer, name, Path(), digest.hexdigest())  # type: ignore[arg-type]


def _not_finite(loaded: Loaded, anatomy: Anatomy | None) -> SurgeonError | None:
    """What to say where NaN fails every experiment of the proof, and the map is not to blame."""
    with nullcontext() if anatomy is None else anatomy.holding(0):
        weights = [(p, w) for p, w in loaded.model.named_parameters() if not w.is_meta]
        broken = [name for name, weight in weights if not bool(torch.isfinite(weight).all())]
    if not broken:
        return None
    return SurgeonError(
        f"{loaded.name} holds weights that are not finite (NaN or infinity in"
        f" {', '.join(broken[:3])}), so nothing can be found or measured; download or write it"
        " again, or load it with a wider ‹dtype›."
    )

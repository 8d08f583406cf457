"""Checkpoints in the published layout: `best_model.pt`, `args.json`, `vocab.json`; and what
training here leaves beside them.

Only tensors are read: `torch.load` with `weights_only=True`, or the same tensors as
`model.safetensors`. Every tensor is accounted for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .. import files
from ..errors import BadCheckpoint, BadInput
from ..result import record
from .likelihood import Marginal
from .model import CellConfig, ScGPT
from .tokenise import CLS, END, PAD, TokenConfig

WEIGHTS, SAFE, ARGS, VOCAB = "best_model.pt", "model.safetensors", "args.json", "vocab.json"
TRAINING, MARGINAL = "training.json", "marginal.safetensors"
_RENAMED = (
    (r"^module\.", ""),
    (r"self_attn\.(_impl\.)?Wqkv\.", "self_attn.in_proj_"),
    (r"self_attn\._impl\.", "self_attn."),
)
_LAYER = re.compile(r"transformer_encoder\.layers\.(\d+)\.")
# parts that the published forward pass runs and this one does not have
_CHANGES = ("dsbn.", "batch_encoder.", "bn.")


@record
class LoadReport:
    """Where every tensor of a file went: how many the model computes with, by name those that it
    does not, such as heads over cell types, and how many had another name there.
    """

    file: str
    matched: int
    unmatched: list[str]
    renamed: int


@dataclass(frozen=True, eq=False)
class LoadedCells:
    """A model of gene expression, ready for surgery.

    others: the unmatched tensors, kept so that a patched copy has them. training: what `cells
    train` wrote (which cells it held out, for one), empty for others. fingerprint: SHA-256 of
    arguments, vocabulary and weights.
    """

    model: ScGPT
    vocab: dict[str, int]
    report: LoadReport
    others: dict[str, Tensor]
    tokens: TokenConfig
    fingerprint: str
    marginal: Marginal | None = None
    training: dict[str, Any] = field(default_factory=dict)


def holds_cells(folder: str | Path) -> bool:
    """Whether a folder looks like a model of gene expression, not one of transformers."""
    # unlike pathlib, these take any text for a path
    here, there = (os.path.exists(os.path.join(folder, name)) for name in (ARGS, "config.json"))
    return here and not there


def load_cells(folder: str | Path) -> LoadedCells:
    """Load a checkpoint in the published layout, in eval mode. `model.safetensors` is preferred
    where both are there.

    Raises: BadCheckpoint for a file that is missing, damaged or holds more than tensors, for a
    model that lacks weights (any `linear2` above all) or computes what this module does not.
    """
    folder = Path(folder)
    args, vocab = _read_json(folder / ARGS), _read_json(folder / VOCAB)
    if not vocab or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise BadCheckpoint(
            f"{folder / VOCAB} is no vocabulary: it should give a whole number to every gene."
        )
    file, raw = _read_weights(folder)
    names = {_published_name(name): name for name in raw}
    if len(names) < len(raw):
        raise BadCheckpoint(f"{file} holds the same tensor under two names; keep one of them.")
    state = {name: raw[stored] for name, stored in names.items()}
    _refuse_others(folder, args, state)
    vocab = _with_special(vocab, len(state.get("encoder.embedding.weight", ())))
    config = _shape(folder, args, vocab, state)
    with torch.device("meta"):
        model = ScGPT(config)
    wanted = model.state_dict()
    _check_weights(file, wanted, state)
    model.load_state_dict({name: state.pop(name) for name in wanted}, assign=True)
    renamed = sum(name != stored for name, stored in names.items())
    unmatched = sorted(names[name] for name in state)
    report = LoadReport(file.name, len(wanted), unmatched, renamed)
    tokens = TokenConfig(
        config.n_bins,
        int(args.get("max_seq_len", 1200)),
        bool(args.get("include_zero_gene", False)),
        config.pad_value,
    )
    marginal = Marginal.read(folder / MARGINAL) if (folder / MARGINAL).is_file() else None
    training = _read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    model.float().eval().requires_grad_(False)
    fingerprint = _fingerprint(folder, file)
    return LoadedCells(model, vocab, report, state, tokens, fingerprint, marginal, training)


def require_free(folder: str | Path) -> None:
    """Raises: BadInput if the folder holds a model already."""
    taken = [name for name in (WEIGHTS, SAFE, ARGS, VOCAB) if (Path(folder) / name).exists()]
    if taken:
        raise BadInput(
            f"{folder} holds a model already ({taken[0]}); name another folder, or ask to"
            " ‹overwrite› it."
        )


def save_cells(
    folder: str | Path,
    model: ScGPT,
    vocab: Mapping[str, int],
    tokens: TokenConfig | None = None,
    marginal: Marginal | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a model in the published layout, its weights also as safetensors."""
    folder = Path(folder)
    files.make_folder(folder)
    save_weights(folder, model.state_dict())
    _write_json(folder / ARGS, _args(model.shape, tokens or TokenConfig()))
    _write_json(folder / VOCAB, vocab)
    if marginal is not None:
        files.write_bytes(folder / MARGINAL, marginal.to_bytes())
    if training is not None:
        _write_json(folder / TRAINING, training)


def save_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write the weights, as tensors of a pickle and as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # in memory, for torch writes the file's own name into the archive
    pickled = io.BytesIO()
    torch.save(tensors, pickled)
    files.write_bytes(folder / WEIGHTS, pickled.getvalue())
    files.write_bytes(folder / SAFE, to_safetensors(tensors))


def make_vocab(genes: list[str]) -> dict[str, int]:
    """A vocabulary of these genes, the special tokens after them as in the published one."""
    return {name: i for i, name in enumerate([*genes, PAD, CLS, END])}


def _args(shape: CellConfig, tokens: TokenConfig) -> dict[str, Any]:
    return {
        "embsize": shape.d_model,
        "nheads": shape.n_heads,
        "d_hid": shape.d_mlp,
        "nlayers": shape.n_layers,
        "dropout": shape.dropout,
        "n_bins": shape.n_bins,
        "pad_token": PAD,
        "pad_value": shape.pad_value,
        "mask_value": shape.mask_value,
        "input_style": "binned",
        "input_emb_style": "continuous",
        "pre_norm": False,
        "max_seq_len": tokens.max_length,
        "include_zero_gene": tokens.include_zeros,
    }


def _refuse_others(folder: Path, args: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raises: BadCheckpoint for a model that computes something else than `ScGPT`."""
    style = args.get("input_emb_style", "continuous")
    what = [name for name in state if name.startswith(_CHANGES)]
    if style != "continuous":
        what = [f"{style} values"]
    if args.get("pre_norm"):
        what = ["norms before its blocks"]
    if what:
        raise BadCheckpoint(
            f"{folder} holds a model with {what[0]}, which this module does not compute; use one"
            " like the published ones."
        )


def _check_weights(file: Path, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    # `linear2` first: without it nothing of a layer's MLP is written
    missing = sorted((n for n in wanted if n not in state), key=lambda n: ".linear2." not in n)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BadCheckpoint(f"{file} lacks {', '.join(missing[:3])}{more}; download it again.")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)} for {tuple(tensor.shape)}"
            raise BadCheckpoint(
                f"{file} does not fit its {ARGS}: {name} {shapes}; use the one that came with it."
            )


def _with_special(vocab: dict[str, int], n_tokens: int) -> dict[str, int]:
    """The vocabulary with the special tokens it lacks put behind it, as the published loader does,
    where the embedding has room.
    """
    for name in (PAD, CLS, END):
        if name not in vocab and max(vocab.values()) + 1 < n_tokens:
            vocab = {**vocab, name: max(vocab.values()) + 1}
    return vocab


def _shape(
    folder: Path, args: Mapping[str, Any], vocab: Mapping[str, int], state: Mapping[str, Tensor]
) -> CellConfig:
    """The shape, from the tensors where they tell it and from the arguments where they do not."""
    layers = [int(m[1]) for name in state if (m := _LAYER.match(name))]
    try:
        n_tokens, d_model = state["encoder.embedding.weight"].shape
        d_mlp = len(state["transformer_encoder.layers.0.linear1.weight"])
        n_heads, n_layers = int(args["nheads"]), max(int(args.get("nlayers", 0)), max(layers) + 1)
    except (KeyError, ValueError, TypeError) as error:
        raise BadCheckpoint(
            f"{folder} holds no scGPT checkpoint: its weights or its {ARGS} have no {error}."
        ) from error
    if max(vocab.values()) >= n_tokens:
        raise BadCheckpoint(
            f"{folder / VOCAB} numbers genes up to {max(vocab.values())}, the model knows"
            f" {n_tokens}; use its own vocabulary."
        )
    pad = str(args.get("pad_token", PAD))
    if pad not in vocab:
        raise BadCheckpoint(
            f"{folder / VOCAB} has no {pad}, which {ARGS} names as padding; use the vocabulary that"
            " came with the model."
        )
    categorical = any(name.startswith("bin_decoder.") for name in state)
    kinds = {"n_bins": int, "pad_value": float, "mask_value": float, "dropout": float}
    try:
        return CellConfig(
            *(n_tokens, d_model, n_heads, d_mlp, n_layers),
            pad_id=vocab[pad],
            categorical=categorical,
            **{name: kind(args[name]) for name, kind in kinds.items() if name in args},
        )
    except (BadInput, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{folder / ARGS} cannot be used: {error}") from error


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    safe, pickled = folder / SAFE, folder / WEIGHTS
    try:
        if safe.is_file():
            return safe, load_safetensors(safe.read_bytes())
        if pickled.is_file():
            with warnings.catch_warnings():
                # said of files that are refused in any case
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                found = torch.load(pickled, map_location="cpu", weights_only=True)
            if isinstance(found, dict) and all(
                isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
            ):
                return pickled, dict(found)
            raise BadCheckpoint(
                f"{pickled} is not a plain table of tensors; save model.state_dict() and nothing"
                " else."
            )
    except pickle.UnpicklingError as error:
        raise BadCheckpoint(
            f"{pickled} holds more than tensors, which can run code when opened, so Surgeon does"
            " not open it; save model.state_dict() and nothing else."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise BadCheckpoint(
            f"the weights in {folder} are damaged ({str(error).splitlines()[0]}); download them"
            " again."
        ) from error
    raise BadCheckpoint(
        f"{folder} holds neither {WEIGHTS} nor {SAFE}; give the folder of a cell model, as `surgeon"
        " cells train` writes it."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(
            f"{path} cannot be read: {error.strerror}; a cell model has {WEIGHTS}, {ARGS} and"
            f" {VOCAB}."
        ) from error
    except ValueError as error:
        raise BadCheckpoint(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise BadCheckpoint(f"{path} is no JSON object.")
    return found


def _published_name(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _fingerprint(folder: Path, weights: Path) -> str:
    total = hashlib.sha256()
    for path in (folder / ARGS, folder / VOCAB, weights):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    files.write_text(path, json.dumps(dict(document), indent=1) + "\n")

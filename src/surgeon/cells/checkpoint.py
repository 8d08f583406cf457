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

from ..errors import BadCheckpoint, BadInput
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
_CHANGES = (
    "dsbn.",
    "batch_encoder.",
    "bn.",
)  # parts that the published forward pass runs and this one does not have


@dataclass(frozen=True)
class LoadReport:
    """Where every tensor of the file went.

    matched and unmatched: names in the file; renamed: how many had another name there.
    """

    file: str
    matched: list[str]
    unmatched: list[str]
    renamed: int

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "matched": len(self.matched),
            "unmatched": self.unmatched,
            "renamed": self.renamed,
        }


@dataclass(frozen=True, eq=False)
class LoadedCells:
    """A model of gene expression, ready for surgery.

    training: what `cells train` wrote (which cells it held out, for one), empty for others.
    fingerprint: SHA-256 of arguments, vocabulary and weights.
    """

    model: ScGPT
    vocab: dict[str, int]
    args: dict[str, Any]
    report: LoadReport
    tokens: TokenConfig
    fingerprint: str
    marginal: Marginal | None = None
    training: dict[str, Any] = field(default_factory=dict)


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
    state = {_published_name(name): tensor for name, tensor in raw.items()}
    _refuse_others(folder, args, state)
    if (embedding := state.get("encoder.embedding.weight")) is not None:
        vocab = _with_special(vocab, len(embedding))
    config = _shape(folder, args, vocab, state)
    if len(state) < len(raw):
        raise BadCheckpoint(f"{file} holds the same tensor under two names; keep one of them.")
    with torch.device("meta"):
        model = ScGPT(config)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state]
    if missing:
        missing.sort(
            key=lambda name: ".linear2." not in name
        )  # without these nothing of a layer's MLP is written
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BadCheckpoint(f"{file} lacks {', '.join(missing[:3])}{more}; download it again.")
    wrong = [
        f"{n} {tuple(state[n].shape)} for {tuple(w.shape)}"
        for n, w in wanted.items()
        if state[n].shape != w.shape
    ]
    if wrong:
        raise BadCheckpoint(
            f"{file} does not fit its {ARGS}: {wrong[0]}; use the one that came with it."
        )
    model.load_state_dict({name: state[name] for name in wanted}, assign=True)
    names = {_published_name(name): name for name in raw}
    report = LoadReport(
        file.name,
        sorted(names[n] for n in wanted),
        sorted(names[n] for n in state if n not in wanted),
        sum(_published_name(n) != n for n in raw),
    )
    tokens = TokenConfig(
        config.n_bins,
        int(args.get("max_seq_len", 1200)),
        bool(args.get("include_zero_gene", False)),
        config.pad_value,
    )
    marginal = Marginal.read(folder / MARGINAL) if (folder / MARGINAL).is_file() else None
    training = _read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    model.float().eval().requires_grad_(False)
    return LoadedCells(
        model, vocab, args, report, tokens, _fingerprint(folder, file), marginal, training
    )


def save_cells(
    folder: str | Path,
    model: ScGPT,
    vocab: Mapping[str, int],
    tokens: TokenConfig | None = None,
    marginal: Marginal | None = None,
    training: Mapping[str, Any] | None = None,
    flash_names: bool = False,
) -> None:
    """Write a model in the published layout, its weights also as safetensors.

    flash_names: as flash-attn has them, `Wqkv.`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    if flash_names:
        state = {
            name.replace("self_attn.in_proj_", "self_attn.Wqkv."): tensor
            for name, tensor in state.items()
        }
    pickled = (
        io.BytesIO()
    )  # torch writes the file's own name into the archive, and the temporary one must not get there
    torch.save(state, pickled)
    _write(folder / WEIGHTS, pickled.getvalue())
    _write(folder / SAFE, to_safetensors(state))
    _write(folder / ARGS, _json(_args(model.shape, tokens or TokenConfig())))
    _write(folder / VOCAB, _json(dict(vocab)))
    if marginal is not None:
        _write(folder / MARGINAL, marginal.to_bytes())
    if training is not None:
        _write(folder / TRAINING, _json(dict(training)))


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
        "n_layers_cls": shape.n_layers_types,
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
    changes = [name for name in state if name.startswith(_CHANGES)]
    what = (
        "norms before its blocks"
        if args.get("pre_norm")
        else f"{style} values"
        if style != "continuous"
        else "".join(changes[:1])
    )
    if what:
        raise BadCheckpoint(
            f"{folder} holds a model with {what}, which this module does not compute; use one like"
            " the published ones."
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
    try:
        n_tokens, d_model = state["encoder.embedding.weight"].shape
        layers = {
            int(m[1])
            for name in state
            if (m := re.match(r"transformer_encoder\.layers\.(\d+)\.", name))
        }
        first = state["transformer_encoder.layers.0.linear1.weight"]
        n_heads = int(args["nheads"])
        n_layers = max(int(args.get("nlayers", 0)), max(layers) + 1)
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
    types = state.get("cls_decoder.out_layer.weight")
    blocks = {
        int(m[1]) for name in state if (m := re.match(r"cls_decoder\._decoder\.(\d+)\.", name))
    }
    try:
        return CellConfig(
            n_tokens=n_tokens,
            d_model=d_model,
            n_heads=n_heads,
            d_mlp=first.shape[0],
            n_layers=n_layers,
            n_bins=int(args.get("n_bins", 51)),
            pad_id=vocab[pad],
            pad_value=float(args.get("pad_value", -2)),
            mask_value=float(args.get("mask_value", -1)),
            dropout=float(args.get("dropout", 0.2)),
            categorical=any(name.startswith("bin_decoder.") for name in state),
            flags="flag_encoder.weight" in state,
            from_cell="mvc_decoder.W.weight" in state,
            n_types=0 if types is None else types.shape[0],
            n_layers_types=(
                int(args.get("n_layers_cls", 3))
                if types is None
                else len({b // 3 for b in blocks}) + 1
            ),
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
                warnings.filterwarnings(
                    "ignore", message="Detected pickle protocol"
                )  # said of files that are refused in any case
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


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

"""Geneformer: a cell as its genes in the order of expression, read by a BERT masked language model.

Expression is divided by the cell's total and by each gene's median over the pretraining corpus, so
that a gene stands early where it is high for that gene. The model is transformers' BertForMaskedLM;
`Anatomy` knows it as `bert`, and patches work as on text models.
Source: Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9; huggingface.co/ctheodoris/Geneformer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..anatomy import Anatomy, Entry, Site
from ..errors import BadInput
from ..tap import Tap
from .data import Expression

PAD, MASK, CLS, EOS = "<pad>", "<mask>", "<cls>", "<eos>"
TARGET_SUM = 10_000.0


@dataclass(frozen=True, eq=False)
class RankBatch:
    """Cells as ranked genes.

    `scored`: where a gene stands, not a special token or padding. Shapes: (cell, pos).
    """

    ids: Int64[Tensor, "cell pos"]
    padding: Bool[Tensor, "cell pos"]
    scored: Bool[Tensor, "cell pos"]
    gene_names: list[str]
    cell_names: list[str]

    def of(self, piece: slice) -> RankBatch:
        """Some of the cells."""
        return RankBatch(
            self.ids[piece],
            self.padding[piece],
            self.scored[piece],
            self.gene_names,
            self.cell_names[piece],
        )


def read_dictionary(path: str | Path) -> dict[str, int | float]:
    """A dictionary from Ensembl ids to numbers (tokens or medians), from JSON.

    Raises: BadInput for a pickle, which is how they are published, and for anything but a JSON
    object of numbers.
    """
    path = Path(path)
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise BadInput(
            f"{path} is a pickle, which can run code when opened, so Surgeon does not; convert it"
            " once in a place you trust: json.dump({str(k): float(v) for k, v in"
            " pickle.load(open(FILE, 'rb')).items()}, open('dictionary.json', 'w'))."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read: {error.strerror}; give the dictionary as JSON."
        ) from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in found.values()
    ):
        raise BadInput(f"{path} is no JSON object that gives a number to every gene.")
    return dict(found)


def rank_tokens(
    expression: Expression,
    tokens: Mapping[str, int | float],
    medians: Mapping[str, int | float] | None = None,
    max_length: int = 2048,
) -> RankBatch:
    """Cells as tokens, highest median-scaled expression first, ties in the order of the data.

    Log-counts are taken back with exp(x) - 1, the count up to a factor of the cell, which does not
    change the order. tokens: id by Ensembl id, and of <pad> at least; <cls> and <eos> are put
    around where the dictionary has them. medians: of each gene, 1 if None.
    Raises: BadInput if no gene is known, a median is not positive, or a cell has none of the genes.
    """
    if PAD not in tokens:
        raise BadInput(f"the token dictionary has no {PAD}; use the one that came with the model.")
    ids = {name: int(i) for name, i in tokens.items()}
    names = [
        name.partition(".")[0] if name.startswith("ENS") else name for name in expression.gene_names
    ]  # without the version
    columns = [
        i for i, name in enumerate(names) if name in ids and (medians is None or name in medians)
    ]
    if not columns:
        raise BadInput(
            f"none of the {len(names)} genes is in the token dictionary: the data have names like"
            f" {names[0]}, Geneformer reads Ensembl ids (ENSG...); rename var_names to them."
        )
    scale = np.array([1.0 if medians is None else float(medians[names[i]]) for i in columns])
    if not (scale > 0).all():
        raise BadInput("the medians must be positive; use the dictionary that came with the model.")
    special = CLS in ids and EOS in ids
    gene_ids = np.array([ids[names[i]] for i in columns])
    totals = np.asarray(expression.matrix.sum(axis=1)).ravel()
    kept = expression.matrix[:, columns]
    rows = []
    for i, cell in enumerate(expression.cell_names):
        row = kept[i].toarray()[0].astype(np.float64)
        row = (
            np.expm1(row)
            if expression.kind == "log-counts"
            else row / totals[i] * TARGET_SUM
            if totals[i]
            else row
        )
        there = row.nonzero()[0]
        if not len(there):
            raise BadInput(
                f"the cell {cell} has no detected gene that the token dictionary knows; leave such"
                " cells out."
            )
        order = there[np.argsort(-(row / scale)[there], kind="stable")][: max_length - 2 * special]
        rows.append([ids[CLS], *gene_ids[order], ids[EOS]] if special else list(gene_ids[order]))
    width = max(map(len, rows))
    batch = torch.full((len(rows), width), ids[PAD], dtype=torch.int64)
    for i, tokens_of in enumerate(rows):
        batch[i, : len(tokens_of)] = torch.tensor(tokens_of)
    padding = torch.arange(width) >= torch.tensor([len(r) for r in rows])[:, None]
    scored = ~padding
    if special:
        scored &= (batch != ids[CLS]) & (batch != ids[EOS])
    by_id = {i: name for name, i in ids.items()}
    return RankBatch(
        batch,
        padding,
        scored,
        [by_id.get(i, f"<{i}>") for i in range(max(by_id) + 1)],
        list(expression.cell_names),
    )


def rank_masks(
    batch: RankBatch, ratio: float = 0.15, draws: int = 1, seed: int = 0
) -> Bool[Tensor, "draw cell pos"]:
    """Which genes are hidden in each draw: `ratio` of each cell's, at least one.

    Raises: BadInput for a ratio outside (0, 1) or no draw.
    """
    if not 0 < ratio < 1 or draws < 1:
        raise BadInput(
            f"{draws} draws of {ratio:g} of the genes hide nothing, or everything; use a ratio"
            " between 0 and 1, and a draw."
        )
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand((draws, *batch.ids.shape), generator=generator).masked_fill(
        ~batch.scored, 2.0
    )
    return (
        chance.argsort(-1).argsort(-1)
        < (batch.scored.sum(-1) * ratio).round().clamp(min=1)[:, None]
    )


@torch.no_grad()
def largest_writes(anatomy: Anatomy, batch: RankBatch) -> list[Entry]:
    """The entry of each layer's `mlp.down` with the largest |w·x| over all places of these cells
    that are not padding.
    """
    inputs: dict[Site, Tensor] = {}
    kept = ~batch.padding.flatten()

    def watch(site: Site, x: Tensor) -> None:
        inputs[site] = x.flatten(0, -2)[kept.to(x.device)].abs().amax(0)

    with Tap() as tap:
        for site in anatomy.downs():
            tap.on_input(anatomy.module(site), partial(watch, site))
        tap.run(
            anatomy.model,
            input_ids=batch.ids.to(_device(anatomy.model)),
            attention_mask=(~batch.padding).long().to(_device(anatomy.model)),
        )
    found = []
    for site, x in inputs.items():
        write = anatomy.view(site).read().abs() * x
        found.append(Entry(site, *divmod(int(write.argmax()), write.shape[1])))
    return found


@torch.no_grad()
def rank_nll(
    model: nn.Module, batch: RankBatch, masked: Bool[Tensor, "draw cell pos"]
) -> Float[Tensor, "draw cell pos"]:
    """NLL in nats of each hidden gene among all tokens, NaN where none is hidden. model: a
    BertForMaskedLM.

    Raises: BadInput if the dictionary has no <mask>, or the model knows fewer tokens than it.
    """
    if MASK not in batch.gene_names:
        raise BadInput(
            f"the token dictionary has no {MASK}, so nothing can be hidden; use the one that came"
            " with the model."
        )
    config = getattr(model, "config", None)
    known = getattr(config, "vocab_size", None)
    if known is not None and int(batch.ids.max()) >= known:
        raise BadInput(
            f"the token dictionary gives token {int(batch.ids.max())}, and the model knows {known};"
            " it belongs to another model."
        )
    mask_id = batch.gene_names.index(MASK)
    device = _device(model)
    found = torch.full(masked.shape, nan, dtype=torch.float32)
    for draw, hidden in enumerate(masked):
        seen = batch.ids.masked_fill(hidden, mask_id).to(device)
        logits = model(input_ids=seen, attention_mask=(~batch.padding).long().to(device)).logits
        found[draw][hidden] = F.cross_entropy(
            logits[hidden.to(device)].float(), batch.ids[hidden].to(device), reduction="none"
        ).cpu()
    return found


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

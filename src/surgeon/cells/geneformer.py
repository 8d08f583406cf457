"""Geneformer: a cell as its genes in the order of expression, read by a BERT masked language model.

Expression is divided by the cell's total and by each gene's median over the pretraining corpus, so
that a gene stands early where it is high for that gene. The model is transformers' BertForMaskedLM;
`Anatomy` knows it as `bert`, and patches work as on text models.
Source: Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9; huggingface.co/ctheodoris/Geneformer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import nan
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import BadInput
from .data import Expression
from .likelihood import Masks, Values
from .tokenise import CLS, EOS, PAD, Batch, names_by_id

MASK = "<mask>"
Dictionary = Mapping[str, int | float]


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
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path} cannot be read as JSON: {error}; give the dictionary as JSON."
        ) from error
    # True and False are ints in Python, and not here
    if not isinstance(found, dict) or not {type(v) for v in found.values()} <= {int, float}:
        raise BadInput(f"{path} is no JSON object that gives a number to every gene.")
    return found


def rank_tokens(
    expression: Expression,
    tokens: Dictionary,
    medians: Dictionary | None = None,
    max_length: int = 2048,
) -> Batch:
    """Cells as tokens, highest median-scaled expression first, ties in the order of the data.

    Log-counts are taken back with exp(x) - 1, the count up to a factor of the cell, which does not
    change the order. tokens: id by Ensembl id, and of <pad> at least; <cls> and <eos> are put
    around where the dictionary has them. medians: of each gene, 1 if None.
    Raises: BadInput if no gene is known, a median is not positive, or a cell has none of the genes.
    """
    if PAD not in tokens:
        raise BadInput(f"the token dictionary has no {PAD}; use the one that came with the model.")
    ids = {name: int(i) for name, i in tokens.items()}
    # without the version of the Ensembl id
    names = [n.partition(".")[0] if n.startswith("ENS") else n for n in expression.gene_names]
    known = ids.keys() if medians is None else ids.keys() & medians.keys()
    columns = [i for i, name in enumerate(names) if name in known]
    if not columns:
        raise BadInput(
            f"none of the {len(names)} genes is in the token dictionary: the data have names like"
            f" {names[0]}, Geneformer reads Ensembl ids (ENSG...); rename var_names to them."
        )
    scale = np.array([1.0 if medians is None else float(medians[names[i]]) for i in columns])
    if not (scale > 0).all():
        raise BadInput("the medians must be positive; use the dictionary that came with the model.")
    gene_ids = np.array([ids[names[i]] for i in columns])
    first, last = ([ids[CLS]], [ids[EOS]]) if CLS in ids and EOS in ids else ([], [])
    most = max_length - len(first) - len(last)
    rows = []
    matrix = expression.matrix[:, columns]
    for name, sparse in zip(expression.cell_names, matrix, strict=True):
        # the cell's total, by which counts are divided as published, does not change the order
        row = sparse.toarray().ravel().astype(np.float64)
        row = (np.expm1(row) if expression.kind == "log-counts" else row) / scale
        there = row.nonzero()[0]
        if not len(there):
            raise BadInput(
                f"the cell {name} has no detected gene that the token dictionary knows; leave such"
                " cells out."
            )
        order = there[np.argsort(-row[there], kind="stable")][:most]
        rows.append([*first, *gene_ids[order].tolist(), *last])
    width = max(map(len, rows))
    genes = torch.tensor([row + [ids[PAD]] * (width - len(row)) for row in rows])
    padding = torch.arange(width) >= torch.tensor([len(row) for row in rows])[:, None]
    return Batch(genes, genes, padding, names_by_id(ids), list(expression.cell_names))


@torch.no_grad()
def rank_nll(model: nn.Module, batch: Batch, masked: Masks) -> Values:
    """NLL in nats of each hidden gene among all tokens, NaN where none is hidden. model: a
    BertForMaskedLM.

    Raises: BadInput if the dictionary has no <mask>, or the model knows fewer tokens than it.
    """
    if MASK not in batch.gene_names:
        raise BadInput(
            f"the token dictionary has no {MASK}, so nothing can be hidden; use the one that came"
            " with the model."
        )
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    if known is not None and int(batch.genes.max()) >= known:
        raise BadInput(
            f"the token dictionary gives token {int(batch.genes.max())}, and the model knows"
            f" {known}; it belongs to another model."
        )
    mask_id = batch.gene_names.index(MASK)
    device = next(model.parameters()).device
    nats = torch.full(masked.shape, nan)
    for draw, hidden in enumerate(masked):
        seen = batch.genes.masked_fill(hidden, mask_id).to(device)
        logits = model(input_ids=seen, attention_mask=(~batch.padding).long().to(device)).logits
        said, truth = logits[hidden.to(device)].float(), batch.genes[hidden].to(device)
        nats[draw][hidden] = F.cross_entropy(said, truth, reduction="none").cpu()
    return nats

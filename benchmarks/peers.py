"""Other quantizers, judged in the same way: each gives the weights that its codes mean, at the same
bits and groups, without hold-out.

HQQ, torchao and optimum-quanto take a matrix at a time and no text. GPTQ takes the model and a few
windows of text to calibrate on.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader

from surgeon.anatomy import Anatomy, Site
from surgeon.quantize import Block
from surgeon.quantize.grid import SCALE_BITS
from surgeon.quantize.quantize import copied


@dataclass(frozen=True)
class Peer:
    """package: what must be installed. bits: what it can do. offsets: whether it stores an offset
    with each scale. dequantized(matrix (out, in), bits, group, None for a whole row) -> (out, in)
    float32."""

    package: str
    bits: Sequence[int]
    offsets: bool
    dequantized: Callable[[Tensor, int, int | None], Tensor]

    def bits_per_weight(self, shape: tuple[int, int], bits: int, group: int | None) -> float:
        return bits + SCALE_BITS * (
            2 if self.offsets and not (self.package == "optimum.quanto" and bits == 8) else 1
        ) / (group or shape[1])


def _hqq(matrix: Tensor, bits: int, group: int | None) -> Tensor:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        matrix,
        nbits=bits,
        group_size=group,
        axis=1,
        channel_wise=True,
        device="cpu",
        compute_dtype=torch.float32,
        bitpack=False,
    )
    result: Tensor = ((codes.float() - meta["zero"]) * meta["scale"]).reshape(matrix.shape)
    return result


def _torchao(matrix: Tensor, bits: int, group: int | None) -> Tensor:
    api, granularity = (
        importlib.import_module(f"torchao.quantization{part}") for part in ("", ".granularity")
    )
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight = nn.Parameter(matrix.clone(), requires_grad=False)
    per = granularity.PerAxis(0) if group is None else granularity.PerGroup(group)
    api.quantize_(
        linear, api.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=per)
    )
    result: Tensor = linear.weight.dequantize()  # type: ignore[operator]
    return result


def _quanto(matrix: Tensor, bits: int, group: int | None) -> Tensor:
    quanto = importlib.import_module("optimum.quanto")
    kind = {8: quanto.qint8, 4: quanto.qint4, 2: quanto.qint2}[bits]
    if bits == 8:
        scale, shift = quanto.AbsmaxOptimizer()(matrix, kind, 0), None
    else:
        scale, shift = quanto.MaxOptimizer()(matrix, kind, 0, group)
    result: Tensor = quanto.quantize_weight(
        matrix, kind, 0, scale, shift, group_size=group, optimized=False
    ).dequantize()
    return result


PEERS = {
    "HQQ": Peer("hqq", (8, 4, 3, 2), True, _hqq),
    "torchao": Peer("torchao", (8, 7, 6, 5, 4, 3, 2), False, _torchao),
    "optimum-quanto": Peer("optimum.quanto", (8, 4, 2), True, _quanto),
}


GPTQ = "GPTQ (llm-compressor)"


def has_gptq() -> bool:
    return installed("llmcompressor")


def missing_peers() -> list[str]:
    """Which peers are not in the table, and why, a sentence each."""
    absent = [
        f"{name} is not measured: it is not installed."
        for name, peer in PEERS.items()
        if not installed(peer.package)
    ]
    if not has_gptq():
        absent.append(
            f"{GPTQ} is not measured: it is not installed; llm-compressor 0.14 asks for"
            " transformers 5.15 to 5.17."
        )
    return absent


@torch.no_grad()
def peer_tensors(
    anatomy: Anatomy, peer: Peer, bits: int, block: Block, sites: Sequence[Site]
) -> tuple[dict[str, Tensor], float] | None:
    """The parameters as the peer would have them, and its mean bits per weight; None where it is
    not installed or cannot do this.

    Peers know rows and groups along a row; a group must divide the row.
    """
    if (
        not installed(peer.package)
        or bits not in peer.bits
        or block.kind not in ("channel", "group")
    ):
        return None
    copies, views = copied(anatomy, sites)
    if any(not block.divides(view.shape) for view in views.values()) or (
        peer.package == "optimum.quanto" and bits == 8 and block.size
    ):
        return None
    stored = total = 0.0
    with _quiet():
        for view in views.values():
            view.assign_(
                peer.dequantized(view.read().detach().cpu().float().contiguous(), bits, block.size)
            )
            size = view.shape[0] * view.shape[1]
            stored, total = (
                stored + size * peer.bits_per_weight(view.shape, bits, block.size),
                total + size,
            )
    return copies, stored / total


def gptq_tensors(
    anatomy: Anatomy,
    bits: int,
    block: Block,
    sites: Sequence[Site],
    calibration: Int64[Tensor, "n window"],
) -> tuple[dict[str, Tensor], float] | None:
    """The parameters as GPTQ of llm-compressor would have them, symmetric, its other settings as
    they come, and the bits per weight.

    None where it is not installed or cannot do this: it knows rows and groups that divide them, of
    plain Linear modules.
    """
    shapes = [anatomy.view(site).shape for site in sites]
    plain = all(isinstance(anatomy.module(site), nn.Linear) for site in sites)
    if (
        not has_gptq()
        or not plain
        or block.kind not in ("channel", "group")
        or not all(map(block.divides, shapes))
    ):
        return None
    model = deepcopy(anatomy.model)
    names = sorted({anatomy.addresses[site].module for site in sites})
    with _quiet():
        importlib.import_module("loguru").logger.remove()  # its notes of every module
        gptq = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
        schemes = importlib.import_module("compressed_tensors.quantization")
        kind = (
            {"strategy": "channel"}
            if block.size is None
            else {"strategy": "group", "group_size": block.size}
        )
        weights = schemes.QuantizationArgs(num_bits=bits, type="int", symmetric=True, **kind)
        scheme = schemes.QuantizationScheme(
            targets=[f"re:^{re.escape(name)}$" for name in names], weights=weights
        )
        texts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in calibration]
        importlib.import_module("llmcompressor").oneshot(
            model=model,
            dataset=DataLoader(texts),  # type: ignore[arg-type]
            processor=object(),  # the text is tokens already
            recipe=gptq(config_groups={"all": scheme}),
            max_seq_length=calibration.shape[1],
            num_calibration_samples=len(calibration),
        )
    sizes = [n_out * n_in for n_out, n_in in shapes]
    stored = sum(
        n * (bits + SCALE_BITS / (block.size or shape[1]))
        for n, shape in zip(sizes, shapes, strict=True)
    )
    tensors = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach() for name in names}
    return tensors, stored / sum(sizes)


def all_peers(
    anatomy: Anatomy,
    bits: int,
    block: Block,
    sites: Sequence[Site],
    calibration: Int64[Tensor, "n window"],
) -> dict[str, tuple[dict[str, Tensor], float]]:
    """Parameters and bits per weight by every peer that is installed and can do this."""
    tried = {name: peer_tensors(anatomy, peer, bits, block, sites) for name, peer in PEERS.items()}
    tried[GPTQ] = gptq_tensors(anatomy, bits, block, sites, calibration)
    return {name: result for name, result in tried.items() if result is not None}


def installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a namespace package
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that these packages write when they are imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
            redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

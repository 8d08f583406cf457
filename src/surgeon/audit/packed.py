"""Quantized weights as the libraries store them in safetensors, back to numbers: one function a
format.

Each is found by the names of the tensors that stand together, and gives the matrix in float32. A
size that the tensors' shapes tell is read off them; the configuration is asked for the rest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from ..anatomy import Shards
from ..errors import BadCheckpoint, MissingExtra

Settings = dict[str, Any]  # `quantization_config` of config.json
Reader = Callable[[Shards, str, Settings], Tensor]
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word the nibble of each of eight columns lies
_CHUNK = 512  # lines unpacked at a time, for the sake of memory


@dataclass(frozen=True)
class Format:
    """A way to store one weight: the tensor `<stem><main>` beside `<stem><sign>`.

    as_linear: whether what is read is (out, in) also where the model's own parameter is stored the
    other way (Conv1D).
    """

    name: str
    main: str
    sign: str
    read: Reader
    as_linear: bool = True


def compressed_packed(tensors: Shards, stem: str, settings: Settings) -> Float[Tensor, "out in"]:
    """compressed-tensors `pack-quantized` (integers of 1 to 8 bits), and its two 4-bit floats,
    `nvfp4` and `mxfp4`.
    """
    words, scale = tensors.read(f"{stem}.weight_packed"), tensors.read(f"{stem}.weight_scale")
    if words.dtype == torch.uint8:
        if f"{stem}.weight_global_scale" in tensors:
            return _spread(
                scale.float() / tensors.read(f"{stem}.weight_global_scale").float(), _fp4(words)
            )
        return _spread(_exponents(scale), _fp4(words))
    n_out, n_in = tensors.read(f"{stem}.weight_shape").tolist()
    scheme = _scheme(settings, stem, tensors.name)
    bits = int(scheme["num_bits"])
    if words.shape != (n_out, -(-n_in * bits // 32)):
        raise BadCheckpoint(
            f"{tensors.name} says that {stem} has {bits} bits, and it does not have that size;"
            " write it again."
        )
    middle = 1 << (bits - 1)
    codes = _unpack(words.T, bits, n_in).T.float() - middle
    zero = f"{stem}.weight_zero_point"
    if zero in tensors and not scheme.get("symmetric", True):
        points = tensors.read(zero)
        zeros = (
            _unpack(points, bits, n_out).float() - middle
            if points.dtype == torch.int32
            else points.float()
        )
        codes -= _spread_to(
            zeros.view(n_out, scale.shape[-1]), codes.shape, scheme, _columns(tensors, stem)
        )
    return codes * _spread_to(scale.float(), codes.shape, scheme, _columns(tensors, stem))


def scaled(tensors: Shards, stem: str, settings: Settings) -> Float[Tensor, "out in"]:
    """One number a weight beside its scale: `int-`, `float-` and `naive-quantized` of
    compressed-tensors, its mxfp8; FBGEMM's fp8.
    """
    codes, scale = tensors.read(f"{stem}.weight").float(), tensors.read(f"{stem}.weight_scale")
    groups = settings.get("config_groups")
    scheme = _scheme(settings, stem, tensors.name) if groups else {}
    spread = _exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    zero = f"{stem}.weight_zero_point"
    if zero in tensors and not scheme.get("symmetric", True):
        codes -= _spread_to(
            tensors.read(zero).float(), codes.shape, scheme, _columns(tensors, stem)
        )
    return codes * _spread_to(spread, codes.shape, scheme, _columns(tensors, stem))


def fp8_blocks(tensors: Shards, stem: str, settings: Settings) -> Float[Tensor, "out in"]:
    """fp8 with a scale for every block of, say, 128 x 128, as DeepSeek's and Qwen's models
    ship it.
    """
    codes, scale = tensors.read(f"{stem}.weight"), tensors.read(f"{stem}.weight_scale_inv")
    block = settings.get("weight_block_size")
    scheme = {"block_structure": block} if block else {}
    numbers = _exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    return codes.float() * _spread_to(numbers, codes.shape, scheme, None)


def bnb_4bit(tensors: Shards, stem: str, settings: Settings) -> Float[Tensor, "out in"]:
    """bitsandbytes nf4 and fp4, with and without double quantization: a table of 16 numbers times
    the largest |w| of each block.
    """
    weight = f"{stem}.weight"
    state_name = next(
        (n for n in tensors if n.startswith(f"{weight}.quant_state.bitsandbytes__")),
        f"{weight}.quant_state",
    )
    state = json.loads(bytes(tensors.read(state_name).tolist()))
    absmax = tensors.read(f"{weight}.absmax")
    if f"{weight}.nested_absmax" in tensors:
        table, outer = (
            tensors.read(f"{weight}.nested_quant_map"),
            tensors.read(f"{weight}.nested_absmax"),
        )
        inner = table[absmax.int()]
        absmax = (
            inner * outer.repeat_interleave(state["nested_blocksize"])[: len(inner)]
            + state["nested_offset"]
        )
    packed = tensors.read(weight).flatten()
    table = tensors.read(f"{weight}.quant_map").float()
    numbers = torch.stack(
        [table[(packed >> 4).int()], table[(packed & 15).int()]], 1
    ).flatten()  # the first in the high half
    numbers = numbers[: math.prod(state["shape"])]
    return (numbers * absmax.float().repeat_interleave(state["blocksize"])[: len(numbers)]).view(
        state["shape"]
    )


def bnb_int8(tensors: Shards, stem: str, settings: Settings) -> Float[Tensor, "out in"]:
    """bitsandbytes LLM.int8(): codes to 127, times the largest |w| of each output channel."""
    if f"{stem}.weight_format" in tensors and int(tensors.read(f"{stem}.weight_format")) != 0:
        raise BadCheckpoint(
            f"{tensors.name} stores {stem} in a GPU's own tile order; save it again with a current"
            " bitsandbytes."
        )
    return (
        tensors.read(f"{stem}.weight").float() * tensors.read(f"{stem}.SCB").float()[:, None] / 127
    )


def qweight(tensors: Shards, stem: str, settings: Settings) -> Float[Tensor, "out in"]:
    """GPTQ and AWQ. GPTQ: bits run along the inputs, zero points are stored less one (`gptq_v2`: as
    they are). AWQ: nibbles along the outputs, in the order that its kernels want."""
    kind = f"{settings.get('quant_method')} {settings.get('packing_format', '')}"
    scales, words, zeros = (
        tensors.read(f"{stem}.{part}") for part in ("scales", "qweight", "qzeros")
    )
    n_groups, n_out = scales.shape
    if "awq" in kind:
        if settings.get("version", "gemm").lower() != "gemm" or words.shape[1] * 8 != n_out:
            raise BadCheckpoint(
                f"{tensors.name} is AWQ of another kind than the 4-bit `gemm`; dequantize it with"
                " its library first."
            )
        codes, points = _awq(words), _awq(zeros)
        group = torch.arange(len(codes)) // -(-len(codes) // n_groups)
    else:
        bits = int(settings["bits"])
        n_in = words.shape[0] * 32 // bits
        codes = _unpack(words, bits, n_in)
        points = _unpack(zeros.T, bits, n_out).T.float()
        if settings.get("checkpoint_format") != "gptq_v2":
            points = points + 1
        in_order = torch.arange(n_in) // -(-n_in // n_groups)
        group = tensors.read(f"{stem}.g_idx").long() if f"{stem}.g_idx" in tensors else in_order
    scales = scales.float()
    return (codes.float().sub_(points.float()[group]).mul_(scales[group])).T


def mxfp4(tensors: Shards, stem: str, settings: Settings) -> Float[Tensor, "expert inputs outputs"]:
    """gpt-oss as it ships: 4-bit floats, a power of two for every 32, all experts of a layer in
    one, stored along the inputs.
    """
    blocks, scales = tensors.read(f"{stem}_blocks"), tensors.read(f"{stem}_scales")
    numbers = _fp4(blocks) * _exponents(scales)[..., None]
    return numbers.flatten(-2).transpose(1, 2)


def torchao(tensors: Shards, names: list[str], header: Settings) -> Float[Tensor, "out in"]:
    """What torchao flattened, put together and dequantized by torchao. Raises: MissingExtra."""
    try:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    except ImportError as error:
        raise MissingExtra("a checkpoint of torchao", "quantize") from error
    whole, _ = unflatten_tensor_state_dict({n: tensors.read(n) for n in names}, header)
    (weight,) = whole.values()
    dense: Tensor = weight.dequantize()
    return dense.float()


# by the tensors that stand together; the first that fits is taken
FORMATS = (
    Format("packed by compressed-tensors", ".weight_packed", ".weight_scale", compressed_packed),
    Format("GPTQ or AWQ", ".qweight", ".scales", qweight),
    Format("4 bits of bitsandbytes", ".weight", ".weight.absmax", bnb_4bit),
    Format("int8 of bitsandbytes", ".weight", ".SCB", bnb_int8),
    Format("fp8 in blocks", ".weight", ".weight_scale_inv", fp8_blocks),
    Format("scaled", ".weight", ".weight_scale", scaled),
    Format("mxfp4", "_blocks", "_scales", mxfp4, as_linear=False),
)


def _scheme(settings: Settings, module: str, name: str) -> Settings:
    """The settings of the group that a module belongs to: named itself, by a pattern, else by its
    class.
    """
    groups = list((settings.get("config_groups") or {}).values())

    def fits(target: str, how: int) -> bool:
        pattern = target.removeprefix("re:")
        return (
            target == module,
            target != pattern and re.match(pattern, module) is not None,
            target == "Linear",
        )[how]

    for how in range(3):
        for group in groups:
            if any(fits(target, how) for target in group.get("targets", [])):
                return dict(group.get("weights") or {})
    raise BadCheckpoint(
        f"the config.json of {name} does not say how {module} was quantized; copy the one that was"
        " written with it."
    )


def _unpack(
    words: Int32[Tensor, "words lines"], bits: int, count: int
) -> UInt8[Tensor, "count lines"]:
    """`count` codes of each line, whose bits follow one another without gaps from the lowest on,
    across the ends of words.
    """
    start = torch.arange(count) * bits
    word, offset = start // 32, (start % 32)[:, None]
    # a code may end in the next word; where there is none, what is read is masked away
    after = (word + 1).clamp(max=len(words) - 1)
    out = torch.empty(count, words.shape[1], dtype=torch.uint8)
    for first in range(0, words.shape[1], _CHUNK):
        # unsigned: shifting a negative number would fill it up with ones
        part = words[:, first : first + _CHUNK].long() & 0xFFFFFFFF
        out[:, first : first + _CHUNK] = (
            (part[word] >> offset) | (part[after] << (32 - offset))
        ) & (2**bits - 1)
    return out


def _awq(words: Int32[Tensor, "lines words"]) -> UInt8[Tensor, "lines codes"]:
    shifts = torch.tensor(_AWQ_ORDER, dtype=torch.int32) * 4
    return ((words[:, :, None] >> shifts) & 15).to(torch.uint8).flatten(1)


def _fp4(packed: UInt8[Tensor, "*axes half"]) -> Float[Tensor, "*axes n"]:
    table = torch.tensor(_E2M1)
    return torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], -1).flatten(-2)


def _exponents(scale: Tensor) -> Tensor:
    """Scales that are stored as powers of two, as numbers."""
    # E8M0: nothing but the exponent of a float, with its bias
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _columns(tensors: Shards, stem: str) -> Tensor | None:
    """The group of each input where they are not in order."""
    name = f"{stem}.weight_g_idx"
    groups = tensors.read(name).long() if name in tensors else None
    return None if groups is None or bool((groups < 0).any()) else groups


def _spread(scale: Tensor, codes: Tensor) -> Tensor:
    return codes * _spread_to(scale, codes.shape, {}, None)


def _spread_to(
    scale: Tensor,
    shape: torch.Size | tuple[int, ...],
    scheme: Settings | None,
    columns: Tensor | None,
) -> Tensor:
    """Scales of blocks as one for every weight: of the tensor, of each row, of groups along it, or
    of two-dimensional blocks.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.dim() == 1:
        scale = scale[:, None]
    if columns is not None:
        return scale[:, columns]
    sizes = (scheme or {}).get("block_structure") or [None, (scheme or {}).get("group_size")]
    for axis, size in enumerate(sizes):
        n = scale.shape[axis]
        if n > 1 and n != shape[axis]:
            size = size if size and size > 0 else -(-shape[axis] // n)
            scale = scale.index_select(axis, torch.arange(shape[axis]) // size)
    return scale

"""The `--tensor-type` flags with which llama.cpp's llama-quantize keeps the critical matrices at a
higher precision.

    llama-quantize --tensor-type 'blk\\.2\\.ffn_down\\.weight=q8_0' model-f16.gguf model-q4.gguf
    Q4_K_M

How this works. Surgeon writes no GGUF file. llama.cpp has two steps, a converter that renames the
parameters and packs the experts of a layer together, and llama-quantize, which rounds. What the
converter calls a parameter stands in the table of the `gguf` package, so the names of the tensors
that hold critical entries are known without a file. llama-quantize reads each name as a regular
expression that may match anywhere in the tensor's name, so dots are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...anatomy import Anatomy, Entry, Site
from ...anatomy.gguf_names import gguf_spellings
from ...errors import BadInput, MissingExtra
from ...result import derived, record

TYPES = ("q8_0", "f16", "bf16", "f32", "q6_k", "q5_k")
# where llama.cpp calls an architecture otherwise than transformers does
_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "gpt_neox": "gptneox",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
}


@record
class TensorTypes:
    """The tensors of the GGUF file that are to be kept, by name, each with the critical sites it
    holds; and their type there.
    """

    tensors: dict[str, tuple[Site, ...]]
    kind: str

    @derived
    def flags(self) -> list[str]:
        """The arguments of llama-quantize, not quoted for a shell."""
        return [
            part
            for name in self.tensors
            for part in ("--tensor-type", f"{re.escape(name)}={self.kind}")
        ]

    @derived
    def line(self) -> str:
        """The same, quoted, to be pasted into a command line."""
        return " ".join(part if part.startswith("--") else f"'{part}'" for part in self.flags)


def tensor_types(
    anatomy: Anatomy, critical: Iterable[Entry | Site], kind: str = "q8_0"
) -> TensorTypes:
    """Where llama.cpp's converter puts the matrices of the `critical` entries, by the table of the
    `gguf` package.

    anatomy: its model may be on the meta device. A GGUF file holds all experts of a layer as one
    tensor, which is kept whole.
    Raises: MissingExtra without `weight-surgeon[quantize]`; BadInput for an architecture or a
    matrix that GGUF does not know.
    """
    if kind not in TYPES:
        raise BadInput(f"{kind} is no tensor type to keep a matrix in; use {', '.join(TYPES)}.")
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra("a list of flags for llama-quantize", "quantize") from error
    model_type = str(getattr(anatomy.config, "model_type", ""))
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    name = _ARCHITECTURES.get(model_type, model_type)
    if name not in known:
        raise BadInput(
            f"the gguf package knows no architecture for {model_type or 'this model'}, so llama.cpp"
            " cannot read it."
        )
    names = gguf.get_tensor_name_map(known[name], len(anatomy.layers))
    kept: dict[str, list[Site]] = {}
    for site in dict.fromkeys(
        anatomy.resolve(c.site if isinstance(c, Entry) else c) for c in critical
    ):
        parameter = anatomy.addresses[site].parameter
        tensors = [names.get_name(spelled) for spelled, _ in gguf_spellings(parameter, site)]
        tensor = next((one for one in tensors if one is not None), None)
        if tensor is None:
            raise BadInput(
                f"the gguf package has no tensor for {site} ({parameter}) in a {name} model, so"
                " llama.cpp does not read it."
            )
        kept.setdefault(f"{tensor}.weight", []).append(site)
    return TensorTypes({tensor: tuple(sites) for tensor, sites in kept.items()}, kind)

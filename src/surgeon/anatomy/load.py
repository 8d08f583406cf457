"""Models from disk or from the Hub, with every way a checkpoint can be unusable turned into a
sentence.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import BadCheckpoint, BadInput, SurgeonError, UnknownArchitecture
from .anatomy import Anatomy
from .folder import check_folder, fingerprint
from .table import TABLE

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Loaded:
    """A model ready for surgery.

    model: a transformers model, or another module that `Anatomy` knows. `fingerprint` is the
    SHA-256 of its configuration and weight files.
    """

    model: Any
    tokenizer: transformers.PreTrainedTokenizerBase | None
    name: str
    folder: Path
    fingerprint: str


def locate(name: str) -> Path:
    """The folder of MODEL: `patient`, a local folder, or a Hub id, optionally `@revision`, which is
    downloaded.

    Raises: BadInput if there is no such model, BadCheckpoint if it holds no safetensors weights.
    """
    if name == "patient":
        return check_folder(Path(str(resources.files("surgeon.patients") / "patient")))
    path = Path(name)
    try:
        if path.exists():
            return check_folder(path)
    except OSError as error:  # no path at all, as one that is too long
        raise BadInput(f"{name} cannot be used as a model folder: {error.strerror}.") from error
    repo, revision = split_id(name)
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.patch"]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    return check_folder(folder)


def split_id(name: str) -> tuple[str, str | None]:
    """The repository and the revision of a Hub id. Raises: BadInput if `name` cannot be one."""
    repo, _, revision = name.partition("@")
    if name.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise BadInput(
            f"no model folder at {name}; give `patient`, a folder with config.json and safetensors"
            " weights, or a Hub id like org/name."
        )
    return repo, revision or None


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Whatever the Hub, or the way to it, has against giving the model `name`, as BadInput."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    try:
        yield
    except SurgeonError:
        raise
    except GatedRepoError as error:
        raise BadInput(
            f"the Hub gives {repo} only to those who accepted its terms; do so on its page, then"
            " `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BadInput(
            f"{name} is no local folder, and the Hub has no model {repo}, or a private one; check"
            " it, or `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise BadInput(
            f"the model {repo} on the Hub has no revision {revision}; name a branch, a tag or a"
            " commit of it."
        ) from error
    # besides its own errors the client lets those of its HTTP library through
    except Exception as error:
        raise BadInput(
            f"{name} is neither a local folder nor a model the Hub would give:"
            f" {_first_line(error)}."
        ) from error


def read_config(folder: Path) -> Any:
    """The model's configuration. Raises: BadCheckpoint for one that transformers does not know."""
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types here, all of them about this file
        raise BadCheckpoint(
            f"{folder}/config.json cannot be used: {_first_line(error)}."
        ) from error


def model_class(config: Any) -> Any:
    """The transformers class that the checkpoint names, or the causal-LM class for its type."""
    # every loading of a model begins here, and what transformers imports for it writes notes
    from .. import _quiet as _quiet

    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def unloaded(
    name: object, config: Any, dtype: torch.dtype | None = None, device: str = "meta"
) -> transformers.PreTrainedModel:
    """The model that the configuration of the checkpoint `name` describes, without its weights.

    Raises: BadCheckpoint if none can be built from it.
    """
    kind = model_class(config)
    build = getattr(kind, "_from_config", None) or kind.from_config
    try:
        with torch.device(device):
            model: transformers.PreTrainedModel = build(
                config, **({} if dtype is None else {"dtype": dtype})
            )
    except SurgeonError:
        raise
    # transformers raises many types here, all of them about the configuration
    except Exception as error:
        raise BadCheckpoint(
            f"no model can be built from the config.json of {name}: {_first_line(error)}."
        ) from error
    return model


def unloaded_anatomy(folder: Path, config: Any) -> Anatomy:
    """The map of the checkpoint's architecture; its weights are not read.

    Only an architecture outside the table needs numbers: a trial run tells its parts.
    Raises: BadCheckpoint.
    """
    in_table = config.get_text_config().model_type in TABLE
    return Anatomy.of(unloaded(folder, config, device="meta" if in_table else "cpu"))


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """Load MODEL (`patient`, a folder, or a Hub id) for surgery, in eval mode.

    dtype: "auto" (the checkpoint's own) or float32, bfloat16, float16. device: "auto" takes a GPU
    if there is one.
    Raises: BadInput, BadCheckpoint.
    """
    check_dtype(dtype)
    folder = locate(name)
    config = read_config(folder)
    if not hasattr(config.get_text_config(), "vocab_size"):
        raise UnknownArchitecture(
            f"{name} is a {config.model_type} model, which reads no tokens; Surgeon works on"
            " language models."
        )
    where = device_named(device)
    try:
        model, notes = model_class(config).from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, "auto"),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        _unpack_(model)
    except (MemoryError, torch.OutOfMemoryError, SurgeonError):
        raise
    # from_pretrained has no common base; whatever it says is about this checkpoint
    except Exception as error:
        raise BadCheckpoint(
            f"{name} cannot be loaded by transformers {transformers.__version__}:"
            f" {_first_line(error)}."
        ) from error
    # transformers would go on, with random numbers in the place of these
    if wrong := sorted(notes["missing_keys"]) + sorted(key for key, *_ in notes["mismatched_keys"]):
        raise lacking(name, wrong)
    try:
        model = model.to(where).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise BadInput(
            f"‹device› {device} cannot be used on this machine: {_first_line(error)}."
        ) from error
    model.requires_grad_(False)
    return Loaded(model, load_tokenizer(folder), name, folder, fingerprint(folder))


def _unpack_(model: transformers.PreTrainedModel) -> None:
    """Replace weights that compressed-tensors or torchao keep packed by what they mean; those of
    other formats stay as they are.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        # it draws a progress bar, also where stderr is no terminal
        with redirect_stderr(io.StringIO()):
            compressor.decompress_model(model)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if type(weight.data) is not torch.Tensor and hasattr(weight.data, "dequantize"):
                setattr(module, name, nn.Parameter(weight.data.dequantize(), requires_grad=False))


def check_dtype(dtype: str) -> None:
    """Raises: BadInput for a dtype that `load_model` does not know."""
    if dtype != "auto" and dtype not in DTYPES:
        raise BadInput(f"‹dtype› {dtype} is not known; use auto, {', '.join(DTYPES)}.")


def lacking(name: str, parameters: list[str]) -> BadCheckpoint:
    """What is wrong with a checkpoint that has not these parameters."""
    more = f" and {len(parameters) - 3} more" if len(parameters) > 3 else ""
    return BadCheckpoint(
        f"{name} lacks weights that its config.json promises, or has them in another shape:"
        f" {', '.join(parameters[:3])}{more}; download or write it again."
    )


def device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"‹device› {name} is not known; use auto, cpu, or cuda.") from error
    if device.type == "meta":
        raise BadInput(
            "‹device› meta holds no numbers, so nothing can be computed on it; use auto, cpu, or"
            " cuda."
        )
    return device


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or None if it ships none."""
    if not any(
        (folder / n).is_file()
        for n in (
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "tokenizer_config.json",
            "vocab.txt",
        )
    ):
        return None
    try:
        tokenizer: transformers.PreTrainedTokenizerBase = (
            transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        )
    except Exception as error:
        raise BadCheckpoint(
            f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}; write it again."
        ) from error
    return tokenizer


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it needs code of its own, which Surgeon never runs; use a model that transformers"
            " knows by itself"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError) or not lines:
        return repr(error)
    heading = lines[0].endswith(":") and len(lines) > 1
    return (f"{lines[0]} {lines[1]}" if heading else lines[0])[:300].rstrip(" .")

"""The published super weights as data, and the check of each against a checkpoint, reading one
tensor per record and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..anatomy import Entry, Site
from ..anatomy.folder import check_folder
from ..anatomy.load import locate
from ..errors import BadCheckpoint, BadInput, PackedWeight, SurgeonError
from ..result import derived, record
from .verify import Progress

AGREES, DIFFERS, UNPRINTED = "agrees", "differs", "no printed value"
_HALF_STEP = 0.5e-4  # every printed value has four decimals
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@record
class Published:
    """A published coordinate of `model` (a Hub id).

    weight: the printed value, None if none is known. evidence: "table" (printed in the paper),
    "repository" (the authors' code only) or "reported". status: "published", "corrected"
    (misprinted in the source), "set" (vital only with the others of its model) or "nearly inert".
    """

    model: str
    layer: int
    row: int
    col: int
    weight: float | None
    source: str
    evidence: str
    status: str
    note: str = ""

    @derived
    def entry(self) -> Entry:
        return Entry(Site(self.layer, "mlp.down"), self.row, self.col)

    @property
    def tensor(self) -> str:
        """The name in the checkpoint, stored as (out, in); the same in every family that has
        records.
        """
        return f"model.layers.{self.layer}.mlp.down_proj.weight"


@record
class Check(Published):
    """A published coordinate beside a checkpoint: the value found, and its rank by |weight| in its
    matrix (1 is the largest).
    """

    measured: float = field(kw_only=True)
    rank_abs: int = field(kw_only=True)
    shape: tuple[int, int] = field(kw_only=True)
    dtype: str = field(kw_only=True)
    verdict: str = field(kw_only=True)


def about() -> str:
    """What the list is, in two sentences."""
    return str(_data()["about"])


def published() -> list[Published]:
    """Every published coordinate, in the order of the paper's table, later ones last."""
    return [Published(**one) for one in _data()["records"]]


def records_of(model: str, as_name: str | None = None) -> list[Published]:
    """The records that belong to MODEL: by Hub id, by the folder's base name, or by `as_name` (an
    id or its last part).

    Raises: BadInput if there are none, with the names that are known.
    """
    path = Path(model)
    local = path.exists()
    wanted = as_name or (path.resolve().name if local else model.partition("@")[0])
    may_be_short = (
        local or as_name is not None
    )  # a Hub id must match in full: a namesake of another owner is another model
    found = [
        r
        for r in published()
        if wanted == r.model or (may_be_short and wanted == r.model.rpartition("/")[2])
    ]
    if not found:
        known = ", ".join(dict.fromkeys(r.model for r in published()))
        raise BadInput(
            f"no published coordinates are known for {wanted!r}; there are some for {known}. "
            "If the model is a copy of one of these, say of which with ‹as_name›."
        )
    return found


def records_shaped(config: Any) -> list[Published]:
    """The records of models shaped as `config` (a text configuration) says: model type, layers,
    hidden and intermediate size.
    """
    sizes = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
    mine = [getattr(config, name, None) for name in sizes]
    models = {model for model, shape in _data()["shapes"].items() if shape == mine}
    return [r for r in published() if r.model in models]


def verify_published(
    model: str,
    records: list[Published] | None = None,
    as_name: str | None = None,
    tell: Progress | None = None,
    endpoint: str | None = None,
) -> list[Check]:
    """Read each record's weight in MODEL and set it beside the printed value.

    Only the header and the bytes of one tensor of one shard are read at a time, also from the Hub
    at `endpoint` (default: huggingface_hub's), and nothing is stored. records: default, those of
    `records_of(model, as_name)`.

    A value agrees if the printed one, give or take half its last decimal, is stored as that value
    in the checkpoint's dtype; so a float16 model saved as bfloat16 still agrees.

    Raises: BadInput (no such model, record, tensor or entry; the Hub would not give it),
    BadCheckpoint (damaged or not safetensors), PackedWeight (stored quantized).
    """
    path = Path(model)
    repo, _, revision = model.partition("@")
    remote = not path.exists() and model != "patient"
    if remote and (model.startswith((".", "/", "~")) or repo.count("/") != 1):
        raise BadInput(
            f"no model folder at {model}; give a folder with safetensors weights, or a Hub id like"
            " org/name."
        )
    if records is None:
        records = records_of(model, as_name)
    tell = tell or (lambda what, done, total: None)
    checkpoint = (
        _Repository(repo, revision or None, endpoint, tell)
        if remote
        else _Folder(path if path.exists() else locate(model))
    )
    checks: dict[Published, Check] = {}
    for tensor in dict.fromkeys(r.tensor for r in records):
        here = [r for r in records if r.tensor == tensor]
        matrix = checkpoint.matrix(here)
        magnitude = matrix.abs()
        for one in here:
            value = matrix[one.row, one.col]
            if not value.isfinite():
                raise BadCheckpoint(
                    f"{one.entry} of {model} is {value.item()}, which is no weight; download the"
                    " model again."
                )
            checks[one] = Check(
                **vars(one),
                measured=value.item(),
                rank_abs=1 + int((magnitude > value.abs()).sum()),
                shape=(matrix.shape[0], matrix.shape[1]),
                dtype=str(matrix.dtype).removeprefix("torch."),
                verdict=_verdict(one.weight, value),
            )
    return [checks[r] for r in records]


def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        (resources.files("surgeon.find") / "published.json").read_text(encoding="utf-8")
    )
    return data


def _verdict(printed: float | None, value: Tensor) -> str:
    if printed is None:
        return UNPRINTED
    low, high = torch.tensor([printed - _HALF_STEP, printed + _HALF_STEP], dtype=torch.float64).to(
        value.dtype
    )
    return AGREES if low <= value <= high else DIFFERS


class _Checkpoint(ABC):
    """Safetensors weights somewhere, of which single tensors are read.

    Not safetensors' lazy files: they map a whole shard at once, which a machine with less memory
    than the shard refuses.
    """

    def __init__(self, name: str, files: frozenset[str]) -> None:
        self.name = name
        self.files = files
        self.headers: dict[
            str, tuple[int, dict[str, Any]]
        ] = {}  # by file: where its tensors begin, what they are

    @abstractmethod
    def fetch(
        self, file: str, start: int = 0, stop: int | None = None, what: str | None = None
    ) -> bytearray:
        """Bytes start..stop of a file, or all of it; fewer if it ends before."""

    def matrix(self, records: list[Published]) -> Tensor:
        """The matrix (out, in) that `records`, all of one layer, point into; refused before a byte
        of it is read.
        """
        name, site, meant = records[0].tensor, records[0].entry.site, records[0].model
        advice = f"so it is not {meant}; give that model, or name another with ‹as_name›"
        if name not in self.shards:
            module = name.removesuffix("weight")
            packed = sorted(
                n.removeprefix(module)
                for n in self.shards
                if n.startswith(module) and n != f"{module}bias"
            )
            if packed:
                raise PackedWeight(
                    f"{self.name} stores {site} as {', '.join(packed)}, which is quantized; give"
                    " the original weights."
                )
            raise BadInput(f"{self.name} has no tensor {name}, {advice}.")
        file = self.shards[name]
        if file not in self.files:
            raise BadCheckpoint(
                f"{self.name} lacks the shard {file}, which its index names for {name}; download it"
                " again."
            )
        begin, header = self._header(file)
        try:
            described = header[name]
            dtype, shape, (start, stop) = (
                described["dtype"],
                tuple(described["shape"]),
                described["data_offsets"],
            )
            sound = (
                dtype not in _DTYPES or stop - start == math.prod(shape) * _DTYPES[dtype].itemsize
            )
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            raise BadCheckpoint(
                f"{file} of {self.name} does not describe {name} soundly; download it again."
            )
        if dtype not in _DTYPES:
            raise PackedWeight(
                f"{self.name} stores {site} as {dtype}, which is quantized; give the original"
                " weights."
            )
        for one in records:
            if len(shape) != 2 or one.row >= shape[0] or one.col >= shape[1]:
                raise BadInput(
                    f"{self.name} has no {one.entry}: {name} has shape {shape} as (out, in),"
                    f" {advice}."
                )
        return torch.frombuffer(
            self._span(file, begin + start, begin + stop, name), dtype=_DTYPES[dtype]
        ).reshape(shape)

    @cached_property
    def shards(self) -> dict[str, str]:
        """The file that holds each tensor."""
        if _INDEX in self.files:
            where = _json(self.fetch(_INDEX), f"{_INDEX} of {self.name}").get("weight_map")
            if not isinstance(where, dict):
                raise BadCheckpoint(
                    f"{_INDEX} of {self.name} is not a safetensors index: it has no weight_map."
                )
            return {str(name): str(file) for name, file in where.items()}
        if _SINGLE in self.files:
            return dict.fromkeys(self._header(_SINGLE)[1], _SINGLE)
        raise BadCheckpoint(
            f"{self.name} has neither {_SINGLE} nor {_INDEX}; no other weights are read here."
        )

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        if file not in self.headers:
            begin = 8 + int.from_bytes(self._span(file, 0, 8), "little")
            if not 8 < begin <= _LONGEST_HEADER:
                raise BadCheckpoint(
                    f"{file} of {self.name} is damaged or not a safetensors file; download it"
                    " again."
                )
            self.headers[file] = (
                begin,
                _json(self._span(file, 8, begin), f"the header of {file} of {self.name}"),
            )
        return self.headers[file]

    def _span(self, file: str, start: int, stop: int, what: str | None = None) -> bytearray:
        data = self.fetch(file, start, stop, what)
        if len(data) != stop - start:
            raise BadCheckpoint(
                f"{file} of {self.name} is truncated: it ends before byte {stop}; download it"
                " again."
            )
        return data


class _Folder(_Checkpoint):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(
            str(folder),
            frozenset(p.name for p in folder.iterdir()) if folder.is_dir() else frozenset(),
        )
        if not self.files & {_INDEX, _SINGLE}:
            check_folder(folder)  # says what the folder is instead

    def fetch(
        self, file: str, start: int = 0, stop: int | None = None, what: str | None = None
    ) -> bytearray:
        with (self.folder / file).open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            data = bytearray(max(0, min(size, size if stop is None else stop) - start))
            opened.seek(start)
            opened.readinto(data)
        return data


class _Repository(_Checkpoint):
    """A repository on the Hub, read by HTTP range requests at the commit that its revision names
    now.
    """

    def __init__(
        self, repo: str, revision: str | None, endpoint: str | None, tell: Progress
    ) -> None:
        from huggingface_hub import HfApi, constants

        self.repo, self.endpoint, self.tell = repo, endpoint, tell
        self.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        name = repo if revision is None else f"{repo}@{revision}"
        with _hub_errors(name):
            info = HfApi(endpoint).model_info(repo, revision=revision, timeout=self.timeout)
        self.commit = info.sha
        super().__init__(name, frozenset(s.rfilename for s in info.siblings or []))

    def fetch(
        self, file: str, start: int = 0, stop: int | None = None, what: str | None = None
    ) -> bytearray:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

        url = hf_hub_url(self.repo, file, revision=self.commit, endpoint=self.endpoint)
        ranged = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ranged
        data = bytearray()
        # Only refusals are tried again: the client cannot take back a body that broke off half way.
        request = http_stream_backoff(
            "GET", url, headers=headers, timeout=self.timeout, retry_on_exceptions=()
        )
        with _hub_errors(self.name), request as response:
            hf_raise_for_status(response)
            if ranged and response.status_code != 206:
                raise BadInput(
                    f"the server of {self.name} does not serve parts of a file; download the model"
                    " and give its folder."
                )
            for chunk in response.iter_bytes(1 << 20):
                data += chunk
                if what and stop is not None:
                    self.tell(what, len(data), stop - start)
        return data


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub, as a sentence."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except SurgeonError:
        raise
    except GatedRepoError as error:
        raise BadInput(
            f"{name} is gated: accept its terms on the Hub and log in with `hf auth login`, or give"
            " a folder."
        ) from error
    except RevisionNotFoundError as error:
        raise BadInput(
            f"{name}: the repository has no such revision; give a branch, a tag or a commit after"
            " the @."
        ) from error
    except RepositoryNotFoundError as error:
        raise BadInput(
            f"the Hub has no model {name}, or it is private; check the spelling, or log in with `hf"
            " auth login`."
        ) from error
    except (
        Exception
    ) as error:  # the client's network errors share no base class between its versions
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"the Hub did not give {name}: {first.rstrip('.')}. Check the name and the network, or"
            " give a folder."
        ) from error


def _json(text: bytearray, what: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadCheckpoint(f"{what} is damaged; download it again.") from error

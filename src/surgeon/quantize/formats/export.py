"""Quantize a checkpoint folder shard by shard: what an export is given, and how it writes.

How this works. One tensor is in memory at a time, whatever the size of the model. An export is one
function of an `ExportPlan`; the formats differ in what they make of a shard, and in what they add
to the folder in the end, and `write_folder` does the rest: it looks before it writes, goes through
the shards, copies the other files of the source, and records what was done.

The work goes on in `.TARGET.part` beside the target, see `files.writing_folder`. Its manifest holds
a hash of all settings, and, for each finished shard, what was done to its matrices. After an
interruption the same command goes on from there, and another one starts over; so a shard counts
only once the manifest names it. The folder gets its name when all is done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import files
from ...anatomy import Entry, Packing, Shards, Site, WeightView
from ...anatomy.folder import CONFIG, INDEX, config_json
from ...anatomy.load import read_config, unloaded_anatomy
from ...anatomy.names import TensorNames
from ...errors import PackedWeight
from ...progress import Tell, silent
from ...result import as_json, of_json
from ...settings import values_of
from ..config import QuantizeConfig
from ..holdout import MatrixReport
from ..quantize import by_site, quantized_sites

RECORD = "surgeon_quantize.json"
MANIFEST = "manifest.json"
# weights in any format, and records of patches that are not those of the copy
_LEFT_OUT = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "surgeon_patches.*",
    INDEX,
)
# what was done to each matrix; None where it is as it was
Reports = dict[Site, MatrixReport | None]


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """One export: the checkpoint `folder` goes quantized into the new folder `target`.

    critical: the entries that `config.method` may hold out. mean_squares: E[x^2] of each column of
    a site, (in,), where the clip search is weighted by it. The model is not in memory:
    `source` gives its map and its tensors, one at a time, and `holdout.treat` the codes of a
    matrix, the same as in memory. keep: what a format that has no room for single entries does with
    the matrices that hold critical ones: "8bit" or "dense". shards: the tensors of the folder,
    where they are open already.
    """

    folder: Path
    target: Path
    config: QuantizeConfig
    critical: tuple[Entry, ...] = ()
    mean_squares: Mapping[Site, Tensor] = field(default_factory=dict)
    progress: Tell = silent
    keep: str = "8bit"
    shards: Shards | None = None

    @cached_property
    def source(self) -> Source:
        """The folder, opened once. Raises: as `Source`."""
        return Source(self.folder, self.config, self.shards)


Export = Callable[[ExportPlan], Reports]


class Source:
    """The checkpoint to be quantized: its map without its weights, and its tensors one at a time.

    sites: what each tensor holds of the matrices that `config` quantizes, by the tensor's name.
    Raises: BadCheckpoint; PackedWeight if it is quantized already.
    """

    def __init__(self, folder: Path, config: QuantizeConfig, shards: Shards | None = None) -> None:
        self.folder = folder
        self.shards = shards or Shards.of(str(folder), folder)
        self.config = read_config(folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise PackedWeight(
                f"{folder} is quantized already, says its config.json; quantize the model it was"
                " made from."
            )
        self.anatomy = unloaded_anatomy(folder, self.config)
        names = TensorNames(self.anatomy, self.shards)
        self.sites: dict[str, list[tuple[Site, Packing]]] = {}
        for site in quantized_sites(self.anatomy, config):
            name, packing = names.find(site)
            self.shards.check_plain(name)
            self.sites.setdefault(name, []).append((site, packing))

    def views(self, name: str, tensor: Tensor) -> list[WeightView]:
        """The matrices in the tensor called `name`, sharing its memory."""
        return [WeightView(site, tensor, packing) for site, packing in self.sites.get(name, ())]


Done = Callable[[Site], None]
WriteShard = Callable[[Source, str, Path, Done], Reports]


def write_folder(
    plan: ExportPlan,
    kind: str,
    write_shard: WriteShard,
    finish: Callable[[Source, Path], None] | None = None,
) -> Reports:
    """Write the folder `plan.target`, one shard for each of the source, and copy what else lies in
    the source: configuration, tokenizer.

    Returns what was done to each matrix, in the model's order.

    write_shard(source, shard, output, tell): writes the counterpart of the file called `shard` to
    `output`, calls `tell` after each matrix, and returns what it did to each.
    finish(source, part): called with the complete folder before it gets its name.
    Raises: BadInput if the target cannot be made; as `Source`; SurgeonError for a full disk, or if
    another process writes the target.
    """
    files.check_new_folder(plan.target, plan.folder)
    source = plan.source
    for site in quantized_sites(source.anatomy, plan.config):
        plan.config.grid.check(source.anatomy.view(site).shape)
    by_site(source.anatomy, plan.critical)
    with files.writing_folder(plan.target, resume=True) as part:
        reports = _write_shards(plan, kind, source, part, write_shard)
        _copy_rest(source, part)
        order = {site: place for place, site in enumerate(source.anatomy.addresses)}
        sites = sorted(reports, key=lambda site: order.get(site, len(order)))
        reports = {site: reports[site] for site in sites}
        critical = [str(entry) for entry in plan.critical]
        record = {"export": kind, **values_of(plan.config), "critical": critical}
        _write_json(part / RECORD, record | {"matrices": as_json(reports)})
        if finish is not None:
            finish(source, part)
        (part / MANIFEST).unlink()
    return reports


def set_quantization(part: Path, settings: Mapping[str, Any], **more: Any) -> None:
    """Write the `quantization_config` into the folder's config.json, and `more` beside it."""
    config = config_json(part) | more | {"quantization_config": dict(settings)}
    (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_shards(
    plan: ExportPlan, kind: str, source: Source, part: Path, write_shard: WriteShard
) -> Reports:
    """The shards that are not finished yet; what was done to each matrix of all of them."""
    manifest = _opened(part, _settings(plan, kind, source))
    shards: dict[str, dict[str, Any]] = manifest["shards"]
    done = sum(map(len, shards.values()))
    total = sum(map(len, source.sites.values()))

    def tell(_: Site) -> None:
        nonlocal done
        done += 1
        plan.progress("write", done, total)

    for shard in source.shards.files:
        if shard not in shards:
            # the manifest after the shard: what it names is whole
            reports = write_shard(source, shard, part / shard, tell)
            shards[shard] = as_json(reports)
            _write_json(part / MANIFEST, manifest)
    return {
        site: report
        for done_before in shards.values()
        for site, report in of_json(Reports, done_before, MANIFEST).items()
    }


def _settings(plan: ExportPlan, kind: str, source: Source) -> str:
    """A hash of all that decides the bytes; of the source's shards only name, size and time, since
    reading them is the work itself.
    """
    about = [(shard, (source.folder / shard).stat()) for shard in source.shards.files]
    inputs = {
        str(site): hashlib.sha256(x.numpy().tobytes()).hexdigest()
        for site, x in plan.mean_squares.items()
    }
    settings = [
        kind,
        values_of(plan.config),
        sorted(map(str, plan.critical)),
        sorted(inputs.items()),
        str(plan.folder.resolve()),
        [(shard, stat.st_size, stat.st_mtime_ns) for shard, stat in about],
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _opened(part: Path, settings: str) -> dict[str, Any]:
    """The manifest of the unfinished folder, if it was begun with the same settings; else a new
    one, the folder emptied.
    """
    try:
        manifest: dict[str, Any] = json.loads((part / MANIFEST).read_text())
        whole = all((part / shard).is_file() for shard in manifest["shards"])
        if manifest["settings"] == settings and whole:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or one that was cut off: begin anew
    shutil.rmtree(part)
    part.mkdir()
    manifest = {"settings": settings, "shards": {}}
    _write_json(part / MANIFEST, manifest)
    return manifest


def _copy_rest(source: Source, part: Path) -> None:
    """The other files of the folder, and an index of the shards as they are now, where the source
    has one.
    """
    for path in sorted(source.folder.iterdir()):
        left_out = path.name.startswith(".") or any(map(path.match, _LEFT_OUT))
        if path.is_file() and not left_out:
            shutil.copyfile(path, part / path.name)
    if (source.folder / INDEX).is_file():
        stored = Shards(str(part), part, source.shards.files).stored
        size = sum(s.stop - s.start for s in stored.values())
        places = {name: s.shard for name, s in stored.items()}
        _write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _write_json(path: Path, document: Any) -> None:
    files.write_text(path, json.dumps(document, sort_keys=True, indent=1) + "\n")

"""Quantize a checkpoint folder shard by shard: one tensor in memory at a time, finished shards kept
when the work is interrupted.

The work goes on in `.TARGET.part` beside the target. Its manifest holds a hash of the settings and
what was done for each finished shard; the same command goes on from there, another one starts over,
and the folder gets its name when all is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..anatomy import Packing, Site, WeightView
from ..anatomy.load import check_folder, read_config, read_header, weight_files
from ..errors import BadInput, PackedWeight, SurgeonError
from ..patch.checkpoint import checkpoint_anatomy
from ..patch.names import TensorNames
from .config import QuantizeConfig
from .export import ExportPlan
from .quantize import by_site, quantized_sites

RECORD = "surgeon_quantize.json"
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
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
Report = dict[str, Any]


class Source:
    """The checkpoint to be quantized: its map without its weights, and its tensors one at a time.

    sites: what each tensor holds of the matrices that `config` quantizes, by the tensor's name.
    Raises: BadCheckpoint; PackedWeight if it is quantized already.
    """

    def __init__(self, folder: Path, config: QuantizeConfig) -> None:
        self.folder = check_folder(folder)
        self.config = read_config(folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise PackedWeight(
                f"{folder} is quantized already, says its config.json; quantize the model it was"
                " made from."
            )
        self.shards = weight_files(folder)
        self.holding = {
            shard: [name for name in read_header(shard) if name != "__metadata__"]
            for shard in self.shards
        }
        self.anatomy = checkpoint_anatomy(folder, self.config)
        names = TensorNames(
            self.anatomy, [name for names in self.holding.values() for name in names]
        )
        self.sites: dict[str, list[tuple[Site, Packing]]] = {}
        for site in quantized_sites(self.anatomy, config):
            name, packing = names.find(site)
            self.sites.setdefault(name, []).append((site, packing))

    def views(self, name: str, tensor: Tensor) -> list[WeightView]:
        """The matrices in the tensor called `name`, sharing its memory."""
        return [WeightView(site, tensor, packing) for site, packing in self.sites.get(name, ())]

    def read(self, shard: Path, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        with safe_open(shard, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()


def write_folder(
    plan: ExportPlan,
    kind: str,
    write_shard: Callable[[Source, Path, Path, Callable[[Site], None]], Mapping[Site, Report]],
    finish: Callable[[Source, Path], None] | None = None,
) -> None:
    """Write the folder `plan.target`, one shard for each of the source, and copy what else lies in
    the source: configuration, tokenizer.

    write_shard(source, shard, output, tell): writes the shard's counterpart to `output`, calls
    `tell` after each matrix, and returns what it did to each, as JSON. finish(source, part): called
    with the complete folder before it gets its name, to change its config.json, say. Interrupted,
    finished shards stay in `.TARGET.part`, and the same plan goes on from them.
    Raises: BadInput if the target cannot be made; as `Source`; SurgeonError for a full disk.
    """
    check_target(plan.folder, plan.target)
    source = Source(plan.folder, plan.config)
    for site in quantized_sites(source.anatomy, plan.config):
        plan.config.grid.check(source.anatomy.view(site).shape)
    by_site(source.anatomy, plan.critical)
    total = sum(len(held) for held in source.sites.values())
    part = unfinished(plan.target)
    try:
        manifest = _open_part(part, _settings(plan, kind, source))
        done = sum(len(reports) for reports in manifest["shards"].values())

        def tell(_: Site) -> None:
            nonlocal done
            done += 1
            if plan.progress is not None:
                plan.progress("write", done, total)

        for shard in source.shards:
            if shard.name not in manifest["shards"]:
                output = part / f".{shard.name}"
                reports = write_shard(source, shard, output, tell)
                os.replace(output, part / shard.name)
                manifest["shards"][shard.name] = {
                    str(site): report for site, report in reports.items()
                }
                _write_json(part / MANIFEST, manifest)
        _copy_rest(source, part)
        matrices = {
            site: report
            for reports in manifest["shards"].values()
            for site, report in reports.items()
        }
        order = {str(site): i for i, site in enumerate(source.anatomy.addresses)}
        record = {
            "export": kind,
            **plan.config.to_json(),
            "critical": [str(e) for e in plan.critical],
            "matrices": [
                {"site": site, **matrices[site]}
                for site in sorted(matrices, key=lambda s: order.get(s, len(order)))
            ],
        }
        _write_json(part / RECORD, record)
        if finish is not None:
            finish(source, part)
        (part / MANIFEST).unlink()
        os.rename(part, plan.target)
    except OSError as error:
        raise SurgeonError(
            f"cannot write {plan.target}: {error.strerror or error}; what is finished stays in"
            f" {part}, and the same command goes on."
        ) from error


def unfinished(target: Path) -> Path:
    """Where the work on `target` goes on."""
    return target.parent / f".{target.name}.part"


def check_target(folder: Path, target: Path) -> None:
    """Raises: BadInput if a quantized copy of `folder` cannot be made at `target`."""
    if target.exists() or target.is_symlink():
        raise BadInput(f"{target} exists already; name a new folder for the quantized checkpoint.")
    if not target.parent.is_dir():
        raise BadInput(
            f"there is no folder {target.parent} to put {target.name} in; make it first."
        )
    if folder.resolve() in target.resolve().parents:
        raise BadInput(f"{target} lies inside the checkpoint {folder}; name a folder outside it.")


def _settings(plan: ExportPlan, kind: str, source: Source) -> str:
    """A hash of all that decides the bytes; of the source's shards only name, size and time, since
    reading them is the work itself.
    """
    shards = [(s.name, s.stat().st_size, s.stat().st_mtime_ns) for s in source.shards]
    inputs = {
        str(site): hashlib.sha256(x.numpy().tobytes()).hexdigest()
        for site, x in plan.mean_squares.items()
    }
    settings = [
        kind,
        plan.config.to_json(),
        sorted(map(str, plan.critical)),
        sorted(inputs.items()),
        str(plan.folder.resolve()),
        shards,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _open_part(part: Path, settings: str) -> dict[str, Any]:
    """The manifest of the unfinished folder, if it was begun with the same settings; else a new one
    in an empty folder.
    """
    try:
        manifest: dict[str, Any] = json.loads((part / MANIFEST).read_text())
        if manifest["settings"] == settings and all(
            (part / name).is_file() for name in manifest["shards"]
        ):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    manifest = {"settings": settings, "shards": {}}
    _write_json(part / MANIFEST, manifest)
    return manifest


def _copy_rest(source: Source, part: Path) -> None:
    """The other files of the folder, and an index of the shards as they are now, where the source
    has one.
    """
    for path in sorted(source.folder.iterdir()):
        if (
            path.is_file()
            and not path.name.startswith(".")
            and not any(path.match(pattern) for pattern in _LEFT_OUT)
        ):
            shutil.copyfile(path, part / path.name)
    if (source.folder / INDEX).is_file():
        headers = {shard.name: read_header(part / shard.name) for shard in source.shards}
        places = {
            name: shard
            for shard, header in headers.items()
            for name in header
            if name != "__metadata__"
        }
        ends = [
            t["data_offsets"]
            for header in headers.values()
            for name, t in header.items()
            if name != "__metadata__"
        ]
        size = sum(end - start for start, end in ends)
        _write_json(part / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _write_json(path: Path, document: Any) -> None:
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(document, sort_keys=True, indent=1) + "\n")
    os.replace(new, path)

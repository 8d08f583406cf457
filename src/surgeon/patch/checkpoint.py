"""Patches on a checkpoint folder: the touched tensors are read and overwritten, and the model is
never built with its weights.

How this works. The model's map is drawn on the meta device, and tells in which tensor of which
shard a site lies. That tensor is read, a view of it is handed to the same rules as in memory
(stack.py), and when all patches are on, the folder is copied and the changed tensors are written
over their bytes in the copy. surgeon_patches.json lists the patches that are on, and the digest of
each tensor they touched, so that a later undo can tell their changes from somebody else's. A
low-rank patch does not know the entries it replaced; they are kept in surgeon_patches.undo, as the
stack keeps them in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .. import files
from ..anatomy import Shards, Site, WeightView, digest
from ..anatomy.folder import overwrite
from ..anatomy.load import read_config, unloaded_anatomy
from ..anatomy.names import TensorNames
from ..errors import (
    BadCheckpoint,
    BadInput,
    PackedWeight,
    PatchConflict,
    Refused,
    WrongBase,
)
from .deltas import LowRankDelta
from .patch import Patch
from .stack import Layer, Stack, put_on_, take_off_, views

RECORD = "surgeon_patches.json"
ORIGINALS = (  # safetensors, not named so: loaders take all of those for weights
    "surgeon_patches.undo"
)


def apply_to_checkpoint(
    source: Path, patches: Sequence[Patch], target: Path, allow_tied: bool = False
) -> None:
    """Copy the checkpoint `source` to the new folder `target`, with the patches applied in order,
    and list them in surgeon_patches.json.

    Every patch is checked as on a model in memory before anything is written; if writing fails,
    nothing is left behind.
    Raises: BadInput, BadCheckpoint, WrongBase, PatchConflict, TiedWeight unless `allow_tied`,
    PackedWeight; SurgeonError for a full disk.
    """
    if not patches:
        raise BadInput("no patch to apply was given; name at least one.")
    files.check_new_folder(target, source)
    checkpoint = _Checkpoint(source)
    stack: Stack = []
    for patch in patches:
        if patch.digest in checkpoint.listed():
            raise PatchConflict(
                f"this patch ({patch}) is applied to {source} already, says its {RECORD}; undo it"
                " first."
            )
        put_on_(patch, views(patch, checkpoint.anatomy, checkpoint.view, allow_tied), stack)
        entry: dict[str, Any] = {
            "made_by": patch.made_by,
            "digest": patch.digest,
            "sites": [str(s) for s in patch.sites],
        }
        if any(isinstance(delta, LowRankDelta) for delta in patch.deltas):
            entry |= checkpoint.keep(stack[-1])
        checkpoint.record["patches"].append(entry)
    checkpoint.write(target)


def undo_on_checkpoint(source: Path, patch: Patch, target: Path) -> None:
    """Copy the patched checkpoint `source` to the new folder `target`, with the original entries of
    `patch` back, bit for bit.

    Raises: as `apply_to_checkpoint`; WrongBase if the checkpoint does not hold what the patch
    writes, or if more was changed there than the patches that its surgeon_patches.json lists;
    PatchConflict if a later patch holds the same entries; Refused for a low-rank patch, which keeps
    no original weights, where the surgeon_patches.undo that `apply_to_checkpoint` wrote is missing.
    """
    files.check_new_folder(target, source)
    checkpoint = _Checkpoint(source)
    sites = views(patch, checkpoint.anatomy, checkpoint.view)
    checkpoint.check_on_top(patch)
    # a tensor that other patches lie on as well is known to be theirs and this one's if the record
    # says so
    known = (
        {Site.parse(s): d for s, d in checkpoint.record["tensors"].items()}
        if patch.digest in checkpoint.listed()
        else {}
    )
    foreign = [site for site, view in sites.items() if known.get(site) != view.digest()]
    take_off_(patch, sites, checkpoint.layer(patch), known)
    for site in foreign:
        if sites[site].digest() != patch.base[site].digest:
            raise WrongBase(
                f"{site} was changed by something else than the patches that the {RECORD} of"
                f" {source} lists; undo that first."
            )
    checkpoint.record["patches"] = [
        p for p in checkpoint.record["patches"] if p["digest"] != patch.digest
    ]
    checkpoint.originals = {
        name: old for name, old in checkpoint.originals.items() if not name.startswith(patch.digest)
    }
    checkpoint.write(target)


class _Checkpoint:
    """The tensors of a folder, opened one by one as sites; `write` makes a copy of the folder with
    what was changed in them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = Shards.of(str(folder), folder)
        self.config = read_config(folder)
        self.anatomy = unloaded_anatomy(folder, self.config)
        self.names = TensorNames(self.anatomy, self.shards)
        self.record = _read_record(folder / RECORD)
        self.originals = _read_originals(folder / ORIGINALS)
        self.tensors: dict[str, Tensor] = {}
        self.opened: dict[Site, WeightView] = {}

    def listed(self) -> set[str]:
        return {p["digest"] for p in self.record["patches"]}

    def keep(self, layer: Layer) -> dict[str, Any]:
        """Keep the original entries under a low-rank patch, and where they lie, one bit an entry;
        what the record says of them.
        """
        for site, old in layer.originals.items():
            name = f"{layer.patch.digest}.{site}"
            bits = np.packbits(layer.patch.touched(site).numpy())
            self.originals |= {
                f"{name}.old": old.contiguous(),
                f"{name}.touched": torch.from_numpy(bits),
            }
        return {
            "written": {str(site): written for site, written in layer.written.items()},
            "originals": {str(site): digest(old) for site, old in layer.originals.items()},
        }

    def layer(self, patch: Patch) -> Stack:
        """The patch as it lies on the folder, if its original entries were kept there; else
        nothing.

        Raises: Refused if they were kept and are gone; BadCheckpoint if they are not those any
        more.
        """
        entry: dict[str, Any] = next(
            (p for p in self.record["patches"] if p["digest"] == patch.digest), {}
        )
        if "written" not in entry:
            return []
        originals = {}
        for site in patch.sites:
            old = self.originals.get(f"{patch.digest}.{site}.old")
            if old is None:
                raise Refused(
                    f"{self.folder} lacks the {ORIGINALS} with the weights that the low-rank patch"
                    f" ({patch}) replaced; copy that file from where the patch was applied, or go"
                    " back to the base model."
                )
            if digest(old) != entry["originals"].get(str(site)):
                raise BadCheckpoint(
                    f"{self.folder / ORIGINALS} is damaged: its values for {site} are not those"
                    f" that {RECORD} names."
                )
            originals[site] = old
        return [
            Layer(patch, originals, {site: entry["written"][str(site)] for site in patch.sites})
        ]

    def check_on_top(self, patch: Patch) -> None:
        """Raises: PatchConflict if a low-rank patch applied later touches entries of this one,
        perhaps without changing their bits.

        Later patches of entries need no such check: they change every entry that they touch, and
        that shows.
        """
        digests = [p["digest"] for p in self.record["patches"]]
        later = digests[digests.index(patch.digest) + 1 :] if patch.digest in digests else []
        for other in later:
            for site in patch.sites:
                bits = self.originals.get(f"{other}.{site}.touched")
                mine = patch.touched(site)
                if (
                    bits is not None
                    and (
                        np.unpackbits(bits.numpy(), count=mine.numel()).astype(bool)
                        & mine.flatten().numpy()
                    ).any()
                ):
                    raise PatchConflict(
                        f"a patch applied later (digest {other[:12]}) holds some of the entries of"
                        f" this one ({patch}); undo it first."
                    )

    def view(self, site: Site) -> WeightView:
        """The site's weight, in a copy of its tensor.

        Raises: BadCheckpoint, PackedWeight; Refused if a tied weight is stored twice.
        """
        try:
            name, packing = self.names.find(site)
            twins = {self.names.find(other)[0] for other in self.anatomy.tied_to(site)} - {name}
        except BadCheckpoint as error:
            if getattr(self.config, "quantization_config", None) is None:
                raise
            raise PackedWeight(
                f"{self.folder} is quantized, and {site} is packed in it; patch the model it was"
                " made from."
            ) from error
        if twins:
            raise Refused(
                f"{self.folder} stores {site} twice, as {name} and {', '.join(twins)}; save it"
                " again with transformers first."
            )
        if name not in self.tensors:
            self.tensors[name] = self.shards.read_plain(name)
        self.opened[site] = WeightView(site, self.tensors[name], packing)
        return self.opened[site]

    def write(self, target: Path) -> None:
        """Copy the folder, overwrite the opened tensors in their shards, write the record; then
        give the copy its name.
        """
        digests = {
            **self.record["tensors"],
            **{str(site): digest(view.read()) for site, view in self.opened.items()},
        }
        patched = {site for patch in self.record["patches"] for site in patch["sites"]}
        self.record["tensors"] = {
            site: digests[site] for site in sorted(patched) if site in digests
        }
        with files.writing_folder(target) as part:
            # file by file and without modes, so that links become files and read-only files can be
            # written
            shutil.copytree(self.folder, part, copy_function=shutil.copyfile, dirs_exist_ok=True)
            part.chmod(part.stat().st_mode | 0o700)
            for name, tensor in self.tensors.items():
                stored = self.shards.stored[name]
                overwrite(part / stored.shard, stored, tensor)
            (part / RECORD).unlink(missing_ok=True)
            if self.record["patches"]:
                text = json.dumps(self.record, sort_keys=True, indent=1) + "\n"
                (part / RECORD).write_text(text)
            (part / ORIGINALS).unlink(missing_ok=True)
            if self.originals:
                (part / ORIGINALS).write_bytes(safetensors.torch.save(self.originals))


def _read_originals(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(
            f"{path} is damaged ({error}), so low-rank patches cannot be undone; delete it to go on"
            " without."
        ) from error


def _read_record(path: Path) -> dict[str, Any]:
    """What is applied to the checkpoint. Shapes: {"patches": [{made_by, digest, sites}], "tensors":
    {site: digest as it is now}}.

    A patch with a low-rank term also has "written" and "originals", {site: digest} of the entries
    it wrote and of those before.
    """
    if not path.exists():
        return {"patches": [], "tensors": {}}
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if not all(
            {"digest", "made_by", "sites"} <= set(p) and ("written" in p) == ("originals" in p)
            for p in record["patches"]
        ):
            raise KeyError("digest, made_by or sites")
        for site in record["tensors"]:
            Site.parse(site)
    except (ValueError, KeyError, TypeError, AttributeError, BadInput) as error:
        raise BadCheckpoint(
            f"{path} is damaged ({error!r}), so what is applied is not known; delete it if this is"
            " a base model."
        ) from error
    return record

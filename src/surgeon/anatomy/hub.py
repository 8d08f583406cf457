"""Single tensors of a checkpoint on the Hub: file list, headers and byte ranges, kept on disk and
resumed where a connection broke off.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import BadCheckpoint, BadInput, SurgeonError
from .load import hub_errors, not_safetensors, split_id
from .shards import Shards, Stored, described

ATTEMPTS = 5  # in a row without a byte more
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


class RemoteShards(Shards):
    """The tensors of a repository, at the commit that its revision names now. `fetched` counts the
    bytes that came over the network.

    Only the bytes of the tensors that are read are asked for. They are kept in huggingface_hub's
    folder for assets, so that a later pass, or a later run, finds them there; a shard that the
    Hub's own cache holds is read from it. Where the server gives no parts of files, the shards that
    hold the wanted tensors are downloaded whole.
    """

    fetched: int

    def __init__(self, name: str) -> None:
        """Raises: BadInput if the Hub would not give it; BadCheckpoint if it holds no safetensors
        weights.
        """
        from huggingface_hub import HfApi, cached_assets_path, snapshot_download

        self.repo, self.revision = split_id(name)
        self.fetched, self.ranged = 0, True
        with hub_errors(name):
            info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
            self.commit = str(info.sha)
            folder = Path(
                snapshot_download(
                    self.repo, revision=self.commit, allow_patterns=["*.json", "*.model", "*.txt"]
                )
            )
        files = {s.rfilename: s for s in info.siblings or []}
        if "config.json" not in files:
            raise BadCheckpoint(
                f"{name} has no config.json, so it is not a transformers checkpoint."
            )
        self.digests = {f: getattr(s.lfs, "sha256", None) for f, s in files.items()}
        self.kept = cached_assets_path("weight-surgeon", self.repo.replace("/", "--"), self.commit)
        self.name = name
        super().__init__(name, folder, {})
        self.shards = _shards(name, folder, sorted(files))
        for shard in self.shards:
            self.stored |= self._described(shard)

    def fingerprint(self) -> str | None:
        """From the SHA-256 of the files as the Hub lists them; None for files that it keeps none
        of.
        """
        digests = [self.digests.get(shard) for shard in self.shards]
        total = hashlib.sha256((self.folder / "config.json").read_bytes())
        for digest in digests:
            if digest is None:
                return None
            total.update(bytes.fromhex(digest))
        return total.hexdigest()

    def place(self, tensor: Stored) -> tuple[Path, int]:
        return self._bytes(tensor.shard, tensor.start, tensor.stop)

    def _described(self, shard: str) -> dict[str, Stored]:
        begin = 8 + int.from_bytes(self._read(shard, 0, 8), "little")
        broken = BadCheckpoint(f"{shard} of {self.name} is damaged or not a safetensors file.")
        if not 8 < begin <= _LONGEST_HEADER:
            raise broken
        try:
            header: dict[str, Any] = dict(json.loads(self._read(shard, 8, begin)))
        except (ValueError, TypeError) as error:
            raise broken from error
        return described(shard, begin, header)

    def _read(self, shard: str, start: int, stop: int) -> bytes:
        path, offset = self._bytes(shard, start, stop)
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(stop - start)

    def _bytes(self, shard: str, start: int, stop: int) -> tuple[Path, int]:
        """A local file with bytes start..stop of a shard, and where they begin in it.

        Raises: BadInput if they cannot be had.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, shard, revision=self.commit)
        if isinstance(cached, str):
            return Path(cached), start
        if self.ranged:
            done = self.kept / f"{shard}.{start}-{stop}"
            if done.exists() or self._fetch(shard, start, stop, done):
                return done, 0
            self.ranged = False
        with hub_errors(self.name):
            return Path(hf_hub_download(self.repo, shard, revision=self.commit)), start

    def _fetch(self, shard: str, start: int, stop: int, done: Path) -> bool:
        """Bytes start..stop into the file `done`, going on where a broken connection, or an earlier
        run, left off.

        False if the server does not give parts of files.
        """
        from huggingface_hub.errors import HfHubHTTPError

        part = done.with_name(f"{done.name}.part")
        done.parent.mkdir(parents=True, exist_ok=True)
        failures = 0
        with hub_errors(self.name), part.open("ab") as file:
            while (have := file.tell()) < stop - start:
                try:
                    with self._request(shard, start + have, stop) as response:
                        if response.status_code != 206:
                            return False
                        for chunk in (
                            response.iter_bytes()
                        ):  # as it arrives: what waits for a full chunk is lost in a break
                            file.write(chunk)
                            self.fetched += len(chunk)
                except (SurgeonError, HfHubHTTPError, OSError):
                    raise
                # the client's transport errors share no base class between its versions
                except Exception as error:
                    failures = 1 if file.tell() > have else failures + 1
                    if failures == ATTEMPTS:
                        raise BadInput(
                            f"the connection to the Hub broke off {ATTEMPTS} times in a row within"
                            f" {shard} of {self.name} ({type(error).__name__}); run the command"
                            " again, it goes on where it stopped."
                        ) from error
                    time.sleep(0.1 * 2**failures)
                else:
                    if file.tell() == have:
                        raise BadCheckpoint(
                            f"{shard} of {self.name} ends before byte {stop}, which its header"
                            " promises."
                        )
            if file.tell() != stop - start:
                file.truncate(0)
                raise BadCheckpoint(
                    f"the Hub sent more of {shard} of {self.name} than was asked for; run the"
                    " command again."
                )
        os.replace(part, done)
        return True

    @contextmanager
    def _request(self, shard: str, start: int, stop: int) -> Iterator[Any]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

        url = hf_hub_url(self.repo, shard, revision=self.commit)
        headers = build_hf_headers() | {
            "Accept-Encoding": "identity",
            "Range": f"bytes={start}-{stop - 1}",
        }
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        # only refusals are tried again here: the client cannot take back a body that broke off half
        # way
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()
        ) as response:
            hf_raise_for_status(response)
            yield response


def _shards(name: str, folder: Path, files: list[str]) -> list[str]:
    """The weight files among `files`, in order: those of the index if there is one.

    Raises: BadCheckpoint.
    """
    if _INDEX in files:
        try:
            shards = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadCheckpoint(
                f"{_INDEX} of {name} is not a safetensors index: {error!r}."
            ) from error
        if missing := [s for s in shards if s not in files]:
            raise BadCheckpoint(
                f"{name} lacks the shards {', '.join(missing[:3])} that its index names."
            )
        return shards
    shards = (
        [_SINGLE]
        if _SINGLE in files
        else [f for f in files if f.endswith(".safetensors") and "/" not in f]
    )
    if not shards:
        raise not_safetensors(name, files)
    return shards

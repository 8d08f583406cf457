"""Single tensors of a checkpoint on the Hub, by byte range.

`RemoteShards` is `folder.Shards` with another way to bytes. The commit that the revision names now,
the file list and the small files (configuration, index, tokenizer) come first; then the header of
each shard, and then only the tensors that are read. Every span of bytes becomes a file of its own
in huggingface_hub's folder for assets, so a later pass, or a later run, finds it there; one that
broke off is resumed, and a second process waits for the first. Where a server gives no parts of
files, the shards that are needed are downloaded whole.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .. import files
from ..errors import BadCheckpoint, BadInput, SurgeonError
from .folder import CONFIG, Shards, model_files
from .load import hub_errors, locate, split_id

ATTEMPTS = 5  # in a row without a byte more


def open_shards(name: str) -> Shards:
    """The tensors of MODEL where they are: in a folder, or on the Hub by byte range.

    Raises: BadInput if there is no such model, BadCheckpoint if it holds no sound weights.
    """
    if name == "patient" or name.startswith((".", "/", "~")) or _exists(name):
        return Shards.of(name, locate(name))
    return RemoteShards(name)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # no path at all, as one that is too long
        return True


class RemoteShards(Shards):
    """The tensors of a repository, at the commit that its revision names now. `fetched` counts the
    bytes that came over the network; a shard that the Hub's own cache holds is read from there.
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
        siblings = {s.rfilename: s for s in info.siblings or []}
        self.sizes = {file: s.size for file, s in siblings.items()}
        self.digests = {file: getattr(s.lfs, "sha256", None) for file, s in siblings.items()}
        self.kept = cached_assets_path("weight-surgeon", self.repo.replace("/", "--"), self.commit)
        super().__init__(name, folder, model_files(folder, name, siblings))

    def fingerprint(self) -> str | None:
        """From the SHA-256 of the files as the Hub lists them; None for files that it keeps none
        of.
        """
        digests = [self.digests.get(shard) for shard in self.files]
        total = hashlib.sha256((self.folder / CONFIG).read_bytes())
        for digest in digests:
            if digest is None:
                return None
            total.update(bytes.fromhex(digest))
        return total.hexdigest()

    def _size(self, shard: str) -> int | None:
        return self.sizes.get(shard)

    def _place(self, shard: str, start: int, stop: int) -> tuple[Path, int]:
        """A local file with bytes start..stop of a shard, and where they begin in it.

        Raises: BadInput if they cannot be had.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, shard, revision=self.commit)
        if isinstance(cached, str):
            return Path(cached), start
        if self.ranged:
            done = self.kept / f"{shard}.{start}-{stop}"
            try:
                if not done.exists():
                    self._fetch(shard, start, stop, done)
                return done, 0
            except _NoRanges:
                self.ranged = False
        with hub_errors(self.name):
            return Path(hf_hub_download(self.repo, shard, revision=self.commit)), start

    def _fetch(self, shard: str, start: int, stop: int, done: Path) -> None:
        """Bytes start..stop into the file `done`, going on where a broken connection, or an earlier
        run, left off.

        Raises: _NoRanges if the server does not give parts of files.
        """
        with files.resuming(done) as part:
            if done.exists():  # another process has fetched it meanwhile
                return
            with hub_errors(self.name), part.open("ab") as file:
                self._append(file, shard, start, stop)

    def _append(self, file: BinaryIO, shard: str, start: int, stop: int) -> None:
        """What `file` lacks of bytes start..stop."""
        from huggingface_hub.errors import HfHubHTTPError

        failures = 0
        while (have := file.tell()) < stop - start:
            try:
                with self._request(shard, start + have, stop) as response:
                    if response.status_code != 206:
                        raise _NoRanges
                    # as it arrives: what waits for a full chunk is lost in a break
                    for chunk in response.iter_bytes():
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
                time.sleep(0.1 * 2**failures)  # a server that is busy is asked less and less often
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

    @contextmanager
    def _request(self, shard: str, start: int, stop: int) -> Iterator[Any]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

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


class _NoRanges(SurgeonError):
    """A server that gives whole files only."""

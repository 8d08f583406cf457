"""The only place that writes files and folders so that nobody meets half of one, and that locks.

A file is written under a temporary name beside its own, which holds the process id, and renamed
when it is whole; a rename on one file system happens at once or not at all. A folder is filled as
`.NAME.part` and renamed likewise. Only one process fills it: the lock is a file `.NAME.lock`, held
with flock, which the system releases when the process ends, however it ends. So what a killed run
left is known to belong to nobody, and the next run clears it away, or goes on from it where it asks
for that. The lock's file is removed while the lock is held; who waited for it looks whether the
file is still the one that it opened, and opens the new one if not.

What the system refuses becomes a sentence: BadInput where another place would do, SurgeonError for
a full disk and the like.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BadInput, SurgeonError

try:
    import fcntl
except ImportError:  # Windows has no flock: there nothing keeps two writers apart
    fcntl = None  # type: ignore[assignment]

# what a better path or other rights would mend
_OF_THE_PLACE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
_ADVICE = "choose another place."
# some network file systems have no locks
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file. Raises: as `writing`."""
    with writing(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole file as UTF-8, line ends as they are. Raises: as `writing`."""
    write_bytes(path, text.encode())


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Within the block write to the path that it gives; after it that file is called `path`.

    The temporary name ends as `path` does. If the block fails, nothing is left, and a file that was
    there before stays.
    Raises: BadInput if there is no such folder, or it cannot be written; SurgeonError for a full
    disk.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with writing(folder / "table.txt") as part:
    ...     _ = part.write_text("1 2 3")
    >>> [p.name for p in folder.iterdir()]
    ['table.txt']
    """
    if not os.path.isdir(path.parent):
        raise BadInput(f"cannot write {path}: there is no folder {path.parent}; make it first.")
    if os.path.isdir(path):
        raise BadInput(f"cannot write {path}: that is a folder; name a file in it.")
    # the suffix stays: libraries choose a format by it
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with _in_sentences(path, part):
            yield part
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def resuming(path: Path) -> Iterator[Path]:
    """As `writing`, for a file that is written once: what an interrupted run wrote is there again.

    Another process that writes `path` is waited for; look in the block whether it is there by then.
    """
    part = path.with_name(f".{path.name}.part")
    advice = f"what was written stays in {part}."
    with _in_sentences(path, part, advice), lock(path, wait=True):
        yield part
        if not path.exists():
            os.replace(part, path)


@contextmanager
def writing_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """Within the block fill the folder that it gives; after it that folder is called `target`.

    If the block fails, nothing is left. resume: what an interrupted block wrote stays, and is in
    the folder again the next time.
    Raises: BadInput if the target exists or cannot be made; SurgeonError if another process writes
    it, or for a full disk.
    """
    check_new_folder(target)
    part = unfinished(target)
    goes_on = f"what is finished stays in {part}, and the same command goes on."
    advice = goes_on if resume else _ADVICE
    with _in_sentences(target, part, advice), lock(target):
        check_new_folder(target)  # another process may have finished it
        if not resume:
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(exist_ok=True)
        try:
            yield part
            os.rename(part, target)
        except BaseException:  # also Ctrl-C
            if not resume:
                shutil.rmtree(part, ignore_errors=True)
            raise


def unfinished(target: Path) -> Path:
    """Where `writing_folder` fills the folder."""
    return target.parent / f".{target.name}.part"


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed; call it where nobody else writes."""
    for left in folder.glob(".*.part*"):
        left.unlink()


def check_new_folder(target: Path, source: Path | None = None) -> None:
    """Raises: BadInput if no new folder can be made at `target`, or if it would lie in `source`,
    which is to be copied.
    """
    if os.path.lexists(target):
        raise BadInput(f"{target} exists already; name a new folder.")
    if not os.path.isdir(target.parent):
        raise BadInput(
            f"there is no folder {target.parent} to put {target.name} in; make it first."
        )
    if source is not None and source.resolve() in target.resolve().parents:
        raise BadInput(
            f"{target} lies inside {source}, which is to be copied; name a folder outside it."
        )


def make_folder(folder: Path) -> None:
    """Make the folder if it is not there, and try to write to it. Raises: BadInput."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"cannot make the folder {folder} or write to it: {error.strerror}; choose another"
            " place."
        ) from error


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Within the block no other process that asks for it writes `path`.

    Raises: SurgeonError if one does, unless `wait`; OSError if no file can be made beside `path`.
    """
    file = path.with_name(f".{path.name}.lock")
    descriptor = _acquired(file, path, wait)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(file: Path, path: Path, wait: bool) -> int:
    """A descriptor of the lock's file, held."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, wait)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:  # whoever held it has removed the file meanwhile
            pass
        except BlockingIOError as error:
            os.close(descriptor)
            raise SurgeonError(
                f"another process is writing {path}; wait for it, or choose another place."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, wait: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


@contextmanager
def _in_sentences(path: Path, part: Path, advice: str = _ADVICE) -> Iterator[None]:
    """What the system says against writing `path` by way of `part`, as BadInput or SurgeonError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, shutil.Error):  # of copytree: (from, to, why) of each file
            reason = error.args[0][0][2]
        if error.filename and not str(error.filename).startswith((str(part), str(path))):
            reason += f" ({error.filename})"
        kind = BadInput if error.errno in _OF_THE_PLACE else SurgeonError
        raise kind(f"cannot write {path}: {reason}; {advice}") from error

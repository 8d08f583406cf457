"""Writing: whole or not at all, one writer at a time, and a sentence where it cannot be done."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import surgeon
from surgeon import files
from surgeon.errors import BadInput, SurgeonError

# writes a folder or holds a lock, says so, and goes on when a line comes in
HOLDER = """
import sys
from pathlib import Path
from surgeon import files
what, target = sys.argv[1], Path(sys.argv[2])
block = files.lock(target) if what == "lock" else files.writing_folder(target, what == "resume")
with block as part:
    if part is not None:
        (part / "first").write_text("of the other process")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def other_process(what: str, target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of writing `target`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, what, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(surgeon.__file__).parents[1])},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def end(process: subprocess.Popen[str]) -> None:
    """Let it finish what it writes."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- files -------------------------------------------------------------------------------------


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with files.writing(tmp_path / "table.parquet") as part:
        assert part.parent == tmp_path
        assert part.suffix == ".parquet"
        assert str(os.getpid()) in part.name
        part.write_bytes(b"half")
        assert names(tmp_path) == [part.name]
        part.write_bytes(b"whole")
    assert names(tmp_path) == ["table.parquet"]
    assert (tmp_path / "table.parquet").read_bytes() == b"whole"
    files.write_text(tmp_path / "text", "Umlaut ä\r\n")
    assert (tmp_path / "text").read_bytes() == "Umlaut ä\r\n".encode()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("no"), OSError(errno.ENOSPC, "No space left")]
)
def test_a_writer_that_fails_leaves_nothing_and_keeps_the_old_file(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "p"
    path.write_text("old")

    def write() -> None:
        with files.writing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(SurgeonError if isinstance(error, OSError) else type(error)):
        write()
    assert names(tmp_path) == ["p"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, BadInput),
        (errno.EROFS, BadInput),
        (errno.ENOSPC, SurgeonError),
        (errno.EIO, SurgeonError),
    ],
)
def test_what_the_system_says_is_a_sentence(
    number: int, kind: type[SurgeonError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(SurgeonError) as caught:
        files.write_bytes(tmp_path / "p", b"")
    assert type(caught.value) is kind
    assert str(caught.value) == (
        f"cannot write {tmp_path / 'p'}: {os.strerror(number)}; choose another place."
    )
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(BadInput, match="Permission denied; choose another place"):
        files.write_bytes(closed / "p", b"")
    with pytest.raises(BadInput, match="Permission denied"), files.writing_folder(closed / "out"):
        pass
    with pytest.raises(BadInput, match="cannot make the folder"):
        files.make_folder(closed)
    assert names(closed) == []


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "none" / "p", "there is no folder"),
        (tmp_path / "file" / "p", "there is no folder"),
        (tmp_path, "that is a folder"),
        (Path("/"), "that is a folder"),
        (tmp_path / ("p" * 300), "File name too long"),
    ):
        with pytest.raises(BadInput, match=said):
            files.write_bytes(path, b"")
    with pytest.raises(BadInput, match="cannot make the folder"):
        files.make_folder(tmp_path / "file" / "folder")
    files.make_folder(tmp_path / "deep" / "folder")
    assert names(tmp_path / "deep") == ["folder"]
    assert names(tmp_path / "deep" / "folder") == []


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path: Path) -> None:
    with files.writing(tmp_path / "kept.json") as part:
        part.write_text("{}")
    left = part
    left.write_text("{")
    files.clear_leftovers(tmp_path)
    assert names(tmp_path) == ["kept.json"]


def test_a_file_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    path = tmp_path / "long"

    def interrupted() -> None:
        with files.resuming(path) as part:
            part.write_bytes(b"first ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not path.exists()
    with files.resuming(path) as part, part.open("ab") as file:
        assert file.tell() == 6
        file.write(b"second")
    assert path.read_bytes() == b"first second"
    with files.resuming(path):  # it is there: nothing is to be done
        pass
    assert names(tmp_path) == ["long"]


def test_who_resumes_waits_for_who_writes(tmp_path: Path) -> None:
    path, order = tmp_path / "long", []

    def second() -> None:
        with files.resuming(path):
            order.append(path.exists())

    with files.resuming(path) as part:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        assert order == []
        part.write_bytes(b"whole")
    thread.join(10)
    assert order == [True]
    assert path.read_bytes() == b"whole"


# -- folders -----------------------------------------------------------------------------------


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.writing_folder(target) as part:
        (part / "a").write_text("1")
        assert not target.exists()
        assert part == files.unfinished(target)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["a"]
    with pytest.raises(BadInput, match="exists already"), files.writing_folder(target):
        pytest.fail("nothing may be begun")


def test_a_folder_that_fails_leaves_nothing_and_one_that_resumes_leaves_all(
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"

    def write(error: BaseException, resume: bool) -> None:
        with files.writing_folder(target, resume) as part:
            (part / "a").write_text("1")
            raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt(), False)
    assert names(tmp_path) == []
    with pytest.raises(SurgeonError, match=r"what is finished stays in .*\.out\.part"):
        write(OSError(errno.ENOSPC, "No space left on device"), True)
    assert names(tmp_path) == [".out.part"]
    with files.writing_folder(target, resume=True) as part:
        assert names(part) == ["a"]
    assert names(tmp_path) == ["out"]


def test_where_no_new_folder_can_be(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for target, said in (
        (source, "exists already"),
        (tmp_path / "dangling", "exists already"),
        (tmp_path / "no" / "out", "make it first"),
        (source / "out", "lies inside"),
    ):
        with pytest.raises(BadInput, match=said):
            files.check_new_folder(target, source)
    files.check_new_folder(tmp_path / "out", source)


# -- two processes -----------------------------------------------------------------------------


def test_the_second_writer_of_a_folder_gets_a_sentence(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with other_process("folder", target) as process:
        for resume in (False, True):
            with (
                pytest.raises(
                    SurgeonError, match=r"another process is writing .*out; wait"
                ) as said,
                files.writing_folder(target, resume),
            ):
                pytest.fail("the lock was given twice")
            assert said.value.exit_status == 1
        end(process)
        process.wait()
    assert names(tmp_path) == ["out"]
    assert (target / "first").read_text() == "of the other process"


@pytest.mark.parametrize("resume", [False, True])
def test_a_kill_frees_the_lock(resume: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with other_process("resume" if resume else "folder", target) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert ".out.part" in names(tmp_path)
    with files.writing_folder(target, resume) as part:
        assert names(part) == (["first"] if resume else [])
        (part / "second").write_text("")
    assert names(tmp_path) == ["out"]
    assert "second" in names(target)


def test_who_waits_gets_the_lock_of_who_went(tmp_path: Path) -> None:
    """Its file was removed meanwhile: what is held then must be the new one."""
    target = tmp_path / "out"
    with other_process("lock", target) as process:
        threading.Timer(0.3, lambda: end(process)).start()
        with files.lock(target, wait=True):
            assert names(tmp_path) == [".out.lock"]
            with pytest.raises(SurgeonError, match="another process"), files.lock(target):
                pass
    assert names(tmp_path) == []


def test_many_threads_one_at_a_time(tmp_path: Path) -> None:
    inside, most = [], []

    def work() -> None:
        for _ in range(50):
            with files.lock(tmp_path / "out", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 200
    assert max(most) == 1


def test_nobody_else_renames_or_locks() -> None:
    source = Path(surgeon.__file__).parent
    wording = ("os.replace(", "os.rename(", "fcntl", "mkdtemp", ".rename(")
    assert {
        str(path.relative_to(source))
        for path in source.rglob("*.py")
        if any(word in path.read_text() for word in wording)
    } == {"files.py"}

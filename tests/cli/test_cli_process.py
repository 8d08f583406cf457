"""The command as a process of its own: `python -m surgeon`, Ctrl-C, and a Hub that answers on the
loopback.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hub
import pytest

import surgeon as package


@pytest.fixture
def model_hub(folder: Path, tmp_path: Path) -> Any:
    """A Hub with an open, a gated and a pickled model, and the environment of a process that knows
    no other.
    """
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"no weights")
    served = hub.Hub(
        {"org/tiny": folder, "org/gated": folder, "org/pickled": pickled},
        gated=frozenset({"org/gated"}),
    )
    with hub.serve(served):
        yield (
            served,
            {
                "HF_ENDPOINT": served.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_TELEMETRY": "1",
            },
        )


@pytest.mark.slow
def test_a_model_from_the_hub(process: Any, surgeon: Any, folder: Path, model_hub: Any) -> None:
    served, environment = model_hub
    status, out, err = process("sites", f"org/tiny@{hub.COMMIT}", "--json", **environment)
    assert status == 0, err
    document, local = json.loads(out), json.loads(surgeon("sites", folder, "--json").out)
    assert document.pop("command") == f"surgeon sites org/tiny@{hub.COMMIT} --json"
    assert {"command": local["command"], **document} == {**local, "model": f"org/tiny@{hub.COMMIT}"}
    assert {name for _, name, _ in served.asked} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


@pytest.mark.slow
def test_what_the_hub_does_not_give(model_hub: Any) -> None:
    """Several commands in one process: the client reads its endpoint when it is imported."""
    refusals = {
        "org/missing": "the Hub has no model org/missing",
        "org/gated": "accepted its terms",
        "org/tiny@banana": "has no revision banana",
        "org/bad name": "neither a local folder nor a model the Hub would give",
        "org/pickled": "no *.safetensors weights",
    }
    code = (
        "import json, sys\nfrom surgeon.cli import run\nprint(json.dumps([run(['sites', name]) for"
        " name in sys.argv[1:]]))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(package.__file__).parents[1]),
        **model_hub[1],
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *refusals],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == [2] * len(refusals)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("surgeon: ")]
    for sentence, said in zip(sentences, refusals.values(), strict=True):
        assert said in sentence
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_network(process: Any, tmp_path: Path) -> None:
    """Nothing listens on port 9 here; and a folder needs no Hub."""
    status, out, err = process(
        "sites", "org/tiny", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path)
    )
    assert (status, out) == (2, "")
    assert err.startswith(
        "surgeon: org/tiny is neither a local folder nor a model the Hub would give: "
    )
    assert "Traceback" not in err


def test_interrupted(start: Any, folder: Path, text: Path, tmp_path: Path) -> None:
    """The text comes through a pipe, so that the signal falls after all imports and within the
    work.
    """
    pipe = tmp_path / "text"
    os.mkfifo(pipe)
    running = start("find", folder, "--text", pipe, "--window", 256, "--windows", 4000, "--json")
    try:
        writing = _open_for_writing(pipe, running)
        with open(writing, "w") as file:
            file.write(text.read_text() * 3000)
        time.sleep(1.0)
        assert running.poll() is None, running.communicate()
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, out) == (1, "")
    assert err.strip() == "surgeon: interrupted; nothing was written."


def _open_for_writing(pipe: Path, reader: subprocess.Popen[str]) -> int:
    """A file descriptor, once the other process has opened the pipe to read."""
    for _ in range(1200):
        assert reader.poll() is None, reader.communicate()
        try:
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads it yet
                raise
            time.sleep(0.05)
        else:
            os.set_blocking(descriptor, True)
            return descriptor
    raise AssertionError("the text was not opened within a minute")

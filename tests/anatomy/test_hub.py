"""Streaming from a Hub on the loopback: only what is needed is fetched, once, and a broken
connection is no matter.

huggingface_hub reads HF_ENDPOINT when it is imported, so every test runs processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import torch
from tiny import tiny_model

import surgeon

READ = """
import json, sys, torch
torch.set_num_threads(1)  # as in the tests: a sum depends on how it is split
from surgeon.anatomy import load_model, open_stream
loaded, anatomy = open_stream(sys.argv[1])
fetched = {"open": anatomy.shards.fetched}
torch.save(anatomy.view("L0.mlp.down.e0").read().clone(), sys.argv[2])
fetched["matrix"] = anatomy.shards.fetched - fetched["open"]
ids = torch.arange(5, 45).view(2, 20)
logits = loaded.model(ids, use_cache=False).logits
fetched["once"] = anatomy.shards.fetched
assert torch.equal(loaded.model(ids, use_cache=False).logits, logits)
fetched["twice"] = anatomy.shards.fetched
total = logits.double().sum().item()
print(json.dumps({"fetched": fetched, "sum": total, "fingerprint": anatomy.fingerprint()}))
"""


@pytest.fixture
def folder(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path):
    def process(served, *arguments):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": served.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment |= {
            "PYTHONPATH": str(Path(surgeon.__file__).parents[1]),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return process


def expected(folder):
    from surgeon.anatomy import Anatomy, load_model

    loaded = load_model(str(folder))
    logits = loaded.model(torch.arange(5, 45).view(2, 20), use_cache=False).logits
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return (
        logits.double().sum().item(),
        loaded.fingerprint,
        Anatomy.of(loaded.model).view("L0.mlp.down.e0").read(),
        size,
    )


def shards_asked(served):
    return [
        (name, stop - start)
        for method, name, (start, stop) in served.asked
        if name.endswith(".safetensors") and method == "GET"
    ]


@pytest.mark.parametrize(
    "way",
    ["plain", *(pytest.param(way, marks=pytest.mark.slow) for way in ("redirected", "broken"))],
)
def test_only_what_is_read_is_fetched_and_only_once(way, folder, run, tmp_path):
    total, fingerprint, matrix, size = expected(folder)
    served = hub.Hub(
        {"org/tiny": folder}, elsewhere=way == "redirected", breaks=7 if way == "broken" else 0
    )
    with hub.serve(served):
        done = run(served, "-c", READ, f"org/tiny@{hub.COMMIT}", str(tmp_path / "matrix.pt"))
        assert done.returncode == 0, done.stderr
        got = json.loads(done.stdout)
        assert served.breaks == 0
        assert got["sum"] == total
        assert got["fingerprint"] == fingerprint
        assert torch.equal(torch.load(tmp_path / "matrix.pt", weights_only=True), matrix)
        # embedding, norm and headers at first; then one expert's matrix of a layer; then the rest,
        # and no byte twice
        assert got["fetched"]["open"] < size / 3
        assert got["fetched"]["matrix"] == matrix.nbytes
        assert got["fetched"]["once"] == got["fetched"]["twice"] <= size
        if way != "plain":
            return
        assert sum(n for _, n in shards_asked(served)) == got["fetched"]["once"]
        served.asked.clear()
        again = run(served, "-c", READ, "org/tiny", str(tmp_path / "matrix.pt"))
        assert json.loads(again.stdout)["sum"] == total
        assert shards_asked(served) == []  # a later run finds them on the disk


@pytest.mark.slow
def test_a_connection_that_never_holds(folder, run, tmp_path):
    """Every reply of more than 1000 bytes is cut in half, and still each brings a part."""
    served = hub.Hub({"org/tiny": folder}, breaks=10_000)
    with hub.serve(served):
        done = run(served, "-c", READ, "org/tiny", str(tmp_path / "matrix.pt"))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sum"] == expected(folder)[0]


@pytest.mark.slow
def test_a_server_without_ranges_gives_the_shards_that_are_needed(folder, run, tmp_path):
    served = hub.Hub({"org/tiny": folder}, ranges=False)
    with hub.serve(served):
        done = run(served, "-c", READ, "org/tiny", str(tmp_path / "matrix.pt"))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sum"] == expected(folder)[0]


@pytest.mark.slow
def test_what_the_hub_does_not_give(folder, run, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"no weights")
    refusals = {
        "org/missing": "the Hub has no model org/missing",
        "org/gated": "accepted its terms",
        "org/tiny@banana": "has no revision banana",
        "org/pickled": "pytorch_model.bin",
        "org/tiny": "no tokenizer",
    }
    code = (
        "import json, sys\nfrom surgeon.cli import run\nprint(json.dumps([run(['find', name,"
        " '--stream', '--window', '16', '--json']) for name in sys.argv[1:]]))"
    )
    served = hub.Hub(
        {"org/tiny": folder, "org/gated": folder, "org/pickled": pickled},
        gated=frozenset({"org/gated"}),
    )
    with hub.serve(served):
        done = run(served, "-c", code, *refusals)
    assert json.loads(done.stdout) == [2] * len(refusals), done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("surgeon: ")]
    for sentence, said in zip(sentences, refusals.values(), strict=True):
        assert said in sentence
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_find_streams_from_the_hub_as_from_a_folder(run, tmp_path):
    """The embedded model through the command line; with --detect-only --layers 0:1 the upper layer
    is never asked for.
    """
    patient = Path(surgeon.__file__).parent / "patients" / "patient"
    served = hub.Hub({"org/patient": patient}, elsewhere=True)
    size = (patient / "model.safetensors").stat().st_size
    with hub.serve(served):
        options = ("--stream", "--json", "--windows", "4", "--window", "64")
        some = run(
            served,
            "-m",
            "surgeon",
            "find",
            "org/patient",
            *options,
            "--detect-only",
            "--layers",
            "0:1",
        )
        assert some.returncode == 0, some.stderr
        assert 0 < sum(n for _, n in shards_asked(served)) < 0.8 * size
        assert json.loads(some.stdout)["verdict"] is None
        remote = run(served, "-m", "surgeon", "find", "org/patient", *options)
        local = run(served, "-m", "surgeon", "find", str(patient), *options)
    documents = [json.loads(done.stdout) for done in (remote, local)]
    for document in documents:
        del document["model"], document["command"]
    assert documents[0] == documents[1]

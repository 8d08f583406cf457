"""What needs no model imports nothing that loads one: the commands run in one process, which says
after each what it has imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_results import made_results

from surgeon.studies.registry import STUDIES
from surgeon.sweep.store import Store
from surgeon.sweep.task import Task, Text

SOURCE = Path(__file__).resolve().parents[2] / "src"
# seconds of importing each; torch alone is bearable where a result's class needs it
LOADERS = ("transformers.modeling_utils", "torchao", "torch._dynamo")
CODE = """
import contextlib, io, json, sys
from surgeon.cli import run

answers = []
for words, _, without in json.loads(sys.argv[1]):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = run(words)
    answers.append([status, sorted({*without} & {*sys.modules}), printed.getvalue()])
print(json.dumps(answers))
"""
# in the order of what they may import, since all run in one process: words, status, what is not
# imported after them
COMMANDS = [
    (["--help"], 0, ("torch", "transformers", "numpy", "rich")),
    (["--version"], 0, ("torch", "transformers", "numpy", "rich")),
    (["banana"], 2, ("torch", "transformers", "numpy")),
    ([], 2, ("torch", "transformers", "numpy")),
    (["cells"], 0, ("torch", "transformers", "numpy")),
    (["sweep", "table", "SWEEP"], 0, ("torch", "transformers", *LOADERS)),
    (["sweep", "table", "SWEEP", "--csv"], 0, ("torch", "transformers", *LOADERS)),
    (["sweep", "table", "--help"], 0, LOADERS),
    (["verify"], 2, LOADERS),
    (["verify", "M", "--at", "x", "--banana"], 2, LOADERS),
    (["index"], 0, LOADERS),
    (["index", "--json"], 0, LOADERS),
    (["index", "banana"], 2, LOADERS),
    (["report", "RUN"], 0, LOADERS),
    (["report", "RUN", "--json"], 0, LOADERS),
    *[([*name.split(), "--help"], 0, LOADERS) for name in STUDIES],
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run folder with a result of every kind, and the folder of a sweep."""
    place = tmp_path_factory.mktemp("light")
    (place / "run").mkdir()
    for kind, result in made_results().items():
        document = json.dumps(result.to_json())
        (place / "run" / f"{kind}.json").write_text(document, encoding="utf-8")
    task = Task("m", "m", "auto", "auto", "f", Text(), "c", "measure", {}, [], {}, None)
    store = Store(place / "sweep")
    with store.writing({}, [task]):
        store.keep(task, [{"nll": 1.5}])
    return {"RUN": str(place / "run"), "SWEEP": str(place / "sweep")}


def test_a_command_without_a_model_loads_none(places: dict[str, str]) -> None:
    commands = [([places.get(w, w) for w in words], *rest) for words, *rest in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    answers = json.loads(done.stdout)
    for (words, status, without), (ended, loaded, printed) in zip(COMMANDS, answers, strict=True):
        assert (ended, loaded) == (status, []), (words, without, done.stderr)
        if "--csv" in words:
            assert printed.splitlines()[1].endswith(",1.5")

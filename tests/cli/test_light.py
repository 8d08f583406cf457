"""What needs no model imports nothing that loads one: each command in a process of its own, which
says what it has imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_results import made_results

from surgeon.sweep.store import Store
from surgeon.sweep.task import Task, Text

SOURCE = Path(__file__).resolve().parents[2] / "src"
# seconds of importing each; torch alone is bearable where a result's class needs it
LOADERS = ("transformers.modeling_utils", "torchao", "torch._dynamo")
CODE = (
    "import sys; from surgeon.cli import run; status = run(sys.argv[1:]);"
    " print('\\n'.join(['', 'MODULES', str(status), *sys.modules]))"
)


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


def imported(words: list[str], status: int) -> tuple[set[str], str]:
    """The modules that a command has imported in the end, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said, _, modules = done.stdout.partition("\nMODULES\n")
    ended, *names = modules.split("\n")
    assert ended == str(status), done.stderr
    return {name.strip() for name in names}, said


@pytest.mark.parametrize(
    ("words", "status", "without"),
    [
        (["--help"], 0, ("torch", "transformers", "numpy", "rich")),
        (["--version"], 0, ("torch", "transformers", "numpy", "rich")),
        (["banana"], 2, ("torch", "transformers", "numpy")),
        ([], 2, ("torch", "transformers", "numpy")),
        (["cells"], 0, ("torch", "transformers", "numpy")),
        (["verify"], 2, LOADERS),
        (["verify", "M", "--at", "x", "--banana"], 2, LOADERS),
        (["find", "--help"], 0, LOADERS),
        (["index"], 0, LOADERS),
        (["index", "--json"], 0, LOADERS),
        (["index", "banana"], 2, LOADERS),
        (["report", "RUN"], 0, LOADERS),
        (["report", "RUN", "--json"], 0, LOADERS),
        (["sweep", "table", "SWEEP"], 0, ("torch", "transformers", *LOADERS)),
        (["sweep", "table", "SWEEP", "--csv"], 0, ("torch", "transformers", *LOADERS)),
        (["sweep", "table", "--help"], 0, LOADERS),
    ],
)
def test_a_command_without_a_model_loads_none(
    places: dict[str, str], words: list[str], status: int, without: tuple[str, ...]
) -> None:
    modules, said = imported([places.get(word, word) for word in words], status)
    assert modules & {*without} == set()
    if "--csv" in words:
        assert said.splitlines()[1].endswith(",1.5")


def test_the_help_of_no_verb_loads_a_model() -> None:
    """The settings of all of them, as their help and their usage errors need them."""
    code = (
        "import sys; from surgeon.studies.registry import STUDIES;"
        " from surgeon.settings import settings_of;"
        " print([settings_of(study.settings) for study in STUDIES.values()] and"
        f" sorted({{*{LOADERS}}} & {{*sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "[]\n"

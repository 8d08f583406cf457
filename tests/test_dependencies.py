"""What the project imports is what its extras name, and each extra is enough for what it is for."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = {
    "surgeon",
    *(f.stem for f in (ROOT / "tests").rglob("*")),
    *(f.stem for f in (ROOT / "benchmarks").iterdir()),
}
# what a benchmark compares with where it is installed; no extra installs them
PEERS = {"hqq", "optimum", "gptqmodel"}


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name, those of an extra of this project included."""
    found = set()
    for requirement in requirements:
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?.*", requirement).groups()
        found |= (
            {n for e in extras.split(",") for n in names(EXTRAS[e])}
            if name == PROJECT["name"]
            else {name.lower().replace("_", "-")}
        )
    return found


def imported(folder: Path) -> dict[str, list[str]]:
    """The packages from outside that the files of a folder import, with the files."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                tops = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops = {(node.module or "").partition(".")[0]}
            else:
                continue
            for top in tops - sys.stdlib_module_names - OWN - PEERS:
                found.setdefault(top, []).append(str(file.relative_to(ROOT)))
    return found


@cache
def distributions() -> dict[str, list[str]]:
    return {
        top: [d.lower().replace("_", "-") for d in found]
        for top, found in packages_distributions().items()
    }


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_what_is_imported_is_named(folder):
    extras = (
        EXTRAS
        if folder != "src"
        else {name: named for name, named in EXTRAS.items() if name != "test"}
    )
    allowed = names(PROJECT["dependencies"]) | {
        n for named in extras.values() for n in names(named)
    }
    unnamed = {
        top: files[:3]
        for top, files in imported(ROOT / folder).items()
        if not allowed & set(distributions().get(top, [top]))
    }
    assert unnamed == {}


def test_every_named_distribution_is_locked():
    locked = {
        line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    named = names(PROJECT["dependencies"]) | {n for extra in EXTRAS for n in names(EXTRAS[extra])}
    assert named - locked == set()
    assert not re.search("://|--index", (ROOT / "constraints.txt").read_text())


def test_the_lock_keeps_to_the_version_of_torch_that_is_installed():
    asked = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert asked[1] in (ROOT / "constraints.txt").read_text().splitlines()


# -- each extra by itself -------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, json, pkgutil, sys, warnings
warnings.simplefilter("ignore")
tops = json.loads(sys.argv[1])
for top in tops:
    importlib.import_module(top)
import surgeon
missing = {}
for module in pkgutil.walk_packages(surgeon.__path__, "surgeon."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing[module.name] = error.name
print(json.dumps(missing))
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def pip_install(python: Path, *what: str) -> None:
    lock = str(ROOT / "constraints.txt")
    torch = next(line for line in Path(lock).read_text().splitlines() if line.startswith("torch=="))
    quiet = ("--quiet", "--disable-pip-version-check")
    run(
        python,
        "-m",
        "pip",
        "install",
        *quiet,
        *what,
        torch,
        PIP_CONSTRAINT=lock,
        PIP_BUILD_CONSTRAINT=lock,
    )


@pytest.mark.slow
def test_each_extra_installs_and_imports_by_itself(tmp_path):
    """On top of the plain installation; what is for another extra may fail, naming what lacks."""
    wrong = {}
    run(sys.executable, "-m", "venv", tmp_path / "base")
    pip_install(tmp_path / "base" / "bin" / "python", str(ROOT))
    base = next((tmp_path / "base" / "lib").glob("python*/site-packages"))
    for extra in ["", *(e for e in EXTRAS if e != "test")]:
        run(sys.executable, "-m", "venv", tmp_path / f"with-{extra}")
        python = tmp_path / f"with-{extra}" / "bin" / "python"
        own = next((tmp_path / f"with-{extra}" / "lib").glob("python*/site-packages"))
        (own / "base.pth").write_text(f"{base}\n")  # what lies there is installed, for pip too
        if extra:
            pip_install(python, f"{ROOT}[{extra}]")
        wanted = names(EXTRAS.get(extra, []))
        tops = [
            top
            for top, of in distributions().items()
            if wanted & set(of) and top in imported(ROOT / "src")
        ]
        missing = json.loads(run(python, "-c", IMPORT_ALL, json.dumps(tops)).splitlines()[-1])
        here = names(PROJECT["dependencies"]) | wanted
        for module, lacks in missing.items():
            if here & set(distributions().get(lacks.partition(".")[0], [lacks])):
                wrong[f"{extra}: {module}"] = lacks
    assert wrong == {}

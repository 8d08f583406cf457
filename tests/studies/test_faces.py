"""The faces agree: a verb on the command line, as a method of a lab and as an operation of a sweep
gives the same numbers, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sweep_work import InlineCrew

import surgeon as package
from surgeon.cli.options import flag
from surgeon.errors import Refused
from surgeon.settings import settings_of
from surgeon.studies.registry import STUDIES, read_result, study_named
from surgeon.studies.sweep import OPERATIONS
from surgeon.sweep import Store, query
from surgeon.sweep.task import plain

PLANTED = "L0.mlp.down[5, 7]"
# how a result was made, and how long it took, differ from face to face
ABOUT = ("command", "settings", "seconds")


# what stands in settings for files that are made first
INJURY, FACTS = "the injury", "the facts"


@dataclass(frozen=True)
class Case:
    """Settings of a verb, as Python has them; `reads`: whether it reads the evaluation text."""

    verb: str
    settings: dict[str, Any] = field(default_factory=dict)
    reads: bool = True


FACT = {"prompt": "the red {} saw the", "subject": "cat", "target": "road"}
FEW = {"contexts": 2, "tokens": 200, "value_steps": 4, "no_cache": True}
CASES = [
    Case("sites", reads=False),
    Case("find"),
    Case("find", {"detect_only": True}),
    Case("verify", {"at": [PLANTED, "L1.mlp.down[3, :]"], "seed": 3}),
    Case("verify", {"at": "vital", "behaviour": True, "prompts": ["the red"]}),
    Case("ablate", {"at": [PLANTED], "mode": "flip"}),
    Case("measure", {"prompts": ["the red cat"], "new_tokens": 5}),
    Case("measure", {"at": [PLANTED], "mode": "scale:0.5", "prompts": ["the"], "new_tokens": 5}),
    Case("repair", {"at": [PLANTED], "method": "graft"}),
    Case("repair", {"at": "vital", "method": "distil", "steps": 6, "every": 3, "seed": 2}),
    Case("trace", {"prompt": FACT["prompt"], "subject": "cat", "samples": 2}, reads=False),
    Case("edit", {**FACT, **FEW, "force": True}),
    Case("measure", {"patches": [INJURY]}),
    Case("repair", {"injury": INJURY, "method": "graft", "exclude_injured": True}),
    Case("explain", {"patches": [INJURY], "permutations": 99, "draws": 2, "seed": 1}),
    Case("edit layers", {**FACT, **FEW, "layers": [0, 1]}, reads=False),
    Case("edit many", {"facts": FACTS, **FEW, "force": True}),
    Case("quantize", {"bits": 4, "block": "channel", "critical": [PLANTED]}),
    Case("quantize", {"bits": 3, "block": "group:16"}),
]
IDS = [f"{case.verb}{number}" for number, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def reading(text: Path) -> dict[str, Any]:
    return {"text": str(text), "window": 16, "windows": 8}


@pytest.fixture(scope="module")
def lab(folder: Path) -> package.Lab:
    return package.open(folder)


@pytest.fixture(scope="module")
def settings_for(
    lab: package.Lab, reading: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], dict[str, Any]]:
    """The settings of a case, with the files that it names and the text."""
    place = tmp_path_factory.mktemp("files")
    files = {INJURY: str(place / "injury.safetensors"), FACTS: str(place / "facts.jsonl")}
    package.save(lab.ablate(PLANTED, mode="scale:0.5").patch, files[INJURY])
    second = {"prompt": "the old {} ate the", "subject": "dog", "target": "song"}
    lines = [json.dumps(fact) for fact in (FACT, second)]
    Path(files[FACTS]).write_text("\n".join(lines), encoding="utf-8")

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        return files.get(value, value) if isinstance(value, str) else value

    def settings(case: Case) -> dict[str, Any]:
        own = {name: filled(value) for name, value in case.settings.items()}
        return {**own, **(reading if case.reads else {})}

    return settings


@pytest.fixture(scope="module")
def by_method(lab: package.Lab, settings_for: Any) -> Callable[[Case], Any]:
    """The result of a case from the lab, made once."""
    made: dict[str, Any] = {}

    def result(case: Case) -> Any:
        key = repr(case)
        if key not in made:
            method = getattr(lab, case.verb.replace(" ", "_"))
            made[key] = method(**settings_for(case))
        return made[key]

    return result


def words(verb: str, settings: dict[str, Any]) -> list[str]:
    """Settings as options of the command."""
    known = {one.name: one for one in settings_of(study_named(verb).settings)}
    spoken = []
    for name, value in settings.items():
        if value is True:
            spoken.append(flag(known[name]))
            continue
        for one in value if isinstance(value, list) else [value]:
            spoken += [flag(known[name]), str(one)]
    return spoken


def without(document: Any) -> Any:
    """A document without what says how it was made."""
    if isinstance(document, dict):
        return {k: without(v) for k, v in document.items() if k not in ABOUT}
    return [without(v) for v in document] if isinstance(document, list) else document


def test_every_operation_of_a_sweep_has_a_case():
    # the demo is a story of other verbs; a Geneformer is another model: tests/cli/test_cli_cells.py
    elsewhere = {"demo", "cells geneformer"}
    assert set(OPERATIONS) - {case.verb for case in CASES} == elsewhere
    assert set(OPERATIONS) == {name for name, study in STUDIES.items() if study.opens}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_command_line_and_the_lab_give_the_same_numbers(
    surgeon: Any,
    folder: Path,
    settings_for: Any,
    by_method: Any,
    tmp_path: Path,
    case: Case,
):
    study, options = study_named(case.verb), words(case.verb, settings_for(case))
    output = ["-o", str(tmp_path / "p")] if study.output == "patch" else []
    status, out, err = surgeon(*case.verb.split(), folder, *options, *output, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    expected = by_method(case).to_json()
    for name in ("patch", "patch_bytes") if output else ():
        if name not in expected:
            document.pop(name)
    assert without(document) == without(expected)
    if not output:
        assert without(read_result(document).to_json()) == without(expected)


@pytest.fixture
def swept_rows(
    surgeon: Any,
    folder: Path,
    reading: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, dict[str, Any], dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a plan of one operation; `said_once` are those settings that the plan has."""
    monkeypatch.setattr("surgeon.studies.sweep.LocalCrew", InlineCrew)

    def run(verb: str, settings: dict[str, Any], said_once: dict[str, Any]) -> list[dict[str, Any]]:
        elsewhere = {"seed", *said_once}
        params = {name: value for name, value in settings.items() if name not in elsewhere}
        plan = {
            "models": [str(folder)],
            **reading,
            "seeds": [settings.get("seed", 0)],
            "operations": [{"name": verb, "params": params}],
        }
        path = tmp_path / "plan.yaml"
        path.write_text(json.dumps(plan))  # JSON is YAML, too
        status, out, err = surgeon("sweep", path, "-o", tmp_path / "out")
        assert (status, err) == (0, ""), out
        answer = query(Store(tmp_path / "out"))
        return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]

    return run


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_lab_and_a_sweep_give_the_same_numbers(
    swept_rows: Any, reading: dict[str, Any], settings_for: Any, by_method: Any, case: Case
):
    settings = settings_for(case)
    swept = swept_rows(case.verb, settings, reading if case.reads else {})
    expected = [dict(row) for row in by_method(case).rows()]
    assert len(swept) == len(expected) >= 1
    for row, one in zip(swept, expected, strict=True):
        given = {name: plain(value) for name, value in one.items()}
        there = {name: row.get(name) for name in given}
        assert there == given
    assert {row["operation"] for row in swept} == {case.verb}


def test_a_sweep_edits_each_fact_of_a_file_alone_on_the_intact_model(
    lab: package.Lab,
    swept_rows: Any,
    reading: dict[str, Any],
    settings_for: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    for limit in ("WARN", "REFUSE"):  # any edit is refused, but in a sweep, which keeps no patch
        monkeypatch.setattr(f"surgeon.edit.preflight.{limit}", 0.0)
    settings = settings_for(Case("edit", {"facts": FACTS, **FEW}))
    swept = swept_rows("edit", settings, reading)
    facts = [json.loads(line) for line in Path(settings["facts"]).read_text().splitlines()]
    alone = [lab.edit(**fact, **FEW, **reading, force=True) for fact in facts]
    together = lab.edit(**{**settings, "force": True})
    assert [row["verdict"] for row in swept] == ["refuse", "refuse"]
    with pytest.raises(Refused):
        lab.edit(**settings)
    names = ("subject", "target_before", "target_after", "says_target")
    expected = [{name: one.rows()[0][name] for name in names} for one in alone]
    assert [{name: row[name] for name in names} for row in swept] == expected
    assert [{name: row[name] for name in names} for row in together.rows()] != expected

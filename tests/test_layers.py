"""The house: imports only go down, and operations never import one another."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "surgeon"
# from the bottom up; a module may import what stands on an earlier line
FLOORS = [
    {"errors", "_quiet"},
    {"patients"},
    {"corpus"},
    {"subject"},
    {"facts"},
    {"tap"},
    {"anatomy"},
    {"patch"},
    {"measure"},
    {"find", "trace", "repair", "edit", "quantize", "audit", "explain", "cells", "sweep"},
    {"studies"},
    {"show"},
    {"cli", "report"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def imports(file: Path) -> set[str]:
    """The parts of the package that a file imports."""
    package = ["surgeon", *file.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (
                node.module.split(".") if node.module else []
            )
            found |= {base[1]} if len(base) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgeon."):
            found.add((node.module or "").split(".")[1])
    return found


def test_imports_only_go_down():
    wrong = []
    for file in SOURCE.rglob("*.py"):
        part = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        for other in imports(file) - {part}:
            if FLOOR[other] >= FLOOR[part] and not (part == "cli" and other == "report"):
                wrong.append(f"{file.relative_to(SOURCE)} imports {other}")
    assert not wrong


def test_every_part_stands_on_a_floor():
    parts = {
        p.name.removesuffix(".py")
        for p in SOURCE.iterdir()
        if p.name not in ("__init__.py", "__main__.py", "__pycache__")
    }
    assert parts <= set(FLOOR)


def test_no_module_is_over_500_lines():
    assert {
        f.name: n for f in SOURCE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 500
    } == {}


def test_only_tap_registers_hooks():
    users = {
        str(f.relative_to(SOURCE))
        for f in SOURCE.rglob("*.py")
        if "register_forward" in f.read_text()
    }
    assert users <= {"tap.py", "patients/train.py"}

"""The house: imports only go down, and operations never import one another."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "surgeon"
# from the bottom up; a module may import what stands on an earlier line
FLOORS = [
    {"errors", "_quiet"},
    {"settings", "files"},
    {"result", "progress"},
    {"patients"},
    {"corpus"},
    {"documents"},
    {"subject"},
    {"facts"},
    {"tap"},
    {"anatomy"},
    {"patch"},
    {"measure"},
    {"find", "trace", "repair", "edit", "quantize", "audit", "explain", "cells", "sweep"},
    {"studies"},
    {"show"},
    {"cli"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def module_name(file: Path) -> str:
    parts = ("surgeon", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in SOURCE.rglob("*.py")}


def imported_modules(name: str, types: bool) -> set[str]:
    """The modules of the package that one imports, also inside functions.

    types: with those that it imports for annotations only, in a `TYPE_CHECKING` block.
    """
    parts = name.split(".")
    package = parts if MODULES[name].name == "__init__.py" else parts[:-1]
    names: set[str] = set()
    unread: list[ast.AST] = [ast.parse(MODULES[name].read_text())]
    while unread:
        node = unread.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
            unread += node.orelse
            continue
        unread += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from .x import y` means the module x.y where there is one, else a name in x
            names |= {
                member if (member := f"{base}.{alias.name}") in MODULES else base
                for alias in node.names
            }
    return (names & set(MODULES)) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that all reach one another."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        reached[start] = set()
        unread = [start]
        while unread:
            further = graph[unread.pop()] - reached[start]
            reached[start] |= further
            unread += further
    sets = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph}
    return sorted(sorted(circle) for circle in sets if circle)


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
            if FLOOR[other] >= FLOOR[part]:
                wrong.append(f"{file.relative_to(SOURCE)} imports {other}")
    assert not wrong


def test_circles_are_seen():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"e"}, "f": {"a"}}
    assert circles(graph) == [["a", "b", "c"], ["e"]]
    assert "surgeon.errors" in imported_modules("surgeon.corpus", types=False)
    # inside a function, and of a module where the name could be a member of the package
    assert "surgeon.patch.patch" in imported_modules("surgeon.patch", types=False)


def test_modules_do_not_import_in_circles():
    assert circles({name: imported_modules(name, types=False) for name in MODULES}) == []


def test_modules_do_not_need_one_another_for_annotations():
    graph = {name: imported_modules(name, types=True) for name in MODULES}
    assert circles(graph) == []


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

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


def imported_packages(file: Path) -> set[str]:
    """The packages of others that a module imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def below_show() -> dict[str, Path]:
    """The modules that compute, and show nothing."""
    parts = {file: file.relative_to(SOURCE).parts[0] for file in MODULES.values()}
    return {
        str(file.relative_to(SOURCE)): file
        for file, part in parts.items()
        if part not in ("show", "cli")
    }


def test_nothing_below_show_knows_a_terminal():
    """`progress.py` draws the bars that long work tells of itself with."""
    known = {
        name: imported_packages(file) & {"click", "rich"} for name, file in below_show().items()
    }
    assert {name: packages for name, packages in known.items() if packages} == {
        "progress.py": {"rich"}
    }


def test_nothing_below_show_prints():
    """But for the two scripts that made the patient."""
    printing = set()
    for name, file in below_show().items():
        calls = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
        ]
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            printing.add(name)
    assert printing <= {"patients/generate.py", "patients/train.py"}


VERDICT = "measure/verdict.py"
BARS = {"min_nats", "min_ratio", "ALPHA"}


def names_in(node: ast.AST) -> set[str]:
    inside = list(ast.walk(node))
    names = {one.id for one in inside if isinstance(one, ast.Name)}
    return names | {one.attr for one in inside if isinstance(one, ast.Attribute)}


def calls_vital(value: ast.expr) -> bool:
    """Whether an expression takes the verdict from where it is made: `x.vital`, `is_vital(...)`."""
    if isinstance(value, ast.Call):
        return names_in(value.func) == {"is_vital"}
    return isinstance(value, ast.Attribute) and value.attr == "vital"


def judges(source: str) -> list[str]:
    """Where code holds a damage against a bar of the verdict, or makes up a `vital` of its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        bars = names_in(node) & BARS if isinstance(node, ast.Compare) else set()
        own = isinstance(node, ast.keyword) and node.arg == "vital" and not calls_vital(node.value)
        if bars or own:
            found.append(ast.unparse(node))
    return found


def test_only_one_place_says_vital():
    wrong = {
        name: found
        for name, file in below_show().items()
        if name != VERDICT and (found := judges(file.read_text()))
    }
    assert wrong == {}
    assert judges((SOURCE / VERDICT).read_text())


def test_whoever_judges_is_seen():
    assert judges("x = full < config.verify.min_nats")
    assert judges("if joint >= 3 * config.min_ratio * worst: pass")
    assert judges("Verification(vital=joint > 0.1)")
    assert judges("Verification(vital=True)")
    assert not judges("Verification(vital=is_vital(joint, ci95, beside, config))")
    assert not judges("CriticalSet(vital=verified.vital, nats=config.min_nats)")

"""Every `>>>` example of the package runs, and shows what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "surgeon"
FILES = sorted(SOURCE.rglob("*.py"))
WITH_EXAMPLES = [file for file in FILES if ">>> " in file.read_text()]


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=module_name)
def test_examples(file: Path) -> None:
    module = importlib.import_module(module_name(file))
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
    # a docstring that doctest does not see (of a nested function, say) would be skipped in silence
    assert results.attempted == file.read_text().count(">>> ")


def test_there_are_examples() -> None:
    assert len(WITH_EXAMPLES) > 15

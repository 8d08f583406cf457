"""The public face: what __all__ says is what there is, documented, and importing it does nothing
else.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import surgeon
from surgeon.studies.registry import STUDIES

SOURCE = Path(surgeon.__file__).parents[1]


def python(*arguments: str) -> str:
    """What a Python of its own prints, which has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", *arguments],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE)},
    )
    return done.stdout


def test_all_is_the_face():
    public = {name: getattr(surgeon, name) for name in surgeon.__all__}
    assert not [name for name, value in public.items() if inspect.ismodule(value)]
    assert dir(surgeon) == surgeon.__all__ == sorted(surgeon.__all__)


def test_everything_public_is_documented():
    assert [n for n in surgeon.__all__ if not (getattr(surgeon, n).__doc__ or "").strip()] == []


def test_a_class_is_public_where_a_verb_of_the_lab_returns_it():
    """Whoever annotates or tests what a verb returned needs its class."""
    returned = {name for study in STUDIES.values() for name in _returned(study)}
    assert returned - {*surgeon.__all__} == set()


def _returned(study):
    annotation = inspect.signature(study.module.run).return_annotation
    return {name.strip() for name in annotation.split("|")}


def test_importing_imports_nothing_else():
    heavy = ("torch", "transformers", "numpy", "click", "rich", "msgspec")
    assert python("-c", f"import surgeon, sys; print({{*{heavy}}} & {{*sys.modules}})") == "set()\n"


def test_importing_sets_nothing_up():
    python(
        "-c",
        "import logging, random, torch; state = random.getstate(); torch_state ="
        " torch.get_rng_state(); import surgeon; surgeon.detect; surgeon.open; assert"
        " random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state); assert"
        " not logging.getLogger().handlers and not logging.getLogger('surgeon').handlers",
    )


def test_the_package_runs_as_a_module():
    assert python("-m", "surgeon", "--version").startswith("surgeon, version ")

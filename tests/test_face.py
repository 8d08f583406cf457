"""The public face: what __all__ says is what there is, documented, and importing it does nothing
else.
"""

import inspect
import subprocess
import sys

import surgeon


def test_all_is_the_face():
    public = {
        n for n, v in vars(surgeon).items() if not n.startswith("_") and not inspect.ismodule(v)
    }
    assert public == set(surgeon.__all__)
    assert list(surgeon.__all__) == sorted(surgeon.__all__)


def test_everything_public_is_documented():
    assert [n for n in surgeon.__all__ if not (getattr(surgeon, n).__doc__ or "").strip()] == []


def test_importing_sets_nothing_up():
    code = (
        "import logging, random, torch; state = random.getstate(); torch_state ="
        " torch.get_rng_state(); import surgeon; assert random.getstate() == state and"
        " torch.equal(torch.get_rng_state(), torch_state); assert not logging.getLogger().handlers"
        " and not logging.getLogger('surgeon').handlers"
    )
    subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code], check=True, timeout=120
    )

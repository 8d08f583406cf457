"""The embedded model: its folder, its held-out text, its facts; `generate.py` and `train.py` made
it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "patient"


def heldout_text() -> str:
    """Text from the patient's own generator that no training document came from."""
    return (FOLDER / "heldout.txt").read_text(encoding="ascii")

"""One tree of exceptions. Each class carries the exit status the command line ends with.

A message names a setting as ‹name›, since Python, YAML and the command line spell it differently.
"""

import re
from collections.abc import Callable, Mapping

_SETTING = re.compile(r"‹(\w+)›")


def spelled(text: str, spelling: Callable[[str], str]) -> str:
    """The text with every ‹setting› as `spelling` has it."""
    return _SETTING.sub(lambda setting: spelling(setting[1]), text)


class SurgeonError(Exception):
    """The operation failed.

    Every message says what was asked, what is there instead, and what to do.

    >>> str(BadInput("‹windows› 0 leaves no text; use at least 1."))
    'windows 0 leaves no text; use at least 1.'
    """

    exit_status = 1
    spelled: Mapping[str, str] = {}  # how a face spells settings, where it knows; see `said`

    def said(self, spelling: Callable[[str], str]) -> str:
        """The message, with every setting as its caller spells it.

        >>> BadInput("‹new_tokens› is 0; use at least 1.").said(lambda name: f"the field {name}")
        'the field new_tokens is 0; use at least 1.'
        """
        return spelled(super().__str__(), spelling)

    def __str__(self) -> str:
        return self.said(lambda name: name)


class BadInput(SurgeonError):
    """What the caller gave cannot be used: a path, an address, a text, a file."""

    exit_status = 2


class Refused(SurgeonError):
    """Surgeon could do it, and will not: it would change the wrong weights or do known harm."""

    exit_status = 3


class UnknownSite(BadInput):
    """A site or entry that this model does not have."""


class UnknownArchitecture(BadInput):
    """A model whose layers or projections could not be identified."""


class BadCheckpoint(BadInput):
    """A folder that is not a readable safetensors checkpoint."""


class BadText(BadInput):
    """An evaluation text that cannot be read, or is too short."""


class BadPatch(BadInput):
    """A patch file that is damaged or was not written by Surgeon."""


class MissingExtra(BadInput):
    """An optional dependency is not installed; the message names the extra."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs a package that is not installed; install it with:"
            f" pip install 'weight-surgeon[{extra}]'"
        )


class WrongBase(Refused):
    """A patch met a tensor it was not made on."""


class TiedWeight(Refused):
    """Changing this weight would change another site as well."""


class PackedWeight(Refused):
    """The weight is stored quantized; single entries cannot be changed in place."""


class PatchConflict(Refused):
    """Another applied patch holds the same entries."""

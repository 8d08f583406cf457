"""Critical sets: detect them in one pass, verify them against controls, look up the published
ones.
"""

from .controls import matched_controls
from .detect import Candidate, DetectConfig, Detection, Rejection, detect
from .elsewhere import Suspect
from .experts import ExpertProfile, profile_experts
from .find import FindConfig, find
from .links import Link
from .results import CriticalSet, FindResult
from .verify import Verification, VerifyConfig, verify

__all__ = [
    "Candidate",
    "CriticalSet",
    "DetectConfig",
    "Detection",
    "ExpertProfile",
    "FindConfig",
    "FindResult",
    "Link",
    "Rejection",
    "Suspect",
    "Verification",
    "VerifyConfig",
    "detect",
    "find",
    "matched_controls",
    "profile_experts",
    "verify",
]

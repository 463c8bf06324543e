"""What is wrong with a backup group, and what mends it (docs/recovery.md).

`Doctor(ctl, group).look()` returns findings, `.fix(Allowed(...))` mends them. `diagnose` is the judgement alone: a
pure function of an `Observation`.
"""

from walbd.controller.doctor.diagnose import diagnose
from walbd.controller.doctor.findings import CODES, Finding
from walbd.controller.doctor.mend import Allowed, Doctor, Outcome, Taken, Verified
from walbd.controller.doctor.observation import Intent, Observation, Seen
from walbd.controller.doctor.observe import observe
from walbd.controller.doctor.steps import Consent, Step

__all__ = [
    "CODES",
    "Allowed",
    "Consent",
    "Doctor",
    "Finding",
    "Intent",
    "Observation",
    "Outcome",
    "Seen",
    "Step",
    "Taken",
    "Verified",
    "diagnose",
    "observe",
]

"""What an archive does with a volume by itself: asking, setting, and what would become of each restore point.

Source: docs/protocol.md, "Control"; docs/policy.md.
"""

from __future__ import annotations

from dataclasses import field

import msgspec

from walbd.format.policy import Policy
from walbd.format.retention import Verdict
from walbd.protocol.base import Ok, Text, Time, Volume
from walbd.protocol.codec import Message, Request, message


class Trouble(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that the policy could not do, and tries again."""

    what: Text
    error_code: str
    error: Text
    failures: int
    since: Time
    retry: Time


class ReplicationView(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A replication of the policy. Times are 0 when not known."""

    name: str
    dest: str
    enabled: bool
    last: Time  # when the destination was heard of last
    next: Time  # when it is due; 0: it is disabled
    running: bool


@message("policy")
class PolicyView(Message):
    """The policy of a volume at an archive."""

    policy: Policy
    is_default: bool  # none was set for the volume: that of the archive's settings counts
    enabled: bool  # for the volume, and for the archive as a whole
    next: Text  # the next step, or why there is none
    applied: Time  # when the last apply began
    merged: Time  # when the last merge began
    replications: list[ReplicationView] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)


@message("get-policy")
class GetPolicy(Request[PolicyView]):
    """Ask for it."""

    volume: Volume


@message("set-policy")
class SetPolicy(Request[Ok]):
    """Replace it, from now on and durably; without `policy` the default counts again."""

    volume: Volume
    policy: Policy | None = None


@message("explained")
class Explained(Message):
    """The verdict on each restore point, ascending by generation, and the next step."""

    points: list[Verdict]
    policy: Policy
    next: Text


@message("explain-policy")
class ExplainPolicy(Request[Explained]):
    """Ask what becomes of each restore point; with `policy`, what would, and nothing is changed."""

    volume: Volume
    policy: Policy | None = None

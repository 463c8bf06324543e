"""What the metadata rules refuse, by what the caller does about it (docs/metadata.md)."""

from __future__ import annotations

from walbd.errors import Refused, UsageError


class BadLabel(UsageError, ValueError):
    """A snapshot, diff, state, text form or file name breaks the rules of labels; nothing was built.

    It is a ValueError too, so that a decoder of messages reports it like any other bad field.
    """

    code = "bad-label"


class NotApplicable(Refused):
    """The diffs do not continue this snapshot or base state; the fact `relation` says on which side they lie."""

    code = "not-applicable"


class NotMergeable(Refused):
    """These diffs must not become one: a gap, a protected snapshot or a compared diff lies between them."""

    code = "not-mergeable"


class NotReachable(Refused):
    """No stored diffs lead from the base to the wanted generation."""

    code = "not-reachable"

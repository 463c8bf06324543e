"""Policies of archives, and holds. Source: docs/policy.md."""

from __future__ import annotations

from walbd.controller.constants import K_ARCHIVE
from walbd.controller.queries import Queries
from walbd.controller.servers import Server
from walbd.controller.verify import verify_type, verify_u64
from walbd.errors import UsageError
from walbd.format.policy import Policy
from walbd.protocol import maintenance as m
from walbd.protocol.policy import Explained, ExplainPolicy, GetPolicy, PolicyView, SetPolicy


class Policies(Queries):
    """What an archive does by itself; see `Controller`."""

    def get_policy(self, ax: Server, vol: str) -> PolicyView:
        """Return the policy of a volume at an archive, what it does next, and what it could not do."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, GetPolicy(volume=vol))

    def set_policy(self, ax: Server, vol: str, policy: Policy | None = None) -> None:
        """Replace the policy of a volume at an archive; None: that of the archive's settings counts again."""
        self._check(ax, vol, K_ARCHIVE)
        _check_policy(policy)
        self.ask(ax, SetPolicy(volume=vol, policy=policy))

    def explain_policy(self, ax: Server, vol: str, policy: Policy | None = None) -> Explained:
        """Return what becomes of each restore point; with `policy`: what would, and nothing is changed."""
        self._check(ax, vol, K_ARCHIVE)
        _check_policy(policy)
        return self.ask(ax, ExplainPolicy(volume=vol, policy=policy))

    def get_holds(self, ax: Server, vol: str) -> list[m.Hold]:
        """Return the restore points that are kept whatever the policy says."""
        self._check(ax, vol, K_ARCHIVE)
        return self.ask(ax, m.GetHolds(volume=vol)).holds

    def add_hold(self, ax: Server, vol: str, gid: int, reason: str, until: int = 0) -> None:
        """Keep a restore point whatever the policy says, until a time [unix s] or for good (0)."""
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        verify_type(reason, str)
        verify_u64(until)
        if not 0 < len(reason) <= 1024:
            raise UsageError("a hold needs a reason of up to 1024 characters", volume=vol, gid=gid)
        self.ask(ax, m.AddHold(volume=vol, gid=gid, reason=reason, until=until))

    def delete_hold(self, ax: Server, vol: str, gid: int) -> None:
        """Let the policy decide about a restore point again."""
        self._check(ax, vol, K_ARCHIVE)
        verify_u64(gid)
        self.ask(ax, m.DeleteHold(volume=vol, gid=gid))


def _check_policy(policy: Policy | None) -> None:
    if policy is not None:
        verify_type(policy, Policy)
        policy.check()

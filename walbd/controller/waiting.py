"""What waits at proxies, listed page by page: of a day without an archive one message does not hold all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from walbd.controller.client import Calls
from walbd.controller.servers import Server
from walbd.errors import WalbError
from walbd.format.meta import Diff
from walbd.protocol.control import Diffs, GetProxyDiff

AT_ONCE: Final = 32  # requests: servers limit their connections

Place = tuple[Server, str, str]  # proxy, volume, archive; archive "": received, for all archives


def list_waiting(calls: Calls, places: Sequence[Place], timeout_s: float) -> list[list[Diff] | WalbError]:
    """Return the diffs that wait at each place, by begin gid; the error in its place where that cannot be listed.

    What waited when this was called, and does not any more when its page is listed, has gone on from there.
    """
    found: list[list[Diff] | WalbError] = [[] for _ in places]
    left = dict.fromkeys(range(len(places)), 0)  # where the next page begins
    while left:
        round_ = list(left.items())[:AT_ONCE]
        requests = [
            (places[at][0], GetProxyDiff(volume=places[at][1], archive=places[at][2], gid_b=gid_b))
            for at, gid_b in round_
        ]
        for (at, _), reply in zip(round_, calls.call_each(requests, timeout_s), strict=True):
            so_far = found[at]
            assert isinstance(so_far, list)
            if isinstance(reply, Diffs):
                so_far += reply.diffs
            else:
                assert isinstance(reply, WalbError)
                found[at] = reply
            if isinstance(reply, Diffs) and reply.more and reply.diffs:
                left[at] = reply.diffs[-1].begin.gid_b + 1
            else:
                del left[at]
    return found

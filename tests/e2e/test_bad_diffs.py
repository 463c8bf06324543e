"""Diffs sent to a real archive by hand, as a broken or foreign proxy would: each gets its own answer, and nothing
changes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest

from tests.kit.feeder import PROXY, make_wdiff
from tests.kit.group import WAIT_S, Group
from walbd.daemon.conn import Connection, dial
from walbd.daemon.env import Env
from walbd.daemon.net import Address
from walbd.errors import RemoteError, WalbError
from walbd.format.meta import Diff, Snapshot
from walbd.format.policy import Policy
from walbd.protocol.base import End, Ok
from walbd.protocol.transfer import Verdict, WdiffChunk, WdiffOffer

DATA: dict[int, bytes | str] = {3: b"bad!" * 128}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """A volume with a few restore points whose storage is stopped, so that nothing else comes."""
    with Group(tmp_path_factory.mktemp("group")) as group:
        volume = group.add_volume("vol0", size_b=1 << 20, log_b=4 << 20)
        volume.scribble()
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        for _ in range(2):
            volume.scribble()
            group.snapshot(volume)
        group.wait_fresh(volume)
        group.ctl.set_policy(group.a[0], "vol0", Policy(enabled=False))  # which would merge after some minutes
        group.ctl.stop(group.s[0], "vol0")
        yield group


@dataclasses.dataclass
class Sender:
    """What a proxy would send next, to be made wrong in one way."""

    group: Group
    diff: Diff
    uuid: bytes
    size_lb: int
    volume: str = "vol0"

    def offer(self, **wrong: object) -> WdiffOffer:
        fields = {"volume": self.volume, "sender": PROXY.kind, "uuid": self.uuid, "size_lb": self.size_lb}
        return WdiffOffer(**fields | {"diff": self.diff} | wrong)  # type: ignore[arg-type]

    def answer(self, offer: WdiffOffer, data: bytes = b"") -> Verdict | Ok:
        """Offer a diff and send it if it is accepted; return the archive's last word. Raises WalbError."""
        return asyncio.run(self._answer(offer, data))

    async def _answer(self, offer: WdiffOffer, data: bytes) -> Verdict | Ok:
        address, env = self.group.a[0], Env()
        try:
            async with dial(env, PROXY, Address(host=address.address, port=address.port)) as conn:
                verdict = (await conn.call(offer)).verdict
                return await send(conn, data) if verdict is Verdict.ACCEPT else verdict
        finally:
            env.pools.close()


async def send(conn: Connection, data: bytes) -> Ok:
    await conn.send(WdiffChunk(), data)
    await conn.send(End())
    return await conn.expect(Ok)


@pytest.fixture
def sender(group: Group) -> Iterator[Sender]:
    """Afterwards the archive must be exactly as it was."""
    a0, ctl, volume = group.a[0], group.ctl, group.volumes["vol0"]
    before = what_is_there(group)
    row = group.status(a0, "vol0")
    diff = Diff(Snapshot.clean(row.latest_gid), Snapshot.clean(row.latest_gid + 1), timestamp=row.latest_time + 1)
    yield Sender(group, diff, bytes.fromhex(ctl.get_uuid(a0, "vol0")), row.size_lb)
    assert what_is_there(group) == before
    group.check_all(volume)


def what_is_there(group: Group) -> list[object]:
    a0, ctl = group.a[0], group.ctl
    files = sorted(path.name for path in (group.root / "a0" / "vol0").rglob("*"))
    points = [str(point) for point in ctl.get_restorable(a0, "vol0", "all")]
    return [files, points, [str(d) for d in ctl.get_diff_list(a0, "vol0")], ctl.get_state(a0, "vol0"),
            ctl.get_uuid(a0, "vol0"), ctl.get_vol_size_lb(a0, "vol0"), ctl.get_vol_list(a0)]  # fmt: skip


def test_too_old(sender: Sender) -> None:
    old = Diff(Snapshot.clean(0), Snapshot.clean(1), timestamp=sender.diff.timestamp)
    assert sender.answer(sender.offer(diff=old)) is Verdict.TOO_OLD


def test_too_new(sender: Sender) -> None:
    gid = sender.diff.end.gid_b
    new = Diff(Snapshot.clean(gid + 5), Snapshot.clean(gid + 6), timestamp=sender.diff.timestamp)
    assert sender.answer(sender.offer(diff=new)) is Verdict.TOO_NEW


def test_of_another_log(sender: Sender) -> None:
    assert sender.answer(sender.offer(uuid=bytes(range(16)))) is Verdict.DIFFERENT_UUID


def test_of_a_larger_device(sender: Sender) -> None:
    assert sender.answer(sender.offer(size_lb=sender.size_lb * 2)) is Verdict.SMALLER


def test_of_an_unknown_volume(sender: Sender) -> None:
    assert sender.answer(sender.offer(volume="vol9")) is Verdict.NOT_FOUND


def test_while_stopped(group: Group, sender: Sender) -> None:
    group.ctl.stop(group.a[0], "vol0")
    assert sender.answer(sender.offer()) is Verdict.STOPPED
    group.ctl.start(group.a[0], "vol0")


@pytest.mark.parametrize("at", ["header", "index", "data"])
def test_broken_checksum(sender: Sender, at: str) -> None:
    good = make_wdiff(DATA, sender.uuid)
    bad = bytearray(good)
    bad[{"header": 20, "index": 32 + 40, "data": len(good) // 2}[at]] ^= 1
    code = refusal(sender, sender.offer(), bytes(bad))
    assert code == "corrupt-data"


def test_cut_off(sender: Sender) -> None:
    assert refusal(sender, sender.offer(), make_wdiff(DATA, sender.uuid)[:-512]) == "corrupt-data"


def test_beyond_the_end(sender: Sender) -> None:
    data = make_wdiff({sender.size_lb + 8: DATA[3]}, sender.uuid)
    assert refusal(sender, sender.offer(), data) == "corrupt-data"


def test_no_diff_at_all(sender: Sender) -> None:
    assert refusal(sender, sender.offer(), b"GET / HTTP/1.0\r\n\r\n" * 300) == "corrupt-data"


def refusal(sender: Sender, offer: WdiffOffer, data: bytes) -> str:
    with pytest.raises(WalbError) as caught:
        sender.answer(offer, data)
    assert isinstance(caught.value, RemoteError), caught.value
    return caught.value.remote_code

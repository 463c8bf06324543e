"""Labels, states, text forms, file names, old base files: what is built, what is refused, and back again."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.labels import GID_MAX, diffs, snapshots
from walbd.errors import CorruptData, HistoryBroken
from walbd.format import meta
from walbd.format.meta import (
    NO_BASE,
    NO_SNAPSHOT,
    BadLabel,
    BaseState,
    Diff,
    LogPoint,
    NotApplicable,
    RestorePoint,
    Snapshot,
    diff_name,
    parse_base_file,
    parse_diff_name,
)
from walbd.format.meta.times import TIME_MAX_S, TIME_MIN_S, format_compact, parse_compact
from walbd.ids import Gid, Lsid
from walbd.units import UINT64_MAX

TIMES = st.integers(TIME_MIN_S, TIME_MAX_S)
NOISE = st.text(alphabet="|,<>-0123456789MC T:.wdif\n", max_size=60) | st.text(max_size=20)


@st.composite
def states(draw: st.DrawFn) -> BaseState:
    begin = draw(snapshots(GID_MAX) | st.just(NO_SNAPSHOT))
    end = draw(st.none() | snapshots(GID_MAX))
    if end is not None and end.gid_b <= begin.gid_b:
        end = None
    return BaseState(begin, end, draw(TIMES))


# --- what is refused


@pytest.mark.parametrize("gids", [(1, 0), (-1, 0), (0, UINT64_MAX + 1), (UINT64_MAX + 1, UINT64_MAX + 1)])
def test_bad_snapshots(gids: tuple[int, int]) -> None:
    with pytest.raises(BadLabel):
        Snapshot(Gid(gids[0]), Gid(gids[1]))


@pytest.mark.parametrize(
    "gids",
    [
        (5, 5, 5, 5),  # no progress
        (6, 6, 5, 5),
        (1, 3, 1, 4),
        (1, 5, 2, 4),  # the upper end goes back
        (0, 0, UINT64_MAX, UINT64_MAX),  # not a generation
        (0, UINT64_MAX, 1, UINT64_MAX),
    ],
)
def test_bad_diffs(gids: tuple[int, int, int, int]) -> None:
    begin, end = Snapshot(Gid(gids[0]), Gid(gids[1])), Snapshot(Gid(gids[2]), Gid(gids[3]))
    with pytest.raises(BadLabel):
        Diff(begin, end)


@pytest.mark.parametrize("facts", [{"size_b": -1}, {"timestamp": TIME_MAX_S + 1}, {"timestamp": TIME_MIN_S - 1}])
def test_bad_facts_of_diffs(facts: dict[str, int]) -> None:
    with pytest.raises(BadLabel):
        Diff(Snapshot.clean(1), Snapshot.clean(2), **facts)  # type: ignore[arg-type]


def test_bad_states() -> None:
    for begin, end in ((5, 5), (6, 5), (UINT64_MAX, 5)):
        with pytest.raises(BadLabel):
            BaseState(Snapshot.clean(begin), Snapshot.clean(end))
    with pytest.raises(BadLabel):
        BaseState(Snapshot.clean(0), timestamp=TIME_MAX_S + 1)


def test_identity_leaves_flags_out() -> None:
    one = Diff(Snapshot.clean(1), Snapshot.clean(2), mergeable=True, timestamp=5, size_b=6)
    assert one == Diff(Snapshot.clean(1), Snapshot.clean(2), comp=True)
    assert hash(one) == hash(Diff(Snapshot.clean(1), Snapshot.clean(2)))
    assert one != Diff(Snapshot.clean(1), Snapshot(Gid(2), Gid(3)))
    assert BaseState(Snapshot.clean(1), timestamp=5) == BaseState(Snapshot.clean(1), timestamp=6)
    assert BaseState(Snapshot.clean(1)) != BaseState(Snapshot.clean(1), Snapshot.clean(2))


# --- text forms


@given(snapshots(GID_MAX) | st.just(NO_SNAPSHOT))
def test_snapshot_text(snapshot: Snapshot) -> None:
    assert Snapshot.parse(str(snapshot)) == snapshot


@given(diffs(GID_MAX, any_time=True))
def test_diff_text_and_name(diff: Diff) -> None:
    back = Diff.parse(diff.describe())
    assert (back, back.describe()) == (diff, diff.describe())
    named = parse_diff_name(diff_name(diff), size_b=diff.size_b)
    assert (named, named.describe()) == (diff, diff.describe())
    assert meta.is_diff_name(diff_name(diff))


@given(states())
def test_state_text(state: BaseState) -> None:
    back = BaseState.parse(state.describe())
    assert (back, back.timestamp) == (state, state.timestamp)
    assert BaseState.parse(str(state)) == state
    assert BaseState.parse(str(state)).timestamp == 0


@given(st.integers(0, GID_MAX), TIMES, st.booleans())
def test_restore_point_text(gid: int, timestamp: int, explicit: bool) -> None:
    point = RestorePoint(Gid(gid), timestamp, explicit)
    assert RestorePoint.parse(str(point)) == point


@given(TIMES)
def test_time_text(timestamp: int) -> None:
    assert parse_compact(format_compact(timestamp)) == timestamp


def test_text_as_documented() -> None:
    diff = Diff(Snapshot.clean(7), Snapshot.clean(9), mergeable=True, timestamp=1706745599, size_b=123)
    assert diff.describe() == "|7|-->|9| M- 2024-01-31T23:59:59 123"
    assert diff_name(diff) == "20240131235959-M--7-9.wdiff"
    dirty = Diff(Snapshot(Gid(7), Gid(8)), Snapshot(Gid(9), Gid(12)), timestamp=1706745599)
    assert diff_name(dirty) == "20240131235959----7-8-9-12.wdiff"
    assert Diff(Snapshot.clean(7), Snapshot.clean(9), comp=True).describe() == "|7|-->|9| -C --- 0"
    assert BaseState.parse("<|0|-->|3,4|>-20240131235959").describe() == "<|0|-->|3,4|>-20240131235959"
    assert NO_BASE.describe() == "<|18446744073709551615|>-19700101000000"
    assert str(RestorePoint(Gid(7), 1706745599, explicit=True)) == "7 2024-01-31T23:59:59 1"


BAD_TEXT = {
    Snapshot.parse: [
        "",
        "3",
        "|3",
        "|03|",
        "|3,3|",
        "|4,3|",
        "|3, 4|",
        "|-1|",
        "|3|\n",
        "|18446744073709551616|",
        "|٣|",
    ],
    Diff.parse: [
        "",
        "|1|-->|2|",
        "|1|-->|2| M- ---",
        "|1|-->|2| X- --- 0",
        "|1|-->|2| CM --- 0",
        "|1|-->|2| -- --- 00",
        "|1|-->|2| -- --- -1",
        "|2|-->|2| -- --- 0",
        "|1|-->|2| -- 1970-01-01T00:00:00 0",  # zero is written ---
        "|1|-->|2| -- 2023-02-29T00:00:00 0",
        "|1|-->|2| -- 1899-12-31T23:59:59 0",
        "|1|-->|2| -- 2023-2-28T00:00:00 0",
        "|1|-->|2|  -- --- 0",
    ],
    BaseState.parse: [
        "",
        "|1|",
        "<1>",
        "<|1|>-",
        "<|1|>-2024",
        "<|1|>-20240132000000",
        "<|2|-->|1|>",
        "<|1|-->|2|-->|3|>",
        "<|1|>-20240131235959 ",
    ],
    RestorePoint.parse: [
        "",
        "1",
        "1 --- 2",
        "01 --- 0",
        "1 1970-01-01T00:00:00 0",
        "1 2024-13-01T00:00:00 0",
        "a --- 0",
    ],
    parse_compact: [
        "",
        "2024",
        "20240230000000",
        "20240101240000",
        "20240101000060",
        "18991231235959",
        "2024010100000a",
    ],
    parse_diff_name: [
        "",
        ".wdiff",
        "tmpAbCdEf",
        "20240131235959-M--7-9",
        "20240131235959-M--7-9.wdiff.tmp",
        "20240131235959-M--7.wdiff",
        "20240131235959-M--7-8-9.wdiff",
        "20240131235959-M--7-8-9-10-11.wdiff",
        "20240131235959-M--07-9.wdiff",
        "20240131235959-M--7-7-9-9.wdiff",  # clean, but written as dirty
        "20240131235959-m--7-9.wdiff",
        "20240131235959-CM-7-9.wdiff",
        "20240131235959-M-7-9.wdiff",
        "20240231235959-M--7-9.wdiff",
        "2024013123595-M--7-9.wdiff",
        "20240131235959-M--9-7.wdiff",
        "20240131235959-M--7-18446744073709551615.wdiff",
        "20240131235959-M--7-18446744073709551616.wdiff",
        "20240131235959-M--7--9.wdiff",
        "/20240131235959-M--7-9.wdiff",
        "20240131235959-M--7-9.wdiff\n",
    ],
}


@pytest.mark.parametrize(
    ("parse", "text"),
    [pytest.param(parse, text, id=repr(text)) for parse, texts in BAD_TEXT.items() for text in texts],
)
def test_bad_text(parse: object, text: str) -> None:
    assert callable(parse)
    with pytest.raises(BadLabel):
        parse(text)


@given(NOISE, diffs(GID_MAX, any_time=True), st.integers(0, 99), st.characters(max_codepoint=127))
def test_noise_is_refused_or_means_itself(noise: str, diff: Diff, at: int, char: str) -> None:
    """Whatever a parser accepts, it writes back the same: no two texts for one thing."""
    forms: list[tuple[Callable[[str], Any], Callable[[Any], str], str]] = [
        (Snapshot.parse, str, str(diff.begin)),
        (Diff.parse, Diff.describe, diff.describe()),
        (BaseState.parse, BaseState.describe, BaseState(diff.begin, diff.end).describe()),
        (RestorePoint.parse, str, "77 2024-01-31T23:59:59 1"),
        (parse_diff_name, diff_name, diff_name(diff)),
    ]
    for parse, write, good in forms:
        where = at % len(good)
        for text in (
            noise,
            good[:where] + char + good[where:],
            good[:where] + char + good[where + 1 :],
            good[:where],
        ):
            try:
                found = parse(text)
            except BadLabel:
                continue
            assert text in (write(found), str(found))


# --- names made by the original tools


def name_vectors() -> list[dict[str, object]]:
    manifest = json.loads((Path(__file__).parents[1] / "golden" / "manifest.json").read_text())
    found: list[dict[str, object]] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if node.get("kind") == "wdiff-name":
                found.extend(node["vectors"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(manifest)
    return found


NAMES = name_vectors()


def test_golden_names_are_there() -> None:
    assert len(NAMES) == 12


@pytest.mark.parametrize("vector", NAMES, ids=[" ".join(map(str, v["args"])) for v in NAMES])  # type: ignore[call-overload]
def test_golden_name(vector: dict[str, object]) -> None:
    """Every valid name is made and read exactly; those that the original made of bad labels are refused."""
    arguments = [str(argument) for argument in vector["args"]]  # type: ignore[attr-defined]
    gids = [Gid(int(word)) for word in arguments if word.isdigit() and len(word) != 14]
    if len(gids) == 2:
        gids = [gids[0], gids[0], gids[1], gids[1]]

    def build() -> Diff:
        return Diff(
            Snapshot(gids[0], gids[1]),
            Snapshot(gids[2], gids[3]),
            mergeable="-nomerge" not in arguments,
            comp="-comp" in arguments,
            timestamp=parse_compact(arguments[arguments.index("-d") + 1]),
        )

    if "error" in vector:
        with pytest.raises(BadLabel):
            build()
        if vector["name"] is not None:
            with pytest.raises(BadLabel):
                parse_diff_name(str(vector["name"]))
    else:
        assert diff_name(build()) == vector["name"]
        assert parse_diff_name(str(vector["name"])).describe() == build().describe()


# --- messages and records


@given(diffs(GID_MAX, any_time=True), states(), st.integers(0, GID_MAX))
def test_records_travel(diff: Diff, state: BaseState, gid: int) -> None:
    point = LogPoint(Lsid(gid), Gid(gid), mergeable=diff.mergeable, timestamp=diff.timestamp)
    restore = RestorePoint(Gid(gid), diff.timestamp, explicit=diff.comp)
    for thing in (diff.begin, diff, state, point, restore):
        packed = msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(thing)))
        back = msgspec.convert(packed, type(thing), strict=True)
        assert msgspec.to_builtins(back) == msgspec.to_builtins(thing)


def test_bad_records_are_reported_as_bad_fields() -> None:
    for fields, kind in (
        ({"gid_b": 3, "gid_e": 2}, Snapshot),
        ({"begin": {"gid_b": 3, "gid_e": 3}, "end": {"gid_b": 3, "gid_e": 3}}, Diff),
        ({"begin": {"gid_b": 3, "gid_e": 3}, "end": {"gid_b": 3, "gid_e": 3}}, BaseState),
        ({"gid_b": 1.5, "gid_e": 2}, Snapshot),
        ({"lsid": -1, "gid": 0, "mergeable": True, "timestamp": 0}, LogPoint),
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(fields, kind, strict=True)


# --- states


def test_applying_refuses_what_does_not_continue() -> None:
    idle, busy = BaseState.parse("<|0|>-20240101000000"), BaseState.parse("<|0|-->|4|>")
    gap = [Diff(Snapshot.clean(3), Snapshot.clean(5))]
    short = [Diff(Snapshot.clean(0), Snapshot.clean(2))]
    for state, steps in ((idle, gap), (busy, gap), (busy, short), (busy, [])):
        assert not state.can_apply(steps)
        with pytest.raises(NotApplicable):
            state.begin_applying(steps)
        with pytest.raises(NotApplicable):
            state.end_applying(steps)
    assert idle.can_apply([])
    assert idle.begin_applying([]) is idle
    assert idle.end_applying([]) is idle


def test_times_of_applying() -> None:
    state = BaseState(Snapshot.clean(0), timestamp=1)
    steps = [
        Diff(Snapshot.clean(0), Snapshot.clean(2), timestamp=5),
        Diff(Snapshot.clean(2), Snapshot.clean(3), timestamp=6),
    ]
    assert state.begin_applying(steps).describe() == "<|0|-->|3|>-19700101000006"
    assert state.end_applying(steps).describe() == "<|3|>-19700101000006"
    longer = state.begin_applying(steps[:1]).begin_applying(steps)
    assert longer.describe() == "<|0|-->|3|>-19700101000006"


def test_backups() -> None:
    assert meta.full_backup_state(7, 5).describe() == "<|0,7|>-19700101000005"
    dirty = Snapshot(Gid(4), Gid(7))
    assert meta.hash_backup_gid(dirty) == 8
    with pytest.raises(BadLabel):
        meta.hash_backup_diff(dirty, Snapshot(Gid(7), Gid(9)), 0)
    for gid in (UINT64_MAX, UINT64_MAX - 1):
        with pytest.raises(BadLabel):
            meta.hash_backup_gid(Snapshot.clean(gid))


def test_hash_replication() -> None:
    source = BaseState(Snapshot.clean(9), timestamp=5)
    made = meta.hash_replication_diff(Snapshot(Gid(3), Gid(6)), source)
    assert made.describe() == "|3,6|-->|9| MC 1970-01-01T00:00:05 0"
    for destination in (Snapshot.clean(9), Snapshot.clean(12), Snapshot(Gid(3), Gid(10))):
        with pytest.raises(HistoryBroken):
            meta.hash_replication_diff(destination, source)
    for unfit in (BaseState(Snapshot(Gid(8), Gid(9))), BaseState(Snapshot.clean(8), Snapshot.clean(9))):
        with pytest.raises(BadLabel):
            meta.hash_replication_diff(Snapshot.clean(3), unfit)


def test_starting_state() -> None:
    colds = {3: 30, 5: 50, 9: 90}
    base, busy = BaseState.parse("<|4|>"), BaseState.parse("<|4|-->|7|>")
    for state, gid, to_apply, expected in (
        (base, 4, False, "<|4|>-19700101000000"),  # 3 is below the base
        (base, 5, False, "<|5|>-19700101000050"),
        (base, 8, True, "<|5|>-19700101000050"),
        (base, 99, False, "<|9|>-19700101000130"),
        (busy, 8, True, "<|4|-->|7|>-19700101000000"),
        (busy, 8, False, "<|5|>-19700101000050"),
    ):
        assert meta.starting_state(state, colds, gid, to_apply=to_apply).describe() == expected
    assert meta.starting_state(base, {}, 8, to_apply=False) is base


# --- old base files


def old_int(value: int, width: int | None = None) -> bytes:
    """Encode as older archives did, in the shortest form or in `width` bytes, zero-extended."""
    if width is None and 0 <= value < 0x80:
        return bytes([value])
    if width is None and value == UINT64_MAX:
        return b"\xff"  # -1 as one signed byte
    width = width or next(w for w in (1, 2, 4, 8) if value < 1 << (8 * w))
    return bytes([0x80 + (width.bit_length() - 1)]) + value.to_bytes(width, "little")


def old_snapshot(gid_b: int, gid_e: int, width: int | None = None) -> bytes:
    return struct.pack("<H", 0x0311) + old_int(gid_b, width) + old_int(gid_e, width)


def old_base(state: BaseState, width: int | None = None, end: Snapshot | None = None) -> bytes:
    end = state.end or end or NO_SNAPSHOT
    return (
        struct.pack("<HB", 0x0313, state.is_applying)
        + old_int(state.timestamp, width)
        + old_snapshot(state.begin.gid_b, state.begin.gid_e, width)
        + old_snapshot(end.gid_b, end.gid_e, width)
    )


@given(states().filter(lambda state: state.timestamp >= 0), st.sampled_from([None, 8]))
def test_old_base(state: BaseState, width: int | None) -> None:
    back = parse_base_file(old_base(state, width), source="x")
    assert back.describe() == state.describe()


def test_old_base_by_hand() -> None:
    data = bytes.fromhex("1303 01 82ffbb9d65 1103 03 87 0500000000000000 1103 80f0 81f401")
    assert parse_base_file(data, source="x") == BaseState(Snapshot(Gid(3), Gid(5)), Snapshot(Gid(240), Gid(500)))
    assert parse_base_file(data, source="x").timestamp == 0x659DBBFF
    unused = bytes.fromhex("1303 00 00 1103 ff ff 1103 05 04")  # an end that makes no sense, unused
    with pytest.raises(CorruptData):
        parse_base_file(unused.replace(b"\x13\x03\x00", b"\x13\x03\x01"), source="x")
    assert parse_base_file(unused, source="x") == NO_BASE
    signed = bytes.fromhex("1303 00 84f6 1103 03 84 7f 1103 00 00")
    assert parse_base_file(signed, source="x").describe() == "<|3,127|>-19691231235950"


@given(states().filter(lambda state: state.timestamp >= 0), st.data())
def test_damaged_old_base(state: BaseState, data: st.DataObject) -> None:
    good = old_base(state)
    cut = data.draw(st.integers(0, len(good) - 1))
    for bad in (good[:cut], good + b"\0", b"\x12" + good[1:], data.draw(st.binary(max_size=40))):
        with pytest.raises(CorruptData) as caught:
            parse_base_file(bad, source="some/base")
        assert caught.value.facts["source"] == "some/base"
        assert isinstance(caught.value.facts["offset"], int)
    flipped = bytearray(good)
    flipped[cut] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(CorruptData):  # nothing else may come out
        parse_base_file(bytes(flipped), source="x")

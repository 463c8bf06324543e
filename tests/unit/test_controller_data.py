"""The data classes of the controller: text forms are inverse, bad input is refused and changes nothing."""

import datetime as dt
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.labels import diffs, snapshots
from walbd.controller import (
    CMPR_GZIP,
    CMPR_LZ4,
    CMPR_NONE,
    CMPR_SNAPPY,
    CMPR_ZSTD,
    UINT64_MAX,
    CompressOpt,
    DatetimeFormatDigits,
    Diff,
    GidInfo,
    MetaState,
    Snapshot,
    SyncOpt,
    compress_kind_to_str,
    compress_str_to_kind,
    create_diff_from_str,
    create_meta_state_from_str,
    create_snapshot_from_str,
    create_ts_delta_from_str,
    datetime_to_str,
    parse_ltsv,
    str_to_datetime,
)
from walbd.controller.data import create_compress_opt_from_str, from_unix, to_unix
from walbd.errors import UsageError
from walbd.format import meta

WHEN = dt.datetime(2015, 11, 16, 7, 32, 8, tzinfo=dt.UTC)


# Snapshots


@given(snapshots(UINT64_MAX))
def test_snapshot_text_is_inverse(snapshot: meta.Snapshot) -> None:
    ours = Snapshot.of(snapshot)
    assert str(ours) == str(snapshot)
    assert create_snapshot_from_str(str(ours)) == ours
    assert ours.isDirty() is not snapshot.is_clean


def test_snapshot_defaults_and_parse() -> None:
    snapshot = Snapshot()
    assert (snapshot.gidB, snapshot.gidE) == (0, UINT64_MAX)
    snapshot.parse("|3,5|")
    assert snapshot == Snapshot(3, 5)
    assert snapshot != Snapshot(3, 6)
    assert not Snapshot(7, 7).isDirty()


@pytest.mark.parametrize(
    "text", ["", "|", "||", "3", "|3", "3|", "|5,3|", "|3,3|", "|-1|", "| 3|", "|3|x", "|03|"]
)
def test_bad_snapshot_text_changes_nothing(text: str) -> None:
    snapshot = Snapshot(1, 2)
    with pytest.raises(UsageError):
        snapshot.parse(text)
    assert snapshot == Snapshot(1, 2)
    with pytest.raises(UsageError):
        create_snapshot_from_str(text)


def test_snapshot_arguments() -> None:
    with pytest.raises(UsageError, match="above"):
        Snapshot(5, 3)
    with pytest.raises(UsageError):
        Snapshot(-1, 3)
    with pytest.raises(UsageError):
        Snapshot(0, 1 << 64)
    for bad in ("1", None, 1.0, True):
        with pytest.raises(TypeError):
            Snapshot(bad, 3)  # type: ignore[arg-type]


# Diffs


@given(diffs(50, any_time=True))
def test_diff_text_is_inverse(diff: meta.Diff) -> None:
    if diff.timestamp < 0:
        return  # before 1970: no server writes such a time
    ours = Diff.of(diff)
    assert str(ours) == diff.describe()
    assert create_diff_from_str(str(ours)) == ours
    assert ours.to_meta() == diff
    assert ours.isDirty() is not diff.is_clean
    assert ours.genFileName() == meta.diff_name(diff)
    ours.verify()


def test_diff_fields_and_example() -> None:
    diff = create_diff_from_str("|3|-->|5,7| -C 2015-11-16T07:32:08 10")
    assert (Snapshot(3, 3), Snapshot(5, 7)) == (diff.B, diff.E)
    assert (diff.isMergeable, diff.isCompDiff, diff.ts, diff.dataSize) == (False, True, WHEN, 10)
    assert diff.isDirty()
    clean = create_diff_from_str("|3|-->|5| M- 2015-11-16T07:32:08 10")
    assert clean.genFileName() == "20151116073208-M--3-5.wdiff"
    assert clean != diff
    assert clean == create_diff_from_str(str(clean))


def test_diff_without_progress_is_found_by_verify() -> None:
    diff = Diff(Snapshot(5, 5), Snapshot(5, 5))
    with pytest.raises(UsageError):
        diff.verify()
    with pytest.raises(UsageError):
        Diff(Snapshot(1, 9), Snapshot(2, 3)).verify()
    Diff(Snapshot(1, 1), Snapshot(2, 2)).verify()
    with pytest.raises(TypeError):
        Diff(B=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "|3|-->|5|",
        "|3|-->|5| M- 2015-11-16T07:32:08",
        "|3|-->|5| C- 2015-11-16T07:32:08 10",
        "|3|-->|5| M- 2015-13-16T07:32:08 10",
        "|5|-->|3| M- 2015-11-16T07:32:08 10",
        "|3|-->|5| M- 2015-11-16T07:32:08 10 ",
        "|3|-->|5| M- 2015-11-16T07:32:08 -1",
    ],
)
def test_bad_diff_text_changes_nothing(text: str) -> None:
    diff = create_diff_from_str("|0|-->|1| -- --- 0")
    before = str(diff)
    with pytest.raises(UsageError):
        diff.parse(text)
    assert str(diff) == before
    assert diff.ts is None


# Base states


def test_meta_state_text() -> None:
    state = create_meta_state_from_str("<|3|>-20151116073208")
    assert (state.B, state.E, state.ts) == (Snapshot(3, 3), None, WHEN)
    assert not state.is_applying()
    assert str(state) == "<|3|>-20151116073208"
    applying = create_meta_state_from_str("<|0,3|-->|5|>-20151116073208")
    assert applying.is_applying()
    assert str(applying) == "<|0,3|-->|5|>-20151116073208"
    assert applying == MetaState(Snapshot(0, 3), Snapshot(5, 5))  # the time plays no part
    assert applying != state


@given(snapshots(9), st.none() | snapshots(9))
def test_meta_state_needs_progress(begin: meta.Snapshot, end: meta.Snapshot | None) -> None:
    b = Snapshot.of(begin)
    e = Snapshot.of(end) if end is not None else None
    if e is not None and b.gidB >= e.gidB:
        with pytest.raises(UsageError):
            MetaState(b, e)
        return
    state = MetaState(b, e)
    state.verify()
    assert create_meta_state_from_str(str(state)) == state


@pytest.mark.parametrize("text", ["", "|3|", "<|3|", "<|3|>-2015", "<|3|>x", "<|5|-->|3|>", "<3>"])
def test_bad_meta_state(text: str) -> None:
    with pytest.raises(UsageError):
        create_meta_state_from_str(text)
    with pytest.raises(TypeError):
        MetaState(text)  # type: ignore[arg-type]


# Restore points


@pytest.mark.parametrize(
    ("text", "explicit"),
    [("7 2015-11-16T07:32:08", None), ("7 2015-11-16T07:32:08 0", False), ("7 2015-11-16T07:32:08 1", True)],
)
def test_gid_info(text: str, explicit: bool | None) -> None:
    info = GidInfo(text)
    assert (info.gid, info.ts, info.is_explicit) == (7, WHEN, explicit)
    assert str(info) == text
    assert info == GidInfo(text)


@pytest.mark.parametrize(
    "text",
    ["", "7", "x 2015-11-16T07:32:08", "7 2015-11-16", "7 2015-11-16T07:32:08 2", "7  2015-11-16T07:32:08",
     "18446744073709551616 2015-11-16T07:32:08", "7 2015-11-16T07:32:08 1 1"],
)  # fmt: skip
def test_bad_gid_info(text: str) -> None:
    with pytest.raises(UsageError):
        GidInfo(text)


# Ways to send


@given(
    st.sampled_from([CMPR_NONE, CMPR_SNAPPY, CMPR_GZIP, CMPR_LZ4, CMPR_ZSTD]),
    st.integers(0, 9),
    st.integers(1, 99),
)
def test_compress_opt_text_is_inverse(kind: int, level: int, cpus: int) -> None:
    opt = CompressOpt(kind, level, cpus)
    assert create_compress_opt_from_str(str(opt)) == opt
    assert str(opt) == f"{compress_kind_to_str(kind)}:{level}:{cpus}"
    assert compress_str_to_kind(compress_kind_to_str(kind)) == kind


@pytest.mark.parametrize(
    ("text", "full"), [("zstd", "zstd:0:1"), ("zstd:3", "zstd:3:1"), ("none:0:4", "none:0:4")]
)
def test_compress_opt_short_forms(text: str, full: str) -> None:
    assert str(create_compress_opt_from_str(text)) == full


@pytest.mark.parametrize(
    "text",
    ["", "zip", "zstd:x", "zstd:10", "zstd:1:0", "zstd:1:1:1", "zstd:", ":1:1", "zstd:-1:1",
     "zstd:1:" + "9" * 5000],
)  # fmt: skip
def test_bad_compress_opt_changes_nothing(text: str) -> None:
    opt = CompressOpt(CMPR_GZIP, 2, 3)
    with pytest.raises(UsageError):
        opt.parse(text)
    assert str(opt) == "gzip:2:3"


@pytest.mark.parametrize(
    "make", [lambda: CompressOpt(99), lambda: CompressOpt(level=10), lambda: CompressOpt(nrCpu=0)]
)
def test_bad_compress_values(make: Callable[[], CompressOpt]) -> None:
    with pytest.raises(UsageError):
        make()
    with pytest.raises(TypeError):
        CompressOpt("zstd")  # type: ignore[arg-type]


def test_sync_opt() -> None:
    opt = SyncOpt(CompressOpt(CMPR_GZIP, 9, 4), 30, "512M", "128k")
    assert opt.getArchiveInfoArgs() == ["gzip:9:4", "30"]
    assert opt.getReplicateArgs() == ["gzip:9:4", "512M", "128k"]
    assert SyncOpt() == SyncOpt(CompressOpt(), 0, "1G", "64K")
    for size in ("", "1x", "1Gjunk", "-1", "1 G", "0"):
        with pytest.raises(UsageError):
            SyncOpt(maxWdiffMergeSizeU=size)
    with pytest.raises(UsageError):
        SyncOpt(delayS=-1)
    for kwargs in ({"cmprOpt": "zstd"}, {"delayS": "3"}, {"bulkSizeU": 64}):
        with pytest.raises(TypeError):
            SyncOpt(**kwargs)


# Times and lines


@given(st.integers(1, 4_000_000_000))
def test_times(timestamp: int) -> None:
    when = from_unix(timestamp)
    assert when is not None
    assert to_unix(when) == to_unix(when.replace(tzinfo=None)) == timestamp
    assert str_to_datetime(datetime_to_str(when)) == when
    assert str_to_datetime(datetime_to_str(when, DatetimeFormatDigits), DatetimeFormatDigits) == when


def test_time_forms() -> None:
    tokyo = dt.timezone(dt.timedelta(hours=9))
    assert datetime_to_str(dt.datetime(2015, 11, 16, 16, 32, 8, tzinfo=tokyo)) == "2015-11-16T07:32:08"
    with pytest.raises(UsageError):
        str_to_datetime("2015-11-16")
    with pytest.raises(UsageError):
        datetime_to_str(WHEN, "%H")
    assert from_unix(0) is None
    assert to_unix(None) == 0


def test_ltsv() -> None:
    assert parse_ltsv("name:a\tts:2015-11-16T07:32:08") == {"name": "a", "ts": "2015-11-16T07:32:08"}
    row = create_ts_delta_from_str("name:7\tgid:12\tts_delta:-3\tts:x")
    assert row == {"name": "7", "gid": 12, "ts_delta": -3, "ts": "x"}
    for bad in ("name", ":1", "a:1\t"):
        with pytest.raises(UsageError):
            parse_ltsv(bad)

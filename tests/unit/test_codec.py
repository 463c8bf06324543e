"""Messages: inverse for every message there is; every kind of bad input is the one typed error."""

import dataclasses
import json
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbd.errors import BadState, RemoteError, RemoteProtocolError, code_of, exit_code_of, is_retryable
from walbd.format.meta import Diff, Snapshot
from walbd.protocol import control, transfer
from walbd.protocol.base import ErrorReply, Hello, JobInfo, JobState, Kind, error_reply, remote_error
from walbd.protocol.codec import MESSAGES, Message, Request, decode, encode, to_json_ready
from walbd.protocol.transfer import WlogEnd

SAMPLES: list[Message] = [
    Hello(node="a", kind=Kind.STORAGE, group="g"),
    ErrorReply(code="x", message="m", facts={"a": 1, "b": None, "c": "t", "d": 1.5, "e": True}),
    JobInfo(job=1, name="n", volume="v", state=JobState.DONE, started=5, result={"gid": 3}),
    WlogEnd(lsid=9, diff=Diff(Snapshot.clean(1), Snapshot.clean(2), mergeable=True, timestamp=4, size_b=7)),
    control.GetRestored(volume="v"),
    transfer.WlogOffer(volume="v", uuid=bytes(16), pbs=512, salt=1, size_lb=8, lsid=0, log_max_pb=9),
    control.StatusReply(
        node="a",
        kind=Kind.PROXY,
        version="1",
        pid=1,
        now=1,
        volumes=[control.VolumeStatus(volume="v", state="Started", restored=[1, 2])],
    ),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: message.TAG)
def test_decode_is_the_inverse_of_encode(message: Message) -> None:
    assert decode(encode(message)) == message
    json.dumps(to_json_ready(message))


def test_every_request_names_its_reply() -> None:
    requests = [cls for cls in MESSAGES.values() if issubclass(cls, Request)]
    assert len(requests) > 50
    for cls in requests:
        assert issubclass(cls.REPLY, Message), cls
        assert cls.REPLY.TAG in MESSAGES


@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    try:
        decode(data)
    except RemoteProtocolError:
        pass


JSONISH: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_any_fields_of_any_message(tag: str, data: st.DataObject) -> None:
    names = [field.name for field in dataclasses.fields(MESSAGES[tag])]  # type: ignore[arg-type]
    fields = {name: data.draw(JSONISH) for name in names if data.draw(st.booleans())}
    if data.draw(st.booleans()):
        fields[data.draw(st.text(max_size=5))] = 1
    try:
        message = decode(msgpack.packb([tag, fields]))
    except RemoteProtocolError:
        return
    assert tag == message.TAG
    assert decode(encode(message)) == message


@given(st.sampled_from(SAMPLES), st.data())
def test_flipped_and_cut_messages(message: Message, data: st.DataObject) -> None:
    header = bytearray(encode(message))
    if data.draw(st.booleans()):
        del header[data.draw(st.integers(0, len(header) - 1)) :]
    else:
        header[data.draw(st.integers(0, len(header) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decode(bytes(header))
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "value",
    [
        b"\x91" * 100_000,
        msgpack.packb(["hello", {"node": "a" * 65, "kind": "storage", "group": "g"}]),
        msgpack.packb(["hello", {"node": "a", "kind": "king", "group": "g"}]),
        msgpack.packb(["hello", {"node": "a", "kind": "storage", "group": "g", "version_min": -1}]),
        msgpack.packb(["get-state", {"volume": "a_b"}]),
        msgpack.packb(["get-state", {"volume": ""}]),
        msgpack.packb(["get-state", {"volume": "v" * 65}]),
        msgpack.packb(["log-reset", {"uuid": b"123"}]),
        msgpack.packb(["full-backup", {"volume": "v", "bulk_b": 513}]),
        msgpack.packb(["full-backup", {"volume": "v", "bulk_b": 8 << 20}]),
        msgpack.packb([["hello"], {}]),
        msgpack.packb({"hello": {}}),
    ],
    ids=range(12),
)
def test_bounds(value: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(value)


def test_errors_cross_the_wire_with_their_meaning() -> None:
    error = BadState("no", hint="h", volume="v", weird=Snapshot.clean(3))
    reply = decode(encode(error_reply(error)))
    assert isinstance(reply, ErrorReply)
    back = remote_error(reply)
    assert isinstance(back, RemoteError)
    assert (code_of(back), back.message, back.hint) == ("bad-state", "no", "h")
    assert back.facts == {"volume": "v", "weird": "|3|"}
    assert exit_code_of(back) == BadState.exit_code
    assert not is_retryable(back)
    assert is_retryable(RemoteError("busy", "later"))


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAMPLES[0].node = "b"  # type: ignore[attr-defined]
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"volume": 3}, control.GetState, strict=True)

"""The NBD negotiation: what the server's half answers, and the client's half against it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walbd.errors import NotFound, RemoteProtocolError
from walbd.protocol.nbd import (
    Ended,
    Export,
    ExportFlag,
    Negotiation,
    TlsPolicy,
    Transmission,
    block_status_reply,
    error_reply,
)
from walbd.protocol.nbd_client import ClientNegotiation

EXPORT = Export("vol0", 1 << 30, ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH, "a volume")
FLAGS = struct.pack(">I", 3)
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN = (1 << 31 | n for n in (1, 2, 3, 5, 6))


def start(tls: TlsPolicy = TlsPolicy.OFF) -> Negotiation:
    negotiation = Negotiation(
        find=lambda name: EXPORT if name in ("", "vol0") else None, names=lambda: ["vol0"], tls=tls
    )
    assert negotiation.greeting() == b"NBDMAGICIHAVEOPT\0\3"
    assert negotiation.feed(FLAGS) == b""
    return negotiation


def outcome(negotiation: Negotiation) -> object:
    return negotiation.outcome


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def go(name: str, *infos: int, number: int = GO) -> bytes:
    raw = name.encode()
    body = struct.pack(">I", len(raw)) + raw + struct.pack(f">H{len(infos)}H", len(infos), *infos)
    return option(number, body)


def contexts(number: int, name: str, *queries: str) -> bytes:
    raw = name.encode()
    body = struct.pack(">I", len(raw)) + raw + struct.pack(">I", len(queries))
    return option(number, body + b"".join(struct.pack(">I", len(q)) + q.encode() for q in queries))


def replies(out: bytes) -> list[tuple[int, int, bytes]]:
    """Split an answer into (option, type, data)."""
    found = []
    while out:
        magic, number, kind, size = struct.unpack_from(">QIII", out)
        assert magic == 0x0003E889045565A9
        found.append((number, kind, out[20 : 20 + size]))
        out = out[20 + size :]
    return found


@pytest.mark.parametrize("name", ["", "vol0"])
def test_go(name: str) -> None:
    negotiation = start()
    out = replies(negotiation.feed(go(name, 1, 2, 3) + b"rest"))
    assert out == [
        (GO, REP_INFO, struct.pack(">HQH", 0, 1 << 30, 5)),
        (GO, REP_INFO, b"\0\1vol0"),
        (GO, REP_INFO, b"\0\2a volume"),
        (GO, REP_INFO, struct.pack(">HIII", 3, 512, 4096, 32 << 20)),
        (GO, ACK, b""),
    ]
    assert negotiation.outcome == Transmission(EXPORT, structured=False, allocation=False)
    assert negotiation.rest == b"rest"


def test_info_goes_on() -> None:
    negotiation = start()
    out = replies(negotiation.feed(go("", number=INFO)))
    assert [kind for _, kind, _ in out] == [REP_INFO, REP_INFO, ACK]
    assert negotiation.outcome is None
    assert replies(negotiation.feed(go("nothing"))) == [(GO, UNKNOWN, b"no such export")]
    assert replies(negotiation.feed(option(99))) == [(99, UNSUP, b"")]
    assert negotiation.outcome is None


def test_one_byte_at_a_time() -> None:
    whole, pieces = start(), start()
    stream = option(STRUCTURED) + contexts(SET_META, "vol0", "base:allocation") + go("vol0")
    out = b"".join(pieces.feed(stream[i : i + 1]) for i in range(len(stream)))
    assert out == whole.feed(stream)
    assert pieces.outcome == whole.outcome == Transmission(EXPORT, structured=True, allocation=True)


def test_export_name() -> None:
    negotiation = start()
    assert negotiation.feed(option(EXPORT_NAME, b"vol0")) == struct.pack(">QH", 1 << 30, 5)
    assert isinstance(negotiation.outcome, Transmission)
    old = Negotiation(find=lambda _: EXPORT, names=list, tls=TlsPolicy.OFF)
    assert old.feed(struct.pack(">I", 1) + option(EXPORT_NAME)) == struct.pack(">QH", 1 << 30, 5) + bytes(124)
    with pytest.raises(RemoteProtocolError):
        start().feed(option(EXPORT_NAME, b"other"))


def test_list_and_abort() -> None:
    negotiation = start()
    out = negotiation.feed(option(LIST) + option(LIST, b"x") + option(ABORT) + option(LIST))
    assert replies(out) == [
        (LIST, SERVER, b"\0\0\0\4vol0"),
        (LIST, ACK, b""),
        (LIST, INVALID, b"no data expected"),
        (ABORT, ACK, b""),
    ]
    assert negotiation.outcome is Ended.ABORTED


def test_contexts() -> None:
    negotiation = start()
    first = replies(negotiation.feed(contexts(SET_META, "vol0", "base:allocation")))
    assert first == [(SET_META, INVALID, b"structured replies come first")]
    assert replies(negotiation.feed(option(STRUCTURED, b"x") + option(STRUCTURED)))[1] == (STRUCTURED, ACK, b"")
    name = b"base:allocation"
    for queries in ((), ("base:",), ("base:allocation", "other:x")):
        assert replies(negotiation.feed(contexts(LIST_META, "vol0", *queries))) == [
            (LIST_META, META, bytes(4) + name),
            (LIST_META, ACK, b""),
        ]
    assert replies(negotiation.feed(contexts(LIST_META, "vol0", "other:"))) == [(LIST_META, ACK, b"")]
    assert replies(negotiation.feed(contexts(SET_META, "no", "base:allocation")))[0][1] == UNKNOWN
    for queries, chosen in ((("base:allocation",), True), (("base:",), False), ((), False)):
        out = replies(negotiation.feed(contexts(SET_META, "vol0", *queries)))
        assert out[:-1] == ([(SET_META, META, b"\0\0\0\1" + name)] if chosen else [])
    # A context is for the export it was chosen for.
    negotiation.feed(contexts(SET_META, "vol0", "base:allocation"))
    negotiation.feed(go(""))
    assert negotiation.outcome == Transmission(EXPORT, structured=True, allocation=False)


def test_tls_policy() -> None:
    assert replies(start().feed(option(STARTTLS))) == [(STARTTLS, POLICY, b"TLS is not configured")]
    negotiation = start(TlsPolicy.REQUIRED)
    for number in (LIST, GO, INFO, STRUCTURED, SET_META):
        assert replies(negotiation.feed(option(number)))[0][1] == TLS_REQD
    assert replies(negotiation.feed(option(STARTTLS, b"x")))[0][1] == INVALID
    assert replies(negotiation.feed(option(STARTTLS))) == [(STARTTLS, ACK, b"")]
    assert outcome(negotiation) is Ended.START_TLS
    negotiation.restart()
    assert replies(negotiation.feed(option(STARTTLS)))[0][1] == INVALID
    negotiation.feed(go(""))
    assert isinstance(outcome(negotiation), Transmission)
    with pytest.raises(RemoteProtocolError):
        start(TlsPolicy.REQUIRED).feed(option(EXPORT_NAME))


def test_plain_bytes_after_starttls_are_an_attack() -> None:
    negotiation = start(TlsPolicy.REQUIRED)
    negotiation.feed(option(STARTTLS) + option(LIST))
    with pytest.raises(RemoteProtocolError):
        negotiation.restart()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 0),  # not fixed newstyle
        struct.pack(">I", 7),
        FLAGS + b"IHAVEOPX" + bytes(8),
        FLAGS + b"IHAVEOPT" + struct.pack(">II", 7, 65537),
    ],
)
def test_broken_clients(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Negotiation(find=lambda _: EXPORT, names=list).feed(data)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.binary(max_size=40)), max_size=6),
    st.binary(max_size=30),
    st.integers(0, 200),
)
def test_any_bytes_give_answers_or_the_typed_error(
    options: list[tuple[int, bytes]], tail: bytes, flip: int
) -> None:
    stream = bytearray(FLAGS + b"".join(option(*o) for o in options) + tail)
    stream[flip % len(stream)] ^= 1 << flip % 8
    negotiation = Negotiation(find=lambda name: EXPORT if not name else None, names=lambda: ["a", "b"])
    try:
        replies_ = negotiation.feed(bytes(stream))
    except RemoteProtocolError:
        return
    if not isinstance(negotiation.outcome, Transmission):
        replies(replies_)


def test_client_and_server_agree() -> None:
    server, client = start(), ClientNegotiation("vol0")
    # A fresh server: the greeting was taken off by `start`, the client's flags too.
    out = client.feed(server.greeting())
    assert out[:4] == FLAGS
    assert client.feed(server.feed(out[4:])) == b""
    assert client.done
    assert (client.size_b, client.flags) == (EXPORT.size_b, EXPORT.flags)
    assert isinstance(server.outcome, Transmission)


def test_client_refuses_what_it_does_not_understand() -> None:
    server = start()
    missing = ClientNegotiation("nothing")
    out = missing.feed(server.greeting())
    with pytest.raises(NotFound):
        missing.feed(server.feed(out[4:]))
    good = b"NBDMAGICIHAVEOPT\0\3"
    head = struct.Struct(">QIII")
    for data in (
        b"NBDMAGIC" + bytes(10),
        b"NBDMAGICIHAVEOPT\0\0",
        good + bytes(20),
        good + head.pack(0x0003E889045565A9, 6, 1, 0),
        good + head.pack(0x0003E889045565A9, 7, 9, 0),
        good + head.pack(0x0003E889045565A9, 7, 1, 0),  # no export was told
        good + head.pack(0x0003E889045565A9, 7, 3, 1 << 20),
        good
        + head.pack(0x0003E889045565A9, 7, 3, 12)
        + struct.pack(">HQH", 0, 5, 1)
        + head.pack(0x0003E889045565A9, 7, 1, 0)
        + b"x",
    ):
        with pytest.raises(RemoteProtocolError):
            ClientNegotiation().feed(data)


def test_replies_of_the_core() -> None:
    cookie = int.from_bytes(b"COOKIE!!", "little")
    assert error_reply(cookie, 0, structured=False) == bytes.fromhex("67446698 00000000") + b"COOKIE!!"
    assert error_reply(cookie, 5, structured=True) == (
        bytes.fromhex("668e33ef 0001 8001") + b"COOKIE!!" + bytes.fromhex("00000006 00000005 0000")
    )
    assert block_status_reply(cookie, [(4096, 0), (512, 3)]) == (
        bytes.fromhex("668e33ef 0001 0005")
        + b"COOKIE!!"
        + bytes.fromhex("00000014 00000001")
        + struct.pack(">IIII", 4096, 0, 512, 3)
    )

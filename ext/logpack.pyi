from enum import IntEnum

from walbd.ext.buffers import Buf

class Stop(IntEnum):
    """Why a scan ended."""

    MORE = 0  # the next pack (or record) is not wholly in the buffer
    END = 1  # an end header, or in `scan_data` the end of the pack
    NOT_HEADER = 2  # no header here: wrong type or checksum, or a header without records
    WRONG_LSID = 3  # a header with a good checksum, but of another place in the log
    BAD_HEADER = 4  # a header with a good checksum and the right lsid, whose fields contradict each other
    BAD_DATA = 5  # the data of a record does not match its checksum

class Fault(IntEnum):
    """What is wrong with a header or its data; walbd.format.logpack.FAULT_TEXT says it in words."""

    NONE = 0
    TYPE = 1
    CHECKSUM = 2
    EMPTY = 3
    LSID = 4
    N_RECORDS = 5
    N_PADDING = 6
    LSID_OVERFLOW = 7
    RECORD_FLAGS = 8
    RECORD_SIZE = 9
    RECORD_OFFSET = 10
    RECORD_LSID = 11
    TOTAL_SIZE = 12
    DATA_CHECKSUM = 13

class Scan:
    """The outcome of `scan` or `scan_data`."""

    @property
    def stop(self) -> Stop: ...
    @property
    def fault(self) -> Fault: ...  # NONE when `stop` is MORE or END
    lsid: int  # reached: a pack boundary (`scan_data`: the lsid of the next record)
    consumed_b: int  # bytes of the buffer before that lsid
    n_packs: int  # whole packs found (`scan_data`: 0)
    n_records: int  # records in them, paddings and discards included
    need_b: int  # when MORE: bytes from `consumed_b` on that make the next pack (record) whole; otherwise 0
    trouble_b: int  # offset in the buffer of the block or data that ended the scan
    record: int  # index in its pack of the record in trouble, -1 for none (`scan_data`: the next record)

def scan(
    buf: Buf, pbs: int, salt: int, lsid: int, *, verify_data: bool = True, records: bytearray | None = None
) -> Scan:
    """Scan consecutive logpacks, the first of which is that of `lsid`; stop at the first that is not whole and
    valid.

    `records`, when given, gets a walb_log_record (40 bytes, ext/src/walb.h) for each record of the whole packs,
    paddings and discards included; `data_b` counts from the start of `buf`. A pack counts only as a whole:
    nothing of the pack in trouble is appended. Runs without the GIL.
    """

def scan_data(
    header: Buf,
    pbs: int,
    salt: int,
    data: Buf,
    first: int,
    *,
    verify_data: bool = True,
    records: bytearray | None = None,
) -> Scan:
    """Scan a part of one pack too large for a buffer: `data` begins with the data of record `first`.

    Records that are wholly in `data` and good are appended; `data_b` counts from the start of `data`.
    `header` is the valid header (ValueError otherwise). Runs without the GIL.
    """

def check_header(block: Buf, pbs: int, salt: int) -> tuple[Fault, int]:
    """Return what is wrong with a header, shape (pbs,), and in which record (-1: in the header itself).

    A proper end header has no fault. The lsid is not compared with anything.
    """

def shrink(header: Buf, pbs: int, salt: int, n_records: int) -> bytes:
    """Return the header of the pack cut down to its first `n_records` (at least one) records.

    Raises ValueError when `header` is not valid.
    """

def find_headers(buf: Buf, pbs: int, salt: int) -> list[tuple[int, int]]:
    """Return (index of the PB in `buf`, logpack lsid) of every block with the type and checksum of a header.

    Headers without records (end headers) are left out. Runs without the GIL.
    """

def find_claims(buf: Buf, pbs: int, lsid: int) -> list[int]:
    """Return the index of every PB in `buf`, beginning at `lsid`, that claims to be the header of its place.

    Type and lsid decide; the rest of the block may be anything. Runs without the GIL.
    """

def bad_records(data: Buf, salt: int, records: Buf) -> list[int]:
    """Return the indexes of all records (walb_log_record structs) whose data does not match their checksum.

    For records that were collected without verifying. Raises ValueError if one points outside `data`.
    Runs without the GIL.
    """

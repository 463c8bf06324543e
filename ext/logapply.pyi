from walbd.ext.buffers import Buf

def first_outside(records: Buf, limit_lb: int) -> int:
    """Return the index of the first log record (walb_log_record, 40 bytes) that reaches beyond `limit_lb`
    logical blocks, or -1. Paddings are passed over."""

def first_odd_padding(records: Buf, pbs: int, ring_size_pb: int) -> int:
    """Return the index of the first padding that does not end at the end of a lap of the ring, or -1.

    Paddings without size own no block and may stand anywhere.
    """

def write_records(fd: int, data: Buf, records: Buf, first: int) -> tuple[int, int]:
    """Write the data of records from index `first` on to their places in the open file `fd`, in order.

    Stops before a discard, which is the caller's business, and passes over paddings. Returns the index reached
    (the number of records at the end) and the errno of a failed write, or 0. Raises ValueError before anything
    is written if a record points outside `data`. Runs without the GIL.
    """

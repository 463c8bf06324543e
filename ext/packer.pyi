from walbd.ext.buffers import Buf
from walbd.ext.nbd import Chunk

class Packer:
    pbs: int
    ring_pb: int
    ring_begin_b: int
    salt: int
    record_max_pb: int
    pack_max_pb: int
    def __init__(
        self,
        *,
        pbs: int,
        ring_pb: int,
        ring_begin_b: int,
        salt: int,
        record_max_pb: int,
        pack_max_pb: int,
    ) -> None: ...
    def begin(self, lsid: int, lsid_limit: int) -> LogBatch: ...

class LogBatch:
    lsid_begin: int
    lsid_end: int
    size_b: int
    data_b: int
    n_packs: int
    def add(
        self, requests: Buf, index: int, done_b: int, data: Buf | Chunk, size_max_b: int
    ) -> tuple[int, int, bytes]: ...
    def seal(self, fill_limit: int = 0) -> None: ...
    def write(self, fd: int) -> None: ...
    def segments(self) -> list[tuple[int, list[bytes]]]: ...

from walbd.ext.buffers import Buf

CHUNK_B: int
REQUEST_COST_B: int

class Chunk:
    def __init__(self, size_b: int) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def parse_requests(
    data: Buf | Chunk,
    begin: int,
    end: int,
    size_b: int,
    length_max_b: int,
    read_only: bool = False,
    room_b: int = 0xFFFF_FFFF_FFFF_FFFF,
) -> tuple[int, int, bytes, int, int, bytes, int, bytes]: ...
def simple_replies(requests: Buf, begin: int, end: int, error: int = 0, fua: int = -1) -> bytes: ...
def read_replies(requests: Buf, structured: bool) -> tuple[Chunk, bytes]: ...

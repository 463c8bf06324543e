"""The superblock of a log device, and where everything lies on that device.

    byte 0        reserved: 4096 bytes, never interpreted
    byte 4096     superblock 0: one PB, whatever the PB size (S0 = 4096 / pbs)
    PB S0+1       metadata area: `metadata_size_pb` PBs, 0 in every device formatted today
    next PB       superblock 1: our second copy; the kernel driver neither reads nor writes it
    next PB       R: the ring buffer, `ring_size_pb` PBs

A superblock is 104 bytes of fields, little-endian, and zeros up to a whole PB:

    off size field                 off size field
      0   2  sector type: 1         24  16  uuid of this log sequence
      2   2  version: 2             40  32  name, NUL-terminated
      4   4  checksum, salt 0       72   8  ring size [PB]
      8   4  LB size: 512           80   8  oldest lsid
     12   4  PB size                88   8  written lsid
     16   4  metadata size [PB]     96   8  size of the walb device [LB]
     20   4  salt of the logpacks

Source: docs/formats.md, "Log device"; docs/device.md, "The second superblock".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from walbd.errors import CorruptData
from walbd.ext.buffers import Buf
from walbd.ext.checksum import checksum
from walbd.format.files import ReadFile, read_aligned
from walbd.ids import INVALID_LSID, Lsid
from walbd.units import LB, UINT32_MAX, UINT64_MAX

SUPERBLOCK_OFFSET_B: Final = 4096
SECTOR_TYPE_SUPERBLOCK: Final = 1
LOG_VERSION: Final = 2
PBS_VALUES: Final = (512, 1024, 2048, 4096)  # multiples of an LB that put superblock 0 at byte 4096
NAME_SIZE_B: Final = 32  # with its NUL

_FIELDS: Final = struct.Struct("<HHIIIII16s32sQQQQ")
_CHECKSUM_AT: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """A valid superblock; raises ValueError when made of values that no valid one holds."""

    pbs: int  # PB size [byte]
    salt: int  # of every logpack checksum on this device
    uuid: bytes  # of this log sequence, not of the volume: renewed at format and reset
    name: str = ""  # at most 31 bytes in UTF-8
    ring_size_pb: int
    oldest_lsid: Lsid  # the first lsid still kept for the backup; oldest <= written
    written_lsid: Lsid  # everything below is on the data device; redo starts here
    device_size_lb: int
    metadata_size_pb: int = 0

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str:
        name = _encode_name(self.name)
        checks = (
            (self.pbs in PBS_VALUES, "PB size is not 512, 1024, 2048 or 4096"),
            (0 <= self.salt <= UINT32_MAX, "salt is not a 32-bit number"),
            (len(self.uuid) == 16, "uuid is not 16 bytes"),
            (len(name) < NAME_SIZE_B and b"\0" not in name, "name is longer than 31 bytes or holds a NUL"),
            (0 < self.ring_size_pb <= UINT64_MAX, "ring size is zero"),
            (0 <= self.oldest_lsid < INVALID_LSID, "oldest lsid is not a valid lsid"),
            (0 <= self.written_lsid < INVALID_LSID, "written lsid is not a valid lsid"),
            (self.oldest_lsid <= self.written_lsid, "oldest lsid is above written lsid"),
            (0 <= self.device_size_lb <= UINT64_MAX, "device size is not a 64-bit number"),
            (0 <= self.metadata_size_pb <= UINT32_MAX, "metadata size is not a 32-bit number"),
        )
        return next((text for good, text in checks if not good), "")

    @property
    def superblock1_offset_b(self) -> int:
        """Where the second copy lies [byte]."""
        return superblock1_offset_b(self.pbs, self.metadata_size_pb)

    @property
    def ring_offset_pb(self) -> int:
        """The first PB of the ring."""
        return ring_offset_pb(self.pbs, self.metadata_size_pb)

    @property
    def end_b(self) -> int:
        """The byte after the ring: the log device is at least this large."""
        return (self.ring_offset_pb + self.ring_size_pb) * self.pbs

    def position(self, lsid: int) -> int:
        """Return the PB on the device that holds `lsid`."""
        assert 0 <= lsid < INVALID_LSID
        return self.ring_offset_pb + lsid % self.ring_size_pb

    def offset_b(self, lsid: int) -> int:
        """Return the byte offset on the device of the PB that holds `lsid`."""
        return self.position(lsid) * self.pbs

    def pack(self) -> bytes:
        """Return the superblock as it stands on disk: one PB, checksum filled in."""
        block = bytearray(self.pbs)
        _FIELDS.pack_into(
            block,
            0,
            SECTOR_TYPE_SUPERBLOCK,
            LOG_VERSION,
            0,
            LB,
            self.pbs,
            self.metadata_size_pb,
            self.salt,
            self.uuid,
            _encode_name(self.name),
            self.ring_size_pb,
            self.oldest_lsid,
            self.written_lsid,
            self.device_size_lb,
        )
        struct.pack_into("<I", block, _CHECKSUM_AT, checksum(block))
        return bytes(block)

    @staticmethod
    def parse(block: Buf, *, source: str, offset: int = SUPERBLOCK_OFFSET_B) -> Superblock:
        """Read a superblock that begins at the first byte of `block`, which holds at least its PB.

        Raises CorruptData (`source`, `offset` [byte]) unless type, version, sizes, checksum and all values
        are valid. A ring that overflowed (written - oldest above the ring size) is valid.
        """

        def bad(message: str, **facts: object) -> CorruptData:
            return CorruptData(message, hint=_HINT, path=source, offset=offset, **facts)

        view = memoryview(block)
        if len(view) < _FIELDS.size:
            raise bad("the superblock is cut off", size=len(view))
        (
            sector_type,
            version,
            _,
            lbs,
            pbs,
            metadata_size_pb,
            salt,
            uuid,
            name,
            ring_size_pb,
            oldest_lsid,
            written_lsid,
            device_size_lb,
        ) = _FIELDS.unpack_from(view)
        if sector_type != SECTOR_TYPE_SUPERBLOCK:
            raise bad("not a superblock of a log device", sector_type=sector_type)
        if version != LOG_VERSION:
            raise bad("the log format version is not supported", version=version, supported=LOG_VERSION)
        if lbs != LB or pbs not in PBS_VALUES:
            raise bad("the superblock holds an impossible block size", lbs=lbs, pbs=pbs)
        if len(view) < pbs:
            raise bad("the superblock is cut off", size=len(view), pbs=pbs)
        if checksum(view[:pbs]) != 0:
            raise bad("the checksum of the superblock does not match")
        if b"\0" not in name:
            raise bad("the device name in the superblock does not end")
        try:
            return Superblock(
                pbs=pbs,
                salt=salt,
                uuid=uuid,
                name=_decode_name(name),
                ring_size_pb=ring_size_pb,
                oldest_lsid=Lsid(oldest_lsid),
                written_lsid=Lsid(written_lsid),
                device_size_lb=device_size_lb,
                metadata_size_pb=metadata_size_pb,
            )
        except ValueError as exc:
            raise bad(f"the superblock is not valid: {exc}") from exc


_HINT: Final = (
    "check that this is a log device; a damaged one must be formatted anew and the volume resynchronised"
)


def _encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decode_name(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def superblock1_offset_b(pbs: int, metadata_size_pb: int = 0) -> int:
    """Return the byte offset of superblock 1."""
    return SUPERBLOCK_OFFSET_B + (1 + metadata_size_pb) * pbs


def ring_offset_pb(pbs: int, metadata_size_pb: int = 0) -> int:
    """Return the first PB of the ring."""
    return SUPERBLOCK_OFFSET_B // pbs + 2 + metadata_size_pb


def ring_size_pb(ldev_size_b: int, pbs: int) -> int:
    """Return how large a ring a log device of this size gets at format; not positive when it is too small."""
    return ldev_size_b // pbs - ring_offset_pb(pbs)


def read_superblock(file: ReadFile, *, device_pbs: int | None = None) -> Superblock:
    """Read and check superblock 0 of a log device, and that the device holds its ring.

    The PB size is found in the superblock. `device_pbs` is what a block device says about itself
    (`walbd.fs.physical_block_size`; None for a plain file) and has to agree.
    Raises CorruptData (`path`, `offset`).
    """
    return _read_at(file, SUPERBLOCK_OFFSET_B, device_pbs)


def read_superblock1(file: ReadFile, *, uuid: bytes, device_pbs: int | None = None) -> Superblock:
    """Read the second copy, for use when superblock 0 fails its checksum.

    The copy has to carry `uuid` and a ring that lies on the device; otherwise CorruptData. What it says may be
    older than what superblock 0 said: the caller has to verify the log from its `written_lsid` on
    (docs/device.md, "The second superblock") before it believes the copy.
    """
    problem: CorruptData | None = None
    for pbs in (device_pbs,) if device_pbs else PBS_VALUES:
        offset_b = superblock1_offset_b(pbs)
        try:
            copy = _read_at(file, offset_b, pbs)
        except CorruptData as exc:
            problem = problem or exc
            continue
        if copy.uuid == uuid and copy.superblock1_offset_b == offset_b:
            return copy
        problem = CorruptData(
            "superblock 1 belongs to another log",
            hint=_HINT,
            path=str(file.path),
            offset=offset_b,
            uuid=copy.uuid.hex(),
            expected=uuid.hex(),
        )
    assert problem is not None
    raise problem


def damaged_uuid(file: ReadFile) -> bytes:
    """Return the uuid field of superblock 0 without checking anything: the best guess when it is damaged."""
    return bytes(read_aligned(file, SUPERBLOCK_OFFSET_B, SUPERBLOCK_OFFSET_B)[24:40])


def _read_at(file: ReadFile, offset_b: int, device_pbs: int | None) -> Superblock:
    path = str(file.path)
    buffer = read_aligned(file, 8192, offset_b // 4096 * 4096)
    superblock = Superblock.parse(buffer[offset_b % 4096 :], source=path, offset=offset_b)
    if device_pbs is not None and superblock.pbs != device_pbs:
        raise CorruptData(
            "the superblock was made for another physical block size than the device has",
            hint="use the device it was formatted on, or format it anew",
            path=path,
            offset=offset_b,
            pbs=superblock.pbs,
            device_pbs=device_pbs,
        )
    if superblock.end_b > (size_b := file.size()):
        raise CorruptData(
            "the log device is smaller than the ring its superblock describes",
            hint="the device or image was cut: use the original",
            path=path,
            offset=offset_b,
            size_b=size_b,
            expected_b=superblock.end_b,
        )
    if superblock.written_lsid > INVALID_LSID - 2 * superblock.ring_size_pb:
        raise CorruptData(
            "the written lsid in the superblock is at the end of its range",
            hint=_HINT,
            path=path,
            offset=offset_b,
            written_lsid=superblock.written_lsid,
        )
    return superblock

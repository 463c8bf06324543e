"""From a stream of log to an indexed wdiff in a temporary file. Blocking: runs in the pool for receptions.

Everything that comes is verified before it is believed: where each chunk begins, that it holds whole logpacks,
their headers and the data of their records, that no record lies outside the volume, and that the stream ends
where its sender says. Nothing has a name before all of that is done. Source: docs/proxy.md, Receiving.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from walbd.errors import CorruptData, RemoteProtocolError
from walbd.ext.logpack import Stop, scan
from walbd.format.compress import CompressOpt, Kind, decompress
from walbd.format.logpack import corrupt_pack
from walbd.format.wdiff_write import IndexedWdiffWriter
from walbd.fs import Buf, FileSystem, TempFile, failpoints
from walbd.fs.apply import check_inside
from walbd.fs.disk import disk_errors
from walbd.protocol.transfer import Packing, WlogChunk, WlogEnd, WlogOffer

STORED: Final = CompressOpt(Kind.LZ4)  # quick: what an archive gets is compressed anew as it wants

_HINT: Final = "it is sent again by itself; if that does not help, the log of the device is damaged"

FP_BEFORE_COMMIT: Final = failpoints.register(
    "proxy.wdiff.before_commit", "a whole wdiff in a temporary file: start-up removes it, the storage sends again"
)
FP_AFTER_COMMIT: Final = failpoints.register(
    "proxy.wdiff.after_commit",
    "a wdiff in received/, not acknowledged: start-up links it, and it may come again",
)


class WlogConverter:
    """One stretch of log on its way to being a wdiff: begin, add each chunk, finish, commit; close in any case.

    Used by one thread at a time.
    """

    def __init__(self, fs: FileSystem, directory: Path, offer: WlogOffer, source: str) -> None:
        """Make one for a stream that errors call `source`; touches no file yet."""
        self.lsid = offer.lsid  # everything before it has been converted
        self.n_packs = 0
        self._offer = offer
        self._source = source
        self._fs = fs
        self._directory = directory
        self._temporary: list[TempFile] = []  # the wdiff, then scratch files
        self._writer: IndexedWdiffWriter | None = None

    @property
    def wlog_b(self) -> int:
        """Log taken in so far [byte]."""
        return (self.lsid - self._offer.lsid) * self._offer.pbs

    @property
    def wdiff_b(self) -> int:
        """Size of the wdiff so far [byte]."""
        return self._writer.size_b if self._writer is not None else 0

    def begin(self) -> None:
        """Make the temporary file."""
        self._writer = IndexedWdiffWriter(
            self._make_temporary(), self._offer.uuid, STORED, scratch=self._make_temporary
        )

    def add(self, chunk: WlogChunk, payload: Buf) -> None:
        """Convert one chunk. Raises CorruptData or RemoteProtocolError, and then nothing more may be added."""
        assert self._writer is not None
        offer = self._offer
        if chunk.lsid != self.lsid:
            raise RemoteProtocolError(
                "a chunk of log does not follow the one before", lsid=chunk.lsid, expected=self.lsid
            )
        if chunk.size_b % offer.pbs or chunk.size_b == 0:
            raise RemoteProtocolError("a chunk of log is not whole blocks", size_b=chunk.size_b, pbs=offer.pbs)
        if chunk.lsid + chunk.size_b // offer.pbs > offer.lsid + offer.log_max_pb:
            raise RemoteProtocolError(
                "more log comes than was announced", lsid_begin=offer.lsid, log_max_pb=offer.log_max_pb
            )
        data = self._unpack(chunk, payload)
        records = bytearray()
        found = scan(data, offer.pbs, offer.salt, self.lsid, records=records)
        if found.stop is not Stop.MORE:
            if found.stop is Stop.END:
                raise self._corrupt("an end of log inside of the stream", found.consumed_b)
            raise corrupt_pack(
                found.fault,
                source=self._source,
                offset=self.wlog_b + found.trouble_b,
                record=found.record,
                hint=_HINT,
                lsid=found.lsid,
            )
        if found.consumed_b != len(data):
            raise self._corrupt("a chunk of log ends within a logpack", found.consumed_b)
        check_inside(
            records,
            offer.size_lb,
            source=self._source,
            offset_b=lambda lsid: (lsid - offer.lsid) * offer.pbs,
            what="the volume",
        )
        self._writer.add_log(data, records, source=self._source)
        self.lsid = found.lsid
        self.n_packs += found.n_packs

    def finish(self, end: WlogEnd) -> None:
        """Check the end of the stream, complete the wdiff and make its bytes durable; it has no name yet."""
        assert self._writer is not None
        if end.lsid != self.lsid:
            raise RemoteProtocolError("the log ends elsewhere than its sender says", lsid=self.lsid, end=end.lsid)
        if not end.diff.is_clean or end.diff.comp:
            raise RemoteProtocolError("log gives clean diffs", diff=end.diff.describe())
        self._writer.finish()
        self._temporary[0].sync()

    def commit(self, path: Path) -> None:
        """Give the finished wdiff its name, durably; a file of that name is replaced."""
        with disk_errors(path, "rename"):
            failpoints.hit(FP_BEFORE_COMMIT)
        self._temporary[0].commit(path)
        with disk_errors(path, "rename"):
            failpoints.hit(FP_AFTER_COMMIT)

    def close(self) -> None:
        """Remove whatever is temporary."""
        for file in self._temporary:
            file.close()

    def _unpack(self, chunk: WlogChunk, payload: Buf) -> Buf:
        if chunk.packing is Packing.LZ4:
            return decompress(Kind.LZ4, payload, chunk.size_b, source=self._source, offset=self.wlog_b)
        if len(payload) != chunk.size_b:
            raise RemoteProtocolError("a chunk has another size than it says", size_b=len(payload))
        return payload

    def _make_temporary(self) -> TempFile:
        file = self._fs.temp_file(self._directory)
        self._temporary.append(file)
        return file

    def _corrupt(self, message: str, offset_b: int) -> CorruptData:
        return CorruptData(message, hint=_HINT, source=self._source, offset=self.wlog_b + offset_b, lsid=self.lsid)

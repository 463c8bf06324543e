"""Where the image of a virtual full scan goes: a file, a device, or a stream such as standard output.

Each piece is checked: its place, its size, its checksum. Source: docs/protocol.md, "Transfers".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast

import lz4.block
import xxhash

from walbd.errors import CorruptData, NotFound, Refused, RemoteProtocolError
from walbd.ext.buffers import Buf
from walbd.fs import File, FileSystem, OsFileSystem, TempFile
from walbd.protocol.codec import Message
from walbd.protocol.maintenance import ScanBegin
from walbd.protocol.transfer import FullChunk, Packing
from walbd.units import MIB

_ZEROS: Final = bytes(MIB)


class Target(Protocol):
    """What is written to, in order of addresses."""

    def begin(self, size_b: int) -> None:
        """The size is known; raises Refused when there is no room for it."""

    def write(self, data: Buf, offset_b: int) -> None:
        """Write data."""

    def zero(self, offset_b: int, size_b: int) -> None:
        """Write zeros."""

    def commit(self) -> None:
        """Make it permanent."""


class ImageSink:
    """Takes the messages of a scan in order, checks them and writes the image to a target."""

    def __init__(self, target: Target, name: str) -> None:
        self.size_b = 0  # known after the first message
        self.done_b = 0
        self._target = target
        self._name = name

    def take(self, message: Message, payload: memoryview) -> None:
        """Take the next message. Raises CorruptData, RemoteProtocolError, and what writing raises."""
        if isinstance(message, ScanBegin):
            self.size_b = message.size_b
            self._target.begin(message.size_b)
            return
        if not isinstance(message, FullChunk):
            raise RemoteProtocolError("unexpected message in a scan", got=message.TAG)
        if message.offset_b != self.done_b or message.size_b > self.size_b - self.done_b:
            raise RemoteProtocolError(
                "a piece of a scan is not where the last one ended", offset=message.offset_b, expected=self.done_b
            )
        if len(payload):
            self._target.write(self._unpacked(message, payload), self.done_b)
        else:
            self._target.zero(self.done_b, message.size_b)
        self.done_b += message.size_b

    def finish(self) -> None:
        """Make the image permanent; raises RemoteProtocolError unless everything has come."""
        if self.done_b != self.size_b:
            raise RemoteProtocolError("a scan ended early", size_b=self.size_b, done_b=self.done_b)
        self._target.commit()

    def _unpacked(self, chunk: FullChunk, payload: memoryview) -> Buf:
        data: Buf = payload
        if chunk.packing is Packing.LZ4:
            try:
                data = cast(bytes, lz4.block.decompress(payload, uncompressed_size=chunk.size_b))
            except lz4.block.LZ4BlockError as exc:
                raise self._corrupt(chunk) from exc
        if len(data) != chunk.size_b or xxhash.xxh3_64_intdigest(data) != chunk.xxh:
            raise self._corrupt(chunk)
        return data

    def _corrupt(self, chunk: FullChunk) -> CorruptData:
        return CorruptData(
            "a piece of a scan was damaged on its way", hint="scan again", source=self._name, offset=chunk.offset_b
        )


class _NewFile:
    """A regular file, which gets its name at the end; zeros are holes."""

    def __init__(self, file: TempFile, path: Path) -> None:
        self._file = file
        self._path = path

    def begin(self, size_b: int) -> None:
        self._file.truncate(size_b)

    def write(self, data: Buf, offset_b: int) -> None:
        self._file.pwrite(data, offset_b)

    def zero(self, offset_b: int, size_b: int) -> None:
        """Nothing: the file is new."""

    def commit(self) -> None:
        self._file.commit(self._path)


class _Device:
    """A block device: what it held is overwritten."""

    def __init__(self, file: File, path: Path) -> None:
        self._file = file
        self._path = path

    def begin(self, size_b: int) -> None:
        if self._file.size() < size_b:
            raise Refused(
                "the device is too small", path=str(self._path), size_b=self._file.size(), needed_b=size_b
            )

    def write(self, data: Buf, offset_b: int) -> None:
        self._file.pwrite(data, offset_b)

    def zero(self, offset_b: int, size_b: int) -> None:
        self._file.zero(offset_b, size_b)

    def commit(self) -> None:
        self._file.sync()


class _Stream:
    """Something that takes bytes in order."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def begin(self, size_b: int) -> None:
        """Nothing is to be prepared."""

    def write(self, data: Buf, offset_b: int) -> None:
        del offset_b
        self._stream.write(data)

    def zero(self, offset_b: int, size_b: int) -> None:
        for at in range(offset_b, offset_b + size_b, len(_ZEROS)):
            self._stream.write(_ZEROS[: min(len(_ZEROS), offset_b + size_b - at)])

    def commit(self) -> None:
        self._stream.flush()


@contextmanager
def image_sink(dest: str | Path | BinaryIO, name: str, fs: FileSystem | None = None) -> Iterator[ImageSink]:
    """Give a sink that writes to `dest`; an unfinished regular file vanishes at the end of the block."""
    fs = fs if fs is not None else OsFileSystem()
    if not isinstance(dest, str | Path):
        yield ImageSink(_Stream(dest), name)
        return
    path = Path(dest)
    if path.is_block_device():
        with fs.open(path, write=True) as device:
            yield ImageSink(_Device(device, path), name)
        return
    if path.exists() and not path.is_file():
        raise Refused("the destination is neither a file nor a block device", path=str(path))
    if not path.parent.is_dir():
        raise NotFound("no such directory", path=str(path.parent))
    with fs.temp_file(path.parent) as file:
        yield ImageSink(_NewFile(file, path), name)

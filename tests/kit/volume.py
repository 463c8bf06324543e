"""A device, or a mirrored pair of devices, with a memory of everything that was ever written to it.

The memory tells what a restored snapshot must be, also one that nobody asked for: the log is in order, so
every restore point is what the volume was after one of its writes. Each of these states has a number (`seq`)
and a digest; `state_of(image)` gives the number of an image's contents.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from tests.kit.nbd import NbdClient, NbdError
from tests.kit.process import Process

LB = 512
_PIECE = 64 << 10
_ZEROS = bytes(_PIECE)
Failed = (OSError, NbdError)  # what a device that is not there makes of a request


def digest_of(data: bytes | bytearray | memoryview) -> int:
    """Return a digest of an image that does not depend on how many zeros follow."""
    view = memoryview(data)
    total = 0
    for piece in range(0, len(view), _PIECE):
        part = view[piece : piece + _PIECE]
        if part == _ZEROS[: len(part)]:
            continue
        for at in range(0, len(part), LB):
            total ^= _block(piece + at, part[at : at + LB])
    return total


def _block(offset_b: int, block: memoryview | bytes | bytearray) -> int:
    if block == _ZEROS[: len(block)]:
        return 0
    return xxhash.xxh3_128_intdigest(block, seed=offset_b // LB)


@dataclass
class Leg:
    """One device of a volume."""

    storage: str  # name of the storage that protects it
    process: Process
    directory: Path
    ldev: Path
    ddev: Path
    client: NbdClient | None = None
    # When the leg has left the mirror: what it holds, and what was written without it.
    model: bytearray | None = None
    digest: int = 0
    missed: list[tuple[int, int]] = field(default_factory=list)

    @property
    def socket_path(self) -> Path:
        return self.directory / "nbd.sock"

    @property
    def nbd(self) -> NbdClient:
        if self.client is None:
            self.client = NbdClient(str(self.socket_path))
        return self.client

    def disconnect(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None


class Volume:
    """Devices with the same contents and a model of it. Writes go to all of them, as a mirror's do."""

    def __init__(self, name: str, legs: list[Leg], size_b: int) -> None:
        self.name = name
        self.legs = legs
        self.model = bytearray(size_b)  # changed by the methods only, if states are to be known
        self.rng = random.Random(f"{name} {size_b}")
        self.unsure: tuple[int, bytes] | None = None  # a write or trim that was not answered
        self.seq = 0  # number of the state that the volume is in
        self.lineage = 0  # how many full backups there were: with each of them generations begin anew
        self.points: dict[tuple[int, int], tuple[int, int]] = {}  # (lineage, gid): between which states it was
        self.lock = threading.RLock()
        self._digest = 0
        self._states: dict[int, list[int]] = {0: [0]}
        self._load: Load | None = None

    # The first device, where there is one only

    @property
    def process(self) -> Process:
        return self.legs[0].process

    @property
    def directory(self) -> Path:
        return self.legs[0].directory

    @property
    def socket_path(self) -> Path:
        return self.legs[0].socket_path

    @property
    def nbd(self) -> NbdClient:
        return self.legs[0].nbd

    # Requests

    def write(self, offset_b: int, data: bytes) -> None:
        self._change(offset_b, data, lambda nbd: nbd.write(offset_b, data))

    def trim(self, offset_b: int, size_b: int) -> None:
        self._change(offset_b, bytes(size_b), lambda nbd: nbd.trim(offset_b, size_b))

    def flush(self) -> None:
        """Make everything that was written permanent."""
        with self.lock:
            self._on_legs(lambda nbd: nbd.flush(), 0, 0)

    def settle(self) -> int:
        """Find out about a write that was not answered, flush, and return the number of the state."""
        with self.lock:
            if self.unsure is not None:
                self.reconcile()
            self.flush()
            return self.seq

    def read_all(self, leg: int = 0) -> bytes:
        step = 1 << 20
        with self.lock:
            size, nbd = len(self.model), self.legs[leg].nbd
            return b"".join(nbd.read(at, min(step, size - at)) for at in range(0, size, step))

    def scribble(self, count: int = 20) -> None:
        """Make `count` random writes, trims and zero writes, then flush."""
        for _ in range(count):
            self.scribble_once(self.rng)
        self.flush()

    def scribble_once(self, rng: random.Random) -> None:
        """Make one random write, trim or zero write."""
        size = rng.choice([512, 4096, 4096, 8192, 65536])
        offset = rng.randrange(0, (len(self.model) - size) // 512 + 1) * 512
        kind = rng.random()
        if kind < 0.1:
            self.trim(offset, size)
        elif kind < 0.2:
            self.write(offset, bytes(size))
        else:
            self.write(offset, rng.randbytes(size // 2) + b"walb" * (size // 8))

    @contextmanager
    def load(self, *, bytes_per_s: float = 2e6) -> Iterator[Load]:
        """Write all the time while the block runs, also across deaths of the device."""
        self.start_load(bytes_per_s=bytes_per_s)
        try:
            assert self._load is not None
            yield self._load
        finally:
            self.stop_load()

    def start_load(self, *, bytes_per_s: float = 2e6) -> None:
        assert self._load is None
        self._load = Load(self, bytes_per_s)

    def stop_load(self) -> None:
        if self._load is not None:
            load, self._load = self._load, None
            load.stop()

    # Failures of devices

    def disconnect(self) -> None:
        for leg in self.legs:
            leg.disconnect()

    def reconcile(self) -> None:
        """After a device was killed and has started: an unanswered write has happened or not, block by block."""
        with self.lock:
            self.disconnect()
            if self.unsure is None:
                return
            offset, data = self.unsure
            good = [leg for leg in self.legs if leg.model is None]  # never none: the last one stays
            now = good[0].nbd.read(offset, len(data))
            for at in range(0, len(data), LB):
                old, new = self.model[offset + at : offset + at + LB], data[at : at + LB]
                found = now[at : at + LB]
                assert found in (old, new), f"block at {offset + at} is neither old nor new"
            for leg in good[1:]:
                leg.nbd.write(offset, now)
            for leg in self.legs:
                if leg.model is not None:
                    leg.missed.append((offset, len(data)))
            self._record(offset, now)
            self.unsure = None

    def rejoin(self, index: int) -> None:
        """Copy to a device what was written while it was away from the mirror."""
        with self.lock:
            leg = self.legs[index]
            leg.disconnect()
            if leg.model is None:
                return
            for number, (offset, size) in enumerate(leg.missed):
                if number == 0:  # in the middle of which it failed
                    self._record_leg(leg, offset, leg.nbd.read(offset, size))
                data = bytes(self.model[offset : offset + size])
                leg.nbd.write(offset, data)
                self._record_leg(leg, offset, data)
            leg.nbd.flush()
            assert leg.model == self.model
            leg.model = None
            leg.missed.clear()

    def grow(self, size_b: int) -> None:
        """The devices have grown."""
        with self.lock:
            self.disconnect()
            self.model += bytes(size_b - len(self.model))
            for leg in self.legs:
                if leg.model is not None:
                    leg.model += bytes(size_b - len(leg.model))

    # What was when

    def begin_lineage(self) -> None:
        """A full backup begins: generations begin anew."""
        self.lineage += 1

    def forget_after(self, gid: int) -> None:
        """Snapshots after `gid` are lost, and their numbers are given to others."""
        for lineage, point in list(self.points):
            if lineage == self.lineage and point > gid:
                del self.points[lineage, point]

    def states_of(self, image: bytes) -> list[int]:
        """Return the numbers of the states that an image may be; empty: the volume never was that."""
        return self._states.get(digest_of(image), [])

    def _change(self, offset_b: int, data: bytes, request: Callable[[NbdClient], None]) -> None:
        with self.lock:
            assert self.unsure is None, "reconcile first"
            self.unsure = (offset_b, data)
            self._on_legs(request, offset_b, len(data))
            self._record(offset_b, data)
            self.unsure = None

    def _on_legs(self, request: Callable[[NbdClient], None], offset_b: int, size_b: int) -> None:
        for leg in self.legs:
            if leg.model is not None:
                if size_b:
                    leg.missed.append((offset_b, size_b))
                continue
            try:
                request(leg.nbd)
            except Failed:
                leg.disconnect()
                others = [other for other in self.legs if other is not leg and other.model is None]
                if not others:
                    raise
                leg.model, leg.digest = bytearray(self.model), self._digest
                leg.missed = [(offset_b, size_b)] if size_b else []

    def _record(self, offset_b: int, data: bytes) -> None:
        delta = _difference(self.model, offset_b, data)
        self.model[offset_b : offset_b + len(data)] = data
        self._digest ^= delta
        self.seq += 1
        self._know(self._digest)

    def _record_leg(self, leg: Leg, offset_b: int, data: bytes) -> None:
        assert leg.model is not None
        leg.digest ^= _difference(leg.model, offset_b, data)
        leg.model[offset_b : offset_b + len(data)] = data
        self._know(leg.digest)

    def _know(self, digest: int) -> None:
        seqs = self._states.setdefault(digest, [])
        if not seqs or seqs[-1] != self.seq:
            seqs.append(self.seq)


def _difference(model: bytearray, offset_b: int, data: bytes) -> int:
    """Return by what the digest changes when `data` is written."""
    delta = 0
    for at in range(0, len(data), LB):
        old, new = model[offset_b + at : offset_b + at + LB], data[at : at + LB]
        if old != new:
            delta ^= _block(offset_b + at, old) ^ _block(offset_b + at, new)
    return delta


class Load:
    """A thread that writes to a volume. What it writes comes from a random sequence of its own."""

    def __init__(self, volume: Volume, bytes_per_s: float) -> None:
        self.volume = volume
        self.written_b = 0
        self.error: BaseException | None = None
        self._rate = bytes_per_s
        self._rng = random.Random(f"load {volume.name} {volume.seq}")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"load-{volume.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and raise what has gone wrong."""
        self._end.set()
        self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                began = time.monotonic()
                size = self._burst()
                self.written_b += size
                rest_s = size / self._rate - (time.monotonic() - began)
                self._end.wait(max(0.002, rest_s) if size else 0.02)
        except BaseException as exc:
            self.error = exc

    def _burst(self) -> int:
        volume, size = self.volume, 0
        for n in range(8):
            with volume.lock:
                if self._end.is_set():
                    break
                try:
                    if volume.unsure is not None:
                        volume.reconcile()
                    volume.scribble_once(self._rng)
                    if n == 7:
                        volume.flush()
                except Failed:  # the device was killed: it comes back, or the test ends the load
                    volume.disconnect()
                    break
            size += 16384
        return size

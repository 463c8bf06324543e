"""The directory of one volume at a proxy. Blocking: everything here runs in a pool.

    VOL/volume.json             the record: size, archives
    VOL/received/*.wdiff        just converted; normally empty: each is linked to every archive and removed here
    VOL/sendto/ARCHIVE/*.wdiff  hard links: what this archive has still to get

File names carry all that is known of a wdiff (docs/metadata.md, File names). The order of steps makes every
crash harmless: a wdiff has its last name before it loses another, so after a crash it has too many names, never
too few; a wdiff that an archive has got already is refused there as too old. Source: docs/proxy.md, Files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import msgspec
import structlog

from walbd.daemon.record import RECORD_NAME, load_record, save_record
from walbd.errors import AlreadyExists, CorruptData, DiskFailed, NotFound
from walbd.format.meta import BadLabel, Diff, DiffIndex, diff_name, is_diff_name, parse_diff_name
from walbd.format.wdiff_read import open_wdiff
from walbd.fs import TMP_PREFIX, FileSystem, failpoints
from walbd.fs.disk import disk_errors

log = structlog.get_logger()

RECEIVED: Final = "received"
SENDTO: Final = "sendto"
QUARANTINED: Final = ".quarantined"  # suffix of a wdiff that was put aside: kept, never sent
DAMAGED: Final = ".damaged"  # the same, of one whose bytes are not what they were
_OTHER: Final = re.compile(r"(.+)\.other-[0-9a-f]{32}")  # a wdiff, and the history (uuid) that it is of

FP_RECORD_BEFORE_SAVE: Final = failpoints.register(
    "proxy.record.before_save", "the old record; a new archive has an empty directory, a deleted one still all"
)
FP_VOLUME_BEFORE_REMOVE: Final = failpoints.register(
    "proxy.volume.before_remove", "a record that says the volume is being cleared; start-up finishes it"
)
FP_ARCHIVE_BEFORE_REMOVE: Final = failpoints.register(
    "proxy.archive.before_remove", "a directory whose archive is deleted by the record; start-up removes it"
)
FP_WDIFF_BEFORE_LINK: Final = failpoints.register(
    "proxy.wdiff.before_link", "wdiffs in received/ that some archives' directories lack; start-up links them"
)
FP_WDIFF_AFTER_LINK: Final = failpoints.register(
    "proxy.wdiff.after_link", "wdiffs linked to every archive and still in received/; start-up links them again"
)
FP_WDIFF_BEFORE_UNLINK: Final = failpoints.register(
    "proxy.wdiff.before_unlink_received", "the same, with some of them gone from received/"
)
FP_WDIFF_BEFORE_ASIDE: Final = failpoints.register(
    "proxy.wdiff.before_aside", "a damaged wdiff under its own name: the next send finds it again"
)
FP_WDIFF_AFTER_ASIDE: Final = failpoints.register(
    "proxy.wdiff.after_aside", "a damaged wdiff that is put aside: start-up lists it as missing"
)
FP_SEND_BEFORE_DELETE: Final = failpoints.register(
    "proxy.send.before_delete", "wdiffs that the archive has: they are offered again and refused as too old"
)


class ArchiveEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how wdiffs go to one archive."""

    address: str
    compress: str
    delay_s: Annotated[int, msgspec.Meta(ge=0)] = 0


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a proxy must remember of a volume beside its wdiffs."""

    size_lb: Annotated[int, msgspec.Meta(ge=0)] = 0  # the largest size that a storage has announced
    archives: dict[str, ArchiveEntry] = {}
    removing: list[str] = []  # archives that were deleted: what is in their directories goes
    clearing: bool = False  # the whole volume goes


Others = dict[Diff, list[str]]  # names of wdiffs of other histories with the same snapshots, oldest first


@dataclass
class Listing:
    """What the directory of a volume holds."""

    received: DiffIndex = field(default_factory=DiffIndex)
    sendto: dict[str, DiffIndex] = field(default_factory=dict)
    others: dict[str, Others] = field(default_factory=dict)  # by archive
    damaged: dict[str, list[Diff]] = field(default_factory=dict)  # put aside, by archive
    troubles: list[str] = field(default_factory=list)  # files and directories that a person should look at


class VolumeStore:
    """Reads and changes the directory of one volume."""

    def __init__(self, fs: FileSystem, path: Path) -> None:
        self.fs = fs
        self.path = path
        self.received = path / RECEIVED

    def sendto(self, archive: str) -> Path:
        """Return the directory of what an archive has still to get."""
        return self.path / SENDTO / archive

    # --- the volume

    def create(self) -> None:
        """Make the directories of a new volume; it does not exist before its record is saved."""
        self.fs.make_dir(self.path)
        self.fs.make_dir(self.received)
        self.fs.make_dir(self.path / SENDTO)

    def save(self, record: VolumeRecord) -> None:
        """Replace the record durably."""
        path = self.path / RECORD_NAME
        _hit(FP_RECORD_BEFORE_SAVE, path, "write")
        save_record(self.fs, path, record)

    def load(self) -> VolumeRecord | None:
        """Read the record and finish what a crash has cut; None: the volume is no more (or never was).

        Raises CorruptData or DiskFailed.
        """
        try:
            record = load_record(self.fs, self.path / RECORD_NAME, VolumeRecord)
        except NotFound as exc:
            self._check_unfinished(exc)
            return None
        if record.clearing:
            self._remove_all()
            return None
        self._delete_temporary(self.path)
        for archive in record.removing:
            if archive not in record.archives:
                self.fs.remove_tree(self.sendto(archive))
        return record

    def remove(self) -> None:
        """Remove everything, unsent wdiffs included; the record says `clearing` by now."""
        _hit(FP_VOLUME_BEFORE_REMOVE, self.path, "remove")
        self._remove_all()

    def discard(self) -> None:
        """Remove what `create` made for a volume that did not come to be."""
        self._remove_all()

    # --- archives

    def add_archive(self, archive: str) -> None:
        """Make the directory of a new archive; an empty one may be there from an attempt that a crash has cut."""
        path = self.sendto(archive)
        if self.fs.is_dir(path):
            if any(not name.startswith(TMP_PREFIX) for name in self.fs.list_names(path)):
                raise AlreadyExists(
                    "there is a directory of that archive, and it is not empty",
                    hint="look at what is in it and move it away",
                    path=str(path),
                )
            return
        self.fs.make_dir(path)

    def remove_archive(self, archive: str) -> None:
        """Remove an archive's directory; the record has named it in `removing` before."""
        path = self.sendto(archive)
        _hit(FP_ARCHIVE_BEFORE_REMOVE, path, "remove")
        self.fs.remove_tree(path)

    # --- wdiffs

    def look(self, archives: Iterable[str]) -> Listing:
        """Rebuild everything from the names of files; delete temporary files, make missing directories.

        Of two wdiffs with the same snapshots but other flags or times the newer is kept, the other put aside.
        """
        wanted = list(archives)
        for path in [self.received, self.path / SENDTO, *map(self.sendto, wanted)]:
            if not self.fs.is_dir(path):
                self.fs.make_dir(path)
        listing = Listing()
        listing.received = self._list_diffs(self.received, listing.troubles)
        for name in self.fs.list_names(self.path / SENDTO):
            path = self.sendto(name)
            if name in wanted and self.fs.is_dir(path):
                listing.others[name] = {}
                listing.sendto[name] = self._list_diffs(path, listing.troubles, listing.others[name])
                listing.damaged[name] = self._list_damaged(path)
            else:
                # Only what the record says to be deleted is deleted: this may be what is left of an archive
                # that was lost from the record, with wdiffs that nobody else has.
                listing.troubles.append(f"not a known archive: {path}")
        for trouble in listing.troubles:
            log.warning("volume.trouble_found", path=str(self.path), trouble=trouble)
        return listing

    def link(self, archive: str, diffs: Sequence[tuple[Diff, Diff | None]]) -> list[tuple[Diff, str]]:
        """Give received wdiffs a name in an archive's directory, durably. Each comes with what is there already.

        Of one history what was received last is right: a file of the same name is replaced, one of another name
        is put aside. One of another history may still be needed, if the backup that the new one is of fails: it
        is renamed, to be brought back then (`bring_back`). Returns what it is now: the diff and its name.
        """
        target = self.sendto(archive)
        others = []
        for diff, known in diffs:
            source = self.received / diff_name(diff)
            other = self._set_other_aside(source, target, known) if known is not None else ""
            if other:
                others.append((diff, other))
            _hit(FP_WDIFF_BEFORE_LINK, target, "link")
            self._link_over(source, target)
            if known is not None and not other and diff_name(known) != diff_name(diff):
                self._quarantine(target, diff_name(known), "a newer wdiff of the same snapshots was received")
        self.fs.sync_dir(target)
        return others

    def put_aside_damaged(self, archive: str, diff: Diff) -> None:
        """Take a damaged wdiff out of what an archive is to get; it is kept under a longer name.

        A crash, or a sync that fails, may bring the old name back: then it is found to be damaged once more.
        """
        target, name = self.sendto(archive), diff_name(diff)
        _hit(FP_WDIFF_BEFORE_ASIDE, target, "rename")
        self.fs.rename(target / name, target / (name + DAMAGED))
        try:
            self.fs.sync_dir(target)
            _hit(FP_WDIFF_AFTER_ASIDE, target, "sync")
        except DiskFailed as exc:
            log.warning("wdiff.aside_not_synced", path=str(target / name), error=str(exc))

    def set_aside_received(self, diff: Diff) -> None:
        """Put a received wdiff aside: one of the same snapshots, under another name, has come since."""
        self._quarantine(self.received, diff_name(diff), "a newer wdiff of the same snapshots was received")

    def unlink_received(self, diffs: Sequence[Diff]) -> None:
        """Remove received wdiffs that every archive's directory has."""
        _hit(FP_WDIFF_AFTER_LINK, self.received, "remove")
        for diff in diffs:
            _hit(FP_WDIFF_BEFORE_UNLINK, self.received, "remove")
            self.fs.unlink(self.received / diff_name(diff))

    def unlink_sent(self, archive: str, diffs: Sequence[Diff], others: Sequence[str] = ()) -> None:
        """Remove wdiffs that an archive does not need any more, and such ones of other histories."""
        target = self.sendto(archive)
        for name in (*others, *map(diff_name, diffs)):
            _hit(FP_SEND_BEFORE_DELETE, target, "remove")
            self.fs.unlink(target / name)

    def bring_back(self, archive: str, name: str) -> Diff:
        """Give a wdiff of another history its own name again, as the one that took its place is gone."""
        target = self.sendto(archive)
        own = _own_name(name)
        self.fs.rename(target / name, target / own)
        self.fs.sync_dir(target)
        log.info("wdiff.brought_back", path=str(target / own))
        return parse_diff_name(own, size_b=self.fs.size_of(target / own))

    # --- inside

    def _check_unfinished(self, reason: NotFound) -> None:
        """Remove an unfinished volume, or raise: wdiffs without a record are not for us to throw away."""
        found = [f"{RECEIVED}/{name}" for name in self._names(self.received)]
        for archive in self._names(self.path / SENDTO):
            found += [f"{SENDTO}/{archive}/{name}" for name in self._names(self.sendto(archive))]
        found += [name for name in self._names(self.path) if name not in (RECEIVED, SENDTO)]
        if any(not name.rpartition("/")[2].startswith(TMP_PREFIX) for name in found):
            raise CorruptData(
                "the record of the volume is missing",
                hint="restore volume.json, or clear the volume and add its archives again; "
                "wdiffs not yet sent are then lost, and a hash backup must continue",
                path=str(self.path / RECORD_NAME),
                offset=0,
            ) from reason
        log.info("volume.leftover_removed", path=str(self.path))
        self._remove_all()

    def _names(self, path: Path) -> list[str]:
        return self.fs.list_names(path) if self.fs.is_dir(path) else []

    def _remove_all(self) -> None:
        """Remove the directory, the record last: what says that the rest is garbage must outlive it."""
        self.fs.remove_tree(self.received)
        self.fs.remove_tree(self.path / SENDTO)
        self.fs.remove_tree(self.path)

    def _delete_temporary(self, path: Path) -> None:
        for name in self.fs.list_names(path):
            if name.startswith(TMP_PREFIX):
                self.fs.unlink(path / name)

    def _list_diffs(self, path: Path, troubles: list[str], others: Others | None = None) -> DiffIndex:
        self._delete_temporary(path)
        diffs = []
        beside: Others = {} if others is None else others
        for name in sorted(self.fs.list_names(path)):
            try:
                own = _own_name(name)
                if own and others is not None:
                    beside.setdefault(parse_diff_name(own, size_b=0), []).append(name)
                    continue
                diffs.append(parse_diff_name(name, size_b=self.fs.size_of(path / name)))
            except BadLabel:
                if is_diff_name(name):
                    troubles.append(f"not the name of a wdiff: {path / name}")
                elif name.endswith(DAMAGED) and others is not None:
                    pass  # `_list_damaged`
                elif name.endswith(QUARANTINED):
                    troubles.append(f"a wdiff that was put aside: {path / name}")
                else:
                    troubles.append(f"not a wdiff: {path / name}")
        index, duplicates = DiffIndex.load(diffs)
        for diff in duplicates:
            self._quarantine(path, diff_name(diff), "two wdiffs of the same snapshots")
            troubles.append(f"a wdiff that was put aside: {path / (diff_name(diff) + QUARANTINED)}")
        for diff in [diff for diff in beside if index.find(diff.begin, diff.end) is None]:
            index.add(self.bring_back(path.name, beside[diff].pop()))  # a crash came before it
            if not beside[diff]:
                del beside[diff]
        return index

    def _list_damaged(self, path: Path) -> list[Diff]:
        """Return the labels of damaged wdiffs that were put aside, by begin gid."""
        found = []
        for name in self.fs.list_names(path):
            if name.endswith(DAMAGED):
                try:
                    found.append(parse_diff_name(name.removesuffix(DAMAGED), size_b=self.fs.size_of(path / name)))
                except BadLabel:
                    log.warning("volume.trouble_found", path=str(path), trouble=f"not a wdiff: {name}")
        return sorted(found, key=lambda diff: (diff.begin.gid_b, diff.end.gid_b))

    def _set_other_aside(self, source: Path, target: Path, known: Diff) -> str:
        """Rename a wdiff that is of another history than `source`; return its name then, empty if it is not."""
        name = diff_name(known)
        try:
            uuid = self._uuid_of(target / name)
            if uuid == self._uuid_of(source):
                return ""
            other = f"{name}.other-{uuid.hex()}"
            self.fs.rename(target / name, target / other)
        except (CorruptData, NotFound):
            return ""
        log.info("wdiff.of_another_history", path=str(target / other))
        return other

    def _uuid_of(self, path: Path) -> bytes:
        with self.fs.open(path) as file:
            return open_wdiff(file).header.uuid

    def _link_over(self, path: Path, directory: Path) -> None:
        """Link a file into a directory; a file of the same name is replaced, never missing in between."""
        try:
            self.fs.link(path, directory / path.name)
        except NotFound:
            # An earlier attempt that was cut short has linked it and removed it from received/.
            if not self.fs.exists(directory / path.name):
                raise
        except AlreadyExists:
            middle = directory / f"{TMP_PREFIX}-{path.name}"
            self.fs.unlink(middle)
            self.fs.link(path, middle)
            self.fs.rename(middle, directory / path.name)
            self.fs.unlink(middle)  # rename does nothing when both names are the same file

    def _quarantine(self, directory: Path, name: str, reason: str) -> None:
        log.error("wdiff.quarantined", path=str(directory / name), reason=reason)
        try:
            self.fs.rename(directory / name, directory / (name + QUARANTINED))
        except NotFound:
            log.error("wdiff.missing", path=str(directory / name))


def _own_name(name: str) -> str:
    """Return the own name of a wdiff that is kept beside one of another history; empty for other names."""
    match = _OTHER.fullmatch(name)
    return match[1] if match is not None else ""


def _hit(name: str, path: Path, what: str) -> None:
    """Hit a failpoint; a disk error made there looks like one of the disk."""
    with disk_errors(path, what):
        failpoints.hit(name)

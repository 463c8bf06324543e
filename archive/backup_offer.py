"""What is asked of every backup that a storage offers, before anything is changed."""

from __future__ import annotations

from walbd.archive.slots import Slots
from walbd.archive.states import Command
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection
from walbd.errors import Busy, Refused, UsageError
from walbd.protocol.base import Kind


def check_backup(volume: Volume, command: Command, slots: Slots, conn: Connection, size_lb: int) -> None:
    """Raise unless a backup of a device of this size may begin now."""
    if conn.peer.kind is not Kind.STORAGE:
        raise Refused("backups are taken from storages only", command=str(command), sender=str(conn.peer.kind))
    if size_lb == 0:
        raise UsageError("a volume of size 0 cannot be backed up", volume=volume.name)
    volume.check(command)
    if slots.is_full:
        raise Busy("too many backups are running", hint="try again when one has ended", backups_max=slots.n_max)

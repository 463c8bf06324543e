"""What the doctor can find: stable codes, how bad each is, and what is at risk. Described in docs/recovery.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from walbd.controller.doctor.steps import Consent, Step, greatest
from walbd.controller.overview import Word

Fact = str | int | float | bool | list[str]


class Rank(NamedTuple):
    """The place of a finding in the order of mending: first ways, then data, then what depends on it."""

    number: int
    name: str


SERVERS: Final = Rank(0, "servers")
WAYS: Final = Rank(1, "who talks to whom")
STARTS: Final = Rank(2, "what is stopped")
FEEDING: Final = Rank(3, "proxies")
ARCHIVES: Final = Rank(4, "archives")
STORAGES: Final = Rank(5, "storages")
BACKUPS: Final = Rank(6, "backups")
REPLICAS: Final = Rank(7, "replicas")
NOTES: Final = Rank(8, "to know")


class Kind(NamedTuple):
    """A code: how bad it is, where mending it comes in the order, and what is at risk as long as it lasts."""

    word: Word
    rank: Rank
    title: str
    risk: str


_W, _E, _D = Word.WARN, Word.ERROR, Word.DOWN

CODES: Final[Mapping[str, Kind]] = {
    # servers
    "storage-down": Kind(_D, SERVERS, "a storage does not answer", "its logs fill; a full log is an overflow"),
    "proxy-down": Kind(_D, SERVERS, "a proxy does not answer", "what it has not sent yet is not at the archives"),
    "all-proxies-down": Kind(_D, SERVERS, "no proxy answers", "the logs fill; a full log is an overflow"),
    "archive-down": Kind(
        _D, SERVERS, "an archive does not answer", "diffs pile up at the proxies until their disks are full"
    ),
    "wrong-server": Kind(_E, SERVERS, "another server answers", "diffs and commands go to the wrong place"),
    "version-mismatch": Kind(_W, SERVERS, "servers run different versions", "requests may not be understood"),
    "clock-skew": Kind(_W, SERVERS, "the clocks differ", "times of snapshots are wrong; generations are not"),
    "disk-full": Kind(_E, SERVERS, "a disk is full, or nearly", "data is refused, and waits at the hop before"),
    "server-error": Kind(_E, SERVERS, "a server has a problem", "see the text"),
    "device-down": Kind(_D, SERVERS, "a device does not answer", "the application cannot write, nothing is sent"),
    # who talks to whom
    "wrong-primary": Kind(
        _E, WAYS, "a storage has another primary archive than the group file", "backups go to the wrong archive"
    ),
    "wrong-proxies": Kind(
        _W, WAYS, "a storage uses other proxies than the group file names", "a proxy is not used, or not seen here"
    ),
    "wrong-archive-address": Kind(
        _E, WAYS, "a proxy sends to another address than the archive has", "the archive gets nothing"
    ),
    "proxy-unreachable": Kind(
        _W, WAYS, "a storage cannot reach a proxy that lives", "the storage has one proxy less; see its network"
    ),
    # what is stopped
    "proxy-stopped": Kind(_W, STARTS, "a volume is stopped at a proxy", "if all are stopped, the log fills"),
    "archive-stopped": Kind(_E, STARTS, "a volume is stopped at an archive", "diffs pile up at the proxies"),
    "archive-smaller": Kind(
        _E, STARTS, "the image at an archive is smaller than the volume", "diffs are refused, and pile up"
    ),
    "apply-interrupted": Kind(
        _W, STARTS, "an apply was interrupted", "nothing, as the diffs are kept; they take room"
    ),
    "send-error": Kind(_E, STARTS, "an archive refuses diffs", "diffs pile up at the proxies"),
    # proxies
    "proxy-data-lost": Kind(
        _E, FEEDING, "a proxy has lost a volume", "the proxy is of no use for the volume; unsent diffs are lost"
    ),
    "archive-not-fed": Kind(
        _E, FEEDING, "a proxy does not send to an archive", "what takes this way never comes to the archive"
    ),
    "unwanted-feed": Kind(
        _W, FEEDING, "a proxy sends to an archive that is not wanted", "diffs may pile up for nobody"
    ),
    "wdiff-damaged": Kind(
        _E, FEEDING, "diffs were damaged at a proxy and are put aside", "what follows them can never be applied"
    ),
    # archives
    "primary-data-lost": Kind(
        _E, ARCHIVES, "the primary archive has lost a volume", "the history; backup does not go on"
    ),
    "archive-broken": Kind(_E, ARCHIVES, "an archive cannot read a volume", "its restore points there"),
    # storages
    "storage-metadata-lost": Kind(
        _E, STORAGES, "a storage has lost its knowledge of a volume", "the log fills; what is written is not sent"
    ),
    "storage-broken": Kind(_E, STORAGES, "a storage cannot read a volume's record", "nothing is sent"),
    "two-targets": Kind(_E, STORAGES, "several storages are target", "two histories are mixed up"),
    "other-target": Kind(
        _W, STORAGES, "another storage is target than the group file names", "recovery goes by a wrong group file"
    ),
    "overflow-standby": Kind(_W, STORAGES, "the log of a standby volume has overflowed", "nothing"),
    "storage-stopped": Kind(_E, STORAGES, "the target is stopped", "the log fills; a full log is an overflow"),
    # backups
    "overflow": Kind(
        _E, BACKUPS, "the log of the target has overflowed", "what is written since then is not backed up"
    ),
    "orphan": Kind(
        _E, BACKUPS, "the log is not the one that the history continues", "what is written is not backed up"
    ),
    "gap": Kind(
        _E, BACKUPS, "generations are lost between a proxy and the archive", "later diffs can never be applied"
    ),
    "no-target": Kind(_E, BACKUPS, "no storage sends the volume", "what is written is not backed up"),
    # replicas
    "secondary-data-lost": Kind(
        _W, REPLICAS, "an archive that is not the primary has lost a volume", "there is one copy less"
    ),
    "replica-not-fed": Kind(_W, REPLICAS, "a replica gets no diffs", "it falls behind: there is one copy less"),
    "replica-behind": Kind(_W, REPLICAS, "a replication of the policy is late", "the replica falls behind"),
    "replica-gap": Kind(_W, REPLICAS, "a replica misses generations", "it takes no diffs: there is one copy less"),
    "replica-other-lineage": Kind(
        _W, REPLICAS, "a replica holds another history than the primary", "it takes no diffs; it may hold the past"
    ),
    # to know
    "log-filling": Kind(_E, NOTES, "a log is nearly full", "a full log is an overflow"),
    "log-not-sent": Kind(_E, NOTES, "a storage cannot send its log", "the log fills; a full log is an overflow"),
    "lagging": Kind(_W, NOTES, "an archive is far behind", "what it lacks is lost with the storage"),
    "possible-gap": Kind(
        _W, NOTES, "generations are missing, and a proxy that may have them cannot be asked", "see gap"
    ),
    "policy-trouble": Kind(
        _W, NOTES, "a policy cannot do its work", "chains grow, points older than wanted stay, or replicas wait"
    ),
    "stuck": Kind(_E, NOTES, "a step does not go on", "the volume waits for it"),
    "job-failed": Kind(_W, NOTES, "the last run of a job has failed", "what it was to do is not done"),
    "put-aside": Kind(_W, NOTES, "an archive has put files aside", "nothing, if no gap is found; they take room"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, what shows it, and what mends it."""

    code: str
    text: str
    server: str = ""
    volume: str = ""
    word: Word
    evidence: Mapping[str, Fact] = field(default_factory=dict)
    risk: str = ""
    by_hand: str = ""  # what only a person can do, first
    steps: tuple[Step, ...] = ()
    waits_for: tuple[str, ...] = ()  # servers that must answer before the steps are taken
    look_again: bool = False  # to be believed only when a second look shows it too

    @property
    def rank(self) -> Rank:
        return CODES[self.code].rank

    @property
    def consent(self) -> Consent:
        """What a person must agree to before the steps are taken."""
        return greatest([step.consent for step in self.steps])

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same finding at the next look."""
        return self.code, self.server, self.volume

    def to_json(self) -> dict[str, Any]:
        """Return what `walbc doctor --json` prints."""
        return {
            "code": self.code,
            "word": str(self.word),
            "server": self.server,
            "volume": self.volume,
            "text": self.text,
            "evidence": dict(self.evidence),
            "risk": self.risk,
            "by_hand": self.by_hand,
            "waits_for": list(self.waits_for),
            "consent": str(self.consent),
            "steps": [
                {"command": step.command, "python": step.python, "consent": str(step.consent)}
                for step in self.steps
            ],
        }


def finding(code: str, text: str, *, word: Word | None = None, risk: str = "", **more: Any) -> Finding:
    """Make a finding of a code, with the code's own severity and risk unless told otherwise."""
    kind = CODES[code]
    return Finding(code=code, text=text, word=word or kind.word, risk=risk or kind.risk, **more)

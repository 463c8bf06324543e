"""The metadata algebra: snapshots, diffs, base states, collections, gids (docs/metadata.md)."""

from walbd.format.meta.diff import (
    Diff,
    Relation,
    apply,
    apply_all,
    can_apply,
    can_merge,
    can_merge_all,
    contains,
    merge,
    merge_all,
    relation,
)
from walbd.format.meta.errors import BadLabel, NotApplicable, NotMergeable, NotReachable
from walbd.format.meta.index import DiffIndex, SnapshotChange
from walbd.format.meta.legacy import parse_base_file
from walbd.format.meta.manager import DiffManager
from walbd.format.meta.names import DIFF_SUFFIX, diff_name, is_diff_name, parse_diff_name
from walbd.format.meta.schedule import (
    NO_POINT,
    LogPoint,
    Transfer,
    drop_delivered,
    is_implicit_due,
    new_point,
    plan_transfer,
    point_after,
    reset_point,
    transfer_diff,
)
from walbd.format.meta.snapshot import NO_SNAPSHOT, Snapshot
from walbd.format.meta.state import (
    NO_BASE,
    BaseState,
    RestorePoint,
    full_backup_state,
    hash_backup_diff,
    hash_backup_gid,
    hash_replication_diff,
    starting_state,
)

__all__ = [
    "DIFF_SUFFIX",
    "NO_BASE",
    "NO_POINT",
    "NO_SNAPSHOT",
    "BadLabel",
    "BaseState",
    "Diff",
    "DiffIndex",
    "DiffManager",
    "LogPoint",
    "NotApplicable",
    "NotMergeable",
    "NotReachable",
    "Relation",
    "RestorePoint",
    "Snapshot",
    "SnapshotChange",
    "Transfer",
    "apply",
    "apply_all",
    "can_apply",
    "can_merge",
    "can_merge_all",
    "contains",
    "diff_name",
    "drop_delivered",
    "full_backup_state",
    "hash_backup_diff",
    "hash_backup_gid",
    "hash_replication_diff",
    "is_diff_name",
    "is_implicit_due",
    "merge",
    "merge_all",
    "new_point",
    "parse_base_file",
    "parse_diff_name",
    "plan_transfer",
    "point_after",
    "relation",
    "reset_point",
    "starting_state",
    "transfer_diff",
]

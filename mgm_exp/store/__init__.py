"""The store: keys, atomic files, sealed folders, leases, and stage outputs that are made once and shared."""

from mgm_exp.errors import DiskFullError, LeaseLost

from .claims import Heartbeat
from .collection import Dropped
from .entries import Entry, StageOutput, Store
from .files import (
    disk_full_named,
    encode_json,
    fsync_folder,
    hard_link_or_copy,
    link_tree,
    read_json,
    write_atomic,
    write_json_atomic,
)
from .foreign import parse_record, parse_yaml, read_record, read_text, read_yaml
from .hash_cache import cached_file_sha256s, cached_tree_fingerprint
from .keys import file_sha256, fingerprint, stage_key, tree_fingerprint
from .layout import lease_of
from .lease import Lease, LeaseHeld
from .mirror import Mirror
from .mounts import is_shared
from .pool import spawned_pool, usable_cores
from .processes import Process, die_with_parent, start_pool_process
from .sealed import MARK, newest_whole, prune, publish_folder, remove_folder, seal, verify
from .workers import WorkerHold, hold_shared

__all__ = [
    "MARK",
    "DiskFullError",
    "Dropped",
    "Entry",
    "Heartbeat",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "Mirror",
    "Process",
    "StageOutput",
    "Store",
    "WorkerHold",
    "cached_file_sha256s",
    "cached_tree_fingerprint",
    "die_with_parent",
    "disk_full_named",
    "encode_json",
    "file_sha256",
    "fingerprint",
    "fsync_folder",
    "hard_link_or_copy",
    "hold_shared",
    "is_shared",
    "lease_of",
    "link_tree",
    "newest_whole",
    "parse_record",
    "parse_yaml",
    "prune",
    "publish_folder",
    "read_json",
    "read_record",
    "read_text",
    "read_yaml",
    "remove_folder",
    "seal",
    "spawned_pool",
    "stage_key",
    "start_pool_process",
    "tree_fingerprint",
    "usable_cores",
    "verify",
    "write_atomic",
    "write_json_atomic",
]

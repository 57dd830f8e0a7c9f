"""What upkeep says that it found and did. Plain records, which any program may show."""

from datetime import datetime
from typing import Literal, NamedTuple

from core.store.manifest import Key, PartKind
from core.store.objects import Listed


class Holdings(NamedTuple):
    """What version `version` holds, and what lies on storage. Bytes of texts and adapters are those of live blobs.

    part_rows: superseded rows and tombstones too. shards: those that the version names, with `shard_bytes`. stored_bytes: of all
    shards and parts, older versions and orphans included. orphans: parts and shards that no version names.
    """

    version: int
    written: datetime
    documents: int
    text_bytes: int
    adapters: int
    adapter_bytes: int
    parts: int
    part_bytes: int
    part_rows: int
    shards: int
    shard_bytes: int
    stored_bytes: int
    orphans: int
    orphan_bytes: int
    producers: int
    specs: int


class Verified(NamedTuple):
    """What was read of version `sequence`, what is wrong with it, and what no version names (killed writers leave it behind)."""

    sequence: int
    roots: int
    parts: int
    documents: int
    adapters: int
    bytes: int
    faults: list[str]
    orphans: list[tuple[str, Listed]]


class Collected(NamedTuple):
    """What went, by name, and its bytes; unfinished uploads, and earlier versions that a bucket had kept, by number.

    young: objects that no root names and that are younger than the grace period: a writer may be about to name them.
    """

    roots: list[str]
    parts: list[str]
    shards: list[str]
    bytes: int
    unfinished: int
    earlier: int
    young: int


class Compacted(NamedTuple):
    """Parts and shards that the newest version names, before and after, and the bytes of the blobs that moved."""

    parts_before: int
    parts_after: int
    shards_before: int
    shards_after: int
    moved_bytes: int


class Erased(NamedTuple):
    """What an erasure took: live documents, live adapters, shards that were emptied and the live bytes that moved."""

    documents: int
    adapters: int
    shards: int
    moved_bytes: int
    collected: Collected | None


class Change(NamedTuple):
    """What became of one document or adapter."""

    change: Literal["added", "removed", "changed"]
    kind: PartKind
    key: Key

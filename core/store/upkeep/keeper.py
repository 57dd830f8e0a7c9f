"""All upkeep of a store behind one door: what it holds, whether it is sound, what can go, and what must.

In: the URL of a store. Out: the records of `core.store.upkeep.results`. Each call reads the newest version first and works beside
any number of readers and writers. What each does, holds and costs stands in its own module: `verification`, `compaction`,
`collection`, `erasure`, `comparison`.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from core.store.errors import StoreError
from core.store.index import Index
from core.store.opening import open_objects
from core.store.part_reader import CACHE_BYTES
from core.store.shards import FOLDER as SHARDS
from core.store.upkeep.collection import GRACE_S, MANIFEST, collect, orphans
from core.store.upkeep.compaction import compact
from core.store.upkeep.comparison import differences
from core.store.upkeep.erasure import Target, erase, matching
from core.store.upkeep.moving import Rewriter
from core.store.upkeep.results import Change, Collected, Compacted, Erased, Holdings, Verified
from core.store.upkeep.verification import THREADS, verify
from core.store.versions import Versions

_VERSION = re.compile(r"(.+)@(\d{1,19})")


class Upkeep:
    """Upkeep of one store. Nothing is read before it is asked for; then `StoreError` says where there is no store."""

    def __init__(self, url: str | Path) -> None:
        self._objects = open_objects(url)

    def holdings(self) -> Holdings:
        """Counts and bytes. Passes over the parts of all versions that stand, and lists shards and parts."""
        self._versions.refresh()
        root = self._versions.index.root
        named = Rewriter(self._objects, self._versions).named(root.parts)
        shards = {each.name: each.size for each in self._objects.listing(SHARDS)}
        left = orphans(self._objects, self._versions)
        return Holdings(
            version=root.sequence,
            written=root.created,
            documents=root.totals.documents,
            text_bytes=root.totals.text_bytes,
            adapters=root.totals.adapters,
            adapter_bytes=root.totals.adapter_bytes,
            parts=len(root.parts),
            part_bytes=sum(part.bytes for part in root.parts),
            part_rows=sum(part.rows for part in root.parts),
            shards=len(named),
            shard_bytes=sum(shards.get(shard, 0) for shard in named),
            stored_bytes=sum(shards.values()) + sum(each.size for each in self._objects.listing(MANIFEST)),
            orphans=len(left),
            orphan_bytes=sum(each.size for _, each in left),
            producers=len(root.producers),
            specs=len(root.specs),
        )

    def verify(self, threads: int = THREADS, progress: Callable[[int, int], object] = lambda done, total: None) -> Verified:
        """Reads and checks every live byte; a damaged root is a fault too. progress: is told the bytes read, and of all."""
        return verify(self._objects, threads, progress)

    def compact(self, moved: Callable[[int], object] = lambda blobs: None) -> Compacted:
        """Fills parts and shards. moved: is told the blobs of each round."""
        return compact(self._objects, self._versions, moved)

    def collect(self, grace_s: float = GRACE_S, dry_run: bool = False) -> Collected:
        """Deletes what no version needs and is older than the grace period; `ValueError` for too short a one."""
        return collect(self._objects, self._versions, grace_s, dry_run)

    def matching(self, tenant: str, collection: str | None = None, name: str | None = None, prefix: str = "") -> int:
        """How many live documents `erase` would take."""
        self._versions.refresh()
        return matching(self._versions.index, Target(tenant, collection, name, prefix))

    def erase(
        self,
        tenant: str,
        collection: str | None = None,
        name: str | None = None,
        prefix: str = "",
        hurry: bool = False,
        grace_s: float = GRACE_S,
        progress: Callable[[str], object] = lambda step: None,
    ) -> Erased:
        """Erases one document, or those of a prefix, a collection or a tenant; with `hurry` their bytes go at once.

        progress: is told each step as it begins. Raises `ValueError` for a name without collection.
        """
        return erase(self._objects, self._versions, Target(tenant, collection, name, prefix), hurry, grace_s, progress)

    def version(self, sequence: int | None = None) -> Index:
        """A version that stands, or the newest."""
        self._versions.refresh()
        if sequence is None:
            return self._versions.index
        return Index(self._versions.roots.read(sequence), self._versions.reader)

    @cached_property
    def _versions(self) -> Versions:
        versions = Versions(self._objects, CACHE_BYTES)
        if not versions.begin():
            raise StoreError(f"no store at {self._objects.url}: give the path of a store")
        return versions


def compare(before: str, after: str) -> Iterator[Change]:
    """What differs between two stores or versions, each a URL or `URL@version`; errors as of `differences`."""
    return differences(_version(before), _version(after))


def _version(url: str) -> Index:
    match = _VERSION.fullmatch(url)
    return Upkeep(url).version() if match is None else Upkeep(match[1]).version(int(match[2]))

"""Compaction: small parts and small shards become full ones, shards that are mostly dead are emptied.

In: a store. Out: a version with the same live rows in as few parts as there can be, and their blobs in shards of `SHARD_BYTES`.
It is a commit as any other; what it leaves behind is collected later (`core.store.upkeep.collection`). A shard that is at least
half full and at least half alive stays where it is.

Cost: the manifest is rewritten (`core.store.merging`); blobs that move are read and written once (`core.store.upkeep.moving`).
"""

from collections.abc import Callable, Sequence

from core.store.merging import Merger
from core.store.objects import Objects
from core.store.shards import SHARD_BYTES
from core.store.upkeep.moving import Rewriter, ShardUse
from core.store.upkeep.results import Compacted
from core.store.versions import Versions

_SMALL_BYTES = SHARD_BYTES // 2


def compact(objects: Objects, versions: Versions, moved: Callable[[int], object] = lambda blobs: None) -> Compacted:
    """Compacts. moved: is told the blobs of each round. Errors as of `Rewriter.move` and `Merger.merge_all`."""
    versions.refresh()
    rewriter, before = Rewriter(objects, versions), versions.index.root.parts
    shards_before = len(rewriter.named(before))
    Merger(objects, versions).merge_all()
    moved_bytes = rewriter.move(_wasteful(rewriter.survey(versions.index)), moved)
    after = versions.index.root.parts
    return Compacted(len(before), len(after), shards_before, len(rewriter.named(after)), moved_bytes)


def _wasteful(uses: Sequence[ShardUse]) -> list[ShardUse]:
    """What is worth moving, without shards that are missing."""
    there = [(use, use.size) for use in uses if use.size is not None]
    dead = [use for use, size in there if not use.whole and use.live_bytes < size / 2]
    small = [use for use, size in there if (use.whole or use.live_bytes >= size / 2) and size < _SMALL_BYTES]
    together = sum(use.live_bytes for use in [*dead, *small])
    return [*dead, *small] if -(-together // SHARD_BYTES) < len(dead) + len(small) else dead

"""Shards: blobs one after the other, each at a multiple of 64 bytes, in objects of a set size.

    shards/<uuid>.bin

In: blobs. Out: where each lies (`Location`); from locations, the blobs again, every byte checked. Knows nothing of what they
hold. A shard is written once and never edited. Cost: writing holds one blob and one part of an upload, whatever their number; a
blob is one ranged read for each 16 MB, and the blobs of one call are read side by side.
"""

import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from core.store.errors import CorruptObject
from core.store.manifest import Location, blob_hash
from core.store.objects import Objects

FOLDER = "shards"
ALIGNMENT_BYTES = 64
SHARD_BYTES = 2**28
_NAME = re.compile(r"[0-9a-f]{32}\.bin")


def write_blobs(objects: Objects, blobs: Iterable[bytes], shard_bytes: int = SHARD_BYTES) -> list[Location]:
    """Writes blobs, as they come, into new shards of at most `shard_bytes`, or of one blob; says where each lies, in their order.

    Where this raises, or `blobs` does, no shard is left.
    """
    locations: list[Location] = []
    waiting = iter(blobs)
    blob = next(waiting, None)

    def chunks(shard: str) -> Iterator[bytes]:
        nonlocal blob
        size = 0
        while blob is not None:
            padding = -size % ALIGNMENT_BYTES
            if size and size + padding + len(blob) > shard_bytes:
                return
            locations.append(Location(shard, size + padding, len(blob), blob_hash(blob)))
            yield bytes(padding)
            yield blob
            size += padding + len(blob)
            blob = next(waiting, None)

    with ExitStack() as undo:
        while blob is not None:
            shard = f"{uuid.uuid4().hex}.bin"
            undo.callback(objects.remove, f"{FOLDER}/{shard}")
            objects.write(f"{FOLDER}/{shard}", chunks(shard))
        undo.pop_all()
    return locations


def read_blobs(objects: Objects, locations: Sequence[Location]) -> list[bytes]:
    """The blobs, in their order. Raises `MissingObject` or `CorruptObject` naming the shard."""
    for location in locations:
        if not _NAME.fullmatch(location.shard):
            raise CorruptObject(f"{location.shard[:80]!r} is not the name of a shard")
    blobs = objects.read_ranges([(f"{FOLDER}/{each.shard}", each.offset, each.length) for each in locations])
    for (shard, offset, length, expected), blob in zip(locations, blobs, strict=True):
        if blob_hash(blob) != expected:
            raise CorruptObject(f"{FOLDER}/{shard} is damaged between bytes {offset} and {offset + length}")
    return blobs


def remove_shards(objects: Objects, shards: Iterable[str]) -> None:
    for shard in shards:
        objects.remove(f"{FOLDER}/{shard}")

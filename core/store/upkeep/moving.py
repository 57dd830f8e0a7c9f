"""Live blobs to new shards, and parts without the rows that are to go: what erasure and compaction are made of.

In: the newest version of a store. Out: the next one, with the same live rows in other places, or without some; whatever is
committed meanwhile lands too. Parts are rewritten one by one and keep their level; rows keep their sequence. Superseded rows
that point into shards that were emptied are left out on the way.

A blob is copied only where its row is live, and a copy counts only if that row is still live when it is committed: else what was
copied is thrown away and all begins anew. So a copy never brings back what was erased meanwhile.

Cost: a round reads and writes the blobs that it moves and reads each part once in a process; it holds 16 MB of blobs, a part and
200 bytes for each blob that it moves. `survey` holds 21 bytes a live row.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.store.errors import StoreError
from core.store.index import Index
from core.store.manifest import Location
from core.store.objects import Objects
from core.store.parts import SCHEMAS, Rows, encode_part
from core.store.roots import Part, Root, Totals
from core.store.shards import ALIGNMENT_BYTES, FOLDER, SHARD_BYTES, read_blobs, remove_shards, write_blobs
from core.store.versions import Versions

ROUND_BLOBS = 200_000
ROUND_BYTES = 2**32
_READ_BYTES = 2**24
_ATTEMPTS = 20
_COLUMNS = ["shard", "offset", "length", "blob_hash"]

Place = tuple[str, int, int]
"""(shard, offset, length)."""


class ShardUse(NamedTuple):
    """A shard that rows name: its size (None: it is missing), and the live blobs in it. whole: it holds nothing else."""

    shard: str
    size: int | None
    blobs: int
    live_bytes: int
    whole: bool


class _Rewritten(NamedTuple):
    """What became of a part, and which of the moved blobs its rows name."""

    parts: list[Part]
    moved: frozenset[Place]


class Rewriter:
    """Makes versions of one store with other parts. Remembers which shards a part names, so that a part is read no more often."""

    def __init__(self, objects: Objects, versions: Versions) -> None:
        self._objects = objects
        self._versions = versions
        self._named: dict[str, frozenset[str]] = {}

    def named(self, parts: Sequence[Part]) -> set[str]:
        """The shards that any rows of these parts name, superseded ones too."""
        return set().union(*(self._named_by(part) for part in parts))

    def survey(self, index: Index) -> list[ShardUse]:
        """The shards that rows of a version name, by name."""
        shards = sorted(self.named(index.root.parts))
        codes = {shard: code for code, shard in enumerate(shards)}
        columns: list[list[np.ndarray]] = [[], [], []]
        for table in chain.from_iterable(index.tables(kind) for kind in SCHEMAS):
            encoded = table["shard"].cast(pa.string()).combine_chunks().dictionary_encode()
            local = np.array([codes[shard] for shard in encoded.dictionary.to_pylist()], np.int32)[np.asarray(encoded.indices)]
            for column, values in zip(columns, (local, table["offset"], table["length"]), strict=True):
                column.append(np.asarray(values))
        empty = np.zeros(0, np.int64)
        code, offset, length = (np.concatenate([empty, *column]) for column in columns)
        order = np.lexsort((offset, code))
        code, offset, length = code[order], offset[order], length[order]
        bounds = np.searchsorted(code, np.arange(len(shards) + 1))
        sizes = {each.name: each.size for each in self._objects.listing(FOLDER)}
        uses = []
        for number, shard in enumerate(shards):
            here = slice(bounds[number], bounds[number + 1])
            ends = offset[here] + length[here]
            aligned = np.concatenate([[0], -(-ends // ALIGNMENT_BYTES) * ALIGNMENT_BYTES])
            whole = len(ends) > 0 and bool((offset[here] == aligned[:-1]).all()) and int(ends[-1]) == sizes.get(shard)
            uses.append(ShardUse(shard, sizes.get(shard), len(ends), int(length[here].sum()), whole))
        return uses

    def move(self, uses: Sequence[ShardUse], moved: Callable[[int], object] = lambda blobs: None) -> int:
        """Moves all live blobs of these shards to new ones, some shards at a time; says how many bytes that were.

        moved: is told the blobs of each round. Afterwards no row of the newest version names these shards. Raises
        `CorruptObject` or `MissingObject` for a blob that cannot be copied, `StoreError` where others are always faster.
        """
        total, blobs, live_bytes, some = 0, 0, 0, set[str]()
        for use in uses:
            some.add(use.shard)
            blobs, live_bytes = blobs + use.blobs, live_bytes + use.live_bytes
            if blobs >= ROUND_BLOBS or live_bytes >= ROUND_BYTES:
                total += self._round(some, moved)
                blobs, live_bytes, some = 0, 0, set()
        return total + (self._round(some, moved) if some else 0)

    def commit(
        self,
        change_rows: Callable[[Rows], Rows],
        totals: Callable[[Index], Totals],
        begin: Callable[[Index], bool] = lambda index: True,
    ) -> Root:
        """Makes a version of what `change_rows` leaves of each part: the same object where nothing is to change.

        begin: is asked at every attempt, and says whether what was rewritten for the one before still serves.
        """
        done: dict[str, list[Part]] = {}
        written: list[Part] = []

        def change(index: Index) -> Root:
            if not begin(index):
                done.clear()
            for part in index.root.parts:
                if part.name not in done:
                    done[part.name] = self._rewrite(part, change_rows, written)
            return index.root.next([new for part in index.root.parts for new in done[part.name]], totals(index))

        root = self._versions.commit(change)
        assert root is not None
        self._settle(root, written)
        return root

    def _round(self, sources: Collection[str], moved: Callable[[int], object]) -> int:
        for _ in range(_ATTEMPTS):
            began_s = time.monotonic()
            self._versions.refresh()
            old = list(self._live(self._versions.index, sources))
            new = write_blobs(self._objects, self._blobs(old), SHARD_BYTES)
            places = {(each.shard, each.offset, each.length): place for each, place in zip(old, new, strict=True)}
            if self._commit_moves(places, sources, began_s):
                moved(len(old))
                return sum(place.length for place in new)
            remove_shards(self._objects, {place.shard for place in new})
        raise StoreError(f"{self._objects.url}: other writers change what is to be moved all the time: try again later")

    def _commit_moves(self, places: dict[Place, Location], sources: Collection[str], began_s: float) -> bool:
        """False where a row of what was copied is not live any more."""
        done: dict[str, _Rewritten] = {}
        written: list[Part] = []

        def change(index: Index) -> Root | None:
            found: set[Place] = set()
            for part in index.root.parts:
                if part.name not in done:
                    hits = set[Place]()
                    parts = [part]
                    if not self._named_by(part).isdisjoint(sources):
                        parts = self._rewrite(part, partial(_moved, places=places, sources=sources, hits=hits), written)
                    done[part.name] = _Rewritten(parts, frozenset(hits))
                found |= done[part.name].moved
            if len(found) < len(places):
                return None
            return index.root.next([new for part in index.root.parts for new in done[part.name].parts])

        root = self._versions.commit(change, began_s)
        self._settle(root, written)
        return root is not None

    def _settle(self, root: Root | None, written: Sequence[Part]) -> None:
        used = set() if root is None else {part.name for part in root.parts}
        for part in written:
            if part.name not in used:
                self._objects.remove(part.object_name)

    def _rewrite(self, part: Part, change_rows: Callable[[Rows], Rows], written: list[Part]) -> list[Part]:
        before = list(self._versions.reader.scan([part], keep=False))
        after = [change_rows(rows) for rows in before]
        if all(one is other for one, other in zip(before, after, strict=True)):
            return [part]
        kept = [rows for rows in after if len(rows)]
        if not kept:
            return []
        tables = [rows.table.cast(SCHEMAS[part.kind]) for rows in kept]
        new, data = encode_part(Rows(part.kind, pa.concat_tables(tables).combine_chunks()), part.level)
        self._objects.write(new.object_name, [data])
        written.append(new)
        return [new]

    def _named_by(self, part: Part) -> frozenset[str]:
        if part.name not in self._named:
            tables = (rows.table["shard"] for rows in self._versions.reader.scan([part], keep=False))
            self._named[part.name] = frozenset(name for column in tables for name in column.unique().to_pylist() if name)
        return self._named[part.name]

    def _live(self, index: Index, shards: Collection[str]) -> Iterator[Location]:
        """The live blobs in these shards, as they lie there."""
        wanted = pa.array(sorted(shards), pa.string())
        found: defaultdict[str, list[Location]] = defaultdict(list)
        for table in chain.from_iterable(index.tables(kind) for kind in SCHEMAS):
            here = table.select(_COLUMNS).filter(pc.is_in(table["shard"].cast(pa.string()), wanted))
            for values in zip(*(column.to_pylist() for column in here.columns), strict=True):
                found[values[0]].append(Location(*values))
        for shard in sorted(found):
            yield from sorted(set(found[shard]), key=lambda location: location.offset)

    def _blobs(self, locations: Sequence[Location]) -> Iterator[bytes]:
        some: list[Location] = []
        for location in locations:
            some.append(location)
            if sum(each.length for each in some) >= _READ_BYTES or len(some) == 256:
                yield from read_blobs(self._objects, some)
                some = []
        yield from read_blobs(self._objects, some)


def _moved(rows: Rows, places: dict[Place, Location], sources: Collection[str], hits: set[Place]) -> Rows:
    """Rows with their new places; those that point into `sources` for nothing are superseded and go. `hits`: what was found."""
    columns = {name: rows.table[name].to_pylist() for name in _COLUMNS}
    if not any(shard in sources for shard in columns["shard"]):
        return rows
    kept = []
    for at, place in enumerate(zip(columns["shard"], columns["offset"], columns["length"], strict=True)):
        kept.append(place[0] not in sources or place in places)
        if place in places:
            hits.add(place)
            columns["shard"][at], columns["offset"][at], _, _ = places[place]
    table = rows.table
    for name in ("shard", "offset"):
        field = SCHEMAS[rows.kind].field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(columns[name], field.type))
    return Rows(rows.kind, table, rows.keys).filter(pa.array(kept))

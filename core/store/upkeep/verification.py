"""Reads and checks everything that a store holds: what is wrong is named, object by object.

In: a store's objects. Out: `Verified`: faults in words, and the objects that no version names. Checked of the newest version: the
root; the footer and every row group of each part; the totals; of each live row its producer, spec, adapter id, rank and length;
each blob's hash, each text's content hash, each adapter's numbers. Of older versions: roots, and that their parts are there. Also
`demand/`. One fault does not hide another, but the blobs of a part that cannot be read are not looked for.

Cost: every live byte is read once, where blobs lie side by side in one request; hashing and decoding take 2 s a gigabyte and
core. Holds 16 MB a thread and 50,000 rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

from core.adapters.layout import encoded_bytes
from core.adapters.spec import AdapterSpec
from core.store.demand import read_demand
from core.store.errors import MissingObject, StoreError
from core.store.index import Index
from core.store.manifest import AdapterRow, Row, adapter_id, blob_hash
from core.store.objects import Listed, Objects
from core.store.part_reader import PartReader
from core.store.parts import SCHEMAS, Rows, decode_footer, decode_group
from core.store.roots import Part, Root, Roots, Totals, root_name
from core.store.shards import ALIGNMENT_BYTES, FOLDER
from core.store.upkeep.collection import MANIFEST, orphans
from core.store.upkeep.results import Verified
from core.store.versions import Versions
from core.text.documents import content_hash

THREADS = 8
_WINDOW_ROWS = 50_000
_PIECE_BYTES = 2**24
_GAP_BYTES = 2**17

Progress = Callable[[int, int], object]


def verify(objects: Objects, threads: int = THREADS, progress: Progress = lambda done, total: None) -> Verified:
    """Reads and checks everything. progress: is told the bytes of blobs that were read, and of all.

    Raises `StoreError` where there is no store, or where the version was erased while it was read.
    """
    roots = Roots(objects)
    newest = roots.newest()
    if newest is None:
        raise StoreError(f"no store at {objects.url}: give the path of a store")
    try:
        root = roots.read(newest)
    except StoreError as error:
        return Verified(newest, 1, 0, 0, 0, 0, [str(error)], [])
    with ThreadPoolExecutor(threads) as pool:
        check = _Check(objects, root, pool, progress)
        standing = check.roots(roots)
        check.specs()
        check.parts()
        check.rows()
        check.demand()
    if check.faults and not _stands(roots, root):
        raise StoreError(f"version {root.sequence} was erased while it was read: begin again")
    left = [] if check.faults else _orphans(objects)
    count = check.counted
    return Verified(newest, standing, len(root.parts), count.documents, count.adapters, check.done_bytes, check.faults, left)


def _stands(roots: Roots, root: Root) -> bool:
    with suppress(MissingObject):
        return roots.read(root.sequence).commit_id == root.commit_id
    return False


def _orphans(objects: Objects) -> list[tuple[str, Listed]]:
    versions = Versions(objects, cache_bytes=0)
    return orphans(objects, versions)


class _Piece(NamedTuple):
    """Bytes of a shard that are read at once, and the rows that lie in them."""

    shard: str
    offset: int
    length: int
    rows: list[Row]


class _Check:
    """One run. Steps in the order of `verify`."""

    def __init__(self, objects: Objects, root: Root, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self.faults: list[str] = []
        self.counted = Totals()
        self.done_bytes = 0
        self._objects = objects
        self._root = root
        self._pool = pool
        self._progress = progress
        self._specs: dict[str, AdapterSpec] = {}
        self._sound: list[Part] = []
        self._missing = set[str]()

    def roots(self, roots: Roots) -> int:
        """All roots that stand; says how many."""
        sequences = [sequence for sequence, _ in roots.standing()]
        for one, other in pairwise(sequences):
            if other != one + 1:
                self.faults.append(f"{root_name(one + 1)} is missing, though {root_name(one)} stands")
        sizes = {each.name: each.size for each in self._objects.listing(MANIFEST)}
        read = 0
        for sequence in sequences:
            try:
                root = roots.read(sequence)
            except MissingObject:
                continue
            except StoreError as error:
                self.faults.append(str(error))
                continue
            read += 1
            missing = [part for part in root.parts if part.name not in sizes and part.name not in self._missing]
            if missing and _stands(roots, root):
                self._missing |= {part.name for part in missing}
                self.faults += [f"{part.object_name} is missing: {root.name} names it" for part in missing]
        for part in self._root.parts:
            if part.name in sizes and sizes[part.name] != part.bytes:
                self.faults.append(f"{part.object_name} has {sizes[part.name]} bytes, and its root says {part.bytes}")
        return read

    def specs(self) -> None:
        for fingerprint in self._root.specs:
            try:
                self._specs[fingerprint] = self._root.spec(fingerprint)
            except ValueError as error:
                self.faults.append(f"{self._root.name}, spec {fingerprint}: {error}")

    def parts(self) -> None:
        """Every footer and row group of the newest version."""
        for part, faults in zip(self._root.parts, self._pool.map(self._part_faults, self._root.parts), strict=True):
            self.faults += faults if part.name not in self._missing else []
            if not faults:
                self._sound.append(part)

    def rows(self) -> None:
        """Every live row, and its blob."""
        index = Index(self._root.model_copy(update={"parts": tuple(self._sound)}), PartReader(self._objects, cache_bytes=0))
        sizes = {each.name: each.size for each in self._objects.listing(FOLDER)}
        lost = Counter[str]()
        for rows in _windows(index):
            self.counted = self.counted.plus(rows)
            there = []
            for row in rows:
                self.faults += [f"{_what(row)} {fault}" for fault in self._row_faults(row)]
                size = sizes.get(row.shard)
                if size is None:
                    lost[row.shard] += 1
                elif not 0 <= row.offset <= row.offset + row.length <= size:
                    self.faults.append(f"{FOLDER}/{row.shard} has {size} bytes and is cut short: {_what(row)} lies beyond")
                else:
                    there.append(row)
            pieces = list(_pieces(there))
            for piece, faults in zip(pieces, self._pool.map(self._piece_faults, pieces), strict=True):
                self.faults += faults
                self.done_bytes += sum(row.length for row in piece.rows)
                self._progress(self.done_bytes, self._root.totals.text_bytes + self._root.totals.adapter_bytes)
        for shard, count in sorted(lost.items()):
            self.faults.append(f"{FOLDER}/{shard} is missing: {count} documents and adapters lie in it")
        if len(self._sound) == len(self._root.parts) and self.counted != self._root.totals:
            self.faults.append(f"{self._root.name} says {self._root.totals}, and its parts hold {self.counted}")

    def demand(self) -> None:
        try:
            read_demand(self._objects)
        except StoreError as error:
            self.faults.append(str(error))

    def _part_faults(self, part: Part) -> list[str]:
        name, faults = part.object_name, list[str]()
        try:
            footer = decode_footer(part, self._objects.read(name, part.bytes - part.footer_bytes, part.footer_bytes))
        except MissingObject:
            return [f"{name} is missing: {self._root.name} names it"]
        except StoreError as error:
            return [str(error)]
        for number, group in enumerate(footer.groups):
            try:
                decode_group(part, footer, number, self._objects.read(name, group.offset, group.length))
            except StoreError as error:
                faults.append(str(error))
        return faults

    def _row_faults(self, row: Row) -> Iterator[str]:
        if row.offset % ALIGNMENT_BYTES:
            yield f"begins at byte {row.offset} of its shard, which is no multiple of {ALIGNMENT_BYTES}"
        if not isinstance(row, AdapterRow):
            return
        producer = self._root.producers.get(row.producer_fingerprint)
        spec = self._specs.get(row.spec_fingerprint)
        if producer is None:
            yield f"names a producer {row.producer_fingerprint} that {self._root.name} does not know"
        if spec is None:
            yield f"names a spec {row.spec_fingerprint} that {self._root.name} does not know"
            return
        if row.rank != spec.rank:
            yield f"says rank {row.rank}, and its spec {spec.rank}"
        try:
            if row.length != (expected := encoded_bytes(spec, row.encoding)):
                yield f"has {row.length} bytes, and its spec {expected} in {row.encoding}"
        except ValueError as error:
            yield f"cannot be decoded: {error}"
            return
        if producer is not None:
            named = adapter_id(row.tenant, row.content_hash, row.window, producer, spec, row.encoding)
            if named != row.adapter_id:
                yield f"has not the id that follows from what it is: {named}"

    def _piece_faults(self, piece: _Piece) -> list[str]:
        try:
            [data] = self._objects.read_ranges([(f"{FOLDER}/{piece.shard}", piece.offset, piece.length)])
        except StoreError as error:
            return [str(error)]
        starts = (row.offset - piece.offset for row in piece.rows)
        found = (self._blob_fault(row, data[at : at + row.length]) for at, row in zip(starts, piece.rows, strict=True))
        return [fault for fault in found if fault is not None]

    def _blob_fault(self, row: Row, blob: bytes) -> str | None:
        if blob_hash(blob) != row.blob_hash:
            return f"{FOLDER}/{row.shard} is damaged between bytes {row.offset} and {row.offset + row.length}: {_what(row)}"
        try:
            if not isinstance(row, AdapterRow):
                sound = content_hash(row.title, blob.decode()) == row.content_hash
                return None if sound else f"{_what(row)} has a text or title whose content hash is another"
            if row.spec_fingerprint in self._specs:
                from core.adapters.codec import decode  # brings torch

                decode(blob, self._specs[row.spec_fingerprint], row.encoding)
        except ValueError as error:
            return f"{_what(row)} cannot be decoded: {error}"
        return None


def _windows(index: Index) -> Iterator[list[Row]]:
    """All live rows, documents and then adapters, `_WINDOW_ROWS` at a time."""
    window: list[Row] = []
    for kind in SCHEMAS:
        for table in index.tables(kind):
            window += Rows(kind, table).take(range(len(table)))
            if len(window) >= _WINDOW_ROWS:
                yield window
                window = []
    if window:
        yield window


def _pieces(rows: Sequence[Row]) -> Iterator[_Piece]:
    """The blobs of these rows, those that lie near each other together."""
    piece: _Piece | None = None
    for row in sorted(rows, key=lambda row: (row.shard, row.offset)):
        end = row.offset + row.length
        if piece is not None and row.shard == piece.shard:
            near = row.offset <= piece.offset + piece.length + _GAP_BYTES
            if near and end - piece.offset <= _PIECE_BYTES:
                piece.rows.append(row)
                piece = piece._replace(length=max(piece.length, end - piece.offset))
                continue
        if piece is not None:
            yield piece
        piece = _Piece(row.shard, row.offset, row.length, [row])
    if piece is not None:
        yield piece


def _what(row: Row) -> str:
    if isinstance(row, AdapterRow):
        return f"adapter {row.adapter_id} of tenant {row.tenant!r}"
    return f"document {row.name!r} of collection {row.collection!r}, tenant {row.tenant!r},"

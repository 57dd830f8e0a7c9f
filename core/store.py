"""The store: documents' text and adapters in packed shards, a manifest in Parquet parts, and roots that make versions of them.

    <prefix>/shards/<uuid>.bin            blobs, each at a multiple of 64 bytes: text in UTF-8, vectors as `core.codec` has it
    <prefix>/manifest/<uuid>.parquet      rows that say what lies where (`core.manifest`)
    <prefix>/roots/<20 digits>.json       version n: its parts, by checksum
    <prefix>/demand/                      how often documents are asked for, beside all versions (`core.demand`)

In: `Document`s and `NewAdapter`s, a batch a commit. Out: rows, text, vectors; every byte is checked before it is returned. Knows
nothing of models, tokenizers or servers.

Commit: shard and parts are written and flushed, then the next root is created, which succeeds for one writer only. A writer that
loses reads the winner's root, drops what has landed meanwhile (the first commit of an adapter id wins) and tries again, so both
land. Nothing a root names is ever edited: a reader sees a version or the one before. A put that was interrupted can be
put again. Files that no root names are left by killed writers; they are harmless.

Cost: 3 to 4 files a commit. Small parts are merged as they gather, 16 to one, so that opening reads few files however many
commits there were. All rows are held in memory (`core.index`); a blob is one ranged read.
"""

import random
import re
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from core.adapter import AdapterSpec
from core.codec import decode
from core.demand import DemandCounter, read_demand
from core.documents import Document
from core.index import Index, Page, Stats
from core.manifest import (
    AdapterRow,
    CorruptObject,
    DocumentRow,
    Location,
    NewAdapter,
    Part,
    PartKind,
    Producer,
    Root,
    Row,
    StoreError,
    blob_hash,
    merge_parquet,
    rows_from_parquet,
    rows_to_parquet,
)
from core.objects import Objects

ALIGNMENT_BYTES = 64
_COMMIT_ATTEMPTS = 200
_MERGE = 16
_MERGED_ROWS = _MERGE**4
_SHARD = re.compile(r"[0-9a-f]{32}\.bin")
_ROOT = re.compile(r"([0-9]{20})\.json")


class PutResult(NamedTuple):
    """The rows that hold for what was put, in its order, and how many of them are new in version `sequence`."""

    sequence: int
    documents: list[DocumentRow]
    adapters: list[AdapterRow]
    new_documents: int
    new_adapters: int


class Store:
    """A store open for reading and writing, by any number of threads and processes; `Store.open` makes one.

    Every call answers from one version: the newest at opening, at the last `refresh`, or of this object's last commit.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._index = Index()
        self._specs: dict[str, AdapterSpec] = {}
        self._refresh_lock = threading.Lock()
        self._write_lock = threading.Lock()

    @classmethod
    def open(cls, url: str | Path, create: bool = False) -> "Store":
        """Opens the store under a path or `file://` URL, at its newest version; `create` makes an empty one where there is none.

        Raises `ValueError` where there is no store or the scheme is not supported, and `StoreError` where it cannot be read.
        """
        store = cls(Objects(url))
        if store._newest_root() is None:
            if not create:
                raise StoreError(f"no store at {store.url}: give the path of a store, or create one there")
            store._create()
        store.refresh()
        return store

    @property
    def url(self) -> str:
        """What opens this store again, in any process of this machine."""
        return f"file://{self._objects.prefix}"

    @property
    def sequence(self) -> int:
        """The version that calls answer from."""
        return self._index.root.sequence

    # Reading

    def refresh(self) -> bool:
        """Goes to the newest version; says whether there was a newer one. Reads only parts not read before.

        On an error the version stays as it was.
        """
        with self._refresh_lock:
            newest = self._newest_root()
            if newest is None or newest < self.sequence:
                raise StoreError(f"{_root_name(self.sequence)} has gone from {self.url}: open the store again")
            if newest == self.sequence:
                return False
            name = _root_name(newest)
            root = Root.from_bytes(self._objects.read(name), name)
            if root.sequence != newest:
                raise CorruptObject(f"{name} is root {root.sequence}: it was copied or renamed")
            known = {part.name for part in self._index.root.parts}
            self._index.show(root, [row for part in root.parts if part.name not in known for row in self._read_part(part)])
            return True

    def find_document(self, tenant: str, collection: str, name: str) -> DocumentRow | None:
        """The live row of a name; None where there is none or it was deleted."""
        return self._index.find_document(tenant, collection, name)

    def find_adapters(self, tenant: str, content_hash: str, producer: str | None = None) -> list[AdapterRow]:
        """A tenant's adapters for some content, by window, oldest first; `producer` (a fingerprint) keeps its own only."""
        return self._index.find_adapters(tenant, content_hash, producer)

    def adapter(self, adapter_id: str) -> AdapterRow | None:
        """The adapter of that id, whose row says which tenant it belongs to: it is on the caller to compare."""
        return self._index.adapter(adapter_id)

    def list_documents(
        self, tenant: str, collection: str | None = None, prefix: str = "", page_token: str | None = None, limit: int = 100
    ) -> Page:
        """A page of a tenant's live documents, as `Index.list_documents` orders and continues it."""
        return self._index.list_documents(tenant, collection, prefix, page_token, limit)

    def get_text(self, row: DocumentRow) -> str:
        """A document's text, checked; errors as of `get_bytes`."""
        return self.get_bytes(row).decode()

    def get_vector(self, row: AdapterRow) -> Tensor:
        """An adapter's flat_N, fp32, checked; errors as of `get_bytes`, and `StoreError` where the bytes do not fit its spec."""
        data = self.get_bytes(row)
        try:
            return decode(data, self.spec(row.spec_fingerprint).numel, row.encoding)
        except ValueError as error:
            raise StoreError(f"adapter {row.adapter_id}: {error}") from None

    def get_bytes(self, row: Row) -> bytes:
        """The row's blob as it was put: one ranged read, checked.

        Raises `MissingObject` or `CorruptObject` naming the shard, and `StoreError` for a deleted document.
        """
        if isinstance(row, DocumentRow) and row.deleted:
            raise StoreError(f"document {row.name!r} was deleted: it has no text")
        if not _SHARD.fullmatch(row.shard):
            raise CorruptObject(f"{row.shard[:80]!r} is not the name of a shard")
        data = self._objects.read(f"shards/{row.shard}", row.offset, row.length)
        if blob_hash(data) != row.blob_hash:
            raise CorruptObject(f"shards/{row.shard} is damaged between bytes {row.offset} and {row.offset + row.length}")
        return data

    def producers(self) -> dict[str, Producer]:
        """Every producer that has written here, by fingerprint."""
        return dict(self._index.root.producers)

    def spec(self, fingerprint: str) -> AdapterSpec:
        """The spec that adapter rows name; `StoreError` where there is none."""
        if fingerprint not in self._specs:
            self._specs[fingerprint] = self._index.root.spec(fingerprint)
        return self._specs[fingerprint]

    def stats(self, tenant: str | None = None) -> Stats:
        """Counts and bytes, of one tenant or of all."""
        return self._index.stats(tenant)

    def demand(self) -> Counter[tuple[str, str, str]]:
        """Requests of each document (tenant, collection, name) over all servers and the last days, as `core.demand` counts."""
        return read_demand(self._objects)

    # Writing

    def write_demand(self, counter: DemandCounter) -> None:
        """Writes what a server has counted, without a new version. After a `StoreError` or `OSError` it may be tried again."""
        counter.write(self._objects)

    def put(self, documents: Iterable[Document] = (), adapters: Iterable[NewAdapter] = ()) -> PutResult:
        """Commits a batch as one version, whole or not at all, and returns when it is on disk.

        A document that stands there already and an adapter id that is known are left as they are; where that is all, there is
        no commit. A document under a known name with other content takes the name over. Raises `ValueError`, with nothing
        written, for an adapter that does not fit its spec and for one name given twice with different content.
        """
        documents, adapters = list(documents), list(adapters)
        contents: dict[tuple[str, str, str], str] = {}
        for document in documents:
            if contents.setdefault(_key(document), document.content_hash) != document.content_hash:
                raise ValueError(f"document {document.name!r} is twice in one batch with different content: put one of them")
        offered = [(new.adapter_id, new, new.blob()) for new in adapters]
        with self._write_lock:
            self.refresh()
            self._merge_small_parts()
            created = datetime.now(UTC)
            shard = _ShardWriter()
            held_documents: dict[tuple[str, str, str], DocumentRow] = {}
            held_adapters: dict[str, AdapterRow] = {}
            for document in documents:
                key = _key(document)
                if key not in held_documents:
                    live = self.find_document(*key)
                    if live is None or live.content_hash != document.content_hash:
                        place = shard.add(document.text.encode())
                        live = _row(document, place, created)
                    held_documents[key] = live
            for identity, new, data in offered:
                if identity not in held_adapters:
                    held_adapters[identity] = self.adapter(identity) or new.row(shard.add(data), created)
            sequence = self.sequence
            if shard.chunks:
                self._objects.write(f"shards/{shard.name}", shard.chunks)
                sequence = self._commit_batch(shard.name, held_documents, held_adapters, adapters)
        document_rows = [held_documents[_key(document)] for document in documents]
        adapter_rows = [held_adapters[identity] for identity, _, _ in offered]
        return PutResult(
            sequence,
            document_rows,
            adapter_rows,
            sum(row.shard == shard.name for row in held_documents.values()),
            sum(row.shard == shard.name for row in held_adapters.values()),
        )

    def delete_document(self, tenant: str, collection: str, name: str) -> bool:
        """Commits a tombstone: the name no longer resolves. False where it did not resolve before.

        Text and adapters stay on disk, and adapters stay reachable by content: other names may have the same.
        """

        def change(root: Root) -> tuple[Root, list[Row]] | None:
            live = self.find_document(tenant, collection, name)
            if live is None:
                return None
            dead = replace(
                live, title="", shard="", offset=0, length=0, blob_hash="", sequence=root.sequence + 1, created=now, deleted=True
            )
            return root.next([*root.parts, self._write_part("documents", [dead])]), [dead]

        now = datetime.now(UTC)
        with self._write_lock:
            self.refresh()
            return self._commit(change) is not None

    def _create(self) -> None:
        if (self._objects.names("shards") or self._objects.names("manifest")) and self._newest_root() is None:
            raise StoreError(f"{self.url} holds shards or a manifest but no root: restore its roots, or choose another place")
        self._objects.make_folders(["shards", "manifest", "roots"])
        self._objects.create(_root_name(1), Root().next([]).to_bytes())

    def _commit_batch(
        self,
        shard: str,
        documents: dict[tuple[str, str, str], DocumentRow],
        adapters: dict[str, AdapterRow],
        offered: Sequence[NewAdapter],
    ) -> int:
        """Commits the rows that lie in `shard`; where another writer was first with the same, its row takes the place of ours."""

        def change(root: Root) -> tuple[Root, list[Row]] | None:
            for key, document in documents.items():
                if document.shard == shard:
                    live = self.find_document(*key)
                    same = live is not None and live.content_hash == document.content_hash
                    documents[key] = live if live is not None and same else replace(document, sequence=root.sequence + 1)
            for identity in adapters:
                adapters[identity] = self.adapter(identity) or adapters[identity]
            document_rows = [row for row in documents.values() if row.shard == shard]
            adapter_rows = [row for row in adapters.values() if row.shard == shard]
            if not document_rows and not adapter_rows:
                return None
            parts = list(root.parts)
            if document_rows:
                parts.append(self._write_part("documents", document_rows))
            if adapter_rows:
                parts.append(self._write_part("adapters", adapter_rows))
            names = {(row.producer_fingerprint, row.spec_fingerprint) for row in adapter_rows}
            makers = [new for new in offered if (new.producer.fingerprint, new.spec.fingerprint) in names]
            producers = {new.producer.fingerprint: new.producer for new in makers}
            specs = {new.spec.fingerprint: new.spec for new in makers}
            return root.next(parts, producers, specs), [*document_rows, *adapter_rows]

        sequence = self._commit(change)
        if sequence is None:
            self._objects.remove(f"shards/{shard}")
        return sequence or self.sequence

    def _merge_small_parts(self) -> None:
        """Where 16 parts of one kind and of like size have gathered, makes one of them. A row is merged 4 times at most."""

        def change(root: Root) -> tuple[Root, list[Row]] | None:
            group = _mergeable(root.parts)
            if not group:
                return None
            data = merge_parquet(group[0].kind, [(self._read_checked(part), part.name) for part in group])
            merged = self._write_part_bytes(group[0].kind, data, sum(part.rows for part in group))
            return root.next([part for part in root.parts if part not in group] + [merged]), []

        while self._commit(change) is not None:
            pass

    def _commit(self, change: Callable[[Root], tuple[Root, list[Row]] | None]) -> int | None:
        """Makes the next version. `change` says what it is and which rows it adds, or None where there is nothing left to do.

        It is asked again after each race lost, on the winner's version. Returns the sequence made, or None.
        """
        for attempt in range(_COMMIT_ATTEMPTS):
            base = self._index.root
            changed = change(base)
            if changed is None:
                return None
            root, rows = changed
            if self._objects.create(_root_name(root.sequence), root.to_bytes()):
                with self._refresh_lock:
                    if root.sequence > self._index.root.sequence:
                        self._index.show(root, rows)
                return root.sequence
            for part in set(root.parts) - set(base.parts):
                self._objects.remove(f"manifest/{part.name}")
            time.sleep(random.uniform(0, 0.005 * min(attempt, 10)))
            self.refresh()
        raise StoreError(f"lost {_COMMIT_ATTEMPTS} races to commit to {self.url}: put the batch again")

    def _newest_root(self) -> int | None:
        """The highest sequence of a root, None where there is none. No listing where nothing has changed."""
        here = self.sequence
        if here and self._objects.exists(_root_name(here)) and not self._objects.exists(_root_name(here + 1)):
            return here
        matches = [_ROOT.fullmatch(name) for name in self._objects.names("roots")]
        return max((int(match[1]) for match in matches if match), default=None)

    def _read_part(self, part: Part) -> list[Row]:
        rows = rows_from_parquet(part.kind, self._read_checked(part), f"manifest/{part.name}")
        if len(rows) != part.rows:
            raise CorruptObject(f"manifest/{part.name} has {len(rows)} rows, and its root says {part.rows}")
        return rows

    def _read_checked(self, part: Part) -> bytes:
        data = self._objects.read(f"manifest/{part.name}")
        if blob_hash(data) != part.checksum:
            raise CorruptObject(f"manifest/{part.name} is damaged: its hash is not the one that the root says")
        return data

    def _write_part(self, kind: PartKind, rows: Sequence[Row]) -> Part:
        return self._write_part_bytes(kind, rows_to_parquet(kind, rows), len(rows))

    def _write_part_bytes(self, kind: PartKind, data: bytes, rows: int) -> Part:
        part = Part(name=f"{uuid.uuid4().hex}.parquet", kind=kind, rows=rows, checksum=blob_hash(data))
        self._objects.write(f"manifest/{part.name}", [data])
        return part


def _mergeable(parts: Sequence[Part]) -> list[Part]:
    """16 parts or more of one kind whose rows lie between two powers of 16, of small parts only; none where there are fewer."""
    groups: dict[tuple[PartKind, int], list[Part]] = defaultdict(list)
    for part in parts:
        if part.rows < _MERGED_ROWS:
            size = next(power for power in range(1, 5) if part.rows < _MERGE**power)
            groups[part.kind, size].append(part)
    return next((group for group in groups.values() if len(group) >= _MERGE), [])


def _key(document: Document) -> tuple[str, str, str]:
    return document.tenant, document.collection, document.name


def _row(document: Document, place: Location, created: datetime) -> DocumentRow:
    return DocumentRow(*_key(document), document.title, document.content_hash, **place._asdict(), sequence=0, created=created)


def _root_name(sequence: int) -> str:
    return f"roots/{sequence:020}.json"


class _ShardWriter:
    """Packs blobs into a shard to be."""

    def __init__(self) -> None:
        self.name = f"{uuid.uuid4().hex}.bin"
        self.chunks: list[bytes] = []
        self._size = 0

    def add(self, data: bytes) -> Location:
        padding = -self._size % ALIGNMENT_BYTES
        location = Location(self.name, self._size + padding, len(data), blob_hash(data))
        self.chunks += [bytes(padding), data]
        self._size += padding + len(data)
        return location

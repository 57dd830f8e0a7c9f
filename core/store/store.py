"""The store: documents' text and adapters in packed shards, a manifest in Parquet parts, and roots that make versions of them.

    <prefix>/shards/<uuid>.bin            blobs: text in UTF-8, vectors as `core.adapters.codec` has it (`core.store.shards`)
    <prefix>/manifest/<uuid>.parquet      rows that say what lies where (`core.store.parts`)
    <prefix>/roots/<20 digits>.json       version n: its parts, by checksum (`core.store.roots`)
    <prefix>/demand/                      how often documents are asked for, beside all versions (`core.store.demand`)

In: `Document`s and `NewAdapter`s, a batch a commit. Out: rows, text, vectors; every byte is checked before it is used. Knows
nothing of models, tokenizers or servers.

A put writes shards, then a part for each kind of row, then the next root, which succeeds for one writer only: whoever loses drops
what has landed meanwhile (the first commit of an adapter id wins) and goes on from there, so both land. Nothing that a root names
is ever edited: a reader sees a version or the one before. A put that was interrupted can be put again. Files that no root names
are left by killed writers; they are harmless.

Cost: opening reads two objects and lists once, however large the store. A look-up, a page: see `core.store.part_reader`, whose
`cache_bytes` are what a store takes in memory. A put of any size: 3 to 4 objects, shards apart, and now and then a merge
(`core.store.merging`). Reading a blob: `core.store.shards`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from core.adapters.spec import AdapterSpec
from core.store.commits import Commits
from core.store.demand import DemandCounter, read_demand
from core.store.errors import MissingObject, StoreError
from core.store.index import MAX_PAGE, Page, Stats
from core.store.manifest import AdapterRow, DocumentRow, Key, Location, NewAdapter, PartKind, Producer, Row
from core.store.merging import Merger
from core.store.objects import Objects
from core.store.opening import open_objects
from core.store.part_reader import CACHE_BYTES
from core.store.puts import Offer, PutResult
from core.store.roots import Root
from core.store.shards import SHARD_BYTES, read_blobs, remove_shards, write_blobs
from core.store.versions import Versions
from core.text.documents import Document

if TYPE_CHECKING:
    from torch import Tensor


class DocumentPage(NamedTuple):
    """Documents, each with its adapters as of `Store.find_adapters`, and the token that continues the listing (None: its end)."""

    documents: list[tuple[DocumentRow, list[AdapterRow]]]
    next_token: str | None


class Store:
    """A store open for reading and writing, by any number of threads and processes; `Store.open` makes one.

    Every call answers from one version: the newest at opening, at the last `refresh`, or of this object's last commit. Where
    that one's parts or shards have been collected meanwhile, a call goes to the newest and tries once more.
    """

    def __init__(self, objects: Objects, cache_bytes: int = CACHE_BYTES, shard_bytes: int = SHARD_BYTES) -> None:
        self._objects = objects
        self._shard_bytes = shard_bytes
        self._versions = Versions(objects, cache_bytes)
        self._commits = Commits(objects, self._versions)
        self._merger = Merger(objects, self._versions)
        self._specs: dict[str, AdapterSpec] = {}

    @classmethod
    def open(
        cls, url: str | Path, create: bool = False, cache_bytes: int = CACHE_BYTES, shard_bytes: int = SHARD_BYTES
    ) -> "Store":
        """Opens the store under a path, a `file://` or an `s3://` URL, at its newest version; `create` makes an empty one.

        cache_bytes: for rows in memory. shard_bytes: of the shards that this object writes. Raises `ValueError` where there is
        no store or the scheme is not supported, `StoreError` where it cannot be read, `OSError` where storage fails.
        """
        store = cls(open_objects(url), cache_bytes, shard_bytes)
        if not store._versions.begin():
            if not create:
                raise StoreError(f"no store at {store.url}: give the path of a store, or create one there")
            store._create()
            store.refresh()
        return store

    @property
    def url(self) -> str:
        """What opens this store again, in any process of this machine."""
        return self._objects.url

    @property
    def sequence(self) -> int:
        """The version that calls answer from."""
        return self._versions.index.root.sequence

    # Reading

    def refresh(self) -> bool:
        """Goes to the newest version; says whether there was a newer one. On an error the version stays as it was."""
        return self._versions.refresh()

    def find_document(self, tenant: str, collection: str, name: str) -> DocumentRow | None:
        """The live row of a name, in any Unicode normal form; None where there is none or it was deleted."""
        return self._versions.ask(lambda index: index.find_document(tenant, collection, name))

    def find_documents(self, keys: Sequence[Key]) -> dict[Key, DocumentRow]:
        """The live rows of many (tenant, collection, name), in NFC, in one pass: thousands cost little more than one."""
        return self._versions.ask(lambda index: index.find_documents(keys))

    def find_adapters(self, tenant: str, content_hash: str, producer: str | None = None) -> list[AdapterRow]:
        """A tenant's adapters for some content, by window, oldest first; `producer` (a fingerprint) keeps its own only."""
        return self._versions.ask(lambda index: index.find_adapters(tenant, content_hash, producer))

    def find_adapters_of(self, contents: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[AdapterRow]]:
        """The adapters of many (tenant, content hash), in one pass; those without any are left out."""
        return self._versions.ask(lambda index: index.find_adapters_of(contents))

    def adapter(self, tenant: str, content_hash: str, adapter_id: str) -> AdapterRow | None:
        """The adapter of that id, which was made for that content."""
        key = (tenant, content_hash, adapter_id)
        return self.adapters([key]).get(key)

    def adapters(self, keys: Sequence[Key]) -> dict[Key, AdapterRow]:
        """Those of many (tenant, content hash, adapter id) that are there, in one pass."""
        return self._versions.ask(lambda index: index.adapters(keys))

    def list_documents(
        self, tenant: str, collection: str | None = None, prefix: str = "", page_token: str | None = None, limit: int = 100
    ) -> Page:
        """A page of a tenant's live documents, as `Index.list_documents` orders and continues it."""
        return self._versions.ask(lambda index: index.list_documents(tenant, collection, prefix, page_token, limit))

    def pages(
        self,
        tenant: str,
        collection: str | None = None,
        prefix: str = "",
        page_token: str | None = None,
        limit: int = 100,
    ) -> Iterator[DocumentPage]:
        """Pages of a tenant's live documents with their adapters, from a token on, to the end.

        A page is read when it is asked for; where this object's version changes on the way, later pages are of the new one.
        Raises `ValueError` as `list_documents` does.
        """
        while True:
            rows, page_token = self.list_documents(tenant, collection, prefix, page_token, limit)
            adapters = self.find_adapters_of([(row.tenant, row.content_hash) for row in rows])
            yield DocumentPage([(row, adapters.get((row.tenant, row.content_hash), [])) for row in rows], page_token)
            if page_token is None:
                return

    def each_document(
        self, tenant: str, collection: str | None = None, prefix: str = ""
    ) -> Iterator[tuple[DocumentRow, list[AdapterRow]]]:
        """The documents of `pages`, one by one; holds `MAX_PAGE` of them."""
        return chain.from_iterable(page.documents for page in self.pages(tenant, collection, prefix, limit=MAX_PAGE))

    def tables(self, kind: PartKind, tenant: str | None = None) -> Iterator[pa.Table]:
        """All live rows of a kind, some at a time, as `Index.tables`. `MissingObject` if parts are collected on the way."""
        return self._versions.index.tables(kind, tenant)

    def get_text(self, row: DocumentRow) -> str:
        """A document's text, checked; errors as of `get_bytes`."""
        return self.get_bytes(row).decode()

    def get_vector(self, row: AdapterRow) -> "Tensor":
        """An adapter's flat_N, fp32, checked; errors as of `get_bytes`, and `StoreError` where the bytes do not fit its spec."""
        from core.adapters.codec import decode  # brings torch, which whoever only lists need not wait for

        data = self.get_bytes(row)
        try:
            return decode(data, self.spec(row.spec_fingerprint), row.encoding)
        except ValueError as error:
            raise StoreError(f"adapter {row.adapter_id}: {error}") from None

    def get_bytes(self, row: Row) -> bytes:
        """The row's blob as it was put; errors as of `get_many`."""
        return self.get_many([row])[0]

    def get_many(self, rows: Sequence[Row]) -> list[bytes]:
        """The rows' blobs as they were put, in their order, read side by side and checked; all are in memory at once.

        A row whose shard has been collected is looked up again. Raises `MissingObject` or `CorruptObject` naming the shard, and
        `StoreError` for a deleted row.
        """
        for row in rows:
            if row.deleted:
                raise StoreError(f"{row.key[2]!r} was deleted: nothing of it is left to read")
        try:
            return read_blobs(self._objects, [_location(row) for row in rows])
        except MissingObject:
            self.refresh()
            moved = self._today(rows)
            if moved == list(rows):
                raise
            return read_blobs(self._objects, [_location(row) for row in moved])

    def producers(self) -> dict[str, Producer]:
        """Every producer that has written here, by fingerprint."""
        return dict(self._versions.index.root.producers)

    def spec(self, fingerprint: str) -> AdapterSpec:
        """The spec that adapter rows name; `StoreError` where there is none."""
        if fingerprint not in self._specs:
            self._specs[fingerprint] = self._versions.index.root.spec(fingerprint)
        return self._specs[fingerprint]

    def stats(self, tenant: str | None = None) -> Stats:
        """Counts and bytes: of all at once from the root; of one tenant by a pass over its rows."""
        return self._versions.ask(lambda index: index.stats(tenant))

    def tenants(self) -> list[str]:
        """All tenants that have anything live."""
        return self._versions.ask(lambda index: index.tenants())

    def demand(self) -> Counter[tuple[str, str, str]]:
        """Requests of each document (tenant, collection, name) over all servers and the last days (`core.store.demand`)."""
        return read_demand(self._objects)

    # Writing

    def write_demand(self, counter: DemandCounter) -> None:
        """Writes what a server has counted, without a new version. After a `StoreError` or `OSError` it may be tried again."""
        counter.write(self._objects)

    def put(self, documents: Iterable[Document] = (), adapters: Iterable[NewAdapter] = ()) -> PutResult:
        """Commits a batch as one version, whole or not at all, and returns when it is on disk.

        Takes documents and adapters as they come, so that a batch need not fit in memory. A document that stands there already
        and an adapter id that is known are left as they are; where that is all, there is no commit. A document under a known
        name with other content takes the name over. Batches of several threads become one version. Raises `ValueError`, with
        nothing put, for an adapter that does not fit its spec and for one name given twice with different content. An `OSError`
        leaves open whether the batch was put: put it again.
        """
        self.refresh()
        offer = Offer(self._versions)
        locations = write_blobs(self._objects, offer.blobs(documents, adapters), self._shard_bytes)
        batch = offer.batch(locations)
        if locations:
            self._commits.put(batch)
        written = {location.shard for location in locations}
        used = {row.shard for row in chain[Row](batch.documents.values(), batch.adapters.values())}
        remove_shards(self._objects, written - used)
        self._merger.merge_what_is_due()
        return offer.result(batch.sequence or self.sequence, written)

    def delete_document(self, tenant: str, collection: str, name: str) -> bool:
        """Commits a tombstone: the name no longer resolves. False where it did not resolve before.

        Text and adapters stay on disk, and adapters stay reachable by content: other names may have the same.
        """
        self.refresh()
        row = self.find_document(tenant, collection, name)
        return row is not None and self._commits.delete([row.key]) > 0

    def delete_documents(self, keys: Sequence[Key]) -> int:
        """`delete_document` for many (tenant, collection, name), in NFC, as one version; says how many resolved before."""
        self.refresh()
        return self._commits.delete(keys)

    def _create(self) -> None:
        folders = (self._objects.names(folder) for folder in ("shards", "manifest"))
        if any(next(names, None) for names in folders) and self._versions.roots.newest() is None:
            raise StoreError(f"{self.url} holds shards or a manifest but no root: restore its roots, or choose another place")
        self._versions.roots.create(Root().next([]))

    def _today(self, rows: Sequence[Row]) -> list[Row]:
        """The rows as they are now: those of the same content, wherever its blob lies; the others as they were."""
        documents = self.find_documents([row.key for row in rows if isinstance(row, DocumentRow)])
        adapters = self.adapters([row.key for row in rows if isinstance(row, AdapterRow)])

        def today(row: Row) -> Row:
            now = adapters.get(row.key) if isinstance(row, AdapterRow) else documents.get(row.key)
            return now if now is not None and now.content_hash == row.content_hash else row

        return [today(row) for row in rows]


def _location(row: Row) -> Location:
    return Location(row.shard, row.offset, row.length, row.blob_hash)

"""What a put offers: which of it the store lacks, and in the end the rows that hold for all of it.

In: documents and adapters, as they come. Out: the blobs that are to be written, then the rows for a commit
(`core.store.commits`). Knows nothing of shards. Holds a row of each, and 256 of them or 16 MB at a time.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, TypeVar

from core.store.commits import Batch
from core.store.index import Index
from core.store.manifest import AdapterRow, DocumentRow, Key, Location, NewAdapter
from core.store.versions import Versions
from core.text.documents import Document

_ITEMS = 256
_BYTES = 2**24
_NOWHERE = Location("", 0, 0, "")

ItemT = TypeVar("ItemT")


class PutResult(NamedTuple):
    """The rows that hold for what was put, in its order, and how many of them are new in version `sequence`."""

    sequence: int
    documents: list[DocumentRow]
    adapters: list[AdapterRow]
    new_documents: int
    new_adapters: int


class Offer:
    """One put: `blobs` to its end, then `batch`, then, once that has landed, `result`."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._created = datetime.now(UTC)
        self._contents: dict[Key, str] = {}
        self._document_keys: list[Key] = []
        self._adapter_keys: list[Key] = []
        self._documents: dict[Key, DocumentRow] = {}
        self._adapters: dict[Key, AdapterRow] = {}
        self._new: list[DocumentRow | AdapterRow] = []
        self._batch = Batch()

    def blobs(self, documents: Iterable[Document], adapters: Iterable[NewAdapter]) -> Iterator[bytes]:
        """The blobs of what the store lacks. Raises `ValueError` for what cannot be put."""
        for some in _some_at_a_time(documents, lambda document: len(document.text)):
            keys = [(document.tenant, document.collection, document.name) for document in some]
            live = self._versions.ask(partial(Index.find_documents, keys=keys))
            for key, document in zip(keys, some, strict=True):
                if self._contents.setdefault(key, document.content_hash) != document.content_hash:
                    raise ValueError(f"document {document.name!r} is twice in one batch with different content: put one of them")
                self._document_keys.append(key)
                if key not in self._documents:
                    there = live.get(key)
                    same = there is not None and there.content_hash == document.content_hash
                    self._documents[key] = there if there is not None and same else self._row(document)
                    if not same:
                        self._new.append(self._documents[key])
                        yield document.text.encode()
        for few in _some_at_a_time(adapters, _vector_bytes):
            keys = [(new.tenant, new.content_hash, new.adapter_id) for new in few]
            known = self._versions.ask(partial(Index.adapters, keys=keys))
            for key, new in zip(keys, few, strict=True):
                self._adapter_keys.append(key)
                if key not in self._adapters:
                    self._adapters[key] = known[key] if key in known else new.row(_NOWHERE, self._created)
                    if key not in known:
                        self._new.append(self._adapters[key])
                        self._batch.producers[new.producer.fingerprint] = new.producer
                        self._batch.specs[new.spec.fingerprint] = new.spec
                        yield new.blob()

    def batch(self, locations: Sequence[Location]) -> Batch:
        """The new rows, now that each of the blobs has a place."""
        for row, location in zip(self._new, locations, strict=True):
            placed = replace(row, **location._asdict())
            if isinstance(placed, DocumentRow):
                self._batch.documents[placed.key] = placed
            else:
                self._batch.adapters[placed.key] = placed
        return self._batch

    def result(self, sequence: int, shards: Collection[str]) -> PutResult:
        """What holds now, as of version `sequence`; `shards` are those that the blobs were written to."""
        documents = self._documents | self._batch.documents
        adapters = self._adapters | self._batch.adapters
        return PutResult(
            sequence,
            [documents[key] for key in self._document_keys],
            [adapters[key] for key in self._adapter_keys],
            sum(row.shard in shards for row in self._batch.documents.values()),
            sum(row.shard in shards for row in self._batch.adapters.values()),
        )

    def _row(self, document: Document) -> DocumentRow:
        names = document.tenant, document.collection, document.name
        return DocumentRow(*names, document.title, document.content_hash, **_NOWHERE._asdict(), sequence=0, created=self._created)


def _vector_bytes(new: NewAdapter) -> int:
    return len(new.vector) if isinstance(new.vector, bytes) else new.vector.nbytes


def _some_at_a_time(items: Iterable[ItemT], size: Callable[[ItemT], int]) -> Iterator[list[ItemT]]:
    some: list[ItemT] = []
    some_bytes = 0
    for item in items:
        some.append(item)
        some_bytes += size(item)
        if len(some) == _ITEMS or some_bytes >= _BYTES:
            yield some
            some, some_bytes = [], 0
    if some:
        yield some

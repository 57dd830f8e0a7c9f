"""One version of a store, for look-ups and listings.

In: a root, and a reader of its parts. Out: live rows, as of that version whatever is committed meanwhile. Knows nothing of blobs.
Any thread may ask. A part that is damaged or gone shows when a row in it is asked for: `CorruptObject` or `MissingObject`, naming
the part. Cost: as of `core.store.part_reader`; nothing is read before it is asked for.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from core.store.manifest import AdapterRow, DocumentRow, Key, PartKind
from core.store.part_reader import KeyRange, PartReader
from core.store.parts import joined
from core.store.roots import Part, Root
from core.text.documents import nfc

MAX_PAGE = 1000


class Page(NamedTuple):
    """Rows of a listing, and the token that continues it (None at its end)."""

    rows: list[DocumentRow]
    next_token: str | None


class Stats(NamedTuple):
    """What a version holds, deleted documents left out. Bytes are those of the blobs; parts those of the whole store."""

    sequence: int
    parts: int
    documents: int
    adapters: int
    text_bytes: int
    adapter_bytes: int


class Index:
    """The rows of version `root`."""

    def __init__(self, root: Root, reader: PartReader) -> None:
        self.root = root
        self._reader = reader
        self._parts: dict[PartKind, list[Part]] = {"documents": [], "adapters": []}
        for part in root.parts:
            self._parts[part.kind].append(part)

    def find_documents(self, keys: Iterable[Key]) -> dict[Key, DocumentRow]:
        """The live rows of those (tenant, collection, name), in NFC, that have one."""
        rows = self._reader.lookup(self._parts["documents"], [KeyRange.only(joined(*key)) for key in set(keys)])
        return {key: row for key, row in rows.items() if isinstance(row, DocumentRow) and not row.deleted}

    def find_document(self, tenant: str, collection: str, name: str) -> DocumentRow | None:
        """The live row of a name, in any Unicode normal form; None where there is none or it was deleted."""
        key = nfc(tenant), nfc(collection), nfc(name)
        return self.find_documents([key]).get(key)

    def find_adapters_of(self, contents: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[AdapterRow]]:
        """The live adapters of those (tenant, content hash) that have any, in the order of `find_adapters`."""
        rows = self._reader.lookup(self._parts["adapters"], [KeyRange.below(joined(*content)) for content in set(contents)])
        found: dict[tuple[str, str], list[AdapterRow]] = {}
        for row in rows.values():
            if isinstance(row, AdapterRow) and not row.deleted:
                found.setdefault((row.tenant, row.content_hash), []).append(row)
        for adapters in found.values():
            adapters.sort(key=lambda row: (row.window, row.sequence, row.created, row.adapter_id))
        return found

    def find_adapters(self, tenant: str, content_hash: str, producer: str | None = None) -> list[AdapterRow]:
        """A tenant's adapters for some content, by window, as they landed; `producer` (a fingerprint) keeps its own only."""
        rows = self.find_adapters_of([(tenant, content_hash)]).get((tenant, content_hash), [])
        return [row for row in rows if producer is None or row.producer_fingerprint == producer]

    def adapters(self, keys: Iterable[Key]) -> dict[Key, AdapterRow]:
        """The live adapters of those (tenant, content hash, adapter id) that are there."""
        rows = self._reader.lookup(self._parts["adapters"], [KeyRange.only(joined(*key)) for key in set(keys)])
        return {key: row for key, row in rows.items() if isinstance(row, AdapterRow) and not row.deleted}

    def list_documents(
        self, tenant: str, collection: str | None = None, prefix: str = "", page_token: str | None = None, limit: int = 100
    ) -> Page:
        """A tenant's live documents, ordered by (collection, name), those whose name begins with `prefix`.

        A token continues behind the last row it came with, whatever was put or deleted since. A prefix in all collections passes
        over the rows of small ones and skips within large ones: at most two row groups a collection are looked at. Raises
        `ValueError` for a bad token or a `limit` outside 1 to 1000.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise ValueError(f"limit is {limit}: give 1 to {MAX_PAGE}")
        tenant, prefix = nfc(tenant), nfc(prefix)
        collection = None if collection is None else nfc(collection)
        start = joined(tenant, collection or "", prefix)
        if page_token is not None:
            start = max(start, joined(tenant, *_read_token(page_token)) + "\0")
        end = KeyRange.below(tenant if collection is None else joined(tenant, collection)).end
        rows: list[DocumentRow] = []
        step = limit + 1
        while len(rows) <= limit:
            batch = next(self._reader.scan(self._parts["documents"], start, end, step=step), None)
            if batch is None:
                return Page(rows, None)
            matching = batch.live.filter(pc.starts_with(batch.live.table["name"].combine_chunks(), prefix))
            found = matching.take(range(min(len(matching), limit + 1 - len(rows))))
            rows += [row for row in found if isinstance(row, DocumentRow)]
            _, found_in, name = batch.keys[-1].as_py().split("\0")
            start = joined(tenant, found_in, max(name, prefix))
            if name.startswith(prefix):
                start += "\0"
            elif name > prefix:
                start = joined(tenant, found_in) + "\1"
            step *= 2
        last = rows[limit - 1]
        return Page(rows[:limit], continue_after(last.collection, last.name))

    def tables(self, kind: PartKind, tenant: str | None = None) -> Iterator[pa.Table]:
        """All live rows of a kind (columns as of `core.store.parts.SCHEMAS`), of one tenant or of all, in order; some at a time.

        Reads each part once and keeps nothing: two million rows take a few seconds.
        """
        within = None if tenant is None else KeyRange.below(nfc(tenant))
        first, end = ("", None) if within is None else (within.first, within.end)
        for rows in self._reader.scan(self._parts[kind], first, end, keep=False):
            if len(live := rows.live):
                yield live.table

    def tenants(self) -> list[str]:
        """All tenants that have anything live. Passes over what a tenant has: a millisecond a tenant and part."""
        return sorted({tenant for kind in self._parts for tenant in self._tenants(kind)})

    def _tenants(self, kind: PartKind) -> Iterator[str]:
        start = ""
        while (batch := next(self._reader.scan(self._parts[kind], start, step=1), None)) is not None:
            if len(live := batch.live):
                tenant = live.keys[0].as_py().partition("\0")[0]
                yield tenant
                start = tenant + "\1"
            else:
                start = batch.keys[-1].as_py() + "\0"

    def stats(self, tenant: str | None = None) -> Stats:
        """Counts and bytes; of all tenants the root knows them, of one its rows are read."""
        totals = self.root.totals
        if tenant is None:
            sums = (totals.documents, totals.adapters, totals.text_bytes, totals.adapter_bytes)
        else:
            lengths = {kind: [table["length"] for table in self.tables(kind, tenant)] for kind in self._parts}
            documents, adapters = ([(len(each), pc.sum(each).as_py()) for each in lengths[kind]] for kind in self._parts)
            sums = (
                sum(count for count, _ in documents),
                sum(count for count, _ in adapters),
                sum(size for _, size in documents),
                sum(size for _, size in adapters),
            )
        return Stats(self.root.sequence, len(self.root.parts), *sums)


def continue_after(collection: str, name: str) -> str:
    """The page token of a listing that continues behind this document, whether or not it is there."""
    return base64.urlsafe_b64encode(json.dumps([collection, name]).encode()).decode()


def _read_token(token: str) -> tuple[str, str]:
    try:
        collection, name = json.loads(base64.b64decode(token.encode(), altchars=b"-_", validate=True))
        if isinstance(collection, str) and isinstance(name, str):
            return collection, name
    except (ValueError, TypeError, RecursionError):
        pass
    raise ValueError(f"page token {token[:80]!r} is not one that a listing gave: start again without one")

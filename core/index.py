"""The rows of a store's current version, in memory, for lookup and listing.

In: a root and the rows it adds. Out: rows. Knows nothing of bytes or files. Every call answers from one version and may come from
any thread. Cost: about 1.5 kB a row; a lookup is a dictionary read, a page two binary searches, and the first page after a change
a sort of the tenant's names.
"""

import base64
import json
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from core.documents import nfc
from core.manifest import AdapterRow, DocumentRow, Root, Row

MAX_PAGE = 1000


class Page(NamedTuple):
    """Rows of a listing, and the token that continues it (None at its end)."""

    rows: list[DocumentRow]
    next_token: str | None


class Stats(NamedTuple):
    """What the current version holds, deleted documents left out. Bytes are those of the blobs."""

    sequence: int
    parts: int
    tenants: int
    documents: int
    adapters: int
    text_bytes: int
    adapter_bytes: int


class Index:
    """The rows of one version after the other; empty at first, then what `show` brings."""

    def __init__(self) -> None:
        self.root = Root()
        self._documents: dict[str, dict[tuple[str, str], DocumentRow]] = defaultdict(dict)
        self._adapters: dict[str, AdapterRow] = {}
        self._by_content: dict[tuple[str, str], list[AdapterRow]] = defaultdict(list)
        self._names: dict[str, list[tuple[str, str]]] = {}
        self._lock = threading.Lock()

    def show(self, root: Root, rows: Iterable[Row]) -> None:
        """Makes `root` the current version; `rows` are those that it adds, and may hold known ones."""
        with self._lock:
            for row in rows:
                if isinstance(row, AdapterRow):
                    if row.adapter_id not in self._adapters:
                        self._adapters[row.adapter_id] = row
                        self._by_content[row.tenant, row.content_hash].append(row)
                else:
                    documents, key = self._documents[row.tenant], (row.collection, row.name)
                    if key not in documents or documents[key].sequence < row.sequence:
                        documents[key] = row
                        self._names.pop(row.tenant, None)
            self.root = root

    def find_document(self, tenant: str, collection: str, name: str) -> DocumentRow | None:
        """The live row of a name, in any Unicode normal form; None where there is none or it was deleted."""
        key = nfc(collection), nfc(name)
        with self._lock:
            row = self._documents.get(nfc(tenant), {}).get(key)
        return None if row is None or row.deleted else row

    def find_adapters(self, tenant: str, content_hash: str, producer: str | None = None) -> list[AdapterRow]:
        """A tenant's adapters for some content, by window, oldest first; `producer` (a fingerprint) keeps its own only."""
        with self._lock:
            rows = list(self._by_content.get((tenant, content_hash), ()))
        rows = [row for row in rows if producer is None or row.producer_fingerprint == producer]
        return sorted(rows, key=lambda row: (row.window, row.created, row.adapter_id))

    def adapter(self, adapter_id: str) -> AdapterRow | None:
        """The adapter of that id. The id says which tenant it belongs to, as does the row: it is on the caller to compare."""
        with self._lock:
            return self._adapters.get(adapter_id)

    def list_documents(
        self, tenant: str, collection: str | None = None, prefix: str = "", page_token: str | None = None, limit: int = 100
    ) -> Page:
        """A tenant's live documents, ordered by (collection, name), those whose name begins with `prefix`.

        A token continues behind the last row it came with, whatever was put or deleted since. Raises `ValueError` for a bad token
        or a `limit` outside 1 to 1000.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise ValueError(f"limit is {limit}: give 1 to {MAX_PAGE}")
        tenant, prefix = nfc(tenant), nfc(prefix)
        collection = None if collection is None else nfc(collection)
        rows: list[DocumentRow] = []
        with self._lock:
            documents = self._documents.get(tenant, {})
            if tenant not in self._names and documents:
                self._names[tenant] = sorted(key for key, row in documents.items() if not row.deleted)
            keys = self._names.get(tenant, [])
            at = bisect_left(keys, (collection or "", prefix))
            if page_token is not None:
                place, name = _read_token(page_token)
                at = max(at, bisect_left(keys, (place, name + "\0")))
            while at < len(keys) and len(rows) <= limit:
                place, name = keys[at]
                if collection is not None and place != collection:
                    break
                if name.startswith(prefix):
                    rows.append(documents[place, name])
                    at += 1
                else:
                    next_match = (place, prefix) if name < prefix else (place + "\0", "")
                    at = bisect_left(keys, next_match, at)
        if len(rows) <= limit:
            return Page(rows, None)
        last = rows[limit - 1]
        return Page(rows[:limit], continue_after(last.collection, last.name))

    def stats(self, tenant: str | None = None) -> Stats:
        """Counts and bytes, of one tenant or of all; reads every row in memory."""
        with self._lock:
            root = self.root
            documents = [row for name, rows in self._documents.items() if tenant in (None, name) for row in rows.values()]
            adapters = [row for row in self._adapters.values() if tenant in (None, row.tenant)]
        documents = [row for row in documents if not row.deleted]
        return Stats(
            sequence=root.sequence,
            parts=len(root.parts),
            tenants=len({row.tenant for row in documents} | {row.tenant for row in adapters}),
            documents=len(documents),
            adapters=len(adapters),
            text_bytes=sum(row.length for row in documents),
            adapter_bytes=sum(row.length for row in adapters),
        )


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

"""What a source no longer has is deleted from the store, where that is asked for and known for certain.

In: the receipts of a whole conversion, in any order; then the store. Out: tombstones for the documents of the recipe's tenant and
collection that the source did not name. Text and adapters go with `imprint store`'s collection, as after any deletion.

A source rules the whole of its collection then: give each source that is pruned a collection of its own. Nothing is deleted
where a part of the source was not read (a file that failed, a damaged file of rows, a line without a name: documents may hide
there), nor what was stored after the conversion began. A document that is there and was rejected keeps what the store has of it.

Holds 8 bytes a name, so that a million documents take 8 MB, and passes twice over the collection's rows (a few seconds for two
million). Names meet by a hash of 64 bits: at worst one in 10^12 is kept that should have gone.
"""

from array import array
from collections.abc import Iterable, Iterator
from datetime import datetime
from hashlib import blake2b
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from core.config import Section
from core.store.manifest import Key
from core.store.store import Store
from core.text.documents import nfc
from pipelines.conversion.receipts import Pruned, Receipt
from pipelines.corpus.files import suffixes
from pipelines.corpus.rows import READERS

HIDING = ("cannot be read", "not a URL")
DELETED_AT_ONCE = 10_000


class PruneSettings(Section):
    """enabled: whether documents that the source no longer has are deleted from its collection. most: the share of the
    collection that may go in one run; where more is missing, the source is probably another one, and nothing goes."""

    enabled: bool = False
    most: Annotated[float, Field(gt=0, le=1)] = 0.2


class SeenNames:
    """The names that a source gave, and whether it can have more."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._hidden: str | None = None

    def add(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            self._hashes.append(_hash(nfc(receipt.name)))
            if self._hidden is None and receipt.reason is not None and _hides(receipt.name, receipt.reason):
                self._hidden = f"{receipt.name}: {receipt.reason}"

    def prune(self, store: Store, tenant: str, collection: str, began: datetime, settings: PruneSettings) -> Pruned:
        """Deletes the documents stored before `began` whose names were not seen. Errors as of `Store.delete_documents`."""
        if self._hidden is not None:
            return Pruned(reason=f"not all of the source was read ({self._hidden})")
        seen = np.sort(np.frombuffer(self._hashes, np.uint64))
        store.refresh()
        total = vanished = 0
        for keys, rows in _unseen(store, tenant, collection, began, seen):
            total, vanished = total + rows, vanished + len(keys)
        if vanished > settings.most * total:
            return Pruned(reason=f"{vanished:,} of {total:,} documents would go: check the source, or raise prune.most")
        deleted = 0
        pending: list[Key] = []
        for keys, _ in _unseen(store, tenant, collection, began, seen):
            pending += keys
            if len(pending) >= DELETED_AT_ONCE:
                deleted += store.delete_documents(pending)
                pending = []
        return Pruned(deleted + (store.delete_documents(pending) if pending else 0))


def _hides(name: str, reason: str) -> bool:
    """Whether a reject may stand for documents by other names: a file of rows, one of its lines, what could not be read."""
    form, _ = suffixes(name.rpartition("#")[0] or name)
    return reason.startswith(HIDING) or form in READERS


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little")


def _unseen(
    store: Store, tenant: str, collection: str, began: datetime, seen: "np.ndarray[tuple[int], np.dtype[np.uint64]]"
) -> Iterator[tuple[list[Key], int]]:
    """Keys of documents that were there before and were not seen, some at a time, each time with how many rows were looked at."""
    tenant, collection = nfc(tenant), nfc(collection)
    for table in store.tables("documents", tenant):
        rows: pa.Table = table.filter(pc.equal(table["collection"], collection))
        names, created = rows["name"].to_pylist(), rows["created"].to_pylist()
        hashes = np.fromiter(map(_hash, names), np.uint64, len(names))
        gone = ~np.isin(hashes, seen, assume_unique=False)
        keys = [(tenant, collection, names[place]) for place in np.flatnonzero(gone) if created[place] < began]
        yield keys, len(names)

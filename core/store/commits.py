"""New rows to versions: what several threads put at the same time is committed as one.

In: `Batch`es of rows whose blobs are in shards. Out: for each, the version it landed in, and the rows that hold: its own, or
those of whoever was first. Knows nothing of blobs and shards.

Cost: a part for each kind, and a commit (`core.store.versions`), however many batches wait. A race that was lost costs no new
part, unless the winner has put some of the same.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain

from core.adapters.spec import AdapterSpec
from core.store.index import Index
from core.store.manifest import AdapterRow, DocumentRow, Key, PartKind, Producer, Row, RowT, tombstone
from core.store.objects import Objects
from core.store.parts import encode_part, rows_to_tables
from core.store.roots import Part, Root
from core.store.versions import Versions, is_late


@dataclass(eq=False)
class Batch:
    """Rows to commit together. Once `sequence` is set, they hold since that version, and rows that were there before stand
    in the place of those offered. began_s: by the monotonic clock, before the first of their blobs was written."""

    documents: dict[Key, DocumentRow] = field(default_factory=dict)
    adapters: dict[Key, AdapterRow] = field(default_factory=dict)
    producers: dict[str, Producer] = field(default_factory=dict)
    specs: dict[str, AdapterSpec] = field(default_factory=dict)
    sequence: int | None = None
    began_s: float = field(default_factory=time.monotonic)


class Commits:
    """Commits to one store, for any number of threads."""

    def __init__(self, objects: Objects, versions: Versions) -> None:
        self._objects = objects
        self._versions = versions
        self._waiting: list[Batch] = []
        self._leading = threading.Lock()

    def put(self, batch: Batch) -> None:
        """Returns when the batch has landed, or nothing of it was left to do. Errors as of `Versions.commit`."""
        self._waiting.append(batch)
        try:
            with self._leading:
                while batch.sequence is None:
                    self._commit(_together(batch, self._waiting))
        finally:
            self._waiting.remove(batch)

    def delete(self, documents: Sequence[Key]) -> int:
        """Commits tombstones for those that are live; says how many were."""
        now, parts, count = datetime.now(UTC), _NewParts(self._objects), 0

        def change(index: Index) -> Root | None:
            nonlocal count
            live = list(index.find_documents(documents).values())
            count = len(live)
            dead: list[Row] = [tombstone(row, now) for row in live]
            added = parts.of("documents", dead, index.root.sequence + 1)
            return index.root.next([*index.root.parts, *added], index.root.totals.plus([], live)) if live else None

        parts.settle(self._versions.commit(change))
        return count

    def _commit(self, group: Sequence[Batch]) -> None:
        parts = _NewParts(self._objects)
        documents: dict[Key, DocumentRow] = {}
        adapters: dict[Key, AdapterRow] = {}

        def change(index: Index) -> Root | None:
            nonlocal documents, adapters
            there = index.find_documents(key for batch in group for key in batch.documents)
            known = index.adapters(key for batch in group for key in batch.adapters)
            documents, adapters = {}, {}
            for batch in group:
                for key, row in batch.documents.items():
                    live = there.get(key)
                    documents.setdefault(key, live if live and live.content_hash == row.content_hash else row)
                for identity, adapter in batch.adapters.items():
                    adapters.setdefault(identity, known.get(identity) or adapter)
            new = [row for row in documents.values() if not row.sequence], [row for row in adapters.values() if not row.sequence]
            if not any(new):
                return None
            root, sequence = index.root, index.root.sequence + 1
            used = {row.producer_fingerprint for row in new[1]} | {row.spec_fingerprint for row in new[1]}
            return root.next(
                [*root.parts, *parts.of("documents", new[0], sequence), *parts.of("adapters", new[1], sequence)],
                root.totals.plus([*new[0], *new[1]], [there[row.key] for row in new[0] if row.key in there]),
                {name: made for batch in group for name, made in batch.producers.items() if name in used},
                {name: spec for batch in group for name, spec in batch.specs.items() if name in used},
            )

        root = self._versions.commit(change, min(batch.began_s for batch in group))
        parts.settle(root)
        sequence = self._versions.index.root.sequence if root is None else root.sequence
        for batch in group:
            batch.documents = {key: _since(documents[key], sequence) for key in batch.documents}
            batch.adapters = {key: _since(adapters[key], sequence) for key in batch.adapters}
            batch.sequence = sequence


class _NewParts:
    """The parts that a commit adds. What was written for a race that was lost is used again while the rows are the same."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._rows: dict[PartKind, list[Row]] = {}
        self._parts: dict[PartKind, list[Part]] = {}
        self._unused: list[Part] = []

    def of(self, kind: PartKind, rows: Iterable[Row], sequence: int) -> list[Part]:
        """Parts of level 0 with these rows, which hold since version `sequence`."""
        wanted = list(rows)
        if self._rows.get(kind) != wanted:
            self._unused += self._parts.get(kind, [])
            self._parts[kind] = []
            for table in rows_to_tables(kind, wanted):
                part, data = encode_part(table, level=0)
                self._objects.write(part.object_name, [data])
                self._parts[kind].append(part)
            self._rows[kind] = wanted
        return [part.model_copy(update={"sequence": sequence}) for part in self._parts[kind]]

    def settle(self, root: Root | None) -> None:
        """Takes away the parts that were written and that `root`, the outcome of the commit, does not name."""
        unused = self._unused if root is not None else [*self._unused, *chain(*self._parts.values())]
        for part in unused:
            self._objects.remove(part.object_name)


def _together(first: Batch, waiting: Sequence[Batch]) -> list[Batch]:
    """Those that wait and can be one version, which has one content for a name; `first` in any case."""
    group: list[Batch] = []
    contents: dict[Key, str] = {}
    for batch in [first, *(each for each in list(waiting) if each is not first and not is_late(each.began_s))]:
        offered = {key: row.content_hash for key, row in batch.documents.items()}
        if batch.sequence is not None or any(contents.get(key, content) != content for key, content in offered.items()):
            continue
        contents |= offered
        group.append(batch)
    return group


def _since(row: RowT, sequence: int) -> RowT:
    return row if row.sequence else replace(row, sequence=sequence)

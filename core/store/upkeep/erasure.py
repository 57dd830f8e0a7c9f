"""Erasure: documents go for good, with their adapters, titles, names, hashes and every byte of their text.

In: a `Target`: a document, the documents whose name begins with a prefix, a collection, or all of a tenant. Steps, each of which
may be interrupted and is finished by the same erasure run again:

    1. tombstones, so that no name of the target resolves any more
    2. a version whose parts have no row of it: neither live, nor superseded, nor deleted. Adapters go too, for whose content no
       document of the tenant is left, those of earlier texts among them; what another live document has stays
    3. every shard that holds anything but live blobs is emptied: what is live moves to new shards (`core.store.upkeep.moving`) 4.
    the names go from `demand/` 5. older versions, old parts, shards and what a bucket has kept of them are collected
    (`core.store.upkeep.collection`): at once with
       `hurry`, which costs readers of an older version a second look, else by `collect` once the grace period is over

What a killed writer has left is named by no version and is collected when it is older than the grace period, in any case. A
document that is put after the tombstones is a new one, and stays. A server that runs writes the names that it has counted today
once more: run the erasure again when it has been restarted, or the day after.

Cost: two passes over the manifest; it holds a hash for each document of the tenant. Step 3 reads and writes the live blobs of
all shards that have dead ones: a first erasure pays for all edits since the last compaction.
"""

from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from core.store.commits import Commits
from core.store.demand import erase_demand
from core.store.index import Index
from core.store.manifest import Key
from core.store.objects import Objects
from core.store.parts import Rows
from core.store.roots import Totals
from core.store.upkeep.collection import GRACE_S, collect
from core.store.upkeep.moving import Rewriter
from core.store.upkeep.results import Erased
from core.store.versions import Versions
from core.text.documents import nfc

_TOMBSTONES = 10_000


class Target(NamedTuple):
    """Whose documents: all of a tenant, of one collection, of one name, or those whose name begins with `prefix`."""

    tenant: str
    collection: str | None = None
    name: str | None = None
    prefix: str = ""

    def normal(self) -> "Target":
        """In the normal form of names. Raises `ValueError` for a name without collection."""
        if self.name is not None and (self.collection is None or self.prefix):
            raise ValueError("a document is named by its collection and its name: give both, and no prefix")
        given = (None if value is None else nfc(value) for value in self)
        return Target(*given)  # type: ignore[arg-type]

    def among(self, table: pa.Table) -> pa.BooleanArray:
        """Which document rows are of the target."""
        column = {name: table[name].cast(pa.string()).combine_chunks() for name in ("tenant", "collection", "name")}
        mask = pc.and_(pc.equal(column["tenant"], self.tenant), pc.starts_with(column["name"], self.prefix))
        for name, wanted in (("collection", self.collection), ("name", self.name)):
            mask = mask if wanted is None else pc.and_(mask, pc.equal(column[name], wanted))
        return mask


def erase(
    objects: Objects,
    versions: Versions,
    target: Target,
    hurry: bool = False,
    grace_s: float = GRACE_S,
    progress: Callable[[str], object] = lambda step: None,
) -> Erased:
    """Erases; see the module. progress: is told each step as it begins. Errors as of `Rewriter.move`."""
    target = target.normal()
    progress("tombstones")
    versions.refresh()
    documents = _tombstones(objects, versions, target)
    progress("manifest")
    rewriter, rows = Rewriter(objects, versions), _Erasure(target, versions.index.root.sequence)
    rewriter.commit(rows.left, rows.totals, rows.begin)
    progress("shards")
    dirty = [use for use in rewriter.survey(versions.index) if not use.whole]
    moved_bytes = rewriter.move(dirty)
    progress("demand")
    erase_demand(objects, lambda key: _matches(target, key))
    progress("old versions")
    collected = collect(objects, versions, grace_s, named_before=True) if hurry else None
    return Erased(documents, rows.adapters, len(dirty), moved_bytes, collected)


def matching(index: Index, target: Target) -> int:
    """How many live documents an erasure would take."""
    target = target.normal()
    return sum(pc.sum(target.among(table)).as_py() for table in index.tables("documents", target.tenant))


def _tombstones(objects: Objects, versions: Versions, target: Target) -> int:
    index = versions.index
    tables = (table.filter(target.among(table)) for table in index.tables("documents", target.tenant))
    columns = ([table[name].to_pylist() for name in ("tenant", "collection", "name")] for table in tables)
    keys = chain.from_iterable(zip(*each, strict=True) for each in columns)
    commits, count = Commits(objects, versions), 0
    while some := list[Key](islice(keys, _TOMBSTONES)):
        count += commits.delete(some)
    return count


def _matches(target: Target, key: Key) -> bool:
    tenant, collection, name = key
    return (
        tenant == target.tenant
        and target.collection in (None, collection)
        and target.name in (None, name)
        and name.startswith(target.prefix)
    )


class _Erasure:
    """The rows that go, up to version `until`: what came later is another's."""

    def __init__(self, target: Target, until: int) -> None:
        self._target = target
        self._until = until
        self._gone: set[str] | None = None
        self._totals = Totals()
        self.adapters = 0

    def begin(self, index: Index) -> bool:
        """Sees which contents have no document any more; says whether they are those of the last time."""
        tenant, totals = self._target.tenant, Counter[str]()
        living, gone = set[str](), set[str]()
        for table in index.tables("documents", tenant):
            going = self._going(table)
            living.update(table["content_hash"].filter(pc.invert(going)).to_pylist())
            totals["documents"] += going.true_count
            totals["text_bytes"] += pc.sum(table["length"].filter(going)).as_py() or 0
        for table in index.tables("adapters", tenant):
            columns = (table[name].to_pylist() for name in ("content_hash", "sequence", "length"))
            for content, sequence, length in zip(*columns, strict=True):
                if content not in living and sequence <= self._until:
                    gone.add(content)
                    totals["adapters"] += 1
                    totals["adapter_bytes"] += length
        before, self._gone, self.adapters = self._gone, gone, totals["adapters"]
        self._totals = Totals(**{name: count - totals[name] for name, count in index.root.totals.model_dump().items()})
        return before == gone

    def totals(self, index: Index) -> Totals:
        return self._totals

    def left(self, rows: Rows) -> Rows:
        """A part's rows without those that go."""
        assert self._gone is not None
        table = rows.table
        if rows.kind == "documents":
            going = self._going(table)
        else:
            ours = pc.equal(table["tenant"].cast(pa.string()).combine_chunks(), self._target.tenant)
            if not ours.true_count:
                return rows
            contents = pa.array([content in self._gone for content in table["content_hash"].to_pylist()])
            going = pc.and_(pc.and_(ours, contents), self._old(table))
        return rows.filter(pc.invert(going)) if going.true_count else rows

    def _going(self, documents: pa.Table) -> pa.BooleanArray:
        return pc.and_(self._target.among(documents), self._old(documents))

    def _old(self, table: pa.Table) -> pa.BooleanArray:
        return pc.less_equal(table["sequence"].combine_chunks(), self._until)

"""Small parts to large ones, so that a version has few parts however many commits there were.

In: the parts of a version. Out: another version with the same rows in other parts. Level 0 takes what commits add, and merges 16
parts of like size into one. Once some of these are large, they go to level 1 and on, where parts of one kind do not overlap:
level n holds 16^n parts, and what is too much goes down, merged with the parts below that its keys meet. Superseded rows are
left out on the way, tombstones too where nothing older is left for them to hide.

Knows nothing of blobs. A merge that another writer has overtaken is thrown away.

Cost: a merge rewrites the parts that it touches, 65,536 rows and what lies below them: some 17 parts, 150 MB and 3 s, holding a
row group of each. A row is rewritten 3 times in level 0, and some 10 times for each level below.
"""

import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from core.store.errors import StoreError
from core.store.index import Index
from core.store.manifest import PartKind
from core.store.objects import Objects
from core.store.parts import PART_ROWS, SCHEMAS, Rows, encode_part
from core.store.roots import Part, Root
from core.store.versions import Versions

log = logging.getLogger(__name__)

_MERGE = 16


class Plan(NamedTuple):
    """Parts of one kind to merge, and the level that the result goes to."""

    inputs: list[Part]
    level: int


def plan(parts: Sequence[Part], patience: int = 0) -> Plan | None:
    """What is to merge first, if anything. patience: how many more small parts than 16 may gather."""
    by_level: defaultdict[tuple[PartKind, int], list[Part]] = defaultdict(list)
    sizes: defaultdict[tuple[PartKind, int], list[Part]] = defaultdict(list)
    for part in parts:
        by_level[part.kind, part.level].append(part)
        if part.level == 0:
            sizes[part.kind, next((power for power in (1, 2, 3) if part.rows < _MERGE**power), 4)].append(part)
    for (kind, power), alike in sizes.items():
        if power < 4 and len(alike) >= _MERGE + patience:
            return Plan(alike, 0)
        if power == 4 and (len(alike) >= _MERGE + patience or sum(part.rows for part in alike) >= PART_ROWS):
            upper = alike[: next((count for count in range(1, len(alike)) if _rows(alike[:count]) >= PART_ROWS), len(alike))]
            return Plan([*upper, *_met(upper, by_level[kind, 1])], 1)
    for (kind, level), alike in sorted(by_level.items()):
        if level and len(alike) > _MERGE**level:
            below = by_level[kind, level + 1]
            least = min(([part, *_met([part], below)] for part in alike), key=lambda inputs: _rows(inputs[1:]))
            return Plan(least, level + 1)
    return None


def _met(upper: Sequence[Part], below: Sequence[Part]) -> list[Part]:
    first, last = min(part.first for part in upper), max(part.last for part in upper)
    return [part for part in below if part.first <= last and first <= part.last]


def _rows(parts: Sequence[Part]) -> int:
    return sum(part.rows for part in parts)


class Merger:
    """Merges in one store, one thread at a time."""

    def __init__(self, objects: Objects, versions: Versions) -> None:
        self._objects = objects
        self._versions = versions
        self._merging = threading.Lock()

    def merge_what_is_due(self, patience: int | None = None) -> None:
        """Merges until nothing is due, unless another thread is at it. A failure is logged: nothing hangs on a merge.

        patience: as of `plan`; drawn anew by default, so that of processes that commit side by side seldom two make one merge.
        """
        if not self._merging.acquire(blocking=False):
            return
        try:
            while due := plan(self._versions.index.root.parts, random.randrange(_MERGE // 2) if patience is None else patience):
                if not self._merge(due):
                    self._versions.refresh()
        except (StoreError, OSError) as error:
            log.warning("parts could not be merged: %s", error)
        finally:
            self._merging.release()

    def merge_all(self) -> None:
        """Makes as few parts as there can be, each full but the last of a kind. Rewrites all; errors as of `Versions.commit`."""
        with self._merging:
            for kind in SCHEMAS:
                while len(parts := [part for part in self._versions.index.root.parts if part.kind == kind]) > 1:
                    fewest = -(-_rows(parts) // PART_ROWS)
                    level = next(level for level in range(1, 9) if _MERGE**level >= fewest)
                    if len(parts) == fewest and all(part.level == level for part in parts):
                        break
                    if not self._merge(Plan(parts, level)):
                        self._versions.refresh()

    def _merge(self, due: Plan) -> bool:
        """Carries out a plan; False where another writer has overtaken it."""
        began_s = time.monotonic()
        [moved, *others] = due.inputs
        if not others and due.level:
            written: list[Part] = []
            outputs = [moved.model_copy(update={"level": due.level})]
        else:
            written = outputs = self._write(due)
        names = {part.name for part in due.inputs}

        def change(index: Index) -> Root | None:
            kept = [part for part in index.root.parts if part.name not in names]
            beside = [part for part in kept if part.kind == moved.kind and part.level == due.level > 0]
            overtaken = len(kept) + len(names) != len(index.root.parts)
            if overtaken or any(part.overlaps(output) for part in beside for output in outputs):
                return None
            return index.root.next([*kept, *outputs])

        if self._versions.commit(change, began_s) is not None:
            return True
        for part in written:
            self._objects.remove(part.object_name)
        return False

    def _write(self, due: Plan) -> list[Part]:
        names = {part.name for part in due.inputs}
        kind = due.inputs[0].kind
        beside = [part for part in self._versions.index.root.parts if part.kind == kind and part.name not in names]
        total = _rows(due.inputs)
        each = -(-total // -(-total // PART_ROWS))
        outputs: list[Part] = []
        pending: list[Rows] = []
        for rows in chain(self._versions.reader.scan(due.inputs, keep=False), [None]):
            if rows is not None and len(kept := _without_idle_tombstones(rows, beside)):
                pending.append(kept)
            while pending and (rows is None or sum(map(len, pending)) >= each):
                together = _concatenated(pending)
                outputs.append(self._write_part(together.slice(0, min(each, len(together))), due.level))
                pending = [together.slice(each, len(together))] if len(together) > each else []
        assert due.level == 0 or not any(one.overlaps(other) for one, other in pairwise(outputs))
        return outputs

    def _write_part(self, rows: Rows, level: int) -> Part:
        part, data = encode_part(rows, level)
        self._objects.write(part.object_name, [data])
        return part


def _concatenated(pieces: Sequence[Rows]) -> Rows:
    """Of pieces whose keys ascend from one to the next."""
    if len(pieces) == 1:
        return pieces[0]
    return Rows(
        pieces[0].kind,
        pa.concat_tables([piece.table for piece in pieces]).combine_chunks(),
        pa.concat_arrays([piece.keys for piece in pieces]),
    )


def _without_idle_tombstones(rows: Rows, beside: Sequence[Part]) -> Rows:
    """Without those of whose key no part beside the merge can hold an older row."""
    deleted = rows.table["deleted"].combine_chunks()
    if not deleted.true_count:
        return rows
    kept = [True] * len(rows)
    for place in pc.indices_nonzero(deleted).to_pylist():
        key, sequence = rows.keys[place].as_py(), rows.table["sequence"][place].as_py()
        kept[place] = any(part.covers(key) and part.sequence < sequence for part in beside)
    return rows.filter(pa.array(kept))

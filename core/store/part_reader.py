"""Look-ups and scans over manifest parts, reading no more of them than the keys in question need.

In: parts as a root lists them, and key ranges. Out: rows, newest first to hold: of the rows of one key, that of the highest
sequence. Tombstones are given too; whoever asks leaves them out. Knows nothing of versions: parts are never edited, so what was
read once holds under every root that lists it.

Footers and row groups are kept decoded under a budget of bytes, the least recently used go. What several threads miss at the same
time is read by one of them. All that a call misses is read side by side: a look-up that has nothing in memory takes two rounds of
ranged reads (footers, then row groups; a small part comes whole).

Cost: a key whose row group is in memory takes 20 us a part that may hold it, 1 ms in all; one that is not, 5 ms and two reads.
Many keys at once read each row group once, so that more than a hundredth of all rows are found faster by a scan, which passes
over a million rows in a second or two and holds a row group of each run.
"""

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from core.store.manifest import Key, Row
from core.store.objects import Objects
from core.store.parts import Footer, Rows, decode_footer, decode_group, merged
from core.store.roots import Part, runs

CACHE_BYTES = 2**28
_WHOLE_BYTES = 2**17
_GROUPS_AT_ONCE = 32
_FEW_RANGES = 16
_FOOTER = -1

_Name = tuple[str, int]
"""A part and the number of a row group in it, or `_FOOTER`."""

ItemT = TypeVar("ItemT", Part, "_Place")
DecodedT = TypeVar("DecodedT", Footer, Rows)


class KeyRange(NamedTuple):
    """Keys from `first` on, below `end`."""

    first: str
    end: str

    @classmethod
    def only(cls, key: str) -> "KeyRange":
        return cls(key, key + "\0")

    @classmethod
    def below(cls, prefix: str) -> "KeyRange":
        """The keys that go on with further fields behind `prefix`."""
        return cls(prefix + "\0", prefix + "\1")


class _Ranges:
    """Some of several ranges that ascend without overlap."""

    def __init__(self, firsts: list[str], ends: list[str], start: int = 0, end: int | None = None) -> None:
        self._firsts = firsts
        self._ends = ends
        self._from = start
        self._to = len(firsts) if end is None else end

    def __len__(self) -> int:
        return max(0, self._to - self._from)

    def between(self, first: str, last: str) -> "_Ranges":
        """Those that hold keys from `first` to `last`, or may."""
        start = bisect_right(self._ends, first, self._from, self._to)
        return _Ranges(self._firsts, self._ends, start, bisect_right(self._firsts, last, start, self._to))

    def places(self, keys: pa.StringArray) -> list[int]:
        """Where, among ascending keys, those in these ranges stand."""
        if len(self) > _FEW_RANGES:
            return [place for place, key in enumerate(keys.to_pylist()) if self.between(key, key)]
        places: list[int] = []
        for number in range(self._from, self._to):
            at = _left(keys, self._firsts[number])
            while at < len(keys) and keys[at].as_py() < self._ends[number]:
                places.append(at)
                at += 1
        return places


class _Place(NamedTuple):
    """A row group of a part."""

    part: Part
    footer: Footer
    number: int

    @property
    def name(self) -> _Name:
        return self.part.name, self.number


class PartReader:
    """Reads the parts of one store, for any number of threads. cache_bytes: for what is kept decoded."""

    def __init__(self, objects: Objects, cache_bytes: int = CACHE_BYTES) -> None:
        self._objects = objects
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[_Name, Footer | Rows] = OrderedDict()
        self._cached_bytes = 0
        self._reading: dict[_Name, Future[Any]] = {}
        self._lock = threading.Lock()

    def lookup(self, parts: Sequence[Part], ranges: Iterable[KeyRange]) -> dict[Key, Row]:
        """The rows of one kind whose keys are in any of these ranges, which do not overlap; tombstones too."""
        ordered = sorted(ranges)
        wanted = _Ranges([each.first for each in ordered], [each.end for each in ordered])
        touched = [(part, met) for part in parts if (met := wanted.between(part.first, part.last))]
        places: list[tuple[_Place, _Ranges]] = []
        for (part, met), footer in zip(touched, self._footers([part for part, _ in touched]), strict=True):
            for number, group in enumerate(footer.groups):
                if inside := met.between(group.first, group.last):
                    places.append((_Place(part, footer, number), inside))
        found: dict[Key, Row] = {}
        for start in range(0, len(places), _GROUPS_AT_ONCE):
            some = places[start : start + _GROUPS_AT_ONCE]
            for rows, (_, inside) in zip(self._groups([place for place, _ in some]), some, strict=True):
                at = inside.places(rows.keys)
                for row in rows.take(at) if at else ():
                    if row.key not in found or found[row.key].sequence < row.sequence:
                        found[row.key] = row
        return found

    def scan(
        self, parts: Sequence[Part], first: str = "", end: str | None = None, step: int | None = None, keep: bool = True
    ) -> Iterator[Rows]:
        """All rows of one kind with keys from `first` on, below `end`, in order, tombstones too; some at a time, never none.

        step: about how many rows at a time are wanted. keep: whether what is read stays in memory for others.
        """
        cursors = [_Cursor(run, first) for run in runs(parts)]
        while ahead := [cursor for cursor in cursors if cursor.run and (end is None or cursor.run[0].first < end)]:
            unknown = [cursor for cursor in ahead if cursor.footer is None]
            for cursor, footer in zip(unknown, self._footers([cursor.run[0] for cursor in unknown], keep), strict=True):
                cursor.enter(footer, first)
            bound = min(cursor.last for cursor in ahead) + "\0"
            bound = bound if end is None else min(bound, end)
            near = [cursor for cursor in ahead if cursor.first < bound]
            unread = [cursor for cursor in near if cursor.rows is None]
            for cursor, rows in zip(unread, self._groups([cursor.place for cursor in unread], keep), strict=True):
                cursor.rows, cursor.at = rows, _left(rows.keys, first)
            if step is not None:
                bound = min([bound, *(key for cursor in near if (key := cursor.key_after(step)) is not None)])
            pieces = [piece for cursor in near if len(piece := cursor.take(bound))]
            if pieces:
                yield merged(pieces)
            if bound == end:
                return
            first = bound
            for cursor in ahead:
                cursor.leave(first)

    def _footers(self, parts: Sequence[Part], keep: bool = True) -> list[Footer]:
        def read(missing: Sequence[Part]) -> Iterator[Footer]:
            ranges = [
                (part.object_name, 0, part.bytes)
                if part.bytes <= _WHOLE_BYTES
                else (part.object_name, part.bytes - part.footer_bytes, part.footer_bytes)
                for part in missing
            ]
            for part, data in zip(missing, self._objects.read_ranges(ranges), strict=True):
                footer = decode_footer(part, data[-part.footer_bytes :])
                if len(data) == part.bytes:
                    for number, group in enumerate(footer.groups):
                        rows = decode_group(part, footer, number, data[group.offset : group.offset + group.length])
                        with self._lock:
                            self._keep((part.name, number), rows)
                yield footer

        return self._found({(part.name, _FOOTER): part for part in parts}, read, keep)

    def _groups(self, places: Sequence[_Place], keep: bool = True) -> list[Rows]:
        def read(missing: Sequence[_Place]) -> Iterator[Rows]:
            groups = [(place.part.object_name, place.footer.groups[place.number]) for place in missing]
            ranges = [(name, group.offset, group.length) for name, group in groups]
            for place, data in zip(missing, self._objects.read_ranges(ranges), strict=True):
                yield decode_group(*place, data)

        return self._found({place.name: place for place in places}, read, keep)

    def _found(
        self, wanted: dict[_Name, ItemT], read: Callable[[Sequence[ItemT]], Iterable[DecodedT]], keep: bool
    ) -> list[DecodedT]:
        """What is in memory, what other threads are reading already, once they have it, and the rest by `read`.

        What another thread failed to read is read again here, so that whoever raises has met the error itself.
        """
        found: dict[_Name, Any] = {}
        own: dict[_Name, Future[DecodedT | None]] = {}
        others: dict[_Name, Future[DecodedT | None]] = {}
        with self._lock:
            for name in wanted:
                if name in self._cache:
                    self._cache.move_to_end(name)
                    found[name] = self._cache[name]
                elif name in self._reading:
                    others[name] = self._reading[name]
                else:
                    own[name] = self._reading[name] = Future()
        try:
            found.update(zip(own, read([wanted[name] for name in own]), strict=True))
        finally:
            with self._lock:
                for name in own:
                    del self._reading[name]
                    if name in found and keep:
                        self._keep(name, found[name])
            for name, promised in own.items():
                promised.set_result(found.get(name))
        found |= {name: promised.result() for name, promised in others.items()}
        failed = [name for name in others if found[name] is None]
        found.update(zip(failed, read([wanted[name] for name in failed]), strict=True))
        with self._lock:
            for name in failed if keep else ():
                self._keep(name, found[name])
        return [found[name] for name in wanted]

    def _keep(self, name: _Name, value: Footer | Rows) -> None:
        """Under the lock."""
        if value.nbytes > self._cache_bytes:
            return
        if name not in self._cache:
            self._cached_bytes += value.nbytes
            self._cache[name] = value
        while self._cached_bytes > self._cache_bytes:
            _, gone = self._cache.popitem(last=False)
            self._cached_bytes -= gone.nbytes


class _Cursor:
    """Where a scan stands in a run: `first` and `last` are keys of the row group that it comes to next, read or not."""

    def __init__(self, run: Sequence[Part], start: str) -> None:
        self.run = run[bisect_left([part.last for part in run], start) :]
        self.footer: Footer | None = None
        self.rows: Rows | None = None
        self.at = 0
        self._number = 0

    @property
    def place(self) -> _Place:
        assert self.footer is not None
        return _Place(self.run[0], self.footer, self._number)

    @property
    def first(self) -> str:
        assert self.footer is not None
        return self.footer.firsts[self._number]

    @property
    def last(self) -> str:
        assert self.footer is not None
        return self.footer.lasts[self._number]

    def enter(self, footer: Footer, start: str) -> None:
        self.footer, self._number, self.rows = footer, bisect_left(footer.lasts, start), None

    def key_after(self, rows: int) -> str | None:
        """The key so many rows on, within the row group."""
        assert self.rows is not None
        return self.rows.keys[self.at + rows].as_py() if self.at + rows < len(self.rows) else None

    def take(self, end: str) -> Rows:
        """The rows of the group below `end`."""
        assert self.rows is not None
        start, self.at = self.at, _left(self.rows.keys, end, self.at)
        return self.rows.slice(start, self.at)

    def leave(self, start: str) -> None:
        """Goes to the row group that holds `start` or comes after it."""
        assert self.footer is not None
        if self.last >= start:
            return
        self._number, self.rows = self._number + 1, None
        if self._number == len(self.footer.groups):
            self.run, self._number, self.footer = self.run[1:], 0, None


def _left(keys: pa.StringArray, key: str, at: int = 0) -> int:
    """Where the first key stands, from `at` on, that is not below `key`."""
    return bisect_left(range(len(keys)), key, lo=at, key=lambda place: keys[place].as_py())

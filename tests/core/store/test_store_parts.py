"""Manifest parts: any byte that is wrong is noticed, and no more is read than a key needs."""

import dataclasses
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.store import parts as parts_module
from core.store.errors import CorruptObject
from core.store.manifest import AdapterRow, DocumentRow, Location, PartKind, Row, blob_hash
from core.store.objects import FileObjects, Objects
from core.store.part_reader import KeyRange, PartReader
from core.store.parts import SCHEMAS, decode_footer, decode_group, encode_part, joined, rows_to_tables
from core.store.roots import Part
from tests.stores import adapter, document

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


@pytest.fixture(autouse=True)
def tiny_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "GROUP_ROWS", 4)


class CountingObjects(FileObjects):
    """Notes what is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.reads: list[tuple[str, int, int | None]] = []

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.reads.append((name, offset, length))
        return super().read(name, offset, length)


def document_row(name: str, sequence: int = 0, text: str = "text", deleted: bool = False, tenant: str = "t") -> DocumentRow:
    one = document(text, name=name, tenant=tenant)
    place = Location("a" * 32 + ".bin", 64, 7, blob_hash(text.encode()))
    return DocumentRow(
        *(tenant, "c", name), "Title", one.content_hash, **place._asdict(), sequence=sequence, created=NOW, deleted=deleted
    )


def adapter_row(text: str, **changes: object) -> AdapterRow:
    row = adapter(document(text), encoding="bf16").row(Location("a" * 32 + ".bin", 0, 160, "b" * 64), NOW)
    return dataclasses.replace(row, **changes)


ROWS: dict[PartKind, list[Row]] = {
    "documents": [document_row(f"n{number:02}", deleted=number == 5) for number in range(10)],
    "adapters": [adapter_row(f"{number}", quality=number / 10, parent=None if number % 2 else "p" * 64) for number in range(10)],
}


def made(objects: Objects, rows: Sequence[Row], level: int = 0, sequence: int | None = None) -> Part:
    """A part in storage."""
    [table] = rows_to_tables("adapters" if isinstance(rows[0], AdapterRow) else "documents", rows)
    part, data = encode_part(table, level)
    objects.write(part.object_name, [data])
    return part if sequence is None else part.model_copy(update={"sequence": sequence})


def decoded(part: Part, data: bytes) -> list[Row]:
    footer = decode_footer(part, data[-part.footer_bytes :])
    groups = [data[group.offset : group.offset + group.length] for group in footer.groups]
    tables = [decode_group(part, footer, number, group) for number, group in enumerate(groups)]
    return [row for table in tables for row in table.take(range(len(table)))]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_rows_come_back_in_order(kind: PartKind) -> None:
    rows = ROWS[kind]
    [table] = rows_to_tables(kind, rows[::-1])
    part, data = encode_part(table, level=3)
    ordered = sorted(rows, key=lambda row: row.key)
    assert decoded(part, data) == ordered
    assert (part.rows, part.bytes, part.level, part.kind, part.sequence) == (10, len(data), 3, kind, 0)
    assert (part.first, part.last, part.deleted) == (joined(*ordered[0].key), joined(*ordered[-1].key), kind == "documents")
    later = part.model_copy(update={"sequence": 7})
    assert decoded(later, data) == [dataclasses.replace(row, sequence=7) for row in ordered], "sequences count from the part's"


def test_columns_are_the_fields_of_rows() -> None:
    for kind, row_type in (("documents", DocumentRow), ("adapters", AdapterRow)):
        assert SCHEMAS[kind].names == [field.name for field in dataclasses.fields(row_type)]


def test_rows_of_several_versions_keep_their_sequences() -> None:
    rows = [document_row("a", 12), document_row("b", 9), document_row("c", 31)]
    [table] = rows_to_tables("documents", rows)
    part, data = encode_part(table, level=0)
    assert part.sequence == 9 and decoded(part, data) == rows


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(SCHEMAS)), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_every_byte_of_a_part_is_checked(kind: PartKind, where: float, mask: int) -> None:
    [table] = rows_to_tables(kind, ROWS[kind])
    part, data = encode_part(table, level=0)
    damaged = bytearray(data)
    damaged[int(where * len(data))] ^= mask
    with pytest.raises(CorruptObject, match=f"manifest/{part.name}.* is damaged"):
        decoded(part, bytes(damaged))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(SCHEMAS)), st.randoms(use_true_random=False), st.booleans(), st.integers(1, 30))
def test_forged_bytes_never_crash_the_reader(kind: PartKind, chance: random.Random, in_footer: bool, changes: int) -> None:
    [table] = rows_to_tables(kind, ROWS[kind])
    part, data = encode_part(table, level=0)
    rows_end, forged = len(data) - part.footer_bytes, bytearray(data)
    for _ in range(changes):
        at = chance.randrange(rows_end, len(data)) if in_footer else chance.randrange(rows_end)
        forged[at] = chance.choice([0, 127, 128, 255, chance.randrange(256)])
    footer_bytes = bytes(forged[rows_end:])
    part = part.model_copy(update={"checksum": blob_hash(footer_bytes)})
    try:
        footer = decode_footer(part, footer_bytes)
        for number, group in enumerate(footer.groups):
            piece = bytes(forged[group.offset : group.offset + group.length])
            sealed = tuple(each._replace(checksum=blob_hash(piece)) for each in footer.groups)
            rows = decode_group(part, dataclasses.replace(footer, groups=sealed), number, piece)
            rows.take(range(len(rows)))
    except CorruptObject as error:
        assert part.name in str(error) or "the manifest holds a row" in str(error)


def test_a_part_under_anothers_name_is_refused(tmp_path: Path) -> None:
    objects = FileObjects(str(tmp_path))
    one, other = made(objects, [document_row("a")]), made(objects, [document_row("b")])
    adapters = made(objects, [adapter_row("a")])
    for swapped in (other, adapters):
        (tmp_path / one.object_name).write_bytes((tmp_path / swapped.object_name).read_bytes().ljust(one.bytes))
        with pytest.raises(CorruptObject, match=one.name):
            PartReader(objects).lookup([one], [KeyRange.only(one.first)])


def test_a_look_up_reads_one_footer_and_one_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.store.part_reader._WHOLE_BYTES", 0)
    objects = CountingObjects(tmp_path)
    rows = [document_row(f"n{number:02}") for number in range(40)]
    part, beside = made(objects, rows), made(objects, [document_row("m"), document_row("n99")], level=1)
    reader = PartReader(objects)
    wanted = [KeyRange.only(joined(*rows[17].key))]
    assert reader.lookup([part], wanted) == {rows[17].key: rows[17]}
    [(_, _, footer_bytes), (_, _, group_bytes)] = objects.reads
    assert footer_bytes == part.footer_bytes and group_bytes is not None and group_bytes < part.bytes / 8
    assert reader.lookup([part], wanted) == {rows[17].key: rows[17]} and len(objects.reads) == 2
    found = reader.lookup([part, beside], [KeyRange.only(joined("t", "c", f"n{number}")) for number in (18, 19, 99)])
    assert [name for _, _, name in found] == ["n18", "n19", "n99"]
    assert len(objects.reads) == 2 + 2, "one row group was there, the other part was not"
    assert reader.lookup([part], [KeyRange.only("t\0c\0n"), KeyRange.only("t\0c\0n17x"), KeyRange.only("t\0d\0n17")]) == {}
    assert reader.lookup([part, beside], []) == {} and len(objects.reads) <= 5


def test_a_small_part_is_read_whole_and_at_once(tmp_path: Path) -> None:
    objects = CountingObjects(tmp_path)
    part = made(objects, ROWS["documents"])
    assert len(PartReader(objects).lookup([part], [KeyRange.below("t")])) == 10
    assert objects.reads == [(part.object_name, 0, part.bytes)]


def test_the_cache_keeps_within_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.store.part_reader._WHOLE_BYTES", 0)
    objects = CountingObjects(tmp_path)
    part = made(objects, [document_row(f"n{number:02}") for number in range(40)])
    footer = decode_footer(part, objects.read(part.object_name, part.bytes - part.footer_bytes))
    reader = PartReader(objects, cache_bytes=footer.nbytes + 6000)

    def keys(rows: Iterator[object]) -> int:
        return sum(1 for _ in rows)

    for _ in range(3):
        assert keys(reader.scan([part])) == 10
        assert reader._cached_bytes <= footer.nbytes + 6000
        assert sum(value.nbytes for value in reader._cache.values()) == reader._cached_bytes
    assert len(objects.reads) > 20
    before = len(objects.reads)
    assert PartReader(objects, cache_bytes=0).lookup([part], [KeyRange.below("t\0c")]) and len(objects.reads) == before + 11


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.integers(0, 30), st.booleans(), min_size=1, max_size=20), min_size=1, max_size=6),
    st.integers(0, 31),
    st.one_of(st.none(), st.integers(0, 31)),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_scans_and_look_ups_give_the_newest_rows(
    tmp_path_factory: pytest.TempPathFactory,
    versions: list[dict[int, bool]],
    first: int,
    end: int | None,
    step: int | None,
) -> None:
    objects = FileObjects(str(tmp_path_factory.mktemp("parts")))
    expected: dict[str, DocumentRow] = {}
    listed = []
    for sequence, names in enumerate(versions, 5):
        rows = [document_row(f"{name:02}", deleted=deleted) for name, deleted in names.items()]
        listed.append(made(objects, rows, sequence=sequence))
        expected |= {row.name: dataclasses.replace(row, sequence=sequence) for row in rows}
    reader = PartReader(objects)
    start, stop = joined("t", "c", f"{first:02}"), None if end is None else joined("t", "c", f"{end:02}")
    batches = list(reader.scan(listed, start, stop, step))
    scanned = [row for batch in batches for row in batch.take(range(len(batch)))]
    wanted = [name for name in sorted(expected) if f"{first:02}" <= name and (end is None or name < f"{end:02}")]
    assert scanned == [expected[name] for name in wanted]
    assert all(len(batch) for batch in batches)
    assert all(len(batch) <= (step or 10**9) * len(listed) for batch in batches)
    if end is None or end > first:
        assert reader.lookup(listed, [KeyRange(start, stop or "u")]) == {expected[name].key: expected[name] for name in wanted}
    ranges = [KeyRange.only(joined("t", "c", f"{name:02}")) for name in range(32)]
    assert reader.lookup(listed, ranges) == {row.key: row for row in expected.values()}


class HeldObjects(CountingObjects):
    """The first read waits until `go` is set; with `broken`, it fails then."""

    def __init__(self, path: Path, broken: bool = False) -> None:
        super().__init__(path)
        self.begun, self.go, self._broken = threading.Event(), threading.Event(), broken

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().read(name, offset, length)
        if len(self.reads) > 1:
            self.go.set()  # nobody waits for the first: let it end, so that the test can say so
            return data
        self.begun.set()
        assert self.go.wait(60)
        if self._broken:
            raise OSError("the storage hung up")
        return data


@pytest.mark.parametrize("broken", [False, True])
def test_what_two_threads_miss_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """Unless the one that reads it fails: then the other reads it, and only the first raises."""
    objects = HeldObjects(tmp_path, broken)

    class Promise(Future):
        def result(self, timeout: float | None = None) -> Any:
            objects.go.set()  # the second thread has come to wait for the first
            return super().result(timeout)

    monkeypatch.setattr("core.store.part_reader.Future", Promise)
    rows = [document_row(f"n{number}") for number in range(3)]
    reader, part = PartReader(objects), made(objects, rows)
    with ThreadPoolExecutor(2) as pool:
        ask = [KeyRange.only(joined(*rows[0].key))]
        first = pool.submit(reader.lookup, [part], ask)
        assert objects.begun.wait(60)
        second = pool.submit(reader.lookup, [part], [KeyRange.only(joined(*rows[1].key))])
        assert list(second.result(60)) == [rows[1].key]
        if broken:
            with pytest.raises(OSError, match="hung up"):
                first.result(60)
        else:
            assert list(first.result(60)) == [rows[0].key]
    assert len(objects.reads) == 1 + broken
    assert list(reader.lookup([part], ask)) == [rows[0].key] and len(objects.reads) == 1 + broken, "it is in memory now"
    assert not reader._reading

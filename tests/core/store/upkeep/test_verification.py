"""Damage and forgery anywhere in a store: `verify` names every object that is wrong, and goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import core.store.upkeep.verification
from core.config import digest
from core.store.errors import StoreError
from core.store.opening import open_objects
from core.store.parts import Rows, encode_part
from core.store.store import Store
from core.store.upkeep.results import Verified
from core.store.upkeep.verification import verify
from core.text.documents import Window
from tests.stores import SPEC, adapter, document, flip, store_with_one, the_file


def verified(path: Path) -> Verified:
    return verify(open_objects(path), threads=2)


def store_of_three(path: Path) -> Store:
    store = Store.open(path, create=True)
    documents = [document(f"text {number}", name=str(number)) for number in range(3)]
    store.put(documents, [adapter(one, number) for number, one in enumerate(documents)])
    store.put([document("another", name="another")])
    return store


def test_a_sound_store_has_no_faults_and_its_progress_ends_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.store.upkeep.verification, "_WINDOW_ROWS", 1)
    monkeypatch.setattr(core.store.upkeep.verification, "_PIECE_BYTES", 100)
    store, told = store_of_three(tmp_path), list[tuple[int, int]]()
    found = verify(open_objects(tmp_path), progress=lambda done, total: told.append((done, total)))
    assert (found.faults, found.orphans, found.roots, found.sequence) == ([], [], 3, store.sequence)
    assert (found.documents, found.adapters, found.parts) == (4, 3, 3)
    total = store.stats().text_bytes + store.stats().adapter_bytes
    assert told[-1] == (total, total) and found.bytes == total


def test_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        verify(open_objects(tmp_path))


def test_every_damaged_blob_is_named(tmp_path: Path) -> None:
    store = store_of_three(tmp_path)
    rows = {row.name: row for row in store.list_documents("tenant").rows}
    [made] = store.find_adapters("tenant", rows["2"].content_hash)
    for row in (rows["0"], rows["another"], made):
        flip(tmp_path / "shards" / row.shard, row.offset + 1)
    faults = verified(tmp_path).faults
    assert len(faults) == 3
    for row, what in ((rows["0"], "document '0'"), (rows["another"], "document 'another'"), (made, f"adapter {made.adapter_id}")):
        where = f"shards/{row.shard} is damaged between bytes {row.offset} and {row.offset + row.length}"
        assert any(where in fault and what in fault for fault in faults)


def test_missing_and_short_shards_are_named_and_others_still_read(tmp_path: Path) -> None:
    store = store_of_three(tmp_path)
    rows = {row.name: row for row in store.list_documents("tenant").rows}
    (tmp_path / "shards" / rows["another"].shard).unlink()
    short = tmp_path / "shards" / rows["0"].shard
    short.write_bytes(short.read_bytes()[:100])
    found = verified(tmp_path)
    assert f"shards/{rows['another'].shard} is missing: 1 documents and adapters lie in it" in found.faults
    cut = [fault for fault in found.faults if "is cut short" in fault]
    assert len(cut) == 4 and all(short.name in fault for fault in cut) and len(found.faults) == 5


def test_a_damaged_part_is_named_and_the_others_still_read(tmp_path: Path) -> None:
    store = store_of_three(tmp_path)
    [part] = [part for part in store._versions.index.root.parts if part.kind == "adapters"]
    flip(tmp_path / part.object_name, 10)
    row = store.find_document("tenant", "c", "another")
    assert row is not None
    flip(tmp_path / "shards" / row.shard, 0)
    faults = verified(tmp_path).faults
    assert len(faults) == 2 and f"{part.object_name}, row group 0, is damaged" in faults[0] and row.shard in faults[1]


def test_a_missing_part_and_one_that_grew_are_named(tmp_path: Path) -> None:
    store = store_of_three(tmp_path)
    one, other, _ = store._versions.index.root.parts
    (tmp_path / one.object_name).unlink()
    with (tmp_path / other.object_name).open("ab") as file:
        file.write(b"more")
    faults = verified(tmp_path).faults
    assert sum(one.object_name in fault and "is missing" in fault for fault in faults) == 1
    assert any(f"{other.object_name} has {other.bytes + 4} bytes" in fault for fault in faults)


def test_roots_that_are_damaged_or_missing_are_named(tmp_path: Path) -> None:
    store_of_three(tmp_path)
    first, second, newest = sorted((tmp_path / "roots").glob("*.json"))
    flip(first, 40)
    assert [first.name in fault for fault in verified(tmp_path).faults] == [True]
    second.unlink()
    assert any(f"roots/{second.name} is missing" in fault for fault in verified(tmp_path).faults)
    flip(newest, 40)
    found = verified(tmp_path)
    assert len(found.faults) == 1 and newest.name in found.faults[0]


def forge(path: Path, change: Callable[[dict], object]) -> None:
    """The newest root, changed and sealed again, as only an intruder would."""
    file = the_file(path, "roots/*.json")
    values = json.loads(file.read_bytes())
    change(values)
    values.pop("checksum")
    file.write_bytes(json.dumps(values | {"checksum": digest(values)}, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda root: root.update(format_version=99), "has format version 99"),
        (lambda root: root["specs"].update({SPEC.fingerprint: SPEC.with_rank(3).to_json()}), "whose fingerprint is"),
        (lambda root: root["specs"].clear(), "names a spec"),
        (lambda root: root["producers"].clear(), "names a producer"),
        (lambda root: root["totals"].update(documents=7), "says documents=7"),
    ],
)
def test_forged_roots_are_named(tmp_path: Path, change: Callable[[dict], object], fault: str) -> None:
    store_with_one(tmp_path)
    forge(tmp_path, change)
    assert any(fault in each for each in verified(tmp_path).faults)


@pytest.mark.parametrize(
    ("column", "value", "fault"),
    [
        ("adapter_id", "f" * 64, "has not the id that follows from what it is"),
        ("window_end", 9, "has not the id that follows from what it is"),
        ("rank", 3, "says rank 3, and its spec 2"),
        ("encoding", "bf16", "320 bytes, and its spec 160 in bf16"),
        ("encoding", "fp7", "encoding 'fp7' is not known"),
        ("offset", 1, "no multiple of 64"),
        ("shard", "f" * 32 + ".bin", "is missing: 1 documents and adapters"),
        ("shard", "../../etc/passwd", "../../etc/passwd is missing"),
        ("content_hash", "0" * 64, "has not the id that follows from what it is"),
    ],
)
def test_forged_rows_are_named(tmp_path: Path, column: str, value: object, fault: str) -> None:
    store, _ = store_with_one(tmp_path)
    _forge_row(tmp_path, store, "adapters", column, value)
    assert any(fault in each for each in verified(tmp_path).faults)


def test_a_text_under_anothers_content_hash_is_named(tmp_path: Path) -> None:
    store, _ = store_with_one(tmp_path)
    _forge_row(tmp_path, store, "documents", "title", "Another title")
    assert any("whose content hash is another" in fault for fault in verified(tmp_path).faults)


def _forge_row(path: Path, store: Store, kind: str, column: str, value: object) -> None:
    import pyarrow as pa

    root = store._versions.index.root
    [old] = [part for part in root.parts if part.kind == kind]
    [rows] = store._versions.reader.scan([old])
    field = rows.table.schema.get_field_index(column)
    kind_of_value = pa.string() if isinstance(value, str) else pa.int64()
    part, data = encode_part(Rows(old.kind, rows.table.set_column(field, column, pa.array([value], kind_of_value))), 0)
    (path / part.object_name).write_bytes(data)
    values = part.model_dump(mode="json")
    forge(path, lambda root: root.update(parts=[values if each["name"] == old.name else each for each in root["parts"]]))


def test_objects_that_no_version_names_are_listed_and_no_fault(tmp_path: Path) -> None:
    store, _ = store_with_one(tmp_path)
    orphan = tmp_path / "shards" / ("a" * 32 + ".bin")
    orphan.write_bytes(b"left")
    store.put([], [adapter(document(), 1, window=Window(1, 2))])
    found = verified(tmp_path)
    assert found.faults == [] and [(name, each.size) for name, each in found.orphans] == [(f"shards/{orphan.name}", 4)]


def test_demand_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    (tmp_path / "demand").mkdir()
    file = tmp_path / "demand" / ("20991231-" + "a" * 32 + ".json")
    file.write_text("{")
    assert [file.name in fault for fault in verified(tmp_path).faults] == [True]

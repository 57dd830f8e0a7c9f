"""Commits, versions and shards: what lands when answers are lost, hints are stale and objects are collected meanwhile."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.store.errors import CorruptObject, MissingObject, StoreError
from core.store.index import Index
from core.store.manifest import NewAdapter, Row
from core.store.objects import FileObjects, StorageError
from core.store.parts import encode_part, rows_to_tables
from core.store.roots import Root, Roots, root_name
from core.store.shards import read_blobs, write_blobs
from core.store.store import Store
from tests.stores import SPEC, adapter, document, store_with_one, vector


class HookedObjects(FileObjects):
    """Runs `before` and `after` each root that is created, and counts what opening reads."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.before: Callable[[], object] = lambda: None
        self.after: Callable[[], object] = lambda: None
        self.reads: list[str] = []
        self.listed: list[str] = []

    def create(self, name: str, data: bytes) -> bool:
        self.before()
        made = super().create(name, data)
        self.after()
        return made

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.reads.append(name)
        return super().read(name, offset, length)

    def names(self, folder: str, after: str = "") -> Iterator[str]:
        for name in super().names(folder, after):
            self.listed.append(name)
            yield name


def opened(path: Path) -> tuple[Store, HookedObjects]:
    objects = HookedObjects(path)
    store = Store(objects)
    store.refresh()
    objects.reads.clear()
    objects.listed.clear()
    return store, objects


def once(action: Callable[[], object]) -> Callable[[], object]:
    left = [action]
    return lambda: left.pop()() if left else None


def fail() -> None:
    raise StorageError("roots/: the connection was cut")


def parts_in_use(store: Store) -> set[str]:
    return {part.name for part in store._versions.index.root.parts}


def test_a_commit_whose_answer_was_lost_is_found_to_stand(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    store, objects = opened(tmp_path)
    objects.after = once(fail)
    result = store.put([document("new", name="new")])
    assert (result.sequence, result.new_documents) == (3, 1) == (Store.open(tmp_path).sequence, 1)


def test_a_commit_that_failed_can_be_put_again(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    store, objects = opened(tmp_path)
    objects.before = once(fail)
    with pytest.raises(OSError, match="connection was cut"):
        store.put([document("new", name="new")])
    assert Store.open(tmp_path).sequence == 2
    assert store.put([document("new", name="new")]).new_documents == 1
    assert Store.open(tmp_path).stats().documents == 2


def test_a_lost_race_leaves_no_parts_and_writes_no_part_twice(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    store, objects = opened(tmp_path)
    rival, same = Store.open(tmp_path), document("same", name="same")
    objects.before = once(lambda: rival.put([document("other", name="other")]))
    parts: list[str] = []
    write = objects.write
    objects.write = lambda name, chunks: (parts.append(name), write(name, chunks))[1]  # type: ignore[method-assign]
    assert store.put([document("mine", name="mine")]).sequence == 4
    assert len([name for name in parts if name.startswith("manifest/")]) == 1
    objects.before = once(lambda: rival.put([same], [adapter(same)]))
    shards = {file.name for file in tmp_path.glob("shards/*")}
    result = store.put([same], [adapter(same, 1)])
    assert (result.new_documents, result.new_adapters, result.sequence) == (0, 0, 5)
    assert torch.equal(store.get_vector(result.adapters[0]), vector(0)), "the first commit of an id wins"
    assert {file.name for file in tmp_path.glob("shards/*")} == shards | {result.documents[0].shard}
    assert {file.name for file in tmp_path.glob("manifest/*")} == parts_in_use(store)


def commit_behind_the_first(store: Store, objects: HookedObjects, threads: list[threading.Thread]) -> None:
    """Runs the threads, each of which puts: the first is held in its commit until all the others wait for theirs."""
    entered, go_on = threading.Event(), threading.Event()
    objects.before = once(lambda: (entered.set(), go_on.wait(30)))
    threads[0].start()
    assert entered.wait(30)
    for thread in threads[1:]:
        thread.start()
    while len(store._commits._waiting) < len(threads):
        threads[1].join(0.01)
    go_on.set()
    for thread in threads:
        thread.join()


def test_puts_of_several_threads_become_one_version(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    store, objects = opened(tmp_path)
    results = {}

    def put(number: int) -> None:
        one, shared = document(f"{number}", name=f"{number}"), document("shared", name="shared")
        results[number] = store.put([one, shared], [adapter(one, number), adapter(shared, number)])

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    commit_behind_the_first(store, objects, threads)
    assert sorted(result.sequence for result in results.values()) == [3] + [4] * 7
    assert sum(result.new_documents for result in results.values()) == 9 == sum(each.new_adapters for each in results.values())
    assert len({result.adapters[1] for result in results.values()}) == 1
    for each in (store, Store.open(tmp_path)):
        assert each.stats()[2:4] == each.stats("tenant")[2:4] == (10, 10)
        for number, result in results.items():
            assert each.get_text(result.documents[0]) == f"{number}"
            assert torch.equal(each.get_vector(result.adapters[0]), vector(number))
    assert {file.name for file in tmp_path.glob("shards/*")} == {row.shard for row in every_row(store)}


def test_two_contents_of_one_name_become_two_versions(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    store, objects = opened(tmp_path)
    threads = [threading.Thread(target=store.put, args=([document(f"{number}", name="same")],)) for number in range(4)]
    commit_behind_the_first(store, objects, threads)
    assert store.sequence == 6 and store.stats() == store.stats("tenant")
    assert store.stats().documents == 2 and Store.open(tmp_path).find_document("tenant", "c", "same") is not None


def every_row(store: Store) -> list[Row]:
    rows = store.list_documents("tenant", limit=1000).rows
    found = store.find_adapters_of([("tenant", row.content_hash) for row in rows])
    return [*rows, *(adapter for adapters in found.values() for adapter in adapters)]


def test_opening_reads_a_bounded_number_of_objects(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    for number in range(40):
        store.put([document(f"{number}", name=f"{number:02}")])
    reader, objects = Store(HookedObjects(tmp_path)), None
    objects = reader._objects
    assert isinstance(objects, HookedObjects)
    reader.refresh()
    assert reader.sequence == store.sequence > 40
    assert len(objects.reads) == 2 and len(objects.listed) <= 18, "the hint and a root, found near the hint"
    assert reader.find_document("tenant", "c", "07") is not None
    assert len(objects.reads) <= 2 + len(parts_in_use(store))


@pytest.mark.parametrize("hint", [b"", b"nonsense", b"-1", b"9" * 20, b"0" * 20, f"{1:020}".encode(), None])
def test_the_newest_root_is_found_whatever_the_hint(tmp_path: Path, hint: bytes | None) -> None:
    store = Store.open(tmp_path, create=True)
    for number in range(4):
        store.put([document(f"{number}", name=f"{number}")])
    file = tmp_path / "roots" / "newest"
    file.unlink() if hint is None else file.write_bytes(hint)
    assert Store.open(tmp_path).sequence == 5


def test_a_reader_whose_root_was_collected_goes_on(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    reader = Store.open(tmp_path)
    for number in range(20):
        store.put([document(f"{number}", name=f"{number:02}")])
    for sequence in range(1, store.sequence):
        store._objects.remove(root_name(sequence))
    assert reader.refresh() and reader.sequence == store.sequence == Store.open(tmp_path).sequence
    assert len(reader.list_documents("tenant").rows) == 20


def rewritten(store: Store, rows: list[Row]) -> None:
    """What a collection will do: the rows' blobs to a new shard, all rows to new parts, and the old objects away."""
    before = parts_in_use(store)
    blobs = store.get_many(rows)
    places = write_blobs(store._objects, blobs)

    def change(index: Index) -> Root | None:
        moved = [replace(row, **place._asdict()) for row, place in zip(rows, places, strict=True)]
        parts = []
        for kind, key_field in (("documents", "name"), ("adapters", "adapter_id")):
            for table in rows_to_tables(kind, [row for row in moved if hasattr(row, key_field)]):
                part, data = encode_part(table, level=0)
                store._objects.write(part.object_name, [data])
                parts.append(part)
        return index.root.next(parts)

    assert store._versions.commit(change) is not None
    for name in before:
        store._objects.remove(f"manifest/{name}")
    for shard in {row.shard for row in rows}:
        store._objects.remove(f"shards/{shard}")


def test_a_reader_that_meets_collected_objects_looks_again(tmp_path: Path) -> None:
    store, one = store_with_one(tmp_path)
    reader, late = Store.open(tmp_path), Store.open(tmp_path)
    rows = every_row(reader)
    rewritten(store, every_row(store))
    text, flat_N = reader.get_text(rows[0]), reader.get_vector(rows[1])
    assert text == one.text and torch.equal(flat_N, vector()) and reader.sequence == store.sequence == 3
    assert late.sequence == 2 and late.find_document("tenant", "c", "name") == store.find_document("tenant", "c", "name")
    assert late.sequence == 3, "its parts had gone before they were read"
    for shard in tmp_path.glob("shards/*"):
        shard.unlink()
    for row in every_row(store):
        with pytest.raises(MissingObject, match="shards/"):
            reader.get_bytes(row)
    for part in tmp_path.glob("manifest/*"):
        part.unlink()
    with pytest.raises(MissingObject, match="manifest/"):
        Store.open(tmp_path).find_adapters("tenant", one.content_hash)


def test_a_look_up_during_anothers_refresh_answers_from_the_newest(tmp_path: Path) -> None:
    """A part has gone under it, and when it wants the newest version another thread has been there already."""
    store, one = store_with_one(tmp_path)
    versions = Store.open(tmp_path)._versions
    rewritten(store, every_row(store))
    asked = []

    def question(index: Index) -> str | None:
        asked.append(index.root.sequence)
        if len(asked) == 1:
            assert versions.refresh(), "what another thread does meanwhile"
        row = index.find_document("tenant", "c", "name")
        return None if row is None else row.content_hash

    assert versions.ask(question) == one.content_hash and asked == [2, 3]
    for part in tmp_path.glob("manifest/*"):
        part.unlink()
    with pytest.raises(MissingObject, match="manifest/"):
        Store.open(tmp_path)._versions.ask(question)


def test_a_put_streams_into_shards_of_a_set_size(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True, shard_bytes=1000)
    alive: list[int] = []

    def adapters() -> Iterator[NewAdapter]:
        for number in range(600):
            alive.append(len(list(tmp_path.glob("shards/*"))))
            yield adapter(document(f"text {number}"), number)

    result = store.put((document(f"text {number}", name=f"{number:03}") for number in range(50)), adapters())
    assert (result.sequence, result.new_documents, result.new_adapters) == (2, 50, 600)
    sizes = [file.stat().st_size for file in tmp_path.glob("shards/*")]
    assert all(size <= 1000 for size in sizes) and sum(sizes) <= 50 * 64 + 600 * 4 * SPEC.numel
    assert len(sizes) == pytest.approx(600 / 3, abs=5) and alive[-1] > 50, "shards are written while adapters come"
    blobs = store.get_many(result.adapters)
    assert blobs == [vector(number).numpy().tobytes() for number in range(600)]
    assert store.put(
        [], [adapter(document("big"), spec=SPEC.with_rank(9), vector=torch.ones(SPEC.with_rank(9).numel))]
    ).new_adapters
    assert max(file.stat().st_size for file in tmp_path.glob("shards/*")) == 4 * SPEC.with_rank(9).numel > 1000


def test_a_put_that_fails_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True, shard_bytes=1000)

    def adapters() -> Iterator[NewAdapter]:
        yield from (adapter(document(f"{number}"), number) for number in range(300))
        raise RuntimeError("the writer is out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.put([document()], adapters())
    with pytest.raises(ValueError, match="the vector has 2 bytes"):
        store.put([document()], [*(adapter(document(f"{number}")) for number in range(20)), adapter(document(), vector=b"xx")])
    assert store.sequence == 1 and not [file for file in tmp_path.rglob("*") if file.is_file() and "roots" not in file.parts]


def test_many_blobs_come_in_their_order(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    rows = store.put([document(f"text {number}", name=f"{number}") for number in range(20)]).documents
    assert store.get_many(rows[::-1]) == [f"text {number}".encode() for number in reversed(range(20))]
    assert store.get_many([]) == []
    place = replace(rows[3], offset=rows[4].offset)
    with pytest.raises(CorruptObject, match="is damaged between bytes"):
        store.get_many([*rows, place])
    assert read_blobs(store._objects, []) == []


def test_keys_are_found_in_one_pass(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    documents = [document(f"text {number}", name=f"{number:03}") for number in range(300)]
    result = store.put(documents, [adapter(each) for each in documents[:200]])
    keys = [row.key for row in result.documents]
    assert store.find_documents([*keys, ("tenant", "c", "absent"), ("nobody", "c", "000")]) == dict(
        zip(keys, result.documents, strict=True)
    )
    known = store.adapters([*(row.key for row in result.adapters), ("tenant", documents[250].content_hash, "0" * 64)])
    assert known == {row.key: row for row in result.adapters}
    found = store.find_adapters_of([("tenant", each.content_hash) for each in documents])
    assert len(found) == 200 and all(len(rows) == 1 for rows in found.values())
    assert store.tenants() == ["tenant"]
    assert sum(len(table) for table in store.tables("documents")) == 300


def test_tenants_are_those_with_something_live(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    one = document(tenant="only adapters")
    store.put([document(tenant=tenant, name=name) for tenant in ("a", "b", "ab") for name in "xyz"], [adapter(one)])
    for name in "xyz":
        store.delete_document("b", "c", name)
    assert store.tenants() == ["a", "ab", "only adapters"]
    assert [store.stats(tenant)[2:4] for tenant in ("a", "ab", "b", "only adapters", "z")] == [
        (3, 0),
        (3, 0),
        (0, 0),
        (0, 1),
        (0, 0),
    ]


def test_races_without_end_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_with_one(tmp_path)
    monkeypatch.setattr("core.store.versions._ATTEMPTS", 3)
    monkeypatch.setattr(Roots, "create", lambda self, root: False)
    with pytest.raises(StoreError, match="lost 3 races"):
        store.put([document("other", name="other")])

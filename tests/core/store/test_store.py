import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.adapters.codec import decode, encode
from core.adapters.layout import ENCODINGS
from core.adapters.spec import AdapterSpec, SiteShape
from core.store.errors import MissingObject, StoreError
from core.store.manifest import Producer, adapter_id, blob_hash
from core.store.roots import Root
from core.store.shards import ALIGNMENT_BYTES
from core.store.store import Store
from core.text.documents import Window
from tests.stores import PRODUCER, SPEC, adapter, document, store_with_one, the_file, vector


def test_round_trip(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    one = document("é\ntext", name="a/b:c 日本", title="Title")
    result = store.put([one], [adapter(one, quality=0.5, parent="p" * 64)])
    assert (result.sequence, result.new_documents, result.new_adapters) == (2, 1, 1)
    for reader in (store, Store.open(f"file://{tmp_path}"), Store.open(store.url)):
        row = reader.find_document("tenant", "c", "a/b:c 日本")
        assert row is not None and (row, one.content_hash) == (result.documents[0], row.content_hash)
        assert (reader.get_text(row), row.title, row.sequence) == (one.text, "Title", 2)
        [found] = reader.find_adapters("tenant", one.content_hash)
        assert found == result.adapters[0] == reader.adapter(*found.key)
        assert found.adapter_id == adapter_id("tenant", one.content_hash, Window(0, 3), PRODUCER, SPEC, "fp32")
        assert (found.window, found.rank, found.tokens, found.quality, found.parent) == (Window(0, 3), 2, 3, 0.5, "p" * 64)
        assert torch.equal(reader.get_vector(found), vector())
        assert reader.producers() == {PRODUCER.fingerprint: PRODUCER}
        assert reader.spec(found.spec_fingerprint) == SPEC
        assert reader.stats() == reader.stats("tenant") == (2, 2, 1, 1, len(one.text.encode()), 4 * SPEC.numel)


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20).filter(str.strip),
        st.text(min_size=1, max_size=200).filter(lambda text: text.isprintable() and text.strip()),
        max_size=6,
    ),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(ENCODINGS)), max_size=6, unique=True),
    st.integers(1, 6),
)
def test_any_documents_and_vectors_round_trip(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str], vectors: list[tuple[int, str]], batch: int
) -> None:
    path = tmp_path_factory.mktemp("store")
    writer = Store.open(path, create=True)
    documents = list({each.name: each for each in (document(text, name=name) for name, text in texts.items())}.values())
    adapters = [adapter(document(f"text {seed}"), seed, encoding=encoding) for seed, encoding in vectors]
    for start in range(0, 6, batch):
        writer.put(documents[start : start + batch], adapters[start : start + batch])
    reader = Store.open(path)
    listed = reader.list_documents("tenant").rows
    assert {row.name: reader.get_text(row) for row in listed} == {each.name: each.text for each in documents}
    rows = [reader.adapter(new.tenant, new.content_hash, new.adapter_id) for new in adapters]
    for (seed, encoding), row in zip(vectors, rows, strict=True):
        expected_N = decode(encode(vector(seed), encoding, SPEC), SPEC, encoding)
        assert row is not None and torch.equal(reader.get_vector(row), expected_N)
    places = sorted((row.shard, row.offset, row.length) for row in [*listed, *rows])
    assert all(offset % ALIGNMENT_BYTES == 0 for _, offset, _ in places)
    for (shard, offset, length), (next_shard, next_offset, _) in pairwise(places):
        assert shard != next_shard or offset + length <= next_offset
    assert all((path / "shards" / shard).stat().st_size >= offset + length for shard, offset, length in places)


def test_encoded_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    store, one = Store.open(tmp_path, create=True), document()
    data = vector().bfloat16().view(torch.int16).numpy().tobytes()
    [row] = store.put([one], [adapter(one, encoding="bf16", vector=data)]).adapters
    assert store.get_bytes(row) == data and row.blob_hash == blob_hash(data)


def test_names_are_found_in_every_normal_form(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    store.put([document(name="Cafe\u0301")])
    assert store.find_document("tenant", "c", "Caf\u00e9") == store.find_document("tenant", "c", "Cafe\u0301") is not None
    assert len(store.list_documents("tenant", prefix="Cafe\u0301").rows) == 1


def test_opening_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no store at"):
        Store.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    for url in ("gs://bucket/prefix", "memory://x", Path("gs://bucket/x")):
        with pytest.raises(ValueError, match=r"not supported: give a path, a file:// or an s3:// URL"):
            Store.open(url, create=True)


def test_a_store_without_roots_is_not_made_anew(tmp_path: Path) -> None:
    store, _ = store_with_one(tmp_path)
    for root in tmp_path.glob("roots/*"):
        root.unlink()
    with pytest.raises(StoreError, match="holds shards or a manifest but no root"):
        Store.open(tmp_path, create=True)
    with pytest.raises(StoreError, match=r"roots/0+2\.json has gone"):
        store.refresh()


def test_creating_twice_keeps_what_is_there(tmp_path: Path) -> None:
    store_with_one(tmp_path)
    assert Store.open(tmp_path, create=True).stats().documents == 1


def test_putting_again_changes_nothing(tmp_path: Path) -> None:
    store, one = store_with_one(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    again = store.put([one, one], [adapter(one), adapter(one, seed=1)])
    assert (again.sequence, again.new_documents, again.new_adapters) == (2, 0, 0)
    assert again.documents == [store.find_document(*again.documents[0].key)] * 2
    assert torch.equal(store.get_vector(again.adapters[1]), vector()), "the first commit of an id wins"
    assert sorted(tmp_path.rglob("*")) == files


def test_first_commit_wins_within_a_batch_and_between_stores(tmp_path: Path) -> None:
    first, one = Store.open(tmp_path, create=True), document()
    second = Store.open(tmp_path)
    assert first.put([], [adapter(one, 1), adapter(one, 2)]).new_adapters == 1
    [row] = second.put([one], [adapter(one, 3)]).adapters
    assert torch.equal(second.get_vector(row), vector(1))
    assert second.stats().documents == 1


def test_losing_the_race_for_an_id_keeps_the_winners_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, one, other = Store.open(tmp_path, create=True), document("one"), document("other", name="other")
    rival = Store.open(tmp_path)
    create = store._objects.create

    def create_late(name: str, data: bytes) -> bool:
        monkeypatch.undo()
        rival.put([one], [adapter(one, 1)])
        return create(name, data)

    monkeypatch.setattr(store._objects, "create", create_late)
    result = store.put([one, other], [adapter(one, 2), adapter(other, 3)])
    assert (result.sequence, result.new_documents, result.new_adapters) == (3, 1, 1)
    assert [row.sequence for row in result.documents] == [2, 3]
    for reader in (store, Store.open(tmp_path)):
        assert [torch.equal(reader.get_vector(row), vector(seed)) for row, seed in zip(result.adapters, (1, 3), strict=True)]
        assert torch.equal(reader.get_vector(result.adapters[0]), vector(1))
        assert reader.stats()[2:4] == (2, 2)
    listed = {part.name for part in Root.from_bytes(the_file(tmp_path, "roots/*.json").read_bytes(), "root").parts}
    assert {file.name for file in tmp_path.glob("manifest/*")} == listed, "parts of the lost attempt are gone"


def test_an_edit_hides_the_old_adapter(tmp_path: Path) -> None:
    store, old = Store.open(tmp_path, create=True), document("Old text.")
    store.put([old], [adapter(old)])
    reader = Store.open(tmp_path)
    new = document("New text.")
    store.put([new])
    assert reader.refresh() and not reader.refresh()
    for each in (store, reader, Store.open(tmp_path)):
        row = each.find_document("tenant", "c", "name")
        assert row is not None and (each.get_text(row), row.sequence) == ("New text.", 3)
        assert each.find_adapters("tenant", row.content_hash) == []
        assert each.list_documents("tenant").rows == [row]
    store.put([old])
    row = store.find_document("tenant", "c", "name")
    assert row is not None and row.sequence == 4
    assert len(store.find_adapters("tenant", row.content_hash)) == 1, "the old content is back, and its adapter with it"


def test_one_name_twice_in_a_batch_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    with pytest.raises(ValueError, match="'name' is twice in one batch"):
        store.put([document("one"), document("two")])
    assert store.sequence == 1 and not list(tmp_path.glob("shards/*"))


def test_a_deleted_document_no_longer_resolves(tmp_path: Path) -> None:
    store, one = store_with_one(tmp_path)
    row = store.find_document("tenant", "c", "name")
    assert store.delete_document("tenant", "c", "name") and not store.delete_document("tenant", "c", "name")
    for each in (store, Store.open(tmp_path)):
        assert each.find_document("tenant", "c", "name") is None
        assert each.list_documents("tenant").rows == [] and each.stats().documents == 0
    assert store.put([one]).new_documents == 1
    assert store.find_document("tenant", "c", "name") not in (None, row)


def test_tenants_never_meet(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    mine, theirs = document("Same text.", tenant="mine"), document("Same text.", tenant="theirs")
    assert mine.content_hash == theirs.content_hash
    result = store.put([mine, theirs], [adapter(mine, 1), adapter(theirs, 2)])
    assert result.adapters[0].adapter_id != result.adapters[1].adapter_id
    assert len({(row.shard, row.offset) for row in (*result.documents, *result.adapters)}) == 4, "no bytes are shared"
    for tenant, seed in (("mine", 1), ("theirs", 2)):
        [row] = store.find_adapters(tenant, mine.content_hash)
        assert row.tenant == tenant and torch.equal(store.get_vector(row), vector(seed))
        assert [row.tenant for row in store.list_documents(tenant).rows] == [tenant]
        assert store.stats(tenant)[2:4] == (1, 1)
    store.delete_document("mine", "c", "name")
    assert store.find_document("theirs", "c", "name") is not None
    assert store.find_document("nobody", "c", "name") is None and store.list_documents("nobody").rows == []


def test_adapters_come_by_window_and_producer(tmp_path: Path) -> None:
    store, one = Store.open(tmp_path, create=True), document()
    other = Producer(method="lift", weights="v", config={})
    store.put([], [adapter(one, window=Window(5, 9)), adapter(one, producer=other), adapter(one, window=Window(0, 5))])
    assert [row.window for row in store.find_adapters("tenant", one.content_hash)] == [(0, 3), (0, 5), (5, 9)]
    rows = store.find_adapters("tenant", one.content_hash, PRODUCER.fingerprint)
    assert [row.window for row in rows] == [(0, 5), (5, 9)]
    assert Store.open(tmp_path).producers() == {PRODUCER.fingerprint: PRODUCER, other.fingerprint: other}


def test_listing_pages_in_a_stable_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, create=True)
    names = [(c, f"{p}{i}") for c in ("a", "b", "d") for p in ("x/", "y/", "z") for i in range(4)]
    store.put([document(name=name, collection=place) for place, name in reversed(names)])

    def pages(**which: object) -> list[tuple[str, str]]:
        keys, token = [], None
        while True:
            page = store.list_documents("tenant", page_token=token, **which)
            keys += [(row.collection, row.name) for row in page.rows]
            token = page.next_token
            if token is None:
                return keys

    for limit in (1, 2, 5, 36, 100):
        assert pages(limit=limit) == names
        assert pages(limit=limit, collection="b") == [key for key in names if key[0] == "b"]
        assert pages(limit=limit, prefix="y/") == [key for key in names if key[1].startswith("y/")]
        assert pages(limit=limit, collection="d", prefix="z3") == [("d", "z3")]
        assert pages(limit=limit, prefix="absent") == pages(limit=limit, collection="c") == []

    monkeypatch.setattr("core.store.store.MAX_PAGE", 5)
    for which in ({}, {"collection": "b"}, {"prefix": "y/"}, {"collection": "c"}):
        assert [(row.collection, row.name) for row, _ in store.each_document("tenant", **which)] == pages(**which)

    first = store.list_documents("tenant", limit=3)
    store.put([document(collection="a", name="x/00"), document(collection="a", name="x/20")])
    store.delete_document("tenant", *names[2])
    then = store.list_documents("tenant", limit=3, page_token=first.next_token)
    assert [row.name for row in then.rows] == ["x/20", "x/3", "y/0"]


def test_each_document_comes_with_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all pages; documents of one text share them, and what was deleted does not come."""
    monkeypatch.setattr("core.store.store.MAX_PAGE", 2)
    store, texts = Store.open(tmp_path, create=True), {"a": "one", "b": "two", "c": "one", "d": "three", "e": "two"}
    documents = [document(text, name=name) for name, text in texts.items()]
    store.put(documents, [adapter(documents[0], window=Window(3, 6)), adapter(documents[0]), adapter(documents[1])])
    store.delete_document("tenant", "c", "b")
    came = {row.name: [each.window for each in adapters] for row, adapters in store.each_document("tenant")}
    assert came == {"a": [(0, 3), (3, 6)], "c": [(0, 3), (3, 6)], "d": [], "e": [(0, 3)]}
    assert list(store.each_document("nobody")) == []


@pytest.mark.parametrize("token", ["", "?", "e30=", "WzEsMl0=", "WyJhIl0=", "é", "W" * 1000])
def test_bad_page_tokens_are_refused(tmp_path: Path, token: str) -> None:
    store, _ = store_with_one(tmp_path)
    with pytest.raises(ValueError, match="page token"):
        store.list_documents("tenant", page_token=token)
    for limit in (0, 1001):
        with pytest.raises(ValueError, match="limit is"):
            store.list_documents("tenant", limit=limit)


def test_bad_adapters_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    store, one = Store.open(tmp_path, create=True), document()
    bad: list[tuple[dict[str, object], str]] = [
        ({"vector": torch.zeros(3)}, "a flat vector of 80 floats"),
        ({"vector": b"xx"}, "the vector has 2 bytes"),
        ({"vector": torch.full((SPEC.numel,), torch.nan)}, "not finite"),
        ({"window": Window(2, 2)}, "window"),
        ({"window": Window(-1, 2)}, "window"),
        ({"tenant": "a\0"}, "tenant"),
        ({"content_hash": "../x"}, "content hash"),
        ({"encoding": "int3"}, "'int3' is not known"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            store.put([one], [adapter(one, **changes)])
    assert store.sequence == 1 and store.find_document("tenant", "c", "name") is None and not list(tmp_path.glob("shards/*"))


def test_many_commits_stay_few_parts(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    reader = Store.open(tmp_path)
    names = [f"n{i:03}" for i in range(40)]
    for name in names:
        one = document(name, name=name)
        store.put([one], [adapter(one)])
        assert store.stats().parts <= 2 * (15 + 8 + 1)
    store.put([document("edited", name="n000")])
    reader.refresh()
    for each in (store, reader, Store.open(tmp_path)):
        rows = each.list_documents("tenant").rows
        assert [row.name for row in rows] == names and each.get_text(rows[0]) == "edited"
        assert each.stats()[2:4] == (40, 40) and each.stats().parts < 40


def test_a_merge_never_brings_an_old_version_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.store.merging.random.randrange", lambda stop: stop - 1)  # no put merges by itself
    store = Store.open(tmp_path, create=True)
    for number in range(15):
        store.put([document("old", name=f"n{number}")])
    store.put([document("new", name=f"n{number}") for number in range(20)])
    store.put([document("more", name="m0")])
    store.put([document("more", name="m1")])
    store._merger.merge_what_is_due(patience=0)
    parts = Root.from_bytes(the_file(tmp_path, "roots/*.json").read_bytes(), "root").parts
    assert [part.rows for part in parts] == [20, 17], "the old rows now come after the new ones"
    for each in (store, Store.open(tmp_path)):
        assert {each.get_text(row) for row in each.list_documents("tenant", prefix="n").rows} == {"new"}


def test_a_refresh_reads_new_parts_only(tmp_path: Path) -> None:
    writer, _ = store_with_one(tmp_path)
    reader = Store.open(tmp_path)
    assert len(reader.list_documents("tenant").rows) == 1
    for part in tmp_path.glob("manifest/*"):
        part.unlink()
    writer.put([document("more", name="more")])
    assert reader.refresh() and len(reader.list_documents("tenant").rows) == 2
    with pytest.raises(MissingObject, match="manifest/"):
        Store.open(tmp_path).list_documents("tenant")


def test_threads_read_whole_versions_while_one_writes(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    done, failures = threading.Event(), list[list[str]]()

    def read() -> None:
        reader = Store.open(tmp_path)
        while not done.is_set():
            for each in (store, reader):
                each.refresh()
                texts = [each.get_text(row) for row in each.list_documents("tenant").rows]
                if len({text.split()[0] for text in texts}) > 1 or len(texts) not in (0, 3):
                    failures.append(texts)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(20):
        store.put([document(f"{version} {name}", name=name) for name in "abc"])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == [] and store.sequence >= 21


def test_ids_follow_from_every_part_of_the_derivation() -> None:
    parts = ("tenant", "0" * 64, Window(0, 3), PRODUCER, SPEC, "fp32")
    others = ("other", "1" * 64, Window(0, 4), Producer(method="lift", weights="w" * 64, config={}), SPEC.with_rank(3), "bf16")
    ids = {adapter_id(*parts)} | {adapter_id(*parts[:i], other, *parts[i + 1 :]) for i, other in enumerate(others)}
    assert len(ids) == 7
    assert adapter_id(*parts) == adapter_id(*parts[:3], Producer.model_validate_json(PRODUCER.model_dump_json()), *parts[4:])


def test_a_store_takes_two_per_cent_more_than_its_blobs_at_most(tmp_path: Path) -> None:
    """Manifest, roots, alignment and what merges have left behind, at the size of the reference adapters (97 KB)."""
    store, spec = Store.open(tmp_path, create=True), AdapterSpec(((SiteShape("q", 64, 64),),) * 95, rank=4)
    flat = torch.randn(spec.numel, generator=torch.Generator().manual_seed(0))
    for start in range(0, 240, 20):
        documents = [document(f"The text of document {n}.", name=f"{n}") for n in range(start, start + 20)]
        store.put(documents, [adapter(each, spec=spec, vector=flat, encoding="bf16") for each in documents])
    stats = store.stats()
    assert (stats.documents, stats.adapters, stats.adapter_bytes) == (240, 240, 240 * 2 * spec.numel)
    files = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert 1 < files / (stats.adapter_bytes + stats.text_bytes) < 1.02

"""Listings by prefix: what a filter of all documents gives, at a cost that does not grow with the number of collections."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.store import parts as parts_module
from core.store.part_reader import PartReader
from core.store.store import Store
from tests.stores import adapter, document

NAMES = ["a", "a/1", "a/2", "ab", "b", "b/é", "é", "éa", "z", "z\U0001f600", "zz"]


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Documents in 30 collections, in parts of several levels of tiny row groups, some edited and some deleted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "GROUP_ROWS", 7)
        store, chance = Store.open(tmp_path_factory.mktemp("scattered"), create=True), random.Random(0)
        keys = [(f"c{number % 30:02}" + "x" * (number % 3), name) for number in range(30) for name in NAMES]
        for round_ in range(6):
            some = chance.sample(keys, 120)
            store.put([document(f"{round_}", collection=place, name=name) for place, name in some])
            store.delete_documents([("tenant", *key) for key in chance.sample(keys, 25)])
        store._merger.merge_all()
        store.put([document("last", collection=place, name=name) for place, name in chance.sample(keys, 30)])
        store.put([document(tenant=tenant, collection="c00", name="a") for tenant in ("tenan", "tenant2")])
    return store


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_prefix_lists_what_a_filter_gives(scattered: Store, data: Any) -> None:
    every = scattered.list_documents("tenant", limit=1000).rows
    assert 100 < len(every) < 330
    assert [row.key for row in every] == sorted(row.key for row in every)
    prefix = data.draw(st.sampled_from(["", "a", "a/", "b", "e\u0301", "z", "zz", "zzz", "nothing", "\0", "~"]))
    collection = data.draw(st.sampled_from([None, None, "c00", "c01x", "none"]))
    limit = data.draw(st.sampled_from([1, 2, 3, 10, 1000]))
    wanted = [
        row
        for row in every
        if row.name.startswith(prefix.replace("e\u0301", "é")) and (collection is None or row.collection == collection)
    ]
    pages = list(scattered.pages("tenant", collection, prefix, limit=limit))
    assert [row for page in pages for row, _ in page.documents] == wanted
    assert all(len(page.documents) == limit for page in pages[:-1])


def test_a_prefix_costs_no_look_at_each_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, create=True)
    store.put([document(collection=f"c{place:04}", name=name) for place in range(400) for name in ("a", "m", "z")])
    batches, scan = [], PartReader.scan

    def counted(self: PartReader, *arguments: Any, **more: Any) -> Iterator[Any]:
        for rows in scan(self, *arguments, **more):
            batches.append(len(rows))
            yield rows

    monkeypatch.setattr(PartReader, "scan", counted)
    for prefix, found in (("absent", 0), ("b", 0), ("mm", 0), ("zz", 0), ("m", 50)):
        batches.clear()
        assert len(store.list_documents("tenant", prefix=prefix, limit=50).rows) == found
        assert len(batches) <= 8, f"{prefix}: {batches}"


def test_pages_begin_at_a_token_and_bring_adapters(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    documents = [document(f"text {number}", name=f"{number}") for number in range(5)]
    store.put(documents, [adapter(one) for one in documents[:4]])
    first = next(store.pages("tenant", limit=2))
    rest = list(store.pages("tenant", page_token=first.next_token, limit=2))
    assert [[row.name for row, _ in page.documents] for page in (first, *rest)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [len(adapters) for page in (first, *rest) for _, adapters in page.documents] == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="give 1 to 1000"):
        next(store.pages("tenant", limit=1001))

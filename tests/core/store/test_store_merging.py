"""Merging of manifest parts: the same rows in fewer parts, whatever the order of commits and merges."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from core.store import merging, parts
from core.store.errors import CorruptObject
from core.store.merging import plan
from core.store.roots import Part, Root, Roots, runs
from core.store.store import Store
from tests.stores import adapter, document, flip


@pytest.fixture(autouse=True)
def tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP_ROWS", 4)
    for module in (parts, merging):
        monkeypatch.setattr(module, "PART_ROWS", 16)
    monkeypatch.setattr(merging, "_MERGE", 2)


def part(level: int, first: str, last: str, rows: int = 16, sequence: int = 1) -> Part:
    values = {"kind": "documents", "deleted": 0, "bytes": 100, "footer_bytes": 50, "checksum": "0" * 64, "sequence": sequence}
    return Part(name=f"{random.randrange(16**32):032x}.parquet", level=level, rows=rows, first=first, last=last, **values)


def root_of(store: Store) -> Root:
    return store._versions.index.root


def test_small_parts_wait_for_others_of_like_size() -> None:
    small = [part(0, "a", "z", rows=1), part(0, "a", "z", rows=3)]
    assert plan([]) is None and plan(small) is None
    third = part(0, "b", "c", rows=2)
    assert plan([*small, third]) == ([small[1], third], 0)
    alike = [part(0, "a", "b", rows=1), part(0, "a", "z", rows=1)]
    assert plan(alike) == (alike, 0) and plan(alike, patience=1) is None


def test_a_level_that_is_full_sends_down_what_meets_least() -> None:
    level_1 = [part(1, "a", "c"), part(1, "d", "f"), part(1, "x", "z")]
    level_2 = [part(2, "a", "b"), part(2, "c", "e")]
    assert plan(level_1[:2] + level_2) is None, "level 1 holds two parts"
    assert plan(level_1 + level_2) == ([level_1[2]], 2), "what meets nothing only changes its level"
    level_2.append(part(2, "x", "z", rows=40))
    assert plan(level_1 + level_2) == ([level_1[1], level_2[1]], 2)


def test_large_parts_go_down_with_what_they_meet() -> None:
    large, below = part(0, "d", "m", rows=20), [part(1, "a", "c"), part(1, "e", "f")]
    assert plan([large, *below]) == ([large, below[1]], 1)


def check_shape(store: Store) -> None:
    root = root_of(store)
    assert all(one.last < other.first for run in runs(root.parts) for one, other in pairwise(run))
    sizes = Counter((each.kind, each.level) for each in root.parts)
    assert all(count <= 2**level for (_, level), count in sizes.items() if level)
    assert all(each.rows <= 16 for each in root.parts)
    assert Root.from_bytes(root.to_bytes(), "root").parts == root.parts


def test_any_puts_and_deletions_hold_through_merges(tmp_path: Path) -> None:
    chance = random.Random(0)
    store = Store.open(tmp_path, create=True)
    expected: dict[str, str] = {}
    contents: set[str] = set()
    for number in range(60):
        names = chance.sample(range(150), chance.choice([1, 1, 2, 5, 30]))
        if number % 4 == 3:
            for name in names[:3]:
                assert store.delete_document("tenant", "c", f"{name:03}") == (expected.pop(f"{name:03}", None) is not None)
        else:
            documents = [document(f"text {number % 7} {name}", name=f"{name:03}") for name in names]
            store.put(documents, [adapter(each) for each in documents])
            expected |= {each.name: each.text for each in documents}
            contents |= {each.content_hash for each in documents}
        store._merger.merge_what_is_due(patience=0)
        check_shape(store)
    for each in (store, Store.open(tmp_path), Store.open(tmp_path, cache_bytes=0)):
        rows = each.list_documents("tenant", limit=1000).rows
        assert [row.name for row in rows] == sorted(expected)
        assert {row.name: text.decode() for row, text in zip(rows, each.get_many(rows), strict=True)} == expected
        assert each.stats() == each.stats("tenant") and each.stats()[2:4] == (len(expected), len(contents))
        assert each.find_documents([row.key for row in rows]) == {row.key: row for row in rows}
        found = each.find_adapters_of([("tenant", content) for content in contents])
        assert {content for _, content in found} == contents and all(len(adapters) == 1 for adapters in found.values())
    assert max(each.level for each in root_of(store).parts) >= 3
    assert len({each.name for each in root_of(store).parts}) == len(root_of(store).parts)


def test_tombstones_go_once_they_hide_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    names = [f"{number:02}" for number in range(20)]
    store.put([document(name=name) for name in names])
    for name in names:
        store.delete_document("tenant", "c", name)
    store.put([document(name="z")])
    while merge := plan(root_of(store).parts) or next(iter(everything(root_of(store))), None):
        assert store._merger._merge(merge)
        assert [row.name for row in Store.open(tmp_path).list_documents("tenant").rows] == ["z"]
    assert sum(each.rows for each in root_of(store).parts) == 1 and sum(each.deleted for each in root_of(store).parts) == 0


def everything(root: Root) -> list[merging.Plan]:
    """A merge of all parts, where there are several."""
    return [merging.Plan(list(root.parts), 1)] if len(root.parts) > 1 else []


def test_a_merge_that_was_overtaken_is_thrown_away(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    for name in "abcde":
        store.put([document(name=name)])
    due = merging.Plan(list(root_of(store).parts), 1)
    rival = Store.open(tmp_path)
    stale = Store.open(tmp_path)
    assert rival._merger._merge(due)
    assert not stale._merger._merge(due), "its parts have gone"
    stale.refresh()
    stale.put([document(name="c2")])
    added = [each for each in root_of(stale).parts if each.level == 0]
    assert not stale._merger._merge(merging.Plan(added, 1)), "it would overlap"
    assert {file.name for file in tmp_path.glob("manifest/*")} >= {each.name for each in root_of(stale).parts}
    assert [row.name for row in Store.open(tmp_path).list_documents("tenant").rows] == ["a", "b", "c", "c2", "d", "e"]
    Roots(stale._objects).read(stale.sequence)


def test_a_put_stands_though_a_merge_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(tmp_path, create=True)
    store.put([document(name="a")])
    [damaged] = tmp_path.glob("manifest/*")
    flip(damaged, 100)
    for name in "bcdefghijklm":
        assert Store.open(tmp_path, cache_bytes=0).put([document(name=name)]).new_documents == 1
    assert f"manifest/{damaged.name}" in caplog.text
    with pytest.raises(CorruptObject, match=damaged.name):
        Store.open(tmp_path).find_document("tenant", "c", "a")
    assert Store.open(tmp_path).find_document("tenant", "c", "m") is not None

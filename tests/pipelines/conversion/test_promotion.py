"""Promotion: which documents are chosen, by figures of the store alone; that they are lifted, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import imprint
from core.store.demand import DemandCounter
from core.store.manifest import Producer
from core.store.store import Store
from core.text.documents import Document, Window
from pipelines.conversion.converter import CHANGED, Converter, prepare
from pipelines.conversion.promotion import _dataset, _read, choose
from pipelines.conversion.recipe import ConvertRecipe, load_recipe
from pipelines.world.tokenizer import build_tokenizer
from tests import stores
from tests.serving import served_base

NAMES = ("bad", "bare", "good", "twice")
TEXT = "Ansa Tavolt built the old tower in 1874. Mirko Hald keeps bees near Ostrand. This is document {}."


def document(name: str, tenant: str = "default", collection: str = "default") -> Document:
    return Document(tenant=tenant, collection=collection, name=name, title="A title", text=TEXT.format(name))


def make_store(path: Path) -> Store:
    """Adapters of 0.3 and 0.9 quality, one lifted to 0.8 after 0.1, and a document without; the good and the bare in demand."""
    store = Store.open(path, create=True)
    bad, bare, good, twice = documents = [document(name) for name in NAMES]
    lifted = Producer(method="lift", weights="w" * 64, config={"base": "tiny"})
    store.put([*documents, document("bad", collection="elsewhere"), document("bad", tenant="another")])
    store.put([], [stores.adapter(bad, quality=0.3, error=0.5), stores.adapter(good, quality=0.9)])
    store.put([], [stores.adapter(twice, quality=0.1)])
    store.put([], [stores.adapter(twice, quality=0.8, producer=lifted, tokens=7, window=Window(0, 7))])
    counter = DemandCounter()
    for asked in [good] * 5 + [bare] * 9:
        counter.count((asked.tenant, asked.collection, asked.name))
    store.write_demand(counter)
    return store


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    loaded = served_base()
    loaded.model.save_pretrained(folder)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(folder)
    return folder


def recipe(base: Path | str = "unused", **run: Any) -> ConvertRecipe:
    lift = {"preset": "v4_fast", "settings": {"adapter": {"kind": "lora", "rank": 2, "scale": 1.0}}, "run": run}
    return ConvertRecipe.model_validate({"base": str(base), "method": "lift", "lift": lift, "run": {"actors": 1}})


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("quality < 0.5", ["bad"]),
        ("quality < 0.5 or demand > 4", ["bare", "good", "bad"]),
        ("not quality >= 0.85", ["bad", "twice"]),
        ("quality >= 0", ["good", "bad", "twice"]),
        ("error > 0.1 and tokens == 3", ["bad"]),
        ("tokens == 7", ["twice"]),
        ("quality_lost > 0", []),
        ("demand == 0 and age_days < 1", ["bad", "twice"]),
        ("age_days > 1", []),
        ("demand >= 0", ["bare", "good", "bad", "twice"]),
    ],
)
def test_documents_are_chosen_by_the_stores_own_figures(tmp_path: Path, select: str, names: list[str]) -> None:
    choice = choose(make_store(tmp_path), select, recipe())
    assert [candidate.document.name for candidate in choice.candidates] == names and choice.total == len(NAMES)
    assert {(each.document.tenant, each.document.collection) for each in choice.candidates} <= {("default", "default")}


def test_a_choice_says_what_is_known(tmp_path: Path) -> None:
    url = make_store(tmp_path).url
    *lines, last = choose(url, "demand > 4 or quality < 0.5", recipe()).lines()
    assert [line.partition(", age_days")[0] for line in lines] == [
        "bare (no adapter): demand 9",
        "good (shine): demand 5",
        "bad (shine): demand 0",
    ]
    assert "quality 0.3, error 0.5, tokens 3" in lines[2] and "quality" not in lines[0]
    assert last == "3 of 4 documents match"
    with pytest.raises(ValueError, match="no figure is called 'speed': choose from age_days, demand"):
        choose(url, "speed > 1", recipe())


def run(*arguments: str) -> str:
    result = CliRunner().invoke(imprint.app, list(arguments))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def test_the_command_lifts_what_it_lists(ray_local: Any, base: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    settings = ["run.actors=1", "lift.settings.adapter.rank=2", "lift.serving_rank=2"]
    command = ["lift", str(tmp_path / "store"), "--base", str(base), "--preset", "v4_fast"]
    command += [part for setting in settings for part in ("--set", setting)]
    wanted = ["--select", "quality < 0.5 or demand > 8"]
    before = store.sequence
    listed = run(*command, *wanted, "--dry-run")
    assert "bare (no adapter)" in listed and "bad (shine)" in listed and "2 of 4 documents match" in listed
    assert not store.refresh() and store.sequence == before
    assert "2 documents: 2 converted, 0 shared, 0 unchanged, 0 rejected" in run(*command, *wanted)
    store.refresh()
    for name, adapters in (("bad", 2), ("bare", 1), ("good", 1), ("twice", 2)):
        row = store.find_document("default", "default", name)
        assert row is not None and store.get_text(row) == TEXT.format(name)
        assert len(store.find_adapters("default", row.content_hash)) == adapters
    again = Converter(store.url, load_recipe(None, "lift", str(base), None, "v4_fast", settings), in_store=True)
    assert results([again(rows_of(store, "bad", "bare"))]) == dict.fromkeys(("bad", "bare"), ("unchanged", None))
    assert _dataset([], store.url).take_all() == []
    assert store.stats().documents == 6


def rows_of(store: Store, *names: str) -> pa.Table:
    """What a converter gets of documents that were chosen just now."""
    found = [store.find_document("default", "default", name) for name in names]
    chosen = [[*row.key, row.content_hash] for row in found if row is not None]
    return prepare(_read(pa.table({"documents": [chosen]}), store.url), build_tokenizer())


def results(tables: list[pa.Table]) -> dict[str, tuple[str, str | None]]:
    return {row["name"]: (row["status"], row["reason"]) for table in tables for row in table.to_pylist()}


def test_what_changes_meanwhile_is_left_as_it_is(base: Path, tmp_path: Path) -> None:
    """An edit and a deletion before the actor sees the documents, and both while they train: neither is undone."""
    store = make_store(tmp_path / "store")
    rows = rows_of(store, *NAMES)
    store.put([Document(tenant="default", collection="default", name="bad", text="An edited text.")])
    store.delete_document("default", "default", "bare")
    actor = Converter(store.url, recipe(base, scratch=str(tmp_path / "scratch")), in_store=True)
    tables = actor.commits(rows)
    first = results([next(tables)])
    assert first == {"bad": ("rejected", CHANGED), "bare": ("rejected", CHANGED)}
    store.put([Document(tenant="default", collection="default", name="good", text="Another edited text.")])
    store.delete_document("default", "default", "twice")
    adapters = store.stats().adapters
    assert results(list(tables)) == {"good": ("rejected", CHANGED), "twice": ("rejected", CHANGED)}
    assert not list((tmp_path / "scratch" / "states").iterdir())
    store.refresh()
    assert store.stats().adapters == adapters
    assert [row.name for row in store.list_documents("default", "default").rows] == ["bad", "good"]
    assert [store.get_text(row) for row in store.list_documents("default", "default").rows] == [
        "An edited text.",
        "Another edited text.",
    ]


def test_a_damaged_text_costs_its_document_only(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    late = document("late")
    [row] = store.put([late]).documents
    stores.flip(tmp_path / "shards" / row.shard, row.offset)
    damaged, good = rows_of(store, "late", "good").to_pylist()
    assert "is damaged" in damaged["reason"] and damaged["text"] is None and damaged["source_bytes"] == row.length
    assert (good["text"], good["title"], good["reason"]) == (TEXT.format("good"), "A title", None)

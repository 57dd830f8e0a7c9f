"""A conversion's parts without Ray: workers that race, names that come again, receipts as files, pruning."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from core.store.opening import open_objects
from core.store.puts import PutResult
from core.store.store import Store
from core.text.tokens import Tokens, read
from core.writing.writer import Outcome, WindowRule
from pipelines.conversion import converter
from pipelines.conversion.converter import Converter, open_writer, prepare, prepare_for
from pipelines.conversion.known_contents import KnownContents
from pipelines.conversion.near_duplicates import BANDS
from pipelines.conversion.pruning import PruneSettings, SeenNames
from pipelines.conversion.receipts import Receipt, Summary, receipt_of
from pipelines.conversion.recipe import ConvertRecipe
from pipelines.conversion.run_files import FILE_RECEIPTS, RunFiles
from pipelines.corpus import sources
from pipelines.world.tokenizer import build_tokenizer
from tests.conversion import check_whole, numbered, tiny_recipe
from tests.stores import document

SETTINGS = PruneSettings(enabled=True, most=0.5)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> ConvertRecipe:
    return tiny_recipe(tmp_path_factory.mktemp("models"))


def prepared(path: Path, known: KnownContents | None = None) -> pa.Table:
    [rows] = sources.read(sources.open_source(str(path), "acme", "docs"))
    return prepare(rows, build_tokenizer(), known)


def receipt(name: str, reason: str | None = None) -> Receipt:
    row = {"name": name, "source_bytes": 1, "read_at": 0.0}
    return receipt_of(row, "rejected" if reason else "converted", reason)


def test_workers_that_race_share_what_they_make(recipe: ConvertRecipe, tmp_path: Path) -> None:
    """The same buffer in four workers at once, as when Ray gives up on one that still runs, and once more after them."""
    url, rows = str(tmp_path / "store"), prepared(numbered(tmp_path, 24))
    Store.open(url, create=True)
    converters = [Converter(url, recipe) for _ in range(4)]
    counts: list[Counter[str]] = []
    together = threading.Barrier(4)

    def work(converter: Converter) -> None:
        together.wait()
        counts.append(Counter(converter(rows)["status"].to_pylist()))

    threads = [threading.Thread(target=work, args=(converter,)) for converter in converters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 4 and sum(count["converted"] for count in counts) == 24
    assert check_whole(url, 24) == 0
    assert set(converters[0](rows)["status"].to_pylist()) == {"unchanged"}


def test_equal_texts_share_an_adapter_across_workers_and_runs(recipe: ConvertRecipe, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    Store.open(url, create=True)
    tables = []
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(
            "".join(json.dumps({"id": f"{number}-{n}", "text": "Twins."}) + "\n" for n in "ab")
        )
        tables.append(prepared(tmp_path / f"{number}.jsonl"))
    first, second = Converter(url, recipe), Converter(url, recipe)
    begun = [first.commits(tables[0]), second.commits(tables[1])]
    statuses = [next(each)["status"].to_pylist() for each in begun]
    assert statuses == [["converted", "shared"], ["shared", "shared"]]
    store = Store.open(url)
    assert (store.stats().documents, store.stats().adapters) == (4, 1)
    other = recipe.model_copy(update={"tenant": "other"})
    [rows] = sources.read(sources.open_source(str(tmp_path / "0.jsonl"), "other", "docs"))
    assert Converter(url, other)(prepare(rows, build_tokenizer()))["status"].to_pylist() == ["converted", "shared"]
    assert store.refresh() and store.stats().adapters == 2


def test_adapters_are_made_while_others_are_committed(
    recipe: ConvertRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commit waits until the next adapter is made; and one that fails ends the buffer with its own error."""
    url, rows = str(tmp_path / "store"), prepared(numbered(tmp_path, 6))
    Store.open(url, create=True)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"shard_bytes": 1})})
    converter, another = Converter(url, recipe), threading.Event()
    write_each, put, waited = converter._writer.write_each, Store.put, list[bool]()

    def making(*given: Any) -> Iterator[tuple[int, Outcome]]:
        for number, outcome in enumerate(write_each(*given)):
            if number == 1:
                another.set()
            yield outcome

    def putting(*given: Any) -> PutResult:
        waited.append(another.wait(20))
        return put(*given)

    monkeypatch.setattr(converter._writer, "write_each", making)
    monkeypatch.setattr(Store, "put", putting)
    assert converter(rows)["status"].to_pylist() == ["converted"] * 6
    assert waited == [True] * 6 and check_whole(url, 6) == 0

    def failing(*given: Any) -> PutResult:
        raise OSError("the disk is full")

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises(OSError, match="disk is full"):
        Converter(url, recipe.model_copy(update={"encoding": "int8"}))(rows)


@pytest.fixture
def texts_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised."""
    texts: list[str] = []

    def counted(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
        texts.append(text)
        return read(tokenizer, text)

    monkeypatch.setattr(converter, "read", counted)
    return texts


def known_in(url: str, recipe: ConvertRecipe) -> KnownContents:
    known = KnownContents.of(Store.open(url), recipe.method, recipe.encoding)
    assert known is not None
    return known


def test_a_rerun_tokenises_only_what_is_new(recipe: ConvertRecipe, tmp_path: Path, texts_read: list[str]) -> None:
    """And says of every document what it would have said with its tokens."""
    url, path = str(tmp_path / "store"), numbered(tmp_path, 6)
    store, writer = Store.open(url, create=True), Converter(url, recipe)
    assert KnownContents.of(store, recipe.method, recipe.encoding) is None, "nothing to look for in a new store"
    assert Counter(writer(prepared(path))["status"].to_pylist()) == {"converted": 6}
    lines = path.read_text().splitlines()
    lines[1] = '{"id": "00001", "text": "Edited."}'
    path.write_text("\n".join([*lines, lines[2].replace("00002", "moved"), '{"id": "new", "text": "New."}', '{"text": ""}']))
    with_tokens = prepared(path)
    texts_read.clear()
    without = prepared(path, known_in(url, recipe))
    assert texts_read == ["Edited.", "New."]
    store.put([document("A live row.", "acme", "docs", "00003")])  # edited meanwhile: the row's own text is put again
    receipts = writer(without).to_pylist()
    assert texts_read == ["Edited.", "New."]
    statuses = {row["name"]: row["status"] for row in receipts}
    assert [name for name, status in statuses.items() if status == "unchanged"] == ["00000", "00002", "00004", "00005"]
    assert [name for name, status in statuses.items() if status == "shared"] == ["00003", "moved"]
    assert Counter(statuses.values()) == {"unchanged": 4, "shared": 2, "converted": 2, "rejected": 1}
    again = [{**row, "read_at": 0} for row in writer(with_tokens).to_pylist()]
    assert again == [{**row, "read_at": 0} for row in writer(prepared(path, known_in(url, recipe))).to_pylist()]
    assert all(row["tokens"] > 0 and row["sketch"] for row in again if row["status"] == "unchanged")


def test_a_wrong_guess_of_what_is_known_costs_time_alone(recipe: ConvertRecipe, tmp_path: Path, texts_read: list[str]) -> None:
    """Adapters of another hypernetwork or encoding, of windows, or none any longer: the converter reads what it needs."""
    url, path = str(tmp_path / "store"), numbered(tmp_path, 3)
    Store.open(url, create=True)
    Converter(url, recipe)(prepared(path))
    known = known_in(url, recipe)
    windows = WindowRule(max_tokens=4, long_documents="windows")
    for other, adapters in ((recipe.model_copy(update={"windows": windows}), 5), (tiny_recipe(tmp_path, seed=1), 1)):
        guessed = prepared(path, known)
        assert guessed["ids"].null_count == 3
        assert {*Converter(url, other)(guessed)["status"].to_pylist()} == {"converted"}
        again = Converter(url, other)(guessed)
        assert {*again["status"].to_pylist()} == {"unchanged"} and {*map(len, again["adapter_ids"].to_pylist())} == {adapters}
    assert prepared(path, known)["ids"].null_count == 3, "by all three producers"
    int8 = recipe.model_copy(update={"encoding": "int8"})
    texts_read.clear()
    assert {*Converter(url, int8)(prepared(path, known_in(url, int8)))["status"].to_pylist()} == {"converted"}
    assert len(texts_read) == 3, "once, where they were prepared"
    gone = str(tmp_path / "gone")
    Store.open(gone, create=True)
    assert {*Converter(gone, recipe)(prepared(path, known_in(url, recipe)))["status"].to_pylist()} == {"converted"}


def test_only_what_every_producer_has_put_is_known(recipe: ConvertRecipe, tmp_path: Path, texts_read: list[str]) -> None:
    """From a new producer's first commit on, and in the reruns of both: actors tokenise nothing."""
    url, path = str(tmp_path / "store"), numbered(tmp_path, 4)
    Store.open(url, create=True)
    rows, other = prepared(path), tiny_recipe(tmp_path, seed=1)
    Converter(url, recipe)(rows.slice(0, 3))
    known, writer = known_in(url, recipe), Converter(url, other)
    assert prepared(path, known)["ids"].to_pylist()[:3] == [None] * 3
    writer(rows.slice(2, 1))
    assert known_in(url, other) == known
    assert [ids is None for ids in prepared(path, known)["ids"].to_pylist()] == [False, False, True, False]
    for again, converted in ((other, 3), (recipe, 1)):
        rows = prepared(path, known)
        texts_read.clear()
        assert Counter(Converter(url, again)(rows)["status"].to_pylist())["converted"] == converted and texts_read == []
    assert prepared(path, known)["ids"].null_count == 4


def test_a_store_that_is_out_of_reach_is_tried_once(
    recipe: ConvertRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, path, tried = str(tmp_path / "store"), numbered(tmp_path, 2), list[str]()
    Store.open(url, create=True)
    Converter(url, recipe)(prepared(path))
    known, refresh = known_in(url, recipe), Store.refresh
    out_of_reach = known._replace(store_url=str(tmp_path / "elsewhere"))
    assert prepared(path, out_of_reach)["ids"].null_count == 0
    Store.open(tmp_path / "elsewhere", create=True)

    def asked(store: Store) -> bool:
        tried.append(store.url)
        if len(tried) > 1:
            raise OSError("the network is down")
        return refresh(store)

    monkeypatch.setattr(Store, "refresh", asked)
    assert prepared(path, out_of_reach)["ids"].null_count == 0 and tried == []
    assert [prepared(path, known)["ids"].null_count for _ in range(4)] == [2, 0, 0, 0] and len(tried) == 2
    assert [record.message.rpartition(": ")[2] for record in caplog.records[-1:]] == ["the network is down"]
    assert len([record for record in caplog.records if "documents are read" in record.message]) == 2


@pytest.mark.parametrize("method", ["shine", "lift"])
@pytest.mark.parametrize("long_documents", ["compose", "windows"])
def test_a_recipe_knows_whether_documents_have_one_adapter_each(recipe: ConvertRecipe, method: str, long_documents: str) -> None:
    changes = {"method": method, "windows": {"long_documents": long_documents}}
    changed = ConvertRecipe.model_validate(recipe.model_dump() | changes)
    assert changed.one_each == open_writer(changed).one_each == ((method, long_documents) != ("shine", "windows"))


def test_sketches_are_left_out_where_nobody_asks_for_them(recipe: ConvertRecipe, tmp_path: Path) -> None:
    [rows] = sources.read(sources.open_source(str(numbered(tmp_path, 2)), "acme", "docs"))
    bare = recipe.model_copy(update={"run": recipe.run.model_copy(update={"near_duplicates": False})})
    Store.open(tmp_path / "store", create=True)
    for asked, count in ((recipe, BANDS), (bare, 0)):
        receipts = Converter(str(tmp_path / "store"), asked)(prepare_for(rows, asked, None)).to_pylist()
        assert [len(row["sketch"]) for row in receipts] == [count, count]


def test_rows_that_come_again_keep_their_names() -> None:
    def rows(*given: tuple[str, str]) -> pa.Table:
        values = {"tenant": "t", "collection": "c", "title": "", "reason": None, "source_bytes": 1, "read_at": 0.0}
        return pa.Table.from_pylist([values | {"name": name, "text": text} for name, text in given], sources.ROWS)

    stage = sources.UniqueNames()
    for _ in range(2):
        assert stage(rows(("a", "x"), ("b", "y")))["reason"].to_pylist() == [None, None]
        assert stage(rows(("c", "x"), ("a", "z")))["reason"].to_pylist() == [None, "name taken by an earlier document"]


@pytest.mark.parametrize("where", ["file", "s3", "whole bucket"])
def test_receipts_lie_beside_the_store(where: str, tmp_path: Path, bucket: str) -> None:
    url = {"file": f"file://{tmp_path}/store", "s3": f"s3://{bucket}/stores/one", "whole bucket": f"s3://{bucket}"}[where]
    store = Store.open(url, create=True)
    files = RunFiles(store.url, {"source": "notes/"})
    bad = [receipt("bad", "empty"), receipt("worse", "not JSON: here")]
    files.add([receipt(f"{number}") for number in range(FILE_RECEIPTS)])
    files.add(bad)
    files.finish(Summary(files.url).figures())
    objects = open_objects(files.url)
    assert [*objects.names("receipts")] == ["000000.parquet", "000001.parquet"]
    assert pq.read_table(pa.BufferReader(objects.read("receipts/000000.parquet"))).num_rows == FILE_RECEIPTS
    rejects = [json.loads(line) for line in objects.read("rejects/000001.jsonl").splitlines()]
    assert rejects == [{"name": "bad", "reason": "empty"}, {"name": "worse", "reason": "not JSON: here"}]
    assert [*objects.names("rejects")] == ["000001.jsonl"] and [*objects.names("about")] == ["finished.json", "started.json"]
    assert Store.open(url).stats().documents == 0


def store_of(folder: Path, names: str) -> Store:
    store = Store.open(folder / "store", create=True)
    store.put(
        [document(name, "t", "c", name) for name in names] + [document("x", "t", "other", "x"), document("x", "u", "c", "x")]
    )
    return store


def names_of(store: Store) -> list[tuple[str, str, str]]:
    store.refresh()
    return [row.key for tenant in ("t", "u") for row in store.list_documents(tenant).rows]


def test_only_what_has_gone_is_pruned(tmp_path: Path) -> None:
    store, seen = store_of(tmp_path, "abcd"), SeenNames()
    began = datetime.now(UTC)
    store.put([document("new", "t", "c", "new")])
    seen.add([receipt("a"), receipt("b", "empty"), receipt("e")])
    assert seen.prune(store, "t", "c", began, SETTINGS) == (2, None)
    assert [key[2] for key in names_of(store) if key[:2] == ("t", "c")] == ["a", "b", "new"]
    assert {key[:2] for key in names_of(store)} == {("t", "c"), ("t", "other"), ("u", "c")}
    assert seen.prune(store, "t", "c", began, SETTINGS) == (0, None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "cannot be read: Permission denied"),
        ("rows.jsonl.gz", "malformed"),
        ("rows.jsonl#7", "not JSON: here"),
        ("list.txt#3", "not a URL: give scheme://..."),
    ],
)
def test_nothing_is_pruned_where_documents_may_hide(name: str, reason: str, tmp_path: Path) -> None:
    store, seen = store_of(tmp_path, "ab"), SeenNames()
    seen.add([receipt("a"), receipt(name, reason)])
    pruned = seen.prune(store, "t", "c", datetime.now(UTC), SETTINGS)
    assert pruned.documents == 0 and name in str(pruned.reason) and len(names_of(store)) == 4


def test_a_source_that_lacks_too_much_prunes_nothing(tmp_path: Path) -> None:
    store, seen = store_of(tmp_path, "abcd"), SeenNames()
    seen.add([receipt("a")])
    assert "3 of 4 documents would go" in str(seen.prune(store, "t", "c", datetime.now(UTC), SETTINGS).reason)
    assert len(names_of(store)) == 6
    everything = PruneSettings(enabled=True, most=1)
    assert seen.prune(store, "t", "c", datetime.now(UTC), everything) == (3, None)

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from core.adapters.base_model import load_base
from core.adapters.lora import LoraWeights, composed, stack
from core.lift.writer import LiftRecipe
from core.shine.hypernetwork import Hypernetwork
from core.store.store import Store
from core.text.documents import windows
from core.text.prompts import encode
from core.writing.writer import WindowRule
from pipelines.conversion.convert import convert
from pipelines.conversion.converter import Converter, prepare
from pipelines.conversion.pruning import PruneSettings
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from pipelines.corpus import sources
from pipelines.corpus.records import Reading
from pipelines.world.tokenizer import build_tokenizer
from tests.conversion import tiny_recipe

MAX_TOKENS = 60
RUN = ConvertRun(buffer_documents=8, batch_rows=3, actors=2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> ConvertRecipe:
    return tiny_recipe(tmp_path_factory.mktemp("models")).model_copy(
        update={"encoding": "fp32", "windows": WindowRule(max_tokens=MAX_TOKENS), "run": RUN}
    )


def write_corpus(root: Path) -> dict[str, str]:
    """A folder of every kind of good and bad file. Returns the good documents' texts by name."""
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    good = {f"deep/{number}.txt": f"The crane number {number} lifts " + "boxes " * number for number in range(11)}
    good |= {"long.txt": "one two three four " * 40, "twin.txt": "The same text."}
    good["notes.md"] = "```\n# not this\n```\n# The title #\n\nBody."
    for name, text in good.items():
        (root / name).write_text(text)
    (root / "deep" / "twin copy.txt").write_bytes(b"\xef\xbb\xbfThe same text.\r\n")
    lines = [
        json.dumps({"id": "row-1", "text": "A row with an id.", "title": "First"}),
        "",
        json.dumps({"text": "A row without one."}),
        "{broken",
        json.dumps(["no", "object"]),
        json.dumps({"id": "no-text"}),
        '{"id": "half", "text": "\\ud800"}',
        json.dumps({"id": "row-1", "text": "A second text under a known name."}),
        "[" * 100_000,
    ]
    (root / "rows.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n')
    columns = {"id": [7, 8, 9], "text": ["A row of Parquet.", None, "Another row."], "other": [1, 2, 3]}
    pq.write_table(pa.table(columns), root / "table.parquet")
    (root / "damaged.parquet").write_bytes((root / "table.parquet").read_bytes()[:-9])
    pq.write_table(pa.table({"body": ["x"]}), root / "other.parquet")
    (root / "binary.md").write_bytes(b"a\0b")
    (root / "empty.txt").write_bytes(b"")
    (root / "blank.jsonl").write_bytes(b"\n\n")
    (root / "large.txt").write_text("x" * 5000)
    (root / "scan.pdf").write_bytes(b"%PDF")
    (root / "page.docx").write_bytes(b"PK")
    (root / ".hidden" / "a.txt").write_text("hidden")
    (root.parent / "secret.txt").write_text("A secret outside of the folder.")
    (root.parent / "elsewhere").mkdir(exist_ok=True)
    (root / "link.txt").symlink_to(root.parent / "secret.txt")
    (root / "folder").symlink_to(root.parent / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "gone.txt").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.txt")
    (root / os.fsdecode(b"\xff.txt")).write_text("A name that is not UTF-8.")
    return good | {
        "deep/twin copy.txt": "The same text.",
        "row-1": "A row with an id.",
        "rows.jsonl#2": "A row without one.",
        "7": "A row of Parquet.",
        "9": "Another row.",
    }


BAD = {
    "rows.jsonl#3": "not JSON",
    "rows.jsonl#4": "not a JSON object",
    "no-text": "no text",
    "half": "not Unicode",
    "row-1": "name taken by an earlier document",
    "rows.jsonl#8": "too large",
    "rows.jsonl#9": "not UTF-8",
    "8": "no text",
    "damaged.parquet": "cannot be read",
    "other.parquet": "no column text",
    "binary.md": "binary",
    "empty.txt": "empty",
    "blank.jsonl": "empty",
    "large.txt": "too large",
    "scan.pdf": "malformed",
    "page.docx": "no reader for this kind of file",
    "link.txt": "a link that leaves the folder",
    "folder": "a link that leaves the folder",
    "loop": "a link to a folder",
    "gone.txt": "cannot be read",
    "pipe.txt": "not a regular file",
    "\\udcff.txt": "the file's name is not UTF-8",
}


def rejected(files: str) -> dict[str, str]:
    """Names and reasons of a run's rejects."""
    lines = [line for path in sorted(Path(files, "rejects").iterdir()) for line in path.read_text().splitlines()]
    return {row["name"]: row["reason"].partition(":")[0] for row in map(json.loads, lines)}


def rows_of(source: sources.Source) -> Iterator[dict[str, Any]]:
    for table in sources.read(source):
        yield from table.to_pylist()


def test_every_file_becomes_documents_or_rejects(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "corpus")
    source = sources.open_source(str(tmp_path / "corpus"), "acme", "docs", Reading(max_document_bytes=4096))
    rows = list(rows_of(source))
    reasons = {row["name"]: row["reason"].partition(":")[0] for row in rows if row["reason"]}
    assert reasons == {name: reason for name, reason in BAD.items() if name != "row-1"}
    read = {row["name"]: row for row in reversed(rows) if row["reason"] is None}
    assert {name: row["text"].rstrip() for name, row in read.items()} == {name: text.rstrip() for name, text in texts.items()}
    titled = {row["name"]: row["title"] for row in rows if row["title"]}
    assert titled == {"notes.md": "The title", "row-1": "First"}
    assert {(row["tenant"], row["collection"]) for row in rows} == {("acme", "docs")}
    assert sum(row["source_bytes"] for row in rows) == source.size_bytes
    assert "secret" not in str(rows).replace("secret.txt", "")


def test_one_file_is_a_source_and_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"name": "a", "text": "x"}')
    for url in (str(tmp_path / "rows.jsonl"), f"file://{tmp_path}/rows.jsonl"):
        [row] = rows_of(sources.open_source(url, "t", "c"))
        assert (row["name"], row["text"], row["reason"]) == ("a", "x", None)
    with pytest.raises(ValueError, match="nothing at"):
        sources.open_source(str(tmp_path / "absent"), "t", "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no files under"):
        sources.open_source(str(tmp_path / "empty"), "t", "c")


def test_another_file_system_is_read_by_its_url() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a/b.md", b"# Head\n\nBody")
    memory.pipe("/corpus/.skip/c.txt", b"hidden")
    [row] = rows_of(sources.open_source("memory://corpus", "t", "c"))
    assert (row["name"], row["title"], row["text"]) == ("a/b.md", "Head", "# Head\n\nBody")


def test_a_folder_becomes_a_store_and_a_rerun_converts_what_changed(
    ray_local: Any, recipe: ConvertRecipe, tmp_path: Path
) -> None:
    corpus, url = tmp_path / "corpus", str(tmp_path / "store")
    texts = write_corpus(corpus)
    recipe = recipe.model_copy(update={"reading": Reading(max_document_bytes=4096)})

    drawn = io.StringIO()
    summary = convert(str(corpus), url, recipe, progress=Console(file=drawn, force_terminal=True, width=120))
    assert "documents/s" in drawn.getvalue()
    assert rejected(summary.files) == BAD and Path(summary.files).parent == tmp_path / "store.runs"
    told = pq.read_table(Path(summary.files, "receipts")).to_pylist()
    assert Counter(row["status"] for row in told) == summary.documents
    assert json.loads(Path(summary.files, "about/finished.json").read_text())["adapters"] == summary.adapters
    assert summary.documents == {"converted": len(texts) - 1, "shared": 1, "rejected": len(BAD)}
    assert summary.reasons["not UTF-8"] == 1 and 0 < summary.worst_error < 1
    assert summary.start_s > 0 and summary.documents_per_s > 0 and any("composed" in line for line in summary.lines())

    store = Store.open(url)
    base = load_base(recipe.base)
    hypernetwork = Hypernetwork.load(recipe.hypernetwork, base)
    assert base.tokenizer is not None
    assert (store.stats().documents, store.stats().adapters) == (len(texts), len(texts) - 1)
    assert summary.bytes_per_adapter == hypernetwork.spec.numel * 4
    joined = 0
    for name, text in texts.items():
        row = store.find_document("acme", "docs", name)
        assert row is not None and store.get_text(row) == text.rstrip()
        [adapter] = store.find_adapters("acme", row.content_hash)
        ids = encode(base.tokenizer, text.rstrip())
        assert adapter.tokens == len(ids) and adapter.window == (0, len(ids))
        got = LoraWeights(hypernetwork.spec, store.get_vector(adapter)[None])
        covers = windows(len(ids), MAX_TOKENS)
        if len(covers) == 1:
            torch.testing.assert_close(got.flat_BN, alone(hypernetwork, ids).flat_BN, rtol=1e-5, atol=1e-5)
        else:
            joined += 1
            apart = stack([alone(hypernetwork, ids[start:end]) for start, end in covers])
            whole, _ = composed(apart, "mean", hypernetwork.spec.rank)
            for layer, site in {(entry.layer, entry.site) for entry in hypernetwork.spec.table}:
                (a, b), (c, d) = got.factors(layer, site), whole.factors(layer, site)
                torch.testing.assert_close(a @ b, c @ d, rtol=1e-3, atol=1e-5)
    assert 1 <= joined == summary.composed < len(texts)

    (corpus / "notes.md").write_text("# The title\n\nAnother body.")
    (corpus / "moved.txt").write_text(texts["7"])
    before = store.find_document("acme", "docs", "notes.md")
    (corpus / "long.txt").unlink()
    summary = convert(str(corpus), url, recipe.model_copy(update={"prune": PruneSettings(enabled=True)}))
    assert summary.documents == {"converted": 1, "shared": 1, "unchanged": len(texts) - 2, "rejected": len(BAD)}
    assert summary.pruned is not None and "not all of the source was read" in str(summary.pruned.reason)
    assert rejected(summary.files) == BAD
    store.refresh()
    after = store.find_document("acme", "docs", "notes.md")
    assert before is not None and after is not None and before.content_hash != after.content_hash
    assert len(store.find_adapters("acme", after.content_hash)) == 1 and store.stats().adapters == len(texts)


def test_tenants_and_encodings_share_nothing(ray_local: Any, recipe: ConvertRecipe, tmp_path: Path) -> None:
    corpus, url = tmp_path / "corpus", str(tmp_path / "store")
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number:02}.txt").write_text(f"Document {number}.")
    (corpus / "\u2028.txt").write_text("A name that no document may have.")
    one = recipe.model_copy(update={"encoding": "bf16"})
    other = recipe.model_copy(update={"tenant": "other", "encoding": "bf16", "run": RUN.model_copy(update={"shard_bytes": 1})})
    assert convert(str(corpus), url, one).documents == {"converted": 20, "rejected": 1}
    assert convert(str(corpus), url, other).documents == {"converted": 20, "rejected": 1}
    (corpus / "07.txt").unlink()
    pruned = convert(str(corpus), url, one.model_copy(update={"prune": PruneSettings(enabled=True)}))
    assert pruned.pruned == (1, None) and any("1 pruned" in line for line in pruned.lines())
    store = Store.open(url)
    assert [store.find_document(tenant, "docs", "07.txt") is None for tenant in ("acme", "other")] == [True, False]
    (corpus / "07.txt").write_text("Document 7.")
    assert convert(str(corpus), url, one).documents == {"unchanged": 19, "shared": 1, "rejected": 1}
    store.refresh()
    vectors, shards = {}, {}
    for tenant in ("acme", "other"):
        page = store.list_documents(tenant)
        found = [store.find_adapters(tenant, row.content_hash) for row in page.rows]
        assert len(found) == 20 and all(len(adapters) == 1 for adapters in found)
        vectors[tenant] = torch.stack([store.get_vector(adapters[0]) for adapters in found])
        shards[tenant] = {adapters[0].shard for adapters in found}
    assert torch.equal(vectors["acme"], vectors["other"])
    assert shards["acme"].isdisjoint(shards["other"]) and (len(shards["acme"]), len(shards["other"])) == (3, 20)
    hypernetwork = Hypernetwork.load(recipe.hypernetwork, base := load_base(recipe.base))
    assert base.tokenizer is not None
    expected = alone(hypernetwork, encode(base.tokenizer, "Document 4."))
    torch.testing.assert_close(vectors["acme"][4], expected.flat_BN[0], rtol=2**-8, atol=1e-5)


def test_an_actor_that_is_stopped_goes_on_document_by_document(recipe: ConvertRecipe, tmp_path: Path) -> None:
    """LIFT, without Ray: what was finished is committed, what was in training is resumed, and both end as if never stopped."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(4):
        text = " ".join(f"Item {place} of list {number} is red." for place in range(8 - 2 * number))
        (corpus / f"{number}.txt").write_text(text)
    (corpus / "twin.txt").write_text((corpus / "1.txt").read_text())
    [read] = sources.read(sources.open_source(str(corpus), "acme", "docs"))
    rows = prepare(read, build_tokenizer())
    adapter = {"kind": "lora", "rank": 4, "scale": 1.0}
    lift = {
        "preset": "v4_fast",
        "serving_rank": 2,
        "settings": {"adapter": adapter},
        "run": {"scratch": str(tmp_path / "scratch"), "slots": 2},
    }
    run = recipe.run.model_copy(update={"commit_s": 1e-9})
    changes = {"method": "lift", "hypernetwork": None, "lift": LiftRecipe.model_validate(lift), "run": run}
    lifted = recipe.model_copy(update=changes)

    def statuses(table: pa.Table) -> dict[str, str]:
        return {row["name"]: row["status"] for row in table.to_pylist()}

    def vectors(url: str) -> dict[str, torch.Tensor]:
        store = Store.open(url)
        found = [
            adapter for row in store.list_documents("acme").rows for adapter in store.find_adapters("acme", row.content_hash)
        ]
        assert all(row.error is not None and row.error > 0 and row.questions is not None for row in found)
        return {row.content_hash: store.get_vector(row) for row in found}

    stopped, whole = str(tmp_path / "stopped"), str(tmp_path / "whole")
    for url in (stopped, whole):
        Store.open(url, create=True)
    begun = Converter(stopped, lifted).commits(rows)
    first = statuses(next(begun))
    begun.close()
    there = vectors(stopped).keys()
    assert set(first.values()) <= {"converted", "shared"} and 1 <= len(there) < 4
    assert len(list((tmp_path / "scratch" / "states").iterdir())) == 1
    again = Converter(stopped, lifted)(rows).to_pylist()
    unchanged = [row for row in again if row["status"] == "unchanged"]
    assert {row["content_hash"] for row in unchanged} == there and len(again) == 5
    assert first.keys() <= {row["name"] for row in unchanged}, "and what was committed while the generator was closed"
    assert not list((tmp_path / "scratch" / "states").iterdir())
    assert len(Converter(whole, lifted)(rows)) == 5
    resumed, expected = vectors(stopped), vectors(whole)
    assert resumed.keys() == expected.keys() and len(expected) == 4
    for content_hash, vector in expected.items():
        torch.testing.assert_close(resumed[content_hash], vector, rtol=1e-3, atol=1e-5)


def alone(hypernetwork: Hypernetwork, ids: list[int]) -> LoraWeights:
    with torch.no_grad():
        return hypernetwork.generate(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))

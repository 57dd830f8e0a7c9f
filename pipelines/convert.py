"""A corpus to a store of adapters, with Ray Data.

    read, normalise, tokenise (tasks) -> unique names (one actor) -> buffers of like size
    -> adapters, shards, commits (actor pool) -> receipts -> the driver: progress, summary, rejects

In: a source (`pipelines.sources`), a store, a recipe. Out: documents and adapters in the store, a `Summary`, and a JSONL file of
rejects: every document without adapter, and why. What the store holds is left alone, so a rerun converts what is missing.

Vectors go from the actor straight to the store, one commit a buffer or a shard's bytes; the driver sees receipts alone. Lengths
are sorted within a buffer, which is all that is held: any corpus streams. Order is the source's, so batches are the same in
every run. A job that is killed leaves what was committed, valid; a document and its adapters land together.

Runs on the Ray that the process is connected to, and wants a logical CPU more than `run.actors`.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import ray
import torch
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.adapter_writing import HypernetworkWriter, Rejected, WindowRule, Written
from core.base_model import load_base
from core.codec import Encoding
from core.config import RunSection, Section
from core.documents import Document
from core.hypernetwork import Hypernetwork
from core.manifest import AdapterRow
from core.prompts import encode
from core.store import Store
from pipelines import sources

Status = Literal["converted", "shared", "unchanged", "rejected"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ConvertRun(RunSection):
    """Where and how fast. The pool grows from `min_actors` to `actors`, each with `threads` torch threads (or a GPU, on `cuda`).

    buffer_documents: sorted by length and committed together. batch_rows, batch_tokens: most windows and padded tokens (memory
    included) of one forward pass. shard_bytes: a commit is made once a buffer has written as much.
    """

    min_actors: PositiveInt = 1
    actors: PositiveInt = 2
    threads: PositiveInt = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    buffer_documents: PositiveInt = 128
    batch_rows: PositiveInt = 16
    batch_tokens: PositiveInt = 4096
    shard_bytes: PositiveInt = 256 * 2**20
    max_document_bytes: PositiveInt = 16 * 2**20


class ConvertRecipe(Section):
    """What is made: by which hypernetwork (a directory) on which base (a directory or a name), for whom, in which encoding."""

    base: str
    hypernetwork: str
    tenant: Annotated[str, Field(min_length=1)] = "default"
    collection: Annotated[str, Field(min_length=1)] = "default"
    encoding: Encoding = "bf16"
    windows: WindowRule = WindowRule()
    run: ConvertRun = ConvertRun()


class Receipt(NamedTuple):
    """What became of one document. `bytes` are those of new adapters, `error` is `Written.error`.

    converted: new adapters. shared: stored, with adapters that another document of this content has. unchanged: all was there.
    rejected: `reason` says why; the text is stored nevertheless where there is one (it can answer in context).
    """

    name: str
    content_hash: str | None
    status: Status
    reason: str | None
    adapter_ids: list[str]
    shard: str | None
    bytes: int
    tokens: int
    error: float
    source_bytes: int
    read_at: float


RECEIPTS = pa.schema(
    [
        ("name", pa.string()),
        ("content_hash", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("adapter_ids", pa.list_(pa.string())),
        ("shard", pa.string()),
        ("bytes", pa.int64()),
        ("tokens", pa.int64()),
        ("error", pa.float64()),
        ("source_bytes", pa.int64()),
        ("read_at", pa.float64()),
    ]
)


@dataclass
class Summary:
    """Counts of one conversion. Rates leave out start-up: they count from the first file that was opened."""

    rejects_path: Path
    documents: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    composed: int = 0
    worst_error: float = 0.0
    start_s: float = 0.0
    convert_s: float = 0.0

    @property
    def documents_per_s(self) -> float:
        """All documents, skipped ones too, by time."""
        return self.documents.total() / self.convert_s if self.convert_s else 0.0

    @property
    def bytes_per_adapter(self) -> float:
        return self.adapter_bytes / self.adapters if self.adapters else 0.0

    def add(self, receipt: Receipt) -> None:
        self.documents[receipt.status] += 1
        if receipt.reason:
            self.reasons[receipt.reason.partition(":")[0]] += 1
        if receipt.status == "converted":
            self.tokens += receipt.tokens
            self.adapters += len(receipt.adapter_ids)
            self.adapter_bytes += receipt.bytes
            self.composed += receipt.error > 0
            self.worst_error = max(self.worst_error, receipt.error)

    def lines(self) -> list[str]:
        """The summary as people read it."""
        counts = ", ".join(f"{self.documents[status]:,} {status}" for status in ("converted", "shared", "unchanged", "rejected"))
        lines = [
            f"{self.documents.total():,} documents: {counts}",
            f"{self.documents_per_s:,.1f} documents/s over {self.convert_s:,.1f} s, after {self.start_s:,.1f} s of start-up",
            f"{self.adapters:,} adapters of {self.tokens:,} tokens, {self.bytes_per_adapter:,.0f} bytes each",
        ]
        if self.composed:
            lines.append(f"{self.composed:,} composed from several windows, relative error {self.worst_error:.2f} at most")
        lines += [f"  {count:,} {reason}" for reason, count in self.reasons.most_common()]
        if self.documents["rejected"]:
            lines.append(f"rejects: {self.rejects_path}")
        return lines


def convert(
    source: str, store_url: str, recipe: ConvertRecipe, progress: Console | None = None, rejects: Path | None = None
) -> Summary:
    """Converts a corpus; returns when all is committed.

    progress: where a bar is drawn. rejects: the file for rejects, beside the store by default. Raises `ValueError` for a source,
    store, base or hypernetwork that is not there; never for a document.
    """
    start = time.time()
    corpus = sources.open_source(source, recipe.tenant, recipe.collection, recipe.run.max_document_bytes)
    store = Store.open(store_url, create=True)
    if rejects is None:
        rejects = Path(store.url.removeprefix("file://") + ".rejects.jsonl")
    rejects.parent.mkdir(parents=True, exist_ok=True)
    summary = Summary(rejects)
    first_read = time.time()
    with rejects.open("w") as file, _bar(progress, corpus.size_bytes) as show:
        for batch in receipts(corpus, store.url, recipe):
            for receipt in batch:
                summary.add(receipt)
                first_read = min(first_read, receipt.read_at) if summary.documents.total() > 1 else receipt.read_at
                if receipt.status == "rejected":
                    file.write(json.dumps({"name": receipt.name, "reason": receipt.reason}) + "\n")
            summary.start_s, summary.convert_s = first_read - start, time.time() - first_read
            file.flush()
            show(sum(receipt.source_bytes for receipt in batch), summary)
    return summary


def receipts(corpus: sources.Source, store_url: str, recipe: ConvertRecipe) -> Iterator[list[Receipt]]:
    """Runs the job; its receipts as they are committed, buffer by buffer in the source's order. Closing the iterator ends it."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.wait_for_min_actors_s = 3600
    run = recipe.run
    with ray.data.DataContext.current(context):
        rows = sources.dataset(corpus)
        rows = rows.map_batches(partial(_prepare, tokenizer=recipe.base), batch_size=None, batch_format="pyarrow")
        one = ray.data.ActorPoolStrategy(size=1)
        rows = rows.map_batches(sources.UniqueNames, batch_size=None, batch_format="pyarrow", compute=one, num_cpus=0)
        rows = rows.repartition(target_num_rows_per_block=run.buffer_documents, strict=True)
        rows = rows.map_batches(
            _Convert,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_kwargs={"store_url": store_url, "recipe": recipe},
            compute=ray.data.ActorPoolStrategy(min_size=min(run.min_actors, run.actors), max_size=run.actors),
            num_cpus=1,
            num_gpus=1 if run.device.startswith("cuda") else 0,
        )
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            yield [Receipt(**row) for row in batch.to_pylist()]


PREPARED = sources.ROWS.append(pa.field("ids", pa.list_(pa.int32())))


def _prepare(rows: pa.Table, tokenizer: str) -> pa.Table:
    """Brings title and text into normal form and adds the token ids; a document that `Document` refuses becomes a reject."""
    return prepare(rows, _tokenizer(tokenizer))


def prepare(rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """Rows of `sources.ROWS` with title and text in normal form, and the token ids of the texts."""
    prepared = rows.to_pylist()
    for row in prepared:
        row["ids"] = None
        if row["reason"] is None:
            try:
                document = _document(row)
            except ValueError as error:
                row.update(reason=f"not a document: {error}", text=None)
            else:
                row.update(name=document.name, title=document.title, text=document.text, ids=encode(tokenizer, document.text))
    return pa.Table.from_pylist(prepared, PREPARED)


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def _document(row: dict[str, Any]) -> Document:
    return Document(**{name: row[name] for name in ("tenant", "collection", "name", "title", "text")})


def open_writer(recipe: ConvertRecipe) -> HypernetworkWriter:
    """The recipe's base and hypernetwork, loaded, as a writer."""
    run = recipe.run
    base = load_base(recipe.base, dtype=_DTYPES[run.dtype], device=run.device)
    hypernetwork = Hypernetwork.load(recipe.hypernetwork, base)
    return HypernetworkWriter(hypernetwork, recipe.encoding, recipe.windows, run.batch_rows, run.batch_tokens)


class _Entry(NamedTuple):
    """A prepared row that is a document."""

    row: dict[str, Any]
    document: Document

    def receipt(self, status: Status, adapters: Sequence[AdapterRow], reason: str | None = None, error: float = 0.0) -> Receipt:
        new_bytes = sum(adapter.length for adapter in adapters) if status == "converted" else 0
        ids = [adapter.adapter_id for adapter in adapters]
        shard = adapters[0].shard if adapters else None
        return _receipt(self.row, status, reason, self.document.content_hash, ids, shard, new_bytes, len(self.row["ids"]), error)


class _Convert:
    """The actor: one loaded hypernetwork, one open store."""

    def __init__(self, store_url: str, recipe: ConvertRecipe) -> None:
        torch.set_num_threads(recipe.run.threads)
        self._writer = open_writer(recipe)
        self._store = Store.open(store_url)
        self._shard_bytes = recipe.run.shard_bytes

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Writes and commits a buffer of prepared rows; gives their receipts."""
        self._store.refresh()
        done: list[Receipt] = []
        known: list[tuple[_Entry, list[AdapterRow]]] = []
        missing: dict[str, list[_Entry]] = {}
        for row in rows.to_pylist():
            if row["reason"] is not None:
                done.append(_receipt(row, "rejected", row["reason"]))
                continue
            entry = _Entry(row, _document(row))
            ids = self._writer.adapter_ids(entry.document, len(row["ids"]))
            held = [adapter for adapter in map(self._store.adapter, ids) if adapter is not None]
            if not ids or len(held) < len(ids):
                missing.setdefault(entry.document.content_hash, []).append(entry)
            elif self._stands(entry.document):
                done.append(entry.receipt("unchanged", held))
            else:
                known.append((entry, held))
        if known:
            self._store.put([entry.document for entry, _ in known])
            done += [entry.receipt("shared", adapters) for entry, adapters in known]
        if done:
            yield _to_table(done)
        yield from self._write(list(missing.values()))

    def _write(self, same_content: list[list[_Entry]]) -> Iterator[pa.Table]:
        """Makes the adapters of each content once, and commits whenever a shard is full."""
        pending: list[tuple[list[_Entry], Written | Rejected]] = []
        pending_bytes = 0
        first = [entries[0] for entries in same_content]
        outcomes = self._writer.write_each([entry.document for entry in first], [entry.row["ids"] for entry in first])
        for place, outcome in outcomes:
            pending.append((same_content[place], outcome))
            if isinstance(outcome, Written):
                pending_bytes += sum(len(adapter.vector) for adapter in outcome.adapters)
            if pending_bytes >= self._shard_bytes:
                yield self._commit(pending)
                pending, pending_bytes = [], 0
        if pending:
            yield self._commit(pending)

    def _commit(self, pending: Sequence[tuple[list[_Entry], Written | Rejected]]) -> pa.Table:
        documents = [entry.document for entries, _ in pending for entry in entries]
        new = [adapter for _, outcome in pending if isinstance(outcome, Written) for adapter in outcome.adapters]
        rows = iter(self._store.put(documents, new).adapters)
        done: list[Receipt] = []
        for entries, outcome in pending:
            if isinstance(outcome, Rejected):
                done += [entry.receipt("rejected", [], outcome.reason) for entry in entries]
            else:
                adapters = list(islice(rows, len(outcome.adapters)))
                done.append(entries[0].receipt("converted", adapters, error=outcome.error))
                done += [entry.receipt("shared", adapters) for entry in entries[1:]]
        return _to_table(done)

    def _stands(self, document: Document) -> bool:
        live = self._store.find_document(document.tenant, document.collection, document.name)
        return live is not None and live.content_hash == document.content_hash


def _receipt(
    row: dict[str, Any],
    status: Status,
    reason: str | None,
    content_hash: str | None = None,
    adapter_ids: Sequence[str] = (),
    shard: str | None = None,
    new_bytes: int = 0,
    tokens: int = 0,
    error: float = 0.0,
) -> Receipt:
    where = row["name"], content_hash, status, reason
    return Receipt(*where, list(adapter_ids), shard, new_bytes, tokens, error, row["source_bytes"], row["read_at"])


def _to_table(done: Sequence[Receipt]) -> pa.Table:
    return pa.Table.from_pylist([receipt._asdict() for receipt in done], RECEIPTS)


@contextmanager
def _bar(console: Console | None, total_bytes: int) -> Iterator[Callable[[int, Summary], None]]:
    """A progress bar by bytes of the source, or nothing where there is no console."""
    if console is None:
        yield lambda new_bytes, summary: None
        return
    columns = SpinnerColumn(), BarColumn(), TextColumn("{task.percentage:>3.0f} %  {task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total_bytes)

        def show(new_bytes: int, summary: Summary) -> None:
            counts = ", ".join(f"{count:,} {status}" for status, count in sorted(summary.documents.items()))
            bar.update(task, advance=new_bytes, description=f"{counts}  {summary.documents_per_s:,.0f} documents/s")

        yield show

"""A corpus to a store of adapters, with Ray Data.

    read, normalise, tokenise (tasks) -> unique names (one actor) -> buffers of like size
    -> adapters, shards, commits (actor pool) -> receipts -> the driver: progress, summary, rejects

In: a source (`pipelines.sources`), or documents of the store itself (`pipelines.promotion`); a store; a recipe, which says by
which method. Out: documents and adapters in the store, a `Summary`, and a JSONL file of rejects: every document without adapter,
and why. What the store holds is left alone, so a rerun converts what is missing.

Vectors go from the actor straight to the store, one commit a buffer or a shard's bytes; the driver sees receipts alone. Lengths
are sorted within a buffer, which is all that is held: any corpus streams. Order is the source's, so batches are the same in
every run. A job that is killed leaves what was committed, valid; a document and its adapters land together. With
`lift.run.scratch`, documents that were in training go on where they were last saved.

Runs on the Ray that the process is connected to, and wants a logical CPU more than `run.actors`.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow as pa
import ray
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.adapter_writing import AdapterWriter, HypernetworkWriter, Outcome, Rejected, WindowRule, Written
from core.base_model import load_base
from core.chat_endpoint import api_key
from core.codec import Encoding
from core.config import RunSection, Section, load
from core.documents import Document
from core.hypernetwork import Hypernetwork
from core.lift_writing import LiftRecipe, LiftWriter
from core.manifest import AdapterRow, NewAdapter
from core.prompts import encode
from core.store import Store
from pipelines import sources
from pipelines.receipts import Receipt, Status, Summary, receipt_of, to_table

CHANGED = "the document was replaced or deleted while it was lifted: run again"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ConvertRun(RunSection):
    """Where and how fast. The pool grows from `min_actors` to `actors`, each with `threads` torch threads (or a GPU, on `cuda`).

    buffer_documents: sorted by length and committed together. batch_rows, batch_tokens: most windows and padded tokens (memory
    included) of one forward pass. shard_bytes, commit_s: a commit is made once a buffer has written as much, or for so long.
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
    commit_s: PositiveFloat = 60.0
    max_document_bytes: PositiveInt = 16 * 2**20


class ConvertRecipe(Section):
    """What is made: by which method on which base (a directory or a name), for whom, in which encoding.

    hypernetwork: a directory; what writes the adapters, or what LIFT starts from where one is given.
    """

    base: str
    method: Literal["shine", "lift"] = "shine"
    hypernetwork: str | None = None
    tenant: Annotated[str, Field(min_length=1)] = "default"
    collection: Annotated[str, Field(min_length=1)] = "default"
    encoding: Encoding = "bf16"
    windows: WindowRule = WindowRule()
    lift: LiftRecipe = LiftRecipe()
    run: ConvertRun = ConvertRun()

    @model_validator(mode="after")
    def _complete(self) -> "ConvertRecipe":
        if self.method == "shine" and self.hypernetwork is None:
            raise ValueError("hypernetwork is missing: name the directory of one, or choose method lift")
        return self


def load_recipe(
    path: Path | None, method: str | None, base: str, hypernetwork: str | None, preset: str | None, changes: Iterable[str]
) -> ConvertRecipe:
    """A recipe with what the command line names; a recipe file names its base itself."""
    given = {"method": method, "base": None if path else base, "hypernetwork": hypernetwork, "lift.preset": preset}
    return load(ConvertRecipe, path, [*(f"{name}={value}" for name, value in given.items() if value is not None), *changes])


class Corpus(NamedTuple):
    """What is converted: rows of `sources.ROWS`, as a stream that begins when the job does, and the sum of their `source_bytes`.

    in_store: the rows are the store's own documents. Then nothing but adapters is put, so that a job never undoes an edit or a
    deletion made while it runs: a document that has changed is rejected.
    """

    dataset: "Callable[[], ray.data.Dataset]"
    size_bytes: int
    in_store: bool = False


def convert(
    source: str, store_url: str, recipe: ConvertRecipe, progress: Console | None = None, rejects: Path | None = None
) -> Summary:
    """Converts a corpus; returns when all is committed.

    progress: where a bar is drawn. rejects: the file for rejects, beside the store by default. Raises `ValueError` for a source,
    store, base or hypernetwork that is not there; never for a document.
    """
    start, recipe = time.time(), checked(recipe)
    found = sources.open_source(source, recipe.tenant, recipe.collection, recipe.run.max_document_bytes)
    corpus = Corpus(partial(sources.dataset, found), found.size_bytes)
    return convert_corpus(corpus, Store.open(store_url, create=True), recipe, start, progress, rejects)


def convert_corpus(
    corpus: Corpus, store: Store, recipe: ConvertRecipe, start: float, progress: Console | None, rejects: Path | None
) -> Summary:
    """`convert` by a `checked` recipe, with the source opened. start: Unix time from which start-up counts."""
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


def checked(recipe: ConvertRecipe) -> ConvertRecipe:
    """With local paths that are the same in every process. On a local Ray, an endpoint's missing key is found here."""
    lift = recipe.lift
    if recipe.method == "lift" and lift.questions.endpoint is not None and "RAY_ADDRESS" not in os.environ:
        api_key(lift.questions.endpoint.run)
    changes: dict[str, object] = {}
    if lift.pre_lift is not None:
        changes["pre_lift"] = str(Path(lift.pre_lift).resolve())
    if lift.run.scratch is not None:
        changes["run"] = lift.run.model_copy(update={"scratch": str(Path(lift.run.scratch).resolve())})
    return recipe.model_copy(update={"lift": lift.model_copy(update=changes)})


def receipts(corpus: Corpus, store_url: str, recipe: ConvertRecipe) -> Iterator[list[Receipt]]:
    """Runs the job; its receipts as they are committed, buffer by buffer in the source's order. Closing the iterator ends it."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.wait_for_min_actors_s = 3600
    run = recipe.run
    with ray.data.DataContext.current(context):
        rows = corpus.dataset().map_batches(partial(_prepare, tokenizer=recipe.base), batch_size=None, batch_format="pyarrow")
        one = ray.data.ActorPoolStrategy(size=1)
        rows = rows.map_batches(sources.UniqueNames, batch_size=None, batch_format="pyarrow", compute=one, num_cpus=0)
        rows = rows.repartition(target_num_rows_per_block=run.buffer_documents, strict=True)
        rows = rows.map_batches(
            _Convert,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_kwargs={"store_url": store_url, "recipe": recipe, "in_store": corpus.in_store},
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


def open_writer(recipe: ConvertRecipe) -> AdapterWriter:
    """The recipe's method with its base, loaded."""
    run = recipe.run
    base = load_base(recipe.base, dtype=_DTYPES[run.dtype], device=run.device)
    hypernetwork = None if recipe.hypernetwork is None else Hypernetwork.load(recipe.hypernetwork, base)
    if recipe.method == "lift":
        return LiftWriter(base, recipe.lift, recipe.encoding, hypernetwork, recipe.windows)
    assert hypernetwork is not None, "the recipe has refused it"
    return HypernetworkWriter(hypernetwork, recipe.encoding, recipe.windows, run.batch_rows, run.batch_tokens)


class _Entry(NamedTuple):
    """A prepared row that is a document."""

    row: dict[str, Any]
    document: Document

    def receipt(
        self, status: Status, adapters: Sequence[AdapterRow] = (), reason: str | None = None, written: Written | None = None
    ) -> Receipt:
        """written: what was made for this document, if anything was."""
        values: dict[str, Any] = {} if written is None else {"error": written.error, "lost": written.lost}
        if written is not None:
            values |= {name: getattr(written.adapters[0], name) for name in ("quality", "quality_lost")}
            values["bytes"] = sum(adapter.length for adapter in adapters)
        return receipt_of(
            self.row,
            status,
            reason,
            content_hash=self.document.content_hash,
            adapter_ids=[adapter.adapter_id for adapter in adapters],
            shard=adapters[0].shard if adapters else None,
            tokens=len(self.row["ids"]),
            **values,
        )


_Pending = tuple[list[_Entry], Outcome]
"""Documents of one content, and what was made for them."""


class _Convert:
    """The actor: one writer with its loaded models, one open store. in_store: see `Corpus`."""

    def __init__(self, store_url: str, recipe: ConvertRecipe, in_store: bool = False) -> None:
        torch.set_num_threads(recipe.run.threads)
        self._writer = open_writer(recipe)
        self._store = Store.open(store_url)
        self._in_store = in_store
        self._shard_bytes, self._commit_s = recipe.run.shard_bytes, recipe.run.commit_s

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Writes and commits a buffer of prepared rows; gives their receipts."""
        self._store.refresh()
        done: list[Receipt] = []
        known: list[tuple[_Entry, list[AdapterRow]]] = []
        missing: dict[str, list[_Entry]] = {}
        for row in rows.to_pylist():
            if row["reason"] is not None:
                done.append(receipt_of(row, "rejected", row["reason"]))
                continue
            entry = _Entry(row, _document(row))
            if self._in_store and not self._stands(entry.document):
                done.append(entry.receipt("rejected", reason=CHANGED))
                continue
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
            yield to_table(done)
        yield from self._write(list(missing.values()))

    def _write(self, same_content: list[list[_Entry]]) -> Iterator[pa.Table]:
        """Makes the adapters of each content once, and commits whenever a shard is full or its time has come."""
        pending: list[_Pending] = []
        pending_bytes, committed = 0, time.monotonic()
        first = [entries[0] for entries in same_content]
        outcomes = self._writer.write_each([entry.document for entry in first], [entry.row["ids"] for entry in first])
        for place, outcome in outcomes:
            pending.append((same_content[place], outcome))
            if isinstance(outcome, Written):
                pending_bytes += sum(len(adapter.vector) for adapter in outcome.adapters)
            if pending_bytes >= self._shard_bytes or time.monotonic() - committed >= self._commit_s:
                yield self._commit(pending)
                pending, pending_bytes, committed = [], 0, time.monotonic()
        if pending:
            yield self._commit(pending)

    def _commit(self, pending: Sequence[_Pending]) -> pa.Table:
        done: list[Receipt] = []
        made = _adapters(pending)
        if self._in_store:
            pending, changed = self._standing(pending)
            done += [entry.receipt("rejected", reason=CHANGED) for entry in changed]
        documents = [] if self._in_store else [entry.document for entries, _ in pending for entry in entries]
        rows = iter(self._store.put(documents, _adapters(pending)).adapters)
        self._writer.settled(adapter.adapter_id for adapter in made)
        for entries, outcome in pending:
            if isinstance(outcome, Rejected):
                done += [entry.receipt("rejected", reason=outcome.reason) for entry in entries]
            else:
                adapters = list(islice(rows, len(outcome.adapters)))
                done.append(entries[0].receipt("converted", adapters, written=outcome))
                done += [entry.receipt("shared", adapters) for entry in entries[1:]]
        return to_table(done)

    def _standing(self, pending: Sequence[_Pending]) -> tuple[list[_Pending], list[_Entry]]:
        """Those whose document is the store's present one, and the documents that are not."""
        self._store.refresh()
        kept: list[_Pending] = []
        changed: list[_Entry] = []
        for entries, outcome in pending:
            standing = [entry for entry in entries if self._stands(entry.document)]
            changed += [entry for entry in entries if entry not in standing]
            kept += [(standing, outcome)] if standing else []
        return kept, changed

    def _stands(self, document: Document) -> bool:
        live = self._store.find_document(document.tenant, document.collection, document.name)
        return live is not None and live.content_hash == document.content_hash


def _adapters(pending: Sequence[_Pending]) -> list[NewAdapter]:
    return [adapter for _, outcome in pending if isinstance(outcome, Written) for adapter in outcome.adapters]


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

"""The stages of a conversion that know models: rows of a source -> prepared rows -> adapters in the store, and receipts.

In: rows of `sources.ROWS`. Out: what the store lacks of them, committed; a receipt for each. Knows nothing of Ray: a `Converter`
is one worker, with its models and its open store, and may be called anywhere.

The store is the record of what is done. Each document's adapter ids are computed without a model, and one look-up a buffer says
which of them are there. Where a document has one adapter, for all of it, producer and content hash tell that already: what is
there is not even tokenised (`pipelines.conversion.known_contents`). Two workers that make one adapter at the same time both
finish: the first commit of an id wins, and the other's receipt says `shared`. A worker that is killed loses what it had not
committed of one buffer.

Cost beside the models': a tokenisation in `prepare`, a listing and two look-ups a buffer (5 ms for 128 documents that are there).
On a rerun a third look-up a buffer, of the documents without tokens, and in `prepare` a listing and a look-up a block.
A document that is there costs 0.2 ms of a core if it has 100 tokens and 0.4 ms if it has 1,000, reading and sketch included.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.adapters.base_model import load_base
from core.adapters.gated_memory import weights_of
from core.lift.writer import LiftWriter
from core.shine.hypernetwork import Hypernetwork
from core.shine.writer import HypernetworkWriter
from core.store.answering import choose, why_withheld
from core.store.manifest import AdapterRow, DocumentRow, Key, NewAdapter
from core.store.store import Store
from core.text.documents import Document
from core.text.tokens import Tokens, read
from core.writing.gain import gain
from core.writing.writer import AdapterWriter, Outcome, Rejected, Standing, Written
from pipelines.conversion.heap import keep_freed_memory
from pipelines.conversion.known_contents import KnownContents
from pipelines.conversion.near_duplicates import sketch
from pipelines.conversion.receipts import RECEIPTS, Receipt, Status, receipt_of, to_table
from pipelines.conversion.recipe import DTYPES, ConvertRecipe
from pipelines.corpus.sources import ROWS

CHANGED = "the document was replaced or deleted while it was lifted: run again"

PREPARED = pa.schema(
    [
        *ROWS,
        *(pa.field(name, pa.list_(pa.int32())) for name in Tokens._fields),
        pa.field("sketch", pa.list_(pa.int64())),
    ]
)


def prepare(
    rows: pa.Table, tokenizer: PreTrainedTokenizerBase, known: KnownContents | None = None, sketched: bool = True
) -> pa.Table:
    """Rows of `PREPARED`: of `sources.ROWS`, with title and text in normal form, the text's tokens and its sketch.

    known: documents whose contents are among these have no tokens; a `Converter` reads those that it needs. sketched: whether
    there are sketches. A document that `Document` refuses becomes a reject.
    """
    prepared, documents = rows.to_pylist(), dict[int, Document]()
    for place, row in enumerate(prepared):
        if row["reason"] is None:
            try:
                document = documents[place] = _document(row)
            except ValueError as error:
                row.update(reason=f"not a document: {error}", text=None)
            else:
                row.update(name=document.name, title=document.title, text=document.text)
    skipped = known.among([_content(document) for document in documents.values()]) if known and documents else set()
    for place, document in documents.items():
        if _content(document) not in skipped:
            prepared[place] |= read(tokenizer, document.text)._asdict()
        if sketched:
            prepared[place]["sketch"] = sketch(document.text)
    return pa.Table.from_pylist(prepared, PREPARED)


def prepare_for(rows: pa.Table, recipe: ConvertRecipe, known: KnownContents | None) -> pa.Table:
    """`prepare` with the tokenizer of the recipe's base, a directory or a name, which this process keeps."""
    return prepare(rows, _tokenizer(recipe.base), known, recipe.run.near_duplicates)


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def _document(row: dict[str, Any]) -> Document:
    return Document(**{name: row[name] for name in ("tenant", "collection", "name", "title", "text")})


def _content(document: Document) -> tuple[str, str]:
    return document.tenant, document.content_hash


def tokens_of(row: dict[str, Any]) -> Tokens:
    """The tokens of a prepared row that has them."""
    return Tokens(*(row[name] for name in Tokens._fields))


def open_writer(recipe: ConvertRecipe) -> AdapterWriter:
    """The recipe's method with its base, loaded."""
    run = recipe.run
    base = load_base(recipe.base, dtype=DTYPES[run.dtype], device=run.device)
    hypernetwork = None if recipe.hypernetwork is None else Hypernetwork.load(recipe.hypernetwork, base)
    if recipe.method == "lift":
        return LiftWriter(base, recipe.lift, recipe.encoding, hypernetwork, recipe.windows)
    assert hypernetwork is not None, "the recipe has refused it"
    return HypernetworkWriter(hypernetwork, recipe.encoding, recipe.windows, run.batch_rows, run.batch_tokens, recipe.gate)


class _Entry(NamedTuple):
    """A prepared row that is a document, with its tokens, or else with the adapter that makes them needless."""

    row: dict[str, Any]
    document: Document
    tokens: Tokens | None
    finished: Sequence[AdapterRow] = ()

    def receipt(
        self, status: Status, adapters: Sequence[AdapterRow] = (), reason: str | None = None, written: Written | None = None
    ) -> Receipt:
        """written: what was made for this document, if anything was."""
        values: dict[str, Any] = {} if written is None else {"error": written.error, "lost": written.lost}
        if written is not None:
            values |= {name: getattr(written.adapters[0], name) for name in ("quality", "quality_lost")}
            gains = [gain(new.matched_loss, new.shuffled_loss, new.base_loss) for new in written.adapters]
            values["gain"] = min((each for each in gains if each is not None), default=None)
            held = next((new for new in written.adapters if new.withheld), None)
            values["withheld"] = None if held is None else why_withheld(held)
            values["standing_quality"] = written.adapters[0].standing_quality
            values["bytes"] = sum(adapter.length for adapter in adapters)
        return receipt_of(
            self.row,
            status,
            reason,
            content_hash=self.document.content_hash,
            adapter_ids=[adapter.adapter_id for adapter in adapters],
            shard=adapters[0].shard if adapters else None,
            tokens=max(each.window_end for each in self.finished) if self.tokens is None else len(self.tokens.ids),
            sketch=self.row["sketch"] or [],
            **values,
        )

    def stands_in(self, live: dict[Key, DocumentRow]) -> bool:
        """Whether the live row of its name is this very document's."""
        row = live.get(self.key)
        return row is not None and row.content_hash == self.document.content_hash

    @property
    def key(self) -> Key:
        return self.document.tenant, self.document.collection, self.document.name


_Pending = tuple[list[_Entry], Outcome]
"""Documents of one content, and what was made for them."""


class Converter:
    """One writer with its loaded models, one open store. in_store: see `convert.Corpus`. writer: the recipe's, opened."""

    def __init__(
        self, store_url: str, recipe: ConvertRecipe, in_store: bool = False, writer: AdapterWriter | None = None
    ) -> None:
        torch.set_num_threads(recipe.run.threads)
        keep_freed_memory()
        self._writer = writer or open_writer(recipe)
        self._store = Store.open(store_url)
        self._in_store = in_store
        self._shard_bytes, self._commit_s = recipe.run.shard_bytes, recipe.run.commit_s

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Writes and commits a buffer of prepared rows; gives their receipts.

        One table for a buffer: where Ray runs a killed worker's buffer again, one set of receipts counts, never parts of two.
        """
        return pa.concat_tables([RECEIPTS.empty_table(), *self.commits(rows)])

    def commits(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The receipts of a buffer, as they are committed."""
        self._store.refresh()
        done: list[Receipt] = []
        entries: list[_Entry] = []
        for row in rows.to_pylist():
            if row["reason"] is None:
                entries.append(_Entry(row, _document(row), None if row["ids"] is None else tokens_of(row)))
            else:
                done.append(receipt_of(row, "rejected", row["reason"]))
        entries = self._finished_or_read(entries)
        live = self._store.find_documents([entry.key for entry in entries])
        wanted = [self._adapter_keys(entry) for entry in entries]
        there = self._store.adapters(list(chain(*wanted)))
        known: list[tuple[_Entry, list[AdapterRow]]] = []
        missing: dict[str, list[_Entry]] = {}
        for entry, keys in zip(entries, wanted, strict=True):
            stands, held = entry.stands_in(live), [there[key] for key in keys if key in there] or list(entry.finished)
            if self._in_store and not stands:
                done.append(entry.receipt("rejected", reason=CHANGED))
            elif not held or len(held) < len(keys):
                missing.setdefault(entry.document.content_hash, []).append(entry)
            elif stands:
                done.append(entry.receipt("unchanged", held))
            else:
                known.append((entry, held))
        if known:
            self._store.put([entry.document for entry, _ in known])
            done += [entry.receipt("shared", adapters) for entry, adapters in known]
        if done:
            yield to_table(done)
        yield from self._write(list(missing.values()))

    def _finished_or_read(self, entries: Sequence[_Entry]) -> list[_Entry]:
        """Those that came without tokens with their adapters, or else with tokens."""
        unread = [_content(entry.document) for entry in entries if entry.tokens is None]
        stored = self._store.find_adapters_of(unread) if unread else {}
        seen: list[_Entry] = []
        for entry in entries:
            if entry.tokens is None and (finished := self._writer.finished(stored.get(_content(entry.document), ()))):
                entry = entry._replace(finished=finished)
            elif entry.tokens is None:
                entry = entry._replace(tokens=read(self._writer.tokenizer, entry.document.text))
            seen.append(entry)
        return seen

    def _adapter_keys(self, entry: _Entry) -> list[Key]:
        """What to look for; nothing for what is found."""
        ids = [] if entry.tokens is None else self._writer.adapter_ids(entry.document, entry.tokens)
        return [(*_content(entry.document), each) for each in ids]

    def _write(self, same_content: list[list[_Entry]]) -> Iterator[pa.Table]:
        """Makes the adapters of each content once, and commits whenever a shard is full or its time has come.

        A thread commits while the next adapters are made, so that a GPU does not wait for hashes and disks. One commit is under
        way at a time, and one may wait for it: in memory are their bytes. Each is tried even where the one before it failed.
        """
        pending: list[_Pending] = []
        pending_bytes, begun = 0, time.monotonic()
        committing: Future[pa.Table] | None = None
        first = [entries[0] for entries in same_content]
        tokens = [entry.tokens for entry in first if entry.tokens is not None]
        assert len(tokens) == len(first), "what has no tokens is not missing"
        outcomes = self._writer.write_each([entry.document for entry in first], tokens, self._standing_adapter)
        with ThreadPoolExecutor(1, "commit") as thread:
            for place, outcome in outcomes:
                pending.append((same_content[place], outcome))
                if isinstance(outcome, Written):
                    pending_bytes += sum(len(adapter.vector) for adapter in outcome.adapters)
                if pending_bytes >= self._shard_bytes or time.monotonic() - begun >= self._commit_s:
                    before, committing = committing, thread.submit(self._commit, pending)
                    pending, pending_bytes, begun = [], 0, time.monotonic()
                    if before is not None:
                        yield before.result()
            if committing is not None:
                yield committing.result()
        if pending:
            yield self._commit(pending)

    def _standing_adapter(self, document: Document) -> Standing | None:
        """What a server of this base and of the writer's kind of adapter answers by today."""
        producers, kind = self._store.producers(), self._writer.spec.kind_name
        rows = [
            row
            for row in self._store.find_adapters(*_content(document))
            if producers[row.producer_fingerprint].config.get("base") == self._writer.producer.config["base"]
            and self._store.spec(row.spec_fingerprint).kind_name == kind
        ]
        chosen = choose(rows).row
        if chosen is None:
            return None
        return Standing(
            chosen.adapter_id, weights_of(self._store.spec(chosen.spec_fingerprint), self._store.get_vector(chosen)[None])
        )

    def _commit(self, pending: Sequence[_Pending]) -> pa.Table:
        done: list[Receipt] = []
        made = _adapters(pending)
        if self._in_store:
            pending, changed = self._standing(pending)
            done += [entry.receipt("rejected", reason=CHANGED) for entry in changed]
        documents = [] if self._in_store else [entry.document for entries, _ in pending for entry in entries]
        put = self._store.put(documents, _adapters(pending))
        self._writer.settled(adapter.adapter_id for adapter in made)
        rows = iter(put.adapters)
        for entries, outcome in pending:
            if isinstance(outcome, Rejected):
                done += [entry.receipt("rejected", reason=outcome.reason) for entry in entries]
                continue
            adapters = list(islice(rows, len(outcome.adapters)))
            if put.new_adapters and any(row.sequence == put.sequence for row in adapters):
                done.append(entries[0].receipt("converted", adapters, written=outcome))
                entries = entries[1:]
            done += [entry.receipt("shared", adapters) for entry in entries]
        return to_table(done)

    def _standing(self, pending: Sequence[_Pending]) -> tuple[list[_Pending], list[_Entry]]:
        """Those whose document is the store's present one, and the documents that are not."""
        self._store.refresh()
        live = self._store.find_documents([entry.key for entries, _ in pending for entry in entries])
        kept: list[_Pending] = []
        changed: list[_Entry] = []
        for entries, outcome in pending:
            standing = [entry for entry in entries if entry.stands_in(live)]
            changed += [entry for entry in entries if not entry.stands_in(live)]
            kept += [(standing, outcome)] if standing else []
        return kept, changed


def _adapters(pending: Sequence[_Pending]) -> list[NewAdapter]:
    return [adapter for _, outcome in pending if isinstance(outcome, Written) for adapter in outcome.adapters]

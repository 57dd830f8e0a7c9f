"""Promotion: documents of a store whose own figures ask for more are lifted, from the text that the store holds.

In: a store, an expression over `Figures` (`core.planning.selection`), a recipe of conversion. Out: new adapters in the same store
and a `Summary`, by the same job as any conversion (`pipelines.conversion.convert`); or the list of what would be promoted
(`choose`).

Documents are those of the recipe's tenant and collection, the most demanded first. One that has an adapter of this very recipe is
`unchanged`. One whose text is replaced or deleted meanwhile is rejected: a promotion puts adapters only, and never brings an old
text back.

Cost of choosing: a pass over the documents' rows, some 20 us each, and what `Store.demand` reads.
"""

import time
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import ray
from rich.console import Console

from core.planning.selection import parse_selection
from core.store.answering import newest as latest
from core.store.errors import StoreError
from core.store.manifest import DocumentRow
from core.store.store import Store
from pipelines.conversion.convert import Corpus, convert_corpus
from pipelines.conversion.converter import CHANGED
from pipelines.conversion.known_contents import opened
from pipelines.conversion.receipts import Summary
from pipelines.conversion.recipe import ConvertRecipe, checked
from pipelines.corpus.sources import PIECE_BYTES, PIECE_FILES, ROWS

_SECONDS_A_DAY = 86400


class Figures(NamedTuple):
    """What a store knows of a document; None is what it does not know.

    demand: its requests as `core.store.demand` counts them, 0 where there were none. age_days: since its text was stored.
    quality, quality_lost, error, tokens: of its newest adapter, whoever made it (`core.store.manifest.AdapterRow`); where each
    window has an adapter, of the newest of these, and the tokens that all cover.
    """

    demand: float
    age_days: float
    quality: float | None = None
    quality_lost: float | None = None
    error: float | None = None
    tokens: float | None = None


class Candidate(NamedTuple):
    """A chosen document, and the method of its newest adapter (None where it has none)."""

    document: DocumentRow
    method: str | None
    figures: Figures


class Choice(NamedTuple):
    """The chosen ones of `total` documents, the most demanded first."""

    candidates: list[Candidate]
    total: int

    def lines(self) -> list[str]:
        """The choice as people read it: a line a document, then how many there are."""
        lines = []
        for document, method, figures in self.candidates:
            known = ", ".join(f"{name} {value:.4g}" for name, value in figures._asdict().items() if value is not None)
            lines.append(f"{document.name} ({method or 'no adapter'}): {known}")
        return [*lines, f"{len(self.candidates):,} of {self.total:,} documents match"]


def choose(store: Store | str, select: str, recipe: ConvertRecipe) -> Choice:
    """The documents whose figures match. Raises `ValueError` for an expression or a store that cannot be read."""
    selection = parse_selection(select, Figures._fields)
    store = Store.open(store) if isinstance(store, str) else store
    demand, producers, now = store.demand(), store.producers(), datetime.now(UTC)
    candidates, total = [], 0
    for document, adapters in store.each_document(recipe.tenant, recipe.collection):
        total += 1
        age_days = (now - document.created).total_seconds() / _SECONDS_A_DAY
        figures, method = Figures(demand=demand[document.key], age_days=age_days), None
        if adapters:
            newest = latest(adapters)
            same = [row for row in adapters if row.producer_fingerprint == newest.producer_fingerprint]
            method = producers[newest.producer_fingerprint].method
            measured = {name: getattr(newest, name) for name in ("quality", "quality_lost", "error")}
            figures = figures._replace(**measured, tokens=max(row.window_end for row in same))
        if selection.matches(figures._asdict()):
            candidates.append(Candidate(document, method, figures))
    return Choice(sorted(candidates, key=lambda each: -each.figures.demand), total)


def promote(store_url: str, select: str, recipe: ConvertRecipe, progress: Console | None = None) -> Summary:
    """Lifts what `choose` gives, on the Ray that the process is connected to; arguments and errors as of
    `pipelines.conversion.convert`.
    """
    start, recipe = time.time(), checked(recipe)
    store = Store.open(store_url)
    documents = [candidate.document for candidate in choose(store, select, recipe).candidates]
    size_bytes = sum(document.length for document in documents)
    corpus = Corpus(f"{store.url} where {select}", partial(_dataset, documents, store.url), size_bytes, in_store=True)
    return convert_corpus(corpus, store, recipe, start, progress)


def _dataset(documents: list[DocumentRow], store_url: str) -> "ray.data.Dataset":
    """The documents' rows, as a stream of tasks that read a piece each."""
    pieces: list[list[DocumentRow]] = [[]]
    for document in documents:
        piece_bytes = sum(row.length for row in pieces[-1])
        if pieces[-1] and (len(pieces[-1]) == PIECE_FILES or piece_bytes + document.length > PIECE_BYTES):
            pieces.append([])
        pieces[-1].append(document)
    items = [{"documents": [[*row.key, row.content_hash] for row in piece]} for piece in pieces]
    stream = ray.data.from_items(items, override_num_blocks=len(items))
    return stream.map_batches(partial(_read, store_url=store_url), batch_size=1, batch_format="pyarrow")


def _read(batch: pa.Table, store_url: str) -> pa.Table:
    """Rows of `ROWS` for (tenant, collection, name, content hash); what is not as it was has a reason, and no text."""
    store, rows, read_at = opened(store_url), [], time.time()
    store.refresh()
    for tenant, collection, name, content_hash in batch["documents"].to_pylist()[0]:
        row = {"tenant": tenant, "collection": collection, "name": name, "title": "", "source_bytes": 0, "read_at": read_at}
        document = store.find_document(tenant, collection, name)
        if document is None or document.content_hash != content_hash:
            rows.append(row | {"reason": CHANGED})
            continue
        row |= {"title": document.title, "source_bytes": document.length}
        try:
            rows.append(row | {"text": store.get_text(document)})
        except (StoreError, OSError) as error:
            rows.append(row | {"reason": f"cannot be read: {error}"})
    return pa.Table.from_pylist(rows, ROWS)

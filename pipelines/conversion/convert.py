"""A corpus to a store of adapters, with Ray Data.

    read, normalise, tokenise (tasks) -> buffers of like size -> unique names (one actor)
    -> adapters, shards, commits (actor pool) -> receipts -> the driver: progress, summary, files

In: a source (`pipelines.corpus.sources`), or documents of the store itself (`pipelines.conversion.promotion`); a store; a recipe,
which says by which method. Out: documents and adapters in the store, a `Summary`, and what became of each document
(`pipelines.conversion.run_files`).

Vectors go from the actor straight to the store, one commit a buffer or a shard's bytes; the driver sees receipts alone. Lengths
are sorted within a buffer, which is all that is held: any corpus streams. Order is the source's, so batches are the same in
every run.

May be killed at any moment, in part or whole, and run again. What was committed is valid, a document lands together with its
adapters, and a rerun makes only what is missing: what each actor had in hand, at most `run.actors` buffers, is made twice. Ray
itself starts dead actors and nodes' tasks again within a run. The store is the only record of what is done. Ray Data's job
checkpoints would be a second one, and are not used: they know rows by an id column, here a name, and would skip a document that
was edited; they wake in files of the sink, so that a commit before its file is made again all the same; their filter takes an
actor and 12 s for a million ids. What they would save is reading again what is there; it is not tokenised again, unless windows
have adapters of their own.

With `lift.run.scratch`, documents that were in training go on where they were last saved.

Runs on the Ray that the process is connected to, and wants a logical CPU more than `run.actors`: where lost nodes leave fewer, it
waits for new ones.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from core.store.store import Store
from pipelines.conversion.actor_pool import ActorPool
from pipelines.conversion.converter import Converter, prepare_for
from pipelines.conversion.known_contents import KnownContents
from pipelines.conversion.near_duplicates import NearDuplicates
from pipelines.conversion.pruning import SeenNames
from pipelines.conversion.receipts import Receipt, Summary
from pipelines.conversion.recipe import ConvertRecipe, checked
from pipelines.conversion.run_files import RunFiles
from pipelines.corpus import sources
from pipelines.world.reference import is_reference


class Corpus(NamedTuple):
    """What is converted: rows of `sources.ROWS`, as a stream that begins when the job does, and the sum of their `source_bytes`,
    None where it is not known. source: what it is, as people would say.

    in_store: the rows are the store's own documents. Then nothing but adapters is put, so that a job never undoes an edit or a
    deletion made while it runs: a document that has changed is rejected.
    """

    source: str
    dataset: "Callable[[], ray.data.Dataset]"
    size_bytes: int | None
    in_store: bool = False


def convert(source: str, store_url: str, recipe: ConvertRecipe, progress: Console | None = None) -> Summary:
    """Converts a corpus; returns when all is committed.

    progress: where a bar is drawn. Raises `ValueError` for a source, store, base or hypernetwork that is not there; never for a
    document.
    """
    start, recipe = time.time(), checked(recipe)
    return convert_corpus(corpus_of(source, recipe), Store.open(store_url, create=True), recipe, start, progress)


def corpus_of(source: str, recipe: ConvertRecipe) -> Corpus:
    """The corpus at a path or URL. Raises `ValueError` where there is none."""
    found = sources.open_source(source, recipe.tenant, recipe.collection, recipe.reading)
    return Corpus(found.url, partial(sources.dataset, found), found.size_bytes)


def convert_corpus(corpus: Corpus, store: Store, recipe: ConvertRecipe, start: float, progress: Console | None) -> Summary:
    """`convert` by a `checked` recipe, with the source opened. start: Unix time from which start-up counts."""
    if corpus.in_store and recipe.prune.enabled:
        raise ValueError(
            "prune.enabled compares a store with its source: leave it out where the store's own documents are lifted"
        )
    files = RunFiles(store.url, {"source": corpus.source, "store": store.url, "recipe": recipe.model_dump(mode="json")})
    summary, seen, near = Summary(files.url), SeenNames(), NearDuplicates()
    summary.by_reference_weights = is_reference(recipe.hypernetwork)
    started_at: list[float] = []
    with _bar(progress, corpus.size_bytes) as show:
        try:
            for batch in receipts(corpus, store, recipe, started_at.append):
                for receipt in batch:
                    summary.add(receipt)
                if recipe.prune.enabled:
                    seen.add(batch)
                if recipe.run.near_duplicates:
                    near.add(batch)
                files.add(batch)
                summary.start_s, summary.convert_s = started_at[0] - start, time.time() - started_at[0]
                show(sum(receipt.source_bytes for receipt in batch), summary)
        finally:
            files.flush()
    if recipe.prune.enabled:
        began = datetime.fromtimestamp(start, UTC)
        summary.pruned = seen.prune(store, recipe.tenant, recipe.collection, began, recipe.prune)
    if recipe.run.near_duplicates:
        summary.near = files.write_near(near.groups())
    files.finish(summary.figures())
    return summary


def receipts(
    corpus: Corpus, store: Store, recipe: ConvertRecipe, started: Callable[[float], None] = lambda at: None
) -> Iterator[list[Receipt]]:
    """Runs the job; its receipts as they are committed, buffer by buffer in the source's order. Closing the iterator ends it.

    started: told, before the first receipts, the Unix time from which an actor was there to make adapters.
    """
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    run = recipe.run
    known = KnownContents.of(store, recipe.method, recipe.encoding) if recipe.one_each else None
    lasting: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
    names: Any = ray.remote(num_cpus=0, **lasting)(sources.UniqueNames).remote()
    converter = ray.remote(num_cpus=1, num_gpus=1 if run.device.startswith("cuda") else 0, **lasting)(Converter)

    def convert_named(actor: Any, buffer: ray.ObjectRef) -> ray.ObjectRef:
        return actor.__call__.remote(names.__call__.remote(buffer))

    with ray.data.DataContext.current(context):
        preparing = partial(prepare_for, recipe=recipe, known=known)
        rows = corpus.dataset().map_batches(preparing, batch_size=None, batch_format="pyarrow")
        rows = rows.repartition(target_num_rows_per_block=run.buffer_documents, strict=True)
        buffers = (block.ref for bundle in rows.iter_internal_ref_bundles() for block in bundle.blocks)
        start = partial(converter.remote, store.url, recipe, corpus.in_store)
        with closing(ActorPool(start, convert_named, run.min_actors, run.actors)) as pool:
            for batch in pool.results(buffers):
                if pool.started_at is not None:
                    started(pool.started_at)
                yield [Receipt(**row) for row in batch.to_pylist()]


@contextmanager
def _bar(console: Console | None, total_bytes: int | None) -> Iterator[Callable[[int, Summary], None]]:
    """A progress bar by bytes of the source, or nothing where there is no console."""
    if console is None:
        yield lambda new_bytes, summary: None
        return
    columns = SpinnerColumn(), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total_bytes)

        def show(new_bytes: int, summary: Summary) -> None:
            counts = ", ".join(f"{count:,} {status}" for status, count in sorted(summary.documents.items()))
            bar.update(task, advance=new_bytes, description=f"{counts}  {summary.documents_per_s:,.0f} documents/s")

        yield show

"""Training documents -> a Ray Data stream of examples, the same on any number of workers and after any restart.

In: Parquet files (`pipelines.training.windows`). Out: rows of (context_ids, ids, labels, window_sizes) and each one's place.

Order is planned, not drawn on the way: every epoch shuffles the row groups of all files, cuts them into windows of about
`shuffle_documents`, and one Ray Data task turns one window into examples with randomness seeded by (seed, stage, window)
alone. So the driver holds only row-group numbers, a task reads its row groups once, and (window, offset) of the last example
that was used says where to go on. Blocks hold exactly what one rank uses in one step, whatever windows gave; dealt in turn, they
give every step the same global batch whatever the number of ranks. Ray promises no order of dealing, so every step is checked:
`position_after` says whether the ranks' blocks are the stream's next.
"""

import json
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.training.examples import Example
from pipelines.training.tasks import Feed, Task
from pipelines.training.windows import RowGroup, seeded, window_examples

FIELDS = ("context_ids", "ids", "labels", "window_sizes")
"""Of an example, as the stream carries it."""
PLACE = ("window", "offset", "last")
"""Where an example stands: its window, its number there, and whether it is the window's last."""
COLUMNS = pa.schema(
    [*((name, pa.list_(pa.int32())) for name in FIELDS), ("window", pa.int32()), ("offset", pa.int32()), ("last", pa.bool_())]
)


class Position(NamedTuple):
    """The next example to use: number `offset` of window `window` of a stage's plan, or the first behind it that there is."""

    window: int = 0
    offset: int = 0

    def is_followed_by(self, window: int, offset: int, ended: bool) -> bool:
        """Whether an example may be the next; ended: what stood before was its window's last, or nothing did."""
        return (window, offset) == self or (ended and window > self.window and offset == 0)


class Span(NamedTuple):
    """Places of neighbouring examples: of the first, of the last, and whether that is its window's last."""

    first_window: int
    first_offset: int
    last_window: int
    last_offset: int
    last: bool


def row_groups(corpus: Sequence[str]) -> list[RowGroup]:
    """All row groups of the corpus in name order; reads footers only. Raises `ValueError` for none, and for a file that is no
    Parquet with one column `text`."""
    found = []
    for url in corpus:
        fs, path = fsspec.core.url_to_fs(url)
        files = sorted(fs.glob(f"{path.rstrip('/')}/**/*.parquet")) if fs.isdir(path) else fs.glob(path)
        for file in files:
            with fs.open(file) as stream:
                try:
                    footer = pq.ParquetFile(stream)
                except pa.ArrowInvalid as error:
                    raise ValueError(f"{file} is no Parquet file: take it out of the corpus ({error})") from None
                for name, least in (("text", 1), ("questions", 0)):
                    if not least <= (count := footer.schema_arrow.names.count(name)) <= 1:
                        raise ValueError(
                            f"{file} has {count or 'no'} column{'s' * (count > 1)} '{name}': training reads Parquet with text "
                            "and, for questions, questions"
                        )
                sizes = [footer.metadata.row_group(i).num_rows for i in range(footer.num_row_groups)]
            starts = np.cumsum([0, *sizes]).tolist()
            name = fs.unstrip_protocol(file)
            found += [RowGroup(name, number, size, starts[number]) for number, size in enumerate(sizes) if size]
    if not found:
        raise ValueError(f"no Parquet rows under {', '.join(corpus)}: write a corpus first, for instance with `imprint world`")
    return found


def plan(groups: Sequence[RowGroup], feed: Feed, stage: str, documents: int) -> list[list[RowGroup]]:
    """Windows of row groups, epoch after epoch, until they hold `documents` documents."""
    windows: list[list[RowGroup]] = []
    planned, epoch = 0, 0
    while planned < documents:
        order = list(groups)
        seeded(feed.seed, stage, "epoch", epoch).shuffle(order)
        window: list[RowGroup] = []
        for group in order:
            window.append(group)
            if sum(g.documents for g in window) >= feed.shuffle_documents:
                windows.append(window)
                window = []
        if window:
            windows.append(window)
        planned += sum(group.documents for group in order)
        epoch += 1
    return windows


def dataset(
    windows: Sequence[Sequence[RowGroup]],
    feed: Feed,
    stage: str,
    tasks: dict[Task, float],
    tokenizer: str,
    block_rows: int,
    start: Position,
    reports: Any = None,
) -> ray.data.Dataset:
    """The stream of a stage from `start` on, in blocks of exactly `block_rows` examples, the last one excepted.

    tokenizer: a directory or a name. reports: the actor that hears of skipped rows. Reading the stream raises `ValueError`,
    wrapped by Ray, once they are too many.
    """
    items = [
        {"window": number, "skip": start.offset if number == start.window else 0, "groups": json.dumps(windows[number])}
        for number in range(start.window, len(windows))
    ]
    make = partial(_window_table, feed=feed, stage=stage, tasks=tasks, tokenizer=tokenizer, reports=reports)
    stream: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    stream = stream.map_batches(make, batch_size=1, batch_format="numpy", zero_copy_batch=False)
    stream = stream.repartition(target_num_rows_per_block=block_rows, strict=True)
    stream.context.custom_execution_callback_classes = [_Patience]
    return stream


class _Patience(ExecutionCallback):
    """Ray Data 2.60's loop spins on a core or more while blocks wait for a slower consumer, which a training step is.

    Tasks that hold a finished block back count as active, and waiting for them returns at once: the output's queue tells, too.
    """

    def on_execution_step(self, executor: Any) -> None:
        if not executor._consumer_idling() or not any(op.num_active_tasks() for op in executor._topology):
            time.sleep(0.02)


def to_examples(batch: pa.Table) -> list[Example]:
    """Rows of the stream as examples."""
    columns = [batch.column(name).to_pylist() for name in FIELDS]
    return [Example(*map(tuple, values)) for values in zip(*columns, strict=True)]


def span_of(block: pa.Table) -> Span:
    """Where the rows of a rank's block stand. Raises `RuntimeError` where they are no neighbours."""
    windows, offsets, lasts = (block.column(name).to_pylist() for name in PLACE)
    for row in range(1, len(windows)):
        before = Position(windows[row - 1], offsets[row - 1] + 1)
        if not before.is_followed_by(windows[row], offsets[row], lasts[row - 1]):
            raise RuntimeError(f"{Position(windows[row], offsets[row])} stands where {before} is next: a block is out of order")
    return Span(windows[0], offsets[0], windows[-1], offsets[-1], lasts[-1])


def position_after(position: Position, ended: bool, spans: Sequence[Span]) -> tuple[Position, bool]:
    """Where a step ends whose ranks use `spans`, in the order of ranks, and whether a window ends there.

    ended: what was returned for the step before, True at a start. Raises `RuntimeError` unless the spans are the stream's next.
    """
    for span in spans:
        if not position.is_followed_by(span.first_window, span.first_offset, ended):
            raise RuntimeError(
                f"{Position(span.first_window, span.first_offset)} was dealt where {position} is next: run the command again to "
                "go on from the last checkpoint"
            )
        position, ended = Position(span.last_window, span.last_offset + 1), span.last
    return position, ended


def _window_table(
    batch: dict[str, np.ndarray], feed: Feed, stage: str, tasks: dict[Task, float], tokenizer: str, reports: Any
) -> pa.Table:
    tables = []
    for window, skip, groups in zip(batch["window"], batch["skip"], batch["groups"], strict=True):
        window_groups = [RowGroup(*group) for group in json.loads(groups)]
        made = window_examples(window_groups, feed, stage, int(window), tasks, _tokenizer(tokenizer))
        if made.skipped and reports is not None and (refusal := ray.get(reports.skip.remote(made.skipped))):
            raise ValueError(refusal)
        tables.append(table_of(made.examples, int(window)).slice(int(skip)))
    return pa.concat_tables(tables)


def table_of(examples: Sequence[Example], window: int) -> pa.Table:
    """The examples of a window as rows of the stream."""
    columns = [[getattr(example, name) for example in examples] for name in FIELDS]
    count = len(examples)
    places = [[window] * count, list(range(count)), [offset == count - 1 for offset in range(count)]]
    return pa.table([*columns, *places], schema=COLUMNS)


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer

"""Every rank count sees the same global batches, and a resume skips and repeats nothing: as a property, and on real Ray Data."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import assume, given
from hypothesis import strategies as st

from core.training.examples import Example
from pipelines.training.feed import Position, Span, dataset, plan, position_after, row_groups, span_of, table_of
from pipelines.training.reports import start_reports
from pipelines.training.tasks import Feed
from pipelines.training.windows import window_examples
from pipelines.world.documents import WorldSpec, generate, write
from pipelines.world.tokenizer import build_tokenizer

Batches = list[list[tuple[int, int]]]


def stream(sizes: Sequence[int], start: Position) -> list[pa.Table]:
    """Windows of so many examples, from `start` on, as `dataset` makes them."""
    tables = [
        table_of([Example((), (number, row), (number, row)) for row in range(size)], number) for number, size in enumerate(sizes)
    ]
    return [tables[start.window].slice(start.offset), *tables[start.window + 1 :]]


def strict_blocks(tables: Sequence[pa.Table], rows: int) -> list[pa.Table]:
    """What Ray's strict repartition promises: blocks of exactly `rows`, across windows; the rest of the end is left here."""
    whole = pa.concat_tables(tables)
    return [whole.slice(start, rows) for start in range(0, whole.num_rows - rows + 1, rows)]


def short_blocks(tables: Sequence[pa.Table], rows: int) -> list[pa.Table]:
    """What it makes when it is not strict: a block may end where a window does."""
    return [table.slice(start, rows) for table in tables for start in range(0, table.num_rows, rows)]


def places(table: pa.Table) -> list[tuple[int, int]]:
    return list(zip(table.column("window").to_pylist(), table.column("offset").to_pylist(), strict=True))


def steps(blocks: Sequence[pa.Table], ranks: int, start: Position, count: int | None = None) -> tuple[Batches, list[Position]]:
    """The global batches of ranks that are dealt blocks in turn, checked as the loop checks them, and where each step ends."""
    position, ended, batches, ends = start, True, Batches(), []
    dealt = [blocks[rank::ranks] for rank in range(ranks)]
    for share in islice(zip(*dealt, strict=False), count):
        position, ended = position_after(position, ended, [span_of(block) for block in share])
        batches.append([place for block in share for place in places(block)])
        ends.append(position)
    return batches, ends


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(sizes=SIZES, ranks=st.sampled_from([1, 2, 3]), share=st.integers(1, 4), later=st.sampled_from([1, 2, 3]), data=st.data())
def test_any_ranks_see_the_batches_of_one_and_go_on_anywhere(
    sizes: list[int], ranks: int, share: int, later: int, data: st.DataObject
) -> None:
    batch = 6 * share
    everything = [place for table in stream(sizes, Position()) for place in places(table)]
    expected = [everything[start : start + batch] for start in range(0, len(everything) - batch + 1, batch)]
    batches, ends = steps(strict_blocks(stream(sizes, Position()), batch // ranks), ranks, Position())
    assert batches == expected
    assume(expected)
    done = data.draw(st.integers(0, len(expected) - 1))
    start = ends[done]
    rest, _ = steps(strict_blocks(stream(sizes, start), batch // later), later, start)
    assert batches[: done + 1] + rest == expected


@given(sizes=SIZES, ranks=st.sampled_from([2, 3]), share=st.integers(1, 4), swapped=st.data())
def test_another_dealing_never_passes_unseen(sizes: list[int], ranks: int, share: int, swapped: st.DataObject) -> None:
    """Whatever order blocks come in, and however short they are: either the batches are one rank's, or the run ends."""
    tables = stream(sizes, Position())
    blocks = [block for block in short_blocks(tables, share) if block.num_rows]
    blocks = swapped.draw(st.permutations(blocks))
    everything = [place for table in tables for place in places(table)]
    try:
        batches, _ = steps(blocks, ranks, Position())
    except RuntimeError as error:
        assert "dealt where" in str(error)
        return
    flat = [place for each in batches for place in each]
    assert flat == everything[: len(flat)]


def test_a_block_out_of_order_is_refused() -> None:
    table = table_of([Example((), (0, 1), (0, 1))] * 4, 0)
    with pytest.raises(RuntimeError, match="out of order"):
        span_of(pa.concat_tables([table.slice(0, 1), table.slice(2, 1)]))
    assert span_of(table) == Span(0, 0, 0, 3, True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 7, 7 and 6 documents: no multiple of any share below."""
    root = tmp_path_factory.mktemp("order")
    write(generate(WorldSpec(count=20)), root / "a", rows_per_group=7)
    build_tokenizer().save_pretrained(root / "tokenizer")
    return root


@ray.remote(num_cpus=0)
def consume(shard: Any, share: int) -> list[pa.Table]:
    return [table for table in shard.iter_batches(batch_size=share, batch_format="pyarrow") if table.num_rows == share]


def dealt_by_ray(corpus: Path, ranks: int, start: Position, reports: Any = None) -> Iterator[Any]:
    """Each rank's blocks, as Ray Train hands them out; global batches are of 6."""
    feed = Feed(corpus=(str(corpus / "a"),), shuffle_documents=5)
    windows = plan(row_groups(feed.corpus), feed, "s", 40)
    made = dataset(windows, feed, "s", {"questions": 1.0}, str(corpus / "tokenizer"), 6 // ranks, start, reports)
    made.context.execution_options.preserve_order = True
    shards = made.streaming_split(ranks, equal=True)
    yield from ray.get([consume.remote(shard, 6 // ranks) for shard in shards])


def test_ray_deals_the_batches_of_one_rank(ray_local: Any, corpus: Path) -> None:
    feed = Feed(corpus=(str(corpus / "a"),), shuffle_documents=5)
    windows = plan(row_groups(feed.corpus), feed, "s", 40)
    sizes = [
        len(window_examples(groups, feed, "s", n, {"questions": 1.0}, build_tokenizer()).examples)
        for n, groups in enumerate(windows)
    ]
    everything = [(window, offset) for window, size in enumerate(sizes) for offset in range(size)]
    assert len(everything) == 40 and sum(size % 3 > 0 for size in sizes) > 3, "most windows are no multiple of a share"
    expected = [everything[start : start + 6] for start in range(0, 36, 6)]

    def batches(ranks: int, start: Position) -> tuple[Batches, list[Position]]:
        dealt = list(dealt_by_ray(corpus, ranks, start))
        return steps([block for share in zip(*dealt, strict=True) for block in share], ranks, start)

    three, ends = batches(3, Position())
    assert three == expected
    two, _ = batches(2, ends[2])
    assert two == expected[3:]


def test_skipped_rows_reach_the_reports(ray_local: Any, tmp_path: Path) -> None:
    rows = [{"text": f"Town {n} has ships.", "questions": [{"question": "What?", "answer": "Ships"}]} for n in range(40)]
    rows[3] |= {"text": None}
    rows[17] |= {"questions": []}
    (tmp_path / "a").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a" / "x.parquet", row_group_size=5)
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    reports = start_reports(40, 0.05, [])
    [blocks] = dealt_by_ray(tmp_path, 1, Position(), reports)
    assert len(blocks) == 38 // 6
    skipped = [each for message in ray.get(reports.take.remote(1.0)) for each in message["skipped"]]
    assert sorted((Path(each.path).name, each.row, each.reason) for each in skipped) == [
        ("x.parquet", 3, "it has no text"),
        ("x.parquet", 17, "it has no questions, and the task asks some"),
    ]
    assert ray.get(reports.refusal.remote()) is None
    strict = start_reports(40, 0.04, skipped[:1])
    with pytest.raises(ray.exceptions.RayError, match="2 of 40 documents cannot be trained on"):
        list(dealt_by_ray(tmp_path, 1, Position(), strict))
    assert "x.parquet#17: it has no questions" in ray.get(strict.refusal.remote())

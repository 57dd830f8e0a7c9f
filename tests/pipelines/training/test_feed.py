"""The planned order of training data: every document once an epoch, the same whatever is restarted or split."""

import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.text.prompts import Limits
from pipelines.training.feed import Position, dataset, plan, row_groups, to_examples
from pipelines.training.tasks import Feed
from pipelines.training.windows import window_examples
from pipelines.world.documents import WorldSpec, generate, write
from pipelines.world.tokenizer import build_tokenizer

BASE_TASKS = {"in_context": 0.5, "copying": 0.2, "recitation": 0.1, "question_only": 0.1, "plain_text": 0.1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write(generate(WorldSpec(count=60)), root / "a", rows_per_group=10)
    write(generate(WorldSpec(seed=1, count=25)), root / "b", rows_per_group=10)
    build_tokenizer().save_pretrained(root / "tokenizer")
    return root


def make_feed(corpus: Path, **changes: object) -> Feed:
    return Feed.model_validate({"corpus": (str(corpus / "a"), str(corpus / "b")), "shuffle_documents": 20, **changes})


def test_every_document_once_an_epoch_in_another_order(corpus):
    groups = row_groups(make_feed(corpus).corpus)
    assert sum(group.documents for group in groups) == 85
    windows = plan(groups, make_feed(corpus), "reading", documents=170)
    flat = [group for window in windows for group in window]
    assert len(flat) == 2 * len(groups)
    first, second = flat[: len(groups)], flat[len(groups) :]
    assert set(first) == set(second) == set(groups)
    assert first != second
    assert all(sum(group.documents for group in window) < 40 for window in windows)
    assert plan(groups, make_feed(corpus), "reading", 170) == windows
    assert plan(groups, make_feed(corpus, seed=1), "reading", 170) != windows


@pytest.mark.parametrize(
    "tasks",
    [
        {"questions": 1.0},
        {"pretraining": 1.0},
        BASE_TASKS,
    ],
)
def test_a_window_is_a_function_of_its_arguments(corpus, tasks):
    feed = make_feed(corpus)
    groups = plan(row_groups(feed.corpus), feed, "s", 85)[0]
    examples = window_examples(groups, feed, "s", 0, tasks, build_tokenizer()).examples
    assert len(examples) == sum(group.documents for group in groups)
    assert examples == window_examples(groups, feed, "s", 0, tasks, build_tokenizer()).examples
    assert examples != window_examples(groups, feed, "s", 1, tasks, build_tokenizer()).examples
    assert all(example.tokens for example in examples)
    assert all(bool(example.context_ids) == bool(tasks.keys() & {"questions", "pretraining"}) for example in examples)


def test_composed_examples_hold_every_document_once_in_windows_that_end_at_sentences(corpus):
    tokenizer = build_tokenizer()
    feed = make_feed(corpus, composed_documents=(2, 3), composed_window_tokens=(60, 90), max_questions=12)
    groups = plan(row_groups(feed.corpus), feed, "s", 85)[0]
    examples = window_examples(groups, feed, "s", 0, {"composed": 0.8, "questions": 0.2}, tokenizer).examples
    assert examples == window_examples(groups, feed, "s", 0, {"composed": 0.8, "questions": 0.2}, tokenizer).examples
    contexts = [tokenizer.decode(example.context_ids) for example in examples]
    texts = [text for group in groups for text in _texts(group.path, group.number)]
    assert all(sum(text.strip() in context for context in contexts) == 1 for text in texts)
    composed = [example for example in examples if example.window_sizes]
    assert 2 < len(composed) < len(examples) < len(texts)
    for example in composed:
        assert len(example.window_sizes) >= 2 and max(example.window_sizes) <= 90
        assert [token for window in example.windows for token in window] == list(example.context_ids)
        assert all(tokenizer.decode(window).rstrip()[-1] in ".:" for window in example.windows)
    short = make_feed(corpus, composed_documents=(3, 3), composed_tokens=90, composed_window_tokens=(60, 60))
    cut = window_examples(groups, short, "s", 0, {"composed": 1.0}, tokenizer).examples
    assert len(texts) / 3 < len(cut) <= len(texts) and max(len(example.context_ids) for example in cut) <= 90
    assert any(len(tokenizer(text).input_ids) > 90 for text in texts), "one is cut"
    with pytest.raises(ValueError, match="composed_documents is 3, 2"):
        make_feed(corpus, composed_documents=(3, 2))


def test_composed_documents_are_alike(corpus):
    def kinds_together(candidates: int) -> float:
        """The share of composed pairs that are of one kind of entity."""
        feed = make_feed(corpus, composed_documents=(2, 2), composed_candidates=candidates, composed_window_tokens=(90, 90))
        examples = [
            example
            for number, groups in enumerate(plan(row_groups(feed.corpus), feed, "s", 85))
            for example in window_examples(groups, feed, "s", number, {"composed": 1.0}, build_tokenizer()).examples
        ]
        texts = [build_tokenizer().decode(example.context_ids) for example in examples]
        kinds = [[kind for kind in ("person", "place", "product") if f" {kind} " in text] for text in texts]
        return sum(len(found) == 1 for found in kinds) / len(kinds)

    assert kinds_together(16) > kinds_together(1) + 0.2


def _texts(path: str, row_group: int) -> list[str]:
    with fsspec.open(path) as stream:
        return pq.ParquetFile(stream).read_row_group(row_group, ["text"]).column("text").to_pylist()


def test_packed_groups_hold_every_text_once(corpus):
    feed = make_feed(corpus, pack_tokens=400, limits=Limits(context_tokens=400, conversation_tokens=600))
    groups = plan(row_groups(feed.corpus), feed, "s", 85)[0]
    examples = window_examples(groups, feed, "s", 0, {"pretraining": 1.0}, build_tokenizer()).examples
    assert len(examples) < sum(group.documents for group in groups) / 2
    ends = build_tokenizer().convert_tokens_to_ids("<|endoftext|>")
    assert sum(example.context_ids.count(ends) + 1 for example in examples) == sum(group.documents for group in groups)


def test_stream_gives_blocks_of_a_step_and_goes_on_where_it_stopped(ray_local, corpus):
    feed = make_feed(corpus)
    windows = plan(row_groups(feed.corpus), feed, "s", 85)
    tokenizer = str(corpus / "tokenizer")

    def rows(start: Position) -> list[dict]:
        stream = dataset(windows, feed, "s", {"questions": 1.0}, tokenizer, 8, start)
        stream.context.execution_options.preserve_order = True
        return stream.take_all()

    everything = rows(Position())
    assert len(everything) == 85
    places = [(row["window"], row["offset"]) for row in everything]
    assert places == sorted(places)
    middle = everything[37]
    assert rows(Position(middle["window"], middle["offset"])) == everything[37:]
    expected = window_examples(windows[0], feed, "s", 0, {"questions": 1.0}, build_tokenizer()).examples
    table = pa.Table.from_pylist(everything[: len(expected)])
    assert to_examples(table) == expected


def test_errors_say_what_to_do(corpus, tmp_path):
    with pytest.raises(ValueError, match="imprint world"):
        row_groups((str(tmp_path),))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column 'text'"):
        row_groups((str(tmp_path),))
    pq.write_table(pa.table({"text": ["x y"]}), tmp_path / "x.parquet")
    groups = row_groups((str(tmp_path),))
    with pytest.raises(ValueError, match="pack_tokens is 2000"):
        make_feed(corpus, pack_tokens=2000)
    with pytest.raises(ValueError, match="copying_tokens"):
        make_feed(corpus, copying_tokens=(5, 2))
    assert json.loads(json.dumps(groups)) == [list(group) for group in groups]

"""Training documents -> a Ray Data stream of examples, the same on any number of workers and after any restart.

In: Parquet files with a `text` column and, for tasks that ask, a `questions` column (list of {question, answer}). Out: rows of
(context_ids, ids, labels, window, offset).

Order is planned, not drawn on the way: every epoch shuffles the row groups of all files, cuts them into windows of about
`shuffle_documents`, and one Ray Data task turns one window into examples with randomness seeded by (seed, stage, window)
alone. So the driver holds only row-group numbers, a task reads its row groups once, and (window, offset) of the last example
that was used says where to go on. Blocks hold what one rank uses in one step; dealt in turn, they give every step the same
global batch whatever the number of ranks (exactly on one node; on several, Ray may deal blocks out of turn).
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pydantic import Field, model_validator
from ray.data._internal.execution.execution_callback import ExecutionCallback
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.config import Section
from core.lift.course import Curriculum
from core.lift.examples import Reading, Wording, draw_pieces, recital, segment_example, timeline_example
from core.text.control import Ours
from core.text.documents import Window, segments
from core.text.prompts import Instructions, Limits, Turn, encode, render
from core.text.sentences import sentences
from core.training.examples import (
    IGNORED,
    Example,
    Pretraining,
    QuestionAnswer,
    composed_example,
    in_context_example,
    multi_turn_example,
    packing,
    pretraining_example,
)

Task = Literal[
    "pretraining",
    "questions",
    "composed",
    "copying",
    "in_context",
    "keywords",
    "recitation",
    "question_only",
    "plain_text",
    "segments",
    "contextualised",
    "timeline",
]
FIELDS = ("context_ids", "ids", "labels", "window_sizes")
"""Of an example, as the stream carries it."""
TIMELINE_SENTENCES = Curriculum().timeline_sentences
"""As many as LIFT's own timelines have."""
COLUMNS = pa.schema([*((name, pa.list_(pa.int32())) for name in FIELDS), ("window", pa.int32()), ("offset", pa.int32())])


class Feed(Section):
    """What of a corpus becomes examples.

    corpus: files or folders of Parquet, any fsspec URL. tasks of a stage: `pretraining` (SHINE's reconstruction and
    completion, texts packed into groups of `pack_tokens`, 0 for one text a group), `questions` (all questions of a document, at
    most `max_questions`, as one conversation) and `composed` (the same of several documents that are read as one, in windows
    whose adapters are composed) train a hypernetwork; the others a base: `in_context` (document shown, then questions),
    `keywords` (plain text, then what is left of each question when words are dropped, and its answer: teaches to look things up
    outside the chat template and from a word alone, as memory tokens must), `recitation`, `question_only`, `plain_text` and
    `copying` (random tokens twice, which teaches to look back before there is anything to say). Pre-LIFT takes one of a
    document's `segments`, the same `contextualised`, a `timeline`, and `question_only`.

    reading: how documents are cut into segments, within `limits.conversation_tokens`; wording: what is said for them.

    composed_documents: how many documents `composed` reads as one, at least and at most. They are the most alike (in words) of so
    many `composed_candidates`: what is hard to keep apart is learned from; 1 takes them as they come. composed_tokens: of all
    together; fewer documents are joined where they are longer, and what alone is longer is cut. composed_window_tokens: the
    longest window, drawn for each anew, so that no one length is learned.
    """

    corpus: tuple[str, ...]
    seed: int = 0
    shuffle_documents: Annotated[int, Field(ge=1)] = 4096
    max_questions: Annotated[int, Field(ge=1)] = 8
    pack_tokens: Annotated[int, Field(ge=0)] = 0
    copying_tokens: tuple[int, int] = (4, 24)
    limits: Limits = Limits()
    instructions: Instructions = Instructions()
    pretraining: Pretraining = Pretraining()
    reading: Reading = Reading()
    wording: Wording = Wording()
    composed_documents: tuple[int, int] = (1, 8)
    composed_candidates: Annotated[int, Field(ge=1)] = 16
    composed_tokens: Annotated[int, Field(ge=1)] = 8192
    composed_window_tokens: tuple[int, int] = (512, 1024)

    @model_validator(mode="after")
    def _ranges(self) -> "Feed":
        for name in ("copying_tokens", "composed_documents", "composed_window_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} is {least}, {most}: give two rising numbers, the first at least 1")
        return self


class Position(NamedTuple):
    """The next example to use: number `offset` of window `window` of a stage's plan."""

    window: int = 0
    offset: int = 0


class RowGroup(NamedTuple):
    path: str
    number: int
    documents: int


def row_groups(corpus: Sequence[str]) -> list[RowGroup]:
    """All row groups of the corpus in name order; reads footers only. Raises `ValueError` where there are none."""
    found = []
    for url in corpus:
        fs, path = fsspec.core.url_to_fs(url)
        files = sorted(fs.glob(f"{path.rstrip('/')}/**/*.parquet")) if fs.isdir(path) else fs.glob(path)
        for file in files:
            with fs.open(file) as stream:
                footer = pq.ParquetFile(stream)
                if "text" not in footer.schema_arrow.names:
                    raise ValueError(
                        f"{file} has no column 'text': training reads Parquet with text and, for questions, questions"
                    )
                sizes = [footer.metadata.row_group(i).num_rows for i in range(footer.num_row_groups)]
            found += [RowGroup(fs.unstrip_protocol(file), number, size) for number, size in enumerate(sizes) if size]
    if not found:
        raise ValueError(f"no Parquet rows under {', '.join(corpus)}: write a corpus first, for instance with `imprint world`")
    return found


def plan(groups: Sequence[RowGroup], feed: Feed, stage: str, documents: int) -> list[list[RowGroup]]:
    """Windows of row groups, epoch after epoch, until they hold `documents` documents."""
    windows: list[list[RowGroup]] = []
    planned, epoch = 0, 0
    while planned < documents:
        order = list(groups)
        _random(feed.seed, stage, "epoch", epoch).shuffle(order)
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
) -> ray.data.Dataset:
    """The stream of a stage from `start` on, in blocks of `block_rows` examples. tokenizer: a directory or a name."""
    items = [
        {"window": number, "skip": start.offset if number == start.window else 0, "groups": json.dumps(windows[number])}
        for number in range(start.window, len(windows))
    ]
    make = partial(_window_examples, feed=feed, stage=stage, tasks=tasks, tokenizer=tokenizer)
    stream: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    stream = stream.map_batches(make, batch_size=1, batch_format="numpy", zero_copy_batch=False)
    stream = stream.repartition(target_num_rows_per_block=block_rows)
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


def _window_examples(batch: dict[str, np.ndarray], feed: Feed, stage: str, tasks: dict[Task, float], tokenizer: str) -> pa.Table:
    tables = []
    for window, skip, groups in zip(batch["window"], batch["skip"], batch["groups"], strict=True):
        window_groups = [RowGroup(*group) for group in json.loads(groups)]
        examples = window_examples(window_groups, feed, stage, int(window), tasks, _tokenizer(tokenizer))[int(skip) :]
        columns = [[getattr(example, name) for example in examples] for name in FIELDS]
        offsets = range(int(skip), int(skip) + len(examples))
        tables.append(pa.table([*columns, [int(window)] * len(examples), list(offsets)], schema=COLUMNS))
    return pa.concat_tables(tables)


def window_examples(
    groups: Sequence[RowGroup], feed: Feed, stage: str, window: int, tasks: dict[Task, float], tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The examples of one window, in order: a function of its arguments alone. Those without a supervised target are left out."""
    documents = [row for group in groups for row in _read(group)]
    rng = _random(feed.seed, stage, "window", window)
    rng.shuffle(documents)
    names, shares = list(tasks), list(tasks.values())
    packed: list[dict[str, Any]] = []
    joined: list[dict[str, Any]] = []
    examples: list[Example] = []
    for row in documents:
        task = rng.choices(names, shares)[0]
        if task == "pretraining" and feed.pack_tokens:
            packed.append(row)
        elif task == "composed":
            joined.append(row)
        else:
            examples.append(_MAKERS[task](tokenizer, row, feed, rng))
    lengths = [len(encode(tokenizer, row["text"])) for row in packed]
    for group in packing(lengths, feed.pack_tokens):
        texts = [packed[place]["text"] for place in group]
        examples.append(pretraining_example(tokenizer, texts, rng, feed.limits, feed.instructions, feed.pretraining))
    for alike in _alike(joined, [len(encode(tokenizer, row["text"])) for row in joined], feed, rng):
        examples.append(_composed(tokenizer, alike, feed, rng))
    if packed or joined:
        rng.shuffle(examples)
    return [example for example in examples if example.tokens]


def _alike(
    rows: Sequence[dict[str, Any]], lengths: Sequence[int], feed: Feed, rng: random.Random
) -> Iterator[list[dict[str, Any]]]:
    """All rows in groups of `feed.composed_documents`, within `composed_tokens`; each next is of those that follow, the most like
    the first. lengths: of the rows, in tokens."""
    waiting = [(row, frozenset(row["text"].lower().split()), length) for row, length in zip(rows, lengths, strict=True)]
    while waiting:
        group = [waiting.pop(0)]
        words, room = group[0][1], feed.composed_tokens - group[0][2]
        for _ in range(rng.randint(*feed.composed_documents) - 1):
            near = [each for each in waiting[: feed.composed_candidates] if each[2] < room]
            if not near:
                break
            chosen = max(near, key=lambda each: len(words & each[1]) / max(len(words | each[1]), 1))
            waiting.remove(chosen)
            group.append(chosen)
            room -= chosen[2]
        rng.shuffle(group)
        yield [row for row, _, _ in group]


def _read(group: RowGroup) -> list[dict[str, Any]]:
    fs, path = fsspec.core.url_to_fs(group.path)
    with fs.open(path) as stream:
        file = pq.ParquetFile(stream)
        columns = [name for name in ("text", "questions") if name in file.schema_arrow.names]
        rows: list[dict[str, Any]] = file.read_row_group(group.number, columns=columns).to_pylist()
    return rows


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def _random(*key: object) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]))


def _questions(row: dict[str, Any], feed: Feed, rng: random.Random) -> list[QuestionAnswer]:
    asked = row.get("questions")
    if not asked:
        raise ValueError("this task asks questions and a document has none: give a corpus with questions, or other tasks")
    chosen = rng.sample(asked, min(len(asked), feed.max_questions))
    return [QuestionAnswer(item["question"], item["answer"]) for item in chosen]


def _pretraining(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    return pretraining_example(tokenizer, [row["text"]], rng, feed.limits, feed.instructions, feed.pretraining)


def _ask(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    return multi_turn_example(tokenizer, row["text"], _questions(row, feed, rng), feed.limits)


def _composed(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], feed: Feed, rng: random.Random) -> Example:
    asked = {"questions": [question for row in rows for question in row.get("questions") or ()]}
    text = "\n\n".join(row["text"] for row in rows)
    window_tokens = rng.randint(*feed.composed_window_tokens)
    limits = feed.limits.model_copy(update={"context_tokens": feed.composed_tokens})
    return composed_example(tokenizer, text, _questions(asked, feed, rng), window_tokens, limits)


def _in_context(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    return in_context_example(tokenizer, row["text"], _questions(row, feed, rng), feed.limits)


def _keywords(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    ids = encode(tokenizer, row["text"])[: feed.limits.context_tokens]
    labels = [IGNORED] * len(ids)
    for question, answer in _questions(row, feed, rng):
        words, dropped_share = question.rstrip(".?").split(), rng.random()
        kept = [word for word in words if rng.random() > dropped_share] or [rng.choice(words)]
        asked = encode(tokenizer, rng.choice((" ", "\n")) + " ".join(kept))
        answered = encode(tokenizer, f" {answer}")
        ids += [*asked, *answered]
        labels += [*[IGNORED] * len(asked), *answered]
    return Example((), tuple(ids), tuple(labels))


def _recitation(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    asked = QuestionAnswer(Ours(feed.instructions.reconstruct), row["text"])
    return in_context_example(tokenizer, row["text"], [asked], feed.limits)


def _question_only(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    turns = [Turn(*qa) for qa in _questions(row, feed, rng)]
    ids, labels = render(tokenizer, turns)
    return Example((), tuple(ids), tuple(labels))


def _plain_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    ids = tuple(encode(tokenizer, row["text"])[: feed.limits.context_tokens])
    return Example((), ids, ids)


def _copying(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    tokens = tuple(rng.choices(ordinary, k=rng.randint(*feed.copying_tokens)))
    separator = tokenizer.convert_tokens_to_ids(feed.instructions.separator)
    assert isinstance(separator, int)
    return Example((), (*tokens, separator, *tokens), (*[IGNORED] * (len(tokens) + 1), *tokens))


def _segment(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    ids, segment = _drawn_segment(tokenizer, row, feed, rng)
    return segment_example(ids, segment, feed.limits.conversation_tokens)


def _contextualised(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    ids, segment = _drawn_segment(tokenizer, row, feed, rng)
    limit = feed.limits.conversation_tokens
    pieces = draw_pieces(len(ids), segment, feed.reading.sizes(limit)[2], rng)
    return recital(tokenizer, ids, segment, pieces, feed.wording, limit)


def _drawn_segment(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random
) -> tuple[list[int], Window]:
    ids = encode(tokenizer, row["text"])
    size, stride, _ = feed.reading.sizes(feed.limits.conversation_tokens)
    return ids, rng.choice(segments(len(ids), size, stride, feed.reading.rule) or [Window(0, 0)])


def _timeline(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], feed: Feed, rng: random.Random) -> Example:
    ordered = [row["text"][start:end] for start, end in sentences(row["text"])]
    return timeline_example(tokenizer, ordered, TIMELINE_SENTENCES, feed.wording, feed.limits.conversation_tokens, rng)


_MAKERS: dict[str, Callable[[PreTrainedTokenizerBase, dict[str, Any], Feed, random.Random], Example]] = {
    "pretraining": _pretraining,
    "questions": _ask,
    "copying": _copying,
    "segments": _segment,
    "contextualised": _contextualised,
    "timeline": _timeline,
    "in_context": _in_context,
    "keywords": _keywords,
    "recitation": _recitation,
    "question_only": _question_only,
    "plain_text": _plain_text,
}

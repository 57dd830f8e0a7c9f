"""A window of the corpus -> its examples, in an order that follows from the window's number alone.

In: row groups of Parquet files with a `text` column and, for tasks that ask, a `questions` column (list of {question, answer}).
Out: examples, and the rows that gave none, each with its reason: one bad row stops nothing. Knows nothing of Ray, of epochs and
of other windows. Cost: a window's rows in memory, and the tokenisation of each.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from core.text.prompts import encode
from core.training.examples import Example
from core.training.pretraining import Packer, Passage
from pipelines.training.tasks import Feed, Row, Task, composed, example_of_task, row_of


class RowGroup(NamedTuple):
    """Of a Parquet file; `first_row` counts from the file's begin."""

    path: str
    number: int
    documents: int
    first_row: int = 0


class Skipped(NamedTuple):
    """A row that gave no example: its file, its number there, counted from 0, and why."""

    path: str
    row: int
    reason: str


class WindowExamples(NamedTuple):
    """What a window gave."""

    examples: list[Example]
    skipped: list[Skipped]


class _Place(NamedTuple):
    path: str
    row: int

    def skipped(self, error: ValueError) -> Skipped:
        return Skipped(self.path, self.row, str(error))


NO_TARGET = ValueError("nothing of it is left to be trained on within the limits")


def seeded(*key: object) -> random.Random:
    """A generator of its own for everything that is drawn under a name."""
    return random.Random(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]))


def window_examples(
    groups: Sequence[RowGroup], feed: Feed, stage: str, window: int, tasks: dict[Task, float], tokenizer: PreTrainedTokenizerBase
) -> WindowExamples:
    """The examples of one window, in order: a function of its arguments alone. Each has a supervised target."""
    documents = [each for group in groups for each in _read(group)]
    rng = seeded(feed.seed, stage, "window", window)
    rng.shuffle(documents)
    names, shares = list(tasks), list(tasks.values())
    packer = Packer(tokenizer, feed.pack_tokens, feed.limits, feed.instructions, feed.pretraining)
    packed: list[Passage] = []
    joined: list[tuple[_Place, Row]] = []
    examples: list[Example] = []
    skipped: list[Skipped] = []
    for place, values in documents:
        task = rng.choices(names, shares)[0]
        try:
            row = row_of(_readable(values), task)
            if task == "pretraining":
                passages = packer.passages(row.text)
                if feed.pack_tokens:
                    packed += passages
                else:
                    examples += packer.examples(passages, rng)
            elif task == "composed":
                joined.append((place, row))
            else:
                examples.append(_trainable(example_of_task(task, tokenizer, row, feed, rng)))
        except ValueError as error:
            skipped.append(place.skipped(error))
    if packed:
        examples += packer.examples(packed, rng)
    for alike in _alike(joined, [len(encode(tokenizer, row.text)) for _, row in joined], feed, rng):
        try:
            if not any(row.questions for _, row in alike):
                raise ValueError("neither it nor what it is composed with has questions")
            examples.append(_trainable(composed(tokenizer, [row for _, row in alike], feed, rng)))
        except ValueError as error:
            skipped += [place.skipped(error) for place, _ in alike]
    if packed or joined:
        rng.shuffle(examples)
    return WindowExamples(examples, skipped)


def _trainable(example: Example) -> Example:
    if not example.tokens:
        raise NO_TARGET
    return example


def _readable(values: dict[str, Any] | ValueError) -> dict[str, Any]:
    if isinstance(values, ValueError):
        raise values
    return values


def _alike(
    rows: Sequence[tuple[_Place, Row]], lengths: Sequence[int], feed: Feed, rng: random.Random
) -> Iterator[list[tuple[_Place, Row]]]:
    """All rows in groups of `feed.composed_documents`, within `composed_tokens`; each next is of those that follow, the most like
    the first. lengths: of the rows, in tokens."""
    waiting = [(each, frozenset(each[1].text.lower().split()), length) for each, length in zip(rows, lengths, strict=True)]
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
        yield [each for each, _, _ in group]


def _read(group: RowGroup) -> list[tuple[_Place, dict[str, Any] | ValueError]]:
    """Its rows; the reason in each row's place where the group is damaged. What storage itself says (`OSError`) is raised."""
    fs, path = fsspec.core.url_to_fs(group.path)
    rows: Sequence[dict[str, Any] | ValueError]
    with fs.open(path) as stream:
        try:
            file = pq.ParquetFile(stream)
            columns = [name for name in ("text", "questions") if name in file.schema_arrow.names]
            rows = file.read_row_group(group.number, columns=columns).to_pylist()
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            reason = f"row group {group.number} of its file cannot be read: {error}"
            rows = [ValueError(reason)] * group.documents
    return [(_Place(group.path, group.first_row + number), row) for number, row in enumerate(rows)]

"""What of a corpus becomes examples: the feed's section of a recipe, and each task, a document in and an example out.

In: a document's text and questions, a tokenizer, an explicit `random.Random`. Out: an `Example`. Tasks raise `ValueError` where a
document is no use to them. Knows nothing of files, windows and workers.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

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
    QuestionAnswer,
    composed_example,
    in_context_example,
    multi_turn_example,
)
from core.training.pretraining import Pretraining

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
CONTEXT_TASKS: frozenset[Task] = frozenset({"pretraining", "questions", "composed"})
"""Their examples have a context, which a hypernetwork reads; those of the others are a conversation alone."""
ASKING_TASKS: frozenset[Task] = frozenset({"questions", "in_context", "keywords", "question_only"})
"""A document without questions is no use to them."""
TIMELINE_SENTENCES = Curriculum().timeline_sentences
"""As many as LIFT's own timelines have."""


class Feed(Section):
    """What of a corpus becomes examples.

    corpus: files or folders of Parquet, any fsspec URL. tasks of a stage: `pretraining` (SHINE's reconstruction and
    completion, texts packed into groups of `pack_tokens`, 0 for one text a group; a text longer than a group becomes several),
    `questions` (all questions of a document, at most `max_questions`, as one conversation) and `composed` (the same of several
    documents that are read as one, in windows whose adapters are composed) train a hypernetwork; the others a base: `in_context`
    (document shown, then questions), `keywords` (plain text, then what is left of each question when words are dropped, and its
    answer: teaches to look things up outside the chat template and from a word alone, as memory tokens must), `recitation`,
    `question_only`, `plain_text` and `copying` (random tokens twice, which teaches to look back before there is anything to say).
    Pre-LIFT takes one of a document's `segments`, the same `contextualised`, a `timeline`, and `question_only`.

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
        room = min(self.limits.context_tokens, self.limits.conversation_tokens)
        if self.pack_tokens > room:
            raise ValueError(f"pack_tokens is {self.pack_tokens} and limits hold {room}: raise the limits, or pack less")
        return self


class Row(NamedTuple):
    """A document to train on."""

    text: str
    questions: tuple[QuestionAnswer, ...] = ()


def row_of(values: Mapping[str, Any], task: Task) -> Row:
    """The document in a row of a corpus. Raises `ValueError` for a row without text, or without questions where the task asks."""
    text = values["text"]
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str) or not text.strip():
        raise ValueError("it has no text")
    if task in CONTEXT_TASKS | ASKING_TASKS and task != "pretraining":
        asked = values.get("questions") or []
        if not isinstance(asked, list):
            raise ValueError("its questions are no list")
        questions = tuple(_question(number, each) for number, each in enumerate(asked))
        if task in ASKING_TASKS and not questions:
            raise ValueError("it has no questions, and the task asks some")
        return Row(text, questions)
    return Row(text)


def _question(number: int, asked: Any) -> QuestionAnswer:
    question, answer = (asked.get(name) if isinstance(asked, dict) else None for name in QuestionAnswer._fields)
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip()):
        raise ValueError(f"its question {number} is no pair of a question and an answer")
    return QuestionAnswer(question, answer)


def example_of_task(task: Task, tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    """An example of any task but `pretraining` and `composed`, which may take several documents."""
    return _MAKERS[task](tokenizer, row, feed, rng)


def composed(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], feed: Feed, rng: random.Random) -> Example:
    """Questions on several documents that are read as one."""
    asked = Row("\n\n".join(row.text for row in rows), tuple(question for row in rows for question in row.questions))
    window_tokens = rng.randint(*feed.composed_window_tokens)
    limits = feed.limits.model_copy(update={"context_tokens": feed.composed_tokens})
    return composed_example(tokenizer, asked.text, _questions(asked, feed, rng), window_tokens, limits)


def _questions(row: Row, feed: Feed, rng: random.Random) -> list[QuestionAnswer]:
    return rng.sample(row.questions, min(len(row.questions), feed.max_questions))


def _ask(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    return multi_turn_example(tokenizer, row.text, _questions(row, feed, rng), feed.limits)


def _in_context(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    return in_context_example(tokenizer, row.text, _questions(row, feed, rng), feed.limits)


def _keywords(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    ids = encode(tokenizer, row.text)[: feed.limits.context_tokens]
    labels = [IGNORED] * len(ids)
    for question, answer in _questions(row, feed, rng):
        words, dropped_share = question.rstrip(".?").split() or [question], rng.random()
        kept = [word for word in words if rng.random() > dropped_share] or [rng.choice(words)]
        asked = encode(tokenizer, rng.choice((" ", "\n")) + " ".join(kept))
        answered = encode(tokenizer, f" {answer}")
        ids += [*asked, *answered]
        labels += [*[IGNORED] * len(asked), *answered]
    return Example((), tuple(ids), tuple(labels))


def _recitation(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    return in_context_example(tokenizer, row.text, [QuestionAnswer(Ours(feed.instructions.reconstruct), row.text)], feed.limits)


def _question_only(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    turns = [Turn(*qa) for qa in _questions(row, feed, rng)]
    ids, labels = render(tokenizer, turns)
    return Example((), tuple(ids), tuple(labels))


def _plain_text(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    ids = tuple(encode(tokenizer, row.text)[: feed.limits.context_tokens])
    return Example((), ids, ids)


def _copying(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    tokens = tuple(rng.choices(ordinary, k=rng.randint(*feed.copying_tokens)))
    separator = tokenizer.convert_tokens_to_ids(feed.instructions.separator)
    assert isinstance(separator, int)
    return Example((), (*tokens, separator, *tokens), (*[IGNORED] * (len(tokens) + 1), *tokens))


def _segment(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    ids, segment = _drawn_segment(tokenizer, row, feed, rng)
    return segment_example(ids, segment, feed.limits.conversation_tokens)


def _contextualised(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    ids, segment = _drawn_segment(tokenizer, row, feed, rng)
    limit = feed.limits.conversation_tokens
    pieces = draw_pieces(len(ids), segment, feed.reading.sizes(limit)[2], rng)
    return recital(tokenizer, ids, segment, pieces, feed.wording, limit)


def _drawn_segment(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> tuple[list[int], Window]:
    ids = encode(tokenizer, row.text)
    size, stride, _ = feed.reading.sizes(feed.limits.conversation_tokens)
    return ids, rng.choice(segments(len(ids), size, stride, feed.reading.rule) or [Window(0, 0)])


def _timeline(tokenizer: PreTrainedTokenizerBase, row: Row, feed: Feed, rng: random.Random) -> Example:
    ordered = [row.text[start:end] for start, end in sentences(row.text)]
    return timeline_example(tokenizer, ordered, TIMELINE_SENTENCES, feed.wording, feed.limits.conversation_tokens, rng)


_MAKERS: dict[str, Callable[[PreTrainedTokenizerBase, Row, Feed, random.Random], Example]] = {
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

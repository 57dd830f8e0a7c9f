"""Long documents with questions: many documents of the reference world as one, each question with the passage that answers it.

In: a number of documents, of parts, a seed. Out: `LongDocument`s, the common form of what LIFT is measured on (published
benchmarks come through `pipelines.evaluation.benchmark_readers`). Parts are level-1 documents whose names are all different, over
all long documents of a call, so that no question has two answers and no document tells about another. Knows nothing of tokens and
models. Costs 0.1 ms a part.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from core.text.documents import Document
from pipelines.world import documents as world
from pipelines.world.documents import Split, WorldDocument

DRAWS_IN_VAIN = 2000
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class LongQuestion:
    """A question and every answer that counts as right, the first of them the one that losses are taken on.

    passage: what a reader would need to see, "" where nobody knows. splits: the groups that it is reported in, beside all.
    chance: the best exact match without the document, where known.
    """

    question: str
    answers: tuple[str, ...]
    passage: str = ""
    splits: tuple[str, ...] = ()
    chance: float = 0.0


@dataclass(frozen=True, slots=True)
class LongDocument:
    """A text, usually longer than a base's window, and the questions on it."""

    id: str
    title: str
    text: str
    questions: tuple[LongQuestion, ...]


def long_documents(count: int, parts: int, seed: int = 0, split: Split = "test") -> list[LongDocument]:
    """`count` documents of `parts` level-1 documents each, about 100 tokens of the reference tokenizer a part.

    Raises `ValueError` where the split has not names enough for all parts to differ.
    """
    if count < 1 or parts < 1:
        raise ValueError(f"{count} documents of {parts} parts: give 1 or more of each")
    chosen = _without_clashes(seed, split)
    return [_joined(f"long-{split}-{seed}-{number:03d}", [next(chosen) for _ in range(parts)]) for number in range(count)]


def _without_clashes(seed: int, split: Split) -> Iterator[WorldDocument]:
    """The world's documents in order, without those that share a name with an earlier one."""
    taken: set[str] = set()
    index = in_vain = 0
    while True:
        part = world.document(seed, split, 1, index)
        names = names_in(part.text, split)
        index += 1
        if names & taken:
            in_vain += 1
            if in_vain == DRAWS_IN_VAIN:
                raise ValueError(f"the {split} split has no more names after {len(taken)}: ask for fewer documents or parts")
            continue
        taken |= names
        in_vain = 0
        yield part


def names_in(text: str, split: Split) -> set[str]:
    """The invented names of a split that stand in a text."""
    return set(_WORD.findall(text)) & _names(split)


@cache
def _names(split: Split) -> frozenset[str]:
    return frozenset("".join(name) for name in world.names_of(split))


def _joined(identity: str, parts: Sequence[WorldDocument]) -> LongDocument:
    questions = tuple(
        LongQuestion(
            question.question,
            question.answers,
            part.text,
            ("one_fact" if question.facts == 1 else "two_facts", question.phrasing),
            question.chance,
        )
        for part in parts
        for question in part.questions
    )
    return LongDocument(identity, "", "\n\n".join(part.text for part in parts), questions)


def as_document(document: LongDocument) -> Document:
    """The same text for question writers and adapter writers, in normal form."""
    return Document(tenant="evaluation", collection="evaluation", name=document.id, title=document.title, text=document.text)

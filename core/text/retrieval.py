"""The parts of a text that a question asks about, found by BM25 (bm25s): what retrieval-augmented answering shows.

In: a text, a question. Out: chunks of whole sentences, best first, or as many of the best as fit into a budget, in the text's
order. Words are compared in lower case, without English function words; nothing is learned and no model is asked. Cost: one
pass over the text to index it, microseconds a chunk and question.
"""

import re
from collections.abc import Callable
from typing import Annotated, NamedTuple

import bm25s
import numpy as np
from pydantic import Field, PositiveInt

from core.config import Section
from core.text.sentences import FUNCTION_WORDS, Span, sentences

_WORD = re.compile(r"\w+")


class RetrievalSettings(Section):
    """chunk_characters: a chunk ends with the sentence that reaches it. k1, b: of BM25 (Robertson and Zaragoza, 2009)."""

    chunk_characters: PositiveInt = 400
    k1: Annotated[float, Field(gt=0)] = 1.5
    b: Annotated[float, Field(ge=0, le=1)] = 0.75


class Hit(NamedTuple):
    """A chunk's place in the text's order, and its score; 0 where it shares no word with the question."""

    chunk: int
    score: float


def chunk_spans(text: str, characters: int) -> list[Span]:
    """Neighbouring sentences joined until `characters` are reached; their spans are disjoint and in order."""
    spans: list[Span] = []
    start: int | None = None
    for sentence in sentences(text):
        start = sentence.start if start is None else start
        if sentence.end - start >= characters:
            spans.append(Span(start, sentence.end))
            start = None
        end = sentence.end
    if start is not None:
        spans.append(Span(start, end))
    return spans


class Retriever:
    """Chunks of one text under a BM25 index. Raises `ValueError` for a text without a sentence."""

    def __init__(self, text: str, settings: RetrievalSettings | None = None) -> None:
        settings = settings or RetrievalSettings()
        self.chunks = [text[start:end] for start, end in chunk_spans(text, settings.chunk_characters)]
        if not self.chunks:
            raise ValueError("the text has no words: there is nothing to retrieve from")
        words = [_words(chunk) for chunk in self.chunks]
        self._known = {word for chunk in words for word in chunk}
        self._index = bm25s.BM25(k1=settings.k1, b=settings.b)
        if self._known:
            self._index.index(words, show_progress=False)

    def search(self, question: str, count: int | None = None) -> list[Hit]:
        """The best `count` chunks (all by default), best first; of equal ones the earlier first."""
        words = [word for word in _words(question) if word in self._known]
        scores = self._index.get_scores(words) if words else np.zeros(len(self.chunks))
        order = np.argsort(-scores, kind="stable")[:count]
        return [Hit(int(chunk), float(scores[chunk])) for chunk in order]

    def select(self, question: str, budget: int, length: Callable[[str], int]) -> str:
        """The best chunks that together have at most `budget` by `length`, in the text's order, a line each.

        The best one is always there, however long. Chunks that share no word with the question are left out.
        """
        hits = self.search(question)
        chosen = [hits[0].chunk]
        for hit in hits[1:]:
            if hit.score <= 0 or length(self._joined([*chosen, hit.chunk])) > budget:
                break
            chosen.append(hit.chunk)
        return self._joined(chosen)

    def _joined(self, chunks: list[int]) -> str:
        return "\n".join(self.chunks[chunk] for chunk in sorted(chunks))


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in FUNCTION_WORDS]

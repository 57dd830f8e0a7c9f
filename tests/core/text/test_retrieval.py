"""Retrieval by BM25: chunks of whole sentences, the right one first, budgets kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.text.retrieval import RetrievalSettings, Retriever, chunk_spans
from core.text.sentences import sentences
from pipelines.evaluation.long_documents import long_documents

TEXT = "Anna keeps bees in Porto. Boris paints boats. The mill of Gent burnt down in 1871. Clara sails to Malmo every June."
SETTINGS = RetrievalSettings(chunk_characters=15)


@given(st.integers(1, 400))
def test_chunks_hold_every_sentence_once(characters: int) -> None:
    spans = chunk_spans(TEXT, characters)
    inside = [[span for span in sentences(TEXT) if start <= span.start and span.end <= end] for start, end in spans]
    assert [span for part in inside for span in part] == sentences(TEXT)
    assert all(end - start >= characters for start, end in spans[:-1])


def test_the_chunk_that_answers_comes_first() -> None:
    retriever = Retriever(TEXT, SETTINGS)
    for question, chunk in (("When did the mill burn?", 2), ("Who sails to Malmo?", 3), ("bees?", 0)):
        best, *rest = retriever.search(question)
        assert best.chunk == chunk and best.score > 0
        assert all(best.score >= hit.score for hit in rest) and len(rest) == 3


def test_a_budget_takes_the_best_in_the_order_of_the_text() -> None:
    retriever = Retriever(TEXT, SETTINGS)
    asked = "Who sails to Malmo, and who keeps bees in Porto?"
    assert retriever.select(asked, 100, len) == "Anna keeps bees in Porto.\nClara sails to Malmo every June."
    assert len(retriever.select(asked, 40, len).splitlines()) == 1
    assert retriever.select(asked, 0, len), "the best one is there however long it is"


def test_a_question_without_a_known_word_gets_the_beginning() -> None:
    retriever = Retriever(TEXT, SETTINGS)
    assert retriever.select("Xyzzy?", 1000, len) == "Anna keeps bees in Porto."
    assert [hit.score for hit in retriever.search("is it?")] == [0.0] * 4
    assert Retriever("It is so. So it is.", SETTINGS).search("so?")


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to retrieve"):
        Retriever("...\n\n---")


def test_names_of_the_reference_world_find_their_passages() -> None:
    [document] = long_documents(1, 14)
    retriever = Retriever(document.text)
    single = [question for question in document.questions if "one_fact" in question.splits]
    found = [question.answers[0] in retriever.select(question.question, 1300, len) for question in single]
    assert len(found) > 40 and sum(found) / len(found) > 0.9

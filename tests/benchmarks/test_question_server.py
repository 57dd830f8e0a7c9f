"""The stand-in for a language model: reads statements, asks as in training, fails as told, and gives nothing away of the test."""

import random

from benchmarks.lift.question_server import Manners, facts, pairs, question_server, wordings
from core.questions.chat_endpoint import EndpointRun
from core.questions.endpoint import EndpointSettings
from core.questions.rules import sentence_passages
from pipelines.evaluation.lifting import write_questions
from pipelines.evaluation.long_documents import LongDocument, as_document, long_documents
from pipelines.world import documents as world
from pipelines.world import lexicon as world_lexicon


def _written(document: LongDocument, most: int) -> dict[str, str]:
    text = as_document(document).text
    return {
        pair["question"]: pair["answer"]
        for passage in sentence_passages(text, 2048)
        for pair in pairs(
            text[passage.context_start : passage.start], text[passage.start : passage.end], most, random.Random(passage.start)
        )
    }


def test_it_reads_every_fact_and_never_asks_as_the_test_does() -> None:
    for document in long_documents(2, 14):
        written = _written(document, 100)
        for question in document.questions:
            if "seen" in question.splits:
                assert written[question.question] == question.answers[0]
            else:
                assert question.question not in written


def test_its_wordings_are_those_of_the_training_split() -> None:
    phrases = {f"{kind.name}.{topic.name}": topic.phrases for kind in world_lexicon.KINDS for topic in kind.topics}
    asked = 0
    for index in range(200):
        document = world.document(0, "train", 1, index)
        for question in document.questions:
            grid = [wording.format(n=document.title) for wording in wordings(phrases[question.attribute])]
            assert question.question in grid
            asked += 1
    assert asked > 800


def test_a_sentence_that_states_nothing_brings_nothing() -> None:
    assert not facts("That much is certain.") and not facts("Notes on a place called Lorgado:")
    assert pairs("", "Nobody doubts it.", 10, random.Random(0)) == []


def test_a_fact_of_two_sentences_is_asked_with_the_later_one() -> None:
    relation, statement = "Past Lorgado flows the river Nanbudo.", "The river Nanbudo starts in the hills by Turin."
    for before, sentence in ((relation, statement), (statement, relation)):
        written = pairs(f"- {before}", sentence, 3, random.Random(0))
        assert len(written) == 3
        assert all(pair["answer"] == "Turin" and "Lorgado" in pair["question"] for pair in written)
        assert pairs("", sentence, 3, random.Random(0)) == []


def _settings(url: str, **run: object) -> EndpointSettings:
    return EndpointSettings(model="m", pairs=2, run=EndpointRun.model_validate({"url": url, "backoff_s": 0.01, **run}))


def test_it_answers_what_the_project_asks() -> None:
    documents = long_documents(2, 1)
    with question_server() as server:
        written = write_questions(documents, _settings(server.url))
        record = server.record()
    assert all(len(pairs) > 10 for pairs in written.pairs) and written.usage.pairs_dropped == 0
    assert not any(written.failures)
    assert record.asked_again == 0 and set(record.asked) == set(record.answered)


def test_its_faults_are_what_the_project_counts() -> None:
    documents = long_documents(2, 2)
    manners = Manners(bad_json=0.3, silent=0.1, hang_s=9.0)
    with question_server(manners) as server:
        written = write_questions(documents, _settings(server.url, retries=0, bad_reply_retries=0, timeout_s=3.0))
        record = server.record()
    lost = [failure for failures in written.failures for failure in failures]
    assert {failure.reason for failure in lost} == {"bad_reply", "timeout"}
    assert len(lost) == len(record.asked) - len(record.answered)

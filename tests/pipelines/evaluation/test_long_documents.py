"""Long documents of the reference world, and the readers of published benchmarks."""

import json
from pathlib import Path

import pytest

from core.text.prompts import encode
from pipelines.evaluation.benchmark_readers import READERS, read_longbench, read_loogle
from pipelines.evaluation.long_documents import as_document, long_documents, names_in
from pipelines.world.tokenizer import build_tokenizer


def test_parts_share_no_name_and_questions_know_their_passage() -> None:
    documents = long_documents(3, 14)
    assert documents == long_documents(3, 14) and documents != long_documents(3, 14, seed=1)
    seen: set[str] = set()
    for document in documents:
        passages = list(dict.fromkeys(question.passage for question in document.questions))
        assert "\n\n".join(passages) == document.text and len(passages) == 14
        for passage in passages:
            names = names_in(passage, "test")
            assert names and not names & seen
            seen |= names
        for question in document.questions:
            assert question.answers[0] in question.passage
            assert names_in(question.question, "test") <= names_in(question.passage, "test")
            assert len(question.splits) == 2 and 0 < question.chance < 0.05


def test_fourteen_parts_are_longer_than_the_reference_window() -> None:
    tokenizer = build_tokenizer()
    assert all(len(encode(tokenizer, document.text)) > 1024 for document in long_documents(5, 14))


def test_documents_are_in_normal_form() -> None:
    [document] = long_documents(1, 2)
    assert as_document(document).text == document.text and as_document(document).name == document.id


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="no more names"):
        long_documents(1, 600)
    with pytest.raises(ValueError, match="give 1 or more"):
        long_documents(0, 3)


def _lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def test_loogle_is_read_as_published(tmp_path: Path) -> None:
    pairs = "[{'Q': 'Who wrote it?', 'A': \"Anna's aunt\", 'S': ['Anna had an aunt.', 'She wrote.'], 'type': 'reasoning'}]"
    rows = [
        {"input": "Anna had an aunt. She wrote.", "title": "A  life", "qa_pairs": pairs, "output": "none"},
        {"input": "Text.", "title": "", "qa_pairs": [{"Q": "How many?", "A": 3, "S": "Text."}], "output": "none"},
    ]
    first, second = read_loogle(_lines(tmp_path / "shortdep_qa.jsonl", rows))
    [question] = first.questions
    assert (first.id, first.title) == ("shortdep_qa-1", "A life")
    assert question.answers == ("Anna's aunt",) and question.splits == ("reasoning",)
    assert question.passage == "Anna had an aunt.\nShe wrote."
    assert second.questions[0].answers == ("3",) and second.questions[0].splits == ()


def test_longbench_gathers_the_questions_on_a_text(tmp_path: Path) -> None:
    row = {"context": "A.", "input": "Who?", "answers": ["Anna", "A."], "length": 1, "dataset": "multifieldqa_en", "_id": "x"}
    rows = [{**row, "all_classes": None, "language": "en"}, {**row, "context": "B."}, {**row, "input": "When?"}]
    first, second = read_longbench(_lines(tmp_path / "multifieldqa_en.jsonl", rows))
    assert [question.question for question in first.questions] == ["Who?", "When?"] and second.text == "B."
    assert first.questions[0].answers == ("Anna", "A.") and first.questions[0].splits == ("multifieldqa_en",)
    assert first.questions[0].passage == ""


@pytest.mark.parametrize(
    ("reader", "line", "said"),
    [
        ("loogle", '{"title": "x"}', "line 1: input"),
        ("loogle", '{"input": "x", "qa_pairs": "__import__(\'os\').getcwd()"}', "line 1: qa_pairs cannot be read"),
        ("loogle", '{"input": "x", "qa_pairs": "[{\'Q\': \'a\'}]"}', "qa_pairs cannot be read"),
        ("loogle", '{"input": "x", "qa_pairs": "none"}', "qa_pairs cannot be read"),
        ("loogle", '{"input": "x", "qa_pairs": "[]"}', "holds no questions"),
        ("longbench", '{"input": "x", "context": "y", "answers": []}', "line 1: answers"),
        ("longbench", "{", "is not JSONL"),
    ],
)
def test_another_form_is_refused_by_line(tmp_path: Path, reader: str, line: str, said: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError) as error:
        READERS[reader](path)
    assert said in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read"):
        read_longbench(tmp_path / "none.jsonl")

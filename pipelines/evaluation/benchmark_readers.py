"""LooGLE and LongBench as they are published, read from their JSONL files into `LongDocument`s.

In: the path of a file that a person downloaded. Out: one document a text, with all its questions. Nothing is fetched, and nothing
in a file is evaluated as code. The whole file is held in memory; costs what parsing it costs.

    LooGLE (arXiv 2311.04939)     a text a line: `input`, `title`, and `qa_pairs`, a Python literal (or a JSON list) of
                                  `Q` question, `A` answer, `S` evidence sentences, in longdep_qa also `type`
    LongBench (arXiv 2308.14508)  a question a line: `context`, `input`, `answers`, `dataset`, `_id`; few-shot and summarisation
                                  tasks, whose `input` is no question on the context, are the caller's choice of file
"""

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from core.config import faults
from pipelines.evaluation.long_documents import LongDocument, LongQuestion

MOST_LITERAL_CHARACTERS = 2**22


class _LooGlePair(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True, coerce_numbers_to_str=True)

    question: str = Field(alias="Q", min_length=1)
    answer: str = Field(alias="A", min_length=1)
    evidence: list[str] | str = Field(alias="S", default="")
    type: str = ""


class _LooGleLine(BaseModel):
    model_config = ConfigDict(extra="ignore")

    input: str = Field(min_length=1)
    title: str = ""
    qa_pairs: Any


class _LongBenchLine(BaseModel):
    model_config = ConfigDict(extra="ignore")

    input: str = Field(min_length=1)
    context: str = Field(min_length=1)
    answers: list[str] = Field(min_length=1)
    dataset: str = ""


LineT = TypeVar("LineT", bound=BaseModel)
_PAIRS = TypeAdapter(list[_LooGlePair])


def read_loogle(path: Path) -> list[LongDocument]:
    """LooGLE's shortdep_qa or longdep_qa. Raises `ValueError` naming the line that is not of that form.

    A question's passage is its evidence, sentences a line each; its split the `type` that longdep_qa names.
    """
    documents = []
    for number, fields in _lines(path):
        line = _checked(_LooGleLine, fields, path, number)
        try:
            pairs = _PAIRS.validate_python(_literal(line.qa_pairs))
        except (ValidationError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
            what = "; ".join(faults(error)[:3]) if isinstance(error, ValidationError) else str(error)
            raise ValueError(
                f"{path}, line {number}: qa_pairs cannot be read ({what}): give LooGLE's question answering"
            ) from None
        questions = tuple(_loogle_question(pair) for pair in pairs)
        documents.append(LongDocument(f"{path.stem}-{number}", " ".join(line.title.split()), line.input, questions))
    return _not_empty(documents, path)


def _loogle_question(pair: _LooGlePair) -> LongQuestion:
    evidence = pair.evidence if isinstance(pair.evidence, str) else "\n".join(pair.evidence)
    return LongQuestion(pair.question, (pair.answer,), evidence, (pair.type,) if pair.type else ())


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if len(value) > MOST_LITERAL_CHARACTERS:
        raise ValueError(f"it has {len(value)} characters, {MOST_LITERAL_CHARACTERS} are read")
    return ast.literal_eval(value.strip())


def read_longbench(path: Path) -> list[LongDocument]:
    """A question answering task of LongBench; questions on one text come together. Raises `ValueError` as `read_loogle` does.

    The files name no evidence, so questions have no passage; their split is the dataset's name.
    """
    questions: dict[str, list[LongQuestion]] = {}
    for number, fields in _lines(path):
        line = _checked(_LongBenchLine, fields, path, number)
        asked = LongQuestion(line.input, tuple(line.answers), splits=(line.dataset,) if line.dataset else ())
        questions.setdefault(line.context, []).append(asked)
    documents = [
        LongDocument(f"{path.stem}-{number}", "", text, tuple(asked)) for number, (text, asked) in enumerate(questions.items(), 1)
    ]
    return _not_empty(documents, path)


READERS = {"loogle": read_loogle, "longbench": read_longbench}


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number, object) of each line that is not blank, from 1."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: give the published JSONL file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSONL ({error}): give the published file") from None


def _checked(schema: type[LineT], fields: Any, path: Path, number: int) -> LineT:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{path}, line {number}: " + "; ".join(faults(error)[:3])) from None


def _not_empty(documents: list[LongDocument], path: Path) -> list[LongDocument]:
    if not any(document.questions for document in documents):
        raise ValueError(f"{path} holds no questions")
    return documents

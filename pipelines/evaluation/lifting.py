"""Adapters for long documents, made in this process: lifted from questions, followed while they train, or written by SHINE.

In: a base, `LongDocument`s, questions from rules or an endpoint. Out: one adapter for each document, in their order; a document
that fails fails the call, because a comparison without it would not be one. What evaluation and benchmarks share; conversion
(`pipelines.conversion.convert`) does the same for whole corpora. Knows nothing of scores.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, composed
from core.adapters.weights import AdapterWeights
from core.lift.course import FixedQuestions
from core.lift.settings import LiftRun, LiftSettings
from core.lift.trainer import Job, Lift, train
from core.questions.endpoint import EndpointSettings, QuestionUsage
from core.questions.rules import RuleSettings, write_by_rules
from core.questions.stream import Failure, QuestionWriter
from core.shine.hypernetwork import Hypernetwork
from core.shine.writer import HypernetworkWriter
from core.training.examples import QuestionAnswer, question_answers
from core.writing.writer import Rejected, WindowRule
from pipelines.evaluation.long_documents import LongDocument, as_document


class WrittenQuestions(NamedTuple):
    """Pairs of each document; the passages that brought none; what was asked; seconds."""

    pairs: list[list[QuestionAnswer]]
    failures: list[list[Failure]]
    usage: QuestionUsage
    seconds: float


def write_questions(
    documents: Sequence[LongDocument], settings: EndpointSettings, cache_path: Path | str = ":memory:"
) -> WrittenQuestions:
    """Asks an endpoint about all documents and waits for the last reply. Raises as `QuestionWriter` does."""
    started = time.monotonic()
    with QuestionWriter(settings, cache_path) as writer:
        streams = [writer.write(as_document(document)) for document in documents]
        pairs = [question_answers(stream.result()) for stream in streams]
        return WrittenQuestions(pairs, [stream.failures for stream in streams], writer.usage, time.monotonic() - started)


def rule_questions(documents: Sequence[LongDocument], settings: RuleSettings | None = None) -> list[list[QuestionAnswer]]:
    """What the rules ask about each document."""
    return [question_answers(write_by_rules(as_document(document), settings)) for document in documents]


class Lifted(NamedTuple):
    """One adapter for each document, in their order; optimiser steps and tokens of each; seconds of all."""

    adapters: list[AdapterWeights]
    steps: list[int]
    tokens: list[int]
    seconds: float


def jobs_of(
    documents: Sequence[LongDocument],
    questions: Sequence[Sequence[QuestionAnswer]] | None = None,
    starts: Sequence[AdapterWeights] | None = None,
) -> list[Job]:
    """A job for each document, with its questions and the adapters that it starts from."""
    return [
        Job(
            document.id,
            document.text,
            document.title,
            FixedQuestions(tuple(questions[number]) if questions else ()),
            starts[number] if starts else None,
        )
        for number, document in enumerate(documents)
    ]


def lifted(base: BaseModel, jobs: Sequence[Job], settings: LiftSettings, run: LiftRun | None = None) -> Lifted:
    """Lifts all; raises `ValueError` where one fails."""
    started = time.monotonic()
    results = {result.key: result for result in train(base, jobs, settings, run)}
    parts = [results[job.key] for job in jobs]
    adapters = []
    for result in parts:
        if result.weights is None:
            raise ValueError(f"document {result.key!r} could not be lifted: {result.fault}")
        adapters.append(result.weights)
    return Lifted(adapters, [part.steps for part in parts], [part.tokens for part in parts], time.monotonic() - started)


def snapshots(
    base: BaseModel, jobs: Sequence[Job], settings: LiftSettings, at_steps: Sequence[int], run: LiftRun | None = None
) -> Iterator[tuple[int, list[AdapterWeights]]]:
    """(step, adapters) after each of `at_steps` optimiser steps that is reached, 0 for the start; the last one at the end.

    All documents step together; one that is done keeps its adapter. Raises `ValueError` where a document fails.
    """
    lift = Lift(base, settings, (run or LiftRun()).model_copy(update={"slots": len(jobs)}))
    wanted, order, done, step = set(at_steps), [job.key for job in jobs], dict[str, AdapterWeights](), 0

    def now() -> list[AdapterWeights]:
        rows = done | {state.key: lift.form.stored(state.flat_N[None].clone()) for state in lift.states()}
        return [rows[key] for key in order]

    for job in jobs:
        if (failed := lift.submit(job)) is not None:
            raise ValueError(f"document {failed.key!r} could not be lifted: {failed.fault}")
    while not lift.idle:
        if step in wanted:
            yield step, now()
        for result in lift.step():
            if result.weights is None:
                raise ValueError(f"document {result.key!r} could not be lifted: {result.fault}")
            done[result.key] = result.weights
        step += 1
    yield step, now()


def shine_adapters(
    hypernetwork: Hypernetwork, documents: Sequence[LongDocument], window_tokens: int | None = None, rank: int | None = None
) -> list[AdapterWeights]:
    """What the hypernetwork writes for each document in windows, composed to one adapter of `rank` at most; None is its own rank.

    Raises `ValueError` where it writes none.
    """
    rule = WindowRule(max_tokens=window_tokens, long_documents="windows", max_windows=2**16)
    writer = HypernetworkWriter(hypernetwork, "fp32", rule)
    outcomes = writer.write([as_document(document) for document in documents])
    adapters: list[AdapterWeights] = []
    for document, outcome in zip(documents, outcomes, strict=True):
        if isinstance(outcome, Rejected):
            raise ValueError(f"document {document.id!r} has no adapter: {outcome.reason}")
        windows = outcome.weights()
        assert isinstance(windows, LoraWeights), "a hypernetwork writes no other kind"
        whole, _ = composed(windows, writer.composition, rank or hypernetwork.spec.rank)
        adapters.append(whole.to(hypernetwork.base.device))
    return adapters

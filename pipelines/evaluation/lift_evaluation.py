"""LIFT and what it is measured against, in one table: the same questions, base and engine; what is shown and attached differs.

In: a base, `LongDocument`s, adapters by name, one for each document (`pipelines.evaluation.lifting` makes them). Out: a
`LiftReport` (`pipelines.evaluation.lift_report` writes it down). `METHODS` says which adapter each method attaches and what it
shows:

    nothing     the question alone
    truncated   the document above the question, head and tail of the prompt kept (LIFT v3's in-context baseline)
    passage     the passage that is needed, where the question names it: the oracle
    retrieved   what BM25 finds in the stored text (core.text.retrieval)

Prompts are those of training (`prompts.render`), answers greedy and the engine's. A document counts as one observation: scores
are means over documents of means over their questions, intervals bootstrap over documents. Beside the answers: the NLL of the
document's text under each adapter, and how well the base still reads another document's passage under it. Costs an answer and a
pass a question and method; prompts in context cost the base's whole window.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveInt

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.gated_memory import GatedMemory, gate_means, recording_gates
from core.adapters.lora import stack
from core.adapters.weights import AdapterWeights
from core.config import Section, digest, fingerprint
from core.lift.full_finetuning import full_finetune
from core.lift.settings import LiftSettings
from core.lift.trainer import Job
from core.text.documents import windows
from core.text.prompts import IGNORED, Turn, encode, head_tail, in_context, render
from core.text.retrieval import RetrievalSettings, Retriever
from core.training.examples import Example
from core.training.metrics import Interval, mean_interval
from pipelines.evaluation.asking import SPARE_TOKENS, Asker, Result, Throughput, evaluating
from pipelines.evaluation.judge import Claim
from pipelines.evaluation.long_documents import LongDocument

Shown = Literal["nothing", "truncated", "passage", "retrieved"]
Judge = Callable[[Sequence[Claim]], Sequence[bool | None]]
ELLIPSIS = "..."
RESAMPLES = 2000


class Method(NamedTuple):
    """What is shown above the question, and whose adapters are attached ("" for none)."""

    shown: Shown
    adapters: str = ""


METHODS: Mapping[str, Method] = {
    "question_only": Method("nothing"),
    "in_context": Method("truncated"),
    "oracle": Method("passage"),
    "rag": Method("retrieved"),
    "shine": Method("nothing", "shine"),
    "finetune_raw": Method("nothing", "finetune_raw"),
    "lift": Method("nothing", "lift"),
    "lift_in_context": Method("truncated", "lift"),
    "lift_rules": Method("nothing", "lift_rules"),
    "lift_from_shine": Method("nothing", "lift_from_shine"),
    "gated_memory": Method("nothing", "gated_memory"),
    "gated_memory_in_context": Method("truncated", "gated_memory"),
}


class LiftEvaluationSettings(Section):
    """seed: of the bootstrap. retrieved_tokens: what RAG may show. answer_tokens: most of an answer; None is the longest gold one
    and two more.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    retrieval: RetrievalSettings = RetrievalSettings()
    retrieved_tokens: PositiveInt = 384
    answer_tokens: PositiveInt | None = None
    run: Throughput = Throughput()


@dataclass(frozen=True)
class MethodScore:
    """Scores over documents; loss in nats per supervised token; judged only by a judge, over the answers that got a verdict."""

    exact_match: Interval
    f1: Interval
    loss: float
    judged: Interval | None = None
    unjudged: int = 0


@dataclass(frozen=True)
class LiftReport:
    """scores: by method, then by split ("all" first). by_document: exact match of each document, by method.

    nll: nats a token of the documents' own text, by adapters, "" the bare base. reading: exact match on another document's
    questions with the passage shown, by adapters, "" the bare base. answers: one record a question.
    """

    questions: Mapping[str, int]
    scores: Mapping[str, Mapping[str, MethodScore]]
    by_document: Mapping[str, Sequence[float]]
    nll: Mapping[str, Interval]
    reading: Mapping[str, Interval]
    timings: Mapping[str, float]
    identity: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]] = field(repr=False, default=())


class Sheet:
    """The questions of some documents as prompts and as examples to take losses on, for each thing that can be shown.

    Raises `ValueError` for documents without questions, and for questions that do not fit the base with their answer.
    """

    def __init__(self, base: BaseModel, documents: Sequence[LongDocument], settings: LiftEvaluationSettings) -> None:
        self.documents, self._settings, self._max_length = documents, settings, base.max_length
        self.asked = [question for document in documents for question in document.questions]
        self.document_of = [number for number, document in enumerate(documents) for _ in document.questions]
        if empty := [document.id for document in documents if not document.questions]:
            raise ValueError(f"document {empty[0]!r} has no questions: leave it out")
        self._tokenizer = tokenizer_of(base)
        self._ellipsis = encode(self._tokenizer, ELLIPSIS)
        golds = [len(self._split(question.question, question.answers[0])[1]) for question in self.asked]
        self.answer_tokens = settings.answer_tokens or max(golds) + SPARE_TOKENS
        self._room = base.max_length - max(self.answer_tokens, *golds)
        if self._room < 2 * len(self._ellipsis) + 2:
            raise ValueError(f"answers of {max(golds)} tokens leave no room in the base's {base.max_length}: leave them out")
        self._kept: dict[Shown, tuple[list[list[int]], list[Example]]] = {}

    @property
    def golds(self) -> list[tuple[str, ...]]:
        return [question.answers for question in self.asked]

    @property
    def has_passages(self) -> bool:
        return all(question.passage for question in self.asked)

    def shown(self, kind: Shown) -> tuple[list[list[int]], list[Example]]:
        """(prompts, examples) by question; made once."""
        if kind not in self._kept:
            rows = [self._row(content, number) for number, content in enumerate(self._contents(kind))]
            self._kept[kind] = [prompt for prompt, _ in rows], [example for _, example in rows]
        return self._kept[kind]

    def _row(self, content: str, number: int) -> tuple[list[int], Example]:
        asked_ids, answer_ids = self._split(content, self.asked[number].answers[0])
        prompt = head_tail(asked_ids, self._room, self._ellipsis)
        return prompt, Example((), (*prompt, *answer_ids), (*[IGNORED] * len(prompt), *answer_ids))

    def _split(self, content: str, answer: str) -> tuple[list[int], list[int]]:
        ids, labels = render(self._tokenizer, [Turn(content, answer)])
        supervised = sum(label != IGNORED for label in labels)
        return ids[: len(ids) - supervised], ids[len(ids) - supervised :]

    def _contents(self, kind: Shown) -> Iterator[str]:
        retrievers: dict[int, Retriever] = {}
        for number, question in enumerate(self.asked):
            text = ""
            if kind == "truncated":
                text = self.documents[self.document_of[number]].text
            elif kind == "passage":
                text = question.passage
            elif kind == "retrieved":
                place = self.document_of[number]
                if place not in retrievers:
                    retrievers[place] = Retriever(self.documents[place].text, self._settings.retrieval)
                budget = self._settings.retrieved_tokens
                text = retrievers[place].select(question.question, budget, lambda part: len(encode(self._tokenizer, part)))
            yield in_context(text, question.question) if text else question.question


def evaluate_lift(
    base: BaseModel,
    documents: Sequence[LongDocument],
    adapters: Mapping[str, Sequence[AdapterWeights]],
    settings: LiftEvaluationSettings | None = None,
    judge: Judge | None = None,
    full: LiftSettings | None = None,
) -> LiftReport:
    """Every method of `METHODS` that these adapters and questions allow.

    adapters: by the names that `METHODS` knows, one for each document. full: adds `full_finetune`, the base's own weights trained
    on each document's text by these settings. Raises `ValueError` for an unknown name or a wrong number of adapters.
    """
    settings, started = settings or LiftEvaluationSettings(), time.monotonic()
    _check(documents, adapters)
    sheet, asker = Sheet(base, documents, settings), Asker(base, settings.run)
    stacked = {name: stack(list(parts)).to(base.device) for name, parts in adapters.items()}
    methods = {name: method for name, method in METHODS.items() if not method.adapters or method.adapters in stacked}
    if not sheet.has_passages:
        methods = {name: method for name, method in methods.items() if method.shown != "passage"}
    results: dict[str, Result] = {}
    nll: dict[str, list[float]] = {}
    reading: dict[str, Interval] = {}
    with evaluating(base.model):
        for name, method in methods.items():
            weights = stacked.get(method.adapters)
            results[name] = _asked(asker, sheet, method.shown, weights, sheet.document_of)
        for name in ("", *stacked):
            nll[name] = document_nll(asker, documents, stacked.get(name))
        if "oracle" in results and len(documents) > 1:
            elsewhere = [(number + 1) % len(documents) for number in sheet.document_of]
            for name in ("", *stacked):
                result = results["oracle"] if not name else _asked(asker, sheet, "passage", stacked[name], elsewhere)
                reading[name] = _interval(by_document(sheet, result.exact_match), settings.seed)
    if full is not None:
        results["full_finetune"], nll["full_finetune"] = _fully(asker, sheet, full)
    judged = {name: _judged(judge, sheet, result) for name, result in results.items()}
    return LiftReport(
        questions={split: int(mask.sum()) for split, mask in _masks(sheet).items()},
        scores={name: _scores(sheet, result, judged[name], settings.seed) for name, result in results.items()},
        by_document={name: by_document(sheet, result.exact_match) for name, result in results.items()},
        nll={name: _interval(values, settings.seed, at_most=math.inf) for name, values in nll.items()},
        reading=reading,
        timings={f"{name}_questions_per_s": len(sheet.asked) / result.seconds for name, result in results.items()}
        | {"total_s": time.monotonic() - started},
        identity={
            "base": base.fingerprint,
            "documents": digest([[document.id, document.title, document.text] for document in documents]),
            "document_tokens": [len(encode(asker.tokenizer, document.text)) for document in documents],
            "window_tokens": base.max_length,
            "settings": settings.model_dump(mode="json"),
            "settings_fingerprint": fingerprint(settings),
        },
        answers=_records(sheet, results),
    )


def _check(documents: Sequence[LongDocument], adapters: Mapping[str, Sequence[AdapterWeights]]) -> None:
    if not documents:
        raise ValueError("there are no documents: give one at least")
    known = {method.adapters for method in METHODS.values()} - {""}
    for name, parts in adapters.items():
        if name not in known:
            raise ValueError(f"no method attaches adapters called {name!r}: choose from {', '.join(sorted(known))}")
        if len(parts) != len(documents) or any(len(part) != 1 for part in parts):
            raise ValueError(
                f"{name}: {[len(part) for part in parts]} adapters for {len(documents)} documents: give one for each"
            )


def _asked(asker: Asker, sheet: Sheet, shown: Shown, weights: AdapterWeights | None, index: Sequence[int]) -> Result:
    prompts, examples = sheet.shown(shown)
    return asker.score(prompts, examples, sheet.golds, sheet.answer_tokens, weights, None if weights is None else index)


def _fully(asker: Asker, sheet: Sheet, settings: LiftSettings) -> tuple[Result, list[float]]:
    """Full fine-tuning on each document's text, one after another: its answers, and the NLL of the text."""
    prompts, examples = sheet.shown("nothing")
    results, nll = [], []
    for number, document in enumerate(sheet.documents):
        rows = [row for row, place in enumerate(sheet.document_of) if place == number]
        with full_finetune(asker.base, Job(document.id, document.text, document.title), settings), evaluating(asker.base.model):
            asked = [prompts[row] for row in rows], [examples[row] for row in rows], [sheet.golds[row] for row in rows]
            results.append(asker.score(*asked, sheet.answer_tokens))
            nll += document_nll(asker, [document], None)
    return Result.joined(results), nll


def document_nll(asker: Asker, documents: Sequence[LongDocument], weights: AdapterWeights | None) -> list[float]:
    """Nats a token of each document's text under its adapter, read in windows of the base's length without overlap."""
    examples: list[Example] = []
    index: list[int] = []
    for number, document in enumerate(documents):
        ids = tuple(encode(asker.tokenizer, document.text))
        for start, end in windows(len(ids), asker.base.max_length):
            examples.append(Example((), ids[start:end], ids[start:end]))
            index.append(number)
    losses = asker.losses(examples, weights, None if weights is None else index)
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents))
    np.add.at(nats, index, losses)
    np.add.at(tokens, index, [example.tokens for example in examples])
    return [float(value) for value in nats / np.maximum(tokens, 1)]


def by_document(sheet: Sheet, values: np.ndarray, mask: np.ndarray | None = None) -> list[float]:
    """The mean over each document's questions, of those that the mask names; documents without any are left out."""
    document_of = np.array(sheet.document_of)
    mask = np.ones(len(document_of), dtype=bool) if mask is None else mask
    means = [values[mask & (document_of == number)] for number in range(len(sheet.documents))]
    return [float(part.mean()) for part in means if len(part)]


def _masks(sheet: Sheet) -> dict[str, np.ndarray]:
    names = sorted({split for question in sheet.asked for split in question.splits})
    masks = {name: np.array([name in question.splits for question in sheet.asked]) for name in names}
    return {"all": np.ones(len(sheet.asked), dtype=bool), **masks}


def _scores(sheet: Sheet, result: Result, judged: np.ndarray | None, seed: int) -> dict[str, MethodScore]:
    scores = {}
    for split, mask in _masks(sheet).items():
        verdict, unjudged = None, 0
        if judged is not None:
            known = ~np.isnan(judged)
            unjudged = int((mask & ~known).sum())
            verdict = _interval(by_document(sheet, judged, mask & known), seed) if (mask & known).any() else None
        scores[split] = MethodScore(
            _interval(by_document(sheet, result.exact_match, mask), seed),
            _interval(by_document(sheet, result.f1, mask), seed),
            float(result.loss[mask].sum() / result.tokens[mask].sum()),
            verdict,
            unjudged,
        )
    return scores


def _judged(judge: Judge | None, sheet: Sheet, result: Result) -> np.ndarray | None:
    """Verdicts as 1 and 0, NaN without one."""
    if judge is None:
        return None
    verdicts = judge([Claim(q.question, q.answers, said) for q, said in zip(sheet.asked, result.answers, strict=True)])
    return np.array([np.nan if verdict is None else float(verdict) for verdict in verdicts])


def _interval(values: Sequence[float], seed: int, at_most: float = 1.0) -> Interval:
    mean, low, high = mean_interval(values, resamples=RESAMPLES, seed=seed)
    return Interval(mean, max(low, 0.0), min(high, at_most))


def _records(sheet: Sheet, results: Mapping[str, Result]) -> list[dict[str, Any]]:
    return [
        {
            "document": sheet.documents[place].id,
            "question": question.question,
            "answers": list(question.answers),
            "splits": list(question.splits),
            "said": {name: result.answers[number] for name, result in results.items()},
        }
        for number, (place, question) in enumerate(zip(sheet.document_of, sheet.asked, strict=True))
    ]


def gate_telemetry(
    base: BaseModel, sheet: Sheet, memories: Sequence[GatedMemory], run: Throughput | None = None
) -> dict[str, list[list[float]]]:
    """Mean gates by layer and head over all documents: on their own questions, on another's, and on another document's text.

    `[L][heads]` each, tokens weighing alike; two documents at least.
    """
    count = len(sheet.documents)
    if count < 2 or len(memories) != count:
        raise ValueError(f"{len(memories)} memories for {count} documents: give one for each of two documents or more")
    asker = Asker(base, run or Throughput())
    prompts = sheet.shown("nothing")[0]
    asked = [(place, prompts[number]) for number, place in enumerate(sheet.document_of)]
    texts = [encode(asker.tokenizer, document.text)[: base.max_length] for document in sheet.documents]
    rows = {
        "own_questions": asked,
        "other_questions": [((place + 1) % count, ids) for place, ids in asked],
        "other_text": [((place + 1) % count, ids) for place, ids in enumerate(texts)],
    }
    weights = stack(list(memories))
    with evaluating(base.model):
        return {name: _mean_gates(base, weights, picked, asker.run.slots).tolist() for name, picked in rows.items()}


def _mean_gates(base: BaseModel, memories: GatedMemory, rows: Sequence[tuple[int, Sequence[int]]], at_once: int) -> torch.Tensor:
    total, tokens = torch.zeros(()), 0
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        longest = max(len(ids) for _, ids in part)
        ids_BT = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for _, ids in part], device=base.device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in part], device=base.device)
        with recording_gates(base) as gates, memories.attach(base, torch.tensor([place for place, _ in part])):
            base.hidden_states(ids_BT, mask_BT)
        count = int(mask_BT.sum())
        total, tokens = total + gate_means(gates.gates_BTLH, mask_BT).cpu() * count, tokens + count
    return total / tokens

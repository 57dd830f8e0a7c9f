"""Questions on documents of the reference world, asked of a base: answers and losses, many rows at once.

In: documents, a base, adapters by row or none. Out: a `Result` of numbers by question. Answers are greedy and come from
`core.engine.token_loop`, as the server's do; losses are of the gold answers. It knows nothing of splits and controls. Texts,
prompts and examples of all documents are in memory, about 20 kB a document.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from pydantic import PositiveInt
from torch import nn
from transformers import PreTrainedTokenizerBase

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.lora import LoraWeights, stack
from core.adapters.weights import AdapterWeights
from core.config import RunSection
from core.engine.requests import Request
from core.engine.token_loop import generate
from core.shine.hypernetwork import Hypernetwork
from core.text.prompts import Limits, clean_answer, cut_text, encode_context, in_context, prompt
from core.training.examples import DEFAULT_LIMITS, Example, collate, in_context_example, question_answers, question_examples
from core.training.metrics import exact_match, f1
from core.training.objectives import row_losses
from pipelines.world.documents import WorldDocument

SPARE_TOKENS = 2

Adapters = Callable[[Sequence[WorldDocument]], LoraWeights]


class Throughput(RunSection):
    """How many rows, prompt tokens and documents go through the models at once."""

    slots: PositiveInt = 64
    prefill_tokens_per_step: PositiveInt = 16384
    documents_at_once: PositiveInt = 32


def from_hypernetwork(hypernetwork: Hypernetwork, limits: Limits = DEFAULT_LIMITS, at_once: int = 32) -> Adapters:
    """Adapters written on the spot, `at_once` documents a pass."""
    tokenizer = tokenizer_of(hypernetwork.base)

    def adapters(documents: Sequence[WorldDocument]) -> LoraWeights:
        parts = []
        for start in range(0, len(documents), at_once):
            contexts = [tuple(encode_context(tokenizer, item.text, limits)) for item in documents[start : start + at_once]]
            batch = collate([Example(ids, (), ()) for ids in contexts], pad_id(tokenizer)).to(hypernetwork.base.device)
            written = hypernetwork.generate(batch.context_ids_BT, batch.context_mask_BT)
            parts.append(written.select(batch.index_B))
        return stack(parts)

    return adapters


class Questions:
    """Every question of some documents, ready to be asked.

    prompts and examples (to take losses on) by question number, for `show_document` False and True.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[WorldDocument], limits: Limits) -> None:
        self.documents = documents
        self.asked = [question for document in documents for question in document.questions]
        self.document_of = [number for number, document in enumerate(documents) for _ in document.questions]
        if not self.asked:
            raise ValueError("these documents have no questions: give documents that `imprint world` wrote")
        self.prompts: dict[bool, list[list[int]]] = {False: [], True: []}
        self.examples: dict[bool, list[Example]] = {False: [], True: []}
        for document in documents:
            qas = question_answers(document.questions)
            shown = cut_text(tokenizer, document.text, limits)
            self.prompts[False] += [_prompt(tokenizer, qa.question) for qa in qas]
            self.prompts[True] += [_prompt(tokenizer, in_context(shown, qa.question)) for qa in qas]
            self.examples[False] += question_examples(tokenizer, document.text, qas, limits)
            self.examples[True] += [in_context_example(tokenizer, document.text, [qa], limits) for qa in qas]
        # Supervised are the answer and its end mark.
        self.answer_tokens = max(example.tokens for example in self.examples[False]) + SPARE_TOKENS

    def __len__(self) -> int:
        return len(self.asked)

    def of_documents(self, documents: range) -> list[int]:
        """The numbers of the questions of these documents."""
        return [number for number, document in enumerate(self.document_of) if document in documents]

    def records(self, results: Mapping[str, "Result"]) -> list[dict[str, Any]]:
        """One record a question: document id, the question's fields, and under `said` the answer of every condition."""
        return [
            {
                "document": self.documents[document].id,
                **asdict(question),
                "said": {condition: result.answers[number] for condition, result in results.items()},
            }
            for number, (document, question) in enumerate(zip(self.document_of, self.asked, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class Result:
    """What was said to Q questions: arrays `[Q]`, losses in nats, summed over `tokens` supervised ones; seconds of answering."""

    answers: list[str]
    exact_match: np.ndarray
    f1: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    seconds: float

    @classmethod
    def joined(cls, parts: Sequence["Result"]) -> "Result":
        names = ("exact_match", "f1", "loss", "tokens")
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls([answer for part in parts for answer in part.answers], seconds=sum(part.seconds for part in parts), **arrays)


class Asker:
    """Asks a base: question i under adapter `index[i]` of `weights`, without them under what is attached outside, if anything."""

    def __init__(self, base: BaseModel, run: Throughput) -> None:
        self.base = base
        self.run = run
        self.tokenizer = tokenizer_of(base)
        self.stop_ids = base.stop_ids

    def ask(
        self,
        questions: Questions,
        numbers: Sequence[int],
        weights: AdapterWeights | None = None,
        index: Sequence[int] | None = None,
        show_document: bool = False,
    ) -> Result:
        """Asks the questions of these numbers; with `show_document` below their documents, otherwise alone."""
        return self.score(
            [questions.prompts[show_document][number] for number in numbers],
            [questions.examples[show_document][number] for number in numbers],
            [questions.asked[number].answers for number in numbers],
            questions.answer_tokens,
            weights,
            index,
        )

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        examples: Sequence[Example],
        golds: Sequence[Sequence[str]],
        max_tokens: int,
        weights: AdapterWeights | None = None,
        index: Sequence[int] | None = None,
    ) -> Result:
        """Answers of up to `max_tokens` to prompts, held against the accepted ones, and the losses of `examples`."""
        started = time.monotonic()
        answers = self._answers(prompts, weights, index, max_tokens)
        seconds = time.monotonic() - started
        return Result(
            answers,
            np.array([exact_match(answer, gold) for answer, gold in zip(answers, golds, strict=True)], dtype=float),
            np.array([f1(answer, gold) for answer, gold in zip(answers, golds, strict=True)]),
            np.array(self.losses(examples, weights, index)),
            np.array([example.tokens for example in examples]),
            seconds,
        )

    def _answers(
        self, prompts: Sequence[Sequence[int]], weights: AdapterWeights | None, index: Sequence[int] | None, max_tokens: int
    ) -> list[str]:
        adapters: list[AdapterWeights | None] = [None] * len(prompts)
        if weights is not None and index is not None:
            single = [weights.select(slice(place, place + 1)) for place in range(len(weights))]
            adapters = [single[place] for place in index]
        requests = [
            Request(str(row), ids, max_tokens, adapter, self.stop_ids)
            for row, (ids, adapter) in enumerate(zip(prompts, adapters, strict=True))
        ]
        by_length = sorted(requests, key=lambda request: len(request.prompt_ids))
        completions = generate(self.base, by_length, self.run.slots, self.run.prefill_tokens_per_step)
        said = [completions[request.request_id].token_ids for request in requests]
        return [clean_answer(cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))) for ids in said]

    def losses(
        self, examples: Sequence[Example], weights: AdapterWeights | None = None, index: Sequence[int] | None = None
    ) -> list[float]:
        """Summed loss of each example, in nats."""
        losses = [0.0] * len(examples)
        by_length = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
        for start in range(0, len(by_length), self.run.slots):
            rows = by_length[start : start + self.run.slots]
            batch = collate([examples[row] for row in rows], pad_id(self.tokenizer)).to(self.base.device)
            index_B = None if index is None else torch.tensor([index[row] for row in rows])
            with nullcontext() if weights is None else weights.attach(self.base, index_B):
                loss_B = row_losses(self.base, batch, None)
            for row, loss in zip(rows, loss_B.tolist(), strict=True):
                losses[row] = loss
        return losses


def level_of(document: WorldDocument) -> int:
    """The level that the id of a document of the reference world names; 0 for other documents."""
    match = re.fullmatch(r"[a-z]+-(\d)-\d+-\d{6,}", document.id)
    return int(match[1]) if match else 0


def _prompt(tokenizer: PreTrainedTokenizerBase, content: str) -> list[int]:
    return prompt(tokenizer, [{"role": "user", "content": content}])


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What batches are padded with: the end mark where the tokenizer has no padding of its own."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """No gradients and eval mode inside; afterwards every submodule is in the mode it had."""
    before = [(part, part.training) for module in modules if module is not None for part in module.modules()]
    try:
        for part, _ in before:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training

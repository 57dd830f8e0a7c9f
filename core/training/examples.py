"""Documents and questions -> examples -> padded batches.

In: texts, questions with answers, a tokenizer, an explicit `random.Random` where something is drawn. Out: `Example`s (a context
for the hypernetwork, a conversation for the base) and `Batch`es of them. Here are SHINE's questions on a document, one that is
read in several windows included; its pretraining is in `core.training.pretraining`.

Contexts are padded on the left, so that memory embeddings follow the last token; conversations on the right. The released
collators pad both on the left: the same under an attention mask, up to positions.

Knows nothing of models, files and workers. Making an example costs its tokenisation.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.text.documents import windows_at_borders
from core.text.prompts import IGNORED, Limits, Turn, cut_text, encode_context, in_context, render
from core.text.tokens import read


class QuestionAnswer(NamedTuple):
    """A question on a document and the answer to train on."""

    question: str
    answer: str


class Asked(Protocol):
    """Whatever carries a question and its answer, beside other things."""

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str: ...


def question_answers(asked: Iterable[Asked]) -> list[QuestionAnswer]:
    """The questions and answers alone, in order."""
    return [QuestionAnswer(each.question, each.answer) for each in asked]


@dataclass(frozen=True, slots=True)
class Example:
    """A context (empty: no adapter) and a conversation; labels are the ids where supervised, else -100.

    window_sizes: tokens of each window of a context that is read in several; none for one that is read whole.
    """

    context_ids: tuple[int, ...]
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    window_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.labels), f"{len(self.ids)} ids but {len(self.labels)} labels"
        assert sum(self.window_sizes) in (0, len(self.context_ids)), f"{self.window_sizes} is not {len(self.context_ids)} tokens"

    @property
    def windows(self) -> list[tuple[int, ...]]:
        """The context's ids, window by window."""
        if not self.window_sizes:
            return [self.context_ids]
        ends = list(accumulate(self.window_sizes))
        return [self.context_ids[end - size : end] for end, size in zip(ends, self.window_sizes, strict=True)]

    @property
    def tokens(self) -> int:
        """Supervised targets: the first label has no position that predicts it. 0 where cutting took the whole answer."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples. B counts windows of contexts in `context_*`, conversations elsewhere; masks are 1 on tokens, 0 on padding.

    `index_B` gives the context of each conversation, -1 for none. `windows` counts the windows of each context, neighbours in
    `context_*`: 1 for one that is read whole. `targets_2T` are rows and columns of the positions that predict a supervised label,
    that of the next column; found here where none are given. On a GPU that waits for the device, so build batches on the CPU.
    """

    context_ids_BT: Tensor
    context_mask_BT: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    index_B: Tensor
    windows: tuple[int, ...]
    targets_2T: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if self.targets_2T.ndim != 2:
            object.__setattr__(self, "targets_2T", (self.labels_BT[:, 1:] != IGNORED).nonzero().T.contiguous())

    @property
    def documents(self) -> int:
        """Contexts, hence adapters that conversations run under."""
        return len(self.windows)

    @property
    def tokens(self) -> int:
        """Supervised targets, `labels[:, 1:]`: the weight of this batch in a token-weighted loss."""
        return self.targets_2T.shape[1]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device, without waiting for it; `index_B` stays, since whoever attaches adapters looks into it."""
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("windows", "index_B")}
        if torch.device(device).type == "cuda":
            tensors = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in tensors.items()}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


DEFAULT_LIMITS = Limits()


def question_examples(
    tokenizer: PreTrainedTokenizerBase, document_text: str, qas: Sequence[QuestionAnswer], limits: Limits = DEFAULT_LIMITS
) -> list[Example]:
    """One example per question; all share the document's context, which `collate` stores once."""
    context_ids = tuple(encode_context(tokenizer, document_text, limits))
    return [example_of(tokenizer, context_ids, [Turn(*qa)], limits) for qa in qas]


def multi_turn_example(
    tokenizer: PreTrainedTokenizerBase, document_text: str, qas: Sequence[QuestionAnswer], limits: Limits = DEFAULT_LIMITS
) -> Example:
    """All questions of a document as the turns of one conversation (SHINE, instruction tuning on many questions)."""
    return example_of(tokenizer, encode_context(tokenizer, document_text, limits), [Turn(*qa) for qa in qas], limits)


def composed_example(
    tokenizer: PreTrainedTokenizerBase,
    document_text: str,
    qas: Sequence[QuestionAnswer],
    window_tokens: int,
    limits: Limits = DEFAULT_LIMITS,
) -> Example:
    """Questions, as turns of one conversation, on a document that is read in windows of at most `window_tokens`.

    Windows end as a conversion's do (`core.text.documents.windows_at_borders`). `limits.context_tokens` is for all of them
    together. What Doc-to-LoRA (arXiv 2602.15902) trains composition on; SHINE has single windows alone.
    """
    tokens = read(tokenizer, document_text)
    ids = tokens.ids[: limits.context_tokens]
    borders = (each[: bisect_left(each, len(ids))] for each in (tokens.sentences, tokens.paragraphs))
    covers = windows_at_borders(len(ids), window_tokens, 0, *borders)
    whole = example_of(tokenizer, ids, [Turn(*qa) for qa in qas], limits)
    return replace(whole, window_sizes=tuple(window.end - window.start for window in covers))


def in_context_example(
    tokenizer: PreTrainedTokenizerBase, document_text: str, qas: Sequence[QuestionAnswer], limits: Limits = DEFAULT_LIMITS
) -> Example:
    """No context: the first question shows the document, cut to `limits.context_tokens`. What a base is trained on.

    The conversation may hold the tokens of both limits.
    """
    if not qas:
        raise ValueError("an in-context example needs at least one question")
    first, *rest = qas
    shown = (in_context(cut_text(tokenizer, document_text, limits), ""), first.question)
    room = Limits(conversation_tokens=limits.context_tokens + limits.conversation_tokens)
    return example_of(tokenizer, (), [Turn(shown, first.answer), *(Turn(*qa) for qa in rest)], room)


def example_of(tokenizer: PreTrainedTokenizerBase, context_ids: Sequence[int], turns: Sequence[Turn], limits: Limits) -> Example:
    """A context as it is, and a conversation cut on the right to `limits.conversation_tokens`."""
    ids, labels = render(tokenizer, turns)
    stop = limits.conversation_tokens
    return Example(tuple(context_ids), tuple(ids[:stop]), tuple(labels[:stop]))


def collate(examples: Sequence[Example], pad_id: int, pad_to_multiple: int = 1) -> Batch:
    """Pads examples to a batch, lengths rounded up to a multiple; equal contexts are there once, in order of appearance."""
    if not examples:
        raise ValueError("a batch needs at least one example")
    contexts: dict[tuple[tuple[int, ...], ...], int] = {}
    index = [contexts.setdefault(tuple(each.windows), len(contexts)) if each.context_ids else -1 for each in examples]
    rows = list(chain.from_iterable(contexts))
    context_ids_BT, context_mask_BT = _pad(rows, pad_id, pad_to_multiple, left=True)
    ids_BT, mask_BT = _pad([example.ids for example in examples], pad_id, pad_to_multiple)
    labels_BT, _ = _pad([example.labels for example in examples], IGNORED, pad_to_multiple)
    windows = tuple(map(len, contexts))
    return Batch(context_ids_BT, context_mask_BT, ids_BT, mask_BT, labels_BT, torch.tensor(index), windows)


def _pad(rows: Sequence[Sequence[int]], value: int, multiple: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """(values, mask), both int64 `[B, T]`; T is 0 without rows."""
    width = -(-max(map(len, rows), default=0) // multiple) * multiple
    values_BT = torch.full((len(rows), width), value)
    mask_BT = torch.zeros_like(values_BT)
    for place, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        values_BT[place, span] = torch.tensor(row, dtype=torch.int64)
        mask_BT[place, span] = 1
    return values_BT, mask_BT


def plan_batches(lengths: Sequence[int], max_rows: int, max_padded_tokens: int) -> list[list[int]]:
    """Every index once, grouped so that a batch padded to its longest has at most these rows and tokens; longest first.

    A length that exceeds `max_padded_tokens` alone gets a batch of its own. Neighbours in length share a batch: little padding.
    """
    if max_rows < 1 or max_padded_tokens < 1:
        raise ValueError(f"max_rows is {max_rows} and max_padded_tokens {max_padded_tokens}: give 1 or more")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = []
    start = 0
    while start < len(order):
        rows = min(max_rows, max(1, max_padded_tokens // max(lengths[order[start]], 1)))
        batches.append(order[start : start + rows])
        start += rows
    return batches

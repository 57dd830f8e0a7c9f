"""Documents and questions -> examples -> padded batches.

In: texts, questions with answers, a tokenizer, an explicit `random.Random` where something is drawn. Out: `Example`s (a context
for the hypernetwork, a conversation for the base) and `Batch`es of them. The tasks are SHINE's: reconstruction, completion,
packed groups of both (paper, section 4; spec of the released collators), and questions on a document, one that is read in several
windows included.

Contexts are padded on the left, so that memory embeddings follow the last token; conversations on the right. The released
collators pad both on the left: the same under an attention mask, up to positions.

Knows nothing of models, files and workers. Making an example costs its tokenisation; `packing` costs at most texts x open bins.
"""

import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.config import Section
from core.text.control import Ours
from core.text.documents import windows_at_borders
from core.text.prompts import IGNORED, Instructions, Limits, Turn, cut_text, encode_context, in_context, render
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
    `context_*`: 1 for one that is read whole.
    """

    context_ids_BT: Tensor
    context_mask_BT: Tensor
    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor
    index_B: Tensor
    windows: tuple[int, ...]

    @property
    def documents(self) -> int:
        """Contexts, hence adapters that conversations run under."""
        return len(self.windows)

    @property
    def tokens(self) -> int:
        """Supervised targets, `labels[:, 1:]`: the weight of this batch in a token-weighted loss."""
        return int((self.labels_BT[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        tensors = (name for name in self.__dataclass_fields__ if name != "windows")
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        return replace(self, **moved)


class Pretraining(Section):
    """How a text of a packed group is asked back (SHINE, pretraining)."""

    completion_frequency: Annotated[float, Field(ge=0, le=1)] = 0.5
    removed_share_min: Annotated[float, Field(gt=0, lt=1)] = 0.1
    removed_share_max: Annotated[float, Field(gt=0, lt=1)] = 0.3

    @model_validator(mode="after")
    def _ordered(self) -> "Pretraining":
        if self.removed_share_min > self.removed_share_max:
            raise ValueError("removed_share_min is above removed_share_max")
        return self


DEFAULT_LIMITS = Limits()
DEFAULT_INSTRUCTIONS = Instructions()
DEFAULT_PRETRAINING = Pretraining()


def reconstruction(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    limits: Limits = DEFAULT_LIMITS,
    instructions: Instructions = DEFAULT_INSTRUCTIONS,
) -> Example:
    """The text as context; asked for, it is given back."""
    context_ids = encode_context(tokenizer, text, limits)
    return _example(tokenizer, context_ids, [Turn(Ours(instructions.reconstruct), text)], limits)


def completion(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    removed_share: float,
    limits: Limits = DEFAULT_LIMITS,
    instructions: Instructions = DEFAULT_INSTRUCTIONS,
) -> Example:
    """The text without its last words as context; asked for, the full text is given."""
    context_ids = encode_context(tokenizer, shortened(text, removed_share), limits)
    return _example(tokenizer, context_ids, [Turn(Ours(instructions.complete), text)], limits)


def shortened(text: str, removed_share: float) -> str:
    """The text without the last `removed_share` of its words, blanks in place of all white space; a single word stays whole.

    The number kept is rounded half to even; at least one word is kept and one removed.
    """
    words = text.split()
    if len(words) < 2:
        return text
    kept = round(len(words) * (1 - removed_share))
    return " ".join(words[: min(max(kept, 1), len(words) - 1)])


def pretraining_example(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    rng: random.Random,
    limits: Limits = DEFAULT_LIMITS,
    instructions: Instructions = DEFAULT_INSTRUCTIONS,
    pretraining: Pretraining = DEFAULT_PRETRAINING,
) -> Example:
    """A packed group: one context of all texts, one turn per text.

    For each text reconstruction or completion is drawn, and the share removed. Contexts and turns are shuffled independently, so
    that a turn's place does not tell which text is meant.
    """
    if not texts:
        raise ValueError("a group needs at least one text")
    contexts, turns = [], []
    for text in texts:
        if rng.random() < pretraining.completion_frequency:
            share = rng.uniform(pretraining.removed_share_min, pretraining.removed_share_max)
            contexts.append(shortened(text, share))
            turns.append(Turn(Ours(instructions.complete), text))
        else:
            contexts.append(text)
            turns.append(Turn(Ours(instructions.reconstruct), text))
    rng.shuffle(contexts)
    rng.shuffle(turns)
    separated = tuple(part for context in contexts for part in (Ours(instructions.separator), context))[1:]
    return _example(tokenizer, encode_context(tokenizer, separated, limits), turns, limits)


def question_examples(
    tokenizer: PreTrainedTokenizerBase, document_text: str, qas: Sequence[QuestionAnswer], limits: Limits = DEFAULT_LIMITS
) -> list[Example]:
    """One example per question; all share the document's context, which `collate` stores once."""
    context_ids = tuple(encode_context(tokenizer, document_text, limits))
    return [_example(tokenizer, context_ids, [Turn(*qa)], limits) for qa in qas]


def multi_turn_example(
    tokenizer: PreTrainedTokenizerBase, document_text: str, qas: Sequence[QuestionAnswer], limits: Limits = DEFAULT_LIMITS
) -> Example:
    """All questions of a document as the turns of one conversation (SHINE, instruction tuning on many questions)."""
    return _example(tokenizer, encode_context(tokenizer, document_text, limits), [Turn(*qa) for qa in qas], limits)


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
    whole = _example(tokenizer, ids, [Turn(*qa) for qa in qas], limits)
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
    return _example(tokenizer, (), [Turn(shown, first.answer), *(Turn(*qa) for qa in rest)], room)


def _example(tokenizer: PreTrainedTokenizerBase, context_ids: Sequence[int], turns: Sequence[Turn], limits: Limits) -> Example:
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


def packing(lengths: Sequence[int], max_length: int, open_bins: int = 100, overhead: int = 11) -> list[list[int]]:
    """Groups texts (indices into `lengths`, in tokens) so that a group's lengths and overheads fit into `max_length`.

    SHINE's rule, order of groups included: the first open bin with room takes a text; if none has, the bin with the least room
    left is closed and restarted with it. A text that does not fit alone is a group of its own. `overhead` is what the template
    adds to a text (11 tokens in ChatML).
    """
    if open_bins < 1:
        raise ValueError(f"open_bins is {open_bins}: give 1 or more")
    groups: list[list[int]] = []
    bins: list[list[int]] = [[] for _ in range(open_bins)]
    room = [max_length] * open_bins
    for text, length in enumerate(lengths):
        cost = length + overhead
        if cost > max_length:
            groups.append([text])
            continue
        place = next((i for i, free in enumerate(room) if free >= cost), None)
        if place is None:
            place = min(range(open_bins), key=room.__getitem__)
            groups.append(bins[place])
            bins[place], room[place] = [], max_length
        bins[place].append(text)
        room[place] -= cost
    return groups + [group for group in bins if group]


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

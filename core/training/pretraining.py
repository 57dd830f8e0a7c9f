"""SHINE's pretraining: texts to be given back, or completed, from the adapter that their context becomes (paper, section 4).

In: texts, a tokenizer, an explicit `random.Random`. Out: `Example`s of one text, or of a packed group: several texts in one
context, hence one adapter, each asked for in a turn of its own. A `Packer` loses nothing of them: it counts what the tokenizer
and the template really make of a text, and what is longer than a group becomes several passages.

Knows nothing of models, files and workers. `packing` costs at most texts x open bins.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from core.config import Section
from core.text.control import Ours, encode_text
from core.text.documents import windows_at_borders
from core.text.prompts import Instructions, Limits, Turn, encode, encode_context, render
from core.text.tokens import read
from core.training.examples import DEFAULT_LIMITS, Example, example_of


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
    return example_of(tokenizer, context_ids, [Turn(Ours(instructions.reconstruct), text)], limits)


def completion(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    removed_share: float,
    limits: Limits = DEFAULT_LIMITS,
    instructions: Instructions = DEFAULT_INSTRUCTIONS,
) -> Example:
    """The text without its last words as context; asked for, the full text is given."""
    context_ids = encode_context(tokenizer, shortened(text, removed_share), limits)
    return example_of(tokenizer, context_ids, [Turn(Ours(instructions.complete), text)], limits)


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
    """A packed group: one context of all texts, one turn per text; both are cut to `limits` on the right.

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
    separator = _separator(tokenizer, instructions)
    context_ids = encode_context(tokenizer, contexts[0], limits)
    for context in contexts[1:]:
        context_ids += [*separator, *encode(tokenizer, context)]
    return example_of(tokenizer, context_ids[: limits.context_tokens], turns, limits)


class Passage(NamedTuple):
    """A text that fits into a group alone; tokens of its context, and of its turn as a conversation's only one."""

    text: str
    context_tokens: int
    turn_tokens: int


class Packer:
    """Texts to groups of at most `group_tokens`, context and conversation each; 0: a text, or a passage of one, is a group.

    Nothing is cut away: what does not fit alone becomes several passages, and groups are counted as the template makes them.
    Cost: two tokenisations of a text, a third in groups of several.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        group_tokens: int = 0,
        limits: Limits = DEFAULT_LIMITS,
        instructions: Instructions = DEFAULT_INSTRUCTIONS,
        pretraining: Pretraining = DEFAULT_PRETRAINING,
    ) -> None:
        self._tokenizer, self._instructions, self._pretraining = tokenizer, instructions, pretraining
        self._packed = group_tokens > 0
        if self._packed:
            room = {name: min(group_tokens, getattr(limits, name)) for name in Limits.model_fields}
            limits = limits.model_copy(update=room)
        self._limits = limits

    @cached_property
    def _ask(self) -> str:
        """The longer instruction: prompts and answers are encoded apart, so it is so whatever the text."""
        asks = (Ours(self._instructions.reconstruct), Ours(self._instructions.complete))
        return max(asks, key=lambda ask: self._turn_tokens(Turn(ask, "x")))

    def passages(self, text: str) -> list[Passage]:
        """The text, or the parts of it that fit alone, cut where sentences end; only parts of nothing but blanks are left out.

        Raises `ValueError` for limits without room for a token beside the template, and for a long text whose tokenizer has no
        offsets.
        """
        return list(self._parts(text))

    def examples(self, parts: Sequence[Passage], rng: random.Random) -> list[Example]:
        """Every passage once, in groups."""
        groups = [[part] for part in parts]
        if self._packed:
            groups = [half for group in self._packing(parts) for half in self._within(group)]
        return [
            pretraining_example(
                self._tokenizer, [part.text for part in group], rng, self._limits, self._instructions, self._pretraining
            )
            for group in groups
        ]

    def _parts(self, text: str) -> Iterator[Passage]:
        limits = self._limits
        whole = Passage(text, self._text_tokens(text), self._turn_tokens(Turn(self._ask, text)))
        if whole.context_tokens <= limits.context_tokens and whole.turn_tokens <= limits.conversation_tokens:
            yield whole
            return
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"the text is longer than {limits.context_tokens} tokens and {type(self._tokenizer).__name__} cannot say where "
                "in the text a token ends: load the fast tokenizer, or shorten the text"
            )
        tokens = read(self._tokenizer, text)
        length = len(tokens.ids)
        beside = max(0, whole.turn_tokens - length)
        room = min(limits.context_tokens, limits.conversation_tokens - beside, length // 2)
        if room < 1:
            raise ValueError(
                f"limits of {limits.context_tokens} tokens of context and {limits.conversation_tokens} of conversation have no "
                f"room for the text that begins {text[:20]!r}, beside {beside} tokens of the chat template: raise them"
            )
        offsets = encode_text(self._tokenizer, text, offsets=True).offsets
        assert offsets is not None, "it is fast"
        covers = windows_at_borders(length, room, 0, tokens.sentences, tokens.paragraphs)
        ends = [*(offsets[window.start][0] for window in covers[1:]), len(text)]
        parts = [text[start:end] for start, end in pairwise([0, *accumulate(ends, max)])]
        if text in parts:
            raise ValueError(f"the text that begins {text[:20]!r} is {length} tokens of one character: raise the limits")
        for part in parts:
            if part.strip():
                yield from self._parts(part)

    def most_together(self) -> int:
        """Texts that a group can hold: those of one token."""
        if not self._packed:
            return 1
        takes, room = self._takes([Passage("x", 1, self._turn_tokens(Turn(self._ask, "x")) - self._text_tokens("x") + 1)])
        return max(1, room // takes[0])

    def _packing(self, parts: Sequence[Passage]) -> list[list[Passage]]:
        takes, room = self._takes(parts)
        return [[parts[place] for place in group] for group in packing(takes, room)]

    def _takes(self, parts: Sequence[Passage]) -> tuple[list[int], int]:
        """What each passage takes of a group, and what a group holds: the larger number of context and turn, so both fit."""
        first = Turn(self._ask, "x")
        later = len(render(self._tokenizer, [first, first])[0]) - 2 * self._turn_tokens(first)
        separator = len(_separator(self._tokenizer, self._instructions))
        takes = [max(part.context_tokens + separator, part.turn_tokens + later) for part in parts]
        return takes, min(self._limits.context_tokens + separator, self._limits.conversation_tokens + later)

    def _within(self, group: list[Passage]) -> Iterator[list[Passage]]:
        """The group, or its halves, where a template makes more of turns together than of each."""
        turns = [Turn(self._ask, part.text) for part in group]
        if len(group) == 1 or len(render(self._tokenizer, turns)[0]) <= self._limits.conversation_tokens:
            yield group
            return
        middle = len(group) // 2
        yield from self._within(group[:middle])
        yield from self._within(group[middle:])

    def _text_tokens(self, text: str) -> int:
        return len(encode(self._tokenizer, text))

    def _turn_tokens(self, turn: Turn) -> int:
        return len(render(self._tokenizer, [turn])[0])


def _separator(tokenizer: PreTrainedTokenizerBase, instructions: Instructions) -> list[int]:
    return encode(tokenizer, Ours(instructions.separator))


def packing(costs: Sequence[int], max_length: int, open_bins: int = 100) -> list[list[int]]:
    """Groups texts (indices into `costs`, in tokens, with all that a template adds) so that a group fits into `max_length`.

    SHINE's rule, order of groups included: the first open bin with room takes a text; if none has, the bin with the least room
    left is closed and restarted with it. A text that does not fit alone is a group of its own.
    """
    if open_bins < 1:
        raise ValueError(f"open_bins is {open_bins}: give 1 or more")
    groups: list[list[int]] = []
    bins: list[list[int]] = [[] for _ in range(open_bins)]
    room = [max_length] * open_bins
    for text, cost in enumerate(costs):
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

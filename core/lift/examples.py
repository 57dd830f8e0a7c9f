"""What LIFT trains on, as examples: segments, recitals in context, questions without their document, timelines.

In: a document's token ids or sentences, a tokenizer, an explicit `random.Random` where something is drawn. Out: `Example`s
without a context for the hypernetwork (arXiv 2412.13626, section 3; 2502.14644 v1-v5). The released layout is there for parity;
by default a recital never shows a token of the segment that it asks for. Knows nothing of stages and epochs (core.lift.course).
Costs what rendering and tokenising a prompt costs.
"""

import random
from collections.abc import Sequence

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from core.config import Section
from core.text.documents import SegmentRule, Window
from core.text.prompts import IGNORED, Turn, prompt, render
from core.training.examples import Example, QuestionAnswer


class Reading(Section):
    """How a document is cut. None scales with the base's window, up to the papers' 2048, 768 and 4096 tokens.

    rule: `exact` ends the cover at the last token (`documents.segments`), and a recital shows no token of its segment, under the
    chat template; `released` is the public code's: suffixes as segments, whatever the draw shows, no template.
    """

    segment_tokens: PositiveInt | None = None
    stride_tokens: PositiveInt | None = None
    context_tokens: PositiveInt | None = None
    rule: SegmentRule = "exact"

    def sizes(self, max_length: int) -> tuple[int, int, int]:
        """Tokens of segment, stride and context on a base of `max_length` positions: 1/4, 3/32 and 1/2 of them by default."""
        segment = self.segment_tokens or max(1, min(2048, max_length // 4))
        stride = self.stride_tokens or max(1, segment * 3 // 8)
        if self.rule == "exact" and segment > max_length:
            raise ValueError(f"segment_tokens is {segment}, but the base has {max_length} positions: lower it")
        return segment, stride, self.context_tokens or min(4096, max_length // 2)


class Wording(Section):
    """What LIFT itself says to the model."""

    recite: str = "Recite, word for word, a passage of this text that is not shown above."
    ellipsis: str = "..."
    timeline: str = "In which order do these sentences stand in the text? Answer with their numbers."


def segment_example(ids: Sequence[int], segment: Window, limit: int) -> Example:
    """A segment alone, all of it supervised, cut on the right to `limit` tokens: no template, no begin token."""
    shown = tuple(ids[segment.start : min(segment.end, segment.start + limit)])
    return Example((), shown, shown)


def question_example(tokenizer: PreTrainedTokenizerBase, pair: QuestionAnswer, limit: int) -> Example:
    """A question without its document; only the answer is supervised. Cut on the right to `limit` tokens."""
    ids, labels = render(tokenizer, [Turn(*pair)])
    return Example((), tuple(ids[:limit]), tuple(labels[:limit]))


def released_pieces(length: int, context_tokens: int, front: int, front_start: int, back_offset: int) -> list[Window]:
    """Front and back piece of a document as the public code places them; in a short document either may be empty.

    front, front_start: size and start of the front piece; back_offset: tokens behind the back piece, which has what is left of
    `context_tokens`.
    """
    back_end = max(length - back_offset, 0)
    return [
        Window(min(front_start, length), min(front_start + front, length)),
        Window(max(length - back_offset - (context_tokens - front), 0), back_end),
    ]


def draw_released_pieces(length: int, context_tokens: int, rng: random.Random) -> list[Window]:
    """`released_pieces` at random: the front piece within the first `context_tokens`, the back piece within the last."""
    front = rng.randrange(context_tokens)
    return released_pieces(
        length, context_tokens, front, rng.randrange(context_tokens - front), rng.randrange(front) if front else 0
    )


def draw_pieces(length: int, segment: Window, context_tokens: int, rng: random.Random) -> list[Window]:
    """Pieces of a document without the segment, `context_tokens` together where as many are left, in order and disjoint.

    Drawn as in the release, but from the tokens that are not the segment's; where a piece spans the segment it becomes two.
    Fewer tokens come where the two draws overlap; none where the segment is the whole document.
    """
    size = segment.end - segment.start
    room = min(context_tokens, length - size)
    front = rng.randint(0, room)
    front_start = rng.randint(0, room - front)
    back_end = length - size - rng.randint(0, front)
    front_end = front_start + front
    drawn = [(front_start, front_end), (max(back_end - (room - front), front_end), back_end)]
    pieces = []
    for start, end in drawn:
        pieces += [
            Window(start, min(end, segment.start)),
            Window(max(start, segment.start) + size, end + size),
        ]
    return [piece for piece in pieces if piece.start < piece.end]


def released_recital(
    ids: Sequence[int],
    segment: Window,
    pieces: Sequence[Window],
    ellipsis_ids: Sequence[int],
    recite_ids: Sequence[int],
    limit: int,
) -> Example:
    """Front piece, ellipsis, back piece, instruction, segment, cut on the right to `limit`; supervised is the segment."""
    front, back = (ids[piece.start : piece.end] for piece in pieces)
    shown = [*front, *ellipsis_ids, *back, *recite_ids]
    target = ids[segment.start : segment.end]
    return Example((), (*shown, *target)[:limit], (*[IGNORED] * len(shown), *target)[:limit])


def recital(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    segment: Window,
    pieces: Sequence[Window],
    wording: Wording,
    limit: int,
) -> Example:
    """The pieces and the instruction as a user's message, the segment as the answer to it; supervised is the segment.

    Over `limit` tokens, the pieces are shortened, the first ones first. Raises `ValueError` where segment and instruction alone
    are too long.
    """
    target = tuple(ids[segment.start : segment.end])
    pieces = list(pieces)
    while True:
        texts = [str(tokenizer.decode(list(ids[piece.start : piece.end]))).strip("\ufffd") for piece in pieces]
        shown = f" {wording.ellipsis} ".join(texts)
        asked = prompt(tokenizer, [{"role": "user", "content": f"{shown}\n\n{wording.recite}" if shown else wording.recite}])
        excess = len(asked) + len(target) - limit
        if excess <= 0:
            return Example((), (*asked, *target), (*[IGNORED] * len(asked), *target))
        if not pieces:
            raise ValueError(f"a segment of {len(target)} tokens and the instruction exceed {limit}: lower segment_tokens")
        start, end = pieces.pop(0)
        if start + excess < end:
            pieces.insert(0, Window(start + excess, end))


def timeline_example(
    tokenizer: PreTrainedTokenizerBase, ordered: Sequence[str], count: int, wording: Wording, limit: int, rng: random.Random
) -> Example:
    """Some of a document's sentences, shuffled and numbered; the answer is their order in the document, as in "2, 3, 1"."""
    places = rng.sample(range(len(ordered)), min(count, len(ordered)))
    numbered = "\n".join(f"{number}. {ordered[place]}" for number, place in enumerate(places, 1))
    answer = ", ".join(str(places.index(place) + 1) for place in sorted(places))
    return question_example(tokenizer, QuestionAnswer(f"{wording.timeline}\n{numbered}", answer), limit)

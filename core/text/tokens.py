"""A document's token ids and the borders among them, where it may be cut: what windows over a long document are made from.

In: a text and any Hugging Face tokenizer. Out: `Tokens`; deterministic. Knows nothing of windows (`core.text.documents`) and
models. Cost: about 4 us a token, half of it the sentences (`core.text.sentences`) and the offsets; `core.text.prompts.encode`
takes the other half.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from core.text.control import encode_text
from core.text.sentences import sentences

BORDERS = "borders-1"
"""Name of the rules by which windows end: those of `read`, `core.text.sentences` and `documents.windows_at_borders`. It bears
identity: whoever changes a rule changes the name."""


class Tokens(NamedTuple):
    """Token ids of a text, and its borders: rising indices into `ids`, the first token's left out.

    sentences: tokens that begin a sentence, or what introduces it (a list's marker, a heading's). paragraphs: those of them that
    a blank line stands before.
    """

    ids: Sequence[int]
    sentences: Sequence[int] = ()
    paragraphs: Sequence[int] = ()


def read(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """The ids that `prompts.encode` gives, with borders; without any where the tokenizer does not tell offsets (is slow).

    A border that lies within a token is left out: the token belongs to what stands before.
    """
    ids, offsets = encode_text(tokenizer, text, offsets=True)
    if offsets is None:
        return Tokens(ids)
    ends = [end for _, end in offsets]
    borders: list[int] = []
    paragraphs: list[int] = []
    for before, after in pairwise(sentences(text)):
        gap = text[before.end : after.start]
        solid = after.start - len(gap.lstrip())
        token = bisect_right(ends, solid)
        if offsets[token][0] >= before.end and token > (borders[-1] if borders else 0):
            borders.append(token)
            if "\n\n" in gap:
                paragraphs.append(token)
    return Tokens(ids, borders, paragraphs)

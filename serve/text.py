"""Token ids of one answer to text, piece by piece: what is given out is never taken back, and the pieces make the whole answer.

In: ids in order. Out: text without half characters, special tokens, stop strings and what follows them. Knows nothing of engines
and HTTP. A piece waits while it may still change: half a character, the beginning of a stop string, blanks at the end.
Cost: one decoding of a few tokens an id.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\N{REPLACEMENT CHARACTER}"
_LONGEST_HALF = 3
"""Bytes of an unfinished UTF-8 character at most; decoders write as many replacement characters for it, or fewer."""
_WINDOW, _WINDOW_KEPT = 64, 16
"""Ids decoded together at most, and those kept beyond: reached only by bytes that never make a character."""


class AnswerText:
    """The text of one answer. `stopped` is true from the first stop string on.

    strip: leave out blanks around the whole, as `core.text.prompts.clean_answer` does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), strip: bool = False) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        # The window: the ids of the last piece, `_past` of them, which give the next ones their place, and those not yet certain.
        self._ids: list[int] = []
        self._past = 0
        self._shown = ""
        self._stops = stops
        self._undecided = ""
        self._strip = strip
        self._begun = False
        self._blanks = ""

    def push(self, token_id: int) -> str:
        """The text that is certain with this id, often of an earlier one or empty."""
        if token_id in self._special_ids:
            return ""
        self._ids.append(token_id)
        text = self._decoded(self._ids)
        if not text.startswith(self._shown):  # decoders with byte fallback turn a run of bytes to rubbish until it is whole
            if len(self._ids) - self._past <= _LONGEST_HALF:
                return ""
            del self._ids[: self._past]
            self._past, self._shown = 0, ""
            text = self._decoded(self._ids)
        certain = len(text)
        while certain > max(len(self._shown), len(text) - _LONGEST_HALF) and text[certain - 1] == _HALF:
            certain -= 1
        new = text[len(self._shown) : certain]
        self._shown += new
        if new and certain == len(text):
            del self._ids[: self._past]
            self._past, self._shown = len(self._ids), self._decoded(self._ids)
        elif len(self._ids) > _WINDOW:
            del self._ids[:-_WINDOW_KEPT]
            kept = self._decoded(self._ids)
            self._past, self._shown = len(self._ids), kept[: len(kept) - (len(text) - certain)]
        return self._stripped(self._before_stop(new))

    def finish(self) -> str:
        """What was held back; the answer is at its end."""
        text = self._decoded(self._ids)
        whole = text.startswith(self._shown)
        rest = self._before_stop(text[len(self._shown) :] if whole else self._decoded(self._ids[self._past :]))
        if not self.stopped:
            rest += self._undecided
        self._undecided = ""
        return self._stripped(rest)

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _before_stop(self, new: str) -> str:
        """What of the text stands before a stop string, whichever ends first; nothing behind it."""
        if self.stopped:
            return ""
        text = self._undecided + new
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._undecided = ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._undecided = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _stripped(self, text: str) -> str:
        if not self._strip:
            return text
        text = self._blanks + text
        if not self._begun:
            text = text.lstrip()
        certain = text.rstrip()
        self._blanks = text[len(certain) :]
        self._begun = self._begun or bool(certain)
        return certain


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`, all of it excluded."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class TokenTexts:
    """What single tokens say, special ones too: as they stand behind another token, so that blanks before words are kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._shown = len(self._decoded([]))
        self._texts: dict[int, str] = {}

    def of(self, token_id: int) -> str:
        """The text of a token; of a part of a character, replacement characters."""
        if token_id not in self._texts:
            self._texts[token_id] = self._decoded([token_id])[self._shown :]
        return self._texts[token_id]

    def _decoded(self, ids: list[int]) -> str:
        text = self._tokenizer.decode([*self._before, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

"""Token ids of texts in which no control token is read, except those that we or a chat template write.

Control tokens (turn marks, end marks, padding) are the special tokens of a tokenizer, and those added tokens with a sign in them
that its chat template names. In: a text, or a tuple of texts of which some are `Ours`. Out: ids. What a user or a document says
in the letters of a control token is read as those letters; every other text has the ids that the tokenizer itself gives.

How: where the tokenizer finds a control token that nobody meant, its twin is asked, in which control tokens go by secret names.
Those that are meant are renamed likewise. Cost: a look at the ids of each text; the twin is made once, at the first such text,
from the tokenizer's description (about a second and as much memory for 150,000 tokens). Safe in threads.
"""

import json
import re
import secrets
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

FIRST_MARK = 0xF0000  # of the private use area: two characters from here on that no text holds say what is text


class Ours(str):
    """A text of our own: the control tokens in it are meant."""

    __slots__ = ()


Text = str | tuple[str, ...]
"""A text, or its parts in order; all of it is text alone, but for parts that are `Ours`."""


class Encoded(NamedTuple):
    """Ids, and for each where it begins and ends in the text; no offsets from a slow tokenizer, or where none are wanted."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None


class Marks(NamedTuple):
    """Two characters around a control token that is text; one alone only parts what stands on its sides."""

    start: str
    end: str


class Control:
    """The control tokens of one tokenizer as it was when this was made."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = str(tokenizer.chat_template or "")
        added = tokenizer.added_tokens_decoder
        self.ids = {
            token.content: number
            for number, token in added.items()
            if token.special or (token.content in template and _is_sign(token.content))
        }
        for content, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
            self.ids.setdefault(str(content), number)
        self.numbers = frozenset(self.ids.values())
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._any = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.pattern = re.compile(self._any)
        self._starts = {content[:size] for content in self.ids for size in range(1, len(content))}
        self._ends = {content[size:] for content in self.ids for size in range(1, len(content))}
        self._longest = max(map(len, self.ids), default=0)
        self._names = {content: f"<{secrets.token_hex(16)}>" for content in self.ids}
        self._backend: Tokenizer | None = tokenizer.backend_tokenizer if tokenizer.is_fast else None

    def marked(self, text: str, marks: Marks) -> str:
        """The text with marks around control tokens, and where its border could become part of one."""
        marked = self.pattern.sub(lambda found: f"{marks.start}{found.group()}{marks.end}", text)
        start, end = len(marked) - len(marked.lstrip()), len(marked.rstrip())
        sizes = range(1, self._longest)
        if any(marked[max(start, end - size) : end] in self._starts for size in sizes):
            marked = marked[:end] + marks.start + marked[end:]
        if any(marked[start : min(start + size, end)] in self._ends for size in sizes):
            marked = marked[:start] + marks.start + marked[start:]
        return marked

    def split(self, marked: str, marks: Marks) -> list[tuple[str, bool]]:
        """The pieces of a marked text, in order and without its marks, and whether each is a control token that is meant."""
        pieces: list[tuple[str, bool]] = []
        said: list[str] = []
        place = 0
        for found in re.finditer(f"{marks.start}({self._any}){marks.end}|({self._any})|[{marks.start}{marks.end}]", marked):
            said += [marked[place : found.start()], found[1] or ""]
            place = found.end()
            if found[2] is not None:
                pieces += [("".join(said), False), (found[2], True)]
                said = []
        pieces.append(("".join([*said, marked[place:]]), False))
        return [piece for piece in pieces if piece[0]]

    def renamed(self, pieces: list[tuple[str, bool]]) -> str:
        """One text for the twin."""
        return "".join(self._names[piece] if meant else piece for piece, meant in pieces)

    @cached_property
    def twin(self) -> Tokenizer:
        """The tokenizer with control tokens under secret names; ids are the same. Raises `ValueError` where it cannot be made."""
        assert self._backend is not None
        described = json.loads(self._backend.to_str())
        described["truncation"] = described["padding"] = None
        for token in described["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        model = described["model"]
        if model.get("unk_token") in self._names:
            model["unk_token"] = self._names[model["unk_token"]]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._names.get(piece, piece): number for piece, number in model["vocab"].items()}
        else:
            model["vocab"] = [[self._names.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if self._survives(pair)]
        made = Tokenizer.from_str(json.dumps(described))
        if any(made.token_to_id(self._names[content]) != number for content, number in self.ids.items()):
            raise ValueError("this tokenizer cannot tell text from control tokens: its added tokens have no ids of their own")
        return made

    def _survives(self, pair: Any) -> bool:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        return not {left, right, left + right} & self._names.keys()


_made: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[int, Any], Control]]" = WeakKeyDictionary()


def control(tokenizer: PreTrainedTokenizerBase) -> Control:
    """The tokenizer's control tokens, found anew where tokens or the template have changed."""
    state = len(tokenizer), tokenizer.chat_template
    known = _made.get(tokenizer)
    if known is None or known[0] != state:
        known = _made[tokenizer] = (state, Control(tokenizer))
    return known[1]


def free_marks(*texts: str) -> Marks:
    """Two characters that stand in none of the texts."""
    used = set().union(*texts) if any(not text.isascii() for text in texts) else set()
    free = (character for character in map(chr, range(FIRST_MARK, 0x10FFFE)) if character not in used)
    return Marks(next(free), next(free))


def parts_of(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, offsets: bool = False) -> Encoded:
    """A text alone, no begin or end token. Raises `ValueError` for a slow tokenizer that reads control tokens in any case.

    offsets: whether they are wanted; they cost a third more.
    """
    known = control(tokenizer)
    told = offsets and tokenizer.is_fast
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=told, verbose=False)
    if known.numbers.isdisjoint(encoded["input_ids"]):
        return Encoded(encoded["input_ids"], encoded["offset_mapping"] if told else None)
    if tokenizer.is_fast:
        read = known.twin.encode(text, add_special_tokens=False)
        return Encoded(read.ids, read.offsets)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if known.numbers - {tokenizer.unk_token_id} & set(ids):
        raise ValueError(f"{type(tokenizer).__name__} reads control tokens in a text that holds their letters: load the fast one")
    return Encoded(ids, None)


def encode_marked(tokenizer: PreTrainedTokenizerBase, marked: str, marks: Marks) -> list[int]:
    """A text whose control tokens are meant, but for those between marks."""
    known = control(tokenizer)
    if marks.start not in marked and marks.end not in marked:
        ids = tokenizer.encode(marked, add_special_tokens=False)
        if [number for number in ids if number in known.numbers] == [known.ids[each] for each in known.pattern.findall(marked)]:
            return ids
    pieces = known.split(marked, marks)
    if tokenizer.is_fast:
        return known.twin.encode(known.renamed(pieces), add_special_tokens=False).ids
    return [number for piece, meant in pieces for number in ([known.ids[piece]] if meant else encode_text(tokenizer, piece).ids)]


def _is_sign(content: str) -> bool:
    """Neither blanks nor a word: what stands in a template as a mark."""
    return not content.isspace() and not content.strip().isalnum()

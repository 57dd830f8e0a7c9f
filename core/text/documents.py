"""Documents: names, normal form, content hash, and windows over their tokens.

In: strings from a parser or a caller. Out: a `Document`, whose text is in normal form and whose content hash follows from title
and text alone, and `Window`s: `windows` and `windows_at_borders` to read a document in parts, `segments` to train on it. Knows
nothing of tokenizers (windows count tokens, whoever made them), files or the store. Cost: one pass over the text, about 10 ms a
megabyte.
"""

import hashlib
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

NORMALISER = "nfc-1"
"""Name of `normalise`'s rules. It bears identity: whoever changes a rule changes the name, and adapters are made anew."""

MAX_BYTES = {"tenant": 128, "collection": 256, "name": 1024, "title": 4096}
"""Longest names, in bytes of UTF-8."""


def normalise(text: str) -> str:
    """The form in which a text is hashed, stored and shown to a model; idempotent.

    Unicode NFC; CR LF and CR become LF; NUL becomes a space (as LIFT's released code does before tokenising); blanks at the end
    of lines and of the text go. Raises `ValueError` for half a surrogate pair, which no UTF-8 file can hold.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", " ")
    text = "\n".join(line.rstrip() for line in nfc(text).split("\n")).rstrip()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not Unicode at character {error.start}: decode the file with its true encoding") from None
    return text


def nfc(text: str) -> str:
    """The one spelling under which text and names are kept, however a file system or an editor spells them."""
    return unicodedata.normalize("NFC", text)


def clean_name(what: str, value: str) -> str:
    """A tenant, collection or document name in NFC (`nfc`).

    Any Unicode is welcome, slashes and colons too; names never become paths. Raises `ValueError`, speaking of `what`, for an
    empty or overlong name (`MAX_BYTES`) and for control characters, line separators and surrogates.
    """
    value = nfc(value)
    if not value.strip():
        raise ValueError(f"the {what} is empty: give it a name")
    _check_characters(what, value)
    return value


def _check_characters(what: str, value: str) -> None:
    if (size := len(value.encode(errors="surrogatepass"))) > MAX_BYTES[what]:
        raise ValueError(f"the {what} {value[:80]!r}... has {size} bytes: {MAX_BYTES[what]} are allowed")
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ValueError(f"the {what} {value[:80]!r} holds {character!r}: remove control characters and line breaks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A document of a tenant's collection, in normal form however it was built.

    `title` is one line, blanks collapsed, and may be empty. `content_hash` is SHA-256 (hex) over title and text: an edit of
    either makes other content, and equal content has one hash whatever its name. Raises `ValueError` for an empty text and for
    names that `clean_name` refuses.
    """

    tenant: str
    collection: str
    name: str
    text: str
    title: str = ""
    content_hash: str = field(init=False)

    def __post_init__(self) -> None:
        for what in ("tenant", "collection", "name"):
            object.__setattr__(self, what, clean_name(what, getattr(self, what)))
        title = " ".join(normalise(self.title).split())
        _check_characters("title", title)
        try:
            text = normalise(self.text)
        except ValueError as error:
            raise ValueError(f"document {self.name!r}: {error}") from None
        if not text:
            raise ValueError(f"document {self.name!r} has no text: leave it out")
        object.__setattr__(self, "title", title)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "content_hash", content_hash(title, text))


def content_hash(title: str, text: str) -> str:
    """SHA-256 (hex) of both in UTF-8, the title behind its length: no other pair gives the same bytes."""
    title_bytes = title.encode()
    return hashlib.sha256(len(title_bytes).to_bytes(8, "little") + title_bytes + text.encode()).hexdigest()


class Window(NamedTuple):
    """Tokens `start` to `end` of a document, `end` excluded."""

    start: int
    end: int


def windows(length: int, limit: int, overlap: int = 0) -> list[Window]:
    """The fewest windows of at most `limit` tokens that cover a document of `length` tokens, neighbours sharing `overlap`.

    Their sizes differ by one token at most, longer ones first, so that no window is a tail too small to mean anything. An empty
    document has none. Raises `ValueError` unless `0 <= overlap < limit` and `length >= 0`.
    """
    _check_windows(length, limit, overlap)
    if length == 0:
        return []
    count = _fewest(length, limit, overlap)
    size, longer = divmod(length + (count - 1) * overlap, count)
    covers, start = [], 0
    for index in range(count):
        end = start + size + (index < longer)
        covers.append(Window(start, end))
        start = end - overlap
    return covers


def windows_at_borders(
    length: int, limit: int, overlap: int = 0, sentences: Sequence[int] = (), paragraphs: Sequence[int] = ()
) -> list[Window]:
    """Windows of at most `limit` tokens that cover a document of `length` tokens and end where a sentence does.

    sentences: the tokens that begin one, rising; paragraphs: those of them that begin a paragraph (`core.text.tokens`). Each cut
    seeks the even one of what is left: the nearest paragraph's border, if that is no further than a quarter of a window, else the
    nearest sentence's. Only a sentence longer than a window is cut, evenly. Neighbours share at most `overlap` tokens: as many
    whole sentences as there is room for; within a cut sentence just so many tokens. Raises as `windows` does.
    """
    _check_windows(length, limit, overlap)
    covers: list[Window] = []
    borders = [*sentences, length]
    start = end = 0
    while length - start > limit:
        count = _fewest(length - start, limit, overlap)
        size = -(-(length - start + (count - 1) * overlap) // count)
        even, reach = start + size, start + limit
        near = [each for each in _between(paragraphs, end, reach) if abs(each - even) <= size / 4]
        end = min(near or _between(borders, end, reach), key=lambda border: abs(border - even), default=even)
        covers.append(Window(start, end))
        following = borders[bisect_right(borders, end)]
        earliest = max(end - overlap, start + 1, following - limit if following - limit <= end else 0)
        shared = bisect_left(borders, earliest)
        start = borders[shared] if borders[shared] <= end else earliest
    return [*covers, Window(start, length)] if length else []


def _between(borders: Sequence[int], after: int, last: int) -> Sequence[int]:
    return borders[bisect_right(borders, after) : bisect_right(borders, last)]


def _fewest(length: int, limit: int, overlap: int) -> int:
    return max(1, -(-(length - overlap) // (limit - overlap)))


def _check_windows(length: int, limit: int, overlap: int) -> None:
    if length < 0:
        raise ValueError(f"length is {length}: give 0 or more tokens")
    if not 0 <= overlap < limit:
        raise ValueError(f"limit is {limit} and overlap {overlap}: the overlap must be 0 or more and below the limit")


SegmentRule = Literal["exact", "released"]


def segments(length: int, size: int, stride: int, rule: SegmentRule = "exact") -> list[Window]:
    """Windows of `size` tokens, one every `stride`, that cover a document of `length` tokens (LIFT v1, section 3).

    exact: the first that reaches the last token is the last, so each brings tokens that none before it had, and none is shorter
    than `size - stride` but for a document that is. released: the public code's loop, which goes on to start one at every stride
    below `length`; its last ones are suffixes of those before, down to one token. An empty document has none. Raises
    `ValueError` unless `1 <= stride <= size` and `length >= 0`.
    """
    if length < 0:
        raise ValueError(f"length is {length}: give 0 or more tokens")
    if not 1 <= stride <= size:
        raise ValueError(f"size is {size} and stride {stride}: the stride must be 1 or more and no larger than the size")
    covers: list[Window] = []
    for start in range(0, length, stride):
        if rule == "exact" and covers and covers[-1].end == length:
            break
        covers.append(Window(start, min(start + size, length)))
    return covers

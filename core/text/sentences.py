# ruff: noqa: RUF001 - quotation marks and terminators of several scripts are what this file is about
"""Sentences of a plain or Markdown text, with their offsets.

In: any string. Out: `Span`s in order, disjoint, without blanks at their ends, each with a letter or digit in it. A list item, a
heading, a table row and a line of code are sentences of their own, their markers left out; hard-wrapped lines of a paragraph
belong together. Every letter and digit of the text lies in exactly one span, except list numbers and fence lines.

By rule, hence deterministic and without a model: a terminator ends a sentence unless what stands before it is an abbreviation
or what follows goes on in lower case. Abbreviations are English; terminators are those of Latin, Greek, Chinese, Japanese,
Hindi, Arabic and Urdu writing. Costs about 1 s for 10 MB.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_SENTENCE_CHARACTERS = 1000
"""What runs on for longer without a terminator (logs, tables) is cut at a blank."""

WRAPPED_LINE_CHARACTERS = 50
"""A line this long that ends without a terminator was wrapped; a shorter one is a heading or an entry of its own."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = _words(
    """a about above after again against all also although am an and any are as at be because been before being below between both
    but by can could did do does doing down during each either every everybody everyone everything few for from further had has
    have having he her here hers herself him himself his how however i if in into is it its itself just may me might more most
    must my myself neither never no nobody nor not nothing now of off often on once one only or other our ours out over own same
    shall she should since so some somebody someone something such than that the their theirs them themselves then there these
    they this those though through thus to too under until up upon us very was we were what when where whether which while who
    whom whose why will with within without would yet you your yours"""
)
"""English words that carry structure rather than content, in lower case."""

_BEFORE_NAMES = _words("mr mrs ms dr prof rev fr st mt gen col capt lt sgt gov sen rep hon pres messrs mme mlle e.g i.e cf vs")
_BEFORE_NUMBERS = _words("no nos nr fig figs vol p pp art sec ch eq jan feb mar apr jun jul aug sep sept oct nov dec")
_OFTEN_INSIDE = _words("etc inc ltd co corp bros jr sr approx dept est al ca univ assn")

_FENCE = re.compile(r"[ \t]*(?:```|~~~)")
_MARKER = re.compile(r"[ \t]*(?:>[ \t]*)*(?:(?:[-*+•–—]|\d{1,3}[.)])[ \t]+(?:\[[ xX]\][ \t]+)?|#{1,6}[ \t]+|\|[ \t]*)?")
_ENDED = re.compile(r"[.!?…。！？।؟۔][\"'”’»)\]*_」』）]*[ \t]*\Z")
_BOUNDARY = re.compile(r"(?<![.!?…।؟۔])[.!?…।؟۔]++[\"'”’»)\]*_]*+(?=\s)|[。！？]++[”’」』）]*+")
_WORD_BEFORE = re.compile(r"[^\W_](?:[\w.]*\w)?\Z")
_NEXT_WORD = re.compile(r"[\s\"'“‘«(\[*_「『（¿¡]*(\w+)?")
_SOLID = re.compile(r"[^\W_]")


class Span(NamedTuple):
    """Characters `start` to `end` of a text, `end` excluded."""

    start: int
    end: int


def sentences(text: str) -> list[Span]:
    """The sentences of `text` in order."""
    return [span for block in _blocks(text) for span in _split(text, block)]


def _blocks(text: str) -> Iterator[Span]:
    """Paragraphs, list items, headings, table rows and lines of code: no sentence crosses their borders."""
    block: Span | None = None
    in_code = whole_line = False
    last = ""
    for match in re.finditer(r"[^\n]+|\n(?=\n)", text):
        line = match.group()
        fence = _FENCE.match(line) is not None
        marker = None if fence or in_code else _MARKER.match(line)
        marker_end = marker.end() if marker else 0
        marked = bool(line[:marker_end].strip())
        in_code ^= fence
        wordless = fence or not _SOLID.search(line, marker_end)
        if block and not (wordless or marked or whole_line) and _goes_on(last, line):
            block = Span(block.start, match.end())
        else:
            if block:
                yield block
            block = None if wordless else Span(match.start() + marker_end, match.end())
            whole_line = in_code or line.lstrip().startswith(("#", "|"))
        last = line
    if block:
        yield block


def _goes_on(last: str, line: str) -> bool:
    """Whether a plain line continues the paragraph whose last line is `last`."""
    if len(last) >= WRAPPED_LINE_CHARACTERS or line.lstrip()[:1].islower():
        return True
    words = last.split()
    return words[-1].endswith(",") or words[-1].lower() in FUNCTION_WORDS or _ENDED.search(last) is not None


def _split(text: str, block: Span) -> Iterator[Span]:
    start = block.start
    for match in _BOUNDARY.finditer(text, *block):
        if _ends(text, match, block.end):
            yield from _bounded(text, start, match.end())
            start = match.end()
    yield from _bounded(text, start, block.end)


def _ends(text: str, boundary: re.Match[str], limit: int) -> bool:
    following = _NEXT_WORD.match(text, boundary.end(), limit)
    assert following, "the pattern matches the empty string"
    word_after = following[1] or ""
    if word_after[:1].islower():
        return False
    if boundary.group() != ".":
        return True
    before = _WORD_BEFORE.search(text, max(0, boundary.start() - 20), boundary.start())
    word = before.group().lower() if before else ""
    if word in _BEFORE_NAMES:
        return False
    if word in _BEFORE_NUMBERS:
        return not word_after[:1].isdigit()
    letters = ("." in word and not word[0].isdigit()) or (len(word) == 1 and word.isalpha())
    if letters or word in _OFTEN_INSIDE:
        return word_after.lower() in FUNCTION_WORDS
    return True


def _bounded(text: str, start: int, end: int) -> Iterator[Span]:
    """`start` to `end` without outer blanks, in pieces of at most `MAX_SENTENCE_CHARACTERS`; wordless ones are left out."""
    while start < end:
        stop = end
        if end - start > MAX_SENTENCE_CHARACTERS:
            stop = start + MAX_SENTENCE_CHARACTERS
            blank = max(text.rfind(blank, start, stop) for blank in " \n\t")
            stop = blank if blank > start else stop
        piece = text[start:stop]
        if _SOLID.search(piece):
            yield Span(start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip()))
        start = stop if stop == end or not text[stop].isspace() else stop + 1

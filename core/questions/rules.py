"""Document -> passages to ask about, and question-answer pairs by rule.

In: a `Document`. Out: `Pair`s in document order, each answer a verbatim part of the text (white space collapsed), or `Passage`s
for a language model to read (core.questions.endpoint, core.questions.stream). LIFT trains on such pairs (arXiv 2502.14644: v1
windows of 16 sentences with evidence, section on auxiliary tasks; v4 every sentence behind up to 2048 characters).

The rules need no model: gaps in place of quoted spans, numbers, names and the content words at a sentence's end, and which
sentence follows which. A question keeps the rest of its sentence, so that it says whom it is about; where that holds no name,
the title or the sentence before leads in; gaps that two sentences fill differently are left out. The rules read the look of
words only (English function words, capitals, digits) and know nothing of meaning. Costs about 0.4 ms a sentence.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from core.config import Section, digest
from core.text.documents import Document
from core.text.sentences import FUNCTION_WORDS, Span, sentences

Kind = Literal["cloze", "order", "written"]

RULES_VERSION = "rules-1"
"""Name of the rules. It bears identity: whoever changes a rule or a phrasing changes the name."""


class Pair(NamedTuple):
    """A question on a document and its answer.

    `evidence` stands in the document, white space collapsed; `start` to `end` are the characters of the document's text that
    were asked about. `cloze` and `order` come from rules, `written` from a language model.
    """

    question: str
    answer: str
    evidence: str
    kind: Kind
    start: int
    end: int


class Passage(NamedTuple):
    """What a language model is shown: `text[context_start:start]` as context, `text[start:end]` to ask about."""

    context_start: int
    start: int
    end: int


class RuleSettings(Section):
    """How many questions the rules write."""

    pairs: Annotated[int, Field(ge=1, le=20)] = 4
    """Most gaps of a sentence."""
    order_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of sentences that are also asked for the one that follows."""
    max_answer_characters: Annotated[int, Field(ge=1)] = 200
    seed: int = 0


def sentence_passages(text: str, context_characters: int) -> list[Passage]:
    """A passage for each sentence, behind up to `context_characters` of what precedes it, cut at a blank."""
    passages = []
    for start, end in sentences(text):
        context_start = max(0, start - context_characters)
        if context_start and not text[context_start - 1].isspace():
            blank = re.compile(r"\s").search(text, context_start, start)
            context_start = blank.end() if blank else start
        passages.append(Passage(context_start, start, end))
    return passages


def window_passages(text: str, sentences_each: int, count: int, seed: int) -> list[Passage]:
    """Up to `count` different windows of `sentences_each` sentences in document order, drawn by the seed.

    A text with fewer sentences is one window; a text without any has none.
    """
    spans = sentences(text)
    if not spans:
        return []
    starts = range(max(1, len(spans) - sentences_each + 1))
    drawn = sorted(random.Random(seed).sample(starts, min(count, len(starts))))
    return [Passage(spans[i].start, spans[i].start, spans[min(i + sentences_each, len(spans)) - 1].end) for i in drawn]


def collapse_blanks(text: str) -> str:
    """The text with each run of white space as one space, none at its ends."""
    return " ".join(text.split())


# Rules

BLANK = "____"
GAP_FRAMES = (
    "Fill in the gap: {quoted}",
    "Which words are missing from {quoted}?",
    "What belongs in the blank of {quoted}?",
    "The text reads {quoted} What was left out?",
    "Restore what is missing here: {quoted}",
)
END_FRAMES = (
    "How does this sentence end: {quoted}?",
    "Finish the sentence {quoted}",
    "Complete this line of the text: {quoted}",
    "{left} what?",
    "{left} ... which word or words come next?",
)
START_FRAMES = ("Who or what {right}?", "Of whom or what does the text say: {quoted}?", "Which name begins this line: {quoted}?")
NEXT_FRAMES = (
    "Which sentence comes right after {quoted}?",
    "How does the text go on after {quoted}?",
    "Give the sentence that follows {quoted}",
)
FIRST_FRAMES = ("Which of these comes first in the text: {quoted} or {other}?", "Which stands earlier: {quoted} or {other}?")

_PRONOUNS = {"he", "she", "it", "they", "him", "her", "them", "his", "hers", "its", "their", "theirs", "this", "these"}
_IN_NAMES = {"of", "de", "von", "van", "der", "den", "di", "da", "du", "la", "le", "el", "bin", "al"}
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")  # noqa: RUF001
_QUOTED = re.compile(r"[“\"«]([^“”\"«»]{2,80})[”\"»]")
_NUMBER = re.compile(r"(?<![\w.,:/-])[$€£]?\d+(?:[.,:/]\d+)*%?(?!\w)")
_SHORT_WORD = 3


class _Gap(NamedTuple):
    """A span of a sentence that could be asked for; those of lower `rank` first."""

    rank: int
    start: int
    end: int


def write_by_rules(document: Document, settings: RuleSettings | None = None) -> list[Pair]:
    """Pairs on every sentence in document order; the content hash and the seed decide every draw."""
    settings = settings or RuleSettings()
    spans = sentences(document.text)
    texts = [collapse_blanks(document.text[start:end]) for start, end in spans]
    counts = Counter(texts)
    names = _known_names(texts, document.title)
    clozes: list[list[tuple[str, str, str, str]]] = []
    answers: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for index, sentence in enumerate(texts):
        clozes.append([])
        for _, start, end in _gaps(sentence, names):
            left, answer, right = sentence[:start], sentence[start:end], sentence[end:]
            lead = _lead(left + right, answer, document.title, texts[index - 1] if index else "", names)
            if len(answer) <= settings.max_answer_characters and lead is not None and not _holds(left + BLANK + right, answer):
                clozes[-1].append((lead, left, right, answer))
                answers[_key(lead, left, right)].add(answer.casefold())
    pairs = []
    for index, (span, sentence) in enumerate(zip(spans, texts, strict=True)):
        seed = digest([RULES_VERSION, settings.seed, document.content_hash, index])
        draw = random.Random(int(seed[:16], 16))
        clear = [cloze for cloze in clozes[index] if len(answers[_key(*cloze[:3])]) == 1]
        for lead, left, right, answer in clear[: settings.pairs]:
            pairs.append(Pair(lead + _gap_question(draw, left, right), answer, sentence, "cloze", *span))
        two = texts[index : index + 2]
        clear_order = len(two) == 2 and all(counts[text] == 1 and len(text) <= settings.max_answer_characters for text in two)
        if draw.random() < settings.order_share and clear_order:
            pairs.extend(_order_pairs(draw, span, sentence, spans[index + 1], two[1]))
    return pairs


def _key(lead: str, left: str, right: str) -> tuple[str, str, str]:
    return lead.casefold(), left.casefold(), right.casefold()


def _known_names(texts: Sequence[str], title: str) -> frozenset[str]:
    """Words that are capitalised inside some sentence or in the title: at a sentence's start, a capital alone says nothing."""
    inside = (match.group() for text in texts for match in list(_WORD.finditer(text))[1:])
    words = {word for word in (*inside, *_WORD.findall(title)) if word[0].isupper()}
    return frozenset(word for word in words if word.lower() not in FUNCTION_WORDS)


def _names(sentence: str, known: frozenset[str]) -> Iterator[Span]:
    """Runs of capitalised words, joined by "of", "van" and the like between two of them; an unknown first word is left out."""
    run: list[re.Match[str]] = []
    words = list(_WORD.finditer(sentence))
    for position, word in enumerate(words):
        capital = word.group()[0].isupper() and word.group().lower() not in FUNCTION_WORDS
        follower = words[position + 1].group() if position + 1 < len(words) else ""
        joins = bool(run) and word.group() in _IN_NAMES and follower[:1].isupper() and follower.lower() not in FUNCTION_WORDS
        adjacent = not run or sentence[run[-1].end() : word.start()] == " "
        if run and not (adjacent and (capital or joins)):
            yield from _name(run, known)
            run = []
        if capital or (joins and adjacent):
            run.append(word)
    yield from _name(run, known)


def _name(run: Sequence[re.Match[str]], known: frozenset[str]) -> Iterator[Span]:
    if run and run[-1].group() in _IN_NAMES:
        run = run[:-1]
    if run and not run[0].start() and run[0].group() not in known:
        run = run[1:]
    if run:
        yield Span(run[0].start(), run[-1].end())


def _gaps(sentence: str, known: frozenset[str]) -> list[_Gap]:
    """What can be asked for: quoted spans, numbers, the content words at the end, names; failing all of them, longer words."""
    words = list(_WORD.finditer(sentence))
    if len(words) < 3:
        return []
    ranked = [_Gap(0, *match.span(1)) for match in _QUOTED.finditer(sentence) if _WORD.search(match[1])]
    ranked += [_Gap(1, *match.span()) for match in _NUMBER.finditer(sentence)]
    last = len(words) - 1
    if words[last].group().lower() not in FUNCTION_WORDS:
        ranked.append(_Gap(2, *words[last].span()))
        first = last
        while first and sentence[words[first - 1].end() : words[first].start()] == " " and _plain(words[first - 1].group()):
            first -= 1
        if 1 <= last - first <= 2 and words[last].group()[0].islower():
            ranked.append(_Gap(4, words[first].start(), words[last].end()))
    ranked += [_Gap(3, *span) for span in _names(sentence, known)]
    if not ranked:
        ranked = [_Gap(5, *word.span()) for word in words[1:last] if _plain(word.group()) and len(word.group()) > _SHORT_WORD]
    by_span: dict[tuple[int, int], _Gap] = {}
    for gap in sorted(ranked):
        by_span.setdefault((gap.start, gap.end), gap)
    return list(by_span.values())


def _plain(word: str) -> bool:
    return word[0].islower() and word not in FUNCTION_WORDS


def _lead(rest: str, answer: str, title: str, before: str, names: frozenset[str]) -> str | None:
    """What must stand before a question whose own words do not say whom it is about; None where nothing can tell."""
    if next(_names(rest, names), None):
        return ""
    if title and not _holds(title, answer):
        return f"About {title}: "
    words = [word.lower() for word in _WORD.findall(rest)]
    if sum(word not in FUNCTION_WORDS for word in words) > 1 and not _PRONOUNS.intersection(words):
        return ""
    if before and not _holds(before, answer):
        return f"Right after {_quote(before)} the text goes on. "
    return None


def _holds(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as whole words, in any case: the question would give it away."""
    text, answer = text.casefold(), answer.casefold()
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        if not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum()):
            return True
        start = text.find(answer, start + 1)
    return False


def _gap_question(draw: random.Random, left: str, right: str) -> str:
    at_end, at_start = not _WORD.search(right), not _WORD.search(left)
    choice = draw.random()
    if at_end and choice < 0.6:
        return draw.choice(END_FRAMES).format(quoted=_quote(f"{left.rstrip()} ..."), left=left.rstrip(" \"'“«("))
    if at_start and choice < 0.6:
        verb = right.strip().rstrip('.!?…"”»')
        return draw.choice(START_FRAMES).format(quoted=_quote(f"... {verb}"), right=verb)
    return draw.choice(GAP_FRAMES).format(quoted=_quote(f"{left}{BLANK}{right}"))


def _order_pairs(draw: random.Random, span: Span, here: str, next_span: Span, following: str) -> Iterator[Pair]:
    """Which sentence follows this one, and which of the two is first."""
    yield Pair(draw.choice(NEXT_FRAMES).format(quoted=_quote(here)), following, following, "order", *next_span)
    shown = draw.sample([here, following], 2)
    question = draw.choice(FIRST_FRAMES).format(quoted=_quote(shown[0]), other=_quote(shown[1]))
    yield Pair(question, here, here, "order", *span)


def _quote(text: str) -> str:
    return f"“{text}”" if '"' in text else f'"{text}"'

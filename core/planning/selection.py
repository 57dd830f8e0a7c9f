"""Which rows of a table of figures: `quality < 0.8 or demand > 100`, parsed by hand, never evaluated as code.

In: an expression, and the columns that it may name. Out: a `Selection` that says of a row whether it is meant. The grammar:

    any     = all ("or" all)*
    all     = one ("and" one)*
    one     = "not" one | "(" any ")" | value ("<" | "<=" | ">" | ">=" | "==" | "!=") value
    value   = a number | a column

A figure that is not known (None, NaN) makes its comparison neither true nor false (Kleene's logic), and only rows that are
surely meant are selected: `not quality >= 0.8` leaves out documents whose quality nobody measured. Knows nothing of stores.
Costs microseconds a row.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

Row = Mapping[str, float | None]
Truth = bool | None

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?!\w)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[<>=!]=?|[()]))"
)
_WORDS = ("and", "or", "not")
MOST_DEPTH = 50


@dataclass(frozen=True)
class Selection:
    """A parsed expression; `columns` are those that it names."""

    text: str
    columns: frozenset[str]
    _truth: Callable[[Row], Truth]

    def matches(self, row: Row) -> bool:
        """Whether the row is surely meant. Raises `KeyError` for a row without one of `columns`."""
        return self._truth(row) is True


def parse_selection(text: str, columns: Collection[str]) -> Selection:
    """Reads an expression over `columns`. Raises `ValueError` that says where it cannot be read, and what is accepted there."""
    return _Parser(text, columns).selection()


@dataclass(frozen=True)
class _Token:
    text: str
    kind: str
    place: int


class _Parser:
    """Recursive descent; each method reads one rule of the grammar."""

    def __init__(self, text: str, columns: Collection[str]) -> None:
        self._text = text
        self._columns = columns
        self._named: set[str] = set()
        self._tokens = list(self._read())
        self._next = 0
        self._depth = 0

    def _read(self) -> list[_Token]:
        tokens, place, end = [], 0, len(self._text.rstrip())
        while place < end:
            found = _TOKEN.match(self._text, place)
            if found is None:
                start = place + len(self._text[place:]) - len(self._text[place:].lstrip())
                raise self._fault(start, f"cannot read {self._text[start]!r}")
            assert found.lastgroup is not None
            tokens.append(_Token(found[found.lastgroup], found.lastgroup, found.start(found.lastgroup)))
            place = found.end()
        return tokens

    def selection(self) -> Selection:
        truth = self._any()
        if (token := self._peek()) is not None:
            raise self._fault(token.place, f"expected 'and', 'or' or the end, found {token.text!r}")
        return Selection(self._text, frozenset(self._named), truth)

    def _any(self) -> Callable[[Row], Truth]:
        terms = [self._all()]
        while self._take("or"):
            terms.append(self._all())
        return lambda row: _joined([term(row) for term in terms], True)

    def _all(self) -> Callable[[Row], Truth]:
        terms = [self._one()]
        while self._take("and"):
            terms.append(self._one())
        return lambda row: _joined([term(row) for term in terms], False)

    def _one(self) -> Callable[[Row], Truth]:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise ValueError(f"the selection is nested more than {MOST_DEPTH} deep: write it flatter")
        try:
            if self._take("not"):
                inner = self._one()
                return lambda row: None if (truth := inner(row)) is None else not truth
            if self._take("("):
                inner = self._any()
                if not self._take(")"):
                    raise self._fault(self._place(), "expected ')'")
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Callable[[Row], Truth]:
        left = self._value()
        token = self._peek()
        if token is None or token.text not in _COMPARISONS:
            raise self._fault(self._place(), f"expected one of {' '.join(_COMPARISONS)}")
        self._next += 1
        right, compare = self._value(), _COMPARISONS[token.text]

        def truth(row: Row) -> Truth:
            a, b = left(row), right(row)
            return None if a is None or b is None or math.isnan(a) or math.isnan(b) else compare(a, b)

        return truth

    def _value(self) -> Callable[[Row], float | None]:
        token = self._peek()
        if token is None or token.kind == "sign" or token.text in _WORDS:
            raise self._fault(self._place(), f"expected a number or one of {', '.join(sorted(self._columns))}")
        self._next += 1
        if token.kind == "number":
            number = float(token.text)
            return lambda row: number
        if token.text not in self._columns:
            raise self._fault(token.place, f"no figure is called {token.text!r}: choose from {', '.join(sorted(self._columns))}")
        self._named.add(token.text)
        return lambda row: row[token.text]

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _place(self) -> int:
        token = self._peek()
        return len(self._text) if token is None else token.place

    def _take(self, text: str) -> bool:
        token = self._peek()
        if token is None or token.text != text:
            return False
        self._next += 1
        return True

    def _fault(self, place: int, what: str) -> ValueError:
        return ValueError(f"the selection {self._text!r} cannot be read at character {place + 1}: {what}")


def _joined(truths: list[Truth], decisive: bool) -> Truth:
    """Kleene's or (decisive True) and and (decisive False)."""
    if decisive in truths:
        return decisive
    return None if None in truths else not decisive

"""The text of a page as it grows: line breaks, blanks and signs, as a browser would show them.

In: words, borders and signs in the order of the page (`core.text.pages` knows the elements that they come from). Out: a string.
Raises `Refused` for more text than a document may have.
"""

from core.text.decoding import Refused

SMALL = {
    "sup": str.maketrans("0123456789+-\N{MINUS SIGN}=()", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾"),
    "sub": str.maketrans("0123456789+-\N{MINUS SIGN}=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎"),
}
NOTES = "([*†‡§¶#®™℠°\N{PRIME}\N{DOUBLE PRIME}'\""
ORDINALS = frozenset({"st", "nd", "rd", "th"})


class PageText:
    """Text with the line breaks that a browser would show; blanks collapsed, but for `pre`.

    Signs (a bullet, the border of a cell) wait for the text that they stand before: without any they go.
    """

    def __init__(self, max_characters: int) -> None:
        self._parts: list[str] = []
        self._breaks, self._blank, self._apart, self.room = 0, False, False, max_characters
        self._signs: list[tuple[int, str]] = []
        self._items: list[tuple[int, int]] = []
        self._shown = 0
        self.led_by_blank = False

    def border(self, breaks: int) -> None:
        if not self._signs:
            self._breaks = max(self._breaks, breaks)

    def line(self) -> None:
        """The end of a line; the second one in a row ends a paragraph."""
        if not self._signs:
            self._breaks = min(self._breaks + 1, 2)

    def apart(self) -> None:
        """What comes next is no part of the word before."""
        self._apart = True

    def begin(self) -> None:
        """An item or a row: signs that still wait at its end are its own, and go with it."""
        self._items.append((self._shown, len(self._signs)))

    def end(self) -> None:
        shown, waiting = self._items.pop()
        kept = waiting if shown == self._shown else 0
        self._breaks = max((breaks for breaks, _ in self._signs[kept:]), default=self._breaks)
        del self._signs[kept:]

    def sign(self, sign: str, inline: bool = False) -> None:
        self._signs.append((0 if inline else self._breaks, sign))
        self._breaks, self._blank = 0, False

    def end_cell(self) -> None:
        self._breaks, self._blank = 0, True

    def mark(self, sign: str) -> None:
        """A sign between texts: no blank after it, nor before it but for what opens."""
        if sign:
            self._blank &= sign[0] in "(√"
            self._add(sign)

    def words(self, text: str) -> None:
        words = text.split()
        if not words:
            self._blank = True
            return
        self._blank |= text[0].isspace()
        self._add(" ".join(words))
        self._blank = text[-1].isspace()

    def verbatim(self, text: str) -> None:
        if text:
            self._add(text)

    def small(self, tag: str, inner: "PageText") -> None:
        """Raised or lowered text: digits and signs as Unicode has them, letters as ^(n) or _(n); [1] and * as they are."""
        text = " ".join(str(inner).split())
        self._blank |= inner.led_by_blank or (not text and inner._blank)
        if not text:
            return
        glued = bool(self._parts) and not (self._signs or self._breaks or self._blank)
        last = self._parts[-1][-1:] if self._parts else ""
        table, edges = SMALL[tag], text[0] + text[-1]
        if all(ord(character) in table for character in text):
            self._add(text.translate(table))
        elif not glued or (tag == "sup" and text.lower() in ORDINALS and last.isdigit()):
            self._add(text)
            self._apart = True
        elif edges[0] in NOTES and not edges[1].isalnum():
            self._add(text)
        else:
            self._add(f"{'^' if tag == 'sup' else '_'}({text})")
        self._blank = inner._blank

    def _add(self, text: str) -> None:
        if self._signs:
            for breaks, sign in self._signs:
                self._parts.append(("\n" * breaks if self._parts else "") + sign)
            self._signs = []
        elif self._parts:
            joined = self._apart and text[0].isalnum() and self._parts[-1][-1:].isalnum()
            self._parts.append("\n" * self._breaks or (" " if self._blank or joined else ""))
        else:
            self.led_by_blank = self._blank
        self._parts.append(text)
        self._breaks, self._blank, self._apart = 0, False, False
        self._shown += 1
        self.room -= len(text)
        if self.room < 0:
            raise Refused("too large: too much text")

    def __str__(self) -> str:
        return "".join(self._parts)

"""A JSON text of any size -> its documents, one at a time: the elements of its array, or its values one after the other.

In: a function that reads bytes of UTF-8. Out: the bytes of each value, which need not be JSON: only quotes and brackets are
looked at, so that one broken element harms no other. Holds one value and `CHUNK_BYTES`; of a value above the limit nothing.
"""

import re
from collections.abc import Callable, Iterator

from core.text.decoding import Refused

CHUNK_BYTES = 64 * 2**10
_STRUCTURE, _IN_STRING = re.compile(rb'["{}\[\],]'), re.compile(rb'["\\]')


def values(read: Callable[[int], bytes], limit: int) -> Iterator[tuple[bytes, bool, bool]]:
    """Each value, whether that is all of it (false above `limit` bytes), and whether it is an array's element.

    Raises `Refused` where the text ends within a value or the array.
    """
    value, whole, depth, listed, begun, quoted, escaped = bytearray(), True, 0, False, False, False, False

    def taken(piece: bytes) -> Iterator[tuple[bytes, bool, bool]]:
        nonlocal whole
        keep(piece)
        if value.strip() or not whole:
            yield bytes(value), whole, listed
        value.clear()
        whole = True

    def keep(piece: bytes) -> None:
        nonlocal whole
        whole = whole and len(value) + len(piece) <= limit
        if whole:
            value.extend(piece)
        else:
            value.clear()

    while chunk := read(CHUNK_BYTES):
        start, place, escaped = 0, int(escaped), False
        while found := (_IN_STRING if quoted else _STRUCTURE).search(chunk, place):
            sign, place = found[0], found.end()
            if quoted:
                quoted = sign != b'"'
                if sign == b"\\":
                    place, escaped = place + 1, place == len(chunk)
                continue
            if not begun:
                begun, listed = True, sign == b"["
                if listed:
                    start = place
                    continue
            if sign == b'"':
                quoted = True
            elif sign in b"{[":
                depth += 1
            elif sign in b"}]" and depth:
                depth -= 1
                if not depth:
                    yield from taken(chunk[start:place])
                    start = place
            elif not depth:
                yield from taken(chunk[start : place - 1])
                start, listed = place, listed and sign != b"]"
        keep(chunk[start:])
    if depth or quoted or listed:
        raise Refused("not JSON: the file ends within a value; it was cut short, or quotes or brackets are missing")
    yield from taken(b"")

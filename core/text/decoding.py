"""Bytes of a text file -> its text, whatever its encoding.

In: bytes, and perhaps the encoding that they are said to have. Out: text, or `Refused` with the reason. Knows nothing of formats.
Linear time; foreign code (chardet) only for what is not Unicode.
"""

import codecs

SAMPLE_BYTES = 64 * 2**10
MAX_TITLE_CHARACTERS = 1000

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b"))


class Refused(Exception):
    """Ends the parsing of a file; its text is the reason."""


def decode(data: bytes, declared: str = "") -> str:
    """Text of bytes in whatever encoding: its byte order mark's, the declared one, UTF-8, UTF-16, or a guess.

    Text that is UTF-8 but for a byte here and there keeps its letters, with U+FFFD for what is broken. Raises `Refused` for bytes
    that are no text.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            declared = name
            break
    if declared and (text := _decoded(data, declared)) is not None:
        return _checked(text)
    if b"\0" in data:
        return _checked(_utf16(data))
    if _is_binary(data):
        raise Refused("binary")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return _nearly_utf8(data) or _guessed(data)


def _decoded(data: bytes, name: str) -> str | None:
    try:
        return data.decode(name)
    except (UnicodeDecodeError, LookupError):
        return None


def _checked(text: str) -> str:
    if "\0" in text or _is_binary(text[:SAMPLE_BYTES].encode(errors="replace")):
        raise Refused("binary")
    return text


def _is_binary(data: bytes) -> bool:
    """More than one byte in twenty is a control character that no text has."""
    return 20 * (len(data) - len(data.translate(None, _CONTROL))) > len(data)


def _utf16(data: bytes) -> str:
    """UTF-16 without a mark: where it is mostly of one byte's characters, every second byte is zero."""
    head = data[: SAMPLE_BYTES - 2]
    for name, zeros, others in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if 2 * zeros.count(0) > len(zeros) and 0 not in others and (text := _decoded(data, name)) is not None:
            return text
    raise Refused("binary")


def _nearly_utf8(data: bytes) -> str | None:
    """UTF-8 with at most one broken place in ten letters beyond ASCII."""
    text = data.decode(errors="replace")
    beyond = len(text) - len(text.encode("ascii", "ignore"))
    return text if 10 * text.count("\ufffd") <= beyond else None


def _guessed(data: bytes) -> str:
    """By the frequencies of letters, among the encodings of the web; short texts are often guessed wrong."""
    import chardet

    lines = (line for line in data.splitlines(keepends=True) if not line.isascii())
    sample = b"".join(lines)[:SAMPLE_BYTES]
    web = chardet.EncodingEra.MODERN_WEB
    name = chardet.detect(sample, encoding_era=web, prefer_superset=True, compat_names=False)["encoding"]
    text = None if name is None else _decoded(data, name)
    if text is None:
        raise Refused("unknown encoding: save the file as UTF-8")
    return text


def one_line(title: str) -> str:
    """A title as documents may have one: a line without control characters, cut at `MAX_TITLE_CHARACTERS`."""
    words = " ".join(title[: 16 * MAX_TITLE_CHARACTERS].split())
    return "".join(character for character in words if character.isprintable())[:MAX_TITLE_CHARACTERS].strip()

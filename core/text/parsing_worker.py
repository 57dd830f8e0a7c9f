"""The parsers themselves, and the process that runs them: bytes of a file -> title and text, or why there is none.

Imported, it is functions for the process of the caller (`decode`, `markdown_title`: linear time, no foreign code on UTF-8). Run
as a script by `core.text.parsing.Parser`, it is a process that answers one request after another and may be killed at any moment:

    request    `<kind> <size>` and a line feed, then the file's bytes
    answer     {"title": ..., "reason": ..., "size": ...} as a line of JSON, then the text's bytes in UTF-8; no text with a reason

It sets its own limits: memory by RLIMIT_AS, time a file by an alarm that ends the process even inside of C. It can write no file,
and of its owner's environment it has the paths of libraries alone. A fault that is not foreseen here ends it, and
`core.text.parsing` says so: there is nothing to clean up.

Foreign code: lexbor (selectolax) for HTML, PDFium (pypdfium2) for PDF, chardet for text that is not UTF-8.
Imports nothing of this project, so that it starts soon.
"""

import codecs
import io
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

FRONT_MATTER_CHARACTERS = 16_384
SAMPLE_BYTES = 64 * 2**10
META_BYTES = 1024
MAX_TITLE_CHARACTERS = 1000

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b"))
_META_CHARSET = re.compile(rb"<meta\s[^>]{0,512}?charset\s{0,16}=\s{0,16}[\"']?\s{0,16}([\w.:-]{1,40})", re.IGNORECASE)
_CHARSETS = re.compile(r"(ascii|big5|cp\d|euc_|gb|iso2022|iso8859|johab|koi8|kz1048|mac|ptcp154|shift_jis|tis|utf-(8|16|32))")
_FRONT_TITLE = re.compile(r"title[ \t]*[:=][ \t]*(\S.*)", re.IGNORECASE)
_BROKEN_WORD = re.compile("[\x02\ufffe](\r?\n)?")


class Answer(NamedTuple):
    """What a file gave: a title and a text, or a reason, whose part before the colon is one of `core.text.parsing.REASONS`."""

    title: str
    text: str
    reason: str = ""


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


def markdown_title(text: str) -> str:
    """The front matter's title (YAML or TOML, on one line), else the first heading outside of code fences, else ""."""
    lines = io.StringIO(text, newline=None)
    fence, before = "", ""
    if text.startswith(("---", "+++")):
        mark = next(lines).rstrip()
        front, held = [], 0
        for line in lines:
            if line.rstrip() == mark or (held := held + len(line)) > FRONT_MATTER_CHARACTERS:
                break
            front.append(line)
        for line in front:
            if match := _FRONT_TITLE.match(line):
                return one_line(match[1].strip().strip("\"'"))
    for line in lines:
        mark = line.lstrip()[:3]
        if mark in ("```", "~~~") and fence in ("", mark):
            fence, before = "" if fence else mark, ""
        elif not fence:
            if title := _heading(line, before):
                return one_line(title)
            before = line
    return ""


def _heading(line: str, before: str) -> str:
    """The heading that a line is (`# It #`), or that it underlines with `=`; "" where it is neither."""
    level = len(line) - len(line.lstrip("#"))
    if 1 <= level <= 6 and line[level : level + 1] in (" ", "\t"):
        inner = line[level:].strip()
        bare = inner.rstrip("#")
        return bare.strip() if not bare or bare[-1] in " \t" else inner
    return before.strip() if line.startswith("=") and not line.strip().strip("=") else ""


def one_line(title: str) -> str:
    """A title as documents may have one: a line without control characters, cut at `MAX_TITLE_CHARACTERS`."""
    words = " ".join(title[: 16 * MAX_TITLE_CHARACTERS].split())
    return "".join(character for character in words if character.isprintable())[:MAX_TITLE_CHARACTERS].strip()


SKIPPED = frozenset({
    "audio", "button", "canvas", "datalist", "embed", "head", "iframe", "map", "nav", "noscript", "object", "script", "select",
    "style", "svg", "template", "textarea", "video",
})  # fmt: skip
PARAGRAPHS = frozenset({
    "article", "aside", "blockquote", "dl", "fieldset", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
    "main", "ol", "p", "pre", "section", "table", "ul",
})  # fmt: skip
LINES = frozenset({
    "address", "br", "caption", "dd", "details", "div", "dt", "figcaption", "form", "legend", "li", "summary", "tr",
})  # fmt: skip


class _Page:
    """Text with the line breaks that a browser would show; blanks collapsed, but for `pre`."""

    def __init__(self, max_characters: int) -> None:
        self._parts: list[str] = []
        self._breaks, self._blank, self._room = 0, False, max_characters

    def border(self, breaks: int) -> None:
        self._breaks = max(self._breaks, breaks)

    def mark(self, sign: str) -> None:
        """A sign of its own, such as a list's bullet, before what comes next."""
        self._add(sign)
        self._blank = False

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

    def _add(self, text: str) -> None:
        if self._parts:
            self._parts.append("\n" * self._breaks or (" " if self._blank else ""))
        self._parts.append(text)
        self._breaks, self._blank = 0, False
        self._room -= len(text)
        if self._room < 0:
            raise Refused("too large: too much text")

    def __str__(self) -> str:
        return "".join(self._parts)


def html(data: bytes, max_characters: int) -> Answer:
    """Headings, paragraphs, list items ("- ") and table cells (" | ") of a page; navigation, forms and scripts are left out.

    The encoding is the mark's, the page's own (`<meta charset>`, read as browsers do: Latin-1 means Windows-1252), or `decode`'s.
    """
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    decoded = decode(data, _declared(data))
    try:
        tree = LexborHTMLParser(decoded)
    except SelectolaxError:
        raise MemoryError from None  # the one error that a parser of HTML can meet: any text is a page
    page = _Page(max_characters)
    for step, node in _walk(tree.body or tree.root):
        if step == "text":
            page.words(node.text_content or "")
        elif step == "verbatim":
            page.verbatim(node.text_content or "")
        elif (tag := node.tag) in PARAGRAPHS:
            page.border(2)
        elif tag in LINES:
            page.border(1)
            if tag == "li" and step == "in":
                page.mark("- ")
        elif tag in ("td", "th") and step == "in" and node.prev is not None:
            page.mark(" | ")
    head = tree.css_first("title") or tree.css_first("h1")
    return Answer("" if head is None else one_line(head.text()), str(page))


def _declared(data: bytes) -> str:
    """The encoding that a page names for itself; "" where it names none or one that is no character set."""
    if not (match := _META_CHARSET.search(data[:META_BYTES])):
        return ""
    try:
        name = codecs.lookup(match[1].decode("ascii", "replace")).name
    except LookupError:
        return ""
    if not _CHARSETS.match(name):
        return ""
    return {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "utf-16": "utf-8"}.get(name, name)


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Elements as they are entered ("in") and left ("out"), and their texts ("text", in `pre` "verbatim"), in any depth."""
    stack: list[Any] = []
    pre = 0
    node = root
    while node is not None:
        if node.is_text_node:
            yield ("verbatim" if pre else "text"), node
        elif node.is_element_node:
            yield "in", node
            if node.tag not in SKIPPED and (inner := node.child) is not None and "hidden" not in node.attributes:
                stack.append(node)
                pre += node.tag == "pre"
                node = inner
                continue
            yield "out", node
        while stack and (after := node.next) is None:
            node = stack.pop()
            pre -= node.tag == "pre"
            yield "out", node
        node = after if stack else None


def pdf(data: bytes, max_characters: int) -> Answer:
    """The text of every page, in the file's order, words that a line's end broke made whole; pages are paragraphs."""
    import pypdfium2
    from pypdfium2.raw import FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        # A file without pages leaves the code of the file before it.
        if error.err_code in (FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY) and b"/Encrypt" in data:
            raise Refused("password-protected: remove the password") from None
        raise Refused(f"malformed: {error}") from None
    pages: list[str] = []
    unreadable, room = 0, max_characters
    for number in range(len(document)):
        try:
            page = document[number]
            text = page.get_textpage().get_text_range(errors="replace")
            page.close()
        except pypdfium2.PdfiumError:
            unreadable += 1
            continue
        room -= len(text)
        if room < 0:
            raise Refused("too large: too much text")
        pages.append(_BROKEN_WORD.sub("", text).replace("\r\n", "\n").strip())
    if not any(pages):
        if unreadable or not pages:
            raise Refused(f"malformed: {unreadable} of {len(document)} pages cannot be read")
        raise Refused(f"no text: {len(pages)} pages without any, probably scans; run OCR first")
    return Answer(one_line(document.get_metadata_value("Title")), "\n\n".join(filter(None, pages)))


def text(data: bytes, max_characters: int) -> Answer:
    return Answer("", decode(data))


def markdown(data: bytes, max_characters: int) -> Answer:
    decoded = decode(data)
    return Answer(markdown_title(decoded), decoded)


PARSERS: dict[str, Callable[[bytes, int], Answer]] = {"text": text, "markdown": markdown, "html": html, "pdf": pdf}


def answer(kind: str, data: bytes, max_characters: int) -> Answer:
    """What the parser of a kind gives, every reason included that parsers foresee."""
    try:
        found = PARSERS[kind](data, max_characters)
    except Refused as refusal:
        return Answer("", "", str(refusal))
    except MemoryError:
        return Answer("", "", "out of memory")
    return found if found.text.strip() else Answer("", "", "empty")


def main(memory_bytes: int, timeout_s: float, max_bytes: int) -> None:
    """Answers requests until there are no more; ends after one that filled the memory."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_AS, memory_bytes)):
        resource.setrlimit(limit, (value, value))
    while request := requests.readline():
        kind, size = request.split()
        data = requests.read(int(size))
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        title, found, reason = answer(kind.decode(), data, max_bytes)
        body = found.encode(errors="replace")
        if len(body) > max_bytes:
            reason, body = f"too large: more than {max_bytes} bytes of text", b""
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps({"title": title, "reason": reason, "size": len(body)}).encode() + b"\n" + body)
        answers.flush()
        if reason == "out of memory":
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))

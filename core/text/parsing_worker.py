"""The parsers themselves, and the process that runs them: bytes of a file -> title and text, or why there is none.

Imported, it is functions for the process of the caller (`answer` for text and Markdown: linear time, no foreign code on UTF-8).
`main` is the process of a `core.text.parsing.Parser`: it answers one request after another and may be killed at any moment:

    request    `<kind> <size>` and a line feed, then the file's bytes
    answer     {"title": ..., "reason": ..., "size": ...} as a line of JSON, then the text's bytes in UTF-8; no text with a reason

It sets its own limits: memory by RLIMIT_AS, time a file by an alarm that ends the process even inside of C. It can write no file,
and of its owner's environment it has the paths of libraries alone; it imports from the standard library first, then from the
folders of this project and of `LIBRARIES`, and from no other. A fault that is not foreseen here ends it, and `core.text.parsing`
says so: there is nothing to clean up.

Foreign code: lexbor (selectolax) for HTML, PDFium (pypdfium2) for PDF, chardet for text that is not UTF-8. Of this project it
imports what it needs of core.text alone, so that it starts soon.
"""

import io
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

from core.text import pages
from core.text.decoding import Refused, decode, one_line

LIBRARIES = ("chardet", "pypdfium2", "selectolax")
FRONT_MATTER_CHARACTERS = 16_384

_FRONT_TITLE = re.compile(r"title[ \t]*[:=][ \t]*(\S.*)", re.IGNORECASE)
_BROKEN_WORD = re.compile("[\x02\ufffe](\r?\n)?")


class Answer(NamedTuple):
    """What a file gave: a title and a text, or a reason, whose part before the colon is one of `core.text.parsing.REASONS`."""

    title: str
    text: str
    reason: str = ""


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


def html(data: bytes, max_characters: int) -> Answer:
    return Answer(*pages.html(data, max_characters))


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
    found: list[str] = []
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
        found.append(_BROKEN_WORD.sub("", text).replace("\r\n", "\n").strip())
    if not any(found):
        if unreadable or not found:
            raise Refused(f"malformed: {unreadable} of {len(document)} pages cannot be read")
        raise Refused(f"no text: {len(found)} pages without any, probably scans; run OCR first")
    return Answer(one_line(document.get_metadata_value("Title")), "\n\n".join(filter(None, found)))


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


def main(memory: str, timeout: str, largest: str) -> None:
    """Answers requests until there are no more; ends after one that filled the memory. In: bytes, s, bytes."""
    memory_bytes, timeout_s, max_bytes = int(memory), float(timeout), int(largest)
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

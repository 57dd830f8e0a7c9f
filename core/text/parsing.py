"""Bytes of a file -> its title and text, or why there is none: text, Markdown, HTML, PDF.

In: a kind (`kind_of` a name) and bytes. Out: `Parsed` or `Reject`, never an exception, in bounded time and memory whatever the
bytes are. Knows nothing of where files come from and of tenants: `pipelines.corpus.sources` names and stores what comes out.

Text and Markdown in UTF-8 are read here. All else goes to foreign code in a process of its own (`core.text.parsing_worker`),
which is killed and started anew when it takes too long, takes too much memory or crashes: the file is rejected, its caller never
notices.

Documents a second and core (a Xeon's; here and in the worker together): text of 8 KB 90,000, where it is not UTF-8 640; pages of
HTML of 4 KB 1,500, of 40 KB 340; PDF of 1 page 410, of 20 pages 32. A worker starts in 50 to 100 ms and holds 56 MB; there is one
a `Parser`. A file that hangs costs `parse_timeout_s`.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from contextlib import suppress
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import Field, PositiveFloat, PositiveInt

from core.config import RunSection
from core.text import parsing_worker

Kind = Literal["text", "markdown", "html", "pdf"]
SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
}
REASONS = (
    "binary",
    "empty",
    "malformed",
    "no text",
    "out of memory",
    "parser crashed",
    "password-protected",
    "timed out",
    "too large",
    "unknown encoding",
)
"""Every reason for a reject begins with one of these, before the first colon."""

_START = "import sys; sys.path += sys.argv[4:]; from core.text import parsing_worker; parsing_worker.main(*sys.argv[1:4])"
_GRACE_S = 5.0
_LONGEST_ANSWER_LINE = 64 * 2**10


class Parsed(NamedTuple):
    """A document's title, one line and perhaps empty, and its text."""

    title: str
    text: str


class Reject(NamedTuple):
    """Why a file is no document: one of `REASONS`, then perhaps a colon and more."""

    reason: str


class ParseLimits(RunSection):
    """What one file may take: bytes of the file and of its text, time in the parser, address space of the parser's process."""

    max_document_bytes: PositiveInt = 16 * 2**20
    parse_timeout_s: PositiveFloat = 30.0
    parse_memory_bytes: Annotated[int, Field(ge=256 * 2**20)] = 2**30


def kind_of(name: str) -> Kind | None:
    """The kind that a file's suffix names, None where no parser knows it."""
    return SUFFIXES.get(PurePosixPath(name).suffix.lower())


class _Worker:
    """A process of `core.text.parsing_worker`. `parsed` counts the files that it has answered for."""

    def __init__(self, limits: ParseLimits) -> None:
        self.parsed, self._limits = 0, limits
        sizes = str(limits.parse_memory_bytes), str(limits.parse_timeout_s), str(limits.max_document_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, *sizes, *_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _end, self._process)

    def ask(self, kind: Kind, data: bytes) -> Parsed | Reject | None:
        """The worker's answer; None where it gave none that makes sense, after its time at the latest."""
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        timer = threading.Timer(self._limits.parse_timeout_s + _GRACE_S, self._process.kill)
        timer.start()
        try:
            requests.write(f"{kind} {len(data)}\n".encode())
            requests.write(data)
            requests.flush()
            head = json.loads(answers.readline(_LONGEST_ANSWER_LINE))
            title, reason, size = str(head["title"]), str(head["reason"]), int(head["size"])
            if size > self._limits.max_document_bytes:
                return None
            text = answers.read(size).decode()
        except (BrokenPipeError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        finally:
            timer.cancel()
        self.parsed += 1
        return Reject(reason) if reason else Parsed(title, text)

    def cause_of_death(self) -> str:
        """The name of the signal that ended it, or its exit code; ends it where it lives."""
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@cache
def _folders() -> list[str]:
    """Where a worker finds this project and the foreign code: all that it may import beside the standard library.

    They come after the standard library, and the caller's own search path is not among them: it may begin with the current
    folder, which is often the corpus, and a `json.py` there would run.
    """
    folders = [str(Path(parsing_worker.__file__).parents[2])]
    installed = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    for name in parsing_worker.LIBRARIES:
        found = PathFinder.find_spec(name, [*installed, *sys.path])
        assert found is not None and found.origin is not None, f"{name} is not installed"
        folders.append(str(Path(found.origin).parents[1]))
    return list(dict.fromkeys(folders))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a worker, dead or alive, and never raises: its pipe may be broken and still hold a part of a request."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)


class Parser:
    """Parses files one at a time, on behalf of one thread; its worker starts with the first file that needs it."""

    def __init__(self, limits: ParseLimits | None = None) -> None:
        self.limits = limits or ParseLimits()
        self._worker: _Worker | None = None

    def parse(self, kind: Kind, data: bytes) -> Parsed | Reject:
        """The document that a file's bytes are, or why they are none."""
        assert kind in get_args(Kind)
        limit = self.limits.max_document_bytes
        if len(data) > limit:
            return Reject(f"too large: more than {limit} bytes")
        if not data:
            return Reject("empty")
        if kind in ("text", "markdown"):
            try:
                data.decode()
            except UnicodeDecodeError:
                pass
            else:
                answer = parsing_worker.answer(kind, data, limit)
                return Reject(answer.reason) if answer.reason else Parsed(answer.title, answer.text)
        return self._ask(kind, data)

    def _ask(self, kind: Kind, data: bytes) -> Parsed | Reject:
        """A worker that ends over a file ends because of it only if the file was its first: else the file gets another."""
        while True:
            try:
                worker = self._worker = self._worker or _Worker(self.limits)
            except OSError as error:
                return Reject(f"parser crashed: it cannot be started: {error.strerror}")
            start, fresh = time.monotonic(), worker.parsed == 0
            answer = worker.ask(kind, data)
            full = answer == Reject("out of memory")
            if answer is not None and not full:
                return answer
            self._worker = None
            if time.monotonic() - start >= self.limits.parse_timeout_s:
                worker.close()
                return Reject(f"timed out: more than {self.limits.parse_timeout_s:g} s in the parser")
            cause = worker.cause_of_death()
            if fresh and full:
                return Reject(f"out of memory: more than {self.limits.parse_memory_bytes} bytes in the parser")
            if fresh:
                return Reject(f"parser crashed: {cause}")

    def close(self) -> None:
        """Ends the worker; another file starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

"""Documents -> streams of question-answer pairs from an endpoint, many documents at once, while others train on them.

In: `Document`s, handed to a `QuestionWriter`. Out: for each a `QuestionStream` that a trainer polls without waiting. One event
loop in one thread asks for all documents, first come first served, `in_flight` requests at once; a failed request is a
`Failure` on its stream and never ends the document. `close` ends the thread.

Every reply is committed to a cache before its pairs go out, under the hash of all that decides it: a killed job that runs again
asks for nothing that was answered, only for what was under way. Failures are recorded too and asked again only where
`ask_failed_again` says so. The cache is an SQLite file in WAL mode (on a local disk): several processes may share it, and a
passage that two of them ask for at the same moment is asked twice. It holds text: `erase` takes a document's rows out.

Costs about 2 ms of a core a request, 0.1 ms a cached reply, and 300 bytes of cache beyond the text of the pairs.
"""

import asyncio
import json
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

import httpx

from core.questions.chat_endpoint import Lost, Reason, api_key
from core.questions.endpoint import Endpoint, EndpointSettings, QuestionUsage, Reply, as_pairs, request_body, request_key
from core.questions.rules import Pair, Passage
from core.text.documents import Document


class Failure(NamedTuple):
    """The pairs on characters `start` to `end` of a document are missing, and why."""

    start: int
    end: int
    reason: Reason
    detail: str


class QuestionStream:
    """The pairs of one document as they arrive. Its methods may be called from any thread."""

    def __init__(self, passages: Sequence[Passage], patience_s: float = 0) -> None:
        self.passages = passages
        self._patience_s = patience_s
        self._settled: list[list[Pair] | Failure | None] = [None] * len(passages)
        self._first_open = 0
        self._open = len(passages)
        self._waiting: dict[int, float] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "QuestionStream":
        """A stream whose pairs are all there already, as the rules write them."""
        stream = cls([Passage(0, 0, 0)])
        stream._settle(0, list(pairs))
        return stream

    def poll(self) -> list[Pair]:
        """The pairs that arrived since the last call, in document order; never waits for the network.

        Pairs behind a passage that is still being asked are held back for `patience_s`, then given out of order. Raises
        `RuntimeError` if the writer stopped for a reason of its own, such as a full disk.
        """
        with self._changed:
            self._raise_error()
            late = time.monotonic() - self._patience_s
            ready = sorted(i for i, arrived in self._waiting.items() if i < self._first_open or arrived <= late)
            for i in ready:
                del self._waiting[i]
            return [pair for i in ready for pair in self._pairs(i)]

    @property
    def finished(self) -> bool:
        """Whether every passage has ended and `poll` has given out every pair."""
        with self._changed:
            self._raise_error()
            return not self._open and not self._waiting

    @property
    def failures(self) -> list[Failure]:
        """The passages lost so far, in document order."""
        with self._changed:
            return [item for item in self._settled if isinstance(item, Failure)]

    def result(self, timeout_s: float | None = None) -> list[Pair]:
        """Waits for every passage; all pairs in document order, polled before or not. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._open or self._error is not None, timeout_s):
                raise TimeoutError(f"{self._open} of {len(self.passages)} passages have not been answered after {timeout_s} s")
            self._raise_error()
            return [pair for i in range(len(self.passages)) for pair in self._pairs(i)]

    def cancel(self) -> None:
        """Gives up what has not arrived: it becomes failures with reason `cancelled`. Requests under way end in the cache."""
        for index in range(len(self.passages)):
            self._lose(index, Lost("cancelled", "given up before an answer"))

    def _pairs(self, index: int) -> list[Pair]:
        item = self._settled[index]
        return item if isinstance(item, list) else []

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"question writing stopped: {self._error}") from self._error

    def _is_open(self, index: int) -> bool:
        return self._settled[index] is None

    def _settle(self, index: int, item: list[Pair] | Failure) -> None:
        with self._changed:
            if self._settled[index] is not None:
                return
            self._settled[index] = item
            self._open -= 1
            if isinstance(item, list) and item:
                self._waiting[index] = time.monotonic()
            while self._first_open < len(self._settled) and self._settled[self._first_open] is not None:
                self._first_open += 1
            self._changed.notify_all()

    def _lose(self, index: int, lost: Lost) -> None:
        passage = self.passages[index]
        self._settle(index, Failure(passage.start, passage.end, lost.reason, lost.detail))

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
        if error is None:
            self.cancel()


class ReplyCache:
    """Replies and losses by request key, in one SQLite file; `":memory:"` keeps them for the process only."""

    VERSION = 1

    def __init__(self, path: Path | str) -> None:
        """Opens or makes the file; raises `ValueError` if it is something else."""
        if path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute("PRAGMA secure_delete=ON")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master WHERE name != 'replies'").fetchone()
            if version not in (0, self.VERSION) or (version == 0 and tables):
                raise sqlite3.DatabaseError(f"version {version}")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, tenant TEXT NOT NULL, content_hash TEXT NOT NULL, "
                "pairs TEXT, reason TEXT, detail TEXT, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL) "
                "WITHOUT ROWID"
            )
            self._database.execute(f"PRAGMA user_version={self.VERSION}")
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(f"{path} cannot be used as a cache of questions ({error}): give another path") from None

    def get(self, key: str) -> Reply | Lost | None:
        """What came of a request, if it has ended."""
        columns = "pairs, reason, detail, prompt_tokens, completion_tokens"
        row = self._database.execute(f"SELECT {columns} FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        pairs, reason, detail, prompt_tokens, completion_tokens = row
        if pairs is None:
            return Lost(cast(Reason, reason), detail, 0, prompt_tokens, completion_tokens)
        return Reply(tuple((q, a, e) for q, a, e in json.loads(pairs)), prompt_tokens, completion_tokens)

    def put(self, key: str, document: Document, outcome: Reply | Lost) -> None:
        """Commits an outcome. A loss never replaces a reply."""
        tokens = (outcome.prompt_tokens, outcome.completion_tokens)
        if isinstance(outcome, Reply):
            pairs, reason, detail = json.dumps(outcome.pairs, ensure_ascii=False), None, None
        else:
            pairs, reason, detail = None, outcome.reason, outcome.detail
        self._database.execute(
            "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET tenant = excluded.tenant, "
            "content_hash = excluded.content_hash, pairs = excluded.pairs, reason = excluded.reason, detail = excluded.detail, "
            "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
            "completion_tokens = completion_tokens + excluded.completion_tokens WHERE replies.pairs IS NULL",
            (key, document.tenant, document.content_hash, pairs, reason, detail, *tokens),
        )

    def erase(self, tenant: str, content_hash: str) -> int:
        """Takes out what was written on a document, overwriting it on disk; returns the number of rows.

        A passage that stands word for word in two of a tenant's documents is filed under the first that asked.
        """
        cursor = self._database.execute("DELETE FROM replies WHERE tenant = ? AND content_hash = ?", (tenant, content_hash))
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return cursor.rowcount

    def close(self) -> None:
        self._database.close()


class _Question(NamedTuple):
    document: Document
    stream: QuestionStream
    passage: int


class QuestionWriter:
    """Asks an endpoint about documents in a thread of its own; a context manager.

    Raises `ValueError` for a key that is not set or a cache that is none. Not to be forked or pickled: make it where it is used.
    """

    def __init__(self, settings: EndpointSettings, cache_path: Path | str = ":memory:") -> None:
        self.settings = settings
        self._key = api_key(settings.run)
        self._cache = ReplyCache(cache_path)
        self._usage = QuestionUsage()
        self._lock = threading.Lock()
        self._streams: set[QuestionStream] = set()
        self._closed = False
        self._error: BaseException | None = None
        self._asked_by: dict[str, list[_Question]] = {}
        self._all_fail: Lost | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="question-writer", daemon=True)
        self._thread.start()
        self._started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def usage(self) -> QuestionUsage:
        """What has been asked and spent so far by this writer."""
        return replace(self._usage)

    def write(self, document: Document) -> QuestionStream:
        """Queues a document behind those before it and returns at once. Raises `ValueError` after `close`."""
        stream = QuestionStream(self.settings.passages(document.text), self.settings.run.patience_s)
        with self._lock:
            if self._error is not None:
                raise RuntimeError(f"question writing stopped: {self._error}") from self._error
            if self._closed:
                raise ValueError("this question writer is closed: make another one")
            self._streams.add(stream)
            self._loop.call_soon_threadsafe(self._queue_document, document, stream)
        return stream

    def close(self) -> None:
        """Ends the thread. What has not arrived becomes failures with reason `cancelled`, which the cache does not record."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(self._serve())
        finally:
            error = sys.exception()
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            with self._lock:
                self._closed, self._error = True, error
                streams = list(self._streams)
            for stream in streams:
                stream._stop(error)
            self._cache.close()
            self._started.set()

    async def _serve(self) -> None:
        run = self.settings.run
        self._loop, self._task = asyncio.get_running_loop(), cast(asyncio.Task[None], asyncio.current_task())
        self._queue: asyncio.Queue[_Question] = asyncio.Queue()
        endpoint = Endpoint(self.settings, self._key, self._usage)
        async with asyncio.TaskGroup() as workers:
            for _ in range(run.in_flight):
                workers.create_task(self._work(endpoint))
            self._started.set()

    def _queue_document(self, document: Document, stream: QuestionStream) -> None:
        for index in range(len(stream.passages)):
            self._queue.put_nowait(_Question(document, stream, index))
        if not stream.passages:
            self._streams.discard(stream)

    async def _work(self, endpoint: Endpoint) -> None:
        """One request at a time on a client of its own."""
        async with endpoint.chat.client() as client:
            while True:
                question = await self._queue.get()
                if question.stream._is_open(question.passage):
                    await self._answer(endpoint, client, question)

    async def _answer(self, endpoint: Endpoint, client: httpx.AsyncClient, question: _Question) -> None:
        document, stream, index = question
        body = request_body(document, stream.passages[index], self.settings)
        key = request_key(document, body, self.settings)
        if key in self._asked_by:
            self._asked_by[key].append(question)
            return
        outcome = self._cache.get(key)
        if outcome is None or (isinstance(outcome, Lost) and self.settings.run.ask_failed_again):
            if self._all_fail is not None:
                self._settle(question, self._all_fail)
                return
            self._asked_by[key] = [question]
            outcome = await endpoint.ask(client, document, stream.passages[index], body)
            if isinstance(outcome, Lost) and outcome.reason == "endpoint":
                self._all_fail = outcome
            else:
                self._cache.put(key, document, outcome)
            for asking in self._asked_by.pop(key):
                self._settle(asking, outcome)
        else:
            self._usage.cached += 1
            self._settle(question, outcome)
            await asyncio.sleep(0)

    def _settle(self, question: _Question, outcome: Reply | Lost) -> None:
        stream, index = question.stream, question.passage
        if isinstance(outcome, Lost):
            stream._lose(index, outcome)
        else:
            stream._settle(index, as_pairs(outcome.pairs, stream.passages[index]))
        if not stream._open:
            self._streams.discard(stream)

"""The async shell over `core.engine.token_loop`: one thread steps, tokens reach the requests of one event loop.

In: `Request`s. Out: their `Token`s, as they are made. Text, names and HTTP are not known here. The thread sleeps while there
is nothing to do. Submitting and cancelling run in a thread of their own, in order, because checking a large adapter takes
milliseconds. Cost: one wake-up of the event loop a step, whatever the number of requests.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from core.engine.requests import EngineStats, Request, Token
from core.engine.token_loop import Engine

log = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """A step of the engine raised, or it was stopped: nothing runs any more."""


class Refused(ValueError):
    """The engine cannot run this request, and says why."""


class Overloaded(RuntimeError):
    """As many requests are here as may run and wait."""


class Draining(RuntimeError):
    """The engine finishes what it has and takes nothing new."""


class AsyncEngine:
    """An engine for one event loop: all methods are called from it.

    max_queued: requests that may wait beyond the engine's slots.
    """

    def __init__(self, engine: Engine, max_queued: int) -> None:
        self._engine = engine
        self._capacity = engine.slots + max_queued
        self._admitted = 0
        self._streams: dict[str, asyncio.Queue[Token | EngineFailed]] = {}
        self._failure: EngineFailed | None = None
        self._draining = False
        self._stopping = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._door = ThreadPoolExecutor(1, thread_name_prefix="engine-door")

    @property
    def ready(self) -> bool:
        """It runs, and takes requests."""
        return self._thread is not None and self._failure is None and not self._draining

    @property
    def failure(self) -> EngineFailed | None:
        """Why it runs no more; None while it runs."""
        return self._failure

    @property
    def max_length(self) -> int:
        return self._engine.max_length

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def start(self) -> None:
        """Starts the thread, for the running event loop."""
        assert self._thread is None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Takes nothing new, gives what runs `drain_s` to end, then fails the rest and ends the threads."""
        self._draining = True
        deadline = self._loop.time() + drain_s
        while self._admitted and self._failure is None and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._fail(EngineFailed("the server has stopped"))
        self._door.shutdown()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place for one request, from before its adapter is fetched until its last token.

        Raises `EngineFailed`, `Draining`, and `Overloaded` where there is no place.
        """
        if self._failure is not None:
            raise self._failure
        if self._draining:
            raise Draining("the server is stopping")
        if self._admitted >= self._capacity:
            raise Overloaded(f"{self._admitted} requests run or wait, and no more may")
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    @asynccontextmanager
    async def submitted(self, request: Request) -> AsyncIterator[AsyncIterator[Token]]:
        """The request's tokens, as they come; leaving early takes the request out. Raises `Refused` and `EngineFailed`."""
        queue: asyncio.Queue[Token | EngineFailed] = asyncio.Queue()
        self._streams[request.request_id] = queue
        try:
            if self._failure is not None:
                raise self._failure
            await self._loop.run_in_executor(self._door, self._submit, request)
            yield _tokens(queue)
        finally:
            del self._streams[request.request_id]
            if self._failure is None:
                self._door.submit(self._engine.cancel, request.request_id)

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except ValueError as error:
            raise Refused(str(error)) from None
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                tokens = self._engine.step()
                if tokens:
                    self._loop.call_soon_threadsafe(self._deliver, tokens)
        except Exception as error:  # whatever a step raises must reach those who wait for it, and nothing else is above
            log.exception("the engine failed")
            failure = EngineFailed(f"the engine failed: {type(error).__name__}")
            self._loop.call_soon_threadsafe(self._fail, failure)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while self._engine.idle and not self._stopping:
                self._wake.wait()
            return not self._stopping

    def _deliver(self, tokens: list[Token]) -> None:
        for token in tokens:
            if token.request_id in self._streams:
                self._streams[token.request_id].put_nowait(token)

    def _fail(self, failure: EngineFailed) -> None:
        self._failure = self._failure or failure
        for queue in self._streams.values():
            queue.put_nowait(self._failure)


async def _tokens(queue: "asyncio.Queue[Token | EngineFailed]") -> AsyncIterator[Token]:
    while True:
        item = await queue.get()
        if isinstance(item, EngineFailed):
            raise item
        yield item
        if item.finish_reason is not None:
            return

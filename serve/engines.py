"""The async shell over `core.engine.token_loop`: one thread steps, tokens reach the requests of one event loop.

In: `Request`s, those of one answer together. Out: their `Token`s, as they are made. Text, names and HTTP are not known here. The
thread sleeps while there is nothing to do. Submitting and cancelling run in a thread of their own, in order, because checking a
large adapter takes milliseconds. Cost: one wake-up of the event loop a step, whatever the number of requests.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
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


class DeadlinePassed(RuntimeError):
    """The answer was not at its end when its time was."""


_Failure = EngineFailed | DeadlinePassed
_Queue = asyncio.Queue[Token | _Failure]


class AsyncEngine:
    """An engine for one event loop: all methods are called from it.

    max_queued: requests that may wait beyond the engine's slots.
    """

    def __init__(self, engine: Engine, max_queued: int) -> None:
        self._engine = engine
        self._capacity = engine.slots + max_queued
        self._admitted = 0
        self._streams: dict[str, _Queue] = {}
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

    @property
    def capacity(self) -> int:
        """Requests that may run and wait at once."""
        return self._capacity

    def check_open(self, requests: int = 1) -> None:
        """Raises `EngineFailed`, `Draining`, and `Overloaded` where there is no place for so many requests."""
        if self._failure is not None:
            raise self._failure
        if self._draining:
            raise Draining("the server is stopping")
        if self._admitted + requests > self._capacity:
            raise Overloaded(f"{self._admitted} requests run or wait, and {self._capacity} may")

    @contextmanager
    def admitted(self, requests: int = 1) -> Iterator[None]:
        """Places for requests that have all that they need, until their last tokens. Raises as `check_open`."""
        self.check_open(requests)
        self._admitted += requests
        try:
            yield
        finally:
            self._admitted -= requests

    @asynccontextmanager
    async def submitted(self, requests: Sequence[Request], deadline: float | None = None) -> AsyncIterator["Tokens"]:
        """The requests' tokens, as they come; leaving early takes the requests out.

        deadline: by the event loop's clock. Raises `Refused` and `EngineFailed`; the tokens raise `EngineFailed` and
        `DeadlinePassed`.
        """
        names = [request.request_id for request in requests]
        queue = _Queue()
        self._streams |= dict.fromkeys(names, queue)
        passed = DeadlinePassed("the answer took longer than a request may")
        timer = None if deadline is None else self._loop.call_at(deadline, queue.put_nowait, passed)
        tokens = Tokens(self, queue, names)
        try:
            if self._failure is not None:
                raise self._failure
            for request in requests:
                await self._loop.run_in_executor(self._door, self._submit, request)
            yield tokens
        finally:
            if timer is not None:
                timer.cancel()
            for name in names:
                del self._streams[name]
            for name in tokens.running:
                self.cancel(name)

    def cancel(self, request_id: str) -> None:
        """Takes a request out of the engine, if it is there."""
        if self._failure is None:
            self._door.submit(self._engine.cancel, request_id)

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
        for queue in set(self._streams.values()):
            queue.put_nowait(self._failure)


class Tokens:
    """The tokens of some requests, one after the other as they come, until each has had its last."""

    def __init__(self, engine: AsyncEngine, queue: _Queue, names: Sequence[str]) -> None:
        self.running = set(names)
        self._engine = engine
        self._queue = queue

    def drop(self, request_id: str) -> None:
        """Ends one of them early: no further token of it comes."""
        self.running.discard(request_id)
        self._engine.cancel(request_id)

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        while self.running:
            item = await self._queue.get()
            if not isinstance(item, Token):
                raise item
            if item.request_id in self.running:
                if item.finish_reason is not None:
                    self.running.remove(item.request_id)
                return item
        raise StopAsyncIteration

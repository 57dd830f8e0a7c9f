"""How requests reach the store: by threads of their own for each kind of reading, for a limited time, and only where they must.

In: model names, documents' rows. Out: `Resolution`s, texts, listings. A store that hangs holds up the threads of its kind of
reading and those requests that need what it does not give; the base, and models that were asked for before, are answered from
memory. Requests that wait for the store are counted here and not by the engine; beyond `max_waiting_for_store` they are turned
away, and each waits for `store_timeout_s` at most.

Resolutions are kept for the newest version that was seen. A newer one is asked for every `refresh_s`; what is kept is resolved
anew, in one pass, before it answers, so an update is seen within that time and the time of the refresh itself. Where that fails
for `max_stale_s`, no document is answered for (an edit might be among what was not seen) and the server says that it is not
ready. Knows nothing of tensors and HTTP.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from core.store.errors import StoreError
from core.store.manifest import DocumentRow
from serve.resolver import Listing, Resolution, Resolver
from serve.settings import ServeRun

log = logging.getLogger(__name__)

KEPT_RESOLUTIONS = 4096
T = TypeVar("T")


class StoreBusy(RuntimeError):
    """As many requests wait for the store as may."""


class StoreSlow(RuntimeError):
    """The store did not give within the time that a request may wait for it."""


class StoreStale(RuntimeError):
    """The newest version was seen too long ago to answer for documents."""


class StoreAccess:
    """The store of one resolver, for one event loop. `close` ends the threads; what the store holds up ends when it lets go."""

    def __init__(self, resolver: Resolver, run: ServeRun) -> None:
        self._resolver = resolver
        self._timeout_s = run.store_timeout_s
        self._max_waiting = run.max_waiting_for_store
        self._max_stale_s = run.max_stale_s
        self._waiting = 0
        self._pools = {
            kind: ThreadPoolExecutor(threads, thread_name_prefix=f"store-{kind}")
            for kind, threads in (("resolve", run.parallel_reads), ("text", run.parallel_reads), ("list", 2), ("refresh", 1))
        }
        self._known: OrderedDict[str, Resolution] = OrderedDict()
        self._sequence = resolver.sequence
        self._refreshed = time.monotonic()
        self._under_way: dict[tuple[str, str], asyncio.Task[Any]] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait for the store now."""
        return self._waiting

    @property
    def age_s(self) -> float:
        """Seconds since the version that answers was last known to be the newest."""
        return time.monotonic() - self._refreshed

    @property
    def stale(self) -> bool:
        return self.age_s > self._max_stale_s

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def patience(self, until: float | None = None) -> AsyncIterator[None]:
        """For what waits on the store; until: by the event loop's clock. Raises `StoreBusy` and `StoreSlow`."""
        if self._waiting >= self._max_waiting:
            raise StoreBusy(f"{self._waiting} requests wait for the store, and no more may")
        self._waiting += 1
        end = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(end if until is None else min(end, until)) as limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise StoreSlow("the store did not answer in time") from None
            raise
        finally:
            self._waiting -= 1

    def known(self, model: str) -> Resolution | None:
        """What answers for a model, where memory says it: for the base, and for what was asked for before.

        Raises `StoreStale` for a document of a version that was last seen as the newest too long ago.
        """
        if model == self._resolver.base:
            return self._resolver.resolve(model)
        if self.stale:
            raise StoreStale(f"the store was last read {self.age_s:.0f} s ago: its documents may have changed since")
        if (found := self._known.get(model)) is not None:
            self._known.move_to_end(model)
        return found

    async def resolve(self, model: str) -> Resolution:
        """What answers for a model; reads the store where memory does not say it. Errors as of `known` and `Resolver.resolve`."""
        if (found := self.known(model)) is not None:
            return found
        sequence = self._resolver.sequence
        found = await self._once("resolve", model, lambda: self._resolver.resolve(model))
        if sequence == self._sequence == self._resolver.sequence:
            self._known[model] = found
            if len(self._known) > KEPT_RESOLUTIONS:
                self._known.popitem(last=False)
        return found

    def forget(self, model: str) -> None:
        """Makes `resolve` ask the store again: what it gave turned out not to answer."""
        self._known.pop(model, None)

    async def text(self, document: DocumentRow) -> str:
        """The stored text, checked; one reading for all that want it at the same time."""
        return await self._once("text", document.content_hash, lambda: self._resolver.text(document))

    async def list_models(self, after: str | None, limit: int, prefix: str) -> Listing:
        """As `Resolver.list_models`."""
        return await self._in("list", lambda: self._resolver.list_models(after, limit, prefix))

    async def refresh(self) -> None:
        """Goes to the newest version, and resolves anew what is kept. Where it fails, all stays as it was and `age_s` grows."""
        began = time.monotonic()
        known = list(self._known)
        sequence, fresh = await self._in("refresh", lambda: self._newest(known))
        self._refreshed = began
        if fresh is not None:
            self._sequence, self._known = sequence, OrderedDict(fresh)
            log.info("the store is at version %d", sequence)

    def _newest(self, known: list[str]) -> tuple[int, dict[str, Resolution] | None]:
        self._resolver.refresh()
        sequence = self._resolver.sequence
        if sequence == self._sequence:
            return sequence, None
        try:
            return sequence, self._resolver.resolve_many(known)
        except StoreError as error:  # something is damaged: whoever asks for that document is told, and nobody else
            log.warning("what was asked for before could not be resolved in version %d: %s", sequence, error)
            return sequence, {}

    async def _once(self, kind: str, name: str, call: Callable[[], T]) -> T:
        """One call for all that wait for the same; it goes on when those who began it leave."""
        key = kind, name
        if key not in self._under_way:
            if len(self._under_way) >= self._max_waiting:
                raise StoreBusy(f"{len(self._under_way)} readings of the store are under way, and no more may")
            task = asyncio.create_task(self._in(kind, call))
            self._under_way[key] = task
            task.add_done_callback(lambda done: (self._under_way.pop(key), done.cancelled() or done.exception()))
        found: T = await asyncio.shield(self._under_way[key])
        return found

    async def _in(self, kind: str, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pools[kind], call)

"""The requests of each document, counted on the event loop and written into the store beside it (`core.store.demand`).

Counting takes no lock and no thread: what was asked since the last writing is handed over whole when it is written.
"""

import asyncio
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from core.store.demand import DemandCounter, Key
from core.store.errors import StoreError
from core.store.store import Store

log = logging.getLogger(__name__)


class Demand:
    """Counts for one event loop. most_documents: as of `DemandCounter`."""

    def __init__(self, store: Store, most_documents: int) -> None:
        self._store = store
        self._counter = DemandCounter(most_documents)
        self._asked: Counter[Key] = Counter()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="demand")

    def count(self, key: Key) -> None:
        """One more request for a document."""
        self._asked[key] += 1

    async def write(self) -> None:
        """Writes what is new. No request fails for its count's sake: what cannot be written is kept for the next time."""
        asked, self._asked = self._asked, Counter()
        await asyncio.get_running_loop().run_in_executor(self._pool, self._write, asked)

    async def close(self, patience_s: float) -> None:
        """Writes for the last time, for so long at most."""
        try:
            await asyncio.wait_for(self.write(), patience_s)
        except TimeoutError:
            log.warning("the demand could not be written in %.0f s at the stop: it is lost", patience_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, asked: Counter[Key]) -> None:
        for key, requests in asked.items():
            self._counter.count(key, requests)
        try:
            self._store.write_demand(self._counter)
        except (StoreError, OSError) as error:
            log.warning("the demand could not be written, and will be tried again: %s", error)

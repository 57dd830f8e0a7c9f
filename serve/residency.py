"""Adapters in host memory: fetched from the store on demand, checked, kept under a budget of bytes, the least recently used go.

In: an `AdapterRow`. Out: `AdapterWeights` `[1, N]` on the CPU, in the base's type and under the engine's spec, ready to run.
Entries are named by adapter id and blob hash, so bytes never answer for other bytes. One load an adapter, however many requests
wait for it; loads of different adapters run side by side, at most `parallel_loads`, off the event loop and off the token loop.

An adapter that does not fit this base, is not finite, or changes nothing is refused (`AdapterUnusable`): a request for a document
is never answered by the base alone.

Memory: the budget, and beyond it `parallel_loads` adapters under way and those that requests in the engine still hold.
"""

import asyncio
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from core.adapters.deltas import changes_anything
from core.adapters.gated_memory import weights_of
from core.adapters.spec import AdapterSpec
from core.adapters.weights import AdapterWeights
from core.store.manifest import AdapterRow
from core.store.store import Store
from serve.access import StoreBusy


class AdapterUnusable(ValueError):
    """An adapter that is in the store but must not answer."""


@dataclass
class ResidencyCounters:
    """Since the start. A hit found the adapter in memory; all requests that waited for one load are misses."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    failed_loads: int = 0
    evictions: int = 0
    resident_adapters: int = 0
    resident_bytes: int = 0
    load_seconds: float = 0.0


class Residency:
    """The adapters in memory. `get` and `counters` belong to one event loop; `close` ends the loading threads.

    spec: of the engine; adapters of lower rank or fewer sites are padded to it, so all take `adapter_bytes`. max_loads: that run
    or wait for a thread. Raises `ValueError` for a budget that does not hold one adapter.
    """

    def __init__(
        self,
        store: Store,
        spec: AdapterSpec,
        dtype: torch.dtype,
        budget_bytes: int,
        parallel_loads: int = 4,
        max_loads: int = 256,
    ) -> None:
        self.adapter_bytes = spec.numel * dtype.itemsize
        if budget_bytes < self.adapter_bytes:
            raise ValueError(f"the memory for adapters is {budget_bytes} bytes and one takes {self.adapter_bytes}: give more")
        self.counters = ResidencyCounters()
        self._store = store
        self._spec = spec
        self._dtype = dtype
        self._budget_bytes = budget_bytes
        self._max_loads = max_loads
        self._resident: OrderedDict[tuple[str, str], AdapterWeights] = OrderedDict()
        self._loading: dict[tuple[str, str], asyncio.Task[AdapterWeights]] = {}
        self._pool = ThreadPoolExecutor(parallel_loads, thread_name_prefix="adapter-load")

    def holds(self, row: AdapterRow) -> bool:
        """Whether `get` gives this adapter without waiting."""
        return (row.adapter_id, row.blob_hash) in self._resident

    async def get(self, row: AdapterRow) -> AdapterWeights:
        """The adapter of that row. Raises `AdapterUnusable`, `StoreBusy`, and what `Store.get_vector` raises.

        A load goes on when the request that began it is cancelled: others may wait for it.
        """
        key = row.adapter_id, row.blob_hash
        if key in self._resident:
            self.counters.hits += 1
            self._resident.move_to_end(key)
            return self._resident[key]
        self.counters.misses += 1
        if key not in self._loading:
            if len(self._loading) >= self._max_loads:
                raise StoreBusy(f"{len(self._loading)} adapters are being loaded, and no more may")
            self._loading[key] = asyncio.create_task(self._load(key, row))
            self._loading[key].add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._loading[key])

    def close(self) -> None:
        """Ends the loading threads; those that the store holds up end when it lets go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _load(self, key: tuple[str, str], row: AdapterRow) -> AdapterWeights:
        begin = time.perf_counter()
        self.counters.loads += 1
        try:
            weights = await asyncio.get_running_loop().run_in_executor(self._pool, self._read, row)
        except (ValueError, OSError):
            self.counters.failed_loads += 1
            raise
        finally:
            self.counters.load_seconds += time.perf_counter() - begin
            del self._loading[key]
        while (len(self._resident) + 1) * self.adapter_bytes > self._budget_bytes:
            self._resident.popitem(last=False)
            self.counters.evictions += 1
        self._resident[key] = weights
        self.counters.resident_adapters = len(self._resident)
        self.counters.resident_bytes = len(self._resident) * self.adapter_bytes
        return weights

    def _read(self, row: AdapterRow) -> AdapterWeights:
        spec = self._store.spec(row.spec_fingerprint)
        name = f"adapter {row.adapter_id}"
        if not self._spec.has_sites_of(spec):
            raise AdapterUnusable(f"{name} was made for another base, or for sites that are not served: convert again")
        if spec.rank > self._spec.rank:
            raise AdapterUnusable(
                f"{name} has rank {spec.rank}, and this server was started for rank {self._spec.rank}: start it again with "
                f"max_rank={spec.rank} or more, or without max_rank, which takes the largest of the store"
            )
        weights = weights_of(spec, self._store.get_vector(row).to(self._dtype)[None])
        if not weights.flat_BN.isfinite().all():
            raise AdapterUnusable(f"{name} is not finite in {self._dtype}: serve the base in a wider type")
        if not changes_anything(weights):
            raise AdapterUnusable(f"{name} changes nothing: A B is zero in every linear, or every gate stays shut; make it again")
        return weights.padded_to(self._spec)

import asyncio
import threading
import time

import pytest
import torch
from torch import Tensor

from core.adapters.lora import LoraWeights
from core.adapters.spec import AdapterSpec, SiteShape
from core.store.manifest import AdapterRow
from core.store.store import Store
from serve.residency import Residency, changes_anything
from tests.serving import World, chat, make_world, offline, serving


class SlowStore(Store):
    """A store with latency, that knows how many reads ran side by side."""

    delay_s = 0.05

    def get_vector(self, row: AdapterRow) -> Tensor:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        if self.meeting is not None:
            self.meeting.wait(60)
        time.sleep(self.delay_s)
        with self._lock:
            self.running -= 1
        return super().get_vector(row)

    running = most = 0
    meeting: threading.Barrier | None = None
    """Where so many reads wait for each other, at any speed of the machine."""
    _lock = threading.Lock()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("store"), [f"d{number}" for number in range(6)])


def rows_of(world: World, store: Store) -> list[AdapterRow]:
    return [store.find_adapters("t", document.content_hash)[0] for document in world.documents]


def residency_for(world: World, adapters: int, **options: int) -> tuple[Residency, SlowStore, list[AdapterRow]]:
    store = SlowStore.open(world.store.url)
    assert isinstance(store, SlowStore)
    spec = world.base.spec(8)
    return Residency(store, spec, torch.float32, adapters * spec.numel * 4 + 3, **options), store, rows_of(world, store)


def test_one_load_for_many_requests_and_loads_side_by_side(world: World) -> None:
    async def main() -> None:
        residency, store, rows = residency_for(world, adapters=6, parallel_loads=3)
        store.meeting = threading.Barrier(3)
        got = await asyncio.gather(*(residency.get(row) for row in rows * 8))
        counters = residency.counters
        assert (counters.loads, counters.misses, counters.hits, store.most) == (6, 48, 0, 3)
        assert 6 * store.delay_s <= counters.load_seconds
        for number, weights in enumerate(got):
            expected = world.weights.select(slice(number % 6, number % 6 + 1)).padded(8)
            assert torch.equal(weights.flat_BN, expected.flat_BN) and weights.spec.rank == 8
        assert all([await residency.get(row) is got[number] for number, row in enumerate(rows)])
        assert (counters.hits, counters.loads, counters.resident_adapters) == (6, 6, 6)
        residency.close()

    asyncio.run(main())


def test_a_load_survives_the_request_that_began_it(world: World) -> None:
    async def main() -> None:
        residency, _, rows = residency_for(world, adapters=6)
        first, second = asyncio.create_task(residency.get(rows[0])), asyncio.create_task(residency.get(rows[0]))
        await asyncio.sleep(0.01)
        first.cancel()
        assert torch.equal((await second).padded(8).flat_BN, world.weights.select(slice(0, 1)).padded(8).flat_BN)
        assert residency.counters.loads == 1
        lonely = asyncio.create_task(residency.get(rows[1]))
        await asyncio.sleep(0.01)
        lonely.cancel()
        await asyncio.sleep(0.15)
        await residency.get(rows[1])
        assert (residency.counters.loads, residency.counters.hits) == (2, 1)
        residency.close()

    asyncio.run(main())


def test_the_least_recently_used_go_and_the_budget_holds(world: World) -> None:
    async def main() -> None:
        residency, _, rows = residency_for(world, adapters=2)
        for number in (0, 1, 0, 2, 0, 1):
            await residency.get(rows[number])
            assert residency.counters.resident_bytes == residency.counters.resident_adapters * residency.adapter_bytes
            assert residency.counters.resident_adapters <= 2
        counters = residency.counters
        assert (counters.hits, counters.loads, counters.evictions) == (2, 4, 2)
        residency.close()

    asyncio.run(main())


def test_a_budget_below_one_adapter_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="give more"):
        residency_for(world, adapters=0)


def test_answers_stay_right_while_adapters_are_evicted(world: World) -> None:
    async def main() -> None:
        budget = 2 * world.weights.spec.numel * 4
        async with serving(world, adapter_memory_bytes=budget) as (client, service):
            order = [number for _ in range(3) for number in range(6)]
            answers = await asyncio.gather(*(chat(client, f"base:d{number}") for number in order))
            assert answers == [offline(world, "Who is it?", number) for number in order]
            assert service.residency.counters.evictions >= 4
            assert service.residency.counters.resident_bytes <= budget

    asyncio.run(main())


def test_changes_anything() -> None:
    spec = AdapterSpec(((SiteShape("q", 4, 6, True), SiteShape("down", 6, 4)),), rank=2)

    def adapter(*nonzero: tuple[str, str]) -> LoraWeights:
        weights = LoraWeights(spec, torch.zeros(1, spec.numel))
        for (_, site, tensor), value in weights.tensors.items():
            if (site, tensor) in nonzero:
                value.fill_(0.5)
        return weights

    assert not changes_anything(adapter())
    assert not changes_anything(adapter(("q", "A"), ("down", "B")))
    assert not changes_anything(adapter(("q", "B")))
    assert changes_anything(adapter(("q", "C")))
    assert changes_anything(adapter(("down", "A"), ("down", "B")))

"""A store that hangs, fails or tells too much: who waits, who does not, what clients hear of it. Events hold the storage."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from core.store.objects import FileObjects, StorageError
from core.store.store import Store
from serve.api import create_app
from serve.service import Service
from serve.settings import ServeRun
from tests.serving import World, ask, chat, make_document, make_world, offline

SECRET = "s3://bucket-of-ours/prefix, arn:aws:iam::123456789012:user/secret"

PATIENCE_S = 250.0
"""What a test waits for an event that is sure to come: it ends tests that hang, and no busy machine's."""
UNHURRIED = {"refresh_s": 1000.0, "max_stale_s": 9000.0, "store_timeout_s": PATIENCE_S, "deadline_s": PATIENCE_S}


class HeldObjects(FileObjects):
    """Files that answer while `open` is set, and fail with `error` where there is one."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.open = threading.Event()
        self.open.set()
        self.held = threading.Semaphore(0)
        self.error: Exception | None = None

    def _pass(self) -> None:
        if not self.open.is_set():
            self.held.release()
        assert self.open.wait(PATIENCE_S), "the test forgot to let go"
        if self.error is not None:
            raise self.error

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self._pass()
        return super().read(name, offset, length)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        if ranges:
            self._pass()
        return super().read_ranges(ranges)

    def exists(self, name: str) -> bool:
        self._pass()
        return super().exists(name)

    def listing(self, folder: str, after: str = ""):  # type: ignore[no-untyped-def]
        self._pass()
        return super().listing(folder, after)


class Held:
    """A served world whose storage can be held."""

    def __init__(self, objects: HeldObjects, client: httpx.AsyncClient, service: Service) -> None:
        self.objects = objects
        self.client = client
        self.service = service

    async def post(self, model: str, **changes: object) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=ask(model, **changes))

    async def until_held(self, calls: int = 1) -> None:
        for _ in range(calls):
            assert await asyncio.to_thread(self.objects.held.acquire, timeout=PATIENCE_S)


@asynccontextmanager
async def held_world(world: World, **run: object) -> AsyncIterator[Held]:
    path = Path(world.store.url.removeprefix("file://"))
    objects = HeldObjects(path)
    store = Store(objects, cache_bytes=0)  # so that every look-up reads
    assert store._versions.begin()
    own = world.settings().model_copy(update={"run": ServeRun(**{**UNHURRIED, **run})})
    service = Service(world.base, store, own)
    transport = httpx.ASGITransport(create_app(service))
    async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE_S) as client:
        try:
            yield Held(objects, client, service)
        finally:
            objects.error = None
            objects.open.set()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("store"), [f"d{number}" for number in range(12)])
    world.store.put([make_document("bare", "A text without an adapter.")])
    return world


def test_cold_loads_take_no_places_from_what_could_run(world: World) -> None:
    """4 slots, 4 places in the queue, 8 loads under way: a warm document and the base answer, though nothing else runs."""

    async def main() -> None:
        async with held_world(world, slots=4, max_queued_requests=4, parallel_loads=8) as held:
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)
            await asyncio.gather(*(held.client.get(f"/v1/models/base:d{number}") for number in range(1, 9)))
            held.objects.open.clear()
            cold = [asyncio.create_task(held.post(f"base:d{number}")) for number in range(1, 9)]
            await held.until_held(8)
            assert (held.service.engine.stats().running, held.service.access.waiting) == (0, 8)
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)
            assert await chat(held.client, "base") == offline(world, "Who is it?", None)
            held.objects.open.set()
            answers = [response.json()["choices"][0]["message"]["content"] for response in await asyncio.gather(*cold)]
            assert answers == [offline(world, "Who is it?", number) for number in range(1, 9)]

    asyncio.run(main())


def test_a_store_that_hangs_holds_up_only_what_needs_it(world: World) -> None:
    """Look-ups, texts, adapters, listings and the refresh all hang; the base and what is in memory answer, as does the rest."""

    async def main() -> None:
        async with held_world(world, parallel_reads=2, parallel_loads=1, max_waiting_for_store=6, refresh_s=0.01) as held:
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)
            in_context = await chat(held.client, "base:bare")
            await held.client.get("/v1/models/base:d2")
            held.objects.open.clear()
            hung = [
                *(asyncio.create_task(held.post(f"base:d{number}")) for number in (2, 3, 4)),
                asyncio.create_task(held.post("base:d1", imprint={"mode": "in_context"})),
                *(asyncio.create_task(held.client.get("/v1/models")) for _ in range(2)),
            ]
            await held.until_held()  # by one for all that want the same part of the manifest
            async with asyncio.timeout(PATIENCE_S):
                while held.service.access.waiting < 6:
                    await asyncio.sleep(0.001)
            assert await chat(held.client, "base") == offline(world, "Who is it?", None)
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)
            assert await chat(held.client, "base:bare") == in_context
            assert (await held.client.get("/v1/models/base")).status_code == 200
            assert (await held.client.get("/health")).status_code == (await held.client.get("/ready")).status_code == 200
            busy = await held.post("base:d5")
            assert (busy.status_code, busy.json()["error"]["code"]) == (429, "store_busy") and "Retry-After" in busy.headers
            held.objects.open.set()
            assert [response.status_code for response in await asyncio.gather(*hung)] == [200] * 6

    asyncio.run(main())


def test_a_request_waits_for_the_store_for_a_limited_time(world: World) -> None:
    async def main() -> None:
        async with held_world(world, store_timeout_s=0.05) as held:
            await held.client.get("/v1/models/base:d2")
            held.objects.open.clear()
            for call in (held.post("base:d2"), held.client.get("/v1/models"), held.post("base:bare")):
                response = await call
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (503, "store_slow") and "Retry-After" in response.headers
            assert held.service.access.waiting == 0
            assert (held.service.engine.stats().running, held.service.engine.ready) == (0, True)
            assert await chat(held.client, "base") == offline(world, "Who is it?", None)
            held.objects.open.set()
            assert await chat(held.client, "base:d2") == offline(world, "Who is it?", 2)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_a_deadline(world: World, stream: bool) -> None:
    async def main() -> None:
        async with held_world(world, deadline_s=0.1) as held:
            response = await held.post("base", max_tokens=2000, ignore_eos=True, stream=stream)
            assert response.status_code == (200 if stream else 504) and '"code":"deadline_passed"' in response.text
            while held.service.engine.stats().running:
                await asyncio.sleep(0.001)
            assert held.service.engine.stats().generated_tokens < 2000

    asyncio.run(main())


def test_what_storage_says_stays_in_the_log_under_an_id(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with held_world(world) as held:
            await held.client.get("/v1/models/base:d2")
            held.objects.error = StorageError(f"403 AccessDenied: {SECRET}")
            responses = [
                await held.post("base:d2"),
                await held.post("base:bare"),
                await held.client.get("/v1/models"),
                await held.client.get("/v1/models/base:d3"),
            ]
            for response in responses:
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (503, "store_failed")
                assert not any(word in response.text for word in ("bucket", "arn", "403", "Denied", str(world.store.url)))
                error_id = error["message"].rpartition(" ")[2]
                [line] = [record.getMessage() for record in caplog.records if error_id in record.getMessage()]
                assert SECRET in line

    with caplog.at_level(logging.WARNING, "serve"):
        asyncio.run(main())


def test_a_fault_of_the_program_is_told_by_an_id(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with held_world(world) as held:
            held.objects.error = RuntimeError(SECRET)
            transport = httpx.ASGITransport(create_app(held.service), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                response = await client.post("/v1/chat/completions", json=ask("base:d4"))
            error = response.json()["error"]
            assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
            assert "arn" not in response.text and error["message"].rpartition(" ")[2] in caplog.text and SECRET in caplog.text

    asyncio.run(main())


def test_no_error_ends_the_refresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither one of storage nor one of the program; what is edited meanwhile is seen when it is over."""
    world = make_world(tmp_path, ["d0"])

    async def main() -> None:
        async with held_world(world, refresh_s=0.01) as held:
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)
            edited = make_document("d0", "An edited text.")
            for error in (StorageError("out of reach"), RuntimeError("a fault"), KeyError("another")):
                held.objects.error = error
                while str(error) not in caplog.text:
                    await asyncio.sleep(0.001)
            world.store.put([edited])
            held.objects.error = None
            while (await held.client.get("/v1/models/base:d0")).json()["imprint"]["source"] == "adapter":
                await asyncio.sleep(0.001)
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", None, edited.text)

    asyncio.run(main())


def test_documents_wait_for_a_store_that_was_seen_too_long_ago(world: World) -> None:
    """The old adapter of an edited text would answer else. The base answers, and readiness says what is wrong."""

    async def main() -> None:
        async with held_world(world, refresh_s=0.01, max_stale_s=0.2) as held:
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)
            held.objects.open.clear()
            while (ready := await held.client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.005)
            assert (ready.json()["ready"], ready.json()["store_stale"]) == (False, True) and "Retry-After" in ready.headers
            for response in (await held.post("base:d0"), await held.client.get("/v1/models/base:d0")):
                assert (response.status_code, response.json()["error"]["code"]) == (503, "store_stale")
            assert await chat(held.client, "base") == offline(world, "Who is it?", None)
            held.objects.open.set()
            while (await held.client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.005)
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)

    asyncio.run(main())


def test_what_is_in_memory_is_resolved_anew_before_a_new_version_answers(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["d0", "d1", "d2"])

    async def main() -> None:
        async with held_world(world) as held:
            for name in ("d0", "d1", "d2"):
                await chat(held.client, f"base:{name}")
            world.store.put([make_document("d0", "An edited text.")])
            world.store.delete_document("t", "c", "d1")
            await held.service.access.refresh()
            held.objects.open.clear()
            resolved = {name: held.service.access.known(f"base:{name}") for name in ("d0", "d1", "d2")}
            assert resolved["d1"] is None
            assert [None if each is None else each.source for each in resolved.values()] == ["in_context", None, "adapter"]
            assert await chat(held.client, "base:d2") == offline(world, "Who is it?", 2)
            held.objects.open.set()

    asyncio.run(main())


def test_counting_waits_for_nothing(world: World) -> None:
    """While demand is being written, however long that takes, requests are counted, and written next time."""

    async def main() -> None:
        async with held_world(world, demand_write_s=0.01) as held:
            await chat(held.client, "base:d0")
            writing, go = threading.Event(), threading.Event()
            counted = world.store.demand()["t", "c", "d0"]
            original = held.objects.replace

            def replace(name: str, data: bytes) -> None:
                writing.set()
                assert go.wait(60)
                original(name, data)

            held.objects.replace = replace  # type: ignore[method-assign]
            await chat(held.client, "base:d0")
            assert await asyncio.to_thread(writing.wait, 60)
            assert await chat(held.client, "base:d0") == offline(world, "Who is it?", 0)
            go.set()
            while world.store.demand()["t", "c", "d0"] < max(counted, 1) + 2:
                await asyncio.sleep(0.005)

    asyncio.run(main())

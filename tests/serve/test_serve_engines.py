import asyncio
from pathlib import Path

import pytest
import torch

from core.engine.requests import Request
from core.engine.token_loop import Engine, generate
from serve.engines import AsyncEngine, Draining, EngineFailed, Overloaded, Refused
from tests.models import random_adapters, tiny_base
from tests.serving import ask, make_world, served_base, serving


def request(name: str, tokens: int = 8, prompt: list[int] | None = None) -> Request:
    return Request(name, prompt or [5, 6, 7], tokens)


async def token_ids(engine: AsyncEngine, one: Request) -> list[int]:
    with engine.admitted():
        async with engine.submitted([one]) as tokens:
            return [token.token_id async for token in tokens]


def test_tokens_are_those_of_the_engine() -> None:
    base = tiny_base()
    weights = random_adapters(base, 4)
    requests = [Request(str(i), [5 + i, 6], 9, weights.select(slice(i % 4, i % 4 + 1))) for i in range(12)]

    async def main() -> list[list[int]]:
        engine = AsyncEngine(Engine(base, weights.spec, slots=3), max_queued=9)
        engine.start()
        assert engine.ready
        got = await asyncio.gather(*(token_ids(engine, each) for each in requests))
        await asyncio.sleep(0.05)
        steps = engine.stats().steps
        await asyncio.sleep(0.05)
        assert engine.stats().steps == steps, "an idle engine sleeps"
        assert await token_ids(engine, request("late")) == generate(base, [request("late")])["late"].token_ids
        await engine.stop()
        return got

    expected = generate(base, requests)
    assert asyncio.run(main()) == [expected[each.request_id].token_ids for each in requests]


def test_refusals_and_places() -> None:
    async def main() -> None:
        engine = AsyncEngine(Engine(tiny_base(), slots=1), max_queued=1)
        engine.start()
        with pytest.raises(Refused, match="together at most"):
            await token_ids(engine, request("long", 1000))
        with engine.admitted(), engine.admitted(), pytest.raises(Overloaded), engine.admitted():
            pass
        async with engine.submitted([request("left", 200)]) as tokens:
            await anext(tokens)
        assert len(await token_ids(engine, request("next"))) == 8
        assert engine.stats().generated_tokens < 200
        running = asyncio.create_task(token_ids(engine, request("running", 100)))
        await asyncio.sleep(0.01)
        stopping = asyncio.create_task(engine.stop(drain_s=30))
        await asyncio.sleep(0)
        assert not engine.ready
        with pytest.raises(Draining), engine.admitted():
            pass
        assert len(await running) == 100
        await stopping
        with pytest.raises(EngineFailed), engine.admitted():
            pass

    asyncio.run(main())


def test_a_stop_without_patience_fails_what_runs() -> None:
    async def main() -> None:
        engine = AsyncEngine(Engine(tiny_base(), slots=1), max_queued=1)
        engine.start()
        running = [asyncio.create_task(token_ids(engine, request(name, 250))) for name in "ab"]
        await asyncio.sleep(0.01)
        await engine.stop(drain_s=0)
        for task in running:
            with pytest.raises(EngineFailed, match="stopped"):
                await task

    asyncio.run(main())


def test_a_step_that_fails_ends_every_request_and_readiness(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = served_base(seed=1)
    world = make_world(tmp_path, ["d0"], base)
    whole = base.embedding.weight

    async def main() -> None:
        async with serving(world, slots=1) as (client, service):
            assert (await client.get("/ready")).json()["ready"] is True
            bodies = [ask("base:d0", max_tokens=1900, ignore_eos=True, stream=number == 0) for number in range(3)]
            calls = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for body in bodies]
            while service.engine.stats().generated_tokens < 5:
                await asyncio.sleep(0.001)
            base.embedding.weight = torch.nn.Parameter(whole[:1, :1], requires_grad=False)
            streamed, *others = await asyncio.gather(*calls)
            assert streamed.status_code == 200 and '"code":"not_ready"' in streamed.text
            for response in (*others, await client.post("/v1/chat/completions", json=ask("base"))):
                assert response.status_code == 503 and "Retry-After" in response.headers
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()["ready"]) == (503, False)
            assert (await client.get("/health")).status_code == 200
            assert isinstance(service.engine.failure, EngineFailed)

    try:
        asyncio.run(main())
    finally:
        base.embedding.weight = whole
    assert "the engine failed" in caplog.text and "Who is it?" not in caplog.text


def test_overflowing_adapters_are_an_error_not_an_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(make_world(tmp_path, ["d0"], size=1e25)) as (client, _):
            for stream in (False, True):
                response = await client.post("/v1/chat/completions", json=ask("base:d0", stream=stream))
                assert response.status_code == (200 if stream else 500) and '"code":"not_finite"' in response.text
            assert (await client.post("/v1/chat/completions", json=ask("base"))).status_code == 200

    asyncio.run(main())

"""What answers where the newest adapter cannot: the one before it, or the text, and nothing is loaded twice to find out."""

import asyncio
from dataclasses import replace
from pathlib import Path

import httpx
import torch

from core.adapters.lora import LoraWeights
from core.text.documents import Document
from tests.models import random_adapters
from tests.serving import World, ask, make_document, make_world, new_adapter, offline, producer_for, serving

QUESTION, OK = "Who is it?", "adapter"


def land(world: World, document: Document, weights: LoraWeights, **values: object) -> None:
    """Another adapter for a document, which lands after those that are there; the document too, where it is new."""
    made = new_adapter(document, weights, producer_for(world.base, made="later"))
    world.store.put([document], [replace(made, **values)])  # type: ignore[arg-type]


def without_effect(world: World) -> LoraWeights:
    weights = random_adapters(world.base, 1, rank=4)
    return LoraWeights(weights.spec, torch.zeros_like(weights.flat_BN))


async def said(client: httpx.AsyncClient, name: str) -> tuple[str, str, str | None]:
    response = await client.post("/v1/chat/completions", json=ask(f"base:{name}", QUESTION))
    assert response.status_code == 200, response.text
    body = response.json()
    return body["choices"][0]["message"]["content"], body["imprint"]["source"], body["imprint"].get("reason")


def test_an_adapter_of_too_high_a_rank_leaves_the_earlier_one_answering(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["one"])
    land(world, world.documents[0], random_adapters(world.base, 1, rank=16))
    lonely = make_document("lonely", "Another text.")
    land(world, lonely, random_adapters(world.base, 1, rank=16))

    async def main() -> None:
        async with serving(world) as (client, service):
            for _ in range(5):
                assert await said(client, "one") == (offline(world, QUESTION, 0), OK, None)
            why = "its adapter has rank 16, and this server was started for rank 4 (max_rank)"
            assert await said(client, "lonely") == (offline(world, QUESTION, None, lonely.text), "in_context", why)
            assert (service.residency.counters.loads, service.residency.counters.failed_loads) == (1, 0)

    asyncio.run(main())


def test_an_unusable_adapter_is_loaded_once_and_passed_over(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["one"])
    land(world, world.documents[0], without_effect(world))
    lonely = make_document("lonely", "Another text.")
    land(world, lonely, without_effect(world))

    async def main() -> None:
        async with serving(world) as (client, service):
            counters, shown = service.residency.counters, offline(world, QUESTION, None, lonely.text)
            for _ in range(5):
                assert await said(client, "one") == (offline(world, QUESTION, 0), OK, None)
            assert (counters.loads, counters.failed_loads) == (2, 1)
            why = "its adapter cannot be used here: the server's log says why"
            for _ in range(3):
                assert await said(client, "lonely") == (shown, "in_context", why)
            assert counters.failed_loads == 2
            asked = await client.post("/v1/chat/completions", json=ask("base:lonely", imprint={"mode": "adapter"}))
            assert asked.status_code == 400 and asked.json()["error"]["code"] == "mode_impossible"

    asyncio.run(main())


def test_a_withheld_adapter_leaves_the_earlier_one_answering(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["one"])
    land(world, world.documents[0], random_adapters(world.base, 1, rank=4, size=0.9), withheld=True, questions=9)

    async def main() -> None:
        async with serving(world) as (client, _):
            assert await said(client, "one") == (offline(world, QUESTION, 0), OK, None)

    asyncio.run(main())

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch

from core.adapters.lora import LoraWeights
from core.adapters.spec import AdapterSpec
from core.store.store import Store
from serve.api import create_app
from serve.schema import NEUTRAL
from serve.service import Service
from tests.serving import NAMES, World, ask, chat, make_document, make_world, new_adapter, offline, producer_for, serving

MODELS = [f"base:{quote(name, safe='')}" for name in NAMES]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("store"))


def with_client(world: World, test: Callable[[httpx.AsyncClient, Service], Awaitable[None]], **run: object) -> None:
    async def main() -> None:
        async with serving(world, **run) as (client, service):
            await test(client, service)

    asyncio.run(main())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_every_adapter_answers_as_offline(world: World) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        expected = [offline(world, "Who is it?", number) for number in range(len(NAMES))]
        assert len({*expected, offline(world, "Who is it?", None)}) == len(NAMES) + 1
        assert [await chat(client, model) for model in MODELS] == expected
        assert await chat(client, "base") == offline(world, "Who is it?", None)
        for number, model in enumerate(MODELS):
            response = await client.post("/v1/chat/completions", json=ask(model))
            [row] = world.store.find_adapters("t", world.documents[number].content_hash)
            imprint = response.json()["imprint"]
            assert (imprint["source"], imprint["adapter"], imprint["blob"]) == ("adapter", row.adapter_id, row.blob_hash)
            assert (imprint["document"], response.json()["model"]) == (world.documents[number].name, model)
            assert response.headers["X-Imprint-Source"] == "adapter"
            assert response.headers["X-Imprint-Adapter"] == row.adapter_id

    with_client(world, test)


def test_concurrent_requests_get_their_own_adapters(tmp_path: Path) -> None:
    world = make_world(tmp_path, [f"d{number}" for number in range(16)])
    questions = [f"Question {number}?" for number in range(48)]
    expected = [offline(world, question, number % 16) for number, question in enumerate(questions)]
    assert len(set(expected)) > 40

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        answers = await asyncio.gather(*(chat(client, f"base:d{i % 16}", question) for i, question in enumerate(questions)))
        assert answers == expected
        stats, counters = service.engine.stats(), service.residency.counters
        assert (stats.running, stats.waiting, counters.loads) == (0, 0, 16)
        assert stats.steps < stats.generated_tokens / 4

    with_client(world, test)


def test_stream_equals_whole(world: World) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for changes in ({}, {"temperature": 1.5, "seed": 5}, {"stop": ["a", "e"]}, {"max_tokens": 1}):
            for chat_api, path in ((True, "/v1/chat/completions"), (False, "/v1/completions")):
                body = {**ask(MODELS[6]), **changes}
                if not chat_api:
                    del body["messages"]
                    body["prompt"] = "The text"
                whole = (await client.post(path, json=body)).json()
                body |= {"stream": True, "stream_options": {"include_usage": True}}
                response = await client.post(path, json=body)
                assert response.headers["content-type"].startswith("text/event-stream")
                first, *chunks, last = events(response)
                choice = whole["choices"][0]
                parts = [c["choices"][0]["delta"].get("content", "") if chat_api else c["choices"][0]["text"] for c in chunks]
                assert "".join(parts) == (choice["message"]["content"] if chat_api else choice["text"])
                assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [
                    choice["finish_reason"]
                ]
                assert (last["choices"], last["usage"]) == ([], whole["usage"])
                assert first["imprint"] == whole["imprint"]
                assert first["choices"][0].get("delta") == ({"role": "assistant", "content": ""} if chat_api else None)
                assert len({c["id"] for c in (first, *chunks, last)}) == 1
                assert first["object"] == ("chat.completion.chunk" if chat_api else "text_completion")

    with_client(world, test)


def test_shape_and_counts(world: World) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        body = (await client.post("/v1/chat/completions", json=ask("base", ignore_eos=True))).json()
        assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["created"] > 1.7e9
        assert body["choices"][0]["message"]["role"] == "assistant"
        assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 12
        assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 12
        assert body["imprint"] == {"source": "base"}
        tokenizer = world.base.tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode("The text", add_special_tokens=False)
        texts = []
        for prompt in ("The text", ["The text"], ids):
            answer = await client.post("/v1/completions", json={"model": MODELS[0], "prompt": prompt})
            assert answer.json()["usage"]["prompt_tokens"] == len(ids) and answer.json()["usage"]["completion_tokens"] <= 16
            texts.append(answer.json()["choices"][0]["text"])
        assert len(set(texts)) == 1

    with_client(world, test)


def test_text_parts_developer_and_nulls(world: World) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        body = ask(MODELS[1], temperature=None, tools=None, user="me", n=1)
        body["messages"] = [
            {"role": "developer", "content": "Be short"},
            {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}], "name": None},
        ]
        plain = ask(MODELS[1])
        plain["messages"] = [{"role": "system", "content": "Be short"}, {"role": "user", "content": "Who is it?"}]
        answers = [(await client.post("/v1/chat/completions", json=each)).json()["choices"] for each in (body, plain)]
        assert answers[0] == answers[1]

    with_client(world, test)


def test_models_are_listed_by_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    original = Store.get_bytes
    monkeypatch.setattr(Store, "get_bytes", lambda self, row: reads.append(row.key) or original(self, row))

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        listed, after = [], ""
        while True:
            page = (await client.get(f"/v1/models?limit=5{after}")).json()
            listed += page["data"]
            assert page["object"] == "list" and page["last_id"] == page["data"][-1]["id"] and len(page["data"]) <= 5
            if not page["has_more"]:
                break
            after = f"&after={quote(page['last_id'], safe='')}"
        assert listed[0] == {
            "id": "base", "object": "model", "created": 0, "owned_by": "imprint", "root": "base", "parent": None,
            "imprint": {"source": "base"},
        }  # fmt: skip
        assert sorted(model["id"] for model in listed[1:]) == sorted(MODELS)
        assert {(model["root"], model["parent"], model["imprint"]["source"]) for model in listed[1:]} == {
            ("base", "base", "adapter")
        }
        for model in listed:
            assert (await client.get(f"/v1/models/{quote(model['id'], safe='')}")).json() == model
        prefixed = (await client.get("/v1/models", params={"prefix": "a"})).json()["data"]
        assert [model["id"] for model in prefixed] == ["base:a%2Fb", "base:a%3Ab", "base:a%5Cb%27%22"]
        for query in ("limit=0", "limit=1001", "limit=x", "after=nonsense", "after=base:a/b/c", "after=base:%25ff"):
            refused = await client.get(f"/v1/models?{query}")
            assert refused.status_code == 400 and refused.json()["error"]["param"] == query.partition("=")[0], query
        assert reads == []

    with_client(world, test)


def test_other_collections_and_unknown_models(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["here"])
    there = make_document("a/b", "Another text.", collection="x:y/z")
    world.store.put([there, make_document("here", "Hidden", collection="other")])

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        assert await chat(client, "base:x%3Ay%2Fz/a%2Fb") == offline(world, "Who is it?", None, there.text)
        ids = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert ids == ["base", "base:here", "base:other/here", "base:x%3Ay%2Fz/a%2Fb"]
        unknown = (
            "nothing",
            "base:",
            "base:nothing",
            "base:x%3Ay%2Fz/here",
            "base:a/b/c",
            "base:%FF",
            "bases",
            "base:here ",
            " base",
        )
        for model in unknown:
            response = await client.post("/v1/chat/completions", json=ask(model))
            error = response.json()["error"]
            assert response.status_code == 404 and error["code"] == "model_not_found", model
            assert "GET /v1/models" in error["message"] and error["param"] == "model"
            assert (await client.get(f"/v1/models/{quote(model, safe='')}")).status_code == 404
        for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405)):
            response = await client.request(method, path)
            assert (response.status_code, response.json()["error"]["type"]) == (status, "invalid_request_error")

    with_client(world, test)


def test_an_edit_answers_in_context_and_its_adapter_follows(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["d0", "d1"])
    edited = make_document("d0", "A text that was edited.")
    refresh_s = 0.05

    async def seen(client: httpx.AsyncClient, source: str) -> None:
        deadline = asyncio.get_running_loop().time() + refresh_s + 2
        while (await client.get("/v1/models/base:d0")).json()["imprint"]["source"] != source:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        old = await chat(client, "base:d0")
        assert old == offline(world, "Who is it?", 0)
        world.store.put([edited])
        await seen(client, "in_context")
        response = await client.post("/v1/chat/completions", json=ask("base:d0"))
        assert response.json()["choices"][0]["message"]["content"] == offline(world, "Who is it?", None, edited.text) != old
        assert response.headers["X-Imprint-Source"] == "in_context" and "X-Imprint-Adapter" not in response.headers
        assert response.json()["imprint"]["reason"] == "no adapter for this content and base yet"
        assert await chat(client, "base:d1") == offline(world, "Who is it?", 1)
        completion = await client.post("/v1/completions", json={"model": "base:d0", "prompt": "Who"})
        assert completion.json()["usage"]["prompt_tokens"] > 5
        system = ask("base:d0") | {"messages": [{"role": "system", "content": "x"}]}
        assert (await client.post("/v1/chat/completions", json=system)).json()["error"]["param"] == "messages"
        weights = world.weights.select(slice(1, 2))
        world.store.put([], [new_adapter(edited, weights, producer_for(world.base))])
        await seen(client, "adapter")
        assert await chat(client, "base:d0") == offline(world, "Who is it?", 1)
        world.store.delete_document("t", "c", "d0")
        await asyncio.sleep(refresh_s * 4)
        assert (await client.post("/v1/chat/completions", json=ask("base:d0"))).status_code == 404

    with_client(world, test, refresh_s=refresh_s)


def test_adapters_that_must_not_answer(tmp_path: Path) -> None:
    world = make_world(tmp_path, ["good"])
    base, rank4, spec8 = world.base, world.weights.spec, world.base.spec(8)
    zero, large, odd = world.weights.flat_BN * 0, world.weights.padded(8), AdapterSpec(rank4.layers[:-1], 4)
    cases = {
        "zero": (LoraWeights(rank4, zero), producer_for(base), "cannot be used here"),
        "large": (LoraWeights(spec8, large.flat_BN), producer_for(base), "max_rank"),
        "layers": (LoraWeights(odd, world.weights.flat_BN[:, : odd.numel]), producer_for(base), "changes sites"),
    }
    for name, (weights, producer, _) in cases.items():
        document = make_document(name, f"Text of {name}.")
        world.store.put([document], [new_adapter(document, weights, producer)])
    foreign, windows = make_document("foreign", "Foreign text."), make_document("windows", "Long text.")
    stranger = producer_for(base).model_copy(update={"config": {"base": "another"}})
    both = [new_adapter(windows, world.weights, producer_for(base), window) for window in ((0, 5), (3, 8))]
    world.store.put([foreign, windows], [new_adapter(foreign, world.weights, stranger), *both])

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for name, (_, _, message) in cases.items():
            for _ in range(2):
                answered = (await client.post("/v1/chat/completions", json=ask(f"base:{name}"))).json()
                assert answered["imprint"]["source"] == "in_context" and message in answered["imprint"]["reason"]
                assert answered["choices"][0]["message"]["content"] == offline(world, "Who is it?", None, f"Text of {name}.")
        assert service.residency.counters.failed_loads == 1, (
            "what the manifest tells is not loaded, what a load told is remembered"
        )
        for name in ("foreign", "windows"):
            response = await client.post("/v1/chat/completions", json=ask(f"base:{name}"))
            assert response.json()["imprint"]["source"] == "in_context"
        for shard in (tmp_path / "shards").iterdir():
            shard.write_bytes(bytes(shard.stat().st_size))
        damaged = await client.post("/v1/chat/completions", json=ask("base:good"))
        assert damaged.status_code == 503 and damaged.json()["error"]["code"] == "store_failed"
        assert await chat(client, "base") == offline(world, "Who is it?", None)

    with_client(world, test)


def test_the_rank_follows_the_store_at_the_start(tmp_path: Path) -> None:
    """Rank 4 then, from the only adapter that fits; a larger one that comes later waits for the next start."""
    world = make_world(tmp_path, ["first"])
    base, spec8 = world.base, world.base.spec(8)
    large = LoraWeights(spec8, world.weights.padded(8).flat_BN)
    odd = AdapterSpec(base.spec(16).layers[:-1], 16)
    strangers = {
        "foreign": (large, producer_for(base).model_copy(update={"config": {"base": "another"}})),
        "layers": (LoraWeights(odd, torch.ones(1, odd.numel)), producer_for(base)),
    }
    for name, (weights, producer) in strangers.items():
        document = make_document(name, f"Text of {name}.")
        world.store.put([document], [new_adapter(document, weights, producer)])
    settings = world.settings(refresh_s=0.05).model_copy(update={"max_rank": None})
    service = Service(base, Store.open(tmp_path), settings)
    assert service.residency.adapter_bytes == base.spec(4).numel * base.dtype.itemsize

    async def grow() -> None:
        transport = httpx.ASGITransport(create_app(service))
        async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            assert await chat(client, "base:first") == offline(world, "Who is it?", 0)
            document = make_document("grown", "Text of a larger one.")
            world.store.put([document], [new_adapter(document, large, producer_for(base))])
            deadline = time.monotonic() + 10
            while (response := await client.post("/v1/chat/completions", json=ask("base:grown"))).status_code == 404:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            answered = response.json()["imprint"]
            assert answered["source"] == "in_context" and "rank 8" in answered["reason"] and "max_rank" in answered["reason"]

    asyncio.run(grow())
    again = Service(base, Store.open(tmp_path), settings)
    assert again.residency.adapter_bytes == spec8.numel * base.dtype.itemsize
    empty = Store.open(tmp_path / "empty", create=True)
    assert Service(base, empty, settings).residency.adapter_bytes == spec8.numel * base.dtype.itemsize


def test_a_full_queue_says_when_to_come_again(world: World) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        body = ask("base", max_tokens=100, ignore_eos=True)
        responses = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(9)))
        statuses = [response.status_code for response in responses]
        assert statuses.count(200) == 3 and statuses.count(429) == 6
        refused = next(response for response in responses if response.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
        assert await chat(client, "base") == offline(world, "Who is it?", None)

    with_client(world, test, slots=2, max_queued_requests=1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(world: World, stream: bool) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        app = create_app(service)
        body = json.dumps(ask(MODELS[0], max_tokens=1900, ignore_eos=True, stream=stream)).encode()
        arrived, left = iter([{"type": "http.request", "body": body, "more_body": False}]), asyncio.Event()
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if (message := next(arrived, None)) is not None:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        path = "/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}
        call = asyncio.create_task(app(scope, receive, send))
        while service.engine.stats().generated_tokens < 5:
            await asyncio.sleep(0.001)
        left.set()
        await call
        while service.engine.stats().running:
            await asyncio.sleep(0.001)
        assert service.engine.stats().generated_tokens < 1900
        if not stream:
            assert sent[0]["status"] == 499
        else:
            assert sent[0]["status"] == 200 and not any(b"[DONE]" in message.get("body", b"") for message in sent)
        assert await chat(client, MODELS[1]) == offline(world, "Who is it?", 1)

    with_client(world, test, slots=1, max_queued_requests=0)


def refusals() -> list[tuple[dict[str, Any], str | None]]:
    message = {"role": "user", "content": "x"}
    strange = [
        {},
        {"role": "user"},
        {"role": "teacher", "content": "x"},
        {"role": "user", "content": 5},
        {**message, "x": 1},
        "x",
        None,
    ]
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    return [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        *(({"messages": [each]}, "messages.0") for each in strange),
        ({"messages": [image]}, "messages.0.content"),
        ({"messages": [message, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "messages"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop.0"),
        ({"seed": 2**70}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"n": 0}, "n"),
        ({"n": 81}, "n"),
        ({"n": True}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"99999": 1}}, None),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"no_such_parameter": 1}, "no_such_parameter"),
    ]


def test_bad_parameters_are_named(world: World) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        for changes, param in refusals():
            response = await client.post("/v1/chat/completions", json=ask("base") | changes)
            error = response.json()["error"]
            assert (response.status_code, error["type"]) == (400, "invalid_request_error"), changes
            assert str(error["param"]).startswith(param or ""), (changes, error)
        neutral = {name: values[0] for name, values in NEUTRAL.items() if values}
        assert (await client.post("/v1/chat/completions", json=ask("base") | neutral)).status_code == 200
        long = await client.post("/v1/chat/completions", json=ask("base", "word " * 2500))
        assert long.json()["error"]["code"] == "context_length_exceeded" and long.status_code == 400
        assert "2048" in long.json()["error"]["message"] and "12 new" in long.json()["error"]["message"]
        for prompt in ("", [], [[]], [[], [1]], [1, "a"], [-1], [10**9], [2**70], {}, 5, [[[1]]]):
            response = await client.post("/v1/completions", json={"model": "base", "prompt": prompt})
            assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error", prompt
        for content in (
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b'{"a":"\\ud800"}',
            b"[" * 100_000,
            b'{"n":' + b"9" * 9999 + b"}",
        ):
            response = await client.post("/v1/chat/completions", content=content)
            assert response.status_code == 400 and "JSON" in response.json()["error"]["message"], content[:20]
        assert (await client.post("/v1/chat/completions", content=b" " * (2**21 + 1))).status_code == 413

    with_client(world, test)

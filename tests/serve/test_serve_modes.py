"""Lifted adapters of both kinds behind the API, and where an answer shall come from: adapter, context, or both."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

import imprint
from core.adapters.gated_memory import weights_of
from core.adapters.spec import SITES
from core.adapters.weights import AdapterWeights
from core.engine.requests import Request
from core.engine.token_loop import generate
from core.lift.writer import LiftRecipe, LiftWriter
from core.store.store import Store
from core.text.prompts import clean_answer, encode, head_tail, in_context, prompt
from core.writing.writer import Written
from serve.api import create_app
from serve.service import Service
from serve.settings import ServeRun, ServeSettings
from tests.serving import LENGTH, TOKENS, ask, make_document, served_base

BASE = served_base()
TEXT = "Ansa Tavolt built the old tower in 1874. Mirko Hald keeps bees near Ostrand."
QUESTION = "Who built it?"


def lifted(store: Store, kind: str, *names: str, sites: Sequence[str] = SITES) -> None:
    """Documents with adapters of a kind, trained until they say something else than the base."""
    stages = [{"name": "questions", "epochs": 2, "tasks": ["questions"]}]
    adapter = {"kind": kind} if kind == "gated_memory" else {"kind": kind, "rank": 4, "scale": 1.0, "sites": sites}
    settings = {"adapter": adapter, "optimiser": {"learning_rate": 0.1}, "curriculum": {"stages": stages}}
    recipe = LiftRecipe.model_validate({"settings": settings, "serving_rank": 3, "gate": {"questions": 0}})
    documents = [make_document(name, f"{TEXT} This is document {name}.") for name in names]
    outcomes = LiftWriter(BASE, recipe).write(documents)
    store.put(documents, [new for outcome in outcomes if isinstance(outcome, Written) for new in outcome.adapters])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two documents with a LoRA, one with a memory, one with both, one with neither."""
    store = Store.open(tmp_path_factory.mktemp("store"), create=True)
    lifted(store, "lora", "a", "b", "both")
    lifted(store, "gated_memory", "memory", "both")
    store.put([make_document("bare", "A text without an adapter."), make_document("long", "one two three four " * LENGTH)])
    return store


def text_of(store: Store, name: str) -> str:
    row = store.find_document("t", "c", name)
    assert row is not None
    return store.get_text(row)


def weights_in(store: Store, name: str, kind: str) -> AdapterWeights:
    row = store.find_document("t", "c", name)
    assert row is not None
    rows = [each for each in store.find_adapters("t", row.content_hash) if store.spec(each.spec_fingerprint).kind == kind]
    [found] = rows
    return weights_of(store.spec(found.spec_fingerprint), store.get_vector(found)[None])


def offline(weights: AdapterWeights | None, shown: str | None = None, cut_to: int | None = None) -> str:
    assert BASE.tokenizer is not None
    content = QUESTION if shown is None else in_context(shown, QUESTION)
    ids = prompt(BASE.tokenizer, [{"role": "user", "content": content}])
    if cut_to is not None:
        ids = head_tail(ids, cut_to, encode(BASE.tokenizer, "..."))
    done = generate(BASE, [Request("r", ids, TOKENS, weights, BASE.stop_ids)])["r"]
    return clean_answer(str(BASE.tokenizer.decode(done.token_ids, skip_special_tokens=True)))


@asynccontextmanager
async def client_of(store: Store, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    own = ServeSettings(base="unused", store=store.url, tenant="t", collection="c", run=ServeRun(slots=4), **settings)
    service = Service(BASE, Store.open(store.url), own)
    transport = httpx.ASGITransport(create_app(service))
    async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client


async def answer(client: httpx.AsyncClient, name: str, mode: str | None = None) -> tuple[str, dict[str, Any]]:
    wish = {} if mode is None else {"imprint": {"mode": mode}}
    response = await client.post("/v1/chat/completions", json=ask(f"base:{name}", QUESTION, **wish))
    assert response.status_code == 200, response.text
    body = response.json()
    assert response.headers["X-Imprint-Source"] == body["imprint"]["source"]
    assert response.headers.get("X-Imprint-Adapter") == body["imprint"].get("adapter")
    return body["choices"][0]["message"]["content"], body["imprint"]


def test_a_server_runs_the_kind_that_it_is_told_and_answers_for_the_other_in_context(store: Store) -> None:
    async def check(kind: str, other: str, own: list[str], foreign: list[str]) -> None:
        async with client_of(store, **({} if kind == "lora" else {"kind": kind})) as client:
            for name in own:
                said, source = await answer(client, name)
                assert (said, source["source"]) == (offline(weights_in(store, name, kind)), "adapter")
                assert said != offline(None)
            for name in foreign:
                said, source = await answer(client, name)
                assert (said, source["source"]) == (offline(None, text_of(store, name)), "in_context")
                assert f"its adapter is a {other}" in source["reason"] and f"runs {kind}" in source["reason"]
            assert (await answer(client, "bare"))[1]["reason"] == "no adapter for this content and base yet"

    asyncio.run(check("lora", "gated_memory", ["a", "b", "both"], ["memory"]))
    asyncio.run(check("gated_memory", "lora", ["memory", "both"], ["a", "b"]))


def test_a_store_of_memories_alone_is_served_without_being_told(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    lifted(store, "gated_memory", "memory")

    async def main() -> None:
        for settings in ({}, {"max_rank": 4}):
            async with client_of(store, **settings) as client:
                assert (await answer(client, "memory"))[0] == offline(weights_in(store, "memory", "gated_memory"))

    asyncio.run(main())
    empty = Store.open(tmp_path / "empty", create=True)
    asked = ServeSettings(base="unused", store=empty.url, kind="gated_memory")
    assert (
        running := Service(BASE, empty, asked).resolver.spec
    ) is not None and running.kind_name == "gated_memory (shifted gate)"


def test_adapters_of_some_sites_are_served_beside_those_of_all(tmp_path: Path) -> None:
    """Padded with zeros, also where no adapter of the store has all sites."""
    store = Store.open(tmp_path, create=True)
    lifted(store, "lora", "queries", sites=["q", "v"])

    async def check(*names: str) -> None:
        async with client_of(store) as client:
            answers = await asyncio.gather(*(answer(client, name) for name in names))
            for name, (said, source) in zip(names, answers, strict=True):
                assert (said, source["source"]) == (offline(weights_in(store, name, "lora")), "adapter"), name
                assert said != offline(None)

    asyncio.run(check("queries"))
    lifted(store, "lora", "all")
    lifted(store, "lora", "outputs", sites=["down"])
    specs = {weights_in(store, name, "lora").spec for name in ("queries", "all", "outputs")}
    assert len(specs) == 3 and {len(spec.layers[0]) for spec in specs} == {1, 2, 7}
    asyncio.run(check("queries", "all", "outputs", "queries"))


def test_a_client_says_where_the_answer_shall_come_from(store: Store) -> None:
    async def main() -> None:
        async with client_of(store) as client:
            weights, text = weights_in(store, "a", "lora"), text_of(store, "a")
            expected = {
                "auto": offline(weights),
                "adapter": offline(weights),
                "in_context": offline(None, text),
                "adapter_in_context": offline(weights, text),
            }
            assert len(set(expected.values())) == 3
            for mode, wanted in expected.items():
                said, source = await answer(client, "a", mode)
                assert (said, source["source"]) == (wanted, "adapter" if mode == "auto" else mode)
                assert ("adapter" in source) == (mode != "in_context") and "reason" not in source and "truncated" not in source
            assert (await answer(client, "bare", "in_context"))[1]["source"] == "in_context"
            body = {"model": "base:a", "prompt": "The", "imprint": {"mode": "adapter_in_context"}}
            completion = (await client.post("/v1/completions", json=body)).json()
            assert completion["imprint"]["source"] == "adapter_in_context" and completion["usage"]["prompt_tokens"] > 10

    asyncio.run(main())


def test_a_mode_that_cannot_be_is_refused_and_says_why(store: Store) -> None:
    async def main() -> None:
        async with client_of(store) as client:
            for model, mode, told in (
                ("base:bare", "adapter", "no adapter for this content"),
                ("base:bare", "adapter_in_context", "no adapter for this content"),
                ("base:memory", "adapter", "gated_memory"),
                ("base", "adapter", "which has no document"),
                ("base", "in_context", "which has no document"),
            ):
                response = await client.post("/v1/chat/completions", json=ask(model, imprint={"mode": mode}))
                error = response.json()["error"]
                assert (response.status_code, error["param"], error["code"]) == (400, "imprint.mode", "mode_impossible")
                assert told in error["message"]
            assert (await client.post("/v1/chat/completions", json=ask("base", imprint={"mode": "auto"}))).status_code == 200
            for wish, param in (({"mode": "both"}, "imprint.mode"), ({"modes": "auto"}, "imprint.modes"), ("auto", "imprint")):
                response = await client.post("/v1/chat/completions", json=ask("base:a", imprint=wish))
                assert (response.status_code, response.json()["error"]["param"]) == (400, param)

    asyncio.run(main())


def test_a_long_document_is_shown_by_its_head_and_tail(store: Store) -> None:
    async def main() -> None:
        async with client_of(store) as client:
            said, source = await answer(client, "long")
            assert (source["source"], source["truncated"]) == ("in_context", True)
            assert said == offline(None, text_of(store, "long"), LENGTH - TOKENS)
            free = ask("base:long", QUESTION)
            del free["max_tokens"]
            usage = (await client.post("/v1/chat/completions", json=free)).json()["usage"]
            assert usage["prompt_tokens"] == LENGTH - LENGTH // 4
            for changes in ({"max_tokens": LENGTH}, {"messages": [{"role": "user", "content": "word " * LENGTH}]}):
                refused = await client.post("/v1/chat/completions", json=ask("base:long") | changes)
                assert refused.json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(main())


def test_the_command_line_asks_in_a_mode(store: Store) -> None:
    own = ServeSettings(base="unused", store=store.url, tenant="t", collection="c", run=ServeRun(slots=1))
    config = uvicorn.Config(create_app(Service(BASE, store, own)), log_level="critical", ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            where = ["--url", f"http://127.0.0.1:{listener.getsockname()[1]}", "--max-tokens", str(TOKENS)]
            for mode, weights, shown in (
                ("in_context", None, text_of(store, "a")),
                ("auto", weights_in(store, "a", "lora"), None),
            ):
                result = CliRunner().invoke(imprint.app, ["ask", QUESTION, "--model", "base:a", "--mode", mode, *where])
                said, source = result.output.rstrip().rsplit("\n", 1)
                assert said.split() == offline(weights, shown).split()
                assert source == f"from: {'adapter' if mode == 'auto' else mode}"
            refused = CliRunner().invoke(imprint.app, ["ask", QUESTION, "--mode", "adapter", *where])
            assert refused.exit_code == 2 and "which has no document" in refused.output
        finally:
            server.should_exit = True
            thread.join()

"""A tiny served world for tests: a random base with the world's tokenizer, documents and random adapters in a store."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights
from core.engine.requests import Request
from core.engine.token_loop import generate
from core.store.manifest import NewAdapter, Producer
from core.store.store import Store
from core.text.documents import Document, Window
from core.text.prompts import clean_answer, in_context, prompt
from pipelines.world.tokenizer import build_tokenizer
from serve.api import create_app
from serve.service import Service
from serve.settings import ServeRun, ServeSettings
from tests.models import random_adapters, tiny_config

NAMES = ("plain", "with space", "a/b", "a:b", "100% of it", "%2F", "日本 é", "q?x=1&y#z", "+plus", "base", "..", "a\\b'\"")
TOKENS = 12
LENGTH = 2048


@dataclass(frozen=True)
class World:
    """Document i has adapter i."""

    base: BaseModel
    store: Store
    documents: list[Document]
    weights: LoraWeights

    def settings(self, **run: object) -> ServeSettings:
        return ServeSettings(base="unused", store=self.store.url, tenant="t", collection="c", max_rank=4, run=ServeRun(**run))


@cache
def served_base(seed: int = 0) -> BaseModel:
    tokenizer = build_tokenizer()
    config = tiny_config()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), LENGTH
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BaseModel(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), tokenizer)


def producer_for(base: BaseModel, **config: str) -> Producer:
    return Producer(method="shine", weights="w" * 64, config={"base": base.fingerprint, **config})


def new_adapter(document: Document, weights: LoraWeights, producer: Producer, window: tuple[int, int] = (0, 5)) -> NewAdapter:
    return NewAdapter(
        tenant=document.tenant,
        content_hash=document.content_hash,
        window=Window(*window),
        producer=producer,
        spec=weights.spec,
        encoding="fp32",
        vector=weights.flat_BN[0],
        tokens=5,
    )


def make_document(name: str, text: str, collection: str = "c") -> Document:
    return Document(tenant="t", collection=collection, name=name, text=text)


def make_world(path: Path, names: Sequence[str] = NAMES, base: BaseModel | None = None, size: float = 0.3) -> World:
    base = base or served_base()
    documents = [make_document(name, f"The text of document {number}.") for number, name in enumerate(names)]
    weights = random_adapters(base, len(documents), rank=4, size=size)
    store = Store.open(path, create=True)
    producer = producer_for(base)
    rows = [weights.select(slice(number, number + 1)) for number in range(len(documents))]
    store.put(documents, [new_adapter(each, row, producer) for each, row in zip(documents, rows, strict=True)])
    return World(base, store, documents, weights)


def offline(world: World, question: str, adapter: int | None, shown: str | None = None, tokens: int = TOKENS) -> str:
    """The answer of `core.engine.token_loop.generate`: under one adapter or none, with a document shown or without."""
    tokenizer = world.base.tokenizer
    assert tokenizer is not None
    ids = prompt(tokenizer, [{"role": "user", "content": question if shown is None else in_context(shown, question)}])
    weights = None if adapter is None else world.weights.select(slice(adapter, adapter + 1))
    done = generate(world.base, [Request("r", ids, tokens, weights, world.base.stop_ids)])["r"]
    return clean_answer(str(tokenizer.decode(done.token_ids, skip_special_tokens=True)))


@asynccontextmanager
async def serving(world: World, **run: object) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """A client of the application in this process, without Ray and without sockets."""
    service = Service(world.base, Store.open(world.store.url), world.settings(**run))
    transport = httpx.ASGITransport(create_app(service))
    async with service.running(), httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client, service


def ask(model: str, question: str = "Who is it?", **changes: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, **changes}


async def chat(client: httpx.AsyncClient, model: str, question: str = "Who is it?", **changes: object) -> str:
    response = await client.post("/v1/chat/completions", json=ask(model, question, **changes))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])

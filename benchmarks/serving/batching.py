"""Tokens per second of 16 concurrent requests for 16 documents against the same requests one after another, over HTTP.

A real server (Ray Serve, one replica) with a base of the reference's shape and random weights, unless `--base` names another;
random adapters of rank 4 in a store. Client, proxy and replica share the machine. Both ways by turns, so that both meet the same
machine; the answers must be equal, and equal to offline generation. Run from the root: `python -m benchmarks.serving.batching`;
about two minutes on two cores.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import BaseModel, load_base, tokenizer_of
from core.adapters.lora import LoraWeights
from core.engine.requests import Request
from core.engine.token_loop import generate
from core.store.manifest import NewAdapter, Producer
from core.store.store import Store
from core.text.documents import Document, Window
from core.text.prompts import clean_answer, prompt
from pipelines.ray_session import free_port, ray_session
from pipelines.world.tokenizer import build_tokenizer
from serve.app import run
from serve.settings import ServeRun, ServeSettings

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RANK = 4


def save_base(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_config(Qwen3Config.from_dict({"vocab_size": len(tokenizer), **SHAPE}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fill_store(base: BaseModel, url: Path, count: int) -> LoraWeights:
    """Documents d0, d1, ... and their adapters, which are also returned."""
    spec = base.spec(RANK)
    weights = LoraWeights(spec, 0.05 * torch.randn(count, spec.numel))
    producer = Producer(method="random", weights="0", config={"base": base.fingerprint})
    documents = [Document(tenant="default", collection="default", name=f"d{i}", text=f"Document {i}.") for i in range(count)]
    adapters = [
        NewAdapter(
            tenant=document.tenant,
            content_hash=document.content_hash,
            window=Window(0, 1),
            producer=producer,
            spec=spec,
            encoding="fp32",
            vector=flat_N,
            tokens=1,
        )
        for document, flat_N in zip(documents, weights.flat_BN, strict=True)
    ]
    Store.open(url, create=True).put(documents, adapters)
    return weights


def question(row: int) -> str:
    return f"Question {row}: what is the answer of document {row}?"


def offline_answers(base: BaseModel, weights: LoraWeights, tokens: int) -> list[str]:
    tokenizer, rows = tokenizer_of(base), range(len(weights))
    prompts = [prompt(tokenizer, [{"role": "user", "content": question(row)}]) for row in rows]
    requests = [Request(str(row), prompts[row], tokens, weights.select(slice(row, row + 1))) for row in rows]
    done = generate(base, requests)
    return [clean_answer(str(tokenizer.decode(done[str(row)].token_ids, skip_special_tokens=True))) for row in rows]


async def ask(client: httpx.AsyncClient, row: int, tokens: int) -> dict[str, Any]:
    body = {
        "model": f"base:d{row}",
        "messages": [{"role": "user", "content": question(row)}],
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    assert answer["imprint"]["source"] == "adapter"
    return answer


async def measure(url: str, rows: int, tokens: int, runs: int) -> tuple[list[tuple[float, float]], list[list[str]]]:
    """(concurrent, one by one) tokens per second of each run, and every set of answers that was given."""
    rates, texts = [], []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def timed(concurrent: bool) -> float:
            begin = time.perf_counter()
            if concurrent:
                answers = await asyncio.gather(*(ask(client, row, tokens) for row in range(rows)))
            else:
                answers = [await ask(client, row, tokens) for row in range(rows)]
            wall_s = time.perf_counter() - begin
            texts.append([str(answer["choices"][0]["message"]["content"]) for answer in answers])
            return float(sum(answer["usage"]["completion_tokens"] for answer in answers)) / wall_s

        await timed(True)
        for _ in range(runs):
            rates.append((await timed(True), await timed(False)))
    return rates, texts


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "least": round(min(values), 2), "most": round(max(values), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--base", help="a base's directory, instead of random weights")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        where, store = options.base or f"{folder}/base", Path(folder, "store")
        if not options.base:
            save_base(Path(where))
        base = load_base(where)
        weights = fill_store(base, store, options.rows)
        expected = offline_answers(base, weights, options.new_tokens)
        settings = ServeSettings(base=where, store=str(store), max_rank=RANK, run=ServeRun(port=free_port(), slots=options.rows))
        with ray_session(told_of_retries=False, include_dashboard=False), run(settings) as server:
            rates, texts = asyncio.run(measure(server.url, options.rows, options.new_tokens, options.runs))
    if any(answers != expected for answers in texts):
        raise SystemExit("the server gave other answers than offline generation")

    result = {
        "tokens_per_s_concurrent": summary([concurrent for concurrent, _ in rates]),
        "tokens_per_s_one_by_one": summary([one_by_one for _, one_by_one in rates]),
        "ratio": summary([concurrent / one_by_one for concurrent, one_by_one in rates]),
        "answers_equal_to_offline": True,
        "settings": {"rows": options.rows, "new_tokens": options.new_tokens, "runs": options.runs, "rank": RANK},
        "model": options.base or {"architecture": "qwen3", **SHAPE},
    }
    print(write_result("serving_batching", result, folder=options.output).read_text())


if __name__ == "__main__":
    main()

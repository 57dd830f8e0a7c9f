"""Tokens per second of 16 concurrent requests under 16 adapters against the same requests one after another.

A random Qwen3 of about 3 million parameters, greedy, fp32, both ways in one process by turns, so that both meet the same machine.
The tokens must be equal. Run from the root: `python -m benchmarks.serving.engine_batching`; about a minute on one core.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights
from core.engine.requests import Request
from core.engine.token_loop import Engine

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def build(rows: int, rank: int, prompt_tokens: int, new_tokens: int, device: str) -> tuple[BaseModel, list[Request]]:
    torch.manual_seed(0)
    base = BaseModel(AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE)).to(device))
    spec = base.spec(rank)
    numbers = random.Random(0)
    requests = [
        Request(
            str(row),
            numbers.choices(range(SHAPE["vocab_size"]), k=prompt_tokens),
            new_tokens,
            LoraWeights(spec, 0.05 * torch.randn(1, spec.numel)).to(device),
        )
        for row in range(rows)
    ]
    return base, requests


def run(engine: Engine, groups: list[list[Request]]) -> tuple[float, dict[str, list[int]]]:
    """Tokens per second of the groups, one after another, and all tokens."""
    tokens: dict[str, list[int]] = {request.request_id: [] for group in groups for request in group}
    start = time.perf_counter()
    for group in groups:
        for request in group:
            engine.submit(request)
        while not engine.idle:
            for token in engine.step():
                tokens[token.request_id].append(token.token_id)
    return sum(map(len, tokens.values())) / (time.perf_counter() - start), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    base, requests = build(options.rows, options.rank, options.prompt_tokens, options.new_tokens, options.device)
    engine = Engine(base, base.spec(options.rank), slots=options.rows, max_length=options.prompt_tokens + options.new_tokens)
    together, single = [requests], [[request] for request in requests]
    run(engine, together)
    rates: list[tuple[float, float]] = []
    for _ in range(options.runs):
        concurrent, tokens = run(engine, together)
        one_by_one, expected = run(engine, single)
        if tokens != expected:
            raise SystemExit("concurrent requests gave other tokens than single ones")
        rates.append((concurrent, one_by_one))

    result = {
        "tokens_per_s_concurrent": round(statistics.median(rate[0] for rate in rates), 1),
        "tokens_per_s_one_by_one": round(statistics.median(rate[1] for rate in rates), 1),
        "ratio": round(statistics.median(rate[0] / rate[1] for rate in rates), 2),
        "ratio_of_each_run": [round(rate[0] / rate[1], 2) for rate in rates],
        "tokens_equal": True,
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "model": {"architecture": "qwen3", **SHAPE},
    }
    print(write_result("engine_batching", result, options.device, options.output).read_text())


if __name__ == "__main__":
    main()

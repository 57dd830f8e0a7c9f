"""Speeds at real shapes on one GPU, random weights: adapters generated, training steps, tokens under many adapters.

Run from the root: `python -m benchmarks.training.gpu --shape 0.6b` (1.7b, 8b). Needs PyTorch, transformers, pydantic and
safetensors only. Prints and writes benchmarks/results/gpu_SHAPE.json. MFU counts matrix products (2 a weight and token, attention
left out) against --peak-tflops. `--device cpu --shape tiny` shows on any machine that it runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3Config

from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights
from core.engine.requests import Request
from core.engine.token_loop import generate
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.shine.objective import hypernetwork_loss
from core.training.examples import Batch

COMMON: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
TINY: dict[str, Any] = {"vocab_size": 1024, "num_key_value_heads": 1, "head_dim": 16, "num_attention_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, **TINY},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
ROWS = (1, 8, 64)


def build(shape: str, device: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Hypernetwork:
    """A random base in bf16 and its hypernetwork in SHINE's sizes (H / 128 heads, feed-forward 2 H, rank 8, Meta LoRA 128)."""
    sizes = COMMON | SHAPES[shape]
    if tokenizer is not None:
        sizes["vocab_size"] = max(sizes["vocab_size"], len(tokenizer))
    config = Qwen3Config(**sizes, tie_word_embeddings=shape != "8b")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    hidden = config.hidden_size
    settings = HypernetworkSettings(num_heads=hidden // 128, feed_forward=2 * hidden, input_norm="rms", initial_delta=0.05)
    return Hypernetwork(BaseModel(model, tokenizer), settings)


def median_s(run: Callable[[], object], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of a call, after two warm-ups, the device waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for number in range(rounds + 2):
        wait()
        started = time.perf_counter()
        run()
        wait()
        if number >= 2:
            seconds.append(time.perf_counter() - started)
    return {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}


def generation(hypernetwork: Hypernetwork, rows: int, tokens: int, rounds: int, peak_tflops: float) -> dict[str, float]:
    """Adapters of `rows` documents of `tokens` tokens at once."""
    device = hypernetwork.base.device
    ids = torch.randint(0, 1000, (rows, tokens), device=device)
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            hypernetwork.generate(ids, mask)

    timing = median_s(run, rounds, device)
    seconds = timing["median_s"]
    mfu = operations(hypernetwork, rows, tokens) / seconds / (peak_tflops * 1e12)
    return timing | {"documents_per_s": rows / seconds, "mfu": mfu}


def operations(hypernetwork: Hypernetwork, rows: int, tokens: int) -> int:
    """Of the matrix products of `rows` documents of `tokens` tokens."""
    base_weights = sum(linear.weight.numel() for linear in hypernetwork.base.linears.values())
    memory = len(hypernetwork.memory_MH)
    m2p = sum(p.numel() for p in hypernetwork.m2p.transformer_layers.parameters())
    read = (tokens + memory) * (base_weights + hypernetwork.meta_spec.numel)
    return 2 * rows * (read + memory * len(hypernetwork.base.layers) * m2p)


def training(hypernetwork: Hypernetwork, rows: int, tokens: int, rounds: int) -> dict[str, float]:
    """Forward and backward of reconstruction, layers recomputed; peak memory on a GPU only."""
    device = hypernetwork.base.device
    ids = torch.randint(0, 1000, (rows, tokens), device=device)
    mask = torch.ones_like(ids)
    batch = Batch(ids, mask, ids, mask, ids, torch.arange(rows), (1,) * rows)

    def run() -> None:
        hypernetwork.zero_grad()
        with torch.autocast(device.type, torch.bfloat16), hypernetwork.base.checkpointing():
            loss = hypernetwork_loss(hypernetwork, batch) / batch.tokens
        loss.backward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timing = median_s(run, rounds, device)
    timing["documents_per_s"] = rows / timing["median_s"]
    return timing | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {})


def answering(hypernetwork: Hypernetwork, rows: int, adapters: int, new_tokens: int) -> dict[str, float]:
    """Tokens/s of the engine: `rows` requests at once, under `adapters` different adapters (0: the bare base)."""
    base, spec = hypernetwork.base, hypernetwork.spec
    flat = torch.randn(max(adapters, 1), spec.numel, device=base.device, dtype=torch.bfloat16) * 1e-3
    weights = LoraWeights(spec, flat)
    prompts = torch.randint(0, 1000, (rows, 64)).tolist()

    def run() -> None:
        chosen = [weights.select(slice(row % adapters, row % adapters + 1)) if adapters else None for row in range(rows)]
        requests = [Request(str(row), prompts[row], new_tokens, chosen[row]) for row in range(rows)]
        generate(base, requests, slots=rows, prefill_tokens_per_step=8192)

    timing = median_s(run, 3, base.device)
    return timing | {"tokens_per_s": rows * new_tokens / timing["median_s"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16; the datasheet's figure for an H200")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    tokens, rounds = options.document_tokens, options.rounds
    hypernetwork = build(options.shape, options.device)
    result: dict[str, Any] = {"shape": options.shape, "document_tokens": tokens}
    result["generation"] = {rows: generation(hypernetwork, rows, tokens, rounds, options.peak_tflops) for rows in (1, 8, 16)}
    result["training"] = {rows: training(hypernetwork, rows, tokens, rounds) for rows in (1, 4)}
    result["answering"] = {
        f"{rows}_rows_{adapters}_adapters": answering(hypernetwork, rows, adapters, options.new_tokens)
        for rows in ROWS
        for adapters in sorted({0, 1, rows})
    }
    print(write_result(f"gpu_{options.shape}", result, options.device, options.output).read_text())


if __name__ == "__main__":
    main()

"""Tiny real models for tests: random weights, every architecture that the project claims."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights
from pipelines.world.documents import WorldSpec, generate, write
from pipelines.world.tokenizer import build_tokenizer

SHAPE = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(architecture: str = "qwen3", tied: bool = True) -> PretrainedConfig:
    """architecture: qwen3 (norms on q and k), llama, or qwen2 (biases on q, k and v)."""
    shape = {**SHAPE, "tie_word_embeddings": tied}
    match architecture:
        case "qwen3":
            return Qwen3Config(**shape, head_dim=12)
        case "llama":
            return LlamaConfig(**shape)
        case "qwen2":
            return Qwen2Config(**shape)
    raise ValueError(f"no tiny model for {architecture}")


def tiny_base(
    architecture: str = "qwen3", tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> BaseModel:
    """A base without tokenizer; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, tied), attn_implementation=attention)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return BaseModel(model.to(dtype))


def world_base(
    max_length: int = 256, initializer_range: float = 0.2, hidden_size: int = 16, feed_forward: int = 24, num_heads: int = 2
) -> BaseModel:
    """A Qwen3 of two layers with the reference world's tokenizer; equal arguments give equal weights."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=feed_forward,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=8,
        max_position_embeddings=max_length,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaseModel(AutoModelForCausalLM.from_config(config), tokenizer)


def write_world(root: Path, documents: int, rows_per_group: int) -> None:
    """What training reads: `train`, a corpus of the reference world, and `base`, a tiny one with the world's tokenizer."""
    write(generate(WorldSpec(count=documents)), root / "train", rows_per_group=rows_per_group)
    base = world_base(hidden_size=32, feed_forward=48, num_heads=4)
    for part in (base.model, base.tokenizer):
        part.save_pretrained(root / "base")


def random_adapters(
    base: BaseModel, count: int, rank: int = 4, seed: int = 0, size: float = 0.1, generated_bias: bool = False
) -> LoraWeights:
    """Adapters of every site with normal numbers of standard deviation `size`, in the base's type."""
    spec = base.spec(rank, generated_bias=generated_bias)
    flat_BN = torch.randn(count, spec.numel, generator=torch.Generator().manual_seed(seed)) * size
    return LoraWeights(spec, flat_BN.to(base.dtype))


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """`[rows, length]` token ids without the special ones."""
    return torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))

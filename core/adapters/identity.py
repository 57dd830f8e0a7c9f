"""What tells one base from another: SHA-256 over weights, configuration, tokenizer and chat template.

In: those parts. Out: hex digests, the same wherever and in whatever type the base runs. Costs one pass over the weights.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from core.config import digest

NOT_IDENTITY = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "architectures")


def identity(
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    """The fingerprint of a base; floating weights are read as `dtype` where one is given."""
    described = _without_run(json.loads(json.dumps(config.to_dict(), default=str)))
    return digest({"weights": hash_tensors(weights, dtype), "config": described, **_text_identity(tokenizer)})


def hash_tensors(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes; floating tensors are read as `dtype` where one is given."""
    state = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        stored = tensor.detach()
        if dtype is not None and stored.is_floating_point():
            stored = stored.to(dtype)
        state.update(f"{name} {stored.dtype} {tuple(stored.shape)}\n".encode())
        state.update(stored.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _without_run(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those within it, without what says how it is run."""
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    return {key: _without_run(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _text_identity(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str | None]:
    if tokenizer is None:
        return {"tokenizer": None, "chat_template": None}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(vocabulary if backend is None else backend.to_str())
    if backend is not None:  # state that calling the tokenizer leaves behind
        description["padding"] = description["truncation"] = None
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"tokenizer": digest([description, tokens]), "chat_template": tokenizer.chat_template}

"""Sliding windows in the engine, and the attention that it refuses."""

from typing import Any

import pytest
import torch
from transformers import DogeConfig, OlmoHybridConfig, Qwen3Config

from core.engine.attention import layer_windows
from core.engine.requests import Request
from core.engine.token_loop import Engine, generate
from tests.core.engine.test_engine import adapters, greedy_loop, model_of, prompt
from tests.models import SHAPE, tiny_base


def test_attention_that_the_engine_does_not_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers of kind linear_attention: the engine runs full or sliding"):
        Engine(model_of(OlmoHybridConfig(**{**SHAPE, "num_hidden_layers": 4})))
    choosing = model_of(DogeConfig(**SHAPE, keep_window_size=32))
    with pytest.raises(ValueError, match="picks 32 tokens by content where there are more: give a max_length of at most 32"):
        Engine(choosing)
    Engine(choosing, max_length=32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_in_sliding_windows_give_what_full_forwards_give(attention: str) -> None:
    """Windows are shorter than prompts, than the pieces that they are read in, and than answers; rows move between slots."""
    shape = {**SHAPE, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    config = Qwen3Config(**shape, head_dim=12, attn_implementation=attention)
    base = model_of(config)
    assert layer_windows(base) == [None, 7, 7]
    weights = adapters(base, 3)
    requests = [Request(str(i), prompt(3 + 17 * i % 50, i), 5 + 3 * i, weights[i % 3] if i % 4 else None) for i in range(8)]
    completions = generate(base, requests, slots=3, prefill_tokens_per_step=20)
    assert [completions[request.request_id].token_ids for request in requests] == [greedy_loop(base, each) for each in requests]


def test_masks_that_are_no_window_are_refused() -> None:
    base = tiny_base()
    assert layer_windows(base) == [None, None, None]

    def chunks_of_8(layer: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> Any:
        position = inputs["position_ids"][0, -1]
        seen_T = torch.arange(int(position) + 1) >= position // 8 * 8
        return args, {**inputs, "attention_mask": seen_T[None, None, None]}

    def every_other(layer: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> Any:
        return args, {
            **inputs,
            "attention_mask": (torch.arange(int(inputs["position_ids"][0, -1]) + 1) % 2 == 0)[None, None, None],
        }

    for change, reason in ((chunks_of_8, "in chunks"), (every_other, "hides tokens between")):
        hook = base.layers[1].register_forward_pre_hook(change, with_kwargs=True, prepend=True)
        with pytest.raises(ValueError, match=f"layer 1 .*{reason}"):
            Engine(base)
        hook.remove()

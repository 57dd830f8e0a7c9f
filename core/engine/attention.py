"""Which bases the engine runs, and how many tokens back each of their layers sees, as the model itself masks them.

Sliding windows differ between architectures, between layers, and in what configurations call them. So the model is watched: one
token, with a cache that pretends to hold what came before, shows which of those keys every layer may look at. Two positions tell
a window, which moves with the token, from a chunk, which does not. The engine keeps keys that have left a window, and masks them.
Cost: two passes of one token over the keys of two windows.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from core.adapters.base_model import BaseModel

SHORT = 64  # tokens, where the configuration names no window: what is not causal attention shows by then


class _Pretended(CacheLayerMixin):
    """A layer's cache that says it holds `length` tokens, all of them with the keys and values of the one that comes."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is kept."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = self.length + 1
        return key_states.expand(-1, -1, length, -1), value_states.expand(-1, -1, length, -1)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


def check_base(base: BaseModel, max_length: int) -> None:
    """Raises `ValueError` for a base whose tokens the engine could not reproduce, and for a length that it does not take."""
    config = base.model.config.get_text_config()
    if not 2 <= max_length <= base.max_length:
        raise ValueError(f"max_length is {max_length}: this base takes 2 to {base.max_length} tokens")
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(f"the base runs {config._attn_implementation} attention: load it with attention='sdpa' or 'eager'")
    if unknown := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"the base has layers of kind {', '.join(sorted(unknown))}: the engine runs full or sliding attention")
    chosen = getattr(config, "keep_window_size", max_length)
    if max_length > chosen:
        raise ValueError(f"the base picks {chosen} tokens by content where there are more: give a max_length of at most {chosen}")
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        limit = rope.get("original_max_position_embeddings", max_length)
        if rope.get("rope_type") == "longrope" and max_length > limit:
            raise ValueError(f"a row beyond {limit} tokens would change all positions: give a max_length of at most {limit}")


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """One for all layers, or one for each kind of layer."""
    each = [value for value in parameters.values() if isinstance(value, dict)]
    return each or [parameters]


@torch.no_grad()
def layer_windows(base: BaseModel) -> list[int | None]:
    """Tokens that each layer sees, the newest included; None where it sees all. Raises `ValueError` for any other attention."""
    named = getattr(base.model.config.get_text_config(), "sliding_window", None) or SHORT
    last = max(1, min(base.max_length, 2 * named) - 1)
    near, far = (_windows_at(base, position) for position in (last - 1, last))
    for layer, (one, other) in enumerate(zip(near, far, strict=True)):
        if one != other:
            raise ValueError(f"layer {layer} sees tokens in chunks: the engine runs full or sliding attention")
    return far


def _windows_at(base: BaseModel, position: int) -> list[int | None]:
    masks: dict[int, Tensor | None] = {}
    with base.masking(masks.setdefault):
        base.decoder(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device),
            position_ids=torch.tensor([[position]], device=base.device),
            past_key_values=Cache(layers=[_Pretended(position) for _ in base.layers]),
            use_cache=True,
        )
    return [_window(masks[layer], layer) for layer in range(len(base.layers))]


def _window(mask: Tensor | None, layer: int) -> int | None:
    if mask is None:
        return None
    visible_T = mask[0, 0, -1] if mask.dtype == torch.bool else mask[0, 0, -1] == 0
    count = int(visible_T.sum())
    if not count or not visible_T[-count:].all():
        raise ValueError(f"layer {layer} hides tokens between those that it sees: the engine runs full or sliding attention")
    return None if count == len(visible_T) else count

"""The logits of a causal language model from its final hidden states, by the model's own forward.

Architectures do more than apply their head: Granite and Cohere scale what it gives, Gemma 2 caps it. So the whole forward of the
model runs, with its decoder replaced by what gives back the hidden states that it is handed. Parameters are shared; nothing is
copied and the model stays as it is. Cost: that of the head, and about 20 us a call.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
COARSE = 5e-2


class _Output:
    """What a decoder puts out, of which only the hidden states are there."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> _Output:
        return _Output(inputs_embeds)


class Head:
    """Final hidden states in, logits out, as `model` computes them from the output of `decoder`, one of its submodules."""

    def __init__(self, model: PreTrainedModel, decoder: nn.Module) -> None:
        self._forward = copy.copy(model)
        parts = {
            name: _Given() if any(module is decoder for module in part.modules()) else part
            for name, part in model.named_children()
        }
        self._forward.__dict__["_modules"] = parts

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[..., V]` from `[..., H]`; in the model's type, or the one that the model gives its logits."""
        output = self._forward.forward(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False)
        logits: Tensor = output.logits
        return logits.view(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def check(self, model: PreTrainedModel, decoder: nn.Module) -> None:
        """Raises `ValueError` where logits do not follow from hidden states, or those of a token from what comes after it.

        Costs a pass over two rows of two tokens. They start alike, and not both with padding, whose embedding of zeros would
        hide what is multiplied.
        """
        last = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings - 1
        ids_BT = torch.tensor([[last, 0], [last, 1]], device=model.device)
        seen: list[Tensor] = []
        hook = decoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        try:
            expected_BTV = model(input_ids=ids_BT, use_cache=False).logits
        finally:
            hook.remove()
        tolerance = TOLERANCE.get(model.dtype, COARSE) * expected_BTV.abs().max()
        if not (self(seen[0]) - expected_BTV).abs().max() <= tolerance:
            raise ValueError(
                f"the logits of {type(model).__name__} do not follow from its last hidden states: training and serving would "
                "compute others than the model's own, so take a base built like Llama or Qwen"
            )
        if not (expected_BTV[0, 0] - expected_BTV[1, 0]).abs().max() <= tolerance:
            raise ValueError(f"{type(model).__name__} lets tokens see those after them: take a base that only looks back")

"""How a token is drawn from logits. Greedy choice needs none of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.engine.requests import Sampling


def draw(logits_BV: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """`[B]`: one token a row, by inverting the distribution function of its nucleus at a number between 0 and 1."""
    temperature = [sampling.temperature for sampling in samplings]
    top_p = [sampling.top_p for sampling in samplings]
    temperature_B1, top_p_B1, uniform_B1 = torch.tensor([temperature, top_p, uniform], device=logits_BV.device)[:, :, None]
    logits_BV, id_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    p_BV = ((logits_BV - logits_BV[:, :1]) / temperature_B1).softmax(dim=-1)
    before_BV = p_BV.cumsum(dim=-1) - p_BV
    p_BV = torch.where(before_BV < top_p_B1, p_BV, 0.0)
    reached_BV = p_BV.cumsum(dim=-1)
    index_B1 = (reached_BV <= uniform_B1 * reached_BV[:, -1:]).sum(dim=-1, keepdim=True)
    return id_BV.gather(1, index_B1.clamp_max((p_BV > 0).sum(dim=-1, keepdim=True) - 1).clamp_min(0))[:, 0]

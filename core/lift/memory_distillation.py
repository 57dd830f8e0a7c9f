"""Gated memories learn from attention itself, before fine-tuning (the released LIFT code's first phase; arXiv 2502.14644 v3).

Softmax attention over [document keys ; other keys] splits exactly: it is (1 - g) * attention over the others + g * m, where m is
attention over the document alone and g the document's share of the partition sum. So m and g of a pass that has the document in
context are what a memory has to answer without it. In: a base, document ids and the ids of a continuation. Out: targets for
each layer, and how far a memory is from them.

It knows decoders whose rotary embedding turns halves of the head against each other (Llama, Qwen2, Qwen3); another one, or a
window of attention, is refused, as it would not reproduce the base's own heads. Cost: one pass over document and continuation,
and B x heads x T x (S + T) scores, one layer at a time; the targets keep 2 x heads x head_dim + heads numbers a token and layer.
Here D in a tensor's name stands for the head size and S for the keys.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from core.adapters.base_model import Attachment, BaseModel
from core.adapters.gated_memory import RELEASED_NAMES, GatedMemory, respond
from core.adapters.lora import Rows
from core.adapters.spec import ATTENTION

LEAST_NORM = 0.1  # of the target's: below it the cosine's gradient grows no further, at m = 0 it would be infinite

NOT_PLAIN = "no memory can be distilled from it, fine-tune without distillation"


class Split(NamedTuple):
    """Attention over the document `memory_BHTD`, its share `gate_BHT`, and attention over the other keys `rest_BHTD`."""

    memory_BHTD: Tensor
    gate_BHT: Tensor
    rest_BHTD: Tensor

    @property
    def attention_BHTD(self) -> Tensor:
        """Attention over all keys."""
        return torch.lerp(self.rest_BHTD, self.memory_BHTD, self.gate_BHT[..., None])


def split_attention(
    query_BHTD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, visible_BTS: Tensor, document_length: int, scaling: float
) -> Split:
    """Splits softmax attention into that over the first `document_length` keys and that over the others.

    Queries and keys as attention multiplies them, so after rotary embedding. Every query must see a key on either side.
    """
    score_BHTS = (query_BHTD @ key_BHSD.transpose(2, 3) * scaling).masked_fill(~visible_BTS[:, None], -torch.inf)
    sizes = [document_length, key_BHSD.shape[2] - document_length]
    parts = []
    for score, value in zip(score_BHTS.split(sizes, dim=3), value_BHSD.split(sizes, dim=2), strict=True):
        log_sum_BHT = score.logsumexp(dim=3)
        parts.append(((score - log_sum_BHT[..., None]).exp() @ value, log_sum_BHT))
    (memory_BHTD, log_document_BHT), (rest_BHTD, log_rest_BHT) = parts
    return Split(memory_BHTD, torch.sigmoid(log_document_BHT - log_rest_BHT), rest_BHTD)


@dataclass(frozen=True, eq=False)
class DistillationTargets:
    """For each layer the continuation's queries before rotary embedding, and m and g that a memory shall give for them.

    `[B, T, heads, head_dim]`, `[B, T, heads, head_dim]`, `[B, T, heads]`; fp32 or more. `mask_BT` names the real tokens.
    """

    query_BTHD: tuple[Tensor, ...]
    memory_BTHD: tuple[Tensor, ...]
    gate_BTH: tuple[Tensor, ...]
    mask_BT: Tensor


class _Watching(Attachment):
    """Keeps each layer's queries and its heads' outputs at the last `count` positions."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.layers: list[tuple[Tensor, Tensor]] = []

    def mix(self, layer: int, query: Tensor, heads_BTI: Tensor) -> Tensor:
        self.layers.append((query.flatten(2)[:, -self._count :], heads_BTI[:, -self._count :]))
        return heads_BTI


@torch.no_grad()
def distillation_targets(
    base: BaseModel,
    document_BS: Tensor,
    ids_BT: Tensor,
    document_mask_BS: Tensor | None = None,
    mask_BT: Tensor | None = None,
) -> DistillationTargets:
    """What attention over the document gives the tokens that follow it, when row b's document is in row b's context.

    Masks name the real tokens; padding may stand anywhere, positions count real tokens only. LoRA that is attached acts. Raises
    `ValueError` for an empty document, one too long for the base, and a base whose attention does not split.
    """
    document_mask_BS = torch.ones_like(document_BS) if document_mask_BS is None else document_mask_BS
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    if not document_mask_BS.bool().any(dim=1).all():
        raise ValueError("a document has no tokens: leave it out")
    document_length, count = document_BS.shape[1], ids_BT.shape[1]
    mask_BS = torch.cat([document_mask_BS, mask_BT], dim=1).bool()
    if (longest := int(mask_BS.sum(dim=1).max())) > base.max_length:
        raise ValueError(f"a document and what follows it have {longest} tokens, the base takes {base.max_length}: give windows")
    position_BS = (mask_BS.cumsum(dim=1) - 1).clamp_min(0)
    watching = _Watching(count)
    with base.active.only((*base.active.stack, watching)):
        output = base.decoder(
            input_ids=torch.cat([document_BS, ids_BT], dim=1),
            attention_mask=mask_BS.long(),
            position_ids=position_BS,
            use_cache=True,
        )
    column_S = torch.arange(mask_BS.shape[1], device=base.device)
    own_T1 = column_S[document_length:, None]
    visible_BTS = (mask_BS[:, None] & (column_S <= own_T1)) | (column_S == own_T1)
    turn = cast(nn.Module, base.decoder.rotary_emb)(output.last_hidden_state, position_BS[:, -count:])
    queries, memories, gates = [], [], []
    for layer, (query_BTI, heads_BTI) in enumerate(watching.layers):
        head_size, heads = base.attention_shape(layer)
        cached = output.past_key_values.layers[layer]
        if cached.keys.shape[2] != mask_BS.shape[1]:
            raise ValueError(f"layer {layer} keeps {cached.keys.shape[2]} of {mask_BS.shape[1]} keys: {NOT_PLAIN}")
        dtype = torch.promote_types(cached.keys.dtype, torch.float32)
        query_BTHD, heads_BTHD = (tensor.unflatten(2, (heads, head_size)).to(dtype) for tensor in (query_BTI, heads_BTI))
        key_BHSD, value_BHSD = (
            tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (cached.keys, cached.values)
        )
        scaling = _scaling(base, layer, head_size)
        query_BHTD = _turned(query_BTHD.transpose(1, 2), *(part.to(dtype)[:, None] for part in turn))
        split = split_attention(query_BHTD, key_BHSD, value_BHSD, visible_BTS, document_length, scaling)
        difference = (split.attention_BHTD.transpose(1, 2) - heads_BTHD)[mask_BT.bool()].abs().max()
        if not difference <= (1e-3 if base.dtype in (torch.float32, torch.float64) else 5e-2) * heads_BTHD.abs().max():
            raise ValueError(
                f"attention in layer {layer} of {type(base.model).__name__} differs by {difference:.2g} from plain attention "
                f"with rotary halves: {NOT_PLAIN}"
            )
        queries.append(query_BTHD)
        memories.append(split.memory_BHTD.transpose(1, 2))
        gates.append(split.gate_BHT.transpose(1, 2))
    return DistillationTargets(tuple(queries), tuple(memories), tuple(gates), mask_BT)


def distillation_losses(
    base: BaseModel, memory: GatedMemory, targets: DistillationTargets, index_B: Tensor | None = None
) -> Tensor:
    """`[B]`: mean |m - m*| + (1 - cos(m, m*)) + mean |g - g*| over real tokens, heads and layers; 0 in rows without a memory.

    The cosine takes m as no shorter than `LEAST_NORM` of m*, so a memory that starts at zero has a gradient of fair size.
    `index_B` as in `AdapterWeights.attach`.
    """
    rows = Rows(base, memory, index_B)
    rows.check(len(targets.mask_BT))
    assert memory.spec.gate is not None
    total_BT = torch.zeros_like(targets.gate_BTH[0][..., 0])
    for layer, (query_BTHD, target_BTHD, share_BTH) in enumerate(
        zip(targets.query_BTHD, targets.memory_BTHD, targets.gate_BTH, strict=True)
    ):
        picked = {name: rows.pick(memory.tensors[layer, ATTENTION, name]) for name in RELEASED_NAMES}
        memory_BTHD, gate_BTH = respond(picked, memory.spec.gate, query_BTHD)
        norm_BTH, target_norm_BTH = memory_BTHD.norm(dim=3), target_BTHD.norm(dim=3).clamp_min(1e-6)
        norms_BTH = torch.maximum(norm_BTH, LEAST_NORM * target_norm_BTH) * target_norm_BTH
        cosine_BTH = (memory_BTHD * target_BTHD).sum(dim=3) / norms_BTH
        distance_BTH = (memory_BTHD - target_BTHD).abs().mean(dim=3) + 1 - cosine_BTH + (gate_BTH - share_BTH).abs()
        total_BT = total_BT + distance_BTH.mean(dim=2) / len(targets.query_BTHD)
    real_BT = targets.mask_BT.bool()
    return rows.bare(torch.where(real_BT, total_BT, 0.0).sum(dim=1) / real_BT.sum(dim=1).clamp_min(1), 0.0)


def _turned(query_BHTD: Tensor, cos_B1TD: Tensor, sin_B1TD: Tensor) -> Tensor:
    """Rotary embedding of halves (RoFormer, arXiv 2104.09864, in the order of Llama's weights)."""
    first, second = query_BHTD.chunk(2, dim=-1)
    return query_BHTD * cos_B1TD + torch.cat([-second, first], dim=-1) * sin_B1TD


def _scaling(base: BaseModel, layer: int, head_size: int) -> float:
    attention: Any = base.model.get_submodule(base.linear_names[layer, "q"].rpartition(".")[0])
    return float(getattr(attention, "scaling", head_size**-0.5))

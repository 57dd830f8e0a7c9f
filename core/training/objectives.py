"""Batch -> summed loss and what it was summed over.

Losses are sums over supervised targets, so that whoever trains can divide by the targets of the whole global batch: short
conversations then weigh what they are, on any number of ranks (spec of SHINE, 4.4). Logits are made of supervised positions only;
losses are fp32, fp64 where the base is. Knows nothing of optimisers, ranks or data.

Memory: `HEAD_LOGITS` logits at a time, whatever the vocabulary and the number of targets, also under autograd, where chunks are
computed again in backward (what a single chunk holds is kept instead). No call waits for the device.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, attach
from core.training.examples import Batch

HEAD_LOGITS = 2**26
"""Logits that are there at once: 256 MB in fp32, of which softmax and its gradient hold some copies."""


def row_losses(base: BaseModel, batch: Batch, weights: LoraWeights | None, index_B: Tensor | None = None) -> Tensor:
    """`[B]` summed next-token cross entropy of each conversation, in nats.

    weights: adapters for the batch's contexts (row b under `batch.index_B[b]`), or None for the bare base. index_B: other
    adapters for the rows than the batch names (controls).
    """
    index_B = batch.index_B if index_B is None else index_B
    with attach(base, weights, index_B) if weights is not None else nullcontext():
        hidden_BTH = base.hidden_states(batch.ids_BT, batch.mask_BT)
    rows_T, columns_T = batch.targets_2T
    hidden_TH = hidden_BTH.flatten(0, 1).index_select(0, rows_T * hidden_BTH.shape[1] + columns_T)
    losses_T = _losses(base, hidden_TH, batch.labels_BT[rows_T, columns_T + 1])
    return losses_T.new_zeros(len(batch.ids_BT)).index_add(0, rows_T, losses_T)


def _losses(base: BaseModel, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
    """`[T]` cross entropy of each target under the base's logits."""
    rows = max(1, HEAD_LOGITS // base.embedding.num_embeddings)
    chunks = list(zip(hidden_TH.split(rows), targets_T.split(rows), strict=True))
    if len(chunks) == 1:
        return _chunk_losses(base, hidden_TH, targets_T)
    again = torch.is_grad_enabled()
    losses = [
        checkpoint(_chunk_losses, base, *chunk, use_reentrant=False, preserve_rng_state=False)
        if again
        else _chunk_losses(base, *chunk)
        for chunk in chunks
    ]
    return torch.cat(losses)


def _chunk_losses(base: BaseModel, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(_precise(base.logits(hidden_TH)), targets_T, reduction="none")


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def language_loss(base: BaseModel, batch: Batch) -> Tensor:
    """Summed loss of the bare base: what a base is trained on. Divide by `batch.tokens`."""
    return row_losses(base, batch, None).sum()

"""Batch -> summed loss and what it was summed over.

Losses are sums over supervised targets, so that whoever trains can divide by the targets of the whole global batch: short
conversations then weigh what they are, on any number of ranks (spec of SHINE, 4.4). The head runs on supervised positions
only; losses are fp32, fp64 where the base is. Knows nothing of optimisers, ranks or data.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, attach
from core.training.examples import IGNORED, Batch

HEAD_ROWS = 8192


def row_losses(base: BaseModel, batch: Batch, weights: LoraWeights | None, index_B: Tensor | None = None) -> Tensor:
    """`[B]` summed next-token cross entropy of each conversation, in nats.

    weights: adapters for the batch's contexts (row b under `batch.index_B[b]`), or None for the bare base. index_B: other
    adapters for the rows than the batch names (controls). Memory: logits of at most `HEAD_ROWS` targets at a time without
    autograd.
    """
    index_B = batch.index_B if index_B is None else index_B
    with attach(base, weights, index_B) if weights is not None else nullcontext():
        hidden_BTH = base.hidden_states(batch.ids_BT, batch.mask_BT)
    supervised = batch.labels_BT[:, 1:] != IGNORED
    hidden_TH, targets_T = hidden_BTH[:, :-1][supervised], batch.labels_BT[:, 1:][supervised]
    losses_T = torch.cat(
        [
            torch.nn.functional.cross_entropy(_precise(base.logits(hidden)), targets, reduction="none")
            for hidden, targets in zip(hidden_TH.split(HEAD_ROWS), targets_T.split(HEAD_ROWS), strict=True)
        ]
    )
    rows_T = supervised.nonzero()[:, 0]
    return losses_T.new_zeros(len(batch.ids_BT)).index_add(0, rows_T, losses_T)


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def language_loss(base: BaseModel, batch: Batch) -> Tensor:
    """Summed loss of the bare base: what a base is trained on. Divide by `batch.tokens`."""
    return row_losses(base, batch, None).sum()

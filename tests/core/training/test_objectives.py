"""What a loss costs beside its number: memory of the head, and waits for the device."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.adapters.base_model import BaseModel
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.shine.objective import hypernetwork_loss
from core.training import objectives
from core.training.examples import Batch, Example, collate
from core.training.objectives import language_loss, row_losses
from tests.models import SHAPE, random_adapters, random_ids, tiny_base

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
"""What makes the host wait for a GPU: a number, or a size, that depends on what tensors hold."""


def caller() -> str:
    """Whose code runs: core's, transformers' or the test's."""
    frame = sys._getframe(2)
    while (package := frame.f_globals["__name__"].partition(".")[0]) not in ("core", "transformers", "tests"):
        assert frame.f_back is not None
        frame = frame.f_back
    return package


class Watch(TorchDispatchMode):
    """Counts what would wait for a GPU, and keeps the most numbers that one tensor had; one tensor stays on the host."""

    def __init__(self, on_the_host: torch.Tensor | None = None) -> None:
        super().__init__()
        self._host = None if on_the_host is None else on_the_host.untyped_storage().data_ptr()
        self.waits = Counter[str]()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        on_the_host = bool(args) and isinstance(args[0], torch.Tensor) and args[0].untyped_storage().data_ptr() == self._host
        if (name in WAITS and not on_the_host) or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            self.waits[caller()] += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def batch_of(rows: int = 4, contexts: bool = False) -> Batch:
    """Conversations of unequal lengths, half supervised."""
    examples = []
    for row in range(rows):
        ids = tuple(random_ids(1, 12 + row, seed=row)[0].tolist())
        labels = tuple(token if place % 2 else -100 for place, token in enumerate(ids))
        examples.append(Example(ids[: 8 + row] if contexts else (), ids, labels))
    return collate(examples, pad_id=0)


def gradients(base: BaseModel, batch: Batch, trained: bool) -> list[torch.Tensor]:
    """Of each row's loss, weighted unequally: in adapters, or in the base itself."""
    weights = random_adapters(base, 4)
    weights.flat_BN.requires_grad_()
    base.model.requires_grad_(trained)
    wanted = [weights.flat_BN] if not trained else list(base.model.parameters())
    loss_B = row_losses(base, batch, None if trained else weights, None if trained else torch.arange(4))
    found = torch.autograd.grad((loss_B * torch.arange(1.0, 5.0)).sum(), wanted)
    base.model.requires_grad_(False)
    return [loss_B.detach(), *found]


@pytest.mark.parametrize("trained", [False, True])
def test_chunks_of_the_head_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    base, batch = tiny_base(), batch_of()
    whole = gradients(base, batch, trained)
    monkeypatch.setattr(objectives, "HEAD_LOGITS", 5 * SHAPE["vocab_size"])
    chunked = gradients(base, batch, trained)
    for expected, found in zip(whole, chunked, strict=True):
        assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_of_all_targets_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 targets and 8 rows of logits at a time: neither one tensor nor all that autograd keeps reaches targets x vocabulary."""
    monkeypatch.setattr(objectives, "HEAD_LOGITS", 8 * SHAPE["vocab_size"])
    base = tiny_base()
    ids = random_ids(2, 101)
    batch = collate([Example((), row, row) for row in map(tuple, ids.tolist())], pad_id=0)
    weights = random_adapters(base, 1)
    weights.flat_BN.requires_grad_()
    hidden = base.hidden_states(batch.ids_BT, batch.mask_BT).flatten(0, 1).requires_grad_()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.data_ptr() != base.embedding.weight.data_ptr() else 0)
        return tensor

    with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objectives._losses(base, hidden[:200], torch.arange(200) % SHAPE["vocab_size"]).sum().backward()
    logits = 200 * SHAPE["vocab_size"]
    assert sum(kept) < logits / 2
    assert watch.largest <= max(8 * SHAPE["vocab_size"], 202 * SHAPE["hidden_size"], base.embedding.weight.numel())
    assert hidden.grad is not None


def test_without_gradients_chunks_bound_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "HEAD_LOGITS", 8 * SHAPE["vocab_size"])
    base, batch = tiny_base(), batch_of()
    with torch.no_grad(), Watch() as watch:
        objectives._losses(base, torch.randn(200, SHAPE["hidden_size"]), torch.zeros(200, dtype=torch.int64))
        assert language_loss(base, batch).isfinite()
    assert watch.largest < 200 * SHAPE["vocab_size"] / 2


@pytest.mark.parametrize("initial_delta", [None, 0.05])
def test_a_micro_batch_waits_for_the_device_only_where_transformers_looks_into_masks(initial_delta: float | None) -> None:
    """Twice in each of its two passes through the base, before it makes the attention's mask."""
    base = tiny_base()
    settings = HypernetworkSettings(
        rank=2, meta_rank=2, num_layers=2, num_heads=2, feed_forward=32, initial_delta=initial_delta, input_norm="rms"
    )
    hypernetwork = Hypernetwork(base, settings)
    batch = batch_of(contexts=True)
    with Watch(on_the_host=batch.index_B) as watch:
        hypernetwork_loss(hypernetwork, batch.to("cpu")).backward()
    assert watch.waits == {"transformers": 4}
    with Watch() as watch:
        hypernetwork.generate(batch.context_ids_BT, batch.context_mask_BT)
    assert watch.waits == {"transformers": 2, "core": 1}, "the check of padding is seen"

"""The split of attention, the targets that it gives, and a memory that learns them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from core.adapters.base_model import Attachment, BaseModel
from core.adapters.gated_memory import GatedMemory, initial, recording_gates
from core.lift.memory_distillation import DistillationTargets, distillation_losses, distillation_targets, split_attention
from tests.models import SHAPE, random_adapters, random_ids, tiny_base

ARCHITECTURES = ["qwen3", "llama", "qwen2"]


class Oracle(Attachment):
    """Mixes m and g given as tensors."""

    def __init__(self, targets: DistillationTargets) -> None:
        self._targets = targets

    def mix(self, layer: int, query: Tensor, heads_BTI: Tensor) -> Tensor:
        memory_BTHD, gate_BTH = self._targets.memory_BTHD[layer], self._targets.gate_BTH[layer]
        return torch.lerp(heads_BTI.view_as(memory_BTHD), memory_BTHD, gate_BTH[..., None]).flatten(2)


def continuation_logits(base: BaseModel, document_BS: Tensor, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return base.model(input_ids=torch.cat([document_BS, ids_BT], dim=1), use_cache=False).logits[:, document_BS.shape[1] :]


@pytest.mark.parametrize("document_length", [1, 7, 19])
def test_the_split_is_attention_over_all_keys(document_length):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator) for length in (5, 24, 24))
    visible = torch.ones(2, 5, 24).tril(19).bool()
    split = split_attention(query, key * 3, value, visible, document_length, 0.3)
    mask = visible[:, None]
    whole = torch.nn.functional.scaled_dot_product_attention(query, key * 3, value, mask, scale=0.3)
    assert (split.attention_BHTD - whole).abs().max() < 1e-5
    alone = torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :, :document_length] * 3, value[:, :, :document_length], scale=0.3
    )
    assert (split.memory_BHTD - alone).abs().max() < 1e-5
    assert 0 < split.gate_BHT.min() < split.gate_BHT.max() < 1


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_oracle_memory_and_gates_stand_for_the_document(architecture, rotary):
    """The continuation alone, under m and g of every layer, has the logits that it has after the document."""
    base = tiny_base(architecture)
    if not rotary:
        base.decoder.rotary_emb.inv_freq.zero_()
    document_BS, ids_BT = random_ids(2, 31), random_ids(2, 9, seed=1)
    targets = distillation_targets(base, document_BS, ids_BT)
    positions = torch.arange(9)[None] + (31 if rotary else 0)
    with torch.no_grad(), base.active.only((Oracle(targets),)):
        alone = base.model(input_ids=ids_BT, position_ids=positions, use_cache=False).logits
    expected = continuation_logits(base, document_BS, ids_BT)
    assert (alone - expected).abs().max() < 1e-5
    assert (base.model(input_ids=ids_BT, use_cache=False).logits - expected).abs().max() > 0.2


def test_padding_changes_no_target():
    base = tiny_base()
    documents, following = [random_ids(1, length, seed=length) for length in (20, 13)], random_ids(2, 8)
    document_BS = torch.zeros(2, 22, dtype=torch.long)
    document_mask_BS, mask_BT = torch.zeros_like(document_BS), torch.ones_like(following)
    document_BS[0, 2:], document_mask_BS[0, 2:] = documents[0][0], 1
    document_BS[1, :13], document_mask_BS[1, :13] = documents[1][0], 1
    mask_BT[1, 5:] = 0
    together = distillation_targets(base, document_BS, following, document_mask_BS, mask_BT)
    memory = initial(base, "released", torch.Generator().manual_seed(0))
    losses_B = distillation_losses(base, memory, together)
    for row, length in enumerate((8, 5)):
        alone = distillation_targets(base, documents[row], following[row : row + 1, :length])
        for part in ("query_BTHD", "memory_BTHD", "gate_BTH"):
            for first, second in zip(getattr(together, part), getattr(alone, part), strict=True):
                assert (first[row, :length] - second[0]).abs().max() < 1e-5, part
        assert losses_B[row] == pytest.approx(distillation_losses(base, memory, alone).item(), abs=1e-5)


def test_losses_are_those_of_a_loop_and_know_rows():
    base = tiny_base()
    targets = distillation_targets(base, random_ids(3, 12), random_ids(3, 4, seed=1))
    spec = initial(base).spec
    memory = GatedMemory(spec, torch.randn(2, spec.numel, generator=torch.Generator().manual_seed(0)) * 0.5)
    losses_B = distillation_losses(base, memory, targets, torch.tensor([1, -1, 0]))
    assert losses_B[1] == 0
    for row, index in ((0, 1), (2, 0)):
        total, count = 0.0, 0
        for layer in range(3):
            w1, w2, v, w = (memory.tensors[layer, "attention", name][index] for name in ("W1", "W2", "V", "w"))
            for token in range(4):
                for head in range(4):
                    query = targets.query_BTHD[layer][row, token, head]
                    expected, share = targets.memory_BTHD[layer][row, token, head], targets.gate_BTH[layer][row, token, head]
                    m = torch.nn.functional.silu(query @ w1[head]) @ w2[head]
                    score = torch.nn.functional.silu(query @ v[head]) @ w[head]
                    low = torch.tensor(-3.0).sigmoid()
                    g = (torch.sigmoid(3 * score - 3) - low) / (1 - low)
                    cosine = torch.nn.functional.cosine_similarity(m, expected, dim=0)
                    total += ((m - expected).abs().mean() + 1 - cosine + (g - share).abs()).item()
                    count += 1
        assert losses_B[row].item() == pytest.approx(total / count, abs=1e-4)


def test_an_identity_memory_learns_the_targets_of_each_row():
    base = tiny_base("llama")
    document_BS, ids_BT = random_ids(2, 40), random_ids(2, 12, seed=1)
    targets = distillation_targets(base, document_BS, ids_BT)
    start = initial(base, generator=torch.Generator().manual_seed(0), count=2)
    flat_BN = start.flat_BN.clone().requires_grad_()
    distillation_losses(base, GatedMemory(start.spec, flat_BN), targets).sum().backward()
    assert flat_BN.grad.isfinite().all() and flat_BN.grad.abs().max() < 100
    optimiser = torch.optim.Adam([flat_BN], lr=0.02)
    losses = []
    for _ in range(150):
        optimiser.zero_grad()
        loss_B = distillation_losses(base, GatedMemory(start.spec, flat_BN), targets)
        loss_B.sum().backward()
        optimiser.step()
        losses.append(loss_B.detach())
    assert (losses[-1] < 0.25 * losses[0]).all() and all((b < a).all() for a, b in pairwise(losses[:100:25]))
    trained = GatedMemory(start.spec, flat_BN.detach())
    with torch.no_grad(), trained.attach(base), recording_gates(base) as gates:
        alone = base.model(input_ids=ids_BT, position_ids=torch.arange(40, 52)[None], use_cache=False).logits
    with torch.no_grad():
        bare = base.model(input_ids=ids_BT, use_cache=False).logits
    expected = continuation_logits(base, document_BS, ids_BT)
    assert (alone - expected).square().mean() < 0.3 * (bare - expected).square().mean()
    assert gates.gates_BTLH.mean() > 0.3


def test_targets_see_lora_that_is_attached():
    base, document_BS, ids_BT = tiny_base(), random_ids(1, 9), random_ids(1, 4)
    bare = distillation_targets(base, document_BS, ids_BT)
    with random_adapters(base, 1, size=0.3).attach(base):
        tuned = distillation_targets(base, document_BS, ids_BT)
    assert (bare.memory_BTHD[0] - tuned.memory_BTHD[0]).abs().max() > 1e-3


def test_what_cannot_be_distilled_is_refused():
    base = tiny_base()
    with pytest.raises(ValueError, match="260 tokens, the base takes 256"):
        distillation_targets(base, random_ids(1, 250), random_ids(1, 10))
    with pytest.raises(ValueError, match="no tokens"):
        distillation_targets(base, random_ids(2, 3), random_ids(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match=r"3 adapters for 1 rows"):
        distillation_losses(base, initial(base, count=3), distillation_targets(base, random_ids(1, 5), random_ids(1, 5)))
    base.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": torch.eye(10).bool()[None, None]}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="attention in layer 1 of Qwen3ForCausalLM differs"):
        distillation_targets(base, random_ids(1, 5), random_ids(1, 5))
    shape = {**SHAPE, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    windows = BaseModel(AutoModelForCausalLM.from_config(Qwen3Config(**shape, head_dim=12)))
    with pytest.raises(ValueError, match=r"layer 1 keeps \d+ of 10 keys"):
        distillation_targets(windows, random_ids(1, 5), random_ids(1, 5))

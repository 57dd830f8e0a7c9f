"""Gated Memory against LIFT's own numbers (tests/golden/gated_memory_1) and attached to every architecture that is claimed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from core.adapters.base_model import BaseModel, load_base
from core.adapters.gated_memory import GatedMemory, gate_means, gate_penalty, initial, memory_spec, recording_gates, weights_of
from core.adapters.lora import LoraWeights, attach, stack
from core.adapters.spec import AdapterSpec
from tests import places
from tests.models import random_adapters, random_ids, tiny_base

GOLDEN = places.GOLDEN / "gated_memory_1"
ARCHITECTURES = ["qwen3", "llama", "qwen2"]


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_base(tmp_path: Path, attention: str = "sdpa") -> BaseModel:
    shutil.copy(GOLDEN / "base_config.json", tmp_path / "config.json")
    shutil.copy(GOLDEN / "base.safetensors", tmp_path / "model.safetensors")
    return load_base(tmp_path, attention=attention)


def random_memory(base: BaseModel, count: int = 1, seed: int = 0, gate: str = "shifted", size: float = 0.5) -> GatedMemory:
    """Memories whose gates are well open and that change logits a lot."""
    spec = memory_spec(base, gate=gate)
    flat_BN = torch.randn(count, spec.numel, generator=torch.Generator().manual_seed(seed)) * size
    return GatedMemory(spec, flat_BN.to(base.dtype))


def logits_of(base: BaseModel, ids_BT: Tensor, *attached: tuple[LoraWeights | GatedMemory, Tensor | None]) -> Tensor:
    if not attached:
        with torch.no_grad():
            return base.model(input_ids=ids_BT, use_cache=False).logits
    (weights, index_B), *inner = attached
    with weights.attach(base, index_B):
        return logits_of(base, ids_BT, *inner)


# The released code


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_gates_loss_and_gradients_equal_the_released_code(attention, checkpointing, tmp_path):
    base = golden_base(tmp_path, attention)
    inputs, outputs = golden("inputs"), golden("outputs")
    memory = GatedMemory.from_release(base, golden("gated_memory"))
    memory.flat_BN.requires_grad_()
    with base.checkpointing(checkpointing), memory.attach(base), recording_gates(base) as gates:
        logits = base.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    real = inputs["attention_mask"].bool()
    assert (logits - outputs["logits"])[real].abs().max() < 2e-5
    assert (gates.gates_BTLH - outputs["gates"].permute(0, 3, 1, 2))[real].abs().max() < 1e-5
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    assert abs(loss - outputs["loss"]) < 1e-5
    loss.backward()
    norms, full = json.loads((GOLDEN / "grad_norms.json").read_text()), golden("grads_layer0")
    names = {"W1": "mem_proj.0", "W2": "mem_proj.2", "V": "gate_proj.0", "w": "gate_proj.2"}
    gradients = memory.spec.split(memory.flat_BN.grad)
    assert len(norms) == len(gradients)
    for (layer, _, tensor), gradient in gradients.items():
        name = f"model.layers.{layer}.self_attn.{names[tensor]}.weight"
        assert gradient.norm().item() == pytest.approx(norms[name], rel=1e-4), name
        if layer == 0:
            assert torch.allclose(gradient[0].view_as(full[name]), full[name], rtol=1e-4, atol=1e-6), name


def test_released_init_has_the_released_bounds(tmp_path):
    memory = initial(golden_base(tmp_path), "released", torch.Generator().manual_seed(0))
    expected = json.loads((GOLDEN / "manifest.json").read_text())["untouched_init_layer0"]
    for name, tensor in {"mem_proj.0": "W1", "mem_proj.2": "W2", "gate_proj.0": "V", "gate_proj.2": "w"}.items():
        shape, largest = expected[f"{name}.weight"]
        drawn = memory.tensors[0, "attention", tensor][0]
        assert list(drawn.shape) == [size for size in shape if size != 1]
        assert drawn.abs().max() == pytest.approx(largest, rel=0.15)
        assert drawn.min() < 0 < drawn.max()
    assert memory.spec.gate == "released"


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_release_of_another_base_is_refused(change, tmp_path):
    base, tensors = golden_base(tmp_path), golden("gated_memory")
    name = "model.layers.1.self_attn.gate_proj.0.weight"
    match change:
        case "missing":
            del tensors[name]
        case "unknown":
            tensors["model.layers.2.self_attn.gate_proj.0.weight"] = tensors[name]
        case "shape":
            tensors[name] = tensors[name][:2]
    with pytest.raises(ValueError, match="gate_proj"):
        GatedMemory.from_release(base, tensors)


# Identity


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gate_at_zero_leaves_logits_bit_equal(architecture, dtype, attention):
    base = tiny_base(architecture, dtype=dtype, attention=attention)
    ids_BT = random_ids(3, 17)
    bare = logits_of(base, ids_BT)
    assert torch.equal(logits_of(base, ids_BT, (initial(base), None)), bare)
    forced = random_memory(base, 3)
    for (_, _, tensor), value in forced.tensors.items():
        if tensor == "w":
            value.zero_()
    assert torch.equal(logits_of(base, ids_BT, (forced, None)), bare)
    assert torch.equal(logits_of(base, ids_BT, (random_memory(base), torch.tensor([-1, -1, -1]))), bare)
    assert not torch.equal(logits_of(base, ids_BT, (random_memory(base, 3), None)), bare)


def test_gradients_reach_w_first_and_then_every_tensor():
    base, ids_BT = tiny_base(), random_ids(2, 11)
    flat_BN = initial(base, generator=torch.Generator().manual_seed(0)).flat_BN.requires_grad_()
    spec = memory_spec(base)
    reached = []
    optimiser = torch.optim.SGD([flat_BN], lr=0.1)
    for _ in range(3):
        with GatedMemory(spec, flat_BN).attach(base):
            loss = base.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        reached.append({tensor for (_, _, tensor), value in spec.split(flat_BN.grad).items() if value.abs().max() > 0})
        optimiser.step()
    assert reached == [{"w"}, {"w", "V", "W2"}, {"w", "V", "W1", "W2"}]


def test_the_shifted_gate_is_the_formula_and_stays_finite():
    base = tiny_base("llama")
    memory = random_memory(base, size=3.0)
    for gate in ("shifted", "released"):
        turned = GatedMemory(memory_spec(base, gate=gate), memory.flat_BN)
        with recording_gates(base) as gates:
            logits_of(base, random_ids(2, 9), (turned, None))
        if gate == "shifted":
            shifted = gates.gates_BTLH[:, :, 0]
    low = torch.sigmoid(torch.tensor(-3.0))
    assert (shifted - (gates.gates_BTLH[:, :, 0] - low) / (1 - low)).abs().max() < 1e-6
    assert shifted.min() < -0.04 and shifted.max() > 0.99
    flat_BN = (memory.flat_BN * 1e4).requires_grad_()
    with GatedMemory(memory.spec, flat_BN).attach(base), recording_gates(base) as gates:
        base.model(input_ids=random_ids(2, 9), use_cache=False)
    gates.gates_BTLH.sum().backward()
    assert gates.gates_BTLH.isfinite().all() and flat_BN.grad.isfinite().all()


def test_a_released_gate_has_no_identity_init():
    with pytest.raises(ValueError, match=r"0\.047"):
        initial(tiny_base(), gate="released")


# Passes


@pytest.mark.parametrize("gate", ["shifted", "released"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_equals_uncached_and_eager_equals_sdpa(architecture, gate):
    base, eager = tiny_base(architecture), tiny_base(architecture, attention="eager")
    memory, ids_BT = random_memory(base, 2, gate=gate), random_ids(2, 13)
    full = logits_of(base, ids_BT, (memory, None))
    assert (full - logits_of(base, ids_BT)).abs().max() > 0.2
    assert (full - logits_of(eager, ids_BT, (memory, None))).abs().max() < 1e-5
    cache, pieces = DynamicCache(config=base.model.config), []
    with torch.no_grad(), memory.attach(base):
        for piece in ids_BT.split([6, 1, 4, 1, 1], dim=1):
            pieces.append(base.model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(pieces, dim=1) - full).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("gate", ["shifted", "released"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_single_runs(architecture, gate, dtype, limit):
    base = tiny_base(architecture, dtype=dtype)
    memory, index_B, ids_BT = random_memory(base, 4, gate=gate), torch.tensor([2, -1, 0, 2, 3, -1, 1]), random_ids(7, 11)
    mixed, bare = logits_of(base, ids_BT, (memory, index_B)), logits_of(base, ids_BT)
    for row, index in enumerate(index_B.tolist()):
        if index < 0:
            assert torch.equal(mixed[row], bare[row])
            continue
        single = logits_of(base, ids_BT[row : row + 1], (memory.select(slice(index, index + 1)), None))[0]
        assert (mixed[row] - single).abs().max() <= limit
        assert (mixed[row] - bare[row]).abs().max() > 0.2
    in_place = logits_of(base, ids_BT[:4], (memory, torch.tensor([0, -1, 2, 3])))
    assert torch.equal(in_place[1], logits_of(base, ids_BT[:4])[1])
    assert (in_place - logits_of(base, ids_BT[:4], (memory, None)))[[0, 2, 3]].abs().max() <= limit


def test_the_memory_sees_queries_after_lora_and_o_sees_mixed_heads():
    """Against a base whose q and o weights were changed by hand; the biases of qwen2 are part of the query."""
    base, other = tiny_base("qwen2"), tiny_base("qwen2")
    lora, memory, ids_BT = random_adapters(base, 1, size=0.3), random_memory(base), random_ids(3, 9)
    with torch.no_grad():
        for (layer, site), linear in other.linears.items():
            a_BIR, b_BRO = lora.factors(layer, site)
            linear.weight += (a_BIR[0] @ b_BRO[0]).T
    expected = logits_of(other, ids_BT, (memory, None))
    for order in ((lora, memory), (memory, lora)):
        assert (logits_of(base, ids_BT, *((weights, None) for weights in order)) - expected).abs().max() < 1e-4
    assert (logits_of(base, ids_BT, (memory, None)) - expected).abs().max() > 0.2


def test_nested_memories_mix_in_turn():
    base, ids_BT = tiny_base(), random_ids(2, 9)
    first, second = random_memory(base), random_memory(base, seed=1)
    assert torch.equal(logits_of(base, ids_BT, (first, None), (initial(base), None)), logits_of(base, ids_BT, (first, None)))
    assert torch.equal(logits_of(base, ids_BT, (initial(base), None), (first, None)), logits_of(base, ids_BT, (first, None)))
    turned = [logits_of(base, ids_BT, (a, None), (b, None)) for a, b in ((first, second), (second, first))]
    assert (turned[0] - turned[1]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_with_and_without_checkpointing_agree(architecture):
    base, ids_BT, index_B = tiny_base(architecture), random_ids(4, 9), torch.tensor([1, 0, -1, 1])
    start, lora = random_memory(base, 2), random_adapters(base, 4)
    gradients = {}
    for mode in ("none", "ours", "transformers"):
        flat_BN, lora_BN = start.flat_BN.clone().requires_grad_(), lora.flat_BN.clone().requires_grad_()
        if mode == "transformers":
            base.model.activation_checkpointing_enable({"use_reentrant": False})
            base.model.train()
        with base.checkpointing(mode == "ours"), attach(base, LoraWeights(lora.spec, lora_BN)), recording_gates(base) as gates:
            with GatedMemory(start.spec, flat_BN).attach(base, index_B):
                loss = base.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
            loss = loss + gate_penalty(gates.gates_BTLH, torch.ones(4, 9)).sum()
        with random_memory(base, 1, seed=3).attach(base):
            loss.backward()
        base.model.activation_checkpointing_disable()
        base.model.eval()
        gradients[mode] = flat_BN.grad, lora_BN.grad
    for mode in ("ours", "transformers"):
        for plain, again in zip(gradients["none"], gradients[mode], strict=True):
            assert plain.abs().max() > 1e-3 and (plain - again).abs().max() < 1e-6, mode


def test_nothing_stays_behind():
    base, ids_BT = tiny_base(), random_ids(2, 9)
    bare = logits_of(base, ids_BT)
    logits_of(base, ids_BT, (random_memory(base, 2), None))
    with pytest.raises(ValueError, match="3 adapters for 2 rows"):
        logits_of(base, ids_BT, (random_memory(base, 3), None))
    assert base.active.query is None and base.active.stack == () and base.active.gates is None
    assert torch.equal(logits_of(base, ids_BT), bare)


# Weights


def test_padding_to_a_wider_memory_is_exact():
    base, ids_BT = tiny_base("llama"), random_ids(2, 9)
    memory = random_memory(base, 2)
    wide = memory.padded(40)
    assert wide.spec.rank == 40 and wide.spec == memory.spec.with_rank(40) and len(wide) == 2
    assert (logits_of(base, ids_BT, (wide, None)) - logits_of(base, ids_BT, (memory, None))).abs().max() < 1e-5
    assert memory.padded(memory.spec.rank) is memory
    assert torch.equal(stack([memory.padded(40), memory.select(slice(1))]).flat_BN[:2], wide.flat_BN)
    with pytest.raises(ValueError, match="down to 3"):
        memory.padded(3)


def test_select_detach_and_to():
    memory = random_memory(tiny_base(), 3)
    memory.flat_BN.requires_grad_()
    assert torch.equal(memory.select(torch.tensor([2, 0])).flat_BN, memory.flat_BN[[2, 0]])
    assert not memory.detach().flat_BN.requires_grad
    assert memory.to(dtype=torch.bfloat16).flat_BN.dtype == torch.bfloat16
    for made in (memory.detach(), memory.to("cpu"), memory.select(slice(1)), memory.padded(50)):
        assert type(made) is GatedMemory


def test_spec_goes_through_json_and_names_its_kind():
    base = tiny_base()
    spec = memory_spec(base)
    assert spec.rank == 24 and [entry.shape for entry in spec.table[:4]] == [(4, 12, 24), (4, 24, 12), (4, 12, 3), (4, 3)]
    again = AdapterSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.fingerprint == spec.fingerprint
    assert spec.fingerprint != memory_spec(base, gate="released").fingerprint
    assert type(weights_of(spec, torch.zeros(1, spec.numel))) is GatedMemory
    assert type(weights_of(base.spec(2), torch.zeros(1, base.spec(2).numel))) is LoraWeights


def test_what_does_not_fit_is_refused():
    base, other = tiny_base("qwen3"), tiny_base("llama")
    ids_BT, memory = random_ids(2, 5), random_memory(base)
    with pytest.raises(ValueError, match="attention is not 12 -> 4 here"), memory.attach(other):
        pass
    with pytest.raises(ValueError, match="of kind lora: these are of kind gated_memory"):
        LoraWeights(memory.spec, memory.flat_BN)
    with pytest.raises(ValueError, match="of kind gated_memory: these are of kind lora"):
        GatedMemory(base.spec(2), torch.zeros(1, base.spec(2).numel))
    with pytest.raises(ValueError, match="index_B names adapters for 3 rows"):
        logits_of(base, ids_BT, (memory, torch.tensor([0, 0, 0])))
    with pytest.raises(ValueError, match="count them from 0"), memory.attach(base, torch.tensor([1, 0])):
        pass
    base.linears[1, "o"].in_features += 1
    with pytest.raises(ValueError, match=r"layer 1 has 4 heads.*one size for each head"):
        memory_spec(base)


def test_queries_of_another_layout_are_refused():
    """As of a q_norm that runs on [B, heads, T, d]: the hook of the base stands between two that turn and turn back."""
    base = tiny_base("qwen3")
    norm = base.layers[0].self_attn.q_norm
    norm.register_forward_hook(lambda module, args, output: output.transpose(1, 2), prepend=True)
    norm.register_forward_hook(lambda module, args, output: output.transpose(1, 2))
    with pytest.raises(ValueError, match="queries of shape"):
        logits_of(base, random_ids(2, 5), (random_memory(base), None))


# Gates


def test_gate_means_and_penalty_are_those_of_a_loop():
    base, ids_BT = tiny_base(), random_ids(3, 7)
    mask_BT = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 1], [0] * 7])
    with recording_gates(base) as gates:
        logits_of(base, ids_BT, (random_memory(base), torch.tensor([0, 0, -1])))
    gates_BTLH = gates.gates_BTLH
    assert gates_BTLH.shape == (3, 7, 3, 4) and gates_BTLH[2].abs().max() == 0 and gates_BTLH[:2].abs().max() > 0.1
    chosen = torch.stack([gates_BTLH[row, token] for row in range(3) for token in range(7) if mask_BT[row, token]])
    assert torch.allclose(gate_means(gates_BTLH, mask_BT), chosen.mean(dim=0))
    penalty_B = gate_penalty(gates_BTLH, mask_BT)
    assert torch.allclose(penalty_B[:2], chosen.view(2, 3, -1).abs().mean(dim=(1, 2))) and penalty_B[2] == 0
    with pytest.raises(ValueError, match="one token at least"):
        gate_means(gates_BTLH, torch.zeros(3, 7))
    with pytest.raises(ValueError, match="those of"):
        gate_penalty(gates_BTLH, mask_BT[:, 1:])


def test_only_passes_inside_are_recorded():
    base, memory = tiny_base(), random_memory(tiny_base())
    with recording_gates(base) as outer:
        with recording_gates(base) as inner:
            logits_of(base, random_ids(1, 3), (memory, None))
        logits_of(base, random_ids(1, 4))
    logits_of(base, random_ids(1, 5), (memory, None))
    assert inner.gates_BTLH.shape[1] == 3
    with pytest.raises(ValueError, match="no gates were recorded"):
        _ = outer.gates_BTLH


def test_a_gate_penalty_closes_gates():
    base, ids_BT = tiny_base(), random_ids(2, 9)
    memory = random_memory(base)
    flat_BN = memory.flat_BN.clone().requires_grad_()
    optimiser = torch.optim.Adam([flat_BN], lr=0.02)
    sizes = []
    for _ in range(40):
        with recording_gates(base) as gates, GatedMemory(memory.spec, flat_BN).attach(base):
            base.hidden_states(ids_BT)
        loss = gate_penalty(gates.gates_BTLH, torch.ones_like(ids_BT)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        sizes.append(loss.item())
    assert sizes[-1] < 0.3 * sizes[0]

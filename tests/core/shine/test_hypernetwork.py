"""Shapes, scales, gradients and files of the hypernetwork; its numbers against SHINE's own stand in test_shine_parity."""

import json
import math
import threading

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, attach, composed
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.shine.objective import hypernetwork_loss
from core.training.examples import Example, collate
from tests.models import random_adapters, random_ids, tiny_base, tiny_config

SMALL = {"rank": 2, "meta_rank": 3, "num_layers": 2, "num_heads": 4, "feed_forward": 32, "scale": 1e-2}


def tiny_hypernetwork(base: BaseModel, seed: int = 0, **settings: object) -> Hypernetwork:
    torch.manual_seed(seed)
    return Hypernetwork(base, HypernetworkSettings.model_validate({**SMALL, **settings}))


def unequal_base(large_layer: int = 1) -> BaseModel:
    config = tiny_config("llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    config.intermediate_size = 72
    model.model.layers[large_layer].mlp = LlamaMLP(config)
    return BaseModel(model)


def documents(rows: int = 2, length: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids_BT = random_ids(rows, length, seed)
    return ids_BT, torch.ones_like(ids_BT)


def loss_of(hypernetwork: Hypernetwork, rows: int = 2) -> Tensor:
    base, chat_BT = hypernetwork.base, random_ids(rows, 7, seed=1)
    with attach(base, hypernetwork.generate(*documents(rows))):
        return base.model(input_ids=chat_BT, labels=chat_BT, use_cache=False).loss


# Shapes


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_memory_tokens_are_rounded_up_and_the_tail_is_dropped(rank):
    base = tiny_base()
    hypernetwork = tiny_hypernetwork(base, rank=rank, sites=("q",))
    size = hypernetwork.spec.layer_numel[0]
    count = len(hypernetwork.memory_MH)
    assert size % base.hidden_size and count == math.ceil(size / base.hidden_size)
    states_BLMH = torch.randn(2, 3, count, base.hidden_size)
    flat_BN = hypernetwork.parameters_from_states(states_BLMH).flat_BN
    plain_BLZ = hypernetwork.m2p(states_BLMH).flatten(2)
    assert torch.equal(flat_BN.view(2, 3, size), plain_BLZ[:, :, :size] * math.sqrt(1e-2))


@pytest.mark.parametrize("large_layer", [0, 1, 2])
def test_layers_of_unequal_shape(large_layer):
    base = unequal_base(large_layer)
    hypernetwork = tiny_hypernetwork(base)
    sizes = hypernetwork.spec.layer_numel
    assert len(set(sizes)) == 2 and len(hypernetwork.memory_MH) == math.ceil(max(sizes) / base.hidden_size)
    states_BLMH = torch.randn(2, 3, len(hypernetwork.memory_MH), base.hidden_size)
    weights = hypernetwork.parameters_from_states(states_BLMH)
    plain_BLZ = hypernetwork.m2p(states_BLMH).flatten(2) * math.sqrt(1e-2)
    for layer, flat in enumerate(weights.flat_BN.split(sizes, dim=1)):
        assert torch.equal(flat, plain_BLZ[:, layer, : sizes[layer]])
    assert weights.factors(large_layer, "down")[0].shape == (2, 72, 2)
    loss_of(hypernetwork).backward()
    assert all(parameter.grad.isfinite().all() for parameter in hypernetwork.parameters())


def test_attention_runs_across_layers_then_across_memory_tokens():
    """What one state can reach after the first layer and after the second."""
    m2p = tiny_hypernetwork(tiny_base()).m2p
    states_BLMH = torch.randn(1, 3, 5, 32)
    m2p.token_pe = torch.nn.Parameter(torch.zeros(5, 32))
    moved = states_BLMH.clone()
    moved[0, 1, 2] += 1
    both = m2p(moved) - m2p(states_BLMH)
    assert both.abs().amax(-1).min() > 0
    m2p.transformer_layers = m2p.transformer_layers[:1]
    first = (m2p(moved) - m2p(states_BLMH)).abs().amax(-1)[0]
    assert first[:, 2].min() > 0 and not first[:, [0, 1, 3, 4]].any()


def test_some_sites_only():
    base = tiny_base()
    hypernetwork = tiny_hypernetwork(base, sites=("v", "down"))
    assert {entry.site for entry in hypernetwork.spec.table} == {"v", "down"} == {e.site for e in hypernetwork.meta_spec.table}
    loss_of(hypernetwork).backward()
    with pytest.raises(ValueError, match="no linear is called head"):
        tiny_hypernetwork(base, sites=("head",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide the base's hidden size 32"),
        ({"num_layers": 3}, "multiple of 2"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"sites": ()}, "at least 1 item"),
        ({"input_norm": "batch"}, "'none', 'rms' or 'layer'"),
        ({"initial_delta": 0.0}, "greater than 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_hypernetwork(tiny_base(), **settings)


# Scales


def relative_deltas(base: BaseModel, **settings: object) -> dict[tuple[int, str], float]:
    hypernetwork = tiny_hypernetwork(base, rank=4, **settings)
    with torch.no_grad():
        weights = hypernetwork.generate(*documents(8, 20))
    found = {}
    for site, linear in base.linears.items():
        a_BIR, b_BRO = weights.factors(*site)
        x_BTI = torch.randn(8, 100, linear.in_features, generator=torch.Generator().manual_seed(2))
        found[site] = ((x_BTI @ a_BIR @ b_BRO).norm() / (x_BTI @ linear.weight.T).norm()).item()
    return found


@pytest.mark.parametrize("delta", [0.02, 0.5])
@pytest.mark.parametrize("input_norm", ["none", "rms", "layer"])
def test_initial_delta_is_what_was_asked_for_at_every_site(input_norm, delta):
    for base in (tiny_base("qwen3"), tiny_base("qwen2"), unequal_base()):
        for site, size in relative_deltas(base, initial_delta=delta, input_norm=input_norm).items():
            assert size == pytest.approx(delta, rel=0.25), site


def test_the_released_scale_sets_the_delta_by_the_shape_of_the_base():
    small, large = relative_deltas(tiny_base("llama"), scale=1e-3), relative_deltas(tiny_base("llama"), scale=1e-2)
    assert [large[site] / small[site] for site in small] == pytest.approx([10.0] * len(small), rel=1e-3)
    base = tiny_base("llama")
    with torch.no_grad():
        for linear in base.linears.values():
            linear.weight *= 0.1
    assert min(relative_deltas(base, scale=1e-3).values()) > 5 * max(small.values())
    assert max(relative_deltas(base, initial_delta=0.1).values()) < 0.13


def test_initial_delta_keeps_the_generated_bias_small():
    base = tiny_base("qwen2")
    for settings, limit in (({"initial_delta": 0.1}, (0.07, 0.13)), ({"scale": 1e-3}, None)):
        hypernetwork = tiny_hypernetwork(base, generated_bias=True, **settings)
        with torch.no_grad():
            weights = hypernetwork.generate(*documents(8))
        c_BO, linear = weights.tensors[0, "q", "C"], base.linears[0, "q"]
        if limit is None:
            assert c_BO.square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.2)
        else:
            output_size = linear.weight.norm() / math.sqrt(linear.out_features)
            assert limit[0] < (c_BO.square().mean().sqrt() / output_size).item() < limit[1]


def test_input_norms_take_states_of_any_size():
    base = tiny_base()
    states_BLMH = torch.randn(2, 3, len(tiny_hypernetwork(base).memory_MH), 32)
    states_BLMH[:, 1] *= 1e3
    for input_norm, invariant in (("rms", True), ("layer", True), ("none", False)):
        hypernetwork = tiny_hypernetwork(base, input_norm=input_norm)
        one, ten = (hypernetwork.parameters_from_states(states_BLMH * size).flat_BN for size in (1, 10))
        assert one.isfinite().all() and torch.allclose(one, ten, atol=1e-4) == invariant
        assert ("m2p.input_norm.weight" in hypernetwork.state_dict()) == invariant


# Documents


def test_padding_on_the_left_changes_nothing():
    hypernetwork = tiny_hypernetwork(tiny_base())
    with torch.no_grad():
        hypernetwork.meta_1N.normal_(std=0.1)
        ids_BT, mask_BT = documents(1, 9)
        plain = hypernetwork.memory_states(ids_BT, mask_BT)
        longer_ids, longer_mask = documents(2, 14, seed=3)
        longer_ids[0] = torch.cat([torch.zeros(5, dtype=torch.long), ids_BT[0]])
        longer_mask[0, :5] = 0
        padded = hypernetwork.memory_states(longer_ids, longer_mask)
    assert plain.shape == (1, 3, len(hypernetwork.memory_MH), 32)
    assert (padded[:1] - plain).abs().max() < 2e-5 * plain.abs().max()


def test_right_padding_and_unequal_shapes_are_refused():
    hypernetwork = tiny_hypernetwork(tiny_base())
    ids_BT, mask_BT = documents()
    mask_BT[1, -1] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        hypernetwork.generate(ids_BT, mask_BT)
    with pytest.raises(ValueError, match=r"must be equal \[B, T\]"):
        hypernetwork.generate(ids_BT, mask_BT[:, 1:])
    with pytest.raises(ValueError, match=r"must be equal \[B, T\]"):
        hypernetwork.generate(ids_BT[0], mask_BT[0])


def test_only_the_meta_lora_acts_on_a_document():
    base = tiny_base()
    hypernetwork = tiny_hypernetwork(base)
    with torch.no_grad():
        alone = hypernetwork.memory_states(*documents())
        with attach(base, random_adapters(base, 1, size=1.0)):
            inside = hypernetwork.memory_states(*documents())
        hypernetwork.meta_1N.normal_(std=0.1)
        assert (hypernetwork.memory_states(*documents()) - alone).abs().max() > 0.1
    assert torch.equal(inside, alone)


def test_two_threads_write_adapters_at_once():
    hypernetwork = tiny_hypernetwork(tiny_base())
    expected = [hypernetwork.generate(*documents(2, 9, seed)).flat_BN for seed in range(4)]
    found: dict[int, Tensor] = {}
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait()
        for _ in range(5):
            found[seed] = hypernetwork.generate(*documents(2, 9, seed)).flat_BN

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.allclose(found[seed], expected[seed], atol=1e-6) for seed in range(4)] == [True] * 4


def test_evaluation_mode_without_gradient_equals_training_mode():
    """PyTorch takes a fused path through encoder layers there."""
    hypernetwork = tiny_hypernetwork(tiny_base())
    trained = hypernetwork.generate(*documents()).flat_BN
    with torch.inference_mode():
        assert torch.allclose(hypernetwork.eval().generate(*documents()).flat_BN, trained, atol=1e-6)


def test_a_bf16_base_with_large_memory_states():
    """Real models have residual outliers of 1e3 and more (spec of SHINE, 4.5)."""
    base = tiny_base(dtype=torch.bfloat16)
    hypernetwork = tiny_hypernetwork(base)
    with torch.no_grad():
        base.linears[0, "down"].weight[5] = 300.0
    ids_BT, mask_BT = documents()
    mask_BT[0, :4] = 0
    states_BLMH = hypernetwork.memory_states(ids_BT, mask_BT)
    assert states_BLMH.dtype == torch.float32 and states_BLMH.abs().max() > 1e3
    weights = hypernetwork.generate(ids_BT, mask_BT)
    assert weights.flat_BN.dtype == torch.float32 and weights.flat_BN.isfinite().all()
    loss_of(hypernetwork).backward()
    for name, parameter in hypernetwork.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


# Training


@pytest.mark.parametrize("settings", [{}, {"additional_meta_rank": 2}, {"input_norm": "rms"}, {"input_norm": "layer"}])
def test_every_trainable_parameter_receives_gradient_and_the_base_none(settings):
    base = tiny_base("qwen2")
    hypernetwork = tiny_hypernetwork(base, generated_bias=True, **settings)
    before = {name: value.clone() for name, value in hypernetwork.named_parameters()}
    optimiser = torch.optim.SGD([parameter for parameter in hypernetwork.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):  # Meta LoRA's A has a gradient once B is not zero
        optimiser.zero_grad()
        loss_of(hypernetwork).backward()
        optimiser.step()
    meta = "meta_1N" if "additional_meta_rank" not in settings else "additional_meta_1N"
    trained = {name for name, parameter in hypernetwork.named_parameters() if parameter.requires_grad}
    assert {meta, "memory_MH", "m2p.layer_pe", "m2p.token_pe"} <= trained
    assert {"meta_1N"} - trained == ({"meta_1N"} if meta != "meta_1N" else set())
    for name, parameter in hypernetwork.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    spec = hypernetwork.additional_meta_spec if meta != "meta_1N" else hypernetwork.meta_spec
    for key, gradient in spec.split(getattr(hypernetwork, meta).grad).items():
        assert gradient.any(), key
    assert all(parameter.grad is None for parameter in base.model.parameters())
    assert not any(name.startswith("base") for name in hypernetwork.state_dict())


@pytest.mark.parametrize("composition", ["mean", "sum"])
def test_a_document_in_windows_is_trained_under_its_composed_adapter(composition):
    base = tiny_base()
    hypernetwork = tiny_hypernetwork(base, composition=composition, initial_delta=0.5)
    torch.nn.init.normal_(hypernetwork.m2p.token_pe)
    windows, chat = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 8, 6)], random_ids(1, 7, seed=1)[0].tolist()
    long = Example((*windows[0], *windows[1]), tuple(chat), tuple(chat), (5, 8))
    short = Example(tuple(windows[2]), tuple(chat), tuple(chat))
    loss = hypernetwork_loss(hypernetwork, collate([long, short], pad_id=0))
    alone = [hypernetwork.generate(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)) for ids in windows]
    parts = LoraWeights(hypernetwork.spec, torch.cat([each.flat_BN for each in alone[:2]]))
    expected = torch.zeros(())
    for weights in (composed(parts, composition, 2 * hypernetwork.spec.rank)[0], alone[2]):
        with attach(base, weights):
            ids_BT = torch.tensor([chat])
            expected += base.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss * (len(chat) - 1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert (loss - 2 * hypernetwork_loss(hypernetwork, collate([short], pad_id=0))).abs() > 1e-3
    loss.backward()
    assert all(parameter.grad.any() for name, parameter in hypernetwork.named_parameters() if name.startswith("m2p.transformer"))


def test_parameter_groups_partition_what_is_trained():
    hypernetwork = tiny_hypernetwork(tiny_base(), input_norm="rms", additional_meta_rank=2)
    decayed, plain = hypernetwork.parameter_groups(0.01)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    names = {id(parameter): name for name, parameter in hypernetwork.named_parameters() if parameter.requires_grad}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, plain)]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == set(names.values())
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {"m2p.layer_pe", "m2p.token_pe", "memory_MH", "additional_meta_1N"} <= groups[0]
    assert "m2p.transformer_layers.0.self_attn.in_proj_weight" in groups[0]
    assert {name for name in names.values() if "norm" in name or "bias" in name} == groups[1]


# Generated bias


def test_generated_bias_adds_c_where_the_base_has_biases():
    base = tiny_base("qwen2")
    hypernetwork = tiny_hypernetwork(base, generated_bias=True, scale=0.1)
    assert {entry.site for entry in hypernetwork.spec.table if entry.tensor == "C"} == {"q", "k", "v"}
    assert not any(entry.tensor == "C" for entry in hypernetwork.meta_spec.table)
    chat_BT = random_ids(2, 7, seed=1)
    with torch.no_grad():
        weights = hypernetwork.generate(*documents())
        with attach(base, weights):
            with_bias = base.model(input_ids=chat_BT).logits
        for key, tensor in weights.tensors.items():
            if key[2] == "C":
                tensor.zero_()
        with attach(base, weights):
            without = base.model(input_ids=chat_BT).logits
    assert (with_bias - without).abs().max() > 1e-2
    assert tiny_hypernetwork(tiny_base("llama"), generated_bias=True).spec == tiny_hypernetwork(tiny_base("llama")).spec


# Files


@pytest.mark.parametrize(
    "settings", [{}, {"additional_meta_rank": 2, "generated_bias": True, "initial_delta": 0.1, "sites": ("q", "up")}]
)
def test_save_and_load(settings, tmp_path):
    base = tiny_base("qwen2")
    hypernetwork = tiny_hypernetwork(base, **settings)
    with torch.no_grad():
        for parameter in hypernetwork.parameters():
            parameter.add_(0.01)
    hypernetwork.trained_tokens = 100 if settings else None
    hypernetwork.save(tmp_path)
    again = Hypernetwork.load(tmp_path, base)
    assert again.trained_tokens == hypernetwork.trained_tokens
    assert again.settings == hypernetwork.settings and again.fingerprint() == hypernetwork.fingerprint()
    with torch.no_grad():
        assert torch.equal(again.generate(*documents()).flat_BN, hypernetwork.generate(*documents()).flat_BN)
    again.save(tmp_path / "again")
    for file in ("hypernetwork.safetensors", "hypernetwork.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_saving_as_bf16_halves_the_file_and_keeps_the_gains(tmp_path):
    base = tiny_base()
    hypernetwork = tiny_hypernetwork(base, initial_delta=0.1)
    hypernetwork.save(tmp_path / "full")
    hypernetwork.save(tmp_path / "half", torch.bfloat16)
    sizes = [(tmp_path / name / "hypernetwork.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    half = Hypernetwork.load(tmp_path / "half", base)
    assert torch.equal(half.gain_K, hypernetwork.gain_K) and half.memory_MH.dtype == torch.float32
    with torch.no_grad():
        exact, rounded = (h.generate(*documents()).flat_BN for h in (hypernetwork, half))
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_fingerprint_covers_weights_settings_and_base():
    hypernetwork = tiny_hypernetwork(tiny_base())
    prints = [hypernetwork.fingerprint()]
    with torch.no_grad():
        hypernetwork.m2p.token_pe[0, 0] += 1e-6
    prints.append(hypernetwork.fingerprint())
    prints.append(tiny_hypernetwork(tiny_base(), meta_rank=4).fingerprint())
    other = tiny_hypernetwork(tiny_base(seed=1))
    other.load_state_dict(tiny_hypernetwork(tiny_base()).state_dict())
    prints.append(other.fingerprint())
    assert len(set(prints)) == len(prints)
    assert tiny_hypernetwork(tiny_base()).fingerprint() == prints[0]
    assert tiny_hypernetwork(tiny_base(), composition="sum").fingerprint() == prints[0], "the producer's windows say it"


def test_a_directory_that_cannot_be_loaded(tmp_path):
    base = tiny_base()
    with pytest.raises(ValueError, match=r"holds no hypernetwork\.json"):
        Hypernetwork.load(tmp_path, base)
    tiny_hypernetwork(base).save(tmp_path)
    with pytest.raises(ValueError, match="trained for another base"):
        Hypernetwork.load(tmp_path, tiny_base(seed=1))
    description = json.loads((tmp_path / "hypernetwork.json").read_text())

    def describe(**changes: object) -> None:
        (tmp_path / "hypernetwork.json").write_text(json.dumps(description | changes))

    describe(format=2)
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        Hypernetwork.load(tmp_path, base)
    for changes, message in (
        ({"num_layers": 4}, "missing or unknown.*transformer_layers.2"),
        ({"meta_rank": 4}, "meta_1N is .*, not"),
        ({"colour": "red"}, "colour: Extra inputs"),
    ):
        describe(settings=description["settings"] | changes)
        with pytest.raises(ValueError, match=message):
            Hypernetwork.load(tmp_path, base)
    describe()
    (tmp_path / "hypernetwork.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no hypernetwork\.safetensors"):
        Hypernetwork.load(tmp_path, base)

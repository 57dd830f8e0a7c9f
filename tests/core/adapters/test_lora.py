"""Many adapters on one frozen base: rows, gradients through checkpointing, sums, and the cut to a lower rank."""

import threading
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, attach, compose, compose_groups, composed, gram, recompress, stack
from core.adapters.spec import AdapterSpec, SiteShape
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from tests.models import random_adapters, random_ids, tiny_base

ARCHITECTURES = [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False)]
SETTINGS = HypernetworkSettings(rank=2, meta_rank=3, num_layers=2, num_heads=4, feed_forward=32, scale=1e-2)


def logits_of(base: BaseModel, ids_BT: Tensor, weights: LoraWeights | None = None, index_B: Tensor | None = None) -> Tensor:
    with torch.no_grad(), nullcontext() if weights is None else attach(base, weights, index_B):
        return base.model(input_ids=ids_BT, use_cache=False).logits


def deltas(weights: LoraWeights) -> dict[tuple[int, str], Tensor]:
    sites = [(entry.layer, entry.site) for entry in weights.spec.table if entry.tensor == "A"]
    return {site: torch.matmul(*weights.factors(*site)).double() for site in sites}


def flat_delta(weights: LoraWeights) -> Tensor:
    return torch.cat([delta.flatten(1) for delta in deltas(weights).values()], dim=1)


# Gradients


def two_pass_gradients(base: BaseModel, mode: str, attached_in_backward: bool = False) -> dict[str, Tensor]:
    """Meta LoRA pass, pass under the generated adapters, backward outside both."""
    torch.manual_seed(1)
    hypernetwork = Hypernetwork(base, SETTINGS)
    with torch.no_grad():
        hypernetwork.meta_1N.normal_(std=0.05)
    ids_BT, chat_BT, index_B = random_ids(2, 9), random_ids(4, 7, seed=1), torch.tensor([1, 0, -1, 1])
    if mode == "transformers":
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        base.model.train()
    with base.checkpointing(mode == "ours"):
        weights = hypernetwork.generate(ids_BT, torch.ones_like(ids_BT))
        with attach(base, weights, index_B):
            logits = base.model(input_ids=chat_BT, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), chat_BT[:, 1:].flatten())
    with attach(base, random_adapters(base, 1, size=1.0)) if attached_in_backward else nullcontext():
        loss.backward()
    if mode == "transformers":
        base.model.activation_checkpointing_disable()
        base.model.eval()
    assert all(parameter.grad is None for parameter in base.model.parameters())
    return {name: parameter.grad for name, parameter in hypernetwork.named_parameters()}


@pytest.mark.parametrize(("architecture", "tied"), ARCHITECTURES)
def test_gradients_with_and_without_checkpointing_agree(architecture, tied):
    base = tiny_base(architecture, tied)
    plain = two_pass_gradients(base, "none")
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for mode in ("ours", "transformers"):
        for attached in (False, True):
            again = two_pass_gradients(base, mode, attached)
            for name, gradient in plain.items():
                assert (gradient - again[name]).abs().max() < 1e-6, (mode, attached, name)


def test_adapters_that_are_leaves_train_under_reentrant_checkpointing():
    base, ids_BT = tiny_base(), random_ids(2, 7)
    start = random_adapters(base, 2).flat_BN
    gradients = []
    for reentrant in (False, True):
        if reentrant:
            base.model.activation_checkpointing_enable({"use_reentrant": True})
            base.model.train()
        flat_BN = start.clone().requires_grad_()
        with attach(base, LoraWeights(random_adapters(base, 2).spec, flat_BN)):
            loss = base.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        with attach(base, random_adapters(base, 1, size=1.0)):
            loss.backward()
        gradients.append(flat_BN.grad)
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6


def test_backward_in_another_thread_sees_the_adapters_of_the_forward():
    base, ids_BT = tiny_base(), random_ids(2, 7)
    gradients = []
    for threaded in (False, True):
        weights = random_adapters(base, 2)
        weights.flat_BN.requires_grad_()
        with base.checkpointing(), attach(base, weights):
            loss = base.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        if threaded:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
        gradients.append(weights.flat_BN.grad)
    assert gradients[0].abs().max() > 1e-3 and torch.equal(*gradients)


# Rows


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_a_mixed_batch_equals_single_runs(architecture, dtype, limit):
    base = tiny_base(architecture, dtype=dtype)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.model.state_dict().items()}
    weights = random_adapters(base, 16)
    index_B = torch.cat([torch.randperm(16, generator=torch.Generator().manual_seed(0)), torch.tensor([-1, 3, 3, -1, 0, 15])])
    ids_BT = random_ids(len(index_B), 11)
    mixed, bare = logits_of(base, ids_BT, weights, index_B), logits_of(base, ids_BT)
    for row, index in enumerate(index_B.tolist()):
        ids_1T = ids_BT[row : row + 1]
        if index < 0:
            assert torch.equal(mixed[row], bare[row])
            continue
        single = logits_of(base, ids_1T, weights.select(slice(index, index + 1)))[0]
        assert (mixed[row] - single).abs().max() <= limit
        assert (mixed[row] - bare[row]).abs().max() > 0.2
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer and torch.equal(after[name], value), name


def test_the_delta_is_x_a_b_plus_c():
    """Against a base whose weights and biases were changed by hand."""
    base, other = tiny_base("qwen2"), tiny_base("qwen2")
    weights = random_adapters(base, 1, generated_bias=True)
    assert {entry.site for entry in weights.spec.table if entry.tensor == "C"} == {"q", "k", "v"}
    with torch.no_grad():
        for site, linear in other.linears.items():
            a_BIR, b_BRO = weights.factors(*site)
            linear.weight += (a_BIR[0] @ b_BRO[0]).T
            if (*site, "C") in weights.tensors:
                linear.bias += weights.tensors[(*site, "C")][0]
    ids_BT = random_ids(3, 9)
    assert (logits_of(base, ids_BT, weights) - logits_of(other, ids_BT)).abs().max() < 1e-4
    three = stack([weights, random_adapters(base, 1, seed=1, generated_bias=True)])
    mixed = logits_of(base, ids_BT, three, torch.tensor([0, -1, 0]))
    assert (mixed[[0, 2]] - logits_of(other, ids_BT)[[0, 2]]).abs().max() < 1e-4
    assert torch.equal(mixed[1], logits_of(base, ids_BT)[1])


@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_stand_together_by_adapter_equal_rows_in_any_order(bias):
    base = tiny_base("qwen3")
    weights = random_adapters(base, 3, size=0.5, generated_bias=bias)
    ids_BT, index_B = random_ids(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    order = torch.tensor([4, 0, 3, 1, 5, 2])
    together, apart = logits_of(base, ids_BT, weights, index_B), logits_of(base, ids_BT[order], weights, index_B[order])
    assert (together[order] - apart).abs().max() < 1e-5
    assert (together - logits_of(base, ids_BT)).abs().max() > 1e-2


def test_one_adapter_serves_all_rows_and_none_serve_rows_without():
    base, ids_BT = tiny_base(), random_ids(3, 5)
    weights = random_adapters(base, 1)
    assert (
        logits_of(base, ids_BT, weights) - logits_of(base, ids_BT, weights, torch.zeros(3, dtype=torch.long))
    ).abs().max() < 1e-5
    nobody = logits_of(base, ids_BT, weights.select(slice(0, 0)), torch.full((3,), -1))
    assert torch.equal(nobody, logits_of(base, ids_BT))


def test_some_sites_only():
    base, ids_BT = tiny_base(), random_ids(2, 5)
    whole = random_adapters(base, 1)
    spec = base.spec(4, sites=("v", "down"))
    some = LoraWeights(spec, torch.cat([whole.tensors[e.layer, e.site, e.tensor].flatten(1) for e in spec.table], dim=1))
    rest = LoraWeights(whole.spec, whole.flat_BN.clone())
    for (_, site, _), tensor in rest.tensors.items():
        if site not in ("v", "down"):
            tensor.zero_()
    assert (logits_of(base, ids_BT, some) - logits_of(base, ids_BT, rest)).abs().max() < 1e-6


def test_decoding_with_a_cache_equals_one_pass():
    base, ids_BT, index_B = tiny_base(), random_ids(3, 8), torch.tensor([1, -1, 0])
    weights = random_adapters(base, 2)
    with torch.no_grad(), attach(base, weights, index_B):
        first = base.model(input_ids=ids_BT[:, :5], use_cache=True)
        second = base.model(input_ids=ids_BT[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    steps = torch.cat([first.logits, second.logits], dim=1)
    assert (steps - logits_of(base, ids_BT, weights, index_B)).abs().max() < 1e-5


def test_attaching_holds_for_its_thread_only():
    base, ids_BT, elsewhere = tiny_base(), random_ids(1, 5), []
    bare = logits_of(base, ids_BT)
    with attach(base, random_adapters(base, 1)):
        thread = threading.Thread(target=lambda: elsewhere.append(logits_of(base, ids_BT)))
        thread.start()
        thread.join()
    assert torch.equal(elsewhere[0], bare)


def test_attaching_ends_where_the_context_is_left_by_an_error():
    base, ids_BT = tiny_base(), random_ids(1, 5)
    bare = logits_of(base, ids_BT)
    with pytest.raises(KeyError), attach(base, random_adapters(base, 1)):
        raise KeyError
    assert torch.equal(logits_of(base, ids_BT), bare)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_autocast_runs_an_fp32_base_in_bf16(architecture):
    base, ids_BT, index_B = tiny_base(architecture), random_ids(3, 9), torch.tensor([1, -1, 0])
    weights = random_adapters(base, 2, generated_bias=True)
    kinds = set()
    handles = [
        linear.register_forward_hook(lambda module, args, output: kinds.add(output.dtype)) for linear in base.linears.values()
    ]
    with torch.autocast("cpu", torch.bfloat16):
        half = logits_of(base, ids_BT, weights, index_B)
    for handle in handles:
        handle.remove()
    assert kinds == {torch.bfloat16}
    exact = logits_of(base, ids_BT, weights, index_B)
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_fp32_adapters_on_a_bf16_base_receive_fp32_gradients():
    base, ids_BT = tiny_base("qwen2", dtype=torch.bfloat16), random_ids(2, 7)
    weights = random_adapters(base, 2, generated_bias=True).to(dtype=torch.float32)
    weights.flat_BN.requires_grad_()
    with base.checkpointing(), attach(base, weights):
        loss = base.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    assert weights.flat_BN.grad.dtype == torch.float32
    assert weights.flat_BN.grad.isfinite().all() and weights.flat_BN.grad.abs().max() > 0


def test_adapters_of_another_base_are_refused():
    base = tiny_base()
    layers = base.spec(2).layers
    wide = (SiteShape("q", 32, 47), *layers[0][1:])
    for spec, message in (
        (AdapterSpec(layers[:2], 2), "2 layers, the base 3"),
        (AdapterSpec((*layers, layers[0]), 2), "4 layers, the base 3"),
        (AdapterSpec((wide, *layers[1:]), 2), "layer 0 q is not 32 -> 47"),
        (tiny_base("llama").spec(2), "made for another base"),
    ):
        with pytest.raises(ValueError, match=message), attach(base, LoraWeights(spec, torch.zeros(1, spec.numel))):
            pass
    with pytest.raises(ValueError, match=r"on meta.*weights\.to"), attach(base, random_adapters(base, 1).to("meta")):
        pass


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, 2]), "count them from 0"),
        (torch.tensor([-2, 0]), "-1 is none"),
        (torch.tensor([[0], [1]]), "one integer for each row"),
        (torch.tensor([0.0, 1.0]), "one integer for each row"),
        (torch.tensor([True, False]), "one integer for each row"),
    ],
)
def test_an_index_that_names_no_adapter_is_refused(index, message):
    base = tiny_base()
    with pytest.raises(ValueError, match=message), attach(base, random_adapters(base, 2), index):
        pass


@pytest.mark.parametrize("index", [[0], [0, 1], [-1], [-1, -1]])
def test_a_wrong_number_of_rows_is_refused(index):
    base = tiny_base()
    with pytest.raises(ValueError, match=r"the batch has 3"):
        logits_of(base, random_ids(3, 5), random_adapters(base, 2), torch.tensor(index))
    with pytest.raises(ValueError, match="2 adapters for 3 rows"):
        logits_of(base, random_ids(3, 5), random_adapters(base, 2))


def test_names_and_shapes_of_weights():
    base = tiny_base()
    weights = random_adapters(base, 2, rank=3)
    a_BIR, b_BRO = weights.factors(2, "down")
    assert a_BIR.shape == (2, 48, 3) and b_BRO.shape == (2, 3, 32) and len(weights) == 2
    with pytest.raises(ValueError, match="no linear 'lm_head' in layer 0"):
        weights.factors(0, "lm_head")
    with pytest.raises(ValueError, match="no linear 'q' in layer 3"):
        weights.factors(3, "q")
    with pytest.raises(ValueError, match="wants"):
        LoraWeights(weights.spec, weights.flat_BN[:, 1:])
    assert torch.equal(weights.select(torch.tensor([1, 1, 0])).flat_BN, weights.flat_BN[[1, 1, 0]])


# Sums and cuts


def test_nested_adapters_add_up_as_composed_ones_do():
    base, ids_BT = tiny_base("qwen2"), random_ids(3, 9)
    parts = [random_adapters(base, 3, rank, seed=rank, size=0.05, generated_bias=True) for rank in (1, 4, 2)]
    with attach(base, parts[0]), attach(base, parts[1]):
        nested = logits_of(base, ids_BT, parts[2])
    joined = compose(parts)
    assert joined.spec.rank == 7
    assert (logits_of(base, ids_BT, joined) - nested).abs().max() < 1e-4
    assert torch.allclose(flat_delta(joined), sum(flat_delta(part) for part in parts), atol=1e-6)
    assert (nested - logits_of(base, ids_BT, parts[2])).abs().max() > 0.1
    with pytest.raises(ValueError, match="3 and 2 adapters"):
        compose([parts[0], parts[1].select(slice(2))])
    with pytest.raises(ValueError, match="no adapters"):
        compose([])


@st.composite
def small_weights(draw):
    shape = SiteShape("k", draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.booleans()))
    spec = AdapterSpec(((shape,), (SiteShape("gate", 4, 5),)), draw(st.integers(1, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return LoraWeights(spec, torch.randn(draw(st.integers(0, 3)), spec.numel, generator=generator))


@given(small_weights(), st.integers(0, 3))
@settings(max_examples=50)
def test_padding_is_exact(weights, extra):
    padded = weights.padded(weights.spec.rank + extra)
    assert padded.spec.rank == weights.spec.rank + extra
    for key, delta in deltas(weights).items():
        assert torch.allclose(deltas(padded)[key], delta, atol=1e-6)
        a_BIR, b_BRO = padded.factors(*key)
        assert not a_BIR[:, :, weights.spec.rank :].any() and not b_BRO[:, weights.spec.rank :].any()
        if (*key, "C") in weights.tensors:
            assert torch.equal(padded.tensors[(*key, "C")], weights.tensors[(*key, "C")])
    if extra:
        with pytest.raises(ValueError, match="use recompress"):
            padded.padded(weights.spec.rank)


@given(small_weights(), st.integers(1, 7))
@settings(max_examples=50)
def test_recompression_is_the_best_of_its_rank(weights, rank):
    cut, error_B = recompress(weights, rank)
    assert cut.spec == weights.spec.with_rank(rank) and error_B.shape == (len(weights),)
    lost_B = torch.zeros(len(weights), dtype=torch.float64)
    total_B = torch.zeros(len(weights), dtype=torch.float64)
    for key, delta in deltas(weights).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :, :rank] * s[:, None, :rank] @ v[:, :rank]
        assert torch.allclose(deltas(cut)[key], best, atol=1e-4)
        lost_B += s[:, rank:].square().sum(1)
        total_B += s.square().sum(1)
        if (*key, "C") in weights.tensors:
            assert torch.equal(cut.tensors[(*key, "C")], weights.tensors[(*key, "C")])
    assert torch.allclose(error_B, (lost_B / total_B).sqrt(), atol=1e-5)


def test_recompression_of_composed_adapters_keeps_the_logits():
    base, ids_BT = tiny_base(), random_ids(2, 9)
    part = random_adapters(base, 2)
    joined = compose([part, LoraWeights(part.spec, part.flat_BN)])
    cut, error_B = recompress(joined, part.spec.rank)
    assert error_B.max() < 1e-5
    assert (logits_of(base, ids_BT, cut) - logits_of(base, ids_BT, joined)).abs().max() < 1e-4
    worse, error_B = recompress(joined, 1)
    difference_B = (flat_delta(worse) - flat_delta(joined)).norm(dim=1) / flat_delta(joined).norm(dim=1)
    assert torch.allclose(difference_B, error_B, atol=1e-5) and error_B.min() > 0.3


def test_recompression_of_nothing_of_bf16_and_of_trained_weights():
    base = tiny_base()
    zero = LoraWeights(base.spec(3), torch.zeros(2, base.spec(3).numel))
    cut, error_B = recompress(zero, 2)
    assert not cut.flat_BN.any() and torch.equal(error_B, torch.zeros(2, dtype=torch.float64))
    weights = random_adapters(base, 2)
    weights.flat_BN.requires_grad_()
    cut, error_B = recompress(weights, 2)
    assert not cut.flat_BN.requires_grad and not error_B.requires_grad
    half, _ = recompress(weights.detach().to(dtype=torch.bfloat16), 2)
    assert half.flat_BN.dtype == torch.bfloat16
    assert (flat_delta(half) - flat_delta(cut)).norm() < 0.02 * flat_delta(cut).norm()
    tiny, error_B = recompress(LoraWeights(weights.spec, weights.flat_BN.detach() * 1e-9), weights.spec.rank)
    assert torch.allclose(flat_delta(tiny) * 1e18, flat_delta(weights.detach()), atol=1e-5) and error_B.max() < 1e-5
    with pytest.raises(ValueError, match="rank is 0"):
        recompress(weights, 0)


@pytest.mark.parametrize("count", [3, 16])
@pytest.mark.parametrize("composition", ["mean", "sum"])
def test_a_composed_adapter_has_the_mean_or_the_sum_of_the_deltas(count, composition):
    base = tiny_base("qwen2")
    weights = random_adapters(base, count, rank=4, generated_bias=True)
    reduce = {"mean": torch.mean, "sum": torch.sum}[composition]
    whole, error = composed(weights, composition, 32)
    assert error < 1e-5 and len(whole) == 1 and whole.spec.rank == min(32, 4 * count)
    dense = reduce(flat_delta(weights), dim=0, keepdim=True)
    assert torch.allclose(flat_delta(whole), dense, atol=1e-5)
    assert torch.allclose(whole.tensors[0, "q", "C"], reduce(weights.tensors[0, "q", "C"], dim=0, keepdim=True))
    cut, error = composed(weights, composition, 3)
    assert error == pytest.approx(((flat_delta(cut) - dense).norm() / dense.norm()).item(), abs=1e-5)
    assert error > 0.1


def test_one_adapter_composes_to_itself_and_none_is_an_error():
    weights = random_adapters(tiny_base(), 1, rank=4)
    assert composed(weights, "mean", 4) == (weights, 0.0)
    cut, error = composed(weights, "mean", 2)
    assert cut.spec.rank == 2 and error > 0.1
    with pytest.raises(ValueError, match="no adapters"):
        composed(weights.select(slice(0)), "mean", 3)


@pytest.mark.parametrize("composition", ["mean", "sum"])
def test_groups_of_adapters_compose_exactly_and_with_gradients(composition):
    weights = random_adapters(tiny_base("qwen2"), 6, rank=2, generated_bias=True)
    flat_BN = weights.flat_BN.detach().double().requires_grad_()
    groups = [slice(0, 2), slice(2, 3), slice(3, 6)]
    dense = flat_delta(LoraWeights(weights.spec, flat_BN))
    reduce = {"mean": torch.mean, "sum": torch.sum}[composition]
    expected = torch.stack([reduce(dense[group], dim=0) for group in groups])
    got = compose_groups(LoraWeights(weights.spec, flat_BN), [2, 1, 3], composition)
    assert (len(got), got.spec.rank) == (3, 6)
    torch.testing.assert_close(flat_delta(got), expected)
    slope = torch.randn_like(expected)
    [wanted] = torch.autograd.grad((expected * slope).sum(), flat_BN)
    [found] = torch.autograd.grad((flat_delta(got) * slope).sum(), flat_BN)
    torch.testing.assert_close(found, wanted)
    assert compose_groups(weights, [1] * 6, composition) is weights
    for sizes in ([2, 3], [6, 0], [7]):
        with pytest.raises(ValueError, match="do not divide 6 adapters"):
            compose_groups(weights, sizes, composition)


def test_gram_equals_dense_inner_products():
    weights = random_adapters(tiny_base(), 5)
    dense = flat_delta(weights)
    assert torch.allclose(gram(weights), dense @ dense.T, rtol=1e-6, atol=1e-6)


def test_stack_pads_to_the_largest_rank():
    base, ids_BT = tiny_base(), random_ids(3, 5)
    parts = [random_adapters(base, 1, rank=2), random_adapters(base, 2, rank=5, seed=1)]
    both = stack(parts)
    assert both.spec.rank == 5 and len(both) == 3
    logits = logits_of(base, ids_BT, both)
    assert (logits[:1] - logits_of(base, ids_BT[:1], parts[0])).abs().max() < 1e-5
    assert (logits[1:] - logits_of(base, ids_BT[1:], parts[1])).abs().max() < 1e-5
    with pytest.raises(ValueError, match="different bases"):
        stack([parts[0], random_adapters(tiny_base("llama"), 1)])


def test_adapters_of_different_sites_share_a_batch_and_add_up():
    """Padding with zeros is exact, whatever sites and biases an adapter lacks."""
    base, ids_BT = tiny_base("qwen2"), random_ids(2, 5)
    full = random_adapters(base, 1, rank=2, generated_bias=True)
    spec = base.spec(3, ("q", "down"))
    some = LoraWeights(spec, torch.randn(1, spec.numel, generator=torch.Generator().manual_seed(1)) * 0.1)
    both = stack([some, full])
    assert both.spec == full.spec.with_rank(3)
    logits = logits_of(base, ids_BT, both)
    assert (logits[:1] - logits_of(base, ids_BT[:1], some)).abs().max() < 1e-5
    assert (logits[1:] - logits_of(base, ids_BT[1:], full)).abs().max() < 1e-5
    with attach(base, some):
        nested = logits_of(base, ids_BT, full)
    assert (logits_of(base, ids_BT, compose([some, full])) - nested).abs().max() < 1e-4
    with pytest.raises(ValueError, match="never to fewer or others"):
        full.padded_to(spec)


@pytest.mark.parametrize("rank", [2, 16, 128])
def test_a_delta_added_by_its_product_is_the_very_same(rank: int) -> None:
    """Without gradient, one adapter for all rows is added in place; with it, product and sum are apart."""
    base = tiny_base()
    weights, ids_BT = random_adapters(base, 1, rank=rank), random_ids(3, 40)
    with attach(base, weights):
        apart = base.hidden_states(ids_BT)
        with torch.no_grad():
            assert torch.equal(base.hidden_states(ids_BT), apart)
            assert torch.equal(base.hidden_states(ids_BT), apart), "nothing of the base was overwritten"

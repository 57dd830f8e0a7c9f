"""The engine against plain loops of full forward passes, whatever shares its batch."""

import gc
import random
import threading
import weakref
from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from core.adapters.base_model import BaseModel
from core.adapters.gated_memory import GatedMemory, memory_spec
from core.adapters.lora import LoraWeights, attach
from core.adapters.weights import AdapterWeights
from core.engine.requests import Completion, Request
from core.engine.sampling import Sampling
from core.engine.slot_cache import FIRST_CAPACITY
from core.engine.token_loop import Engine, generate
from tests.models import SHAPE, tiny_base


def adapters(base: BaseModel, count: int, rank: int = 4, scale: float = 0.3, generated_bias: bool = False) -> list[LoraWeights]:
    spec = base.spec(rank, generated_bias=generated_bias)
    generator = torch.Generator().manual_seed(7)
    return [LoraWeights(spec, torch.randn(1, spec.numel, generator=generator).to(base.dtype) * scale) for _ in range(count)]


def random_memory(base: BaseModel, seed: int, gate: Any = "shifted", width: int | None = None) -> GatedMemory:
    spec = memory_spec(base, width, gate)
    return GatedMemory(spec, torch.randn(1, spec.numel, generator=torch.Generator().manual_seed(seed)) * 0.5)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(SHAPE["vocab_size"]), k=length)


def full_logits(base: BaseModel, ids: list[int], adapter: AdapterWeights | None) -> Tensor:
    """Logits of every position in one pass without a cache."""
    with torch.no_grad():
        if adapter is None:
            return base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        with attach(base, adapter):
            return base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def greedy_loop(base: BaseModel, request: Request) -> list[int]:
    ids = list(request.prompt_ids)
    for _ in range(request.max_tokens):
        ids.append(int(full_logits(base, ids, request.adapter)[-1].argmax()))
    return ids[len(request.prompt_ids) :]


def run(engine: Engine, tokens: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
    """Steps until idle; all token ids by request."""
    tokens = defaultdict(list) if tokens is None else tokens
    while not engine.idle:
        for token in engine.step():
            tokens[token.request_id].append(token.token_id)
    return tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("architecture", "tied"), [("qwen3", True), ("qwen3", False), ("llama", False), ("qwen2", True)])
def test_rows_under_16_adapters_give_what_full_forwards_give(architecture: str, tied: bool, attention: str) -> None:
    """Arrivals are staggered over 5 slots, some rows have no adapter, two requests are cancelled, long prompts come in pieces."""
    base = tiny_base(architecture, tied, attention=attention)
    weights = adapters(base, 16, generated_bias=architecture == "qwen2")
    numbers = random.Random(3)
    requests = [
        Request(f"r{i}", prompt(numbers.randint(1, 60), i), numbers.randint(4, 14), weights[i] if i % 5 else None)
        for i in range(16)
    ]
    engine = Engine(base, weights[0].spec, slots=5, max_length=80, prefill_tokens_per_step=40)
    tokens = defaultdict(list)
    for index, request in enumerate(requests):
        engine.submit(request)
        for token in engine.step():
            tokens[token.request_id].append(token.token_id)
        if index in (5, 10):
            assert engine.cancel(f"r{index - 1}")
    run(engine, tokens)
    for index, request in enumerate(requests):
        expected = greedy_loop(base, request)
        made = tokens[request.request_id]
        assert made == (expected[: len(made)] if index in (4, 9) else expected)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_bare_base_gives_what_transformers_generate_gives(architecture: str) -> None:
    base = tiny_base(architecture)
    requests = [Request(str(i), prompt(5 + 9 * i, i), 20, stop_ids=frozenset([2])) for i in range(4)]
    completions = generate(base, requests, slots=3)
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        output = base.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        expected = output[0, ids.shape[1] :].tolist()
        stopped = expected[-1] == 2
        assert completions[request.request_id] == Completion(
            expected[:-1] if stopped else expected, "stop" if stopped else "length"
        )


def test_bf16_tokens_are_as_likely_as_the_likeliest() -> None:
    base = tiny_base(dtype=torch.bfloat16)
    weights = adapters(base, 4, scale=0.2)
    requests = [Request(str(i), prompt(10 + i, i), 12, weights[i]) for i in range(4)]
    for request, completion in zip(requests, generate(base, requests).values(), strict=True):
        logits_TV = full_logits(base, [*request.prompt_ids, *completion.token_ids], request.adapter).float()
        made_TV = logits_TV[len(request.prompt_ids) - 1 : -1]
        chosen_T = made_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert ((made_TV.max(dim=1).values - chosen_T) <= 0.02 * made_TV.abs().max()).all()


def test_lower_ranks_are_padded() -> None:
    base = tiny_base()
    low, high = adapters(base, 1, rank=2)[0], adapters(base, 1, rank=8)[0]
    requests = [Request("low", prompt(9), 12, low), Request("high", prompt(9), 12, high)]
    completions = generate(base, requests)
    assert [completions[r.request_id].token_ids for r in requests] == [greedy_loop(base, r) for r in requests]
    assert completions["low"] != completions["high"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gate", ["shifted", "released"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_rows_under_different_memories_give_what_full_forwards_give(architecture: str, gate: Any, attention: str) -> None:
    """Rows come and go over 4 slots, some without a memory, one under a narrower one."""
    base = tiny_base(architecture, attention=attention)
    memories = [random_memory(base, seed, gate) for seed in range(6)]
    memories[1] = random_memory(base, 1, gate, width=3)
    requests = [Request(f"r{i}", prompt(5 + 7 * i % 40, i), 4 + i, memories[i % 6] if i % 4 else None) for i in range(10)]
    engine = Engine(base, memories[0].spec, slots=4, max_length=80, prefill_tokens_per_step=30)
    for request in requests:
        engine.submit(request)
    tokens = run(engine)
    assert all(tokens[request.request_id] == greedy_loop(base, request) for request in requests)
    assert sum(tokens[r.request_id] != greedy_loop(base, Request("", r.prompt_ids, r.max_tokens)) for r in requests) >= 5


def test_an_engine_runs_adapters_of_one_kind() -> None:
    base = tiny_base()
    lora, memory, other = adapters(base, 1)[0], random_memory(base, 0), random_memory(base, 0, "released")
    engine = Engine(base, memory.spec)
    with pytest.raises(
        ValueError, match=r"of kind lora, this engine runs gated_memory \(shifted gate\): give each kind an engine"
    ):
        engine.submit(Request("r", [1], 4, lora))
    with pytest.raises(ValueError, match=r"of kind gated_memory \(released gate\), this engine runs gated_memory \(shifted"):
        engine.submit(Request("r", [1], 4, other))
    with pytest.raises(ValueError, match=r"of kind gated_memory \(shifted gate\), this engine runs lora"):
        Engine(base, lora.spec).submit(Request("r", [1], 4, memory))
    with pytest.raises(ValueError, match="cannot share a batch"):
        generate(base, [Request("a", [1], 4, lora), Request("b", [1], 4, memory)])
    with pytest.raises(ValueError, match="another base"):
        Engine(tiny_base("llama"), memory.spec)


def test_sampled_tokens_depend_on_the_seed_only() -> None:
    base = tiny_base()
    weights = adapters(base, 1)[0]

    def request(seed: int) -> Request:
        return Request(f"seed {seed}", prompt(7), 16, weights, sampling=Sampling(temperature=1.5, top_p=0.9, seed=seed))

    alone = {seed: generate(base, [request(seed)])[f"seed {seed}"] for seed in range(4)}
    others = [Request(f"other {i}", prompt(4 + 6 * i, i), 9) for i in range(5)]
    mixed = generate(base, [*others, *(request(seed) for seed in range(4))], slots=4, prefill_tokens_per_step=20)
    assert {seed: mixed[f"seed {seed}"] for seed in range(4)} == alone
    assert len({tuple(completion.token_ids) for completion in alone.values()}) == 4


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.6), (1e-8, 1.0)])
def test_draws_follow_the_tempered_nucleus(temperature: float, top_p: float) -> None:
    base = tiny_base()
    count = 3000
    requests = [Request(str(seed), prompt(6), 1, sampling=Sampling(temperature, top_p, seed)) for seed in range(count)]
    drawn = torch.tensor([completion.token_ids[0] for completion in generate(base, requests, slots=256).values()])
    p_V = (full_logits(base, prompt(6), None)[-1].double() / temperature).softmax(dim=0)
    ordered, index = p_V.sort(descending=True)
    size = int((ordered.cumsum(dim=0) - ordered < top_p).sum())
    nucleus_V = torch.zeros_like(p_V)
    nucleus_V[index[:size]] = ordered[:size] / ordered[:size].sum()
    frequency_V = torch.bincount(drawn, minlength=len(p_V)) / count
    assert frequency_V[nucleus_V == 0].sum() == 0
    assert ((frequency_V - nucleus_V).abs() <= 4 * (nucleus_V * (1 - nucleus_V) / count).sqrt() + 1e-6).all()


def test_unseeded_draws_differ() -> None:
    sampling = Sampling(temperature=3.0)
    completions = generate(tiny_base(), [Request(str(i), [5], 12, sampling=sampling) for i in range(2)])
    assert completions["0"] != completions["1"]


def test_a_late_short_request_ends_before_an_early_long_one() -> None:
    engine = Engine(tiny_base(), slots=2)
    engine.submit(Request("long", prompt(5), 20))
    for _ in range(3):
        assert [token.request_id for token in engine.step()] == ["long"]
    engine.submit(Request("short", prompt(8, 1), 2))
    assert [(t.request_id, t.finish_reason) for t in engine.step()] == [("long", None), ("short", None)]
    assert [(t.request_id, t.finish_reason) for t in engine.step()] == [("long", None), ("short", "length")]
    assert [(t.request_id, t.finish_reason) for t in engine.step()] == [("long", None)]


def test_a_long_prompt_does_not_hold_up_running_rows() -> None:
    base = tiny_base()
    engine = Engine(base, slots=3, prefill_tokens_per_step=16)
    read = []

    def watch(module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        read.append(inputs["input_ids"].numel())

    hook = base.decoder.register_forward_pre_hook(watch, with_kwargs=True)
    engine.submit(Request("running", prompt(3), 12))
    engine.step()
    engine.submit(Request("long", prompt(70, 1), 4))
    engine.submit(Request("next", prompt(2, 2), 4))
    seen = [[token.request_id for token in engine.step()] for _ in range(6)]
    hook.remove()
    assert seen == [["running"]] * 4 + [["running", "long"], ["running", "long", "next"]]
    assert max(read) == 16


def test_a_prompt_read_in_part_survives_the_end_of_a_row_before_it() -> None:
    base = tiny_base()
    weights = adapters(base, 2)
    requests = [Request("short", prompt(4), 3, weights[0]), Request("long", prompt(50, 1), 6, weights[1])]
    engine = Engine(base, base.spec(4), prefill_tokens_per_step=10)
    for request in requests:
        engine.submit(request)
    tokens = run(engine)
    assert [tokens[request.request_id] for request in requests] == [greedy_loop(base, request) for request in requests]


@pytest.mark.parametrize(("lengths", "steps"), [([4, 4, 4, 4, 4], 2), ([30, 2, 2], 3), ([1, 9, 17], 4)])
def test_prompts_that_fit_the_budget_are_read_together(lengths: list[int], steps: int) -> None:
    """Padding counts: rows times the longest prompt stay within 16 tokens."""
    engine = Engine(tiny_base(), slots=8, prefill_tokens_per_step=16)
    for index, length in enumerate(lengths):
        engine.submit(Request(str(index), prompt(length, index), 20))
    started = []
    while len(started) < len(lengths):
        new = [int(token.request_id) for token in engine.step() if int(token.request_id) not in started]
        assert len(new) <= 1 or len(new) * max(lengths[index] for index in new) <= 16
        started += new
    assert engine.stats().steps == steps


def test_stop_ids_end_a_request() -> None:
    base = tiny_base()
    made = greedy_loop(base, Request("all", prompt(6), 12))
    stop = made[4]
    end = made.index(stop)
    engine = Engine(base)
    engine.submit(Request("a", prompt(6), 12, stop_ids=frozenset([stop])))
    engine.submit(Request("b", prompt(6), end + 1, stop_ids=frozenset([stop])))
    engine.submit(Request("c", prompt(6), end + 1))
    last = {}
    while not engine.idle:
        last.update({token.request_id: (token.token_id, token.finish_reason) for token in engine.step()})
    assert last == {"a": (stop, "stop"), "b": (stop, "stop"), "c": (stop, "length")}
    assert generate(base, [Request("a", prompt(6), 12, stop_ids=frozenset([stop]))])["a"] == Completion(made[:end], "stop")


def test_cancelled_requests_free_their_slots() -> None:
    base = tiny_base()
    engine = Engine(base, slots=2, prefill_tokens_per_step=16)
    for name, length in (("running", 5), ("reading", 60), ("waiting", 5)):
        engine.submit(Request(name, prompt(length), 30))
    engine.step()
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 1)
    assert engine.cancel("waiting")
    assert engine.stats().waiting == 0
    for name in ("running", "reading"):
        assert engine.cancel(name)
    assert not engine.idle
    assert engine.step() == []
    assert engine.idle
    assert not any(engine.cancel(name) for name in ("running", "reading", "waiting", "unknown"))
    again = Request("running", prompt(11, 4), 8)
    engine.submit(again)
    assert run(engine)["running"] == greedy_loop(base, again)


def test_growing_keeps_what_rows_have_read() -> None:
    base = tiny_base()
    lengths = [(FIRST_CAPACITY - 20, 60), (7, 30), (FIRST_CAPACITY + 5, 3)]
    requests = [Request(str(i), prompt(length, i), max_tokens) for i, (length, max_tokens) in enumerate(lengths)]
    engine = Engine(base, slots=2)
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {token.request_id: [token.token_id] for token in engine.step()} | {"2": []}
    before = engine.stats().cache_bytes
    run(engine, tokens)
    assert engine.stats().cache_bytes == 2 * before == 2 * 3 * 2 * 2 * 12 * 2 * FIRST_CAPACITY * 4
    assert [tokens[request.request_id] for request in requests] == [greedy_loop(base, request) for request in requests]


@cache
def schedule_case() -> tuple[BaseModel, list[Request], list[list[int]]]:
    base = tiny_base()
    weights = adapters(base, 8)
    numbers = random.Random(11)
    requests = [
        Request(str(i), prompt(numbers.randint(1, 24), i), numbers.randint(1, 9), weights[i] if i % 3 else None) for i in range(8)
    ]
    return base, requests, [greedy_loop(base, request) for request in requests]


@settings(max_examples=40)
@given(
    slots=st.integers(1, 4),
    budget=st.integers(1, 40),
    order=st.permutations(range(8)),
    steps=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    cancels=st.dictionaries(st.integers(0, 7), st.integers(0, 7), max_size=3),
)
def test_any_schedule_gives_the_tokens_of_single_runs(
    slots: int, budget: int, order: list[int], steps: list[int], cancels: dict[int, int]
) -> None:
    """`cancels` maps a point of the schedule to the request cancelled there."""
    base, requests, expected = schedule_case()
    engine = Engine(base, base.spec(4), slots=slots, max_length=40, prefill_tokens_per_step=budget)
    tokens: dict[str, list[int]] = defaultdict(list)
    cancelled = set()
    for point, (index, count) in enumerate(zip(order, steps, strict=True)):
        engine.submit(requests[index])
        for _ in range(count):
            out = engine.step()
            assert len({token.request_id for token in out}) == len(out) <= 2 * slots
            for token in out:
                tokens[token.request_id].append(token.token_id)
        if point in cancels and engine.cancel(str(cancels[point])):
            cancelled.add(cancels[point])
    run(engine, tokens)
    for index, ids in enumerate(expected):
        assert tokens[str(index)] == (ids[: len(tokens[str(index)])] if index in cancelled else ids)
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.generated_tokens == sum(map(len, tokens.values()))


def test_counters() -> None:
    base = tiny_base()
    engine = Engine(base, base.spec(4), slots=2, max_length=64)
    assert engine.stats().cache_bytes == engine.stats().adapter_bytes == 0
    for index in range(5):
        engine.submit(Request(str(index), prompt(4 + index, index), 3))
    assert (engine.stats().running, engine.stats().waiting) == (0, 5)
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    assert engine.stats().adapter_bytes == 0
    engine.submit(Request("adapter", prompt(4), 3, adapters(base, 1)[0]))
    run(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.prompt_tokens, stats.generated_tokens) == (0, 0, 34, 18)
    assert stats.steps == 7
    assert stats.adapter_bytes == 2 * base.spec(4).numel * 4


def test_memory_is_freed() -> None:
    base = tiny_base()
    engine = Engine(base, base.spec(4), slots=2)
    weights = adapters(base, 1)[0]
    vector = weakref.ref(weights.flat_BN)
    engine.submit(Request("a", prompt(5), 3, weights))
    del weights
    run(engine)
    gc.collect()
    assert vector() is None
    buffers = [weakref.ref(engine._flat_SN), *(weakref.ref(b) for layer in engine._cache._layers for b in layer.buffers)]
    del engine
    gc.collect()
    assert len(buffers) == 1 + 2 * len(base.layers)
    assert all(buffer() is None for buffer in buffers)


def test_logits_that_are_not_finite_end_their_request_only() -> None:
    base = tiny_base()
    good, bad = adapters(base, 1)[0], adapters(base, 1, scale=1e25)[0]
    requests = [Request("bad", prompt(9), 8, bad), Request("next", prompt(3), 8, good), Request("long", prompt(9), 8, good)]
    completions = generate(base, requests, slots=2, prefill_tokens_per_step=9)
    assert completions["bad"] == Completion([], "error")
    assert [completions[r.request_id].token_ids for r in requests[1:]] == [greedy_loop(base, r) for r in requests[1:]]


def test_other_threads_may_submit_and_cancel() -> None:
    base = tiny_base()
    weights = adapters(base, 4)
    engine = Engine(base, weights[0].spec, slots=4)
    requests = [Request(f"{t}-{i}", prompt(3 + i, t), 6, weights[t]) for t in range(4) for i in range(6)]

    def submit(thread: int) -> None:
        for request in requests[6 * thread : 6 * thread + 6]:
            engine.submit(request)
            engine.submit(Request(f"cancelled {request.request_id}", prompt(4), 200))
            assert engine.cancel(f"cancelled {request.request_id}")

    threads = [threading.Thread(target=submit, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    tokens: dict[str, list[int]] = defaultdict(list)
    while any(thread.is_alive() for thread in threads) or not engine.idle:
        for token in engine.step():
            tokens[token.request_id].append(token.token_id)
    for thread in threads:
        thread.join()
    assert all(tokens[request.request_id] == greedy_loop(base, request) for request in requests)
    assert all(len(ids) < 200 for ids in tokens.values())


def test_nothing_is_kept_for_backward() -> None:
    base = tiny_base()
    weights = adapters(base, 1)[0]
    weights.flat_BN.requires_grad_()
    engine = Engine(base, weights.spec)
    engine.submit(Request("a", prompt(5), 3, weights))
    run(engine)
    assert weights.flat_BN.grad_fn is None and not engine._flat_SN.requires_grad
    assert all(not buffer.requires_grad for layer in engine._cache._layers for buffer in layer.buffers)


def bad_requests(base: BaseModel) -> list[tuple[Request, str]]:
    fine = adapters(base, 2)
    broken = LoraWeights(fine[0].spec, fine[0].flat_BN.clone())
    broken.flat_BN[0, 5] = float("nan")
    return [
        (Request("r", [], 4), "empty prompt"),
        (Request("r", [1], 0), "asks for 0 tokens"),
        (Request("r", [1] * 30, 11), "at most 40 fit, so shorten the prompt"),
        (Request("r", [1, 89], 4), "token ids from 1 to 89: give 0 to 88"),
        (Request("r", [-1, 3], 4), "token ids from -1"),
        (Request("taken", [1], 4), "in the engine already"),
        (Request("r", [1], 4, broken), "not finite"),
        (Request("r", [1], 4, adapters(base, 1, rank=5)[0]), "recompress"),
        (Request("r", [1], 4, LoraWeights(fine[0].spec, torch.cat([w.flat_BN for w in fine]))), "2 adapters: give one"),
        (Request("r", [1], 4, adapters(tiny_base("llama"), 1)[0]), "another base, or for more sites"),
    ]


def test_requests_that_could_not_run_are_refused() -> None:
    base = tiny_base()
    engine = Engine(base, base.spec(4), max_length=40)
    engine.submit(Request("taken", [1], 4))
    for request, message in bad_requests(base):
        with pytest.raises(ValueError, match=message):
            engine.submit(request)
    assert set(run(engine)) == {"taken"}
    with pytest.raises(ValueError, match="give the engine a spec"):
        Engine(base).submit(Request("r", [1], 4, adapters(base, 1)[0]))
    with pytest.raises(ValueError, match="at most 256 fit"):
        generate(base, [Request("r", [1] * 256, 1)])
    assert generate(base, []) == {}


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give"):
        Sampling(**values)


def model_of(config: PretrainedConfig) -> BaseModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaseModel(AutoModelForCausalLM.from_config(config))


def test_bases_that_the_engine_would_get_wrong_are_refused() -> None:
    base = tiny_base()
    for values in ({"slots": 0}, {"prefill_tokens_per_step": 0}, {"max_length": 257}, {"max_length": 1}):
        with pytest.raises(ValueError, match=r"give|takes"):
            Engine(base, **values)
    with pytest.raises(ValueError, match="another base"):
        Engine(base, tiny_base("llama").spec(4))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    stretched = model_of(LlamaConfig(**SHAPE, rope_parameters={**rope, "original_max_position_embeddings": 64, "factor": 4.0}))
    with pytest.raises(ValueError, match="max_length of at most 64"):
        Engine(stretched)
    Engine(stretched, max_length=64)
    base.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention='sdpa'"):
        Engine(base)

"""LIFT's trainer: many documents as if each were alone, starts that change nothing, runs that go on, failures that stay alone."""

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from core.adapters.base_model import BaseModel
from core.adapters.gated_memory import GatedMemory
from core.adapters.lora import LoraWeights, attach, compose, gram, recompress
from core.adapters.weights import AdapterWeights
from core.config import fingerprint, load
from core.lift.course import Curriculum, EarlyStop, FixedQuestions, GrowingQuestions, Stage
from core.lift.examples import Reading, question_example
from core.lift.forms import AdapterSettings, LoraForm, PissaForm, form_of
from core.lift.full_finetuning import full_finetune
from core.lift.settings import PRESETS, LiftRun, LiftSettings, OptimiserSettings
from core.lift.trainer import Job, Lift, LiftResult, LiftState, course, train
from core.training.examples import QuestionAnswer, collate
from core.training.objectives import row_losses
from tests.core.text.test_prompts import CHATML, byte_tokenizer
from tests.models import SHAPE, random_adapters

KINDS = ("lora", "pissa", "gated_memory")


@cache
def base_of(dtype: torch.dtype = torch.float32) -> BaseModel:
    """A tiny Qwen3 that reads bytes."""
    shape = {**SHAPE, "vocab_size": 400, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, head_dim=12, tie_word_embeddings=True))
    return BaseModel(model.to(dtype), byte_tokenizer(CHATML))


def settings_of(
    kind: Any = "lora", learning_rate: float = 1e-2, adapter: dict[str, Any] | None = None, **values: Any
) -> LiftSettings:
    """Three full-batch epochs of segments and questions, unless told otherwise."""
    curriculum = {
        "stages": (Stage(name="mixed", epochs=3, tasks=("segments", "questions")),),
        "examples_per_step": None,
        "reading": Reading(segment_tokens=40),
        **values.pop("curriculum", {}),
    }
    rank = {} if kind == "gated_memory" else {"rank": 4}
    return LiftSettings(
        adapter=AdapterSettings(kind=kind, **{**rank, **(adapter or {})}),
        optimiser=OptimiserSettings(learning_rate=learning_rate, **values.pop("optimiser", {})),
        curriculum=Curriculum(**curriculum),
        **values,
    )


def job_of(number: int, questions: int = 3, **values: Any) -> Job:
    """Documents of different lengths."""
    rng = random.Random(number)
    words = [rng.choice(["harbour", "Ansa", "Rill", "bell", "tower", "in 1874", "opened"]) for _ in range(8 + 5 * (number % 4))]
    pairs = [QuestionAnswer(f"What is word {place} of {number}?", words[place]) for place in range(questions)]
    return Job(f"document {number}", " ".join(words) + ".", questions=FixedQuestions(tuple(pairs)), **values)


def by_key(results: Iterator[LiftResult]) -> dict[str, LiftResult]:
    found = list(results)
    assert len({result.key for result in found}) == len(found)
    return {result.key: result for result in found}


def weights_of(result: LiftResult) -> AdapterWeights:
    assert result.weights is not None, result.fault
    return result.weights


def question_loss(base: BaseModel, weights: AdapterWeights | None, job: Job) -> float:
    """Mean loss of a job's answers under an adapter."""
    batch = collate([question_example(base.tokenizer, pair, 256) for pair in job.questions.ready()], pad_id=0)
    with torch.no_grad(), nullcontext() if weights is None else weights.attach(base):
        return float(row_losses(base, batch, None).sum()) / batch.tokens


def logits_of(base: BaseModel, weights: AdapterWeights | None) -> Tensor:
    ids_BT = torch.arange(40).view(2, 20) + 10
    with torch.no_grad(), nullcontext() if weights is None else weights.attach(base):
        return base.model(input_ids=ids_BT, use_cache=False).logits


# Many documents as if each were alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_does_not_notice_its_neighbours(kind: str) -> None:
    base = base_of(torch.float64)
    stages = (
        Stage(name="segments", epochs=2, tasks=("contextualised",)),
        Stage(name="mixed", epochs=6, tasks=("segments", "questions")),
    )
    settings = settings_of(kind, 1e-3, curriculum={"stages": stages, "examples_per_step": 2}, optimiser={"decay": "cosine"})
    jobs = [job_of(number, questions=5) for number in range(5)]
    together = by_key(train(base, jobs, settings, LiftRun(slots=3, micro_batch_tokens=700)))
    alone = by_key(train(base, jobs, settings, LiftRun(slots=1, micro_batch_tokens=4096)))
    assert together.keys() == alone.keys() == {job.key for job in jobs}
    for job in jobs:
        key, result = job.key, together[job.key]
        assert question_loss(base, weights_of(result), job) < question_loss(base, None, job)
        assert result.steps >= 20 and result.reason == "schedule"
        assert result.losses == pytest.approx(alone[key].losses, abs=1e-9, rel=0)
        assert weights_of(result).flat_BN.dtype == torch.float64
        assert (weights_of(result).flat_BN - weights_of(alone[key]).flat_BN).abs().max() < 1e-6
        assert (result.steps, result.tokens) == (alone[key].steps, alone[key].tokens)


def test_checkpointing_changes_nothing() -> None:
    base, settings = base_of(), settings_of()
    jobs = [job_of(number) for number in range(3)]
    plain, again = (by_key(train(base, jobs, settings, LiftRun(checkpointing=c))) for c in (False, True))
    for key in plain:
        assert plain[key].losses == pytest.approx(again[key].losses, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_their_own_document(kind: str) -> None:
    base = base_of()
    jobs = [job_of(number) for number in range(3)]
    stages = (Stage(name="questions", epochs=40, tasks=("questions",)),)
    settings = settings_of(kind, 3e-2 if kind == "lora" else 5e-3, curriculum={"stages": stages})
    results = by_key(train(base, jobs, settings))
    for job in jobs:
        result = results[job.key]
        own, before = question_loss(base, weights_of(result), job), question_loss(base, None, job)
        assert result.losses[0] == pytest.approx(before, abs=1e-4), "every start changes nothing"
        assert own < 0.8 * before
        others = [question_loss(base, weights_of(results[other.key]), job) for other in jobs if other is not job]
        assert own < min(others)
        assert isinstance(result.weights, GatedMemory if kind == "gated_memory" else LoraWeights)


def test_the_first_step_is_adamws() -> None:
    """Against torch on one document's own loss: means of both kinds, gamma, clipping, scale, warm-up."""
    base, job = base_of(torch.float64), job_of(3)
    settings = settings_of(
        "lora",
        1e-2,
        adapter={"scale": 2.0},
        gamma=0.3,
        optimiser={"weight_decay": 0.1, "clip_norm": 0.05, "warmup_steps": 4, "betas": (0.8, 0.9)},
        curriculum={"stages": (Stage(name="mixed", epochs=3, tasks=("segments", "questions")),)},
    )
    result = by_key(train(base, [job_of(1), job, job_of(2)], settings))[job.key]

    lift = Lift(base, settings)
    lift.submit(job)
    [state] = lift.states()
    flat_1N = torch.nn.Parameter(state.flat_N[None].clone())
    optimiser = torch.optim.AdamW([flat_1N], lr=0.0, betas=(0.8, 0.9), weight_decay=0.1)
    walk, form, losses = course(base, job, settings), form_of(base, settings.adapter), []
    for step in range(3):
        optimiser.param_groups[0]["lr"] = 1e-2 * (step + 1) / 4
        lesson = walk.take()
        assert lesson
        loss = torch.zeros((), dtype=torch.float64)
        for auxiliary, weight in ((False, 1.0), (True, 0.3)):
            batch = collate([e.example for e in lesson if e.auxiliary == auxiliary], pad_id=0)
            with form.attach(flat_1N, None):
                loss = loss + weight * row_losses(base, batch, None).sum() / batch.tokens
        optimiser.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_([flat_1N], 0.05) > 0.05
        optimiser.step()
        losses.append(loss.item())
        walk.record(loss.item())
    assert result.losses == pytest.approx(losses, abs=1e-9)
    expected = LoraWeights(lift.spec, flat_1N.detach())
    for entry in expected.spec.table:
        key = entry[:3]
        scale = 2.0 if entry.tensor == "B" else 1.0
        assert torch.allclose(weights_of(result).tensors[key], scale * expected.tensors[key], atol=1e-9)


def test_decay_follows_the_curriculum() -> None:
    assert [OptimiserSettings(learning_rate=1, decay="linear").rate(5, share) for share in (0, 0.25, 1)] == [1, 0.75, 0]
    assert OptimiserSettings(learning_rate=1, decay="cosine").rate(5, 0.5) == pytest.approx(0.5)
    assert [OptimiserSettings(learning_rate=1, warmup_steps=2).rate(step, 0.9) for step in range(3)] == [0.5, 1, 1]


def test_documents_leave_and_enter() -> None:
    base = base_of()
    entered: list[str] = []

    def arriving() -> Iterator[Job]:
        for number in range(6):
            entered.append(f"document {number}")
            yield job_of(number)

    settings = settings_of(token_budget=150)
    left = []
    for result in train(base, arriving(), settings, LiftRun(slots=2)):
        left.append(result.key)
        assert len(entered) - len(left) <= 2, "no more jobs are drawn than there are slots"
    assert sorted(left) == sorted(entered)


# Starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pissa_starts_at_the_base_and_stores_what_it_trained(dtype: torch.dtype) -> None:
    base = base_of(dtype)
    form = PissaForm(base, AdapterSettings(kind="pissa", rank=5))
    flat_1N = form.initial(torch.Generator())[None].to(dtype)
    bare = logits_of(base, None)
    with form.attach(flat_1N, None):
        assert (logits_of(base, None) - bare).abs().max() < (1e-5 if dtype == torch.float32 else 1e-6)
    assert gram(form.stored(flat_1N)).sqrt().item() < 1e-6
    moved = flat_1N + 0.02 * torch.randn(flat_1N.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    stored = form.stored(moved)
    assert stored.spec.rank == 10
    with form.attach(moved, None):
        trained = logits_of(base, None)
    assert (trained - bare).abs().max() > 1e-2
    assert (trained - logits_of(base, stored)).abs().max() < 1e-5
    weight = base.linears[0, "q"].weight.detach().mT
    first = LoraWeights(form.spec, flat_1N)
    singular = torch.linalg.svdvals(weight - torch.matmul(*first.factors(0, "q"))[0])
    assert singular[:3] == pytest.approx(torch.linalg.svdvals(weight)[5:8], abs=1e-5), "the five largest are trained"
    with pytest.raises(ValueError, match="has 24 singular vectors"):
        PissaForm(base, AdapterSettings(kind="pissa", rank=33))
    with pytest.raises(ValueError, match="train a lora"):
        form.initial(torch.Generator(), stored)


def test_lora_starts_from_generated_adapters() -> None:
    base = base_of()
    generated = random_adapters(base, 2, rank=3)
    one = generated.select(slice(0, 1))
    for scale in (1.0, 4.0):
        form = LoraForm(base, AdapterSettings(rank=5, scale=scale))
        flat_1N = form.initial(torch.Generator().manual_seed(0), one)[None]
        stored = form.stored(flat_1N)
        assert (logits_of(base, stored) - logits_of(base, one)).abs().max() < 1e-5
        a_1IR, b_1RO = stored.factors(1, "v")
        assert a_1IR[:, :, 3:].abs().min() > 0, "spare ranks: A random, so that B can learn"
        assert not b_1RO[:, 3:].any()
    lower = LoraForm(base, AdapterSettings(rank=4))
    both = compose([one, generated.select(slice(1, 2))])
    cut, _ = recompress(both, 4)
    started = lower.stored(lower.initial(torch.Generator(), generated)[None])
    assert (logits_of(base, started) - logits_of(base, cut)).abs().max() < 1e-5, "windows: composed, then cut to the rank"
    fewer = LoraForm(base, AdapterSettings(rank=4, sites=("q", "v")))
    with pytest.raises(ValueError, match="train them too"):
        fewer.initial(torch.Generator(), one)
    assert fewer.spec.layers[0][0].site == "q" and len(fewer.spec.layers[0]) == 2
    subset = LoraWeights(fewer.spec, fewer.initial(torch.Generator())[None])
    assert lower.initial(torch.Generator(), subset).shape == (lower.spec.numel,)
    memory = form_of(base, AdapterSettings(kind="gated_memory"))
    with pytest.raises(ValueError, match="of kind gated_memory"):
        lower.initial(torch.Generator(), memory.stored(memory.initial(torch.Generator())[None]))
    with pytest.raises(ValueError, match="of kind lora"):
        memory.initial(torch.Generator(), one)


def test_a_gated_memory_starts_from_another() -> None:
    base = base_of()
    form = form_of(base, AdapterSettings(kind="gated_memory", rank=7))
    first = form.stored(form.initial(torch.Generator().manual_seed(1))[None] + 0.1)
    assert form.spec.rank == 7
    assert torch.equal(form.initial(torch.Generator(), first), first.flat_BN[0])
    with pytest.raises(ValueError, match="only a lora can be scaled"):
        AdapterSettings(kind="gated_memory", scale=2.0)


def test_a_gate_penalty_keeps_gates_small() -> None:
    base, job = base_of(), job_of(1)
    stages = (Stage(name="questions", epochs=25, tasks=("questions",)),)
    sizes = []
    for penalty in (0.0, 30.0):
        settings = settings_of("gated_memory", 2e-2, curriculum={"stages": stages}, gate_penalty=penalty)
        result = by_key(train(base, [job, job_of(2)], settings))[job.key]
        trained = weights_of(result)
        sizes.append(sum(float(trained.tensors[layer, "attention", "w"].abs().sum()) for layer in range(2)))
    assert sizes[1] < 0.5 * sizes[0]


def test_seed_and_key_name_the_start() -> None:
    base = base_of()
    starts = {}
    for seed in (0, 1):
        lift = Lift(base, settings_of(curriculum={"seed": seed}))
        for number in (0, 1):
            lift.submit(job_of(number))
        for state in lift.states():
            starts[seed, state.key] = state.flat_N.clone()
    values = list(starts.values())
    assert not any(torch.equal(a, b) for place, a in enumerate(values) for b in values[:place])
    again = Lift(base, settings_of())
    again.submit(job_of(1))
    assert torch.equal(next(again.states()).flat_N, starts[0, "document 1"])


# Arriving questions, ends, failures


def test_training_goes_on_while_questions_arrive() -> None:
    base = base_of()
    stages = (Stage(name="questions", epochs=2, tasks=("questions",)),)
    settings = settings_of(curriculum={"stages": stages, "examples_per_step": 2})
    whole, pairs = job_of(0, questions=6), job_of(0, questions=6).questions.ready()
    expected = by_key(train(base, [whole, job_of(1)], settings))
    questions = GrowingQuestions()
    lift = Lift(base, settings, LiftRun(slots=2))
    lift.submit(Job(whole.key, whole.text, questions=questions))
    assert lift.step() == [] and lift.waiting
    lift.submit(job_of(1))
    assert lift.step() == [] and not lift.waiting, "the neighbour does not wait"
    results = []
    for pair in pairs:
        questions.add(pair)
        results += lift.step()
    questions.close()
    while not lift.idle:
        results += lift.step()
    for result in results:
        assert result.losses == pytest.approx(expected[result.key].losses, abs=1e-5)


def test_reasons_to_stop() -> None:
    base = base_of()
    early = settings_of(curriculum={"early_stop": EarlyStop(loss_below=1e9)})
    [result] = train(base, [job_of(0)], early)
    assert (result.reason, result.steps) == ("early_stop", 1)
    [result] = train(base, [job_of(0)], settings_of(token_budget=1))
    assert (result.reason, result.steps) == ("token_budget", 1)
    assert result.tokens > 1 and result.seconds > 0 and weights_of(result)
    [result] = train(base, [job_of(0)], settings_of())
    assert (result.reason, result.steps) == ("schedule", 3)


def test_a_failing_document_takes_nobody_with_it() -> None:
    base, settings = base_of(), settings_of()
    good = [job_of(number) for number in range(3)]
    expected = by_key(train(base, good, settings))
    poison = random_adapters(base, 1, rank=2)
    poison.flat_BN[0, 5] = math.nan
    huge = random_adapters(base, 1, rank=2)
    bad = [
        Job("empty", ""),
        Job("poisoned", good[0].text, questions=good[0].questions, start=poison),
        Job("infinite", good[0].text, questions=good[0].questions, start=LoraWeights(huge.spec, huge.flat_BN * 1e30)),
    ]
    results = by_key(train(base, [bad[0], good[0], bad[1], good[1], bad[2], good[2]], settings))
    for job in good:
        assert results[job.key].losses == pytest.approx(expected[job.key].losses, abs=1e-5)
        assert results[job.key].reason == "schedule"
    assert "nothing to train on" in results["empty"].fault
    for key in ("poisoned", "infinite"):
        assert results[key].reason == "failed" and results[key].weights is None
        assert "not finite at 2 steps" in results[key].fault and results[key].steps == 2


def test_unfit_starts_fail_their_document_only() -> None:
    base = base_of()
    memory = form_of(base, AdapterSettings(kind="gated_memory"))
    start = memory.stored(memory.initial(torch.Generator())[None])
    results = by_key(train(base, [Job("unfit", "some text", start=start), job_of(1)], settings_of()))
    assert "cannot start from" in results["unfit"].fault
    assert results["document 1"].reason == "schedule"


def test_unfit_settings_are_refused() -> None:
    base = base_of()
    with pytest.raises(ValueError, match="256 positions"):
        Lift(base, settings_of(curriculum={"reading": Reading(segment_tokens=300)}))
    with pytest.raises(ValueError, match="no tokenizer: save one beside its weights"):
        Lift(BaseModel(base.model), settings_of())
    lift = Lift(base, settings_of(), LiftRun(slots=1))
    lift.submit(job_of(0))
    with pytest.raises(ValueError, match="slots are taken"):
        lift.submit(job_of(1))


# Going on


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_document_ends_as_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    base = base_of()
    stages = (
        Stage(name="segments", epochs=2, tasks=("contextualised",)),
        Stage(name="mixed", epochs=2, tasks=("segments", "questions")),
    )
    settings = settings_of(kind, 1e-3, curriculum={"stages": stages, "examples_per_step": 2}, optimiser={"decay": "linear"})
    jobs = [job_of(number) for number in range(3)]
    whole = by_key(train(base, jobs, settings))
    for stop in (0, 1, 4):
        lift = Lift(base, settings, LiftRun(slots=3))
        for job in jobs:
            lift.submit(job)
        for _ in range(stop):
            assert lift.step() == []
        resumed = []
        for number, state in enumerate(lift.states()):
            state.save(tmp_path / f"{number}.safetensors")
            loaded = LiftState.load(tmp_path / f"{number}.safetensors")
            resumed.append(Job(jobs[number].key, jobs[number].text, questions=jobs[number].questions, state=loaded))
        assert not list(tmp_path.glob("*.unfinished"))
        for key, result in by_key(train(base, resumed[::-1], settings, LiftRun(slots=2))).items():
            assert (result.steps, result.tokens, result.reason) == (whole[key].steps, whole[key].tokens, whole[key].reason)
            assert result.losses == pytest.approx(whole[key].losses, abs=1e-4)
            assert torch.allclose(weights_of(result).flat_BN, weights_of(whole[key]).flat_BN, atol=1e-3)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    base = base_of()
    lift = Lift(base, settings_of())
    lift.submit(job_of(0))
    [state] = lift.states()
    [result] = train(base, [job_of(1, state=state)], settings_of())
    assert "start 'document 1' anew" in result.fault
    [result] = train(base, [job_of(0, state=state)], settings_of(gamma=0.5))
    assert "made by other settings" in result.fault
    save_file({"flat_N": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a LIFT state"):
        LiftState.load(tmp_path / "other.safetensors")


# Settings, and the baseline that changes the base


def test_presets_are_the_papers_and_a_recipe_can_say_them(tmp_path: Path) -> None:
    assert len({fingerprint(preset) for preset in PRESETS.values()}) == len(PRESETS)
    v4 = PRESETS["v4"]
    assert (v4.adapter.rank, v4.adapter.scale, v4.optimiser.learning_rate) == (128, 2.0, 5e-5)
    assert (v4.curriculum.examples_per_step, v4.curriculum.stages[0].epochs) == (4, 5)
    assert (PRESETS["v3"].adapter.kind, PRESETS["v3"].optimiser.betas) == ("gated_memory", (0.9, 0.98))
    recipe = tmp_path / "v4_fast.toml"
    recipe.write_text(
        '[optimiser]\nlearning_rate = 3e-4\n[curriculum]\nstages = [{name = "questions", epochs = 1, tasks = ["questions"]}]\n'
    )
    assert load(LiftSettings, recipe) == PRESETS["v4_fast"]


def test_full_finetuning_is_a_guest() -> None:
    base, job = base_of(), job_of(2)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    bare, settings = question_loss(base, None, job), settings_of(learning_rate=1e-3, optimiser={"decay": "linear"})
    with full_finetune(base, job, settings, micro_batch_tokens=60) as losses:
        assert len(losses) == 3 and losses[-1] < losses[0]
        assert question_loss(base, None, job) < bare
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
    whole = by_key(train(base, [job], settings_of(learning_rate=1e-9)))[job.key]
    assert losses[0] == pytest.approx(whole.losses[0], abs=1e-5), "the same loss as LIFT's"
    with pytest.raises(RuntimeError, match="inside"), full_finetune(base, job, settings):
        raise RuntimeError("inside")
    with (
        pytest.raises(ValueError, match="still to come"),
        full_finetune(base, Job("a", "b", questions=GrowingQuestions()), settings),
    ):
        pass
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert all(parameter.grad is None for parameter in base.model.parameters())
    with torch.no_grad(), attach(base, random_adapters(base, 1)):
        assert question_loss(base, None, job) != bare
    assert question_loss(base, None, job) == bare

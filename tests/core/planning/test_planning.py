"""Plans of lifting: counts as LIFT's own code counts, money and time by hand."""

import pytest

from core.config import load
from core.lift.course import Course, FixedQuestions
from core.lift.settings import PRESETS, V1, V4, LiftSettings
from core.planning.costs import Prices
from core.planning.lift import Assumptions, BaseSize, LiftPlan, PlanSettings, Volume, lines, measure, plan_lift
from core.questions.endpoint import EndpointSettings, request_body
from core.questions.rules import RuleSettings, write_by_rules
from core.text.prompts import encode
from core.text.sentences import sentences
from pipelines.evaluation.long_documents import as_document, long_documents
from pipelines.world.tokenizer import build_tokenizer

BASE = BaseSize(weights=8_000_000_000, adapter=300_000_000, max_length=1024)
WRITER = EndpointSettings(model="m", pairs=10)
PRICES = Prices(generator_prompt_per_million=0.5, generator_completion_per_million=2.0, gpu_hour=3.0)
DOCUMENTS = [as_document(document) for document in long_documents(2, 14)]


def _plan(volume: Volume, lift: LiftSettings = V4, **assumed: float) -> LiftPlan:
    return plan_lift(volume, BASE, lift, WRITER, PRICES, Assumptions.model_validate(assumed))


def test_a_corpus_is_counted_as_it_will_be_read() -> None:
    tokenizer = build_tokenizer()
    volume = measure(DOCUMENTS, tokenizer, V1, WRITER, 1024)
    assert volume.documents == 2 and volume.tokens == sum(len(encode(tokenizer, document.text)) for document in DOCUMENTS)
    assert volume.sentences == volume.requests == sum(len(sentences(document.text)) for document in DOCUMENTS)
    sent = 0
    for document in DOCUMENTS:
        for passage in WRITER.passages(document.text):
            sent += sum(len(message["content"]) for message in request_body(document, passage, WRITER)["messages"])
    assert volume.prompt_characters == pytest.approx(sent, rel=0.02)
    whole = PRESETS["finetune_raw"].curriculum.model_copy(update={"examples_per_step": 10**6})
    course = Course(tokenizer, "k", "", DOCUMENTS[0].text, FixedQuestions(), whole, 1024)
    lesson = course.take()
    one = measure(DOCUMENTS[:1], tokenizer, PRESETS["finetune_raw"], WRITER, 1024)
    assert lesson is not None and one.segments == len(lesson)
    assert one.segment_tokens == sum(len(exercise.example.ids) for exercise in lesson)


def test_rules_are_counted_by_writing() -> None:
    volume = measure(DOCUMENTS[:1], build_tokenizer(), V4, RuleSettings(), 1024)
    plan = plan_lift(volume, BASE, V4, RuleSettings(), PRICES, Assumptions())
    assert plan.questions == len(write_by_rules(DOCUMENTS[0])) > 100
    assert plan.requests == plan.generator_prompt_tokens == plan.generator_cost == 0


def test_the_arithmetic_by_hand() -> None:
    volume = Volume(documents=10, characters=4_000_000, tokens=1_000_000, sentences=40_000, requests=40_000)
    volume.prompt_characters = 40_000_000
    plan = _plan(volume, pairs_per_sentence=5, question_tokens=40, reply_tokens=50, step_s=0.1)
    assert plan.questions == 200_000
    assert (plan.generator_prompt_tokens, plan.generator_completion_tokens) == (10_000_000, 10_000_000)
    assert plan.generator_cost == pytest.approx(5.0 + 20.0)
    assert plan.training_tokens == 5 * 200_000 * 40 and plan.training_steps == 5 * 200_000 // 4
    assert plan.training_flops == pytest.approx(40e6 * (4 * 8e9 + 6 * 3e8))
    seconds = max(plan.training_flops / (989e12 * 0.3), 250_000 * 0.1 / 10)
    assert plan.gpu_hours == pytest.approx(seconds / 3600) and plan.gpu_cost == pytest.approx(3.0 * seconds / 3600)
    assert plan.cost == pytest.approx(plan.generator_cost + plan.gpu_cost)
    generation_s, training_s = 63 * 3.0, 25_000 * 0.1
    assert plan.first_answer_s == pytest.approx(3.0 + training_s)
    assert plan.sequential_first_answer_s == pytest.approx(generation_s + training_s)
    assert plan.adapter_bytes == 600_000_000


def test_more_of_anything_never_costs_less() -> None:
    small = Volume(documents=4, characters=4000, tokens=1000, sentences=40, requests=40, prompt_characters=40_000)
    large = Volume(documents=4, characters=8000, tokens=2000, sentences=80, requests=80, prompt_characters=80_000)
    for name, lift in PRESETS.items():
        a, b = _plan(small, lift), _plan(large, lift)
        assert (b.cost, b.training_tokens, b.first_answer_s) >= (a.cost, a.training_tokens, a.first_answer_s), name
    assert _plan(small, gpus=2).gpu_hours >= _plan(small).gpu_hours / 2


def test_a_token_budget_bounds_training_and_the_raw_text_asks_nobody() -> None:
    volume = Volume(
        documents=2, tokens=5000, sentences=100, requests=100, prompt_characters=10**5, segments=4, segment_tokens=9000
    )
    whole = _plan(volume)
    assert (whole.training_tokens, whole.training_steps) == (5 * 600 * 45, 750)
    bounded = _plan(volume, V4.model_copy(update={"token_budget": 1350}))
    assert (bounded.training_tokens, bounded.training_steps) == (2700, 15)
    raw = _plan(volume, PRESETS["finetune_raw"])
    assert raw.questions == raw.requests == 0 and raw.training_tokens == 5 * 9000


def test_a_plan_reads_prices_from_toml_and_says_what_it_assumes(tmp_path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('[endpoint]\nmodel = "m"\n[prices]\ncurrency = "EUR"\ngpu_hour = 2.5\n[assumptions]\ngpus = 4\n')
    settings = load(PlanSettings, path)
    assert settings.endpoint is not None and settings.prices.gpu_hour == 2.5
    volume = Volume(documents=1, tokens=1000, sentences=10, requests=10, prompt_characters=1000)
    text = "\n".join(lines(plan_lift(volume, BASE, settings.lift, settings.endpoint, settings.prices, settings.assumptions)))
    assert "EUR" in text and "gpus 4" in text and "peak_tflops 989" in text


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="no documents"):
        _plan(measure([], build_tokenizer(), V4, WRITER, 1024))

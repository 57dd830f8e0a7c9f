"""The evaluation on a tiny random base and hypernetwork: conditions, controls, losses, splits, files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.adapters.base_model import BaseModel
from core.adapters.lora import LoraWeights, attach, composed
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.text.prompts import Limits, in_context, prompt
from core.training.examples import QuestionAnswer, in_context_example, question_examples
from core.training.metrics import Interval, exact_match, f1, mean_interval
from pipelines.evaluation.asking import Asker, Questions, Throughput, from_hypernetwork, level_of
from pipelines.evaluation.evaluate import (
    EvaluationSettings,
    Report,
    chunks,
    clustered_interval,
    derangement,
    evaluate,
    validation_accuracy,
)
from pipelines.evaluation.report import CONDITION_LABELS, bars, markdown, to_json, write_report
from pipelines.evaluation.report_writing import Bar
from pipelines.world import documents as world
from pipelines.world.documents import WorldDocument
from tests.models import tiny_base, world_base

THROUGHPUT = Throughput(slots=8, prefill_tokens_per_step=512, documents_at_once=3)
CONDITIONS = list(CONDITION_LABELS)
SETTINGS = EvaluationSettings(seed=3, chunk_documents=4, run=THROUGHPUT)
DOCUMENTS = [world.document(0, "test", level, index) for level, count in ((1, 7), (2, 4)) for index in range(count)]
LEVEL_1 = DOCUMENTS[:4]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return world_base(max_length=512, initializer_range=0.5)


@pytest.fixture(scope="module")
def hypernetwork(base: BaseModel) -> Hypernetwork:
    torch.manual_seed(1)
    shape = HypernetworkSettings(rank=2, meta_rank=2, num_layers=2, num_heads=2, feed_forward=16)
    return Hypernetwork(base, shape.model_copy(update={"input_norm": "layer", "initial_delta": 1.0}))


@pytest.fixture(scope="module")
def report(base: BaseModel, hypernetwork: Hypernetwork) -> Report:
    return evaluate(base, hypernetwork, DOCUMENTS, SETTINGS)


@pytest.fixture(scope="module")
def weights(hypernetwork: Hypernetwork) -> LoraWeights:
    with torch.no_grad():
        return from_hypernetwork(hypernetwork, at_once=1)(DOCUMENTS)


@given(count=st.integers(2, 40), seed=st.integers(0, 2**32))
def test_a_derangement_moves_everyone(count: int, seed: int) -> None:
    partner = derangement(count, np.random.default_rng(seed))
    assert sorted(partner) == list(range(count))
    assert all(other != own for own, other in enumerate(partner))
    assert partner == derangement(count, np.random.default_rng(seed))


@given(count=st.integers(1, 300), size=st.integers(2, 70))
def test_chunks_cover_all_and_none_is_short(count: int, size: int) -> None:
    parts = chunks(count, size)
    assert [number for part in parts for number in part] == list(range(count))
    assert all(min(size, count) <= len(part) < 2 * size for part in parts)


def test_every_question_is_answered_under_every_condition(report: Report) -> None:
    asked = [(document.id, question.question) for document in DOCUMENTS for question in document.questions]
    assert [(answer["document"], answer["question"]) for answer in report.answers] == asked
    assert all(set(answer["said"]) == set(CONDITIONS) for answer in report.answers)
    assert {name: group.documents for name, group in report.groups.items()} == {"all": 11, "level_1": 7, "level_2": 4}
    for name, group in report.groups.items():
        counts = group.questions
        assert counts["all"] == counts["one_fact"] + counts["two_facts"] == counts["seen"] + counts["held_out"], name
        assert group.chance["all"] <= 0.05
    assert report.groups["all"].questions["all"] == len(asked)


def test_scores_of_each_split_follow_from_what_was_said(base: BaseModel, hypernetwork: Hypernetwork, report: Report) -> None:
    """Half of the questions accept what the base says under its adapter, so that scores are not all zero."""
    said = iter([answer["said"]["adapter"] for answer in report.answers])
    documents = []
    for document in DOCUMENTS:
        questions = [
            replace(question, answers=(question.answer, next(said) + (" x" if number % 2 else "")))
            for number, question in enumerate(document.questions)
        ]
        documents.append(replace(document, questions=tuple(questions)))
    again = evaluate(base, hypernetwork, documents, SETTINGS)

    members = {
        "all": lambda answer: True,
        "one_fact": lambda answer: answer["facts"] == 1,
        "two_facts": lambda answer: answer["facts"] == 2,
        "seen": lambda answer: answer["phrasing"] == "seen",
        "held_out": lambda answer: answer["phrasing"] == "held_out",
    }
    for name, group in again.groups.items():
        of_group = [answer for answer in again.answers if name == "all" or answer["document"].split("-")[1] == name[-1]]
        for condition, scores in group.scores.items():
            for split, score in scores.items():
                texts = [(answer["said"][condition], answer["answers"]) for answer in of_group if members[split](answer)]
                assert score.exact_match.mean == pytest.approx(np.mean([exact_match(*text) for text in texts]))
                assert score.f1.mean == pytest.approx(np.mean([f1(*text) for text in texts]))
                assert score.exact_match.low <= score.exact_match.mean <= score.exact_match.high
    scores = again.groups["all"].scores["adapter"]["all"]
    assert 0.3 < scores.exact_match.mean < 0.7 < scores.f1.mean
    assert scores.exact_match.high > scores.exact_match.low


def test_losses_are_those_of_single_rows_of_the_model(base: BaseModel, report: Report, weights: LoraWeights) -> None:
    tokenizer = base.tokenizer
    assert tokenizer is not None
    rng = np.random.default_rng(SETTINGS.seed)
    partners = {
        part.start + own: part.start + other
        for part in chunks(len(DOCUMENTS), SETTINGS.chunk_documents)
        for own, other in enumerate(derangement(len(part), rng))
    }
    assert all(own != other for own, other in partners.items()) and len(partners) == len(DOCUMENTS)
    mean, _ = composed(weights, "mean", 16)
    sums: dict[str, float] = dict.fromkeys(CONDITIONS, 0.0)
    tokens = 0
    for number, document in enumerate(DOCUMENTS):
        for question in document.questions:
            qa = [QuestionAnswer(question.question, question.answer)]
            alone, shown = question_examples(tokenizer, document.text, qa)[0], in_context_example(tokenizer, document.text, qa)
            tokens += alone.tokens
            sums["question_only"] += _loss(base, alone, None)
            sums["in_context"] += _loss(base, shown, None)
            sums["adapter"] += _loss(base, alone, weights.select(slice(number, number + 1)))
            sums["other_adapter"] += _loss(base, alone, weights.select(slice(partners[number], partners[number] + 1)))
            sums["mean_adapter"] += _loss(base, alone, mean)
    scores = report.groups["all"].scores
    losses = {condition: scores[condition]["all"].loss for condition in CONDITIONS}
    assert losses == pytest.approx({condition: value / tokens for condition, value in sums.items()}, rel=1e-4)
    assert len({round(loss, 3) for loss in losses.values()}) == len(losses), "conditions that should differ do not"
    collapse = report.groups["all"].collapse
    assert collapse["shuffled_minus_matched"] == pytest.approx(losses["other_adapter"] - losses["adapter"])
    assert collapse["mean_adapter_loss"] == losses["mean_adapter"]


@torch.no_grad()
def _loss(base: BaseModel, example: Any, adapter: LoraWeights | None) -> float:
    ids, labels = torch.tensor([example.ids]), torch.tensor(example.labels)
    logits = _logits(base, ids, adapter)
    return float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:], reduction="sum", ignore_index=-100))


def _logits(base: BaseModel, ids_BT: torch.Tensor, adapter: LoraWeights | None) -> torch.Tensor:
    if adapter is None:
        return base.model(ids_BT).logits
    with attach(base, adapter):
        return base.model(ids_BT).logits


@torch.no_grad()
def test_answers_are_greedy_continuations_of_the_prompt(base: BaseModel, report: Report, weights: LoraWeights) -> None:
    tokenizer = base.tokenizer
    assert tokenizer is not None
    document, question = DOCUMENTS[1], DOCUMENTS[1].questions[0]
    [record] = [a for a in report.answers if a["document"] == document.id and a["question"] == question.question]
    contents = {"adapter": question.question, "in_context": in_context(document.text, question.question)}
    for condition, content in contents.items():
        ids = prompt(tokenizer, [{"role": "user", "content": content}])
        start = len(ids)
        for _ in range(Questions(tokenizer, DOCUMENTS, Limits()).answer_tokens):
            logits = _logits(base, torch.tensor([ids]), weights.select(slice(1, 2)) if condition == "adapter" else None)
            ids = [*ids, int(logits[0, -1].argmax())]
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert record["said"][condition] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip(), condition


def test_zero_adapters_answer_as_the_bare_base(base: BaseModel) -> None:
    zeros = LoraWeights(base.spec(2), torch.zeros(len(LEVEL_1), base.spec(2).numel))
    report = evaluate(base, None, LEVEL_1, SETTINGS, adapters=lambda documents: zeros.select(slice(0, len(documents))))
    scores = report.groups["level_1"].scores
    for condition in ("adapter", "other_adapter", "mean_adapter"):
        assert all(answer["said"][condition] == answer["said"]["question_only"] for answer in report.answers)
        assert scores[condition] == scores["question_only"], condition
    assert report.identity["hypernetwork"] is None
    values = to_json(report)
    assert values["adapters"]["pairwise_cosine"] is None, "zero vectors have no cosine"
    json.dumps(values, allow_nan=False)


def test_equal_adapters_are_their_own_controls(base: BaseModel, weights: LoraWeights) -> None:
    def same(documents: Sequence[WorldDocument]) -> LoraWeights:
        return weights.select(torch.zeros(len(documents), dtype=torch.long))

    report = evaluate(base, None, LEVEL_1, SETTINGS, adapters=same)
    scores = report.groups["level_1"].scores
    assert scores["adapter"] == scores["other_adapter"]
    assert scores["mean_adapter"]["all"].loss == pytest.approx(scores["adapter"]["all"].loss, rel=1e-4)
    assert report.adapters["pairwise_cosine"] == pytest.approx(1)
    assert report.adapters["specific_share"] == pytest.approx(0, abs=1e-6)
    assert report.adapters["mean_adapter_relative_error"] < 1e-3


def test_the_mean_is_taken_over_as_many_adapters_as_fit(base: BaseModel, weights: LoraWeights) -> None:
    settings = SETTINGS.model_copy(update={"chunk_documents": 2, "mean_bytes": 3 * 4 * weights.spec.numel, "mean_rank": 1})
    report = evaluate(base, None, LEVEL_1, settings, adapters=lambda documents: weights.select(slice(0, len(documents))))
    assert report.adapters["mean_adapter_documents"] == 3
    assert report.adapters["mean_adapter_rank"] == 1
    assert report.adapters["mean_adapter_relative_error"] > 0.01
    assert set(report.groups) == {"all", "level_1"}


def test_without_adapters_only_the_base_is_judged(base: BaseModel, tmp_path: Path) -> None:
    report = evaluate(base, None, LEVEL_1, SETTINGS)
    assert list(report.groups["all"].scores) == ["question_only", "in_context"]
    assert report.groups["all"].collapse == {} == report.adapters
    assert [bar.name.split(": ")[1] for bar in bars(report)] == ["chance", "exact match in context"]
    write_report(report, tmp_path)
    assert "adapter" not in (tmp_path / "report.md").read_text()


def test_prompts_are_those_of_core(base: BaseModel) -> None:
    tokenizer = base.tokenizer
    assert tokenizer is not None
    document = DOCUMENTS[0]
    questions = Questions(tokenizer, DOCUMENTS, Limits())
    for number, question in enumerate(document.questions):
        for shown, content in ((False, question.question), (True, in_context(document.text, question.question))):
            ids = prompt(tokenizer, [{"role": "user", "content": content}])
            example = questions.examples[shown][number]
            assert questions.prompts[shown][number] == ids == list(example.ids[: len(ids)])
            assert all(label == -100 for label in example.labels[: len(ids)]) and example.labels[len(ids)] != -100
    cut = Questions(tokenizer, [document], Limits(context_tokens=9)).prompts[True][0]
    text = tokenizer.decode(tokenizer.encode(document.text, add_special_tokens=False)[:9])
    assert cut == prompt(tokenizer, [{"role": "user", "content": in_context(text, document.questions[0].question)}])
    assert Asker(base, Throughput()).stop_ids == {tokenizer.eos_token_id}


def test_levels_come_from_ids() -> None:
    assert [level_of(document) for document in DOCUMENTS] == [1] * 7 + [2] * 4
    assert level_of(replace(DOCUMENTS[0], id="my-own-document")) == 0


def test_intervals_are_over_documents_and_means_over_questions() -> None:
    values, document_of = np.array([1.0, 1, 1, 1, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 2, 2])
    interval = clustered_interval(values, document_of, seed=0)
    assert interval.mean == pytest.approx(0.75)
    independent = mean_interval(list(values), seed=0)
    assert interval.high - interval.low > independent.high - independent.low
    assert clustered_interval(np.ones(8), document_of, seed=0) == Interval(1, 1, 1)


@pytest.mark.parametrize("with_hypernetwork", [False, True])
def test_validation_is_the_evaluation_in_short_and_leaves_training_as_it_was(
    base: BaseModel, hypernetwork: Hypernetwork, report: Report, tmp_path: Path, with_hypernetwork: bool
) -> None:
    world.write(DOCUMENTS, tmp_path)
    modules = [*base.model.modules(), *hypernetwork.modules()]
    for number, module in enumerate(modules):
        module.training = number % 3 > 0
    base.model.requires_grad_(True)
    before = [module.training for module in modules]
    try:
        figures = validation_accuracy(base, hypernetwork if with_hypernetwork else None, str(tmp_path), len(DOCUMENTS))
        assert [module.training for module in modules] == before
        assert all(parameter.requires_grad and parameter.grad is None for parameter in base.model.parameters())
        assert torch.is_grad_enabled()
        with pytest.raises(ValueError, match="no questions"):
            validation_accuracy(base, hypernetwork, str(tmp_path), 0)
        loss = base.hidden_states(torch.ones(1, 3, dtype=torch.long)).sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in base.layers.parameters()), "training cannot go on"
    finally:
        base.model.requires_grad_(False).zero_grad()
        base.model.eval()
        hypernetwork.train()
    scores = report.groups["all"].scores["adapter" if with_hypernetwork else "in_context"]
    assert figures == pytest.approx(
        {
            "exact_match": scores["all"].exact_match.mean,
            "exact_match_one_fact": scores["one_fact"].exact_match.mean,
            "exact_match_two_facts": scores["two_facts"].exact_match.mean,
            "validation_loss": scores["all"].loss,
        },
        rel=1e-4,
    )


def test_identity_names_what_was_measured(base: BaseModel, hypernetwork: Hypernetwork, report: Report) -> None:
    assert report.identity["base"] == base.fingerprint
    assert report.identity["hypernetwork"] == hypernetwork.fingerprint()
    assert report.identity["world"] == world.specification_fingerprint()
    assert report.identity["settings"]["seed"] == 3
    assert all(value > 0 for value in report.timings.values())


def test_the_report_is_written_as_strict_json_tables_and_figure(report: Report, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    write_report(report, tmp_path)
    values = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert list(values["exact_match"]) == CONDITIONS
    assert values["groups"]["level_2"]["scores"]["adapter"]["one_fact"]["exact_match"].keys() == {"mean", "low", "high"}
    assert [bar["passed"] for bar in values["bars"]] == [bar.passed for bar in bars(report)]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(report.answers)
    assert (tmp_path / "exact_match.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "exact_match.svg").read_text()

    text = (tmp_path / "report.md").read_text()
    assert text == markdown(report)
    for label in CONDITION_LABELS.values():
        assert text.count(f"| {label} |") == 6, "exact match, F1 and loss on two levels"
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


def test_bars_pass_and_fail_at_their_limits(report: Report) -> None:
    def judged(in_context: float, control: float, ratio: float, documents: int = 500) -> dict[str, bool]:
        group = report.groups["level_1"]
        means = {"in_context": in_context, "other_adapter": control, "mean_adapter": control}
        scores = {
            condition: {
                split: replace(score, exact_match=Interval(means.get(condition, 0.95), 0, 1)) for split, score in by_split.items()
            }
            for condition, by_split in group.scores.items()
        }
        collapse = {**group.collapse, "ratio": ratio}
        changed = replace(group, documents=documents, scores=scores, ratio_one_fact=ratio, collapse=collapse)
        return {bar.name: bar.passed for bar in bars(replace(report, groups={"all": changed, "level_1": changed}))}

    chance = report.groups["level_1"].chance["all"]
    assert all(judged(0.97, chance + 0.029, 0.95).values())
    assert all(judged(0.97, 0, 0.95).values()), "a control below chance is no fault"
    failed = judged(0.969, chance + 0.031, 0.79, documents=499)
    assert [name for name, passed in failed.items() if passed] == ["level 1: chance"]
    assert not Bar("not a number", float("nan"), ">=", 0).passed and not Bar("not a number", float("nan"), "<=", 0).passed


def test_errors_say_what_to_give(base: BaseModel, weights: LoraWeights) -> None:
    with pytest.raises(ValueError, match="give two at least"):
        evaluate(base, None, DOCUMENTS[:1], SETTINGS)
    with pytest.raises(ValueError, match="3 adapters for 4 documents"):
        evaluate(base, None, LEVEL_1, SETTINGS, adapters=lambda documents: weights.select(slice(0, 3)))
    with pytest.raises(ValueError, match="have no questions"):
        evaluate(base, None, [replace(document, questions=()) for document in LEVEL_1], SETTINGS)
    with pytest.raises(ValueError, match="no tokenizer"):
        evaluate(tiny_base(), None, LEVEL_1, SETTINGS)

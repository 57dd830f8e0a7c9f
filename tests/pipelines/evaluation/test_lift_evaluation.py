"""LIFT against its baselines on a tiny random base: what is shown, what is attached, what is counted and written."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.adapters.base_model import BaseModel
from core.adapters.gated_memory import GatedMemory, initial
from core.adapters.lora import recompress
from core.adapters.weights import AdapterWeights
from core.lift.course import Curriculum, Stage
from core.lift.forms import AdapterSettings
from core.lift.settings import LiftRun, LiftSettings, OptimiserSettings
from core.planning.lift import PlanSettings
from core.questions.chat_endpoint import EndpointRun
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.text.prompts import encode, in_context, prompt
from core.training.examples import QuestionAnswer
from core.training.metrics import exact_match
from pipelines.evaluation.asking import Asker, Throughput, evaluating
from pipelines.evaluation.judge import JUDGE_VERSION, JudgeSettings
from pipelines.evaluation.lift_comparison import ComparisonSettings, compare, plan
from pipelines.evaluation.lift_evaluation import (
    METHODS,
    LiftEvaluationSettings,
    LiftReport,
    Sheet,
    document_nll,
    evaluate_lift,
    gate_telemetry,
)
from pipelines.evaluation.lift_report import (
    METHOD_LABELS,
    bars,
    gain_over_better,
    markdown,
    oracle_share,
    to_json,
    write_lift_report,
)
from pipelines.evaluation.lifting import jobs_of, lifted, rule_questions, shine_adapters, snapshots
from pipelines.evaluation.long_documents import LongDocument, LongQuestion, long_documents
from tests.models import world_base
from tests.pipelines.evaluation.test_judge import endpoint

SETTINGS = LiftEvaluationSettings(retrieved_tokens=60, run=Throughput(slots=16, prefill_tokens_per_step=4096))
DOCUMENTS = [replace(document, questions=document.questions[:6]) for document in long_documents(3, 3)]
QUESTIONS = sum(len(document.questions) for document in DOCUMENTS)


def _lift(epochs: int = 2, kind: str = "lora", task: str = "questions") -> LiftSettings:
    return LiftSettings(
        adapter=AdapterSettings.model_validate({"kind": kind, "rank": 8}),
        optimiser=OptimiserSettings(learning_rate=2e-2),
        curriculum=Curriculum.model_validate(
            {"stages": [Stage.model_validate({"name": "s", "epochs": epochs, "tasks": [task]})], "examples_per_step": 8}
        ),
    )


@pytest.fixture(scope="module")
def base() -> BaseModel:
    base = world_base(max_length=192, initializer_range=0.3)
    base.decoder.norm.weight.data.mul_(5.0)  # else no adapter could make the small frozen head sure of a word
    return base


@pytest.fixture(scope="module")
def pairs() -> list[list[QuestionAnswer]]:
    """The test's own questions: what is learned can be seen in the answers."""
    return [[QuestionAnswer(q.question, q.answers[0]) for q in document.questions] for document in DOCUMENTS]


@pytest.fixture(scope="module")
def memories(base: BaseModel) -> list[GatedMemory]:
    torch.manual_seed(2)
    fresh = [initial(base) for _ in DOCUMENTS]
    return [GatedMemory(memory.spec, memory.flat_BN + 0.3 * torch.randn_like(memory.flat_BN)) for memory in fresh]


@pytest.fixture(scope="module")
def adapters(base: BaseModel, pairs: list[list[QuestionAnswer]]) -> Sequence[AdapterWeights]:
    return lifted(base, jobs_of(DOCUMENTS, pairs), _lift(60)).adapters


@pytest.fixture(scope="module")
def report(base: BaseModel, adapters: Sequence[AdapterWeights], memories: list[GatedMemory]) -> LiftReport:
    return evaluate_lift(base, DOCUMENTS, {"lift": adapters, "gated_memory": memories}, SETTINGS)


def test_prompts_are_those_of_training_and_fit_the_window(base: BaseModel) -> None:
    sheet = Sheet(base, DOCUMENTS, SETTINGS)
    assert base.tokenizer is not None
    alone, _ = sheet.shown("nothing")
    assert alone[0] == prompt(base.tokenizer, [{"role": "user", "content": sheet.asked[0].question}])
    passages, _ = sheet.shown("passage")
    content = in_context(sheet.asked[0].passage, sheet.asked[0].question)
    assert passages[0] == prompt(base.tokenizer, [{"role": "user", "content": content}])
    truncated, _ = sheet.shown("truncated")
    content = in_context(DOCUMENTS[0].text, sheet.asked[0].question)
    whole = prompt(base.tokenizer, [{"role": "user", "content": content}])
    assert len(whole) > base.max_length > max(map(len, truncated)) + sheet.answer_tokens - 1
    assert truncated[0][:60] == whole[:60] and truncated[0][-60:] == whole[-60:]
    for kind in ("nothing", "passage", "truncated", "retrieved"):
        for ids, example, question in zip(*sheet.shown(kind), sheet.asked, strict=True):
            assert example.ids[: len(ids)] == tuple(ids) and len(example.ids) <= base.max_length
            answer = base.tokenizer.decode(example.ids[len(ids) :], skip_special_tokens=True)
            assert exact_match(answer, question.answers), kind
            assert set(example.labels[: len(ids)]) == {-100} and example.tokens == len(example.ids) - len(ids)


def test_retrieval_stays_within_its_budget(base: BaseModel) -> None:
    sheet = Sheet(base, DOCUMENTS, SETTINGS.model_copy(update={"retrieved_tokens": 1}))
    longest = max(len(ids) for ids in sheet.shown("retrieved")[0])
    assert max(map(len, sheet.shown("nothing")[0])) < longest < 192


def test_every_method_that_can_be_measured_is(report: LiftReport) -> None:
    missing = {"shine", "finetune_raw", "lift_rules", "lift_from_shine"}
    assert list(report.scores) == [name for name in METHODS if name not in missing]
    assert set(METHODS) | {"full_finetune"} == set(METHOD_LABELS)
    assert list(report.questions) == ["all", "held_out", "one_fact", "seen", "two_facts"] and report.questions["all"] == QUESTIONS
    assert set(report.nll) == set(report.reading) == {"", "lift", "gated_memory"}


def test_lift_answers_what_it_was_trained_on_and_says_so(report: LiftReport) -> None:
    assert report.scores["lift"]["all"].exact_match.mean > 0.9 > report.scores["question_only"]["all"].exact_match.mean + 0.3
    assert report.scores["lift"]["all"].loss < report.scores["question_only"]["all"].loss
    said = [record["said"]["lift"] for record in report.answers]
    right = [exact_match(answer, record["answers"]) for answer, record in zip(said, report.answers, strict=True)]
    per_document = [
        np.mean([r for r, record in zip(right, report.answers, strict=True) if record["document"] == d.id]) for d in DOCUMENTS
    ]
    assert report.by_document["lift"] == pytest.approx(per_document)
    assert report.scores["lift"]["all"].exact_match.mean == pytest.approx(np.mean(per_document))


def test_each_document_is_asked_under_its_own_adapter(
    base: BaseModel, adapters: Sequence[AdapterWeights], report: LiftReport
) -> None:
    moved = evaluate_lift(base, DOCUMENTS, {"lift": [*adapters[1:], adapters[0]]}, SETTINGS)
    assert moved.scores["lift"]["all"].exact_match.mean < 0.5 * report.scores["lift"]["all"].exact_match.mean
    alone = evaluate_lift(base, DOCUMENTS[1:2], {"lift": adapters[1:2]}, SETTINGS)
    assert alone.by_document["lift"] == [report.by_document["lift"][1]] and not alone.reading


def test_the_nll_is_that_of_the_model_over_windows(
    base: BaseModel, adapters: Sequence[AdapterWeights], report: LiftReport
) -> None:
    assert base.tokenizer is not None
    values = []
    with torch.no_grad():
        for document in DOCUMENTS:
            ids = torch.tensor([encode(base.tokenizer, document.text)])
            count = -(-ids.shape[1] // base.max_length)
            parts = [part for part in ids.tensor_split(count, dim=1)]
            losses = [float(base.model(input_ids=part, labels=part).loss) * (part.shape[1] - 1) for part in parts]
            values.append(sum(losses) / sum(part.shape[1] - 1 for part in parts))
    assert report.nll[""].mean == pytest.approx(np.mean(values), rel=1e-4)
    with evaluating(base.model):
        [own] = document_nll(Asker(base, SETTINGS.run), DOCUMENTS[:1], adapters[0])
    assert own != pytest.approx(values[0], rel=1e-3)


def test_other_passages_are_read_under_the_next_documents_adapter(
    base: BaseModel, adapters: Sequence[AdapterWeights], report: LiftReport
) -> None:
    same = evaluate_lift(base, [DOCUMENTS[0], DOCUMENTS[0]], {"lift": [adapters[0], adapters[1]]}, SETTINGS)
    swapped = evaluate_lift(base, [DOCUMENTS[0], DOCUMENTS[0]], {"lift": [adapters[1], adapters[0]]}, SETTINGS)
    assert same.reading["lift"].mean == pytest.approx(swapped.reading["lift"].mean)
    assert report.reading[""].mean == pytest.approx(report.scores["oracle"]["all"].exact_match.mean)


def test_full_fine_tuning_is_measured_and_leaves_no_trace(base: BaseModel, pairs: list[list[QuestionAnswer]]) -> None:
    before = [parameter.clone() for parameter in base.model.parameters()]
    report = evaluate_lift(base, DOCUMENTS[:2], {}, SETTINGS, full=_lift(30, task="segments"))
    assert report.nll["full_finetune"].mean < report.nll[""].mean - 0.5
    assert "full_finetune" in report.scores
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters(), strict=True))


def test_a_judge_is_never_f1(base: BaseModel) -> None:
    def judge(claims: Sequence[tuple[str, Sequence[str], str]]) -> list[bool | None]:
        return [None, *[True] * (len(claims) - 1)]

    report = evaluate_lift(base, DOCUMENTS, {}, SETTINGS, judge)
    score = report.scores["question_only"]["all"]
    assert score.judged is not None and score.judged.mean == 1.0 and score.unjudged == 1
    assert score.f1.mean < 1.0 and "## Judge" in markdown(report)


def test_documents_without_passages_have_no_oracle(base: BaseModel) -> None:
    documents = [LongDocument("a", "", DOCUMENTS[0].text, (LongQuestion("Who?", ("Anna", "Boris")),))]
    report = evaluate_lift(base, documents, {}, SETTINGS)
    assert list(report.scores) == ["question_only", "in_context", "rag"] and not report.reading and not bars(report)
    assert to_json(report)["share_of_oracle"] == {}


def test_gates_are_told_by_layer_and_head(base: BaseModel, memories: list[GatedMemory]) -> None:
    sheet = Sheet(base, DOCUMENTS, SETTINGS)
    gates = gate_telemetry(base, sheet, memories, SETTINGS.run)
    assert set(gates) == {"own_questions", "other_questions", "other_text"}
    assert all(np.shape(rows) == (2, 2) for rows in gates.values())
    assert not np.allclose(gates["own_questions"], gates["other_questions"], atol=1e-6)
    few = gate_telemetry(base, sheet, memories, SETTINGS.run.model_copy(update={"slots": 5}))
    assert np.allclose(few["own_questions"], gates["own_questions"], atol=1e-6)
    closed = gate_telemetry(base, sheet, [initial(base)] * 3, SETTINGS.run)
    assert np.allclose(closed["other_text"], 0.0)
    with pytest.raises(ValueError, match="give one for each"):
        gate_telemetry(base, sheet, memories[:1], SETTINGS.run)


def test_snapshots_end_where_training_does(base: BaseModel, pairs: list[list[QuestionAnswer]]) -> None:
    jobs = jobs_of(DOCUMENTS[:2], pairs[:2])
    taken = dict(snapshots(base, jobs, _lift(3), [0, 2, 99]))
    steps = lifted(base, jobs, _lift(3), LiftRun(slots=1))
    assert list(taken) == [0, 2, max(steps.steps)]
    for ours, theirs in zip(taken[max(steps.steps)], steps.adapters, strict=True):
        assert torch.allclose(ours.flat_BN, theirs.flat_BN, atol=1e-4)
    assert not torch.equal(taken[0][0].flat_BN, taken[2][0].flat_BN)


def test_a_document_that_fails_is_named(base: BaseModel) -> None:
    for make in (
        lambda: lifted(base, jobs_of(DOCUMENTS[:1]), _lift()),
        lambda: list(snapshots(base, jobs_of(DOCUMENTS[:1]), _lift(), [0])),
    ):
        with pytest.raises(ValueError, match=DOCUMENTS[0].id):
            make()


def test_rules_ask_about_every_document() -> None:
    assert all(len(pairs) > 20 for pairs in rule_questions(DOCUMENTS))


def test_shine_composes_its_windows(base: BaseModel) -> None:
    torch.manual_seed(1)
    shape = HypernetworkSettings(rank=2, meta_rank=2, num_layers=2, num_heads=2, feed_forward=16)
    network = Hypernetwork(base, shape.model_copy(update={"input_norm": "layer", "initial_delta": 1.0}))
    [wide] = shine_adapters(network, DOCUMENTS[:1], 120, rank=64)
    [whole] = shine_adapters(network, DOCUMENTS[:1], 120)
    assert len(wide) == len(whole) == 1 and wide.spec.rank > 4 and whole.spec.rank == 2
    expected, _ = recompress(wide, 2)
    for (layer, site, tensor), value in whole.tensors.items():
        if tensor == "A":
            product = value @ whole.tensors[layer, site, "B"]
            assert torch.allclose(product, expected.tensors[layer, site, "A"] @ expected.tensors[layer, site, "B"], atol=1e-5)
    started = lifted(base, jobs_of(DOCUMENTS[:1], [[QuestionAnswer("Who?", "green")]], [wide]), _lift(1))
    assert started.steps == [1]


def test_what_does_not_fit_is_refused(base: BaseModel, adapters: Sequence[AdapterWeights]) -> None:
    with pytest.raises(ValueError, match="no method attaches adapters called 'mine'"):
        evaluate_lift(base, DOCUMENTS, {"mine": adapters}, SETTINGS)
    with pytest.raises(ValueError, match="give one for each"):
        evaluate_lift(base, DOCUMENTS[:2], {"lift": adapters}, SETTINGS)
    with pytest.raises(ValueError, match="give one at least"):
        evaluate_lift(base, [], {}, SETTINGS)
    with pytest.raises(ValueError, match="has no questions"):
        evaluate_lift(base, [replace(DOCUMENTS[0], questions=())], {}, SETTINGS)
    long = replace(DOCUMENTS[0], questions=(LongQuestion("Who?", ("green " * 200,)),))
    with pytest.raises(ValueError, match="leave no room"):
        evaluate_lift(base, [long], {}, SETTINGS)


def test_shares_and_gains_are_of_documents(report: LiftReport) -> None:
    by_document = {
        "oracle": [0.8, 1.0, 0.6],
        "lift": [0.8, 0.6, 0.4],
        "in_context": [0.2, 0.8, 0.2],
        "lift_in_context": [0.9, 0.7, 0.6],
    }
    made = replace(report, by_document=by_document)
    share = oracle_share(made, "lift")
    assert share.mean == pytest.approx(0.75) and share.low <= 0.75 <= share.high <= 1.0
    gain = gain_over_better(made, "lift")
    assert gain is not None and gain.mean == pytest.approx((0.1 - 0.1 + 0.2) / 3)
    assert not bars(made)[0].passed
    assert bars(replace(made, by_document={**by_document, "lift": [0.8, 0.9, 0.5]}))[0].passed


def test_the_report_is_written_as_strict_json_and_figures(report: LiftReport, tmp_path: Path) -> None:
    gates = {"own_questions": [[0.1, 0.2], [0.3, -0.01]], "other_text": [[0.0, 0.0], [0.0, 0.0]]}
    values = write_lift_report(report, tmp_path, gates)
    names = {"lift.json", "lift.md", "lift_answers.jsonl", "lift.png", "lift.svg", "gates.png", "gates.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    stored = json.loads((tmp_path / "lift.json").read_text(), parse_constant=pytest.fail)
    assert stored == json.loads(json.dumps(values)) and stored["gates"] == gates
    assert stored["scores"]["lift"]["all"]["exact_match"]["mean"] == report.scores["lift"]["all"].exact_match.mean
    assert len((tmp_path / "lift_answers.jsonl").read_text().splitlines()) == QUESTIONS
    text = markdown(report)
    assert all(METHOD_LABELS[name] in text for name in report.scores) and "needed passage in context, exact match" in text


def test_everything_is_made_and_compared_at_once(base: BaseModel) -> None:
    settings = ComparisonSettings(
        lift=_lift(1),
        memory=LiftSettings(adapter=AdapterSettings(kind="gated_memory"), curriculum=_lift(1).curriculum),
        raw=_lift(1, task="segments"),
        evaluation=SETTINGS,
    )
    with endpoint([(200, "yes")]) as (url, _):
        judge = JudgeSettings(model="m", run=EndpointRun(url=url, in_flight=8))
        compared = compare(base, None, DOCUMENTS[:2], settings.model_copy(update={"judge": judge}))
    score = compared.report.scores["lift"]["all"]
    assert score.judged is not None and score.judged.mean == 1.0 and score.unjudged == 0
    assert compared.report.identity["judge"] == {"version": JUDGE_VERSION, "model": "m", "reply_tokens": 512}
    assert {"lift", "lift_in_context", "finetune_raw", "gated_memory", "rag", "oracle"} <= compared.report.scores.keys()
    assert np.shape(compared.gates["own_questions"]) == (2, 2)


def test_a_source_is_planned_for(base: BaseModel, tmp_path: Path) -> None:
    for document in DOCUMENTS:
        (tmp_path / f"{document.id}.txt").write_text(document.text)
    (tmp_path / "empty.txt").write_text("")
    made = plan(str(tmp_path), base, PlanSettings(lift=_lift(2)))
    assert made.documents == 3 and made.questions == sum(map(len, rule_questions(DOCUMENTS)))
    assert made.training_flops > 0 and made.generator_cost == 0

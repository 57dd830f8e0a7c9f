"""Behind `imprint evaluate --lift` and `imprint plan lift`: adapters of every kind for some documents, compared; and a plan.

In: a base, documents with questions (or a source of plain documents), a recipe. Out: a `LiftReport` with gate telemetry, or a
`LiftPlan`. Questions come from an endpoint where the recipe names one, and from the rules always, so that both can be compared.
Costs what lifting every document three to five times costs, and what `evaluate_lift` costs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from pydantic import PositiveInt

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.gated_memory import GatedMemory
from core.adapters.weights import AdapterWeights
from core.config import Section
from core.lift.forms import DEFAULT_RANK, form_of
from core.lift.settings import PRESETS, V3, V4, LiftRun, LiftSettings
from core.planning.lift import BaseSize, LiftPlan, PlanSettings, measure, plan_lift
from core.questions.endpoint import EndpointSettings
from core.questions.rules import RuleSettings
from core.shine.hypernetwork import Hypernetwork
from core.text.documents import Document
from pipelines.corpus import sources
from pipelines.evaluation.judge import JudgeSettings, judge, producer
from pipelines.evaluation.lift_evaluation import LiftEvaluationSettings, LiftReport, Sheet, evaluate_lift, gate_telemetry
from pipelines.evaluation.lifting import jobs_of, lifted, rule_questions, shine_adapters, write_questions
from pipelines.evaluation.long_documents import LongDocument


class ComparisonSettings(Section):
    """What is made and compared. memory: None leaves Gated Memory out. window_tokens: what a hypernetwork reads at once, None for
    as much as the base has positions for. full: also fine-tune all weights on the text, a document at a time.
    """

    lift: LiftSettings = V4
    memory: LiftSettings | None = V3
    raw: LiftSettings = PRESETS["finetune_raw"]
    endpoint: EndpointSettings | None = None
    rules: RuleSettings = RuleSettings()
    window_tokens: PositiveInt | None = None
    full: bool = False
    judge: JudgeSettings | None = None
    evaluation: LiftEvaluationSettings = LiftEvaluationSettings()
    run: LiftRun = LiftRun()


class Compared(NamedTuple):
    """The report, and mean gates by kind of text where a Gated Memory was lifted for two documents or more."""

    report: LiftReport
    gates: dict[str, list[list[float]]]


def compare(
    base: BaseModel, hypernetwork: Hypernetwork | None, documents: Sequence[LongDocument], settings: ComparisonSettings
) -> Compared:
    """Makes every adapter and asks every question. Raises `ValueError` where a document cannot be lifted or read."""
    ruled = rule_questions(documents, settings.rules)
    pairs = ruled if settings.endpoint is None else write_questions(documents, settings.endpoint).pairs
    adapters: dict[str, Sequence[AdapterWeights]] = {
        "lift": lifted(base, jobs_of(documents, pairs), settings.lift, settings.run).adapters,
        "finetune_raw": lifted(base, jobs_of(documents), settings.raw, settings.run).adapters,
    }
    if settings.endpoint is not None:
        adapters["lift_rules"] = lifted(base, jobs_of(documents, ruled), settings.lift, settings.run).adapters
    if settings.memory is not None:
        adapters["gated_memory"] = lifted(base, jobs_of(documents, pairs), settings.memory, settings.run).adapters
    if hypernetwork is not None:
        adapters["shine"] = shine_adapters(hypernetwork, documents, settings.window_tokens)
        if settings.lift.adapter.kind == "lora":
            starts = shine_adapters(hypernetwork, documents, settings.window_tokens, settings.lift.adapter.rank or DEFAULT_RANK)
            started = lifted(base, jobs_of(documents, pairs, starts), settings.lift, settings.run)
            adapters["lift_from_shine"] = started.adapters
    asked = None if settings.judge is None else partial(judge, settings=settings.judge)
    report = evaluate_lift(base, documents, adapters, settings.evaluation, asked, settings.raw if settings.full else None)
    if settings.judge is not None:
        report = replace(report, identity={**report.identity, "judge": producer(settings.judge)})
    memories = [memory for memory in adapters.get("gated_memory", ()) if isinstance(memory, GatedMemory)]
    if len(memories) < 2:
        return Compared(report, {})
    sheet = Sheet(base, documents, settings.evaluation)
    return Compared(report, gate_telemetry(base, sheet, memories, settings.evaluation.run))


def plan(source: str, base: BaseModel, settings: PlanSettings) -> LiftPlan:
    """Reads a source as conversion does, leaving out what cannot be read, and plans for the rest."""
    writer = settings.rules if settings.endpoint is None else settings.endpoint
    volume = measure(_documents(source), tokenizer_of(base), settings.lift, writer, base.max_length)
    weights = sum(parameter.numel() for parameter in base.model.parameters()) - base.embedding.weight.numel()
    size = BaseSize(weights, form_of(base, settings.lift.adapter).spec.numel, base.max_length)
    return plan_lift(volume, size, settings.lift, writer, settings.prices, settings.assumptions)


def _documents(source: str) -> Iterator[Document]:
    for table in sources.read(sources.open_source(source, "plan", "plan")):
        for row in table.to_pylist():
            if row["reason"] is None and row["text"].strip():
                yield Document(**{name: row[name] for name in ("tenant", "collection", "name", "title", "text")})

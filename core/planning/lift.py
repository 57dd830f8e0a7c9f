"""What lifting a corpus will cost, before it is done: questions, generator tokens and money, GPU hours, seconds to first answer.

In: documents, LIFT's settings, the settings of question writing, the size of the base, prices and assumptions. Out: a
`LiftPlan`. Sentences, passages and training tokens are counted as LIFT itself counts them, with the base's own tokenizer; how
long pairs are, how fast an endpoint replies and how well a GPU is used are assumptions, which stand in the plan beside the
figures. Asks nobody and runs no model. Costs one tokenisation of the corpus.

The arithmetic of training: a pass over a frozen base of P weights costs 2 P FLOPs a token forward and 2 P backward (activations
only), and three times 2 N for the N trained numbers of an adapter. Embeddings are looked up, not multiplied; attention scores
are left out, under a tenth for texts shorter than 6 hidden sizes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from core.config import Section
from core.lift.course import Curriculum, titled
from core.lift.settings import LiftSettings
from core.planning.costs import Amount, Gpus, Positive, Prices
from core.questions.endpoint import EndpointSettings, request_body
from core.questions.rules import Passage, RuleSettings, sentence_passages, write_by_rules
from core.text.documents import Document, segments
from core.text.prompts import encode


class Assumptions(Gpus):
    """What nobody knows before it is done. Defaults: short pairs, a hosted small model.

    utilisation: share of the peak that training reaches. step_s: the least time of an optimiser step, which small documents
    are bound by. question_tokens: of a pair as LIFT trains on it, chat template included. reply_tokens: of a pair as the
    generator writes it, evidence and JSON included. request_s: from a request to its reply. characters_per_token: of the
    generator's tokenizer. documents_at_once: that share an optimiser step.
    """

    step_s: Amount = 0.1
    documents_at_once: PositiveInt = 16
    pairs_per_sentence: Amount = 6.0
    question_tokens: Positive = 45.0
    reply_tokens: Positive = 75.0
    request_s: Amount = 3.0
    characters_per_token: Positive = 4.0


class BaseSize(NamedTuple):
    """Weights of the base that multiply (all but the embeddings), numbers of the adapter, positions of the base."""

    weights: int
    adapter: int
    max_length: int


@dataclass
class Volume:
    """What a corpus holds; `requests` and `prompt_characters` go to a generator, `rule_questions` come from rules instead."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0
    sentences: int = 0
    requests: int = 0
    prompt_characters: int = 0
    rule_questions: int = 0
    segments: int = 0
    segment_tokens: int = 0


@dataclass(frozen=True)
class LiftPlan:
    """The plan; tokens and FLOPs of training count every epoch. `seconds_*` are of one document of mean size.

    first_answer_s: training runs beside question writing; sequential_first_answer_s: after it.
    """

    documents: int
    tokens: int
    sentences: int
    requests: int
    questions: int
    generator_prompt_tokens: int
    generator_completion_tokens: int
    generator_cost: float
    training_tokens: int
    training_steps: int
    training_flops: float
    gpu_hours: float
    gpu_cost: float
    cost: float
    currency: str
    first_answer_s: float
    sequential_first_answer_s: float
    adapter_bytes: int
    assumptions: Assumptions


def measure(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    lift: LiftSettings,
    writer: EndpointSettings | RuleSettings,
    max_length: int,
) -> Volume:
    """Counts a corpus. With rules as the writer, their questions are counted by writing them."""
    volume = Volume()
    size, stride, _ = lift.curriculum.reading.sizes(max_length)
    instructions: int | None = None
    for document in documents:
        ids = encode(tokenizer, titled(document.title, document.text))
        sentences = len(sentence_passages(document.text, 0))
        volume.documents += 1
        volume.characters += len(document.text)
        volume.tokens += len(ids)
        volume.sentences += sentences
        for segment in segments(len(ids), size, stride, lift.curriculum.reading.rule):
            volume.segments += 1
            volume.segment_tokens += segment.end - segment.start
        if isinstance(writer, RuleSettings):
            volume.rule_questions += len(write_by_rules(document, writer))
            continue
        if instructions is None:
            messages = request_body(document, Passage(0, 0, 0), writer)["messages"]
            instructions = sum(len(message["content"]) for message in messages) - len(document.title)
        passages = writer.passages(document.text)
        volume.requests += len(passages)
        volume.prompt_characters += sum(passage.end - passage.context_start for passage in passages)
        volume.prompt_characters += len(passages) * (instructions + len(document.title))
    return volume


def plan_lift(
    volume: Volume,
    base: BaseSize,
    lift: LiftSettings,
    writer: EndpointSettings | RuleSettings,
    prices: Prices,
    assumptions: Assumptions,
) -> LiftPlan:
    """The plan of a measured corpus. Raises `ValueError` for an empty one."""
    if not volume.documents:
        raise ValueError("there are no documents to plan for: check the source")
    asks = lift.curriculum.has("questions")
    written = isinstance(writer, EndpointSettings) and asks
    requests = volume.requests if written else 0
    if not asks:
        questions = 0
    elif isinstance(writer, EndpointSettings):
        per_request = assumptions.pairs_per_sentence if writer.unit == "sentence" else writer.pairs
        questions = round(requests * min(per_request, writer.pairs))
    else:
        questions = volume.rule_questions
    prompt_tokens = round(volume.prompt_characters / assumptions.characters_per_token) if written else 0
    completion_tokens = round(questions * assumptions.reply_tokens) if written else 0
    generator_cost = (
        prompt_tokens * prices.generator_prompt_per_million + completion_tokens * prices.generator_completion_per_million
    ) / 1e6

    tokens, examples = _training(volume, lift.curriculum, questions, base.max_length, assumptions)
    steps = _steps(examples, tokens, volume.documents, lift.curriculum)
    if lift.token_budget is not None and tokens > (most := lift.token_budget * volume.documents):
        steps, tokens = max(volume.documents, math.ceil(steps * most / tokens)), most
    flops = tokens * (4.0 * base.weights + 6.0 * base.adapter)
    speed = assumptions.gpus * assumptions.flops_per_s
    together = assumptions.documents_at_once * assumptions.gpus
    seconds = max(flops / speed, steps * assumptions.step_s / min(together, volume.documents))
    gpu_hours = seconds * assumptions.gpus / 3600
    gpu_cost = gpu_hours * prices.gpu_hour

    in_flight = writer.run.in_flight if isinstance(writer, EndpointSettings) else 1
    rounds = math.ceil(requests / volume.documents / in_flight)
    generation_s = rounds * assumptions.request_s
    training_s = max(flops / volume.documents / assumptions.flops_per_s, steps / volume.documents * assumptions.step_s)
    first_request_s = assumptions.request_s if requests else 0.0
    return LiftPlan(
        documents=volume.documents,
        tokens=volume.tokens,
        sentences=volume.sentences,
        requests=requests,
        questions=questions,
        generator_prompt_tokens=prompt_tokens,
        generator_completion_tokens=completion_tokens,
        generator_cost=generator_cost,
        training_tokens=tokens,
        training_steps=steps,
        training_flops=flops,
        gpu_hours=gpu_hours,
        gpu_cost=gpu_cost,
        cost=generator_cost + gpu_cost,
        currency=prices.currency,
        first_answer_s=max(generation_s, first_request_s + training_s),
        sequential_first_answer_s=generation_s + training_s,
        adapter_bytes=2 * base.adapter,
        assumptions=assumptions,
    )


def _training(
    volume: Volume, curriculum: Curriculum, questions: int, max_length: int, assumptions: Assumptions
) -> tuple[int, int]:
    """Tokens and examples over all epochs of all documents."""
    _, _, context = curriculum.reading.sizes(max_length)
    sentence_tokens = volume.tokens / max(volume.sentences, 1)
    timelines = curriculum.timelines * volume.documents
    once = {
        "segments": (volume.segment_tokens, volume.segments),
        "contextualised": (volume.segment_tokens + volume.segments * context, volume.segments),
        "questions": (questions * assumptions.question_tokens, questions),
        "timeline": (timelines * curriculum.timeline_sentences * sentence_tokens, timelines),
    }
    tokens = sum(stage.epochs * once[task][0] for stage in curriculum.stages for task in stage.tasks)
    examples = sum(stage.epochs * once[task][1] for stage in curriculum.stages for task in stage.tasks)
    return round(tokens), examples


def _steps(examples: int, tokens: int, documents: int, curriculum: Curriculum) -> int:
    """Optimiser steps of all documents, each document's counted by itself."""
    epochs = documents * sum(stage.epochs for stage in curriculum.stages)
    by_examples = examples / curriculum.examples_per_step if curriculum.examples_per_step else 0.0
    by_tokens = tokens / curriculum.tokens_per_step if curriculum.tokens_per_step else 0.0
    return max(epochs, math.ceil(max(by_examples, by_tokens)))


def lines(plan: LiftPlan) -> list[str]:
    """The plan for people."""
    assumed = ", ".join(f"{name} {value:g}" for name, value in plan.assumptions.model_dump().items())
    return [
        f"{plan.documents:,} documents, {plan.tokens:,} tokens, {plan.sentences:,} sentences",
        f"questions: {plan.questions:,} in {plan.requests:,} requests",
        f"generator: {plan.generator_prompt_tokens:,} tokens in, {plan.generator_completion_tokens:,} out: "
        f"{plan.generator_cost:,.2f} {plan.currency}",
        f"training: {plan.training_tokens:,} tokens, {plan.training_steps:,} steps, {plan.training_flops:.2e} FLOPs: "
        f"{plan.gpu_hours:,.2f} GPU hours, {plan.gpu_cost:,.2f} {plan.currency}",
        f"together: {plan.cost:,.2f} {plan.currency}",
        f"first answer on a document: {plan.first_answer_s:,.1f} s, or {plan.sequential_first_answer_s:,.1f} s if training "
        "waits for all questions",
        f"adapter: {plan.adapter_bytes / 1e6:,.1f} MB each in bf16",
        f"assumed: {assumed}",
    ]


class PlanSettings(Section):
    """The TOML file of `imprint plan lift`; questions come from rules where `endpoint` is absent."""

    lift: LiftSettings = LiftSettings()
    endpoint: EndpointSettings | None = None
    rules: RuleSettings = RuleSettings()
    prices: Prices = Prices()
    assumptions: Assumptions = Assumptions()

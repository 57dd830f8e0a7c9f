"""How well adapters answer for their documents: scores on unseen documents of the reference world, with their controls.

In: a base, a hypernetwork (or any other source of adapters), documents with questions. Out: a `Report` of exact match, F1 and
loss for these conditions (`pipelines.evaluation.report` writes it down):

    question_only   the bare base, the question alone
    in_context      the bare base, the question below the document
    adapter         the document's own adapter, the question alone
    other_adapter   another document's adapter (control)
    mean_adapter    one adapter with the mean of all documents' deltas (control)

Answers are greedy and come from `core.engine.token_loop`, as the server's do. It knows nothing of stores and of training. Texts
of all documents are in memory, adapters of a chunk at a time (and of up to `mean_bytes` for the mean). Costs five answers and
five forward passes a question, most of it for reading documents in context.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveInt

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.lora import LoraWeights, attach, composed, gram, stack
from core.config import Section, digest, fingerprint
from core.shine.hypernetwork import Hypernetwork
from core.text.prompts import Limits
from core.training.examples import DEFAULT_LIMITS
from core.training.metrics import Interval, centred_cosine, collapse, mean_interval, pairwise_cosine, specific_share
from pipelines.evaluation.asking import Adapters, Asker, Questions, Result, Throughput, evaluating, from_hypernetwork, level_of
from pipelines.world import documents as world
from pipelines.world.documents import WorldDocument

SPLITS = ("all", "one_fact", "two_facts", "seen", "held_out")
COLLAPSE_CONDITIONS = ("adapter", "other_adapter", "mean_adapter", "question_only", "in_context")
RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """Scores of one condition on one split, with 95 % intervals; loss in nats per supervised token."""

    exact_match: Interval
    f1: Interval
    loss: float


@dataclass(frozen=True)
class Group:
    """The figures of the documents of one level, or of all.

    questions, chance and each condition's scores go by split; splits without questions are absent. ratio_one_fact: exact match on
    one-fact questions, adapter over in-context. collapse: see `core.training.metrics.collapse`; empty without adapters.
    """

    documents: int
    questions: dict[str, int]
    chance: dict[str, float]
    scores: dict[str, dict[str, Score]]
    ratio_one_fact: float
    collapse: dict[str, float]


@dataclass(frozen=True)
class Report:
    """groups: "all", then "level_1" and "level_2" where there are such documents.

    adapters: rank, the mean adapter's error, how alike the adapters are; empty without adapters. identity: what the figures are
    of. answers: one record a question, with what every condition said.
    """

    groups: dict[str, Group]
    adapters: dict[str, float]
    timings: dict[str, float]
    identity: dict[str, Any]
    answers: list[dict[str, Any]]


class EvaluationSettings(Section):
    """seed: of control pairs and of the bootstrap. limits: where documents are cut, as in training.

    chunk_documents: the fewest documents whose adapters are in memory together; a document's control comes from its chunk.
    mean_rank: the most that the mean adapter gets (exact where the smaller side of every linear is no larger), over as many
    documents as fit into mean_bytes, 4 bytes a number. compared_adapters: how many the cosines are taken over.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    limits: Limits = Limits()
    chunk_documents: Annotated[int, Field(ge=2)] = 64
    mean_rank: PositiveInt = 128
    mean_bytes: PositiveInt = 2**30
    compared_adapters: Annotated[int, Field(ge=2)] = 64
    run: Throughput = Throughput()


DEFAULT_SETTINGS = EvaluationSettings()


def validation_accuracy(base: BaseModel, hypernetwork: Hypernetwork | None, corpus: str, documents: int) -> dict[str, float]:
    """Exact match and loss on the first `documents` documents of a corpus that `imprint world` wrote: cheap enough for training.

    With a hypernetwork every question is asked alone under its document's adapter, otherwise below the document. Returns
    `exact_match`, the same of one- and two-fact questions (NaN where there are none) and `validation_loss`, in nats per
    supervised token. May be called in the middle of training: modes and gradients stay as they are.
    """
    chosen = list(islice(world.read(Path(corpus)), documents))
    questions = Questions(tokenizer_of(base), chosen, DEFAULT_LIMITS)
    asker = Asker(base, Throughput())
    with evaluating(base.model, hypernetwork):
        if hypernetwork is None:
            result = asker.ask(questions, range(len(questions)), show_document=True)
        else:
            weights = from_hypernetwork(hypernetwork)(chosen)
            result = asker.ask(questions, range(len(questions)), weights, questions.document_of)
    facts = np.array([question.facts for question in questions.asked])
    return {
        "exact_match": float(result.exact_match.mean()),
        "exact_match_one_fact": _ratio(result.exact_match[facts == 1].sum(), (facts == 1).sum()),
        "exact_match_two_facts": _ratio(result.exact_match[facts == 2].sum(), (facts == 2).sum()),
        "validation_loss": _ratio(result.loss.sum(), result.tokens.sum()),
    }


def evaluate(
    base: BaseModel,
    hypernetwork: Hypernetwork | None,
    documents: Sequence[WorldDocument],
    settings: EvaluationSettings = DEFAULT_SETTINGS,
    adapters: Adapters | None = None,
) -> Report:
    """All conditions on `documents`; those of the bare base only where neither hypernetwork nor `adapters` is given.

    adapters: gives the adapters of some documents, in their order; by default the hypernetwork writes them. Raises `ValueError`
    for fewer than two documents, documents without questions, and a document that does not fit the base with its question.
    """
    started = time.monotonic()
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents: give two at least, each one's control is another's adapter")
    if adapters is None and hypernetwork is not None:
        adapters = from_hypernetwork(hypernetwork, settings.limits, settings.run.documents_at_once)
    questions = Questions(tokenizer_of(base), documents, settings.limits)
    asker = Asker(base, settings.run)
    everyone = range(len(questions))
    compared: dict[str, float] = {}
    with evaluating(base.model, hypernetwork):
        results = {
            "question_only": asker.ask(questions, everyone),
            "in_context": asker.ask(questions, everyone, show_document=True),
        }
        if adapters is not None:
            under_adapters, kept, adapters_s = _under_adapters(asker, questions, adapters, settings)
            mean, compared = _mean_of(kept, settings)
            with attach(base, mean.to(base.device)):
                under_mean = asker.ask(questions, everyone)
            results |= under_adapters | {"mean_adapter": under_mean}
    timings = {f"{condition}_questions_per_s": len(questions) / result.seconds for condition, result in results.items()}
    if adapters is not None:
        timings["adapters_per_s"] = len(documents) / adapters_s
    groups = _groups(questions, results, settings.seed)
    timings["total_s"] = time.monotonic() - started
    return Report(
        groups=groups,
        adapters=compared,
        timings=timings,
        identity={
            "base": base.fingerprint,
            "hypernetwork": None if hypernetwork is None else hypernetwork.fingerprint(),
            "world": world.specification_fingerprint(),
            "documents": digest([asdict(document) for document in documents]),
            "settings": settings.model_dump(mode="json"),
            "settings_fingerprint": fingerprint(settings),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(base.device),
        },
        answers=questions.records(results),
    )


def _under_adapters(
    asker: Asker, questions: Questions, adapters: Adapters, settings: EvaluationSettings
) -> tuple[dict[str, Result], LoraWeights, float]:
    """Results under own and other adapters, chunk by chunk; the first adapters (on the CPU, as many as `mean_bytes` holds), and
    the seconds that all adapters took.
    """
    rng = np.random.default_rng(settings.seed)
    own: list[Result] = []
    other: list[Result] = []
    kept: list[LoraWeights] = []
    seconds = 0.0
    for documents in chunks(len(questions.documents), settings.chunk_documents):
        started = time.monotonic()
        weights = adapters([questions.documents[number] for number in documents])
        seconds += time.monotonic() - started
        if len(weights) != len(documents):
            raise ValueError(f"{len(weights)} adapters for {len(documents)} documents: give one for each, in their order")
        weights = weights.to(asker.base.device)
        numbers = questions.of_documents(documents)
        places = [questions.document_of[number] - documents.start for number in numbers]
        partner = derangement(len(documents), rng)
        own.append(asker.ask(questions, numbers, weights, places))
        other.append(asker.ask(questions, numbers, weights, [partner[place] for place in places]))
        room = max(settings.mean_bytes // (4 * weights.spec.numel), 2) - sum(len(part) for part in kept)
        if room > 0:
            kept.append(weights.select(slice(0, room)).to("cpu", torch.float32))
    return {"adapter": Result.joined(own), "other_adapter": Result.joined(other)}, stack(kept), seconds


def _mean_of(weights: LoraWeights, settings: EvaluationSettings) -> tuple[LoraWeights, dict[str, float]]:
    """The mean adapter; its error, and how alike the adapters are."""
    full_rank = max(min(site.in_features, site.out_features) for layer in weights.spec.layers for site in layer)
    rank = min(len(weights) * weights.spec.rank, full_rank, settings.mean_rank)
    mean, error = composed(weights, "mean", rank)
    compared = weights.select(slice(0, settings.compared_adapters))
    gram_BB = gram(compared)
    return mean, {
        "rank": weights.spec.rank,
        "numbers": weights.spec.numel,
        "mean_adapter_documents": len(weights),
        "mean_adapter_rank": rank,
        "mean_adapter_relative_error": error,
        "compared": len(compared),
        "pairwise_cosine": pairwise_cosine(gram_BB),
        "centred_absolute_cosine": centred_cosine(gram_BB, absolute=True),
        "specific_share": specific_share(gram_BB),
    }


def chunks(count: int, size: int) -> list[range]:
    """0 to `count` - 1 in runs of `size` to 2 `size` - 1 (one shorter run where there are fewer)."""
    number = max(count // size, 1)
    bounds = [count * part // number for part in range(number + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def derangement(count: int, rng: np.random.Generator) -> list[int]:
    """A random permutation of 0 to `count` - 1 in one cycle, hence without a fixed point; `count` is 2 or more."""
    assert count >= 2, "one element cannot be moved"
    order = rng.permutation(count)
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)
    return [int(number) for number in partner]


def _groups(questions: Questions, results: Mapping[str, Result], seed: int) -> dict[str, Group]:
    level = np.array([level_of(document) for document in questions.documents])[questions.document_of]
    groups = {"all": _group(questions, results, np.ones(len(questions), dtype=bool), seed)}
    for number in world.LEVELS:
        chosen = level == number
        if chosen.any():
            groups[f"level_{number}"] = groups["all"] if chosen.all() else _group(questions, results, chosen, seed)
    return groups


def _group(questions: Questions, results: Mapping[str, Result], chosen: np.ndarray, seed: int) -> Group:
    facts = np.array([question.facts for question in questions.asked])
    phrasing = np.array([question.phrasing for question in questions.asked])
    masks = {"all": facts > 0, "one_fact": facts == 1, "two_facts": facts == 2, "seen": phrasing == "seen"}
    masks["held_out"] = phrasing == "held_out"
    splits = {split: masks[split] & chosen for split in SPLITS if (masks[split] & chosen).any()}
    document_of = np.array(questions.document_of)
    scores = {
        condition: {
            split: Score(
                clustered_interval(result.exact_match[mask], document_of[mask], seed),
                clustered_interval(result.f1[mask], document_of[mask], seed),
                _ratio(result.loss[mask].sum(), result.tokens[mask].sum()),
            )
            for split, mask in splits.items()
        }
        for condition, result in results.items()
    }
    ratio, diagnostics = math.nan, {}
    if "adapter" in scores:
        diagnostics = collapse(*(scores[condition]["all"].loss for condition in COLLAPSE_CONDITIONS))
        if "one_fact" in splits:
            own, shown = (scores[condition]["one_fact"].exact_match.mean for condition in ("adapter", "in_context"))
            ratio = _ratio(own, shown)
    return Group(
        documents=len(np.unique(document_of[chosen])),
        questions={split: int(mask.sum()) for split, mask in splits.items()},
        chance={split: world.chance([questions.asked[number] for number in mask.nonzero()[0]]) for split, mask in splits.items()},
        scores=scores,
        ratio_one_fact=ratio,
        collapse=diagnostics,
    )


def clustered_interval(values: np.ndarray, document_of: np.ndarray, seed: int) -> Interval:
    """Mean over questions; its interval over documents, whose questions are not independent (linearised ratio estimator).

    A document counts as mean + (its sum - its questions x mean) / questions per document: the mean of these is the mean.
    """
    mean = values.mean()
    _, document, count = np.unique(document_of, return_inverse=True, return_counts=True)
    excess = np.bincount(document, weights=values) - count * mean
    _, low, high = mean_interval([float(value) for value in mean + excess / count.mean()], resamples=RESAMPLES, seed=seed)
    return Interval(float(mean), max(low, 0.0), min(high, 1.0))


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan

"""The question gate: does an adapter, as it will be served, answer about its document better than what answers now?

In: an adapter as it will be put, its document's text, questions with their answers that it was not trained on (`Probe`s), and the
adapter that answers for the document today, if one does. Out: the same adapter with what was measured: the share of questions
that it answers, alone; the share that what answers now does (the standing adapter alone, else the base with the text in context,
cut as a server cuts it); and the share that the base answers with the passage before it. An answer counts where it holds the
wanted one, normalised as SQuAD does: a base that answers in sentences is not taken for one that cannot read.

An adapter is withheld, so that what answered before goes on answering, unless

- there are `min_questions` questions at least,
- the base itself answers `min_readable` of them with the passage before it (a question that nobody can answer from its passage
  measures nothing: gaps put to a base that was never asked for gaps), and
- it answers at least as many as the base in context, or more than the standing adapter.

All answers are greedy and come from `core.engine.token_loop`, as a server's do. The gate measures and derives nothing, so its
settings bear no identity. Cost: `questions` answers by each of two or three; where no adapter stands, the document is read in
context for every question, which is most of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple, cast

from pydantic import Field, NonNegativeInt, PositiveInt

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.codec import decode
from core.adapters.gated_memory import weights_of
from core.adapters.weights import AdapterWeights
from core.config import RunSection
from core.engine.requests import Request
from core.engine.token_loop import generate
from core.store.answering import IN_CONTEXT
from core.store.manifest import NewAdapter
from core.text.prompts import encode, head_tail, in_context, prompt
from core.training.metrics import contains_answer

NEIGHBOURHOOD_CHARACTERS = 800
ELLIPSIS = " ... "


class QuestionGateSettings(RunSection):
    """How an adapter is measured, and what it takes to answer.

    questions: most questions put to it; 0 measures nothing, and withholds nothing. min_questions: with fewer, nothing is known.
    min_readable: share of them that the base must answer with the passage before it. answer_tokens: longest answer. slots:
    questions answered at once.
    """

    questions: NonNegativeInt = 32
    min_questions: PositiveInt = 4
    min_readable: Annotated[float, Field(ge=0, le=1)] = 0.5
    answer_tokens: PositiveInt = 32
    slots: PositiveInt = 16


class Probe(NamedTuple):
    """A question that no adapter was trained on, its answer, and where in the text (characters) it stands."""

    question: str
    answer: str
    start: int
    end: int


class QuestionGate:
    """Measures adapters of either kind on a base. Raises `ValueError` for a base without a tokenizer or a chat template."""

    def __init__(self, base: BaseModel, settings: QuestionGateSettings) -> None:
        self._base, self._settings, self._tokenizer = base, settings, tokenizer_of(base)
        self._stop_ids = base.stop_ids
        self._ellipsis_ids = encode(self._tokenizer, ELLIPSIS)
        self._room = base.max_length - settings.answer_tokens

    def judged(
        self,
        adapter: NewAdapter,
        text: str,
        probes: Sequence[Probe],
        standing: AdapterWeights | None = None,
        standing_id: str | None = None,
        uncut: AdapterWeights | None = None,
    ) -> NewAdapter:
        """The adapter with what was measured on it, and whether it is withheld.

        standing, standing_id: the adapter that answers today; None where the document answers in context. uncut: the adapter
        before it was cut to its rank: what the cut took is measured, too. Of more probes than `questions`, as many are picked
        evenly.
        """
        if not self._settings.questions:
            return adapter
        picked = probes[:: -(-len(probes) // self._settings.questions)] if probes else []
        if len(picked) < self._settings.min_questions:
            return replace(adapter, questions=len(picked), withheld=True)
        stored = weights_of(adapter.spec, decode(adapter.blob(), adapter.spec, adapter.encoding)[None].to(self._base.device))
        quality = self.answered(picked, stored)
        readable = self._share(picked, [self._shown(probe, _neighbourhood(text, probe)) for probe in picked])
        if standing is not None:
            beside = self.answered(picked, standing)
        elif len(text) <= NEIGHBOURHOOD_CHARACTERS:
            beside = readable
        else:
            beside = self._share(picked, [self._shown(probe, text) for probe in picked])
        lost = None if uncut is None else self.answered(picked, uncut) - quality
        measured = replace(
            adapter,
            quality=quality,
            quality_lost=lost,
            questions=len(picked),
            readable=readable,
            standing=standing_id if standing is not None else IN_CONTEXT,
            standing_quality=beside,
        )
        better = quality > beside if standing is not None else quality >= beside
        return replace(measured, withheld=not (better and quality > 0 and readable >= self._settings.min_readable))

    def answered(self, probes: Sequence[Probe], adapter: AdapterWeights | None = None) -> float:
        """Share of the probes that are answered without the document, under one adapter or by the bare base."""
        alone = [prompt(self._tokenizer, [{"role": "user", "content": probe.question}]) for probe in probes]
        return self._share(probes, alone, adapter)

    def _shown(self, probe: Probe, text: str) -> list[int]:
        """The question below a text, cut in the middle where both do not fit."""
        ids = prompt(self._tokenizer, [{"role": "user", "content": in_context(text, probe.question)}])
        return head_tail(ids, self._room, self._ellipsis_ids)

    def _share(self, probes: Sequence[Probe], prompts: Sequence[Sequence[int]], adapter: AdapterWeights | None = None) -> float:
        """Share of the probes that are answered to these prompts, under one adapter or none."""
        requests = [
            Request(str(place), ids, self._settings.answer_tokens, adapter, self._stop_ids) for place, ids in enumerate(prompts)
        ]
        made = generate(self._base, sorted(requests, key=lambda each: len(each.prompt_ids)), self._settings.slots)
        said = [made[str(place)].token_ids for place in range(len(prompts))]
        answers = [cast(str, self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]
        right = [contains_answer(answer, [probe.answer]) for answer, probe in zip(answers, probes, strict=True)]
        return sum(right) / len(right)


def _neighbourhood(text: str, probe: Probe) -> str:
    """What stands around a probe's passage, cut at blanks; a short text is shown whole."""
    if len(text) <= NEIGHBOURHOOD_CHARACTERS:
        return text
    spare = max(0, NEIGHBOURHOOD_CHARACTERS - (probe.end - probe.start)) // 2
    start, end = max(0, probe.start - spare), min(len(text), probe.end + spare)
    start = start if start == 0 else text.find(" ", start, probe.start) + 1 or probe.start
    end = end if end == len(text) else max(text.rfind(" ", probe.end, end), probe.end)
    return text[start:end]

"""Documents to checked adapters by LIFT: questions, training of many documents at once, the cut to a rank that is served.

In: `Document`s, a base, a `LiftRecipe`, perhaps a hypernetwork whose adapters LIFT starts from. Out: as `AdapterWriter` says, in
the order in which documents end. An adapter follows from the document's content, the recipe and the replies to its questions,
but for rounding: draws are seeded by the content hash, pairs train in the document's order. A document that fails, or whose
questions are lost, is rejected alone.

LoRAs above the serving rank are cut to it by truncated SVD (rank 128 on an 8B model is 698 MB in bf16, rank 16 a ninth of it);
what the cut loses goes into the manifest, as relative error of the deltas and as share of questions. Each adapter goes through
`core.writing.question_gate`: it answers only where it does better than what answers now. Its probes are not trained on: rules
phrase every gap a second time, and of an endpoint's pairs one of every few passages is held out.

With `run.scratch`, documents in training are saved there, under their adapter's id, and go on where they were when the same is
asked again; replies to questions are kept there, too. The folder holds text and lies on a local disk. Knows nothing of stores and
workers. Cost: LIFT's (core.lift.trainer), one forward pass of the hypernetwork, an SVD, and the gate's.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from safetensors import SafetensorError

from core.adapters import files as adapter_files
from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.codec import encode
from core.adapters.deltas import changes_anything
from core.adapters.identity import hash_tensors
from core.adapters.layout import Encoding
from core.adapters.lora import LoraWeights, composed, recompress, stack
from core.config import Section, identity
from core.lift.course import FixedQuestions, Questions
from core.lift.question_source import AskedQuestions, QuestionSource, rule_probes
from core.lift.settings import PRESETS, V4, LiftRun, LiftSettings
from core.lift.trainer import Job, Lift, LiftResult, LiftState
from core.questions.endpoint import EndpointSettings
from core.questions.rules import write_by_rules
from core.questions.stream import QuestionStream, QuestionWriter
from core.shine.hypernetwork import Hypernetwork
from core.shine.writer import HypernetworkWriter
from core.store.manifest import Producer, adapter_id
from core.text.documents import NORMALISER, Document, Window
from core.text.tokens import Tokens, read
from core.training.examples import question_answers
from core.writing.quality_gate import GateSettings
from core.writing.question_gate import Probe, QuestionGate, QuestionGateSettings
from core.writing.writer import AdapterWriter, Outcome, Rejected, Standing, StandingOf, WindowRule, Written

log = logging.getLogger(__name__)

IN_ORDER_S = 1e9
"""Patience with which no pair overtakes an earlier one."""


class LiftWritingRun(LiftRun):
    """Where and how fast, and what is checked.

    scratch: folder for documents in training, saved every `save_s`, and for replies to questions; None keeps neither.
    max_lost_share: a document that loses more of its passages to an endpoint's failures is rejected, to be made when asked again.
    """

    scratch: str | None = None
    save_s: NonNegativeFloat = 60.0
    max_lost_share: Annotated[float, Field(ge=0, le=1)] = 0.5


class LiftRecipe(Section):
    """How a corpus is lifted: one of the papers' settings by name, and what `settings` change of it.

    pre_lift: directory of the adapter that pre-LIFT trained on other documents (core.adapters.files); every document starts from
    it, so it is part of every adapter. An `adapter` of another kind than the preset's begins at the defaults, not at the
    preset's. serving_rank: LoRAs above it are cut to it; None stores them as trained. A gated memory is stored as it is.
    """

    preset: str = "v4"
    settings: LiftSettings = V4
    questions: QuestionSource = QuestionSource()
    pre_lift: str | None = None
    serving_rank: PositiveInt | None = 16
    gate: QuestionGateSettings = QuestionGateSettings()
    run: LiftWritingRun = LiftWritingRun()

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name, given = values.get("preset", "v4"), values.get("settings", {})
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known: give one of {', '.join(PRESETS)}")
        if not isinstance(given, dict):
            return values
        preset = PRESETS[name].model_dump()
        adapter = given.get("adapter")
        if isinstance(adapter, dict) and adapter.get("kind", preset["adapter"]["kind"]) != preset["adapter"]["kind"]:
            preset["adapter"] = {}
        return values | {"settings": _merged(preset, given)}


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = dict(values)
    for name, change in changes.items():
        held = both.get(name)
        both[name] = _merged(held, change) if isinstance(held, dict) and isinstance(change, dict) else change
    return both


@dataclass(frozen=True, eq=False)
class _Lifted:
    """A document in training."""

    place: int
    document: Document
    tokens: int
    adapter_id: str
    questions: Questions
    standing: Standing | None


class LiftWriter(AdapterWriter):
    """Lifts `run.slots` documents at a time; `close`, or leaving its context, ends the thread that asks an endpoint.

    hypernetwork: on the same base; each document's training starts from what it generates, window by window, composed and cut to
    LIFT's rank. Raises `ValueError` for a base without tokenizer, for settings that do not fit base or hypernetwork, and for an
    endpoint's key that is not set. Not to be pickled: make it where it is used.
    """

    def __init__(
        self,
        base: BaseModel,
        recipe: LiftRecipe | None = None,
        encoding: Encoding = "bf16",
        hypernetwork: Hypernetwork | None = None,
        rule: WindowRule | None = None,
    ) -> None:
        recipe = recipe or LiftRecipe()
        self._base, self._recipe, self._run = base, recipe, recipe.run
        self._lift = Lift(base, recipe.settings, recipe.run)
        self.tokenizer, self.encoding = tokenizer_of(base), encoding
        stored = self._lift.stored_spec
        self._cuts = stored.kind == "lora" and recipe.serving_rank is not None and stored.rank > recipe.serving_rank
        self.spec = stored.with_rank(recipe.serving_rank) if self._cuts and recipe.serving_rank else stored
        self._asks = recipe.settings.curriculum.has("questions")
        self._starts = None if hypernetwork is None else self._starting(hypernetwork, rule or WindowRule())
        self._pre_lift = None if recipe.pre_lift is None else adapter_files.load(recipe.pre_lift, base)
        if self._pre_lift is not None:
            self._lift.check_start(self._pre_lift)
        self._scratch = None if recipe.run.scratch is None else Path(recipe.run.scratch)
        if self._scratch is not None:
            (self._scratch / "states").mkdir(parents=True, exist_ok=True)
        endpoint = recipe.questions.endpoint
        self._questions = self._question_writer(endpoint) if self._asks and endpoint is not None else None
        self._gate = QuestionGate(base, recipe.gate)
        self.producer = Producer(
            method="lift",
            weights=base.fingerprint if hypernetwork is None else hypernetwork.fingerprint(),
            config={
                "base": base.fingerprint,
                "normaliser": NORMALISER,
                "settings": identity(recipe.settings),
                "questions": recipe.questions.producer() if self._asks else None,
                "start": None if self._starts is None else self._starts.producer.fingerprint,
                "pre_lift": None if self._pre_lift is None else hash_tensors([("flat_BN", self._pre_lift.flat_BN)]),
                "cut_to_rank": self.spec.rank if self._cuts else None,
            },
        )

    def _starting(self, hypernetwork: Hypernetwork, rule: WindowRule) -> HypernetworkWriter:
        if hypernetwork.base is not self._base or self._recipe.settings.adapter.kind != "lora":
            raise ValueError("only a lora can start from a generated adapter, and on the hypernetwork's own base")
        known = {entry[:3] for entry in self._lift.spec.table}
        if missing := [entry for entry in hypernetwork.spec.table if entry[:3] not in known]:
            site = f"{missing[0].tensor} of {missing[0].site}"
            raise ValueError(f"the hypernetwork writes {site}, and LIFT trains none: take its sites into settings.adapter.sites")
        ungated = GateSettings(share=0)
        return HypernetworkWriter(hypernetwork, "fp32", rule.model_copy(update={"long_documents": "windows"}), gate=ungated)

    def _question_writer(self, endpoint: EndpointSettings) -> QuestionWriter:
        patient = endpoint.run.model_copy(update={"patience_s": IN_ORDER_S})
        cache = ":memory:" if self._scratch is None else self._scratch / "questions.sqlite"
        return QuestionWriter(endpoint.model_copy(update={"run": patient}), cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._questions is not None:
            self._questions.close()

    def adapter_ids(self, document: Document, tokens: Tokens) -> list[str]:
        """See `AdapterWriter.adapter_ids`; one for the whole document."""
        what = document.tenant, document.content_hash, Window(0, len(tokens.ids))
        return [adapter_id(*what, self.producer, self.spec, self.encoding)] if tokens.ids else []

    def settled(self, adapter_ids: Iterable[str]) -> None:
        """See `AdapterWriter.settled`; removes what was saved of their training."""
        if self._scratch is not None:
            for each in adapter_ids:
                self._state_path(each).unlink(missing_ok=True)

    def write_each(
        self, documents: Sequence[Document], tokens: Sequence[Tokens] | None = None, standing: StandingOf | None = None
    ) -> Iterator[tuple[int, Outcome]]:
        """See `AdapterWriter.write_each`; the longest begin. Closed early, it saves what is in training."""
        if tokens is None:
            tokens = [read(self.tokenizer, document.text) for document in documents]
        places = sorted(range(len(documents)), key=lambda place: -len(tokens[place].ids))
        yield from ((place, Rejected("no tokens")) for place in places if not tokens[place].ids)
        waiting = deque(place for place in places if tokens[place].ids)
        lift = self._lift = self._lift if self._lift.idle else Lift(self._base, self._recipe.settings, self._run)
        streams = {} if self._questions is None else {place: self._questions.write(documents[place]) for place in waiting}
        training: dict[str, _Lifted] = {}
        saved = time.monotonic()
        try:
            while waiting or training:
                while lift.free and (place := _next(waiting, documents, training)) is not None:
                    stands = None if standing is None else standing(documents[place])
                    lifted = self._lifted(place, documents[place], tokens[place], streams.get(place), stands)
                    job = self._job(lifted, tokens[place])
                    failed = job if isinstance(job, Rejected) else lift.submit(job)
                    if failed is None:
                        training[lifted.document.content_hash] = lifted
                    else:
                        yield place, failed if isinstance(failed, Rejected) else self._finish(lifted, failed)
                for result in lift.step():
                    lifted = training.pop(result.key)
                    yield lifted.place, self._finish(lifted, result)
                if lift.waiting:
                    time.sleep(self._run.poll_s)
                if time.monotonic() - saved >= self._run.save_s:
                    self._save(lift, training)
                    saved = time.monotonic()
        finally:
            for stream in streams.values():
                stream.cancel()
            self._save(lift, training)

    def _lifted(
        self, place: int, document: Document, tokens: Tokens, stream: QuestionStream | None, standing: Standing | None
    ) -> _Lifted:
        questions: Questions = FixedQuestions()
        if stream is not None:
            questions = AskedQuestions(stream, self._run.max_lost_share)
        elif self._asks:
            questions = FixedQuestions(tuple(question_answers(write_by_rules(document, self._recipe.questions.rules))))
        [named] = self.adapter_ids(document, tokens)
        return _Lifted(place, document, len(tokens.ids), named, questions, standing)

    def _job(self, lifted: _Lifted, tokens: Tokens) -> Job | Rejected:
        """A document to train, from where it was left or from its start."""
        document, state, start = lifted.document, self._saved(lifted.adapter_id), self._pre_lift
        if state is None and self._starts is not None:
            [outcome] = self._starts.write([document], [tokens])
            if isinstance(outcome, Rejected):
                return Rejected(f"no adapter to start from: {outcome.reason}")
            windows = outcome.weights()
            assert isinstance(windows, LoraWeights), "a hypernetwork writes no other kind"
            generated, _ = composed(windows, self._starts.composition, self._lift.spec.rank)
            generated = generated.to(self._base.device)
            start = generated if start is None else stack([start, generated])
        return Job(document.content_hash, document.text, document.title, lifted.questions, start, state)

    def _finish(self, lifted: _Lifted, result: LiftResult) -> Outcome:
        lost = 0
        if isinstance(lifted.questions, AskedQuestions):
            lost = len(lifted.questions.stream.failures)
            lifted.questions.stream.cancel()
        if result.weights is None:
            return Rejected(f"not lifted: {result.fault}")
        stored, error = result.weights, None
        if not stored.flat_BN.isfinite().all() or not changes_anything(stored):
            return Rejected("not lifted: the adapter changes nothing, or is not finite")
        if self._cuts:
            assert isinstance(stored, LoraWeights)
            stored, error_B = recompress(stored, self.spec.rank)
            error = error_B.item()
        try:
            vector = encode(stored.flat_BN[0], self.encoding, self.spec)
        except ValueError as fault:
            return Rejected(f"the adapter cannot be encoded: {fault}")
        new = self.new_adapter(lifted.document, Window(0, lifted.tokens), vector, error)
        standing = lifted.standing
        judged = self._gate.judged(
            new,
            lifted.document.text,
            self._probes(lifted),
            None if standing is None else standing.weights.to(self._base.device),
            None if standing is None else standing.adapter_id,
            result.weights if self._cuts else None,
        )
        return Written((judged,), error or 0.0, lost)

    def _probes(self, lifted: _Lifted) -> list[Probe]:
        """Questions that were not trained on; of an endpoint that gives a passage fewer than four, those that were."""
        if isinstance(lifted.questions, AskedQuestions):
            if lifted.questions.probes:
                return lifted.questions.probes
            return [Probe(pair.question, pair.answer, pair.start, pair.end) for pair in lifted.questions.stream.result(0)]
        return rule_probes(lifted.document, self._recipe.questions.rules, lifted.questions.ready())

    def _state_path(self, named: str) -> Path:
        assert self._scratch is not None
        return self._scratch / "states" / f"{named}.safetensors"

    def _saved(self, named: str) -> LiftState | None:
        if self._scratch is None or not (path := self._state_path(named)).exists():
            return None
        try:
            return LiftState.load(path)
        except (ValueError, SafetensorError) as error:
            log.warning("a document starts anew, for its saved training cannot be read: %s", error)
            return None

    def _save(self, lift: Lift, training: dict[str, _Lifted]) -> None:
        if self._scratch is not None:
            for state in lift.states():
                state.save(self._state_path(training[state.key].adapter_id))


def _next(waiting: deque[int], documents: Sequence[Document], training: dict[str, _Lifted]) -> int | None:
    """Takes the first place whose content is not in training: results are told apart by content."""
    place = next((place for place in waiting if documents[place].content_hash not in training), None)
    if place is not None:
        waiting.remove(place)
    return place

"""Where LIFT's questions on a document come from, and which of them it is not trained on.

In: a `QuestionSource`, an endpoint's stream. Out: `Questions` to train on, and `Probe`s to measure by
(`core.writing.question_gate`). Knows nothing of training.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from core.config import Section, identity
from core.lift.course import PolledQuestions
from core.questions.endpoint import PROMPT_VERSION, EndpointSettings
from core.questions.rules import RULES_VERSION, Pair, RuleSettings, write_by_rules
from core.questions.stream import QuestionStream
from core.text.documents import Document
from core.training.examples import QuestionAnswer
from core.writing.question_gate import Probe

PROBES = 32
HELD_OUT_VERSION = "fourth-of-a-passage-1"
"""Which of an endpoint's pairs are held out (`AskedQuestions`). It bears identity: what is held out is not trained on."""


class QuestionSource(Section):
    """Who writes the questions: the rules, or the language model behind `endpoint` where one is given.

    Pairs train in the document's order, so `endpoint.run.patience_s` has no effect here.
    """

    rules: RuleSettings = RuleSettings()
    endpoint: EndpointSettings | None = None

    def producer(self) -> dict[str, JsonValue]:
        """What of this bears identity."""
        if self.endpoint is None:
            return {"version": RULES_VERSION, "rules": identity(self.rules)}
        return {"version": PROMPT_VERSION, "held_out": HELD_OUT_VERSION, "endpoint": identity(self.endpoint)}


class AskedQuestions:
    """An endpoint's pairs as `Questions`, without those that are held out: `probes`.

    Held out is the fourth pair of a passage, of every passage or, beyond `PROBES` of them, of as many evenly; a passage with
    fewer pairs gives none. `ValueError`, which ends this document alone, where too many passages are lost.
    """

    def __init__(self, stream: QuestionStream, max_lost_share: float) -> None:
        self.stream = stream
        self._most = max_lost_share * len(stream.passages)
        step = -(-len(stream.passages) // PROBES)
        self._holding = {(passage.start, passage.end) for passage in stream.passages[:: max(step, 1)]}
        self._seen: Counter[tuple[int, int]] = Counter()
        self._polled = PolledQuestions(_Filtered(stream, self._trained))
        self.probes: list[Probe] = []

    @property
    def finished(self) -> bool:
        failures = self.stream.failures
        for failure in failures:
            if len(failures) > self._most or failure.reason in ("endpoint", "cancelled"):
                lost = f"{len(failures)} of {len(self.stream.passages)} passages lost their questions"
                raise ValueError(f"{lost}, one of them to {failure.reason} ({failure.detail})")
        return self._polled.finished

    def ready(self) -> Sequence[QuestionAnswer]:
        return self._polled.ready()

    def _trained(self, pair: Pair) -> bool:
        passage = pair.start, pair.end
        self._seen[passage] += 1
        held_out = self._seen[passage] == 4 and passage in self._holding
        if held_out:
            self.probes.append(Probe(pair.question, pair.answer, *passage))
        return not held_out


class _Filtered(NamedTuple):
    """A stream of those pairs that `kept` says yes to; each is asked once."""

    stream: QuestionStream
    kept: Callable[[Pair], bool]

    @property
    def finished(self) -> bool:
        return self.stream.finished

    def poll(self) -> list[Pair]:
        return [pair for pair in self.stream.poll() if self.kept(pair)]


def rule_probes(document: Document, rules: RuleSettings, trained: Sequence[QuestionAnswer]) -> list[Probe]:
    """The rules' gaps in other words than those that were trained on."""
    again = write_by_rules(document, rules.model_copy(update={"seed": rules.seed + 1, "order_share": 0.0}))
    known = {pair.question for pair in trained}
    return [Probe(pair.question, pair.answer, pair.start, pair.end) for pair in again if pair.question not in known]

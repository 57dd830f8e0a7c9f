"""What the benchmarks of LIFT share: the shipped base, documents longer than its window, questions, settings for its size.

The settings are those of the papers' versions by kind and schedule; rank, learning rate, step size and epochs are for a base of
one million weights and were fixed before the results that are reported.
"""

from dataclasses import dataclass

from benchmarks.lift.question_server import Manners, question_server
from core.adapters.base_model import BaseModel, load_base
from core.lift.course import Curriculum, Stage, Task
from core.lift.forms import AdapterSettings
from core.lift.settings import LiftRun, LiftSettings, OptimiserSettings
from core.questions.chat_endpoint import EndpointRun
from core.questions.endpoint import EndpointSettings
from core.shine.hypernetwork import Hypernetwork
from pipelines.evaluation.lifting import WrittenQuestions, write_questions
from pipelines.evaluation.long_documents import LongDocument
from pipelines.world.reference import REFERENCE

PARTS = 14
"""Parts of a document: about 1,400 tokens, where the base has 1,024 positions."""
SHINE_WINDOW_TOKENS = 128
"""What the shipped hypernetwork reads at once: it was trained on documents of about 100 tokens."""
PAIRS = 10
RUN = LiftRun(slots=16, micro_batch_tokens=8192)


def settings(
    *stages: tuple[int, tuple[Task, ...]],
    kind: str = "lora",
    rank: int | None = 32,
    learning_rate: float = 2e-3,
    examples_per_step: int = 16,
) -> LiftSettings:
    """stages: epochs and tasks of each."""
    named = tuple(Stage(name=str(number), epochs=epochs, tasks=tasks) for number, (epochs, tasks) in enumerate(stages))
    return LiftSettings(
        adapter=AdapterSettings.model_validate({"kind": kind, "rank": rank}),
        optimiser=OptimiserSettings(learning_rate=learning_rate),
        curriculum=Curriculum(stages=named, examples_per_step=examples_per_step),
    )


LIFT = settings((5, ("questions",)))
"""v4: per-sentence questions alone."""
RAW = settings((40, ("segments",)), examples_per_step=4)
"""Finetune-Raw: the text alone, in segments."""
MEMORY = settings(
    (1, ("contextualised",)), (5, ("contextualised", "questions")), kind="gated_memory", rank=None, learning_rate=1e-2
)
"""v3: recitals in context, then recitals and questions, on Gated Memory."""


def once(recipe: LiftSettings) -> LiftSettings:
    """The same with one epoch a stage: for runs that only show that a benchmark runs."""
    stages = tuple(stage.model_copy(update={"epochs": 1}) for stage in recipe.curriculum.stages)
    return recipe.model_copy(update={"curriculum": recipe.curriculum.model_copy(update={"stages": stages})})


@dataclass(frozen=True)
class Reference:
    """The shipped models."""

    base: BaseModel
    hypernetwork: Hypernetwork


def reference() -> Reference:
    """Loads base and hypernetwork."""
    base = load_base(REFERENCE / "base")
    return Reference(base, Hypernetwork.load(REFERENCE / "hypernetwork", base))


def endpoint(url: str, pairs: int = PAIRS, **run: object) -> EndpointSettings:
    """Settings that ask the stand-in at this address."""
    return EndpointSettings(model="stand-in", pairs=pairs, run=EndpointRun.model_validate({"url": url, **run}))


def stand_in_questions(documents: list[LongDocument], pairs: int = PAIRS) -> WrittenQuestions:
    """Per-sentence questions of a stand-in without faults (`benchmarks.lift.question_server`)."""
    with question_server(Manners()) as server:
        return write_questions(documents, endpoint(server.url, pairs))

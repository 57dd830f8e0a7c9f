"""The settings of LIFT, and the papers' versions of them by name.

Curriculum and adapter have their sections beside the code that reads them (core.lift.course, core.lift.examples,
core.lift.forms); here they become one recipe. `core.config.fingerprint` of `LiftSettings` bears identity; a `LiftRun` does not.
"""

from typing import Annotated

from pydantic import Field, PositiveInt

from core.config import RunSection, Section
from core.lift.course import Curriculum
from core.lift.forms import AdapterSettings
from core.training.schedules import Decay, decay_factor


class OptimiserSettings(Section):
    """AdamW for each document by itself.

    decay runs over the document's whole curriculum, down to zero at its end; `linear` and `cosine` must know how far they are, so
    a document then waits for all its questions. warmup_steps are the document's own.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    decay: Decay = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of a document's step, counted from 0, with this share of its curriculum done."""
        return self.learning_rate * decay_factor(self.decay, progress) * min(1.0, (step + 1) / max(self.warmup_steps, 1))


class LiftSettings(Section):
    """How an adapter is made from a document. The defaults are v4's; `PRESETS` has the papers' other versions.

    gamma weighs L_AT. gate_penalty weighs the mean size of a gated memory's gates. token_budget: a document takes no further step
    once it has trained on so many tokens, contexts included.
    """

    adapter: AdapterSettings = AdapterSettings(rank=128, scale=2.0)
    optimiser: OptimiserSettings = OptimiserSettings()
    curriculum: Curriculum = Curriculum()
    gamma: Annotated[float, Field(ge=0)] = 1.0
    gate_penalty: Annotated[float, Field(ge=0)] = 0.0
    token_budget: PositiveInt | None = None


class LiftRun(RunSection):
    """Where and how fast: documents at once, padded tokens of a micro-batch (fewer while memory is short), recomputation in
    backward, pause while all wait."""

    slots: PositiveInt = 16
    micro_batch_tokens: PositiveInt = 4096
    checkpointing: bool = False
    poll_s: Annotated[float, Field(gt=0)] = 0.01


def _curriculum(*stages: tuple[str, int, tuple[str, ...]], examples_per_step: int | None = 4, **values: object) -> Curriculum:
    named = [{"name": name, "epochs": epochs, "tasks": tasks} for name, epochs, tasks in stages]
    return Curriculum.model_validate({"stages": named, "examples_per_step": examples_per_step, **values})


V4 = LiftSettings()
V1 = LiftSettings(
    adapter=AdapterSettings(kind="pissa", rank=128),
    optimiser=OptimiserSettings(learning_rate=2e-5, decay="cosine"),
    curriculum=_curriculum(("segments", 2, ("segments",)), ("mixed", 3, ("segments", "questions", "timeline"))),
)
V3 = LiftSettings(
    adapter=AdapterSettings(kind="gated_memory"),
    optimiser=OptimiserSettings(learning_rate=1e-3, betas=(0.9, 0.98)),
    curriculum=_curriculum(
        ("segments", 3, ("contextualised",)), ("mixed", 5, ("contextualised", "questions")), examples_per_step=None
    ),
)
PRESETS = {
    "v1": V1,
    "v3": V3,
    "v4": V4,
    "v4_fast": LiftSettings(
        optimiser=OptimiserSettings(learning_rate=3e-4), curriculum=_curriculum(("questions", 1, ("questions",)))
    ),
    "finetune_raw": LiftSettings(curriculum=_curriculum(("segments", 5, ("segments",)))),
}
"""The papers' versions by name, as far as they state them; 4 examples a step where v1 is silent."""

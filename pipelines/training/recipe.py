"""The recipes of training: what TOML may say, and what each value means. Knows nothing of how training runs."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from core.config import RunSection, Section
from core.lift.forms import AdapterSettings
from core.shine.hypernetwork import HypernetworkSettings
from core.training.schedules import Decay, decay_factor
from pipelines.training.tasks import CONTEXT_TASKS, Feed, Task


class Stage(Section):
    """A stretch of steps over one mixture of tasks (weights need not sum to 1), with its own learning-rate schedule."""

    name: str
    tasks: dict[Task, PositiveFloat]
    steps: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    decay: Decay = "linear"

    def rate(self, step: int) -> float:
        """Learning rate of a step of this stage, counted from 0: linear warm-up, then decay to zero at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.learning_rate * decay_factor(self.decay, share)


class Optimiser(Section):
    """AdamW; `global_batch` counts examples of a step over all ranks (a packed group is one)."""

    global_batch: PositiveInt = 32
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0


class Validation(RunSection):
    """Exact match on documents that training does not see, every so many steps."""

    corpus: str | None = None
    documents: PositiveInt = 32
    every_steps: PositiveInt = 200


class Run(RunSection):
    """Where and how fast; `micro_batch` examples go through the model at a time (None: a rank's whole share of the step).

    max_skipped_share: of the corpus's documents, that may turn out to be no use (no text, no questions for a task that asks).
    """

    workers: PositiveInt = 1
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    gradient_checkpointing: bool = False
    pad_to_multiple: PositiveInt = 1
    log_every_steps: PositiveInt = 10
    checkpoint_every_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    max_failures: Annotated[int, Field(ge=-1)] = 2
    max_skipped_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    validation: Validation = Validation()


class Architecture(Section):
    """A Qwen3 decoder to be trained from nothing."""

    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    feed_forward: PositiveInt = 384
    max_length: PositiveInt = 1024
    rope_theta: PositiveFloat = 10_000.0


CONVERSATION_TASKS: frozenset[Task] = frozenset(get_args(Task)) - CONTEXT_TASKS


class TrainingRecipe(Section):
    """What the recipes of all trainings say. precision: bf16 multiplies in it, and holds a frozen base in it.

    Raises `ValueError` for tasks that the model cannot be trained on, and for a global batch that does not divide among the
    ranks.
    """

    trained: ClassVar[str]
    trains_on: ClassVar[frozenset[Task]]

    feed: Feed
    optimiser: Optimiser = Optimiser()
    stages: tuple[Stage, ...]
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    run: Run = Run()

    @model_validator(mode="after")
    def _tasks_fit(self) -> Self:
        for stage in self.stages:
            if wrong := sorted(set(stage.tasks) - self.trains_on):
                raise ValueError(
                    f"stage {stage.name!r}: {self.trained} cannot be trained on {', '.join(wrong)}, but on "
                    f"{', '.join(sorted(self.trains_on))}"
                )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        batch, workers = self.optimiser.global_batch, self.run.workers
        if batch < workers:
            raise ValueError(f"optimiser.global_batch {batch} leaves some of run.workers {workers} without an example: raise it")
        if batch % (workers * (self.run.micro_batch or 1)):
            micro = f" times run.micro_batch {self.run.micro_batch}" if self.run.micro_batch else ""
            raise ValueError(f"optimiser.global_batch {batch} is no multiple of run.workers {workers}{micro}: change one of them")
        return self


class BaseRecipe(TrainingRecipe):
    """Trains a base from nothing. tokenizer: a directory or a name."""

    trained = "a base"
    trains_on = CONVERSATION_TASKS

    tokenizer: str
    architecture: Architecture = Architecture()
    optimiser: Optimiser = Optimiser(betas=(0.9, 0.98))


class HypernetworkRecipe(TrainingRecipe):
    """Trains a hypernetwork for a frozen base. start_from: a saved hypernetwork to go on from, of the recipe's shape; its
    composition may be another.
    """

    trained = "a hypernetwork"
    trains_on = CONTEXT_TASKS

    base: str
    hypernetwork: HypernetworkSettings = HypernetworkSettings()
    start_from: str | None = None


class PreLiftRecipe(TrainingRecipe):
    """Trains one adapter on many documents with LIFT's tasks, before any document's own LIFT (arXiv 2412.13626, section 3.4).

    Task weights stand for gamma. result: `adapter` is what LIFT starts from, so it is part of every document's adapter; `base` is
    a new base with the adapter added to its weights, hence with a fingerprint of its own.
    """

    trained = "pre-LIFT"
    trains_on = CONVERSATION_TASKS

    base: str
    adapter: AdapterSettings = AdapterSettings(kind="pissa")
    result: Literal["adapter", "base"] = "adapter"
    optimiser: Optimiser = Optimiser(weight_decay=0.0)

    @model_validator(mode="after")
    def _can_be_added(self) -> Self:
        if self.result == "base" and self.adapter.kind == "gated_memory":
            raise ValueError("a gated memory cannot be added to a base's weights: choose result = 'adapter'")
        return self


Recipe = BaseRecipe | HypernetworkRecipe | PreLiftRecipe
RECIPES: dict[str, type[BaseRecipe] | type[HypernetworkRecipe] | type[PreLiftRecipe]] = {
    "base": BaseRecipe,
    "hypernetwork": HypernetworkRecipe,
    "pre-lift": PreLiftRecipe,
}


def kind_of(recipe: Recipe) -> str:
    """The name in `RECIPES` of a recipe's kind."""
    return next(kind for kind, section in RECIPES.items() if isinstance(recipe, section))


def read_recipe(kind: str, values: dict[str, Any]) -> Recipe:
    """The recipe that `model_dump` turned into JSON values; kind: a name in `RECIPES`."""
    return RECIPES[kind].model_validate(values)

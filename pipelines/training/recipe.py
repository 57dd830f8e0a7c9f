"""The recipes of training: what TOML may say, and what each value means. Knows nothing of how training runs."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from core.config import RunSection, Section
from core.lift.forms import AdapterSettings
from core.shine.hypernetwork import HypernetworkSettings
from core.training.schedules import Decay, decay_factor
from pipelines.training.feed import Feed, Task


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
    """Where and how fast; `micro_batch` examples go through the model at a time (None: a rank's whole share of the step)."""

    workers: PositiveInt = 1
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    gradient_checkpointing: bool = False
    pad_to_multiple: PositiveInt = 1
    log_every_steps: PositiveInt = 10
    checkpoint_every_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    max_failures: Annotated[int, Field(ge=-1)] = 2
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


class BaseRecipe(Section):
    """Trains a base from nothing. tokenizer: a directory or a name."""

    tokenizer: str
    architecture: Architecture = Architecture()
    feed: Feed
    optimiser: Optimiser = Optimiser(betas=(0.9, 0.98))
    stages: tuple[Stage, ...]
    seed: int = 0
    run: Run = Run()


class HypernetworkRecipe(Section):
    """Trains a hypernetwork for a frozen base. start_from: a saved hypernetwork to go on from, of the recipe's shape; its
    composition may be another.
    """

    base: str
    hypernetwork: HypernetworkSettings = HypernetworkSettings()
    start_from: str | None = None
    feed: Feed
    optimiser: Optimiser = Optimiser()
    stages: tuple[Stage, ...]
    seed: int = 0
    run: Run = Run()


class PreLiftRecipe(Section):
    """Trains one adapter on many documents with LIFT's tasks, before any document's own LIFT (arXiv 2412.13626, section 3.4).

    Task weights stand for gamma. result: `adapter` is what LIFT starts from, so it is part of every document's adapter; `base` is
    a new base with the adapter added to its weights, hence with a fingerprint of its own.
    """

    base: str
    adapter: AdapterSettings = AdapterSettings(kind="pissa")
    result: Literal["adapter", "base"] = "adapter"
    feed: Feed
    optimiser: Optimiser = Optimiser(weight_decay=0.0)
    stages: tuple[Stage, ...]
    seed: int = 0
    run: Run = Run()

    @model_validator(mode="after")
    def _can_be_added(self) -> "PreLiftRecipe":
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

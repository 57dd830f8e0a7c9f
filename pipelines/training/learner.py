"""What is trained, as a module of one rank: a base, a hypernetwork, or pre-LIFT's adapter.

In: a recipe, then batches. Out: a summed loss under autograd; at the end a model on disk. The recipe's precision is opened inside
`forward`: DeepSpeed switches an outer autocast off. Knows nothing of ranks, steps and checkpoints.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from core.adapters import files as adapter_files
from core.adapters.base_model import BaseModel, load_base, tokenizer_of
from core.adapters.lora import LoraWeights, merged
from core.lift.forms import form_of
from core.shine.hypernetwork import Hypernetwork
from core.shine.objective import hypernetwork_loss
from core.training.examples import Batch
from core.training.objectives import language_loss
from pipelines.evaluation.evaluate import validation_accuracy
from pipelines.training.recipe import BaseRecipe, HypernetworkRecipe, PreLiftRecipe, Recipe


class Learner(nn.Module):
    """A module whose parameters are trained on batches; those of a frozen base are none of its own."""

    base: BaseModel
    trained_tokens: int | None = None
    """The longest context so far, padding included; None where no context is read."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss of a batch on the base's device."""
        with torch.autocast(self._recipe.run.device, torch.bfloat16, enabled=self._recipe.precision == "bf16"):
            return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """`forward` in the precision that is there."""
        raise NotImplementedError

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters for an optimiser."""
        raise NotImplementedError

    def validate(self, corpus: str, documents: int) -> dict[str, float]:
        """`validation_accuracy` as it stands now."""
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """What `load_base`, `Hypernetwork.load` or `core.adapters.files.load` reads."""
        raise NotImplementedError


class BaseLearner(Learner):
    """The whole base, trained on conversations."""

    def __init__(self, recipe: BaseRecipe) -> None:
        super().__init__(recipe)
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer)
        shape = recipe.architecture
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_length,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model: Any = Qwen3ForCausalLM(config)
        self.base = BaseModel(model.to(recipe.run.device), tokenizer)
        self.model = self.base.model
        self.model.requires_grad_(True)

    def loss(self, batch: Batch) -> Tensor:
        return language_loss(self.base, batch)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Matrices decay, vectors (norms) do not."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def validate(self, corpus: str, documents: int) -> dict[str, float]:
        """`validation_accuracy`, each document in context."""
        return validation_accuracy(self.base, None, corpus, documents)

    def save(self, directory: Path) -> None:
        _save_base(self.base, directory)


class HypernetworkLearner(Learner):
    """A hypernetwork over a frozen base, which is no part of the module."""

    def __init__(self, recipe: HypernetworkRecipe) -> None:
        super().__init__(recipe)
        base = _frozen_base(recipe)
        if recipe.start_from is None:
            self.hypernetwork = Hypernetwork(base, recipe.hypernetwork)
        else:
            self.hypernetwork = Hypernetwork.load(recipe.start_from, base)
            shape = self.hypernetwork.settings.model_copy(update={"composition": recipe.hypernetwork.composition})
            if shape != recipe.hypernetwork:
                raise ValueError(f"{recipe.start_from} has settings {shape}: write the same under [hypernetwork]")
            self.hypernetwork.settings = recipe.hypernetwork
        self.base = base
        self.trained_tokens = self.hypernetwork.trained_tokens
        self._checkpointing = recipe.run.gradient_checkpointing

    def loss(self, batch: Batch) -> Tensor:
        self.trained_tokens = max(self.trained_tokens or 0, batch.context_ids_BT.shape[1])
        with self.base.checkpointing(self._checkpointing):
            return hypernetwork_loss(self.hypernetwork, batch)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return self.hypernetwork.parameter_groups(weight_decay)

    def validate(self, corpus: str, documents: int) -> dict[str, float]:
        """`validation_accuracy`, each document as its adapter."""
        return validation_accuracy(self.base, self.hypernetwork, corpus, documents)

    def save(self, directory: Path) -> None:
        self.hypernetwork.trained_tokens = self.trained_tokens
        self.hypernetwork.save(directory)


class PreLiftLearner(Learner):
    """One adapter for all documents over a frozen base, which is no part of the module."""

    def __init__(self, recipe: PreLiftRecipe) -> None:
        super().__init__(recipe)
        self.base = _frozen_base(recipe)
        self._form = form_of(self.base, recipe.adapter)
        initial_N = self._form.initial(torch.Generator().manual_seed(recipe.seed))
        self.flat_N = nn.Parameter(initial_N.to(self.base.device))
        self._result = recipe.result
        self._checkpointing = recipe.run.gradient_checkpointing

    def loss(self, batch: Batch) -> Tensor:
        with self.base.checkpointing(self._checkpointing), self._attached():
            return language_loss(self.base, batch)

    def _attached(self) -> AbstractContextManager[None]:
        return self._form.attach(self.flat_N[None], None)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [self.flat_N], "weight_decay": weight_decay}]

    def validate(self, corpus: str, documents: int) -> dict[str, float]:
        """`validation_accuracy`, each document in context, under the adapter."""
        with self._attached():
            return validation_accuracy(self.base, None, corpus, documents)

    def save(self, directory: Path) -> None:
        """The adapter as LIFT starts from it, or a base with it in its weights."""
        weights = self._form.stored(self.flat_N[None])
        if self._result == "adapter":
            adapter_files.save(weights, self.base, directory)
            return
        assert isinstance(weights, LoraWeights), "the recipe allows only LoRA here"
        with merged(self.base, weights):
            _save_base(self.base, directory)


def _frozen_base(recipe: HypernetworkRecipe | PreLiftRecipe) -> BaseModel:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.precision]
    return load_base(recipe.base, dtype=dtype, device=recipe.run.device)


def _save_base(base: BaseModel, directory: Path) -> None:
    base.model.save_pretrained(directory)
    tokenizer_of(base).save_pretrained(directory)


def learner_of(recipe: Recipe) -> Learner:
    """A new one, on the recipe's device; the seed of torch decides what is random."""
    match recipe:
        case BaseRecipe():
            return BaseLearner(recipe)
        case HypernetworkRecipe():
            return HypernetworkLearner(recipe)
        case PreLiftRecipe():
            return PreLiftLearner(recipe)

"""The training loop of one rank: batches from Ray Data, one DeepSpeed engine (ZeRO 1), checkpoints without pickles.

In: a recipe as JSON values, through Ray Train. Out: metrics to a queue, checkpoints to Ray Train. A step's loss is the sum
over all supervised targets of the global batch divided by their number over all ranks; gradients are clipped by their global
norm; a step whose gradient is not finite on any rank is skipped on all of them, and too many in a row end the run.

A checkpoint holds the trained weights (what `save` of the learner writes), `optimiser.safetensors` (fp32 weights and
moments by parameter, gathered over ranks, so a run may go on with another number of workers) and `state.json` (steps,
position in the data).
"""

import importlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.train
import torch
import torch.distributed as dist
from ray.util.queue import Queue
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from core.adapters import files as adapter_files
from core.adapters.base_model import BaseModel, load_base, tokenizer_of
from core.adapters.lora import LoraWeights, merged
from core.lift.forms import form_of
from core.shine.hypernetwork import Hypernetwork
from core.shine.objective import hypernetwork_loss
from core.training.examples import Batch, collate
from core.training.objectives import language_loss
from pipelines.evaluation.asking import pad_id
from pipelines.evaluation.evaluate import validation_accuracy
from pipelines.training.feed import Position, to_examples
from pipelines.training.recipe import BaseRecipe, HypernetworkRecipe, PreLiftRecipe, Recipe, read_recipe

SKIPPED_STEPS_AT_MOST = 20


class BaseLearner(nn.Module):
    """The whole base, trained on conversations."""

    def __init__(self, recipe: BaseRecipe) -> None:
        super().__init__()
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

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss."""
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


class HypernetworkLearner(nn.Module):
    """A hypernetwork over a frozen base, which is no part of the module."""

    def __init__(self, recipe: HypernetworkRecipe) -> None:
        super().__init__()
        base = _frozen_base(recipe)
        if recipe.start_from is None:
            self.hypernetwork = Hypernetwork(base, recipe.hypernetwork)
        else:
            self.hypernetwork = Hypernetwork.load(recipe.start_from, base)
            shape = self.hypernetwork.settings.model_copy(update={"composition": recipe.hypernetwork.composition})
            if shape != recipe.hypernetwork:
                raise ValueError(f"{recipe.start_from} has settings {shape}: write the same under [hypernetwork]")
            self.hypernetwork.settings = recipe.hypernetwork
        self._checkpointing = recipe.run.gradient_checkpointing

    @property
    def base(self) -> BaseModel:
        return self.hypernetwork.base

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss."""
        network = self.hypernetwork
        network.trained_tokens = max(network.trained_tokens or 0, batch.context_ids_BT.shape[1])
        with self.base.checkpointing(self._checkpointing):
            return hypernetwork_loss(network, batch)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return self.hypernetwork.parameter_groups(weight_decay)

    def validate(self, corpus: str, documents: int) -> dict[str, float]:
        """`validation_accuracy`, each document as its adapter."""
        return validation_accuracy(self.base, self.hypernetwork, corpus, documents)

    def save(self, directory: Path) -> None:
        self.hypernetwork.save(directory)


class PreLiftLearner(nn.Module):
    """One adapter for all documents over a frozen base, which is no part of the module."""

    def __init__(self, recipe: PreLiftRecipe) -> None:
        super().__init__()
        self.base = _frozen_base(recipe)
        self._form = form_of(self.base, recipe.adapter)
        initial_N = self._form.initial(torch.Generator().manual_seed(recipe.seed))
        self.flat_N = nn.Parameter(initial_N.to(self.base.device))
        self._result = recipe.result
        self._checkpointing = recipe.run.gradient_checkpointing

    def forward(self, batch: Batch) -> Tensor:
        """Summed loss."""
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
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.run.precision]
    return load_base(recipe.base, dtype=dtype, device=recipe.run.device)


def _save_base(base: BaseModel, directory: Path) -> None:
    base.model.save_pretrained(directory)
    tokenizer_of(base).save_pretrained(directory)


Learner = BaseLearner | HypernetworkLearner | PreLiftLearner


def _learner(recipe: Recipe) -> Learner:
    match recipe:
        case BaseRecipe():
            return BaseLearner(recipe)
        case HypernetworkRecipe():
            return HypernetworkLearner(recipe)
        case PreLiftRecipe():
            return PreLiftLearner(recipe)


def train_loop(config: dict[str, Any]) -> None:
    """What every rank runs: build or restore, then stage after stage.

    config: kind (a name in `RECIPES`), recipe (JSON values), queue (where rank 0 puts metrics, or None). Data sets are called by
    the number of their stage; the first starts where the checkpoint of this run ended.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = read_recipe(config["kind"], config["recipe"])
    if recipe.run.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.seed)
    learner = _learner(recipe)
    engine = _initialise(learner, recipe)
    state = {"stage": 0, "step": 0, "global_step": 0, "window": 0, "offset": 0}
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as directory:
            state = _restore(engine, learner, Path(directory))
    for number in range(state["stage"], len(recipe.stages)):
        _run_stage(engine, learner, recipe, number, state, config.get("queue"))
        state.update(stage=number + 1, step=0, window=0, offset=0)
    _checkpoint(engine, learner, state, {})


def _initialise(learner: Learner, recipe: Recipe) -> Any:
    import deepspeed

    if recipe.run.device == "cpu":
        # On a CPU DeepSpeed would compile a shared-memory all-reduce for minutes; gloo does without. Its module is called torch,
        # and "import deepspeed.comm.torch as x" would bind the other one.
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    groups = learner.groups(recipe.optimiser.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=1e-9, betas=recipe.optimiser.betas, fused=True)
    ranks = dist.get_world_size()
    share = recipe.optimiser.global_batch // ranks
    micro = recipe.run.micro_batch or share
    if share * ranks != recipe.optimiser.global_batch or share % micro:
        raise ValueError(
            f"global_batch {recipe.optimiser.global_batch} is no multiple of workers {ranks} times micro_batch {micro}"
        )
    engine, *_ = deepspeed.initialize(
        model=learner,
        optimizer=optimiser,
        config={
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": share // micro,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": recipe.optimiser.clip_norm,
            "steps_per_print": 10**9,
        },
    )
    # DeepSpeed links moments to parameters in its first step, group by group, and misses those of later groups: make them now.
    for flat in engine.optimizer.single_partition_of_fp32_groups:
        step = torch.zeros((), device=flat.device)
        engine.optimizer.optimizer.state[flat] = {
            "step": step,
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    return engine


def _run_stage(engine: Any, learner: Learner, recipe: Recipe, number: int, state: dict[str, int], queue: Queue | None) -> None:
    stage, ranks = recipe.stages[number], dist.get_world_size()
    share = recipe.optimiser.global_batch // ranks
    padding = pad_id(tokenizer_of(learner.base))
    autocast = torch.autocast(recipe.run.device, torch.bfloat16) if recipe.run.precision == "bf16" else nullcontext()
    shard = ray.train.get_dataset_shard(str(number))
    rows = _batches(shard, share, Position(state["window"], state["offset"]))
    started, losses, targets, skipped = time.monotonic(), 0.0, 0, 0
    while state["step"] < stage.steps:
        table = next(rows, None)
        _agree(table is not None, "the corpus ended before the stage did: the planned epochs were too few")
        assert table is not None
        # Alike lengths together: less padding, and within a step the order means nothing.
        examples = sorted(to_examples(table), key=lambda example: len(example.ids))
        micro = recipe.run.micro_batch or share
        batches = [collate(examples[i : i + micro], padding, recipe.run.pad_to_multiple) for i in range(0, share, micro)]
        tokens = torch.tensor(sum(batch.tokens for batch in batches))
        dist.all_reduce(tokens_on := tokens.to(learner.base.device))
        for group in engine.optimizer.param_groups:
            group["lr"] = stage.rate(state["step"])
        summed = torch.zeros((), device=learner.base.device)
        for batch in batches:
            with autocast:
                loss = engine(batch.to(learner.base.device))
            summed += loss.detach()
            # DeepSpeed averages over ranks: times the ranks, over all ranks' targets, is the mean over targets.
            engine.backward(loss * (ranks / tokens_on.item()), scale_wrt_gas=False)
            engine.step()
        dist.all_reduce(summed)
        skipped = skipped + 1 if engine.optimizer.overflow else 0
        if skipped > SKIPPED_STEPS_AT_MOST:
            raise RuntimeError(f"{skipped} steps in a row had no finite gradient: lower the learning rate, or train in fp32")
        losses, targets = losses + summed.item(), targets + int(tokens_on.item())
        window, offset = _furthest(
            table.column("window").to_pylist()[-1], table.column("offset").to_pylist()[-1], learner.base.device
        )
        state.update(step=state["step"] + 1, global_step=state["global_step"] + 1, window=window, offset=offset + 1)
        done, run = state["global_step"], recipe.run
        metrics: dict[str, Any] = {"stage": stage.name, "step": done, "learning_rate": stage.rate(state["step"] - 1)}
        if done % run.log_every_steps == 0 or state["step"] == stage.steps:
            seconds = time.monotonic() - started
            metrics |= {
                "loss": losses / targets,
                "targets_per_s": targets / seconds,
                "gradient_norm": float(engine.get_global_grad_norm()),
            }
            metrics |= {"skipped_in_a_row": skipped}
            started, losses, targets = time.monotonic(), 0.0, 0
        if run.validation.corpus and (done % run.validation.every_steps == 0 or state["step"] == stage.steps):
            if dist.get_rank() == 0:
                metrics |= learner.validate(run.validation.corpus, run.validation.documents)
            started = time.monotonic()
        if len(metrics) > 3 and queue is not None and dist.get_rank() == 0:
            queue.put(metrics)
        if done % run.checkpoint_every_steps == 0 and state["step"] < stage.steps:
            _checkpoint(engine, learner, state, metrics)


def _batches(shard: Any, share: int, position: Position) -> Iterator[pa.Table]:
    """Tables of exactly `share` rows, from `position` on: a stream may start earlier than the checkpoint that was restored."""
    rest: pa.Table | None = None
    for table in shard.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=2):
        window, offset = table.column("window"), table.column("offset")
        new = pc.or_(
            pc.greater(window, position.window),
            pc.and_(pc.equal(window, position.window), pc.greater_equal(offset, position.offset)),
        )
        table = table.filter(new)
        rest = table if rest is None else pa.concat_tables([rest, table])
        while rest.num_rows >= share:
            yield rest.slice(0, share)
            rest = rest.slice(share)


def _agree(fine: bool, message: str) -> None:
    """Raises on every rank when one rank is not fine, so that none waits for another."""
    flag = torch.tensor(int(fine))
    if torch.cuda.is_available() and dist.get_backend() == "nccl":
        flag = flag.cuda()
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    if not flag.item():
        raise RuntimeError(message)


def _furthest(window: int, offset: int, device: torch.device) -> Position:
    """The last example that any rank used."""
    number = torch.tensor(window * 2**32 + offset, dtype=torch.int64, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return Position(*divmod(int(number.item()), 2**32))


def _checkpoint(engine: Any, learner: Learner, state: dict[str, int], metrics: dict[str, Any]) -> None:
    """Every rank takes part in gathering; rank 0 writes and reports. Ranks whose weights differ end the run."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _same_on_all_ranks(learner)
    gathered: dict[str, Tensor] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            values = {"weight": safe_get_full_fp32_param(parameter)}
            values |= {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            if dist.get_rank() == 0:
                gathered |= {f"{name}:{key}": value.detach().cpu().contiguous() for key, value in values.items()}
    if dist.get_rank() != 0:
        ray.train.report(metrics | state)
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        learner.save(directory / "model")
        save_file(gathered, directory / "optimiser.safetensors")
        (directory / "state.json").write_text(json.dumps(state | {"updates": _updates(engine)}))
        ray.train.report(metrics | state, checkpoint=ray.train.Checkpoint.from_directory(temporary))


def _same_on_all_ranks(learner: Learner) -> None:
    """Each rank must hold the weights that rank 0 saves, or gradients were not reduced somewhere (spec of SHINE, 4.2)."""
    trained = [parameter.detach().double() for parameter in learner.parameters() if parameter.requires_grad]
    sums = torch.stack([value for tensor in trained for value in (tensor.sum(), tensor.abs().sum())])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise RuntimeError("the ranks hold different weights: a parameter was left out of gradient reduction")


def _updates(engine: Any) -> int:
    """Optimiser updates so far: Adam's own count, which skipped steps do not raise."""
    states = engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states), default=0)


def _restore(engine: Any, learner: Learner, directory: Path) -> dict[str, int]:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    state: dict[str, int] = json.loads((directory / "state.json").read_text())
    stored = load_file(directory / "optimiser.safetensors")
    for moments in engine.optimizer.optimizer.state.values():
        moments["step"].fill_(state["updates"])
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(stored[f"{name}:weight"])
            safe_set_full_fp32_param(parameter, stored[f"{name}:weight"].to(parameter.device))
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, stored[f"{name}:{key}"].to(parameter.device), key)
    del state["updates"]
    return state

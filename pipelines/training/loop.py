"""The training loop of one rank: batches from Ray Data, one DeepSpeed engine (ZeRO 1), checkpoints to Ray Train.

In: a recipe as JSON values, through Ray Train. Out: metrics to `pipelines.training.reports`, checkpoints. A step's loss is the
sum over all supervised targets of the global batch divided by their number over all ranks; gradients are clipped by their global
norm; a step whose gradient is not finite on any rank is skipped on all of them, and too many in a row end the run.

The host waits for the device once a step, for what the ranks tell each other before it, and where DeepSpeed clips; a loss is read
only where it is logged.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from core.adapters.base_model import tokenizer_of
from core.training.examples import Batch, Example, collate
from pipelines.evaluation.asking import pad_id
from pipelines.training import checkpoints
from pipelines.training.checkpoints import State
from pipelines.training.feed import Span, position_after, span_of, to_examples
from pipelines.training.learner import Learner, learner_of
from pipelines.training.recipe import Recipe, read_recipe

SKIPPED_STEPS_AT_MOST = 20


class Refused(Exception):
    """Examples ended because too many rows were skipped: the process that started the run says so."""


def train_loop(config: dict[str, Any]) -> None:
    """What every rank runs: build or restore, then stage after stage.

    config: kind (a name in `RECIPES`), recipe (JSON values), checkpoints (a folder), reports (the actor). Data sets are called by
    the number of their stage; the first starts where the newest whole checkpoint ended.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    recipe = read_recipe(config["kind"], config["recipe"])
    if recipe.run.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.seed)
    learner = learner_of(recipe)
    engine = initialise(learner, recipe)
    state = _restored(engine, learner, Path(config["checkpoints"]))
    try:
        for number in range(state.stage, len(recipe.stages)):
            state = _run_stage(engine, learner, recipe, number, state, config["reports"]).next_stage()
    except Refused:
        return
    _checkpoint(engine, learner, state, {})


def initialise(learner: Learner, recipe: Recipe) -> Any:
    """A DeepSpeed engine over the learner; needs an initialised process group."""
    import deepspeed

    if recipe.run.device == "cpu":
        # On a CPU DeepSpeed would compile a shared-memory all-reduce for minutes; gloo does without. Its module is called torch,
        # and "import deepspeed.comm.torch as x" would bind the other one.
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    groups = learner.groups(recipe.optimiser.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=1e-9, betas=recipe.optimiser.betas, fused=True)
    share = recipe.optimiser.global_batch // dist.get_world_size()
    micro = recipe.run.micro_batch or share
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


def _restored(engine: Any, learner: Learner, folder: Path) -> State:
    """The state of the newest checkpoint that is whole to all ranks, which is loaded; that of a start where there is none."""
    found = checkpoints.newest(folder)
    step = torch.tensor(found[1].global_step if found else 0, device=learner.base.device)
    dist.all_reduce(step, op=dist.ReduceOp.MIN)
    if not step.item():
        return State()
    directory, state = checkpoints.at_step(folder, int(step.item()))
    checkpoints.restore(engine, learner, directory, state)
    return state


def _run_stage(engine: Any, learner: Learner, recipe: Recipe, number: int, state: State, reports: Any) -> State:
    stage, run, device = recipe.stages[number], recipe.run, learner.base.device
    share = recipe.optimiser.global_batch // dist.get_world_size()
    padding = pad_id(tokenizer_of(learner.base))
    shard = ray.train.get_dataset_shard(str(number))
    blocks = iter(shard.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=2))
    position, ended, in_a_row = state.position, True, 0
    since = _Since(device)
    while state.step < stage.steps:
        examples, spans, targets = _next_examples(blocks, share, device, reports)
        position, ended = position_after(position, ended, spans)
        rate = stage.rate(state.step)
        summed = train_step(
            engine, micro_batches(examples, run.micro_batch or share, padding, run.pad_to_multiple), targets, rate
        )
        state = state.stepped(position)
        if engine.optimizer.overflow:
            in_a_row += 1
        else:
            in_a_row = 0
            since.add(summed, targets, engine.get_global_grad_norm())
        if in_a_row > SKIPPED_STEPS_AT_MOST:
            raise RuntimeError(f"{in_a_row} steps in a row had no finite gradient: lower the learning rate, or train in fp32")
        done, last = state.global_step, state.step == stage.steps
        metrics: dict[str, Any] = {}
        if done % run.log_every_steps == 0 or last:
            metrics |= since.metrics() | {"skipped_in_a_row": in_a_row}
            since = _Since(device)
        if run.validation.corpus and (done % run.validation.every_steps == 0 or last):
            if dist.get_rank() == 0:
                metrics |= learner.validate(run.validation.corpus, run.validation.documents)
            since.started = time.monotonic()
        if metrics:
            metrics = {"stage": stage.name, "step": done, "learning_rate": rate} | metrics
            if dist.get_rank() == 0:
                ray.get(reports.put.remote(metrics))
        if done % run.checkpoint_every_steps == 0 and not last:
            _checkpoint(engine, learner, state, metrics)
    return state


def micro_batches(examples: Sequence[Example], rows: int, padding: int, multiple: int) -> list[Batch]:
    """A rank's share of a step, alike lengths together: less padding, and within a step the order means nothing."""
    by_length = sorted(examples, key=lambda example: len(example.ids))
    return [collate(by_length[i : i + rows], padding, multiple) for i in range(0, len(by_length), rows)]


def train_step(engine: Any, batches: Sequence[Batch], targets: int, rate: float) -> Tensor:
    """One optimiser step. targets: of all ranks together. Returns this rank's summed loss, on its device, in fp64."""
    device = engine.module.base.device
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    summed = torch.zeros((), device=device, dtype=torch.float64)
    for batch in batches:
        loss = engine(batch.to(device))
        summed += loss.detach()
        # DeepSpeed averages over ranks: times the ranks, over all ranks' targets, is the mean over targets.
        engine.backward(loss * (dist.get_world_size() / targets), scale_wrt_gas=False)
        engine.step()
    return summed


class _Since:
    """What steps gave since the last record, skipped ones left out."""

    def __init__(self, device: torch.device) -> None:
        self.started = time.monotonic()
        self._losses = torch.zeros((), device=device, dtype=torch.float64)
        self._targets = 0
        self._gradient_norm: Any = None

    def add(self, summed: Tensor, targets: int, gradient_norm: Any) -> None:
        self._losses += summed
        self._targets += targets
        self._gradient_norm = gradient_norm

    def metrics(self) -> dict[str, float]:
        """Mean loss of a target over all ranks, speed, and the last step's norm; nothing where every step was skipped."""
        dist.all_reduce(self._losses)
        if not self._targets:
            return {}
        seconds = time.monotonic() - self.started
        return {
            "loss": self._losses.item() / self._targets,
            "targets_per_s": self._targets / seconds,
            "gradient_norm": float(self._gradient_norm),
        }


class _Told(NamedTuple):
    """What a rank tells the others before a step, as integers."""

    fine: int
    targets: int
    first_window: int = 0
    first_offset: int = 0
    last_window: int = 0
    last_offset: int = 0
    last: int = 0

    @property
    def span(self) -> Span:
        return Span(*self[2:6], bool(self.last))


def _next_examples(
    blocks: Iterator[pa.Table], share: int, device: torch.device, reports: Any
) -> tuple[list[Example], list[Span], int]:
    """This rank's examples of a step, where those of all ranks stand, and the targets of all ranks together.

    When one rank has no block, all stop: with `Refused` where too many rows were skipped, else with `RuntimeError`.
    """
    block, fault = None, None
    try:
        block = next(blocks, None)
    except ray.exceptions.RayError as error:
        fault = error
    whole = block is not None and block.num_rows == share
    examples = to_examples(block) if whole else []
    own = _Told(1, sum(example.tokens for example in examples), *map(int, span_of(block))) if whole else _Told(0, 0)
    everyone = [torch.zeros(len(own), dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, torch.tensor(own, device=device))
    told = [_Told(*row) for row in torch.stack(everyone).tolist()]
    if not all(rank.fine for rank in told):
        if ray.get(reports.refusal.remote()):
            raise Refused
        if fault is None:
            raise RuntimeError("the corpus ended before the stage did: it gave fewer examples than planned")
        raise RuntimeError(f"the corpus could not be read: {_root(fault)}") from fault
    return examples, [rank.span for rank in told], sum(rank.targets for rank in told)


def _root(error: BaseException) -> str:
    """What Ray wrapped, in one line."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    return " ".join(f"{type(error).__name__}: {error}".split())


def _checkpoint(engine: Any, learner: Learner, state: State, metrics: dict[str, Any]) -> None:
    """Every rank takes part in gathering; rank 0 writes and reports."""
    with tempfile.TemporaryDirectory() as temporary:
        state = checkpoints.write(engine, learner, state, Path(temporary))
        whole = ray.train.Checkpoint.from_directory(temporary) if dist.get_rank() == 0 else None
        ray.train.report(metrics | state.model_dump(), checkpoint=whole)

"""Steps of a rank without Ray: one DeepSpeed engine in this process, on a group of one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from core.shine.hypernetwork import HypernetworkSettings
from core.training.examples import Batch, Example
from pipelines.training import checkpoints
from pipelines.training.checkpoints import State
from pipelines.training.feed import Position
from pipelines.training.learner import learner_of
from pipelines.training.loop import _Since, initialise, micro_batches, train_step
from pipelines.training.recipe import Architecture, BaseRecipe, HypernetworkRecipe, PreLiftRecipe, Recipe, TrainingRecipe
from tests.models import random_ids, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steps")
    write_world(root, documents=2, rows_per_group=2)
    return root


@pytest.fixture(scope="module", autouse=True)
def group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("group") / "store"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def recipe(world: Path, kind: type[TrainingRecipe] = HypernetworkRecipe, **changes: Any) -> Recipe:
    values: dict[str, Any] = {"feed": {"corpus": ()}, "stages": (), "optimiser": {"global_batch": 4}, "run": {"micro_batch": 2}}
    match kind.__name__:
        case "BaseRecipe":
            shape = Architecture(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, head_dim=16, feed_forward=64)
            values |= {"tokenizer": str(world / "base"), "architecture": shape}
        case "HypernetworkRecipe":
            settings = HypernetworkSettings(rank=2, meta_rank=2, num_layers=2, num_heads=2, feed_forward=32, input_norm="rms")
            values |= {"base": str(world / "base"), "hypernetwork": settings}
        case "PreLiftRecipe":
            values |= {"base": str(world / "base"), "adapter": {"kind": "lora", "rank": 2}}
    made: Any = kind.model_validate(values | changes)
    return made


def examples(context_tokens: int = 9) -> list[Example]:
    ids = [tuple(row.tolist()) for row in random_ids(4, 14)]
    return [Example(row[:context_tokens], row, row) for row in ids]


def batches() -> list[Batch]:
    return micro_batches(examples(), 2, 0, 1)


def step(engine: Any, rate: float = 1e-2) -> torch.Tensor:
    return train_step(engine, batches(), sum(example.tokens for example in examples()), rate)


@pytest.mark.parametrize("kind", [BaseRecipe, HypernetworkRecipe, PreLiftRecipe])
def test_linears_run_in_bf16_where_deepspeed_asks_about_autocast_as_on_cuda(
    world: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TrainingRecipe]
) -> None:
    """Without a device's name `torch.is_autocast_enabled` asks about CUDA, so on a CPU DeepSpeed sees no outer autocast."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device="cpu": asked(device))
    learner = learner_of(recipe(world, kind, precision="bf16"))
    engine = initialise(learner, recipe(world, kind, precision="bf16"))
    seen: set[torch.dtype] = set()
    linears = [*learner.base.linears.values(), *(m for m in learner.modules() if isinstance(m, nn.Linear))]
    for linear in linears:
        linear.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    step(engine)
    assert seen == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in learner.parameters() if parameter.requires_grad)


def test_a_checkpoint_keeps_what_the_learner_has_seen_and_steps_go_on_alike(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    learner = learner_of(recipe(world))
    engine = initialise(learner, recipe(world))
    for _ in range(2):
        step(engine)
    assert learner.trained_tokens == 9
    state = State(stage=1, step=2, global_step=2, window=3, offset=4)
    written = checkpoints.write(engine, learner, state, tmp_path / "checkpoint_a")
    after = step(engine)
    torch.manual_seed(1)
    other = learner_of(recipe(world))
    again = initialise(other, recipe(world))
    found = checkpoints.newest(tmp_path)
    assert found is not None
    directory, read = found
    assert read == written == state.model_copy(update={"updates": 2, "trained_tokens": 9})
    assert read.position == Position(3, 4)
    checkpoints.restore(again, other, directory, read)
    assert other.trained_tokens == 9
    assert abs(step(again) - after) < 1e-6


def test_damaged_checkpoints_are_passed_over_with_a_warning(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = learner_of(recipe(world))
    engine = initialise(learner, recipe(world))
    for number in range(1, 4):
        checkpoints.write(engine, learner, State(global_step=number), tmp_path / f"checkpoint_{number}")

    def newest() -> int:
        found = checkpoints.newest(tmp_path)
        return found[1].global_step if found else 0

    assert newest() == 3 and not caplog.records
    weights = tmp_path / "checkpoint_3" / checkpoints.OPTIMISER
    weights.write_bytes(weights.read_bytes()[:-1])
    assert newest() == 2
    assert "checkpoint_3 is damaged (optimiser.safetensors)" in caplog.text
    (tmp_path / "checkpoint_2" / "state.json").write_text('{"stage": 0,')
    assert newest() == 1
    (tmp_path / "checkpoint_1" / "model" / "hypernetwork.json").unlink()
    assert newest() == 0
    with pytest.raises(RuntimeError, match="another rank sees a checkpoint of step 2"):
        checkpoints.at_step(tmp_path, 2)


def test_a_skipped_step_is_not_in_the_record(world: Path) -> None:
    learner = learner_of(recipe(world))
    engine = initialise(learner, recipe(world))
    since = _Since(learner.base.device)
    fine = step(engine)
    assert not engine.optimizer.overflow
    since.add(fine, 52, engine.get_global_grad_norm())
    assert since.metrics()["loss"] == pytest.approx(fine.item() / 52)
    with torch.no_grad():
        next(learner.parameters()).fill_(float("nan"))
    assert not step(engine).isfinite() and engine.optimizer.overflow
    assert _Since(learner.base.device).metrics() == {}

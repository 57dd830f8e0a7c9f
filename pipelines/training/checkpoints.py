"""A training's state on disk, without pickles: written by rank 0, read by every rank, on as many ranks as there are then.

A checkpoint holds `model/` (what `save` of the learner writes), `optimiser.safetensors` (fp32 weights and moments by parameter,
gathered over ranks) and `state.json`: steps, the position in the data, the longest context, and the size of every other file. A
checkpoint whose files are not all there in full is damaged, and passed over for the one before. Knows nothing of Ray.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import NonNegativeInt, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config import Section
from pipelines.training.feed import Position
from pipelines.training.learner import Learner

log = logging.getLogger(__name__)

STATE, OPTIMISER, MODEL = "state.json", "optimiser.safetensors", "model"


class State(Section):
    """How far a run is: steps of the stage and of all, the next example, and what its learner has seen.

    updates: the optimiser's own count, which skipped steps do not raise.
    """

    stage: NonNegativeInt = 0
    step: NonNegativeInt = 0
    global_step: NonNegativeInt = 0
    window: NonNegativeInt = 0
    offset: NonNegativeInt = 0
    updates: NonNegativeInt = 0
    trained_tokens: NonNegativeInt | None = None

    @property
    def position(self) -> Position:
        return Position(self.window, self.offset)

    def stepped(self, position: Position) -> "State":
        """One step on; the next example is at `position`."""
        steps = {"step": self.step + 1, "global_step": self.global_step + 1}
        return self.model_copy(update=steps | position._asdict())

    def next_stage(self) -> "State":
        """At the begin of the stage that follows."""
        return self.model_copy(update={"stage": self.stage + 1, "step": 0} | Position()._asdict())


class _Written(State):
    files: dict[str, NonNegativeInt]


def newest(folder: Path) -> tuple[Path, State] | None:
    """The checkpoint of most steps that is whole, and its state; None where there is none. Warns of each damaged one."""
    whole = list(_whole(folder))
    return max(whole, key=lambda found: found[1].global_step, default=None)


def at_step(folder: Path, global_step: int) -> tuple[Path, State]:
    """A whole checkpoint of that step. Raises `RuntimeError` where there is none."""
    found = next((each for each in _whole(folder) if each[1].global_step == global_step), None)
    if found is None:
        raise RuntimeError(f"another rank sees a checkpoint of step {global_step} in {folder.name}, this one does not: share it")
    return found


def _whole(folder: Path) -> Iterator[tuple[Path, State]]:
    for directory in sorted(folder.glob("checkpoint_*")):
        try:
            written = _Written.model_validate_json((directory / STATE).read_bytes())
        except (OSError, ValidationError):
            log.warning("checkpoint %s is damaged (no readable %s): it is passed over for an earlier one", directory.name, STATE)
            continue
        damaged = [name for name, size in written.files.items() if _size(directory / name) != size]
        if damaged:
            log.warning("checkpoint %s is damaged (%s): it is passed over for an earlier one", directory.name, ", ".join(damaged))
            continue
        yield directory, State.model_validate(written.model_dump(exclude={"files"}))


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def write(engine: Any, learner: Learner, state: State, directory: Path) -> State:
    """Gathers a checkpoint on every rank, and writes it to `directory` on rank 0. Returns the state that was written.

    Raises `RuntimeError` on every rank where ranks hold different weights.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _check_same_on_all_ranks(learner)
    longest = torch.tensor(-1 if learner.trained_tokens is None else learner.trained_tokens, device=learner.base.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    learner.trained_tokens = None if longest.item() < 0 else int(longest.item())
    state = state.model_copy(update={"updates": _updates(engine), "trained_tokens": learner.trained_tokens})
    gathered: dict[str, Tensor] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            values = {"weight": safe_get_full_fp32_param(parameter)}
            values |= {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            if dist.get_rank() == 0:
                gathered |= {f"{name}:{key}": value.detach().cpu().contiguous() for key, value in values.items()}
    if dist.get_rank() == 0:
        learner.save(directory / MODEL)
        save_file(gathered, directory / OPTIMISER)
        files = {str(file.relative_to(directory)): file.stat().st_size for file in directory.rglob("*") if file.is_file()}
        (directory / STATE).write_text(_Written(**state.model_dump(), files=files).model_dump_json())
    return state


def restore(engine: Any, learner: Learner, directory: Path, state: State) -> None:
    """Weights, moments and counts of a whole checkpoint, into an engine of any number of ranks."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    stored = load_file(directory / OPTIMISER)
    for moments in engine.optimizer.optimizer.state.values():
        moments["step"].fill_(state.updates)
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(stored[f"{name}:weight"])
            safe_set_full_fp32_param(parameter, stored[f"{name}:weight"].to(parameter.device))
            for key in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(parameter, stored[f"{name}:{key}"].to(parameter.device), key)
    learner.trained_tokens = state.trained_tokens


def _check_same_on_all_ranks(learner: Learner) -> None:
    """Each rank must hold the weights that rank 0 saves, or gradients were not reduced somewhere (spec of SHINE, 4.2)."""
    trained = [parameter.detach().double() for parameter in learner.parameters() if parameter.requires_grad]
    sums = torch.stack([value for tensor in trained for value in (tensor.sum(), tensor.abs().sum())])
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise RuntimeError("the ranks hold different weights: a parameter was left out of gradient reduction")


def _updates(engine: Any) -> int:
    states = engine.optimizer.optimizer.state.values()
    return max((int(state["step"]) for state in states), default=0)

"""Training runs: Ray Train starts the ranks, Ray Data feeds them, and this process shows and records what they report.

In: a recipe (base, hypernetwork or pre-LIFT) and a run directory. Out, in that directory: `recipe.json` (resolved),
`metrics.jsonl`, `tensorboard/`, `checkpoints/` (Ray Train's), and at the end `model/`, what `load_base`, `Hypernetwork.load` or
`core.adapters.files.load` reads. Calling it again with the same directory goes on where the last checkpoint ended; a finished run
is not trained again. Needs an initialised Ray.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Empty, Queue
from torch.utils.tensorboard import SummaryWriter

from core.config import fingerprint, write_resolved
from pipelines.training.feed import Position, dataset, plan, row_groups
from pipelines.training.learner import train_loop
from pipelines.training.recipe import BaseRecipe, HypernetworkRecipe, Recipe, kind_of

Observer = Callable[[dict[str, Any]], None]
CHECKPOINTS = "checkpoints"


def train(recipe: Recipe, run_directory: Path, observer: Observer | None = None) -> Path:
    """Runs or resumes a training and returns the directory of the trained model.

    observer: called with every metrics record, in this process. Raises `ValueError` when the directory holds a run of another
    recipe, or when recipe and corpus do not fit; `RuntimeError` when training fails.
    """
    run_directory = run_directory.resolve()
    model = run_directory / "model"
    _claim(recipe, run_directory)
    if model.exists():
        return model
    total_steps = sum(stage.steps for stage in recipe.stages)
    if not total_steps:
        raise ValueError("the recipe has no stages: there is nothing to train")
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "kind": kind_of(recipe),
            "recipe": _for_workers(recipe).model_dump(mode="json"),
            "queue": (queue := Queue(actor_options={"num_cpus": 0})),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=recipe.run.workers,
            use_gpu=recipe.run.device == "cuda",
            resources_per_worker={"CPU": 1, **({"GPU": 1} if recipe.run.device == "cuda" else {})},
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=str(run_directory),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe.run.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=recipe.run.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if recipe.run.device == "cuda" else "gloo"),
        datasets=_datasets(_for_workers(recipe), run_directory / CHECKPOINTS),
        dataset_config=ray.train.DataConfig(execution_options=_in_order(), enable_shard_locality=False),
    )
    recorder = _Recorder(queue, run_directory, observer)
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise RuntimeError(f"training failed; the last checkpoint is kept, run the same command to go on: {error}") from error
    finally:
        recorder.close()
        queue.shutdown()
    assert result.checkpoint is not None, "the last step always reports a checkpoint"
    with result.checkpoint.as_directory() as directory:
        unfinished = run_directory / "model.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(Path(directory) / "model", unfinished)
        os.replace(unfinished, model)
    return model


def _claim(recipe: Recipe, run_directory: Path) -> None:
    """Writes the resolved recipe, or makes sure that the run found there is of the same one."""
    path = run_directory / "recipe.json"
    if path.exists():
        known = type(recipe).model_validate_json(path.read_text())
        if fingerprint(known) != fingerprint(recipe):
            raise ValueError(f"{run_directory} holds a run of another recipe: choose another directory, or delete this one")
    else:
        write_resolved(recipe, path)


def _for_workers(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute: workers run in another directory."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).resolve()) if name is not None and Path(name).exists() else name

    validation = recipe.run.validation
    run = recipe.run.model_copy(update={"validation": validation.model_copy(update={"corpus": absolute(validation.corpus)})})
    names = ["tokenizer"] if isinstance(recipe, BaseRecipe) else ["base"]
    names += ["start_from"] if isinstance(recipe, HypernetworkRecipe) else []
    return recipe.model_copy(update={"run": run} | {name: absolute(getattr(recipe, name)) for name in names})


def _in_order() -> "ray.data.ExecutionOptions":
    return ray.data.ExecutionOptions(preserve_order=True)


def _datasets(recipe: Recipe, checkpoints: Path) -> dict[str, Any]:
    """One stream a stage, named by its number; stages that are over get none.

    Ray may register the newest checkpoint or the one before, so streams start at the older and ranks skip what they know.
    """
    tokenizer = recipe.tokenizer if isinstance(recipe, BaseRecipe) else recipe.base
    groups = row_groups(recipe.feed.corpus)
    begun, position = _safe_start(checkpoints)
    streams = {}
    for number, stage in enumerate(recipe.stages):
        if number < begun:
            continue
        start = position if number == begun else Position()
        documents = stage.steps * recipe.optimiser.global_batch
        # A packed group holds several texts, of which a template takes 11 tokens or more each; a composed one names its most.
        packed = recipe.feed.pack_tokens // 12 if "pretraining" in stage.tasks else 1
        documents *= max(1, packed, recipe.feed.composed_documents[1] if "composed" in stage.tasks else 1)
        windows = plan(groups, recipe.feed, stage.name, documents + documents // 10)
        share = recipe.optimiser.global_batch // recipe.run.workers
        streams[str(number)] = dataset(windows, recipe.feed, stage.name, dict(stage.tasks), tokenizer, share, start)
    return streams


def _safe_start(checkpoints: Path) -> tuple[int, Position]:
    """Stage and position of the second newest checkpoint, from which no checkpoint that Ray may restore lies behind."""
    fs, path = fsspec.core.url_to_fs(str(checkpoints))
    states = sorted((json.loads(fs.cat_file(file)) for file in fs.glob(f"{path}/*/state.json")), key=lambda s: s["global_step"])
    if len(states) < 2:
        return 0, Position()
    return states[-2]["stage"], Position(states[-2]["window"], states[-2]["offset"])


class _Recorder:
    """Takes metrics off the queue in a thread: JSON lines, TensorBoard, observer."""

    def __init__(self, queue: Queue, run_directory: Path, observer: Observer | None) -> None:
        self._queue = queue
        self._observer = observer
        self._lines = (run_directory / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(run_directory / "tensorboard"))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._record(self._queue.get(timeout=0.5))
            except Empty:
                if self._closing.is_set():
                    return
            except ray.exceptions.RayActorError:
                return

    def _record(self, metrics: dict[str, Any]) -> None:
        self._lines.write(json.dumps(metrics) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, metrics["step"])
        if self._observer is not None:
            self._observer(metrics)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=10)
        self._lines.close()
        self._board.close()

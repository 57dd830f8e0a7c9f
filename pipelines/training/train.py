"""Training runs: Ray Train starts the ranks, Ray Data feeds them, and this process shows and records what they report.

In: a recipe (base, hypernetwork or pre-LIFT) and a run directory. Out, in that directory: `recipe.json` (resolved),
`metrics.jsonl`, `skipped.jsonl` (rows of the corpus that gave no example), `tensorboard/`, `checkpoints/` (Ray Train's), and at
the end `model/`, what `load_base`, `Hypernetwork.load` or `core.adapters.files.load` reads. Calling it again with the same
directory goes on where the last whole checkpoint ended, and so does a restart after a failed rank; a finished run is not trained
again. Needs an initialised Ray.
"""

import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from pydantic import ValidationError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from transformers import AutoTokenizer

from core.config import fingerprint, write_resolved
from core.training.pretraining import Packer
from pipelines.training import checkpoints
from pipelines.training.checkpoints import State
from pipelines.training.feed import Position, dataset, plan, row_groups
from pipelines.training.loop import train_loop
from pipelines.training.recipe import BaseRecipe, HypernetworkRecipe, Recipe, kind_of
from pipelines.training.recording import Observer, Recorder, known_skips
from pipelines.training.reports import start_reports
from pipelines.training.windows import RowGroup

CHECKPOINTS = "checkpoints"


def train(recipe: Recipe, run_directory: Path, observer: Observer | None = None) -> Path:
    """Runs or resumes a training and returns the directory of the trained model.

    observer: called with every metrics record, in this process. Raises `ValueError` when the directory holds a run of another
    recipe, when recipe and corpus do not fit, or when more rows of the corpus are no use than the recipe allows; `RuntimeError`
    when training fails.
    """
    recipe = type(recipe).model_validate(recipe.model_dump())
    run_directory = run_directory.resolve()
    model = run_directory / "model"
    _claim(recipe, run_directory)
    if model.exists():
        return model
    if not recipe.stages:
        raise ValueError("the recipe has no stages: there is nothing to train")
    run, groups, kept = recipe.run, row_groups(recipe.feed.corpus), run_directory / CHECKPOINTS
    documents = sum(group.documents for group in groups)
    reports = start_reports(documents, run.max_skipped_share, known_skips(run_directory))
    absolute = _for_workers(recipe)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "kind": kind_of(recipe),
            "recipe": absolute.model_dump(mode="json"),
            "checkpoints": str(kept),
            "reports": reports,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.workers,
            use_gpu=run.device == "cuda",
            resources_per_worker={"CPU": 1, **({"GPU": 1} if run.device == "cuda" else {})},
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=str(run_directory),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if run.device == "cuda" else "gloo"),
        # Ray calls them anew for every start of the ranks, so a restarted stream begins where its checkpoint ended.
        datasets={str(number): partial(_stream, absolute, groups, number, kept, reports) for number in range(len(recipe.stages))},
        dataset_config=ray.train.DataConfig(execution_options=_in_order(), enable_shard_locality=False),
    )
    checkpoints.newest(kept)  # warns, here where a person sees it, of damaged ones
    recorder = Recorder(reports, run_directory, observer)
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise RuntimeError(f"{_reason(error)} (the last checkpoint is kept: run the same command to go on)") from error
    finally:
        recorder.close()
        refusal = ray.get(reports.refusal.remote())
        ray.kill(reports)
    if refusal:
        raise ValueError(refusal)
    assert result.checkpoint is not None, "the last step always reports a checkpoint"
    with result.checkpoint.as_directory() as directory:
        unfinished = run_directory / "model.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(Path(directory) / "model", unfinished)
        os.replace(unfinished, model)
    return model


def _reason(error: TrainingFailedError) -> str:
    """What the ranks died of, without their tracebacks."""
    if not isinstance(error, WorkerGroupError):
        return f"training failed: {error}"
    lines = dict.fromkeys(str(failure).strip().splitlines()[-1] for failure in error.worker_failures.values())
    return f"training failed: {'; '.join(lines)}"


def _claim(recipe: Recipe, run_directory: Path) -> None:
    """Writes the resolved recipe, or makes sure that the run found there is of the same one."""
    path = run_directory / "recipe.json"
    if path.exists():
        try:
            known = fingerprint(type(recipe).model_validate_json(path.read_text()))
        except ValidationError:
            known = "of another kind"
        if known != fingerprint(recipe):
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


def _stream(recipe: Recipe, groups: Sequence[RowGroup], number: int, kept: Path, reports: Any) -> "ray.data.Dataset":
    """The examples of a stage, from where the newest whole checkpoint left it."""
    found = checkpoints.newest(kept)
    state = found[1] if found else State()
    stage, feed = recipe.stages[number], recipe.feed
    tokenizer = recipe.tokenizer if isinstance(recipe, BaseRecipe) else recipe.base
    documents = stage.steps * recipe.optimiser.global_batch * _documents_of_an_example(recipe, number, tokenizer)
    windows = plan(groups, feed, stage.name, math.ceil(1.1 * documents / (1 - recipe.run.max_skipped_share)))
    share = recipe.optimiser.global_batch // recipe.run.workers
    start = state.position if number == state.stage else Position()
    return dataset(windows, feed, stage.name, dict(stage.tasks), tokenizer, share, start, reports)


def _documents_of_an_example(recipe: Recipe, number: int, tokenizer: str) -> int:
    """At most."""
    tasks, feed = recipe.stages[number].tasks, recipe.feed
    most = [1]
    if "pretraining" in tasks and feed.pack_tokens:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        most.append(Packer(loaded, feed.pack_tokens, feed.limits, feed.instructions, feed.pretraining).most_together())
    if "composed" in tasks:
        most.append(feed.composed_documents[1])
    return max(most)

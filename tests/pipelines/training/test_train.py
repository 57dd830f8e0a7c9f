"""Training on real Ray Train, Ray Data and DeepSpeed: ranks agree, kills leave no trace, released faults are absent."""

import json
import os
import random
import signal
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from core.adapters.base_model import load_base
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.text.prompts import encode
from pipelines.training.learner import HypernetworkLearner
from pipelines.training.recipe import Architecture, BaseRecipe, HypernetworkRecipe, Optimiser, Run, Stage, Validation
from pipelines.training.tasks import Feed
from pipelines.training.train import train
from pipelines.world.documents import WorldSpec, generate, write
from tests.conversion import tiny_recipe
from tests.models import write_world

STEPS = 50


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus, a validation corpus and a tiny random base with its tokenizer."""
    root = tmp_path_factory.mktemp("world")
    write_world(root, documents=300, rows_per_group=50)
    write(generate(WorldSpec(split="validation", count=4)), root / "validation")
    return root


def recipe(world: Path, workers: int = 1, **changes: object) -> HypernetworkRecipe:
    values = {
        "base": str(world / "base"),
        "hypernetwork": HypernetworkSettings(
            rank=2, meta_rank=4, num_layers=2, num_heads=2, feed_forward=64, scale=1e-2, input_norm="layer"
        ),
        "feed": Feed(corpus=(str(world / "train"),), shuffle_documents=100, max_questions=2),
        "optimiser": Optimiser(global_batch=8),
        "stages": (
            Stage(name="pretraining", tasks={"pretraining": 1.0}, steps=STEPS // 2, learning_rate=3e-3, decay="constant"),
            Stage(name="questions", tasks={"questions": 1.0}, steps=STEPS // 2, learning_rate=1e-3),
        ),
        "run": Run(workers=workers, threads=1, micro_batch=4, log_every_steps=1, checkpoint_every_steps=5, max_failures=1),
    }
    return HypernetworkRecipe.model_validate(values | changes)


def losses(records: list[dict]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def single(ray_local, world, tmp_path_factory):
    """An uninterrupted run on one worker: its directory and its metrics."""
    run = tmp_path_factory.mktemp("single")
    records: list[dict] = []
    validation = Validation(corpus=str(world / "validation"), documents=4, every_steps=25)
    train(recipe(world, run=recipe(world).run.model_copy(update={"validation": validation})), run, records.append)
    return run, records


def test_a_run_trains_validates_and_records(single, world):
    run, records = single
    curve = losses(records)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS // 2] < curve[1] - 0.2
    assert [record["step"] for record in records if "exact_match" in record] == [25, 50]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [r["step"] for r in records]
    assert list((run / "tensorboard").glob("events*"))
    resolved = json.loads((run / "recipe.json").read_text())
    assert resolved["optimiser"]["weight_decay"] == 0.01
    base = load_base(world / "base")
    torch.manual_seed(0)
    before = Hypernetwork(base, recipe(world).hypernetwork)
    after = Hypernetwork.load(run / "model", base)
    for name, parameter in after.named_parameters():
        moved = (parameter - dict(before.named_parameters())[name]).abs().max()
        assert moved > 1e-4, f"{name} did not train"
    lengths = sorted(len(encode(base.tokenizer, document.text)) for document in generate(WorldSpec(count=300)))
    assert lengths[200] < after.trained_tokens <= lengths[-1]


def test_a_finished_run_is_not_trained_again(ray_local, single, world):
    run, _ = single
    again: list[dict] = []
    assert train(recipe(world), run, again.append) == run / "model"
    assert not again
    with pytest.raises(ValueError, match="another recipe"):
        train(recipe(world, seed=1), run)


def test_two_workers_follow_one(ray_local, single, world, tmp_path):
    records: list[dict] = []
    train(recipe(world, workers=2), tmp_path, records.append)
    one, two = losses(single[1]), losses(records)
    assert one.keys() == two.keys()
    assert max(abs(one[step] - two[step]) for step in one) < 1e-3
    first, second = (load_file(directory / "model" / "hypernetwork.safetensors") for directory in (single[0], tmp_path))
    for name in ("memory_MH", "meta_1N"):
        assert torch.allclose(first[name], second[name], atol=1e-3), name


def test_a_killed_run_goes_on_as_if_nothing_had_happened(ray_local, single, world, tmp_path):
    """Its newest checkpoint is damaged, too: the one before serves, and the stream begins where that ended."""
    fatal = random.Random(os.getpid()).randint(12, STEPS - 5)
    records: list[dict] = []
    killed: list[int] = []

    def watch(metrics: dict) -> None:
        records.append(metrics)
        if metrics["step"] >= fatal and not killed:
            killed.extend(worker.pid for worker in train_workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

            newest = max(
                (tmp_path / "checkpoints").glob("checkpoint_*/state.json"),
                key=lambda file: json.loads(file.read_text())["global_step"],
            )
            weights = newest.with_name("optimiser.safetensors")
            weights.write_bytes(weights.read_bytes()[:1000])

    train(recipe(world), tmp_path, watch)
    assert killed, "no training worker was found to kill"
    steps = [record["step"] for record in records]
    assert steps != sorted(set(steps)) or len(steps) > STEPS or fatal % 5 == 0, "the run was not interrupted"
    one, resumed = losses(single[1]), losses(records)
    assert max(abs(one[step] - resumed[step]) for step in one) < 1e-3, f"killed at {fatal}"
    base = load_base(world / "base")
    before, after = (Hypernetwork.load(run / "model", base).trained_tokens for run in (single[0], tmp_path))
    assert before == after


def train_workers() -> list[psutil.Process]:
    """Rank processes of this session's Ray, which name themselves."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid in mine and any("RayTrainWorker" in word for word in process.info["cmdline"] or [])
    ]


def test_a_base_trains_from_nothing(ray_local, world, tmp_path):
    tasks = {"in_context": 0.4, "copying": 0.3, "recitation": 0.1, "question_only": 0.1, "plain_text": 0.1}
    base_recipe = BaseRecipe(
        tokenizer=str(world / "base"),
        architecture=Architecture(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, head_dim=16, feed_forward=64),
        feed=Feed(corpus=(str(world / "train"),), shuffle_documents=100),
        stages=(Stage(name="reading", tasks=tasks, steps=12, learning_rate=3e-3, decay="cosine"),),
        optimiser=Optimiser(global_batch=8, betas=(0.9, 0.98)),
        run=Run(threads=1, log_every_steps=1, checkpoint_every_steps=100),
    )
    records: list[dict] = []
    model = train(base_recipe, tmp_path / "run", records.append)
    curve = losses(records)
    assert curve[12] < curve[1]
    trained = load_base(model)
    assert trained.tokenizer is not None and trained.tokenizer.chat_template
    assert trained.model.config.tie_word_embeddings


def test_a_bad_step_is_skipped_on_every_rank_and_a_bad_recipe_is_refused(ray_local, world, tmp_path):
    with pytest.raises(ValueError, match="imprint world"):
        train(recipe(world, feed=Feed(corpus=(str(tmp_path / "nothing"),))), tmp_path / "a")
    broken = recipe(
        world,
        workers=2,
        stages=(Stage(name="pretraining", tasks={"pretraining": 1.0}, steps=40, learning_rate=1e30, decay="constant"),),
        run=recipe(world, workers=2).run.model_copy(update={"max_failures": 0}),
    )
    with pytest.raises(RuntimeError, match="no finite gradient"):
        train(broken, tmp_path / "b")
    records = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1]["skipped_in_a_row"] > 1 and "loss" not in records[-1]


def test_a_corpus_with_too_many_bad_rows_is_refused_by_name(ray_local, world, tmp_path):
    rows = [{"text": f"Town {number} has ships." if number % 10 else None} for number in range(60)]
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus" / "towns.parquet", row_group_size=20)
    stages = (Stage(name="pretraining", tasks={"pretraining": 1.0}, steps=20, learning_rate=1e-3),)
    feed = Feed(corpus=(str(tmp_path / "corpus"),), shuffle_documents=20)
    with pytest.raises(ValueError, match=r"of 60 documents cannot be trained on.*towns\.parquet#\d*0: it has no text"):
        train(recipe(world, feed=feed, stages=stages), tmp_path / "run")
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert skipped and all(each["row"] % 10 == 0 for each in skipped)


def test_training_goes_on_from_weights_of_its_shape_under_another_composition(tmp_path):
    models = tiny_recipe(tmp_path)
    settings = Hypernetwork.load(models.hypernetwork, load_base(models.base)).settings
    assert settings.composition == "mean"

    def begun(**changes: object) -> Hypernetwork:
        values = {"base": models.base, "start_from": models.hypernetwork, "feed": {"corpus": ()}, "stages": ()}
        shape = settings.model_copy(update=changes)
        return HypernetworkLearner(HypernetworkRecipe.model_validate({**values, "hypernetwork": shape})).hypernetwork

    summing = begun(composition="sum")
    assert summing.settings.composition == "sum"
    assert summing.fingerprint() == begun().fingerprint(), "the same weights"
    with pytest.raises(ValueError, match="write the same under"):
        begun(rank=3)

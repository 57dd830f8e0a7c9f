"""Pre-LIFT: its tasks, an adapter that LIFT starts from, and a base with the adapter in its weights."""

import json

import pytest
import torch
from pydantic import ValidationError

from core.adapters import files as adapter_files
from core.adapters.base_model import load_base
from core.adapters.gated_memory import initial
from core.adapters.lora import LoraWeights, attach, merged
from core.lift.course import Curriculum
from core.lift.course import Stage as LiftStage
from core.lift.forms import AdapterSettings
from core.lift.settings import LiftSettings, OptimiserSettings
from core.lift.trainer import Job, train
from pipelines.training import train as training
from pipelines.training.feed import plan, row_groups
from pipelines.training.recipe import Optimiser, PreLiftRecipe, Run, Stage
from pipelines.training.tasks import Feed
from pipelines.training.windows import window_examples
from pipelines.world.documents import WorldSpec, generate
from pipelines.world.tokenizer import build_tokenizer
from tests.models import write_world

TASKS = {"segments": 0.4, "contextualised": 0.2, "timeline": 0.1, "question_only": 0.3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("pre-lift")
    write_world(root, documents=120, rows_per_group=40)
    return root


def recipe(world, **changes):
    values = {
        "base": str(world / "base"),
        "adapter": AdapterSettings(kind="lora", rank=2),
        "feed": Feed(corpus=(str(world / "train"),), shuffle_documents=100),
        "optimiser": Optimiser(global_batch=8, weight_decay=0.0),
        "stages": (Stage(name="lift", tasks=TASKS, steps=20, learning_rate=1e-2, decay="constant"),),
        "run": Run(threads=1, log_every_steps=1, checkpoint_every_steps=10),
    }
    return PreLiftRecipe.model_validate(values | changes)


def test_its_tasks_show_no_document_before_a_question_and_are_drawn_from_the_document(world):
    feed = recipe(world).feed
    groups = plan(row_groups(feed.corpus), feed, "s", 80)[0]
    tokenizer = build_tokenizer()
    for task in TASKS:
        examples = window_examples(groups, feed, "s", 0, {task: 1.0}, tokenizer).examples
        assert len(examples) == sum(group.documents for group in groups)
        assert not any(example.context_ids for example in examples)
        assert examples == window_examples(groups, feed, "s", 0, {task: 1.0}, tokenizer).examples
    segments = window_examples(groups, feed, "s", 0, {"segments": 1.0}, tokenizer).examples
    assert all(example.labels == example.ids for example in segments)


def test_lift_starts_from_what_many_documents_taught(ray_local, world, tmp_path):
    records = []
    directory = training.train(recipe(world), tmp_path, records.append)
    curve = [record["loss"] for record in records if "loss" in record]
    assert curve[-1] < curve[0] - 0.3
    base = load_base(world / "base")
    adapter = adapter_files.load(directory, base)
    assert adapter.spec == base.spec(2) and adapter.flat_BN.abs().sum() > 0
    settings = LiftSettings(
        adapter=AdapterSettings(kind="lora", rank=4),
        optimiser=OptimiserSettings(learning_rate=1e-4),
        curriculum=Curriculum(stages=(LiftStage(name="s", epochs=1, tasks=("segments",)),)),
    )
    [unseen] = generate(WorldSpec(split="test", count=1))
    plain, started = (next(train(base, [Job("d", unseen.text, start=start)], settings)) for start in (None, adapter))
    assert started.losses[0] < plain.losses[0] - 0.3


def test_a_new_base_holds_the_adapter_in_its_weights(ray_local, world, tmp_path):
    both = {}
    for result in ("adapter", "base"):
        both[result] = training.train(recipe(world, result=result), tmp_path / result)
    base, new = load_base(world / "base"), load_base(both["base"])
    assert new.fingerprint != base.fingerprint and new.tokenizer is not None
    ids_BT = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    with attach(base, adapter_files.load(both["adapter"], base)):
        expected = base.model(input_ids=ids_BT).logits
    assert torch.allclose(new.model(input_ids=ids_BT).logits, expected, atol=1e-5)


def test_merging_leaves_the_base_as_it_was(world):
    base = load_base(world / "base")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    weights = LoraWeights(base.spec(2), torch.randn(1, base.spec(2).numel) * 0.1)
    with merged(base, weights):
        assert not torch.equal(base.linears[0, "q"].weight, before["model.layers.0.self_attn.q_proj.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    with (
        pytest.raises(ValueError, match="compose them first"),
        merged(base, LoraWeights(base.spec(2), weights.flat_BN.repeat(2, 1))),
    ):
        pass


def test_adapter_files_carry_either_kind_and_refuse_what_does_not_fit(world, tmp_path):
    base = load_base(world / "base")
    memory = initial(base, "released", torch.Generator().manual_seed(0))
    adapter_files.save(memory, base, tmp_path / "memory")
    again = adapter_files.load(tmp_path / "memory", base)
    assert again.spec == memory.spec and torch.equal(again.flat_BN, memory.flat_BN)
    described = json.loads((tmp_path / "memory" / "adapter.json").read_text())
    for change, message in (({"format": 9}, "format 9"), ({"base": "other"}, "another base")):
        (tmp_path / "memory" / "adapter.json").write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            adapter_files.load(tmp_path / "memory", base)
    with pytest.raises(ValueError, match=r"no adapter\.json"):
        adapter_files.load(tmp_path, base)


def test_a_gated_memory_cannot_become_part_of_a_base(world):
    with pytest.raises(ValidationError, match="result = 'adapter'"):
        recipe(world, adapter=AdapterSettings(kind="gated_memory"), result="base")

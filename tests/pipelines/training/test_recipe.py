"""What a recipe may say is decided when it is read, not when ranks have started."""

from pathlib import Path
from typing import Any

import pytest

from core.config import fingerprint, load
from pipelines.training.recipe import RECIPES, Recipe

RECIPE_FILES = Path("pipelines/recipes")


def of(kind: str, tasks: dict[str, float], **changes: Any) -> Recipe:
    stage = {"name": "first", "tasks": tasks, "steps": 1, "learning_rate": 1e-3}
    values = {"feed": {"corpus": ["x"]}, "stages": [stage], ("tokenizer" if kind == "base" else "base"): "x", **changes}
    recipe: Any = load(RECIPES[kind], resolved=values)
    return recipe


@pytest.mark.parametrize(
    ("kind", "fits", "wrong"),
    [
        ("base", "in_context", "questions"),
        ("base", "plain_text", "pretraining"),
        ("hypernetwork", "composed", "question_only"),
        ("hypernetwork", "pretraining", "segments"),
        ("pre-lift", "segments", "composed"),
    ],
)
def test_tasks_that_a_model_cannot_be_trained_on_are_refused(kind: str, fits: str, wrong: str) -> None:
    assert of(kind, {fits: 1.0}).stages
    with pytest.raises(ValueError, match=f"stage 'first': .* cannot be trained on {wrong}, but on .*{fits}"):
        of(kind, {fits: 1.0, wrong: 1.0})


@pytest.mark.parametrize(
    ("batch", "run", "message"),
    [
        (2, {"workers": 3}, "global_batch 2 leaves some of run.workers 3 without an example"),
        (8, {"workers": 3}, "global_batch 8 is no multiple of run.workers 3: change"),
        (8, {"workers": 2, "micro_batch": 3}, "no multiple of run.workers 2 times run.micro_batch 3"),
    ],
)
def test_a_global_batch_divides_among_the_ranks(batch: int, run: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of("hypernetwork", {"questions": 1.0}, optimiser={"global_batch": batch}, run=run)
    assert of("hypernetwork", {"questions": 1.0}, optimiser={"global_batch": 6}, run={"workers": 3, "micro_batch": 2})


def test_what_changes_the_result_bears_identity_and_what_does_not_does_not() -> None:
    plain = of("hypernetwork", {"questions": 1.0})
    assert fingerprint(plain) != fingerprint(of("hypernetwork", {"questions": 1.0}, precision="bf16"))
    faster = {"workers": 2, "micro_batch": 2, "max_skipped_share": 0.5, "gradient_checkpointing": True}
    assert fingerprint(plain) == fingerprint(of("hypernetwork", {"questions": 1.0}, run=faster))


@pytest.mark.parametrize("path", sorted(RECIPE_FILES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_accepted(path: Path) -> None:
    kind = {"reference_base": "base", "reference_pre-lift": "pre-lift"}.get(path.stem, "hypernetwork")
    assert load(RECIPES[kind], path).stages

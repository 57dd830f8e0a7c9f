"""Recipes: TOML, overrides, messages, and what a fingerprint covers."""

import json
from pathlib import Path

import pytest
from pydantic import Field

from core.config import RunSection, Section, digest, fingerprint, identity, load, write_resolved


class Optimiser(Section):
    learning_rate: float = Field(default=1e-3, gt=0)
    steps: int = 10


class Run(RunSection):
    workers: int = 1
    device: str = "cpu"


class Recipe(Section):
    optimiser: Optimiser = Optimiser()
    name: str = "plain"
    sites: tuple[str, ...] = ("q", "v")
    run: Run = Run()


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_sparse_toml_then_overrides(tmp_path):
    path = recipe(tmp_path, 'name = "a"\n[optimiser]\nsteps = 5\n')
    loaded = load(Recipe, path, ["optimiser.learning_rate=1e-4", "run.workers = 8", 'sites=["q"]', "name=two words"])
    assert loaded == Recipe(optimiser=Optimiser(learning_rate=1e-4, steps=5), name="two words", sites=("q",), run=Run(workers=8))
    assert load(Recipe) == Recipe()


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load(Recipe).name = "other"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps = ", [], "is not TOML"),
        ("[optimiser]\nlr = 1\n", [], r"optimiser\.lr: Extra inputs are not permitted"),
        ("[optimiser]\nlearning_rate = -1\n", [], r"optimiser\.learning_rate: Input should be greater than 0"),
        ("", ["optimiser.steps=many"], r"optimiser\.steps: Input should be a valid integer"),
        ("", ["optimiser.steps"], "has no '='"),
        ("name = 'a'", ["name.first=b"], "name is a value, not a section"),
        ("optimiser = 3", [], "optimiser: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(Recipe, recipe(tmp_path, text), overrides)


def test_a_path_without_recipe(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ValueError, match="no recipe at"):
            load(Recipe, path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not TOML"):
        load(Recipe, tmp_path / "binary.toml")


def test_run_sections_bear_no_identity():
    here = Recipe()
    assert fingerprint(here) == fingerprint(Recipe(run=Run(workers=64, device="cuda")))
    assert "run" not in identity(here)
    for other in (Recipe(name="other"), Recipe(optimiser=Optimiser(steps=11)), Recipe(sites=("v", "q"))):
        assert fingerprint(other) != fingerprint(here)


def test_a_fingerprint_does_not_depend_on_how_it_was_written(tmp_path):
    path = recipe(tmp_path, "[optimiser]\nsteps = 10\nlearning_rate = 0.001\n")
    assert fingerprint(load(Recipe, path)) == fingerprint(Recipe())
    assert fingerprint(load(Recipe, None, ["optimiser.learning_rate=1e-3"])) == fingerprint(Recipe())
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})


def test_resolved_recipe_holds_every_value_and_reads_back(tmp_path):
    written = load(Recipe, None, ["run.workers=3"])
    path = tmp_path / "checkpoint" / "recipe.json"
    write_resolved(written, path)
    values = json.loads(path.read_text())
    assert values["run"] == {"workers": 3, "device": "cpu"} and values["optimiser"]["learning_rate"] == 1e-3
    assert Recipe.model_validate(values) == written

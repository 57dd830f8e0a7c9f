"""The recipe of a conversion: what is made, of what, and how fast.

Plain settings. Knows neither Ray nor stores.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from core.adapters.codec import Encoding
from core.config import RunSection, Section, load
from core.lift.writer import LiftRecipe
from core.questions.chat_endpoint import api_key
from core.writing.quality_gate import GateSettings
from core.writing.writer import WindowRule
from pipelines.conversion.pruning import PruneSettings
from pipelines.corpus.records import Reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ConvertRun(RunSection):
    """Where and how fast. The pool grows from `min_actors` to `actors`, each with `threads` torch threads (or a GPU, on `cuda`).

    buffer_documents: sorted by length and committed together. batch_rows, batch_tokens: most windows and padded tokens (memory
    included) of one forward pass. shard_bytes, commit_s: a commit is made once a buffer has written as much, or for so long.
    near_duplicates: whether they are reported (`pipelines.conversion.near_duplicates`).
    """

    min_actors: PositiveInt = 1
    actors: PositiveInt = 2
    threads: PositiveInt = 1
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    buffer_documents: PositiveInt = 128
    batch_rows: PositiveInt = 16
    batch_tokens: PositiveInt = 4096
    shard_bytes: PositiveInt = 256 * 2**20
    commit_s: PositiveFloat = 60.0
    near_duplicates: bool = True


class ConvertRecipe(Section):
    """What is made: by which method on which base (a directory or a name), for whom, in which encoding.

    hypernetwork: a directory; what writes the adapters, or what LIFT starts from where one is given. gate: of what a hypernetwork
    writes; LIFT asks its documents' own questions instead.
    """

    base: str
    method: Literal["shine", "lift"] = "shine"
    hypernetwork: str | None = None
    tenant: Annotated[str, Field(min_length=1)] = "default"
    collection: Annotated[str, Field(min_length=1)] = "default"
    encoding: Encoding = "bf16"
    windows: WindowRule = WindowRule()
    gate: GateSettings = GateSettings()
    lift: LiftRecipe = LiftRecipe()
    reading: Reading = Reading()
    prune: PruneSettings = PruneSettings()
    run: ConvertRun = ConvertRun()

    @model_validator(mode="after")
    def _complete(self) -> "ConvertRecipe":
        if self.method == "shine" and self.hypernetwork is None:
            raise ValueError("hypernetwork is missing: name the directory of one, or choose method lift")
        if self.method == "lift" and self.gate.share:
            raise ValueError("gate.share is for method shine: lifted adapters have their quality from lift.run.quality_questions")
        return self

    @property
    def one_each(self) -> bool:
        """`AdapterWriter.one_each` of what the recipe opens, before it is opened."""
        return self.method == "lift" or self.windows.one_each


def load_recipe(
    path: Path | None, method: str | None, base: str, hypernetwork: str | None, preset: str | None, changes: Iterable[str]
) -> ConvertRecipe:
    """A recipe with what the command line names; a recipe file names its base itself."""
    given = {"method": method, "base": None if path else base, "hypernetwork": hypernetwork, "lift.preset": preset}
    return load(ConvertRecipe, path, [*(f"{name}={value}" for name, value in given.items() if value is not None), *changes])


def checked(recipe: ConvertRecipe) -> ConvertRecipe:
    """With local paths that are the same in every process. On a local Ray, an endpoint's missing key is found here."""
    lift = recipe.lift
    if recipe.method == "lift" and lift.questions.endpoint is not None and "RAY_ADDRESS" not in os.environ:
        api_key(lift.questions.endpoint.run)
    places = {name: str(Path(place).resolve()) for name in ("base", "hypernetwork") if _is_local(place := getattr(recipe, name))}
    changes: dict[str, object] = {}
    if lift.pre_lift is not None:
        changes["pre_lift"] = str(Path(lift.pre_lift).resolve())
    if lift.run.scratch is not None:
        changes["run"] = lift.run.model_copy(update={"scratch": str(Path(lift.run.scratch).resolve())})
    return recipe.model_copy(update=places | {"lift": lift.model_copy(update=changes)})


def _is_local(name: str | None) -> bool:
    return name is not None and Path(name).exists()

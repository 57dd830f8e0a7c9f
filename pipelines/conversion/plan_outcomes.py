"""A plan of conversion beside what a run of it took, from the run's own figures; behind `imprint plan convert --run`.

In: a `ConvertPlan` and the figures of a run (`receipts.Summary.figures`); or the folder of a run
(`pipelines.conversion.run_files`), whose source is then planned anew, by the run's own recipe. Out: the plan, and the same plan
with what it took. Costs the planning (`pipelines.conversion.planning`) and two small objects of the run's folder.
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.planning.convert import ConvertPlan, actual
from pipelines.conversion.planning import load_run_recipe, plan_conversion
from pipelines.conversion.receipts import Summary
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from pipelines.conversion.run_files import read_run

FIGURES = "documents", "tokens", "adapters", "adapter_bytes", "shards", "convert_s"


def took(planned: ConvertPlan, figures: Mapping[str, Any], run: ConvertRun) -> ConvertPlan:
    """The plan with what a conversion took. Raises `ValueError` where it converted nothing."""
    documents: dict[str, int] = figures["documents"]
    return actual(
        planned,
        documents=documents.get("converted", 0),
        rejected=documents.get("rejected", 0),
        already=documents.get("unchanged", 0) + documents.get("shared", 0),
        tokens=figures["tokens"],
        adapters=figures["adapters"],
        adapter_bytes=figures["adapter_bytes"],
        shards=figures["shards"],
        hours=figures["convert_s"] / 3600,
        processes=run.actors,
        hardware="GPU" if run.device.startswith("cuda") else "CPU",
    )


def where_planned(summary: Summary, recipe: ConvertRecipe) -> list[str]:
    """A line that names the command which shows the plan; none where there is nothing to compare."""
    if recipe.method != "shine" or not summary.adapters:
        return []
    return [f"beside its plan: imprint plan convert --run {shlex.quote(summary.files)}"]


def plan_of_run(
    url: str, documents_per_s: str | None, prices: Path | None, gpus: int | None, changes: Iterable[str]
) -> tuple[ConvertPlan, ConvertPlan]:
    """The plan of a finished run's source as it is today, and that with what the run took; arguments as of `load_plan_recipe`.

    gpus: the run's own where none are given. Raises `ValueError` for a folder of no finished run, for one that an earlier version
    wrote without all `FIGURES`, for one that converted nothing, and as `plan_conversion` does.
    """
    started, figures = read_run(url)
    if lacking := [name for name in FIGURES if name not in figures]:
        raise ValueError(
            f"the run {url} was written by an earlier version, without {', '.join(lacking)}: name a run of this version, or plan "
            f"its source alone: `imprint plan convert {shlex.quote(started['source'])}`"
        )
    recipe = load_run_recipe(started["recipe"], documents_per_s, prices, gpus, changes)
    if not figures["adapters"]:
        counts = ", ".join(f"{count:,} {status}" for status, count in figures["documents"].items())
        raise ValueError(f"the run {url} converted no document ({counts}): name one that did")
    planned = plan_conversion(started["source"], recipe)
    return planned, took(planned, figures, recipe.run)

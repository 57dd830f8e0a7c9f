"""What `imprint convert`, `lift` and `plan` do, and how they say it. Ends a command with code 1 where nothing came of it."""

from collections.abc import Sequence
from pathlib import Path

import typer

from pipelines.conversion.convert import convert
from pipelines.conversion.plan_outcomes import plan_of_run, took, where_planned
from pipelines.conversion.plan_tables import plan_tables, taken_table
from pipelines.conversion.planning import load_plan_recipe, plan_conversion, plan_lifting, read_plan
from pipelines.conversion.promotion import choose, promote
from pipelines.conversion.receipts import Summary
from pipelines.conversion.recipe import ConvertRecipe
from pipelines.ray_session import ray_session
from pipelines.terminal import console, say


def convert_command(source: str, store: str, recipe: ConvertRecipe, plan: Path | None) -> None:
    """plan: a kept one, shown beside what the conversion took."""
    planned = None if plan is None else read_plan(plan)
    with ray_session():
        summary = convert(source, store, recipe, progress=console)
        say(summary.lines())
        if planned is not None and summary.adapters:
            console.print(taken_table(planned, took(planned, summary.figures(), recipe.run)))
        else:
            say(where_planned(summary, recipe))
    _end(summary)


def promote_command(store: str, select: str, recipe: ConvertRecipe, dry_run: bool) -> None:
    """dry_run: the choice is shown only, without Ray."""
    if dry_run:
        say(choose(store, select, recipe).lines())
        return
    with ray_session():
        summary = promote(store, select, recipe, progress=console)
        say(summary.lines())
    _end(summary)


def plan_command(
    method: str,
    source: str | None,
    base: str | None,
    hypernetwork: str | None,
    documents_per_s: str | None,
    out: Path | None,
    run: str | None,
    reference: str,
    given: tuple[Path | None, Path | None, int | None, Sequence[str]],
) -> None:
    """given: recipe, prices, GPUs and changes. reference: the base where none is named. Raises `ValueError` for what does not
    go together."""
    if run is not None and (method, source, base, hypernetwork, given[0], out) == ("convert", *[None] * 5):
        console.print(taken_table(*plan_of_run(run, documents_per_s, *given[1:])))
        return
    if source is None or run is not None:
        raise ValueError("give a source, or with `plan convert` --run alone: a run has its own source, models and recipe")
    base = base or reference
    if method == "lift":
        if (hypernetwork, documents_per_s, out) != (None, None, None):
            raise ValueError("--hypernetwork, --documents-per-s and --out are for `plan convert`: leave them out")
        say(plan_lifting(source, base, *given))
        return
    planned = plan_conversion(source, load_plan_recipe(base, hypernetwork, documents_per_s, *given), out)
    console.print(plan_tables(planned, source))


def _end(summary: Summary) -> None:
    if summary.nothing_stands:
        say([f"nothing was converted: all documents were rejected, {summary.documents.total():,} of them"])
        raise typer.Exit(1)

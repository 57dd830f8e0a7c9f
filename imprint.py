"""The command line: one function a command, no logic."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="markdown", help="Documents to LoRA adapters.")
console = Console()
RECIPES = Path(__file__).parent / "pipelines" / "recipes"

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change a recipe's value: `section.field=value`; may be repeated.")]


class Kind(StrEnum):
    base = "base"
    hypernetwork = "hypernetwork"


@contextmanager
def told() -> Iterator[None]:
    """Turns what a user can mend into one line; everything else keeps its traceback."""
    try:
        yield
    except ValueError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def ray_session(cpus: int | None = None) -> Iterator[None]:
    """Connects to the cluster that RAY_ADDRESS names, or runs a local Ray for as long as the command takes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    options = {"num_cpus": max(cpus or 0, os.cpu_count() or 1, 4), "object_store_memory": 2**29} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    try:
        yield
    finally:
        ray.shutdown()


@app.command()
def world(
    directory: Annotated[Path, typer.Argument(help="Where to write; a folder for each split and level, and the tokenizer.")],
    split: Annotated[str, typer.Option(help="train, validation or test: they share no names.")] = "train",
    level: Annotated[int, typer.Option(help="1: one entity a document. 2: two or three that share attributes.")] = 1,
    count: Annotated[int, typer.Option(help="Documents to write.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed, other documents.")] = 0,
) -> None:
    """Writes documents of the reference world, with questions and answers, as Parquet and JSONL.

    Example: `imprint world runs/world --split test --count 500`
    """
    from pipelines.world import WorldSpec, generate, specification_fingerprint, write
    from pipelines.world_tokenizer import build_tokenizer

    with told():
        spec = WorldSpec.model_validate({"seed": seed, "split": split, "level": level, "count": count})
        parquet, jsonl = write(generate(spec), directory / f"{split}-{level}")
        build_tokenizer().save_pretrained(directory / "tokenizer")
    console.print(f"{count} documents of world {specification_fingerprint()[:12]}: {parquet}, {jsonl}")


@app.command()
def train(
    kind: Annotated[Kind, typer.Argument(help="What to train.")],
    run: Annotated[Path, typer.Option(help="Directory of the run; the same one resumes it.")],
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe; the reference recipe where none is given.")] = None,
    changes: Overrides = None,
) -> None:
    """Trains a base from nothing, or a hypernetwork for a frozen base, with Ray Train and DeepSpeed.

    Example: `imprint train hypernetwork --run runs/mine --set run.workers=2`
    """
    from core.config import load
    from pipelines.learner import BaseRecipe, HypernetworkRecipe
    from pipelines.progress import training_progress
    from pipelines.train import train as run_training

    schema = {Kind.base: BaseRecipe, Kind.hypernetwork: HypernetworkRecipe}[kind]
    with told(), ray_session():
        resolved = load(schema, recipe or RECIPES / f"reference_{kind}.toml", changes or ())
        with training_progress(resolved.stages, console) as observer:
            model = run_training(resolved, run, observer)
    console.print(f"trained: {model}")

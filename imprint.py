"""The command line: one function a command, no logic."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pipelines.conversion.exchange import exchange_app
from pipelines.options import (
    REFERENCE,
    BaseOption,
    Form,
    HypernetworkOption,
    Kind,
    Method,
    Mode,
    Overrides,
    Planned,
    PresetOption,
    SourceArgument,
    StoreArgument,
)
from pipelines.ray_session import free_port, interruptible, ray_session
from pipelines.store.commands import store_app
from pipelines.terminal import console, told

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_show_locals=False, rich_markup_mode="markdown", help="Documents to LoRA adapters."
)
app.add_typer(store_app, name="store")
app.add_typer(exchange_app)
RECIPE_FILES = Path(__file__).parent / "pipelines" / "recipes"


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
    from core.config import load
    from pipelines.world.documents import WorldSpec, generate, specification_fingerprint, write
    from pipelines.world.tokenizer import build_tokenizer

    with told():
        spec = load(WorldSpec, None, [f"seed={seed}", f"split={split}", f"level={level}", f"count={count}"])
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
    """Trains a base from nothing, a hypernetwork for a frozen base, or pre-LIFT's adapter, with Ray Train and DeepSpeed.

    Example: `imprint train hypernetwork --run runs/mine --set run.workers=2`
    """
    from core.config import load
    from pipelines.training.progress import training_progress
    from pipelines.training.recipe import RECIPES
    from pipelines.training.train import train as run_training

    with told(), ray_session():
        resolved = load(RECIPES[kind], recipe or RECIPE_FILES / f"reference_{kind}.toml", changes or ())
        with training_progress(resolved.stages, console) as observer:
            model = run_training(resolved, run, observer)
    console.print(f"trained: {model}")


@app.command()
def convert(
    source: SourceArgument,
    store: StoreArgument,
    method: Annotated[
        Method | None, typer.Option(help="shine: one forward pass a document. lift: fine-tuning.", show_default="shine")
    ] = None,
    base: BaseOption = str(REFERENCE / "base"),
    hypernetwork: Annotated[
        str | None,
        typer.Option(
            help="Directory of a trained or imported hypernetwork; LIFT starts from what it writes.",
            show_default="the reference hypernetwork; with lift none",
        ),
    ] = None,
    preset: PresetOption = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe.")] = None,
    changes: Overrides = None,
    plan: Annotated[Path | None, typer.Option(help="What `imprint plan convert --out` kept: shown beside what it took.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete what the source no longer has from its collection.")] = False,
) -> None:
    """Turns a corpus into adapters in a store; a rerun converts only what is missing.

    Example: `imprint convert notes/ runs/store --set collection=notes`
    """
    from pipelines.conversion.commands import convert_command
    from pipelines.conversion.recipe import load_recipe

    if hypernetwork is None and recipe is None and method != Method.lift:
        hypernetwork = str(REFERENCE / "hypernetwork")
    with told():
        settings = [*(changes or ()), *["prune.enabled=true"] * prune]
        convert_command(source, store, load_recipe(recipe, method, base, hypernetwork, preset, settings), plan)


@app.command()
def lift(
    source: Annotated[str, typer.Argument(help="A folder or file, as of `imprint convert`; with --select, the store.")],
    store: Annotated[str | None, typer.Argument(help="The store; with --select it stands in the source's place.")] = None,
    base: BaseOption = str(REFERENCE / "base"),
    hypernetwork: Annotated[
        str | None, typer.Option(help="Directory of a hypernetwork whose adapters training starts from.")
    ] = None,
    preset: PresetOption = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe, as of `imprint convert`.")] = None,
    changes: Overrides = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="Lift the store's own documents of which this is true, as `quality < 0.8 or demand > 100`. Figures: quality, "
            "quality_lost, error, tokens (of the newest adapter), demand (requests in 30 days), age_days (of the text)."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --select: list the documents and their figures only.")] = False,
) -> None:
    """Fine-tunes an adapter for each document, many at once: `imprint convert --method lift` by its short name.

    Example: `imprint lift notes/ runs/store --preset v4_fast --set lift.run.scratch=runs/scratch`

    Example: `imprint lift runs/store --select 'quality < 0.8 or demand > 100'`
    """
    from pipelines.conversion.commands import promote_command
    from pipelines.conversion.recipe import load_recipe

    if store is not None and select is None and not dry_run:
        convert(source, store, Method.lift, base, hypernetwork, preset, recipe, changes)
        return
    with told():
        if store is not None or select is None:
            raise ValueError("give a source and a store, or with --select the store alone: its own documents are lifted")
        promote_command(source, select, load_recipe(recipe, Method.lift, base, hypernetwork, preset, changes or ()), dry_run)


@app.command()
def serve(
    store: Annotated[str, typer.Argument(help="The store to answer from.")],
    base: BaseOption = str(REFERENCE / "base"),
    host: Annotated[str, typer.Option(help="Address to bind to.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind to.")] = 8000,
    changes: Overrides = None,
) -> None:
    """Serves the base and every document's adapter with OpenAI's API, until Ctrl-C.

    Example: `imprint serve runs/store --port 8000`
    """
    from core.config import load
    from serve.app import checked
    from serve.app import run as run_server
    from serve.settings import ServeSettings

    with told():
        places = [f"base={base}", f"store={store}", f'run.host="{host}"', f"run.port={port}"]
        settings = checked(load(ServeSettings, None, [*places, *(changes or ())]))
        console.print("starting, which takes about 20 s")
        with ray_session(told_of_retries=False, include_dashboard=False), interruptible(), run_server(settings) as server:
            console.print(f"serving {server.url}/v1, Ctrl-C to stop", highlight=False)
            server.wait()


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option(help="`base`, or `base:document` with the document's name as it is.")] = "base",
    collection: Annotated[str | None, typer.Option(help="The document's collection, if not the server's own.")] = None,
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 64,
    mode: Annotated[
        Mode, typer.Option(help="Where the answer shall come from; auto is the adapter, else the text in context.")
    ] = Mode.auto,
) -> None:
    """Asks a running server and prints the answer and where it came from.

    Example: `imprint ask "What is the hobby of Vostilo?" --model base:vostilo.txt`
    """
    from serve.asking import ask_server

    with told():
        answer = ask_server(url, question, model, collection, max_tokens, mode)
    console.print(answer.text, highlight=False, markup=False)
    console.print(f"[dim]from: {answer.source}[/]", highlight=False)


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Where to write report.json, report.md and the plot.")] = Path("runs/evaluation"),
    base: BaseOption = str(REFERENCE / "base"),
    hypernetwork: HypernetworkOption = str(REFERENCE / "hypernetwork"),
    count: Annotated[int, typer.Option(help="Unseen documents of each level.")] = 500,
    level: Annotated[list[int] | None, typer.Option(help="Levels of the reference world; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the documents.")] = 0,
) -> None:
    """Scores adapters on unseen documents of the reference world, beside the base and the controls.

    Example: `imprint evaluate --count 100 --level 1 --out runs/evaluation`
    """
    from pipelines.evaluation.commands import evaluate_command

    with told():
        report = evaluate_command(base, hypernetwork, count, level or (1, 2), seed, out)
    console.print(report, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {out}")


@app.command()
def compare(
    documents: Annotated[
        Path | None,
        typer.Argument(help="JSONL of documents with questions; long ones of the reference world where none is given."),
    ] = None,
    form: Annotated[Form, typer.Option(help="How the file is laid out.")] = Form.loogle,
    out: Annotated[Path, typer.Option(help="Where to write report.json, report.md and the plots.")] = Path("runs/comparison"),
    base: BaseOption = str(REFERENCE / "base"),
    hypernetwork: Annotated[str | None, typer.Option(help="Directory of a hypernetwork, to compare its adapters too.")] = None,
    count: Annotated[int, typer.Option(help="Long documents of the reference world.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of those.")] = 0,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML recipe: lift, memory, raw, endpoint, rules, judge, evaluation.")
    ] = None,
    changes: Overrides = None,
) -> None:
    """Compares LIFT, Gated Memory and generated adapters with their baselines on documents longer than the base's window.

    Example: `imprint compare longdep_qa.jsonl --form loogle --base Qwen/Qwen3-0.6B --out runs/loogle`
    """
    from pipelines.evaluation.commands import compare_command

    with told():
        report = compare_command(documents, form, base, hypernetwork, count, seed, recipe, changes or (), out)
    console.print(report, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {out}")


@app.command()
def plan(
    method: Annotated[Planned, typer.Argument(help="What to plan.")],
    source: Annotated[str | None, typer.Argument(help="As of `imprint convert`; with --run, the run's own.")] = None,
    base: Annotated[str | None, typer.Option(help="Model directory or Hugging Face name.", show_default="the reference")] = None,
    hypernetwork: Annotated[str | None, typer.Option(help="convert: its directory, or `--set shape.rank=8` and such.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that work at once.", show_default="1")] = None,
    documents_per_s: Annotated[str | None, typer.Option(help="convert: measured on one GPU, or a JSON file of it.")] = None,
    prices: Annotated[Path | None, typer.Option(help="TOML table of prices.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe of the method, with prices and assumptions.")] = None,
    out: Annotated[Path | None, typer.Option(help="convert: keeps the plan as JSON, for `imprint convert --plan`.")] = None,
    changes: Overrides = None,
    run: Annotated[str | None, typer.Option(help="convert: a finished run's folder: its plan beside what it took.")] = None,
) -> None:
    """Says what a corpus would take before it is converted or lifted: adapters, bytes, GPU hours, money, when it pays off.

    Example: `imprint plan convert notes/ --gpus 8 --set encoding=int8`

    Example: `imprint plan lift notes/ --base Qwen/Qwen3-0.6B`
    """
    from pipelines.conversion.commands import plan_command

    with told():
        given = (recipe, prices, gpus, changes or ())
        plan_command(method, source, base, hypernetwork, documents_per_s, out, run, str(REFERENCE / "base"), given)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; what is there is replaced.")] = Path("runs/demo"),
    seed: Annotated[int | None, typer.Option(help="Seed of the documents; a new one every time by default.")] = None,
) -> None:
    """The main job in ten minutes: train live, convert unseen documents, serve, ask over HTTP, compare.

    Example: `imprint demo`
    """
    from pipelines.demo import demo as run_demo

    @contextmanager
    def server(base: Path, store: Path) -> Iterator[str]:
        from serve.app import run as run_server
        from serve.settings import ServeRun, ServeSettings

        with run_server(ServeSettings(base=str(base), store=str(store), run=ServeRun(port=free_port()))) as running:
            yield running.url

    with told(), ray_session(told_of_retries=False):
        run_demo(out.resolve(), server, console, seed)


if __name__ == "__main__":
    app()

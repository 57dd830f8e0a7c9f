"""The main job from end to end, in minutes: train live, convert, serve, ask, compare.

In: the shipped reference weights and a directory. Out, there: `report.md`, `report.json`, plots, and everything that the
stages made. A hypernetwork is trained live on the shipped base, to show training; documents of a new seed are converted with
the fully trained one, so nothing has ever seen them. The server is the caller's to start: this room does not know it.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.table import Table

from core.adapters.base_model import load_base
from core.adapters.lora import LoraWeights, stack
from core.config import load
from core.shine.hypernetwork import Hypernetwork
from core.store.store import Store
from core.text.documents import Document
from core.training.metrics import exact_match
from pipelines.conversion.convert import convert
from pipelines.conversion.receipts import Summary
from pipelines.conversion.recipe import ConvertRecipe
from pipelines.evaluation.evaluate import Report, evaluate
from pipelines.evaluation.plots import training_curves
from pipelines.evaluation.report import write_report
from pipelines.training.progress import training_progress
from pipelines.training.recipe import HypernetworkRecipe
from pipelines.training.train import train
from pipelines.world import documents as world
from pipelines.world.documents import WorldDocument
from pipelines.world.reference import REFERENCE

RECIPE = Path(__file__).parent / "recipes" / "demo.toml"
TRAINING_DOCUMENTS = 6000
ASKED = 6

StartServer = Callable[[Path, Path], AbstractContextManager[str]]


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does: documents converted and compared, and overrides of the live training's recipe."""

    documents: int = 60
    training: tuple[str, ...] = ()


def demo(
    directory: Path, start_server: StartServer, console: Console, seed: int | None = None, size: DemoSize = DemoSize()
) -> Path:
    """Runs every stage in a fresh `directory` and returns the report's path.

    start_server: from (base, store) to a context with the server's URL. seed: of the documents; a new one by default. Needs an
    initialised Ray. Raises `ValueError` where the reference weights are not there.
    """
    if not (REFERENCE / "hypernetwork").is_dir():
        raise ValueError(f"no reference weights in {REFERENCE}: train them as pipelines/recipes/reference_*.toml say")
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    shutil.rmtree(directory, ignore_errors=True)
    started = time.monotonic()
    console.rule("1 of 4  Training a hypernetwork, live")
    records = _train_live(directory, console, size)
    console.rule("2 of 4  Converting documents that nothing has seen")
    documents = [world.document(seed, "test", 1, index) for index in range(size.documents)]
    store, summary = _convert(directory, documents, console)
    console.rule("3 of 4  Serving, and asking over HTTP")
    with start_server(REFERENCE / "base", store) as url:
        conversations = _ask(url, documents[:ASKED], console)
    console.rule("4 of 4  Comparing")
    report = _compare(store, documents)
    path = write_demo_report(directory, seed, records, summary, conversations, report, time.monotonic() - started)
    console.print(_table(report))
    console.print(f"report: {path}")
    return path


def _train_live(directory: Path, console: Console, size: DemoSize) -> list[dict[str, Any]]:
    corpus = directory / "corpus"
    world.write(world.generate(world.WorldSpec(count=TRAINING_DOCUMENTS)), corpus / "train-1")
    world.write(world.generate(world.WorldSpec(split="validation", count=20)), corpus / "validation-1")
    paths = (
        f"base={REFERENCE / 'base'}",
        f'feed.corpus=["{corpus / "train-1"}"]',
        f"run.validation.corpus={corpus / 'validation-1'}",
    )
    recipe = load(HypernetworkRecipe, RECIPE, (*paths, *size.training))
    records: list[dict[str, Any]] = []
    with training_progress(recipe.stages, console) as show:

        def observe(metrics: dict[str, Any]) -> None:
            records.append(metrics)
            show(metrics)

        train(recipe, directory / "training", observe)
    return records


def _convert(directory: Path, documents: Sequence[WorldDocument], console: Console) -> tuple[Path, Summary]:
    folder = directory / "documents"
    folder.mkdir(parents=True)
    for document in documents:
        (folder / f"{document.id}.txt").write_text(document.text)
    recipe = ConvertRecipe(base=str(REFERENCE / "base"), hypernetwork=str(REFERENCE / "hypernetwork"))
    summary = convert(str(folder), str(directory / "store"), recipe, progress=console)
    for line in summary.lines():
        console.print(line, highlight=False)
    return directory / "store", summary


def _ask(url: str, documents: Sequence[WorldDocument], console: Console) -> list[dict[str, Any]]:
    """One question a document, with its adapter and to the bare base."""
    conversations = []
    for document in documents:
        question = document.questions[0]
        answers = {}
        for what, model in (("adapter", f"base:{quote(document.id + '.txt', safe='')}"), ("base", "base")):
            body = {"model": model, "messages": [{"role": "user", "content": question.question}], "max_tokens": 16}
            response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            response.raise_for_status()
            answers[what] = response.json()["choices"][0]["message"]["content"].strip()
        right = exact_match(answers["adapter"], question.answers)
        mark = "[green]right[/]" if right else f"[red]wrong[/], the document says {question.answer}"
        console.print(
            f"{question.question}\n    under its adapter: [bold]{answers['adapter']}[/] ({mark}); without: {answers['base']}"
        )
        conversations.append({"document": document.id, "question": question.question, "gold": question.answer, **answers})
    return conversations


def _compare(store_path: Path, documents: Sequence[WorldDocument]) -> Report:
    """All conditions, with the adapters that the store holds."""
    base = load_base(REFERENCE / "base")
    hypernetwork = Hypernetwork.load(REFERENCE / "hypernetwork", base)
    store = Store.open(store_path)

    def stored(chosen: Sequence[WorldDocument]) -> LoraWeights:
        parts = []
        for document in chosen:
            text = Document(tenant="default", collection="default", name=f"{document.id}.txt", text=document.text)
            row = store.find_adapters("default", text.content_hash)[0]
            parts.append(LoraWeights(store.spec(row.spec_fingerprint), store.get_vector(row)[None]))
        return stack(parts)

    return evaluate(base, hypernetwork, documents, adapters=stored)


def write_demo_report(
    directory: Path,
    seed: int,
    records: Sequence[dict[str, Any]],
    summary: Summary,
    conversations: Sequence[dict[str, Any]],
    report: Report,
    seconds: float,
) -> Path:
    """`report.md`, `report.json` and plots: what was trained, converted, asked and compared."""
    write_report(report, directory)
    training_curves(records, directory / "training")
    values = json.loads((directory / "report.json").read_text())
    values |= {"seed": seed, "seconds": round(seconds, 1), "conversion": summary.lines(), "conversations": list(conversations)}
    values["training"] = [record for record in records if "exact_match" in record]
    (directory / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    lines = [
        "# What the demo did",
        "",
        f"{seconds:.0f} s in all, documents of seed {seed}.",
        "",
        "## Live training",
        "",
        "![loss and accuracy](training.png)",
        "",
        "## Conversion",
        "",
        *(f"    {line}" for line in summary.lines()),
        "",
        "## Answers over HTTP",
        "",
        "| question | the document's adapter | base | the document says |",
        "|---|---|---|---|",
        *(f"| {c['question']} | {c['adapter']} | {c['base']} | {c['gold']} |" for c in conversations),
        "",
    ]
    path = directory / "report.md"
    path.write_text("\n".join(lines) + "\n" + path.read_text())
    return path


def _table(report: Report) -> Table:
    table = Table(title="Exact match on documents that nothing has seen")
    for column in ("condition", "all questions", "one fact", "two facts"):
        table.add_column(column, justify="left" if column == "condition" else "right")
    for condition, scores in report.groups["all"].scores.items():
        cells = [f"{scores[split].exact_match.mean:.3f}" if split in scores else "" for split in ("all", "one_fact", "two_facts")]
        table.add_row(condition, *cells)
    return table

"""What `imprint evaluate` and `compare` do."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from core.adapters.base_model import load_base
from core.config import load
from core.shine.hypernetwork import Hypernetwork
from pipelines.evaluation import lift_report, report
from pipelines.evaluation.benchmark_readers import READERS
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.lift_comparison import ComparisonSettings, compare
from pipelines.evaluation.long_documents import long_documents
from pipelines.world.documents import WorldSpec, generate

LONG_DOCUMENT_PARTS = 14


def evaluate_command(base: str, hypernetwork: str, count: int, levels: Sequence[int], seed: int, out: Path) -> str:
    """Writes the report of unseen documents of the reference world; returns it in Markdown."""
    values = f"seed={seed}", "split=test", f"count={count}"
    specs = [load(WorldSpec, None, [*values, f"level={level}"]) for level in levels]
    loaded = load_base(base)
    network = Hypernetwork.load(hypernetwork, loaded)
    found = evaluate(loaded, network, [document for spec in specs for document in generate(spec)])
    report.write_report(found, out)
    return report.markdown(found)


def compare_command(
    documents: Path | None,
    form: str,
    base: str,
    hypernetwork: str | None,
    count: int,
    seed: int,
    recipe: Path | None,
    changes: Iterable[str],
    out: Path,
) -> str:
    """Writes the report of a file's documents, or of long ones of the reference world; returns it in Markdown."""
    settings = load(ComparisonSettings, recipe, changes)
    loaded = load_base(base)
    network = None if hypernetwork is None else Hypernetwork.load(hypernetwork, loaded)
    items = list(long_documents(count, LONG_DOCUMENT_PARTS, seed) if documents is None else READERS[form](documents))
    compared = compare(loaded, network, items, settings)
    lift_report.write_lift_report(compared.report, out, compared.gates)
    return lift_report.markdown(compared.report)

"""How well an adapter answers that was composed from the windows of a long document, by the number of its parts and by its rank.

Documents of the test split joined (about 100 tokens a part), read in windows as conversion reads them, composed as the shipped
hypernetwork was trained for, and cut to each rank. Beside it: the question alone, the needed passage in context, and as much of
the document in context as the base reads. Exact match, means over documents.

Run from the root: `python -m benchmarks.conversion.composition`; a minute on 2 cores. Writes composition.json and a figure into
benchmarks/results.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lift.setup import Reference, reference
from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import tokenizer_of
from core.adapters.lora import stack
from core.adapters.weights import AdapterWeights
from core.text.tokens import read
from core.training.metrics import mean_interval
from core.writing.writer import WindowRule
from pipelines.evaluation.asking import Asker, evaluating
from pipelines.evaluation.lift_evaluation import LiftEvaluationSettings, Sheet, Shown, by_document
from pipelines.evaluation.lifting import shine_adapters
from pipelines.evaluation.long_documents import long_documents
from pipelines.evaluation.plots import Curves, curves

PARTS = (1, 2, 4, 8, 14)
RANKS = (4, 8, 16, 32)
SHOWN: dict[str, Shown] = {"question_only": "nothing", "passage_in_context": "passage", "in_context": "truncated"}


def measure(models: Reference, parts: int, documents: int, ranks: Sequence[int], seed: int) -> dict[str, Any]:
    """Exact match on documents of so many parts, and how many windows they were read in."""
    texts, settings = long_documents(documents, parts, seed), LiftEvaluationSettings()
    sheet, asker = Sheet(models.base, texts, settings), Asker(models.base, settings.run)
    found: dict[str, Any] = {}

    def ask(name: str, shown: Shown, weights: AdapterWeights | None = None) -> None:
        rows = None if weights is None else sheet.document_of
        scores = asker.score(*sheet.shown(shown), sheet.golds, sheet.answer_tokens, weights, rows)
        found[name] = mean_interval(by_document(sheet, scores.exact_match))._asdict()

    with evaluating(models.base.model):
        for name, shown in SHOWN.items():
            ask(name, shown)
        for rank in ranks:
            ask(f"rank_{rank}", "nothing", stack(shine_adapters(models.hypernetwork, texts, None, rank)))
    longest = WindowRule().longest(models.base.max_length, len(models.hypernetwork.memory_MH), models.hypernetwork.trained_tokens)
    tokens = [read(tokenizer_of(models.base), text.text) for text in texts]
    windows = [len(WindowRule().covers(each, longest)) for each in tokens]
    return {"exact_match": found, "windows": sum(windows) / len(windows), "questions": len(sheet.asked)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20, help="of each number of parts; 8 at most of 14")
    parser.add_argument("--parts", type=int, nargs="+", default=PARTS)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="two documents of two parts: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    documents, parts, ranks = (2, [2], RANKS[:1]) if options.quick else (options.documents, options.parts, RANKS)

    models = reference()
    found = {}
    for part in parts:
        found[part] = measure(models, part, min(documents, max(1, 112 // part)), ranks, options.seed)
        scores = ", ".join(f"{name} {value['mean']:.3f}" for name, value in found[part]["exact_match"].items())
        print(f"{part} parts, {found[part]['windows']:.1f} windows: {scores}", flush=True)
    draw(found, ranks, options.output / "composition")
    result = {
        "by_parts": found,
        "composition": models.hypernetwork.settings.composition,
        "hypernetwork": models.hypernetwork.fingerprint(),
        "quick": options.quick,
    }
    print(write_result("composition", result, folder=options.output))


def draw(found: Mapping[int, Mapping[str, Any]], ranks: Sequence[int], path: Path) -> None:
    labels = {f"rank_{rank}": f"composed adapter, rank {rank}" for rank in (ranks[0], ranks[-1])}
    labels |= {"in_context": "document in context", "passage_in_context": "needed passage in context"}
    points = {
        label: [(part, values["exact_match"][name]["mean"]) for part, values in found.items()] for name, label in labels.items()
    }
    curves([Curves("Documents read in windows", "parts of about 100 tokens", "exact match", points)], "Composed adapters", path)


if __name__ == "__main__":
    main()

"""LIFT from the SHINE adapter against plain LIFT: optimiser steps to the same accuracy, by the length of the document.

Documents of the test split, of one or several of the hypernetwork's windows; several are composed to the mean of their deltas.
Both ways take the same questions in the same order, with the settings of `benchmarks.lift.quality`, and are asked after every
few steps until plain LIFT's last accuracy is reached. Bar: at most half of the steps on documents that the hypernetwork reads in
one window; the longer ones are reported beside it, and 14 parts by `benchmarks.lift.quality`.

Run from the root: `python -m benchmarks.lift.from_shine`; four minutes on 2 cores. Writes lift_from_shine.json and a figure into
benchmarks/results. Exit status 1 where the bar is missed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lift.quality import Point, compare_steps, follow, steps_of
from benchmarks.lift.setup import LIFT, PAIRS, SHINE_WINDOW_TOKENS, Reference, once, reference, stand_in_questions
from benchmarks.record import RESULTS, write_result
from core.lift.settings import LiftSettings
from pipelines.evaluation.lift_evaluation import LiftEvaluationSettings, Sheet
from pipelines.evaluation.lifting import jobs_of, shine_adapters
from pipelines.evaluation.long_documents import long_documents
from pipelines.evaluation.plots import Curves, curves

PARTS = (1, 2, 4)
STEPS_SHARE = 0.5
CHECKPOINTS = 25


def compare(models: Reference, parts: int, documents: int, recipe: LiftSettings, pairs: int, seed: int) -> dict[str, Any]:
    """Both ways on documents of so many parts."""
    texts = long_documents(documents, parts, seed)
    written, sheet = stand_in_questions(texts, pairs), Sheet(models.base, texts, LiftEvaluationSettings())
    starts = shine_adapters(models.hypernetwork, texts, SHINE_WINDOW_TOKENS, recipe.adapter.rank)
    ways: dict[str, list[Point]] = {}
    for name, start in (("plain", None), ("from_shine", starts)):
        jobs = jobs_of(texts, written.pairs, start)
        checkpoints = min(CHECKPOINTS, steps_of(jobs, recipe))
        print(f"{parts} parts, {name}", flush=True)
        ways[name] = follow(models.base, sheet, jobs, recipe, checkpoints).points
    return {"curves": ways, **compare_steps(ways["plain"], ways["from_shine"])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--parts", type=int, nargs="+", default=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    parser.add_argument("--quick", action="store_true", help="two documents of one part, one epoch: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    documents, parts, recipe = (2, [1], once(LIFT)) if options.quick else (options.documents, options.parts, LIFT)

    models = reference()
    found = {part: compare(models, part, documents, recipe, 2 if options.quick else PAIRS, options.seed) for part in parts}
    share = found[parts[0]]["share"]
    passed = share is not None and share <= STEPS_SHARE
    draw(found, options.output / "lift_from_shine")
    bar = {"name": "LIFT from the SHINE adapter / plain LIFT, steps to its accuracy, one window", "value": share}
    result = {
        "bar": {**bar, "relation": "<=", "limit": STEPS_SHARE, "passed": passed},
        "by_parts": found,
        "documents": documents,
        "lift_settings": recipe.model_dump(mode="json"),
        "quick": options.quick,
    }
    write_result("lift_from_shine", result, folder=options.output)
    for part, values in found.items():
        steps = f"{values['from_shine_steps']} of {values['plain_steps']} steps"
        print(f"{part} parts: exact match {values['accuracy']:.3f} after {steps}, share {values['share']}")
    print(f"{'pass' if passed else 'MISS'}  {bar['name']}: {share} <= {STEPS_SHARE}")
    if not passed and not options.quick:
        sys.exit(1)


def draw(found: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = {"plain": "LIFT", "from_shine": "LIFT from the SHINE adapter"}
    panels = [
        Curves(
            f"{part} part{'s' if part > 1 else ''} of about 100 tokens",
            "optimiser steps",
            "exact match",
            {labels[name]: [(point.step, point.exact_match) for point in points] for name, points in values["curves"].items()},
        )
        for part, values in found.items()
    ]
    curves(panels, "Steps to the same accuracy", path)


if __name__ == "__main__":
    main()

"""Documents per hour of 16 documents lifted at once against the same documents one after another.

The shipped base, a LoRA each, one question a sentence of documents of the reference world (LIFT v4's fast setting), about 22
tokens an example; both ways in one process by turns, so that both meet the same machine. The losses must agree. Bar, at one
example of every document a step: 4 times as many documents an hour. Larger steps, v4's 4 among them, are reported beside it: a
document that fills the processor by itself gains less from company.

Run from the root: `python -m benchmarks.lift_batching`; three minutes on two cores. Exit status 1 where the bar is missed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lift_setup import settings, stand_in_questions
from benchmarks.record import RESULTS, write_result
from core.base_model import BaseModel, load_base
from core.lift import Job, train
from core.lift_settings import LiftRun, LiftSettings
from pipelines.lifting import jobs_of
from pipelines.long_documents import long_documents
from pipelines.reference import REFERENCE

STEPS = (1, 2, 4)
RATIO_AT_LEAST = 4.0


def run(base: BaseModel, jobs: Sequence[Job], recipe: LiftSettings, slots: int) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Documents per hour, and every document's losses."""
    start = time.perf_counter()
    results = list(train(base, jobs, recipe, LiftRun(slots=slots)))
    seconds = time.perf_counter() - start
    if failed := [result for result in results if result.weights is None]:
        raise SystemExit(f"document {failed[0].key} failed: {failed[0].fault}")
    return 3600 * len(jobs) / seconds, {result.key: result.losses for result in results}


def compare(base: BaseModel, jobs: Sequence[Job], recipe: LiftSettings, runs: int) -> dict[str, Any]:
    """Both ways by turns; medians, and the ratio of every turn."""
    rates: list[tuple[float, float]] = []
    for _ in range(runs):
        at_once, losses = run(base, jobs, recipe, len(jobs))
        one_by_one, expected = run(base, jobs, recipe, 1)
        if not all(torch.allclose(torch.tensor(losses[key]), torch.tensor(expected[key]), atol=1e-2) for key in expected):
            raise SystemExit("documents at once had other losses than one after another")
        rates.append((at_once, one_by_one))
    ratios = [at_once / one_by_one for at_once, one_by_one in rates]
    return {
        "documents_per_hour_at_once": round(statistics.median(rate[0] for rate in rates)),
        "documents_per_hour_one_by_one": round(statistics.median(rate[1] for rate in rates)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_of_each_run": [round(ratio, 2) for ratio in ratios],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--parts", type=int, default=4, help="of a document, about 100 tokens each")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    parser.add_argument("--quick", action="store_true", help="two short documents, one run: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    count, parts, runs = (2, 1, 1) if options.quick else (options.documents, options.parts, options.runs)
    torch.set_num_threads(options.threads)

    base = load_base(REFERENCE / "base", dtype=getattr(torch, options.dtype), device=options.device)
    documents = long_documents(count, parts)
    jobs = jobs_of(documents, stand_in_questions(documents, pairs=1).pairs)
    recipes = {size: settings((1, ("questions",)), rank=options.rank, examples_per_step=size) for size in STEPS}
    run(base, jobs[:2], recipes[STEPS[0]], slots=2)
    found = {size: compare(base, jobs, recipe, runs) for size, recipe in recipes.items()}
    ratio = found[STEPS[0]]["ratio"]
    passed = ratio >= RATIO_AT_LEAST
    bar = {"name": "16 documents at once / one after another, documents an hour, one example a step", "value": ratio}
    result = {
        "bar": {**bar, "relation": ">=", "limit": RATIO_AT_LEAST, "passed": passed},
        "by_examples_per_step": found,
        "losses_equal": True,
        "examples": [len(job.questions.ready()) for job in jobs],
        "settings": {name: getattr(options, name) for name in ("documents", "parts", "rank", "runs", "threads", "device")},
        "quick": options.quick,
    }
    print(write_result("lift_batching", result, options.device, options.output).read_text())
    if not passed and not options.quick:
        sys.exit(1)


if __name__ == "__main__":
    main()

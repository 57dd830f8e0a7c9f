"""Documents per hour of 16 documents lifted at once against the same documents one after another.

The shipped base, a LoRA each, one question a sentence of documents of the reference world (LIFT v4's fast setting), about 22
tokens an example. At once: as conversion lifts, a worker with one thread on each core and the documents dealt among them, each
worker's in one batch. Beside it all 16 in one batch of one process. One after another: one process on all cores. The ways take
turns, so that all meet the same machine, and the losses must agree. Bar, at one example of every document a step: 4 times as
many documents an hour. Larger steps, v4's 4 among them, are reported beside it: a document that fills the processor by itself
gains less from company.

Run from the root: `python -m benchmarks.lift.batching`; three minutes on two cores. Exit status 1 where the bar is missed.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.lift.setup import settings, stand_in_questions
from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import BaseModel, load_base
from core.lift.settings import LiftRun, LiftSettings
from core.lift.trainer import Job, train
from pipelines.evaluation.lifting import jobs_of
from pipelines.evaluation.long_documents import long_documents
from pipelines.world.reference import REFERENCE

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


_base: BaseModel
"""Of a worker's process."""


def begin(threads: int) -> None:
    """Loads a worker."""
    global _base
    torch.set_num_threads(threads)
    _base = load_base(REFERENCE / "base")


def work(jobs: Sequence[Job], recipe: LiftSettings) -> dict[str, tuple[float, ...]]:
    return run(_base, jobs, recipe, len(jobs))[1]


def dealt(pool: Executor, workers: int, jobs: Sequence[Job], recipe: LiftSettings) -> tuple[float, dict[str, tuple[float, ...]]]:
    """`run` of all jobs at once, by all workers."""
    start = time.perf_counter()
    parts = [pool.submit(work, jobs[number::workers], recipe) for number in range(workers)]
    losses = {key: each for part in parts for key, each in part.result().items()}
    return 3600 * len(jobs) / (time.perf_counter() - start), losses


def compare(
    base: BaseModel, pool: Executor, workers: int, jobs: Sequence[Job], recipe: LiftSettings, runs: int
) -> dict[str, Any]:
    """All ways by turns; medians, and the ratios of every turn."""
    rates: dict[str, list[float]] = {"at_once": [], "in_one_batch": [], "one_by_one": []}
    for number in range(runs + 1):
        made = {
            "at_once": dealt(pool, workers, jobs, recipe),
            "in_one_batch": run(base, jobs, recipe, len(jobs)),
            "one_by_one": run(base, jobs, recipe, 1),
        }
        expected = made["one_by_one"][1]
        for way, (rate, losses) in made.items():
            if not all(torch.allclose(torch.tensor(losses[key]), torch.tensor(expected[key]), atol=1e-2) for key in expected):
                raise SystemExit(f"documents {way} had other losses than one after another")
            if number:  # the first warms up
                rates[way].append(rate)

    def ratios(way: str) -> list[float]:
        return [rate / alone for rate, alone in zip(rates[way], rates["one_by_one"], strict=True)]

    return {
        **{f"documents_per_hour_{way}": round(statistics.median(values)) for way, values in rates.items()},
        "ratio": round(statistics.median(ratios("at_once")), 2),
        "ratio_of_each_run": [round(ratio, 2) for ratio in ratios("at_once")],
        "ratio_in_one_batch": round(statistics.median(ratios("in_one_batch")), 2),
        "ratio_in_one_batch_of_each_run": [round(ratio, 2) for ratio in ratios("in_one_batch")],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--parts", type=int, default=4, help="of a document, about 100 tokens each")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="one a core")
    parser.add_argument("--quick", action="store_true", help="two short documents, one run: does it run?")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    count, parts, runs = (2, 1, 1) if options.quick else (options.documents, options.parts, options.runs)
    torch.set_num_threads(options.workers)

    base = load_base(REFERENCE / "base")
    documents = long_documents(count, parts)
    jobs = jobs_of(documents, stand_in_questions(documents, pairs=1).pairs)
    recipes = {size: settings((1, ("questions",)), rank=options.rank, examples_per_step=size) for size in STEPS}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn, begin, (1,)) as pool:
        found = {size: compare(base, pool, options.workers, jobs, recipe, runs) for size, recipe in recipes.items()}
    ratio = found[STEPS[0]]["ratio"]
    passed = ratio >= RATIO_AT_LEAST
    bar = {"name": "16 documents at once / one after another, documents an hour, one example a step", "value": ratio}
    result = {
        "bar": {**bar, "relation": ">=", "limit": RATIO_AT_LEAST, "passed": passed},
        "by_examples_per_step": found,
        "losses_equal": True,
        "examples": [len(job.questions.ready()) for job in jobs],
        "settings": {name: getattr(options, name) for name in ("documents", "parts", "rank", "runs", "workers")},
        "quick": options.quick,
    }
    print(write_result("lift_batching", result, folder=options.output).read_text())
    if not passed and not options.quick:
        sys.exit(1)


if __name__ == "__main__":
    main()

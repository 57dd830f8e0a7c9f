"""Documents per hour of 16 documents lifted at once against the same documents one after another.

The shipped base, a LoRA each, per-sentence questions in steps of 4 (LIFT v4); both ways in one process by turns, so that both
meet the same machine. The losses must agree. Run from the root: `python -m benchmarks.lift_batching`; two minutes on two cores.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

from benchmarks.record import RESULTS, write_result
from core.base_model import BaseModel, load_base
from core.examples import QuestionAnswer
from core.lift import Job, train
from core.lift_course import Curriculum, FixedQuestions, Stage
from core.lift_forms import AdapterSettings
from core.lift_settings import LiftRun, LiftSettings, OptimiserSettings
from pipelines.reference import REFERENCE


def documents(base: BaseModel, count: int, questions: int) -> list[Job]:
    """Random words of the base's vocabulary: what is measured does not depend on what they say."""
    assert base.tokenizer is not None
    words = sorted(word for word in base.tokenizer.get_vocab() if word.isalpha())
    rng = random.Random(0)
    jobs = []
    for number in range(count):
        pairs = [QuestionAnswer(" ".join(rng.choices(words, k=rng.randint(6, 14))), rng.choice(words)) for _ in range(questions)]
        jobs.append(Job(str(number), " ".join(rng.choices(words, k=200)), questions=FixedQuestions(tuple(pairs))))
    return jobs


def run(base: BaseModel, jobs: list[Job], settings: LiftSettings, slots: int) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Documents per hour, and every document's losses."""
    start = time.perf_counter()
    results = list(train(base, jobs, settings, LiftRun(slots=slots)))
    seconds = time.perf_counter() - start
    if failed := [result for result in results if result.weights is None]:
        raise SystemExit(f"document {failed[0].key} failed: {failed[0].fault}")
    return 3600 * len(jobs) / seconds, {result.key: result.losses for result in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples-per-step", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    base = load_base(REFERENCE / "base", device=options.device)
    stage = Stage(name="questions", epochs=options.epochs, tasks=("questions",))
    settings = LiftSettings(
        adapter=AdapterSettings(rank=options.rank),
        optimiser=OptimiserSettings(learning_rate=1e-3),
        curriculum=Curriculum(stages=(stage,), examples_per_step=options.examples_per_step),
    )
    jobs = documents(base, options.documents, options.questions)
    run(base, jobs[:2], settings, slots=2)
    rates: list[tuple[float, float]] = []
    for _ in range(options.runs):
        at_once, losses = run(base, jobs, settings, options.documents)
        one_by_one, expected = run(base, jobs, settings, 1)
        if not all(torch.allclose(torch.tensor(losses[key]), torch.tensor(expected[key]), atol=1e-2) for key in expected):
            raise SystemExit("documents at once had other losses than one after another")
        rates.append((at_once, one_by_one))
    result = {
        "documents_per_hour_at_once": round(statistics.median(rate[0] for rate in rates)),
        "documents_per_hour_one_by_one": round(statistics.median(rate[1] for rate in rates)),
        "ratio": round(statistics.median(rate[0] / rate[1] for rate in rates), 2),
        "ratio_of_each_run": [round(rate[0] / rate[1], 2) for rate in rates],
        "losses_equal": True,
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
    }
    print(write_result("lift_batching", result, options.device, options.output).read_text())


if __name__ == "__main__":
    main()

"""Time and memory against the length of the input: LIFT once and short prompts ever after, or the document in every context.

The shipped base with its window opened (positions are rotary; what it would say there does not matter here), random words as
text, one question a sentence and one epoch (LIFT v4's fast setting). Every measurement runs in a process of its own, whose peak
memory is counted above that of the loaded base; figures are medians over `--repeats`. Measured for each length L:

    in context   seconds to the first token (reading L tokens), seconds a further token, peak memory, cache
    LIFT         seconds to the first token (training on L / 12 questions, reading the question), seconds a further token, memory

Crossings: the output tokens of one conversation after which LIFT is ahead, and the questions (each in a fresh context, 32 tokens
of answer) after which it is. Time of question writing is not in it (`benchmarks.lift.questions`).

Run from the root: `python -m benchmarks.lift.cost`; under 10 minutes on 2 cores. Writes benchmarks/results/lift_cost.json and a
figure beside it.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lift.setup import settings
from benchmarks.record import RESULTS, ROOT, write_result
from core.adapters.base_model import BaseModel, load_base, tokenizer_of
from core.engine.requests import Request
from core.engine.token_loop import Engine
from core.lift.course import FixedQuestions
from core.lift.settings import LiftRun
from core.lift.trainer import Job, train
from core.text.prompts import encode, prompt
from core.training.examples import QuestionAnswer
from pipelines.evaluation.plots import Curves, curves
from pipelines.world.reference import REFERENCE

LENGTHS = (512, 2048, 8192, 16384, 32768)
SENTENCE_TOKENS, QUESTION_WORDS, DECODED, ANSWER_TOKENS = 12, 8, 32, 32
RANK, EXAMPLES_PER_STEP = 32, 16
PREFILL_TOKENS = 1024
LIFT = settings((1, ("questions",)), rank=RANK, examples_per_step=EXAMPLES_PER_STEP)


def words(base: BaseModel, count: int, seed: int = 0) -> list[str]:
    known = sorted(word for word in tokenizer_of(base).get_vocab() if word.isalpha())
    return random.Random(seed).choices(known, k=count)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(base: BaseModel, ids: Sequence[int], adapter: Any = None) -> tuple[float, float, int]:
    """Seconds to the first token, seconds a further token, and bytes of keys and values."""
    spec = None if adapter is None else adapter.spec
    engine = Engine(base, spec, slots=1, max_length=len(ids) + DECODED, prefill_tokens_per_step=PREFILL_TOKENS)
    engine.submit(Request("0", ids, DECODED, adapter))
    started, first_s = time.perf_counter(), 0.0
    made = 0
    while not engine.idle:
        made += len(engine.step())
        if made and not first_s:
            first_s = time.perf_counter() - started
    return first_s, (time.perf_counter() - started - first_s) / max(made - 1, 1), engine.stats().cache_bytes


def measure(method: str, length: int) -> dict[str, float]:
    """One measurement, in this process."""
    base = load_base(REFERENCE / "base")
    base.model.config.max_position_embeddings = max(length + 4 * DECODED, base.max_length)
    question = prompt(tokenizer_of(base), [{"role": "user", "content": " ".join(words(base, QUESTION_WORDS))}])
    answer(base, question)
    before, training_s, adapter, ids = peak_bytes(), 0.0, None, question
    if method == "in_context":
        text = encode(tokenizer_of(base), " ".join(words(base, 2 * length)))[:length]
        ids = [*text, *question]
    else:
        count = max(length // SENTENCE_TOKENS, 1)
        asked = [QuestionAnswer(" ".join(words(base, QUESTION_WORDS, n)), words(base, 1, n)[0]) for n in range(count)]
        started = time.perf_counter()
        [result] = train(base, [Job("0", "text", "", FixedQuestions(tuple(asked)))], LIFT, LiftRun(slots=1))
        training_s = time.perf_counter() - started
        if result.weights is None:
            raise SystemExit(result.fault)
        adapter = result.weights
    first_s, next_s, cache_bytes = answer(base, ids, adapter)
    return {
        "training_s": training_s,
        "first_token_s": training_s + first_s,
        "reading_s": first_s,
        "next_token_s": next_s,
        "peak_bytes": peak_bytes() - before,
        "kept_bytes": cache_bytes + (0 if adapter is None else 2 * adapter.spec.numel),
    }


def measured_alone(method: str, length: int, threads: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.lift.cost", "--threads", str(threads), "--one", method, str(length)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def crossings(in_context: Mapping[str, float], lift: Mapping[str, float]) -> dict[str, float | None]:
    """Output tokens of one conversation, and questions of fresh contexts, from which on LIFT takes less time; None for never."""
    late = lift["first_token_s"] - in_context["first_token_s"]
    gained = in_context["next_token_s"] - lift["next_token_s"]
    a_question = in_context["reading_s"] + ANSWER_TOKENS * in_context["next_token_s"]
    a_short_one = lift["reading_s"] + ANSWER_TOKENS * lift["next_token_s"]
    return {
        "output_tokens": max(late, 0.0) / gained if gained > 0 else (0.0 if late <= 0 else None),
        "questions": lift["training_s"] / (a_question - a_short_one) if a_question > a_short_one else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two short lengths: does it run?")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "LENGTH"), help="one measurement, as JSON on the output")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return

    found: dict[str, dict[int, dict[str, float]]] = {"in_context": {}, "lift": {}}
    for length in (128, 256) if options.quick else options.lengths:
        for method, by_length in found.items():
            runs = [measured_alone(method, length, options.threads) for _ in range(1 if options.quick else options.repeats)]
            by_length[length] = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
            print(f"{length} tokens, {method}: {by_length[length]['first_token_s']:.2f} s to the first token", flush=True)
    lengths = list(found["lift"])
    crossed = {length: crossings(found["in_context"][length], found["lift"][length]) for length in lengths}
    options.output.mkdir(parents=True, exist_ok=True)
    draw(found, crossed, options.output / "lift_cost")
    result = {
        "by_length": found,
        "crossings": crossed,
        "first_length_with_lift_first": next(
            (n for n in lengths if found["lift"][n]["first_token_s"] <= found["in_context"][n]["first_token_s"]), None
        ),
        "settings": {
            "threads": options.threads,
            "repeats": options.repeats,
            "rank": RANK,
            "examples_per_step": EXAMPLES_PER_STEP,
            "epochs": 1,
        },
        "quick": options.quick,
    }
    print(write_result("lift_cost", result, folder=options.output).read_text())


def draw(
    found: Mapping[str, Mapping[int, Mapping[str, float]]], crossed: Mapping[int, Mapping[str, float | None]], path: Path
) -> None:
    labels = {"in_context": "in context", "lift": "LIFT"}

    def lines(figure: str, scale: float) -> dict[str, list[tuple[float, float]]]:
        return {
            labels[method]: [(length, max(values[figure], 1e-9) * scale) for length, values in by_length.items()]
            for method, by_length in found.items()
        }

    known = {name: [(length, values[name]) for length, values in crossed.items()] for name in ("output_tokens", "questions")}
    ahead = {
        {"output_tokens": "output tokens", "questions": "questions"}[name]: [(x, max(y, 1.0)) for x, y in points if y is not None]
        for name, points in known.items()
    }
    panels = [
        Curves("To the first token", "input tokens", "seconds", lines("first_token_s", 1.0), log=True),
        Curves("A further token", "input tokens", "milliseconds", lines("next_token_s", 1e3), log=True),
        Curves("Peak memory beside the base", "input tokens", "MB", lines("peak_bytes", 1e-6), log=True),
        Curves(
            "LIFT is ahead after", "input tokens", "count", {name: points for name, points in ahead.items() if points}, log=True
        ),
    ]
    curves([panel for panel in panels if panel.series], "The cost of long inputs", path)


if __name__ == "__main__":
    main()

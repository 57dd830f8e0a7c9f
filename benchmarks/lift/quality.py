"""LIFT against its baselines on unseen documents longer than the base's window: the bar of quality, and what stands beside.

A seed is a document of its own (14 documents of the test split as one, about 1,400 tokens; the base has 1,024 positions) with
LIFT's draws on it. Questions to train on come from a stand-in for a language model (`benchmarks.lift.question_server`: it reads
sentences, never test questions, and asks in phrasings of the training split) and from the rules. Bar, fixed beforehand:

    LIFT answers at least 0.9 of what the base answers with the needed passage in context

Beside it: LIFT from the SHINE adapter, composed of a dozen windows here (`benchmarks.lift.from_shine` has shorter documents).

Run from the root: `python -m benchmarks.lift.quality`; half an hour on 2 cores. It says what it does, and what is trained is
kept in `--work`: a run that was cut off goes on where it was. Writes lift_quality.json into benchmarks/results, and report,
figures and gate telemetry into its folder lift_quality. Exit status 1 where the bar is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lift.setup import (
    LIFT,
    MEMORY,
    PARTS,
    RAW,
    RUN,
    SHINE_WINDOW_TOKENS,
    once,
    reference,
    stand_in_questions,
)
from benchmarks.record import RESULTS, ROOT, write_result
from core.adapters import files as adapter_files
from core.adapters.base_model import BaseModel
from core.adapters.gated_memory import GatedMemory
from core.adapters.lora import stack
from core.adapters.weights import AdapterWeights
from core.config import digest
from core.lift.settings import LiftSettings
from core.lift.trainer import Job
from core.store.manifest import blob_hash
from core.training.examples import QuestionAnswer
from pipelines.evaluation.asking import Asker, evaluating
from pipelines.evaluation.lift_evaluation import LiftEvaluationSettings, Sheet, by_document, evaluate_lift, gate_telemetry
from pipelines.evaluation.lift_report import markdown, write_lift_report
from pipelines.evaluation.lifting import jobs_of, lifted, rule_questions, shine_adapters, snapshots
from pipelines.evaluation.long_documents import LongDocument, long_documents
from pipelines.evaluation.plots import Curves, curves

CHECKPOINTS = 10


class Point(NamedTuple):
    """Means over documents after `step` steps: exact match on the document, and reading another document's passage."""

    step: int
    exact_match: float
    reading: float


class Followed(NamedTuple):
    """The way of all documents, and their adapters at its end."""

    points: list[Point]
    adapters: list[AdapterWeights]


class Work:
    """What has been trained, in a folder of its own for each recipe, documents and starts."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        self._base, self._folder, self._started = base, folder, time.monotonic()

    def kept(self, name: str, identity: Any, make: Callable[[], Followed]) -> Followed:
        """What was made before for this identity, or what `make` makes."""
        folder = self._folder / f"{name}-{digest(identity)[:16]}"
        points = folder / "points.json"
        if not points.exists():
            made = make()
            for number, adapter in enumerate(made.adapters):
                adapter_files.save(adapter, self._base, folder / str(number))
            points.write_text(json.dumps(made.points))
        read = [Point(*values) for values in json.loads(points.read_text())]
        count = sum(1 for entry in folder.iterdir() if entry.is_dir())
        last = f", exact match {read[-1].exact_match:.3f}" if read else ""
        print(f"{time.monotonic() - self._started:6.0f} s  {name}{last}", flush=True)
        return Followed(read, [adapter_files.load(folder / str(number), self._base) for number in range(count)])


def follow(base: BaseModel, sheet: Sheet, jobs: Sequence[Job], settings: LiftSettings, checkpoints: int) -> Followed:
    """Trains all documents, and asks at `checkpoints` even steps and at the end."""
    asker, points = Asker(base, LiftEvaluationSettings().run), list[Point]()
    elsewhere = [(place + 1) % len(sheet.documents) for place in sheet.document_of]
    total = steps_of(jobs, settings)
    for step, adapters in snapshots(base, jobs, settings, sorted({total * n // checkpoints for n in range(checkpoints)}), RUN):
        weights, last = stack(adapters), adapters
        with evaluating(base.model):
            own = asker.score(*sheet.shown("nothing"), sheet.golds, sheet.answer_tokens, weights, sheet.document_of)
            read = asker.score(*sheet.shown("passage"), sheet.golds, sheet.answer_tokens, weights, elsewhere)
        means = (by_document(sheet, result.exact_match) for result in (own, read))
        points.append(Point(step, *(sum(values) / len(values) for values in means)))
        print(f"          step {step} of {total}: {points[-1].exact_match:.3f}", flush=True)
    return Followed(points, last)


def sheet_identity(documents: Sequence[LongDocument]) -> list[list[str]]:
    return [[document.id, document.text] for document in documents]


def steps_of(jobs: Sequence[Job], settings: LiftSettings) -> int:
    """Steps of the longest job, without early stop; segments are taken as few."""
    per_step = settings.curriculum.examples_per_step or 10**9
    asked = max(len(job.questions.ready()) for job in jobs)
    return sum(
        stage.epochs * max(1, -(-asked // per_step) if "questions" in stage.tasks else 1) for stage in settings.curriculum.stages
    )


def first_step(points: Sequence[Point], accuracy: float) -> int | None:
    """The first checkpoint at which `accuracy` is reached."""
    return next((point.step for point in points if point.exact_match >= accuracy), None)


def reading_at(points: Sequence[Point], accuracy: float) -> float | None:
    """Reading at the place where exact match first reaches `accuracy`, linear between checkpoints; None where it never does."""
    for before, after in pairwise(points):
        if before.exact_match < accuracy <= after.exact_match:
            share = (accuracy - before.exact_match) / (after.exact_match - before.exact_match)
            return before.reading + share * (after.reading - before.reading)
    return points[0].reading if points and points[0].exact_match >= accuracy else None


def compare_steps(plain: Sequence[Point], shine: Sequence[Point]) -> dict[str, Any]:
    """Steps to plain LIFT's final accuracy, by both ways; the share is None where SHINE's never gets there."""
    target = plain[-1].exact_match
    plain_steps, shine_steps = first_step(plain, target), first_step(shine, target)
    share = shine_steps / plain_steps if shine_steps is not None and plain_steps else None
    return {"accuracy": target, "plain_steps": plain_steps, "from_shine_steps": shine_steps, "share": share}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", type=int, default=PARTS)
    parser.add_argument("--seed", type=int, default=0, help="of the documents")
    parser.add_argument("--quick", action="store_true", help="two short documents and few steps: does it run?")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "lift_quality", help="a folder, for what is trained")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    seeds, parts, checkpoints = (2, 2, 2) if options.quick else (options.seeds, options.parts, CHECKPOINTS)

    lift, memory_lift, raw = map(once, (LIFT, MEMORY, RAW)) if options.quick else (LIFT, MEMORY, RAW)
    models = reference()
    base, documents = models.base, long_documents(seeds, parts, options.seed)
    written = stand_in_questions(documents, pairs=2 if options.quick else 10)
    sheet = Sheet(base, documents, LiftEvaluationSettings())
    starts = shine_adapters(models.hypernetwork, documents, SHINE_WINDOW_TOKENS, lift.adapter.rank)
    work = Work(base, options.work)
    asked = [sheet_identity(documents), [list(pairs) for pairs in written.pairs], checkpoints]

    def followed(name: str, recipe: LiftSettings, starts: Sequence[AdapterWeights] | None = None) -> Followed:
        identity = [asked, recipe.model_dump(mode="json"), [blob_hash(start.flat_BN.numpy().tobytes()) for start in starts or ()]]
        jobs = jobs_of(documents, written.pairs, starts)
        return work.kept(name, identity, lambda: follow(base, sheet, jobs, recipe, checkpoints))

    def trained(name: str, recipe: LiftSettings, pairs: Sequence[Sequence[QuestionAnswer]] | None = None) -> list[AdapterWeights]:
        identity = [sheet_identity(documents), [list(part) for part in pairs or ()], recipe.model_dump(mode="json")]
        jobs = jobs_of(documents, pairs)
        return work.kept(name, identity, lambda: Followed([], lifted(base, jobs, recipe, RUN).adapters)).adapters

    plain = followed("lift", lift)
    shine = followed("lift_from_shine", lift, starts)
    memory = followed("gated_memory", memory_lift)
    adapters: dict[str, Sequence[AdapterWeights]] = {
        "lift": plain.adapters,
        "lift_from_shine": shine.adapters,
        "gated_memory": memory.adapters,
        "lift_rules": trained("lift_rules", lift, rule_questions(documents)),
        "finetune_raw": trained("finetune_raw", raw),
        "shine": shine_adapters(models.hypernetwork, documents, SHINE_WINDOW_TOKENS),
    }
    report = evaluate_lift(base, documents, adapters, full=raw)
    memories = [part for part in memory.adapters if isinstance(part, GatedMemory)]
    folder = options.output / "lift_quality"
    values = write_lift_report(report, folder, gate_telemetry(base, sheet, memories))
    (folder / "lift_answers.jsonl").unlink()
    steps = compare_steps(plain.points, shine.points)
    equal = min(plain.points[-1].exact_match, memory.points[-1].exact_match)
    reading = {
        "document_accuracy": equal,
        "bare_base": report.reading[""].mean,
        "lora": reading_at(plain.points, equal),
        "gated_memory": reading_at(memory.points, equal),
    }
    draw(folder / "training", plain, shine, memory)
    values |= {"steps_to_accuracy": steps, "reading_at_equal_accuracy": reading}
    values |= {"curves": {"lift": plain.points, "lift_from_shine": shine.points, "gated_memory": memory.points}}
    values |= {"lift_settings": {"lift": lift.model_dump(mode="json"), "gated_memory": memory_lift.model_dump(mode="json")}}
    values |= {"written_pairs": [len(pairs) for pairs in written.pairs], "quick": options.quick}
    write_result("lift_quality", values, folder=options.output)
    print(markdown(report))
    for bar in values["bars"]:
        print(f"{'pass' if bar['passed'] else 'MISS'}  {bar['name']}: {bar['value']} {bar['relation']} {bar['limit']}")
    if not options.quick and not all(bar["passed"] for bar in values["bars"]):
        sys.exit(1)


def draw(path: Path, plain: Followed, shine: Followed, memory: Followed) -> None:
    ways = {"LIFT": plain, "LIFT from the SHINE adapter": shine, "LIFT, Gated Memory": memory}
    answered = {name: [(point.step, point.exact_match) for point in way.points] for name, way in ways.items()}
    read = {name: [(point.exact_match, point.reading) for point in way.points] for name, way in ways.items()}
    panels = [
        Curves("Accuracy while training", "optimiser steps", "exact match", answered),
        Curves("What reading in context loses", "exact match on the document", "exact match, other passages", read),
    ]
    curves(panels, "LIFT on documents longer than the window", path)


if __name__ == "__main__":
    main()

"""LIFT beside a slow and faulty question writer: every document ends, exactly the failed pairs are missing, little time is lost.

The stand-in for a language model runs in a process of its own with delays, 20 % replies that are no JSON and 5 % requests without
an answer. LIFT takes one epoch (v4's fast setting: what a document waits for; further epochs begin once all questions are there
and would follow in any case). Measured in turn: question writing alone, training alone on the pairs that it brought, and both at
once, with real training of all documents in one batch. Then a process that writes questions is killed half-way and run again on
its cache. Bars:

    both at once take at most 1.2 times the longer of the two alone
    a passage has no pairs if and only if its request failed for good
    after the kill no passage is asked again whose reply had been committed, and none is lost

Run from the root: `python -m benchmarks.lift.questions`; about 3 minutes on 2 cores. Exit status 1 where a bar is missed.
"""

import argparse
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lift.question_server import Manners, facts, question_server_process, read_record
from benchmarks.lift.setup import RUN, endpoint, settings
from benchmarks.record import RESULTS, ROOT, write_result
from core.adapters.base_model import BaseModel, load_base
from core.lift.course import PolledQuestions
from core.lift.trainer import Job, train
from core.questions.endpoint import EndpointSettings, request_body, request_key
from core.questions.stream import QuestionStream, QuestionWriter, ReplyCache
from pipelines.evaluation.lifting import jobs_of, lifted, write_questions
from pipelines.evaluation.long_documents import LongDocument, as_document, long_documents
from pipelines.world.lexicon import Attribute
from pipelines.world.reference import REFERENCE

SLOWDOWN = 1.2
FAULTS: dict[str, Any] = {"bad_json": 0.2, "silent": 0.05, "hang_s": 60.0}
TIMEOUT_S = 4.0
LIFT = settings((1, ("questions",)), examples_per_step=4)


class Together(NamedTuple):
    """Training beside question writing."""

    seconds: float
    ended: int
    streams: list[QuestionStream]


def settings_of(url: str, in_flight: int) -> EndpointSettings:
    return endpoint(url, in_flight=in_flight, timeout_s=TIMEOUT_S, retries=1, bad_reply_retries=1, backoff_s=0.05)


def train_beside(base: BaseModel, documents: list[LongDocument], settings: EndpointSettings) -> Together:
    """Training begins on the pairs that have arrived."""
    started = time.perf_counter()
    with QuestionWriter(settings) as writer:
        streams = [writer.write(as_document(document)) for document in documents]
        jobs = [
            Job(document.id, document.text, document.title, PolledQuestions(stream))
            for document, stream in zip(documents, streams, strict=True)
        ]
        results = list(train(base, jobs, LIFT, RUN))
        seconds = time.perf_counter() - started
    return Together(seconds, sum(result.weights is not None for result in results), streams)


def bodies(document: LongDocument, settings: EndpointSettings) -> list[dict[str, Any]]:
    """The request for each passage of a document."""
    whole = as_document(document)
    return [request_body(whole, passage, settings) for passage in settings.passages(whole.text)]


def exactly_the_failed(
    documents: list[LongDocument], streams: Sequence[QuestionStream], answered: set[str], settings: EndpointSettings
) -> dict[str, Any]:
    """Whether the passages that failed are those that the server never answered, and all others have their pairs."""
    lost = contradictions = without_pairs = 0
    for document, stream in zip(documents, streams, strict=True):
        failed = {failure.start for failure in stream.failures}
        with_pairs = {pair.start for pair in stream.result()}
        text = as_document(document).text
        for passage, body in zip(stream.passages, bodies(document, settings), strict=True):
            lost += passage.start in failed
            contradictions += (passage.start in failed) == (body["messages"][-1]["content"] in answered)
            states = any(isinstance(fact.topic, Attribute) for fact in facts(text[passage.start : passage.end]))
            without_pairs += states and passage.start not in failed and passage.start not in with_pairs
    return {"passages_lost": lost, "wrongly_lost_or_kept": contradictions, "wrongly_without_pairs": without_pairs}


def kill_and_resume(documents: list[LongDocument], manners: Manners, in_flight: int, parts: int) -> dict[str, Any]:
    """A process that writes questions, killed as soon as a third of the passages is answered, and run again."""
    with question_server_process(manners) as url, tempfile.TemporaryDirectory() as folder:
        settings, cache_path = settings_of(url, in_flight), Path(folder) / "replies.sqlite"
        total = sum(len(bodies(document, settings)) for document in documents)
        command = [sys.executable, "-m", "benchmarks.lift.questions", "--write", url, str(cache_path), str(in_flight)]
        shape = ["--documents", str(len(documents)), "--parts", str(parts)]
        with subprocess.Popen([*command, *shape], cwd=ROOT) as child:
            while len(read_record(url).answered) < total // 3 and child.poll() is None:
                time.sleep(0.05)
            finished_early = child.poll() is not None
            child.kill()
        before, committed = read_record(url), committed_replies(cache_path)
        written = write_questions(documents, settings, cache_path)
        after = read_record(url)
        lost = sum(len(failures) for failures in written.failures)
        kept = {
            body["messages"][-1]["content"]
            for document in documents
            for body in bodies(document, settings)
            if request_key(as_document(document), body, settings) in committed
        }
        return {
            "finished_before_the_kill": finished_early,
            "passages": total,
            "committed_before_the_kill": len(committed),
            "committed_and_asked_again": sum(after.asked[message] - before.asked[message] for message in kept),
            "lost": lost,
            "never_answered": total - len(set(after.answered)),
        }


def committed_replies(path: Path) -> set[str]:
    """The keys of the replies that a cache holds."""
    ReplyCache(path).close()
    with sqlite3.connect(path) as database:
        return {key for (key,) in database.execute("SELECT key FROM replies WHERE pairs IS NOT NULL")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--delay-s", type=float, default=1.0, help="of each reply")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="two short documents: does it run?")
    parser.add_argument(
        "--write", nargs=3, metavar=("URL", "CACHE", "IN_FLIGHT"), help="only write questions (the killed process)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    if options.write:
        url, cache, in_flight = options.write
        write_questions(long_documents(options.documents, options.parts), settings_of(url, int(in_flight)), cache)
        return

    count, parts, delay_s = (2, 2, 0.1) if options.quick else (options.documents, options.parts, options.delay_s)
    base, documents = load_base(REFERENCE / "base"), long_documents(count, parts)
    manners = Manners(delay_s=delay_s, **FAULTS)
    with question_server_process(manners) as url:
        alone = write_questions(documents, settings_of(url, options.in_flight))
    lifted(base, jobs_of(documents[:1], [alone.pairs[0][:32]]), LIFT, RUN)
    training_s = lifted(base, jobs_of(documents, alone.pairs), LIFT, RUN).seconds
    with question_server_process(manners) as url:
        settings = settings_of(url, options.in_flight)
        both = train_beside(base, documents, settings)
        missing = exactly_the_failed(documents, both.streams, set(read_record(url).answered), settings)
    resumed = kill_and_resume(documents, Manners(delay_s=delay_s), min(options.in_flight, 8), parts)
    ratio = both.seconds / max(alone.seconds, training_s)
    bars = {
        "both / longer of the two <= 1.2": ratio <= SLOWDOWN,
        "every document ends": both.ended == count,
        "exactly the failed pairs are missing": not missing["wrongly_lost_or_kept"] and not missing["wrongly_without_pairs"],
        "a killed job asks nothing twice that was committed": resumed["committed_and_asked_again"] == 0,
        "a killed job loses nothing": resumed["lost"] == 0 and resumed["never_answered"] == 0,
    }
    result = {
        "bars": bars,
        "generation_s": round(alone.seconds, 2),
        "training_s": round(training_s, 2),
        "both_s": round(both.seconds, 2),
        "ratio": round(ratio, 3),
        "one_after_the_other_ratio": round((alone.seconds + training_s) / max(alone.seconds, training_s), 3),
        "pairs": sum(map(len, alone.pairs)),
        "requests": alone.usage.requests,
        "retried": alone.usage.retried,
        **missing,
        "resumed": resumed,
        "faults": {**FAULTS, "delay_s": delay_s, "timeout_s": TIMEOUT_S},
        "quick": options.quick,
    }
    print(write_result("lift_questions", result, folder=options.output).read_text())
    if not options.quick and not all(bars.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

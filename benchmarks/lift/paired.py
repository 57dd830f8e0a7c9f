"""The README's lift example, before and after: does any document answer worse once it was lifted?

Documents of the reference world are converted with the shipped hypernetwork and asked their own questions through the server;
then `imprint lift --preset v4_fast` lifts them into the same store, with the questions that Imprint writes itself, and a new
server is asked the same. Answers are paired by question. Bar: no document answers fewer of its questions.

Run from the root: `python -m benchmarks.lift.paired`; about 3 minutes on 2 cores. Writes benchmarks/results/lift_paired.json.
Exit status 1 where the bar is missed.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx

from benchmarks.record import write_result
from core.training.metrics import exact_match
from pipelines.conversion.convert import convert
from pipelines.conversion.recipe import load_recipe
from pipelines.ray_session import free_port, ray_session
from pipelines.world.documents import WorldDocument, WorldSpec, generate, write
from pipelines.world.reference import REFERENCE
from serve.app import run as run_server
from serve.settings import ServeRun, ServeSettings


def answered(store: Path, documents: list[WorldDocument]) -> tuple[dict[str, list[bool]], Counter[str]]:
    """Which of its questions each document answers right, by a server of its own; and where the answers came from."""
    right: dict[str, list[bool]] = {}
    sources: Counter[str] = Counter()
    with run_server(ServeSettings(base=str(REFERENCE / "base"), store=str(store), run=ServeRun(port=free_port()))) as server:
        for document in documents:
            right[document.id] = []
            for question in document.questions:
                body = {
                    "model": f"base:{quote(document.id, safe='')}",
                    "messages": [{"role": "user", "content": question.question}],
                    "max_tokens": 16,
                }
                response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
                right[document.id].append(exact_match(response["choices"][0]["message"]["content"], question.answers))
                sources[response["imprint"]["source"]] += 1
    return right, sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="v4_fast")
    arguments = parser.parse_args()
    documents = list(generate(WorldSpec(seed=arguments.seed, split="test", count=arguments.documents)))
    with tempfile.TemporaryDirectory() as folder, ray_session(told_of_retries=False):
        _, source = write(documents, Path(folder) / "documents")
        store, base = Path(folder) / "store", str(REFERENCE / "base")
        convert(str(source), str(store), load_recipe(None, None, base, str(REFERENCE / "hypernetwork"), None, []))
        before, sources_before = answered(store, documents)
        summary = convert(str(source), str(store), load_recipe(None, "lift", base, None, arguments.preset, []))
        after, sources_after = answered(store, documents)
    questions = sum(map(len, before.values()))
    worse = sorted(name for name in before if sum(after[name]) < sum(before[name]))
    values: dict[str, Any] = {
        "documents": len(documents),
        "questions": questions,
        "preset": arguments.preset,
        "exact_match_before": sum(map(sum, before.values())) / questions,
        "exact_match_after": sum(map(sum, after.values())) / questions,
        "documents_worse": worse,
        "lifted": summary.documents["converted"],
        "withheld": summary.withheld,
        "sources_before": dict(sources_before),
        "sources_after": dict(sources_after),
    }
    write_result("lift_paired", values)
    print("\n".join(f"{name}: {value}" for name, value in values.items()))
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()

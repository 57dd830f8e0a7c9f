"""What `imprint store ls`, `show` and `stats` take as whole processes: time by the clock, CPU seconds, peak memory.

A store of small documents with an adapter each, in a few parts; each command runs in a process of its own, once for the caches of
the operating system and then `--rounds` times. With `--against`, a checkout of another commit (`git worktree add PATH COMMIT`)
takes turns with this one on the same store, so that whatever else the machine does falls on both. Figures are medians; `share` is
ours over theirs.

Run from the root: `python -m benchmarks.store.listing --against PATH`; about two minutes on 2 cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, write_result
from core.adapters.spec import AdapterSpec, SiteShape
from core.store.manifest import NewAdapter, Producer
from core.store.store import Store
from core.text.documents import Document, Window

SPEC = AdapterSpec(((SiteShape("q", 4, 6),),) * 2, rank=2)
PRODUCER = Producer(method="shine", weights="0" * 64, config={"base": "made up"})
PUTS = 5
COMMANDS = {"ls": ["ls", "{store}"], "show": ["show", "{store}", "document-000000"], "stats": ["stats", "{store}"]}


def make_store(url: str, documents: int) -> None:
    """Documents in `PUTS` commits, each in parts of its own."""
    store = Store.open(url, create=True)
    for turn in range(PUTS):
        some = [
            Document(tenant="default", collection="default", name=f"document-{number:06}", text=f"The text {number}.")
            for number in range(turn, documents, PUTS)
        ]
        store.put(some, [_adapter(one) for one in some])


def _adapter(of: Document) -> NewAdapter:
    return NewAdapter(
        tenant=of.tenant,
        content_hash=of.content_hash,
        window=Window(0, 5),
        producer=PRODUCER,
        spec=SPEC,
        encoding="bf16",
        vector=bytes(2 * SPEC.numel),
        tokens=5,
        quality=0.5,
    )


LAUNCHER = """
import json, os, subprocess, sys, time
with open(sys.argv[1], "wb") as said:
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[2:], stdout=said, stderr=said)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps([process.returncode, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""


def run(tree: Path, arguments: list[str]) -> dict[str, float]:
    """One process of `imprint store` in a checkout: seconds, CPU seconds, peak bytes.

    A small process starts it: on Linux the peak of a process counts what its parent held when it was forked, torch here.
    """
    with tempfile.NamedTemporaryFile() as said:
        done = subprocess.run(
            [sys.executable, "-S", "-c", LAUNCHER, said.name, sys.executable, "-m", "imprint", "store", *arguments],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=True,
        )
        code, seconds, cpu_s, peak_kib = json.loads(done.stdout)
        if code:
            raise SystemExit(f"{' '.join(arguments)} in {tree.name} ended with {code}:\n{Path(said.name).read_text()}")
    return {"s": seconds, "cpu_s": cpu_s, "peak_mb": peak_kib * 1024 / 1e6}


def measure(trees: dict[str, Path], store: str, rounds: int) -> dict[str, Any]:
    """For each command and tree, the medians; the trees take turns."""
    figures: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        arguments = [word.format(store=store) for word in command]
        taken: dict[str, list[dict[str, float]]] = {which: [] for which in trees}
        for turn in range(rounds + 1):
            for which, tree in trees.items():
                once = run(tree, arguments)
                if turn:
                    taken[which].append(once)
        figures[name] = {which: _medians(several) for which, several in taken.items()}
        if "against" in trees:
            ours, theirs = figures[name]["ours"], figures[name]["against"]
            figures[name]["share"] = {what: round(ours[what] / theirs[what], 3) for what in ours}
    return figures


def _medians(several: list[dict[str, float]]) -> dict[str, float]:
    return {what: round(statistics.median(each[what] for each in several), 3) for what in several[0]}


def commit_of(tree: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tree} is no checkout: make one with `git worktree add {tree} COMMIT`")
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    trees = {"ours": ROOT}
    figures: dict[str, Any] = {"documents": options.documents, "rounds": options.rounds}
    if options.against is not None:
        trees["against"] = options.against.resolve()
        figures["against_commit"] = commit_of(trees["against"])
    with tempfile.TemporaryDirectory() as folder:
        make_store(folder, options.documents)
        figures |= measure(trees, folder, options.rounds)
    print(write_result("store_listing", figures, folder=options.output).read_text())


if __name__ == "__main__":
    main()

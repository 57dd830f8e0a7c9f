"""Throughput and memory of `pipelines.conversion.convert` from beginning to end: 20,000 small documents of the reference world.

Weights are random in the reference shape, as in `benchmarks.conversion.throughput`. While the conversion runs, the memory of the
driver, of the conversion actors and of the rest of its Ray is read twice a second (proportional set size, so that what processes
share counts once; the object store is apart), with the documents done by then. Then the same command runs again over the finished
store: what a rerun costs where all is there. Flat is said of the second and the last fifth of the documents, the first one being
start-up: their rate and the actors' highest memory. What lies in the store's folder, manifest and leftovers included, is held
against the bytes of adapters and texts alone.

Run from the root: `python -m benchmarks.conversion.scale`; about 6 minutes on 2 cores. Writes results/conversion_scale.json and
conversion_scale.png.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import matplotlib.pyplot as plt
import numpy as np
from transformers.utils import logging

from benchmarks.conversion.throughput import HYPERNETWORK, SHAPE, build
from benchmarks.record import RESULTS, write_result
from core.store.store import Store
from pipelines.conversion.convert import Corpus, convert, corpus_of, receipts
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from pipelines.ray_session import ray_session

PERIOD_S = 0.5
PARTS = 5
PROCESSES = ("driver", "actors", "others")
ACTOR = "ray::Converter"


class Sample(NamedTuple):
    """A moment of a conversion: seconds since it began, documents done, MiB of the driver, of all actors, of the rest of Ray."""

    time_s: float
    documents: int
    driver: float
    actors: float
    others: float


class Watch(threading.Thread):
    """Samples this process and all below it until it is stopped. `documents` is for the driver to set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.documents = 0
        self._start, self._end = time.perf_counter(), threading.Event()

    def run(self) -> None:
        while not self._end.wait(PERIOD_S):
            driver = actors = others = 0.0
            for pid in descendants(os.getpid()):
                mib = memory_mib(pid)
                if pid == os.getpid():
                    driver = mib
                elif ACTOR in title(pid):
                    actors += mib
                else:
                    others += mib
            self.samples.append(Sample(time.perf_counter() - self._start, self.documents, driver, actors, others))

    def stop(self) -> list[Sample]:
        self._end.set()
        self.join()
        return [*self.samples, self.samples[-1]._replace(time_s=time.perf_counter() - self._start, documents=self.documents)]


def descendants(root: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory_mib(pid: int) -> float:
    """The proportional set size without memory that is shared as files in /dev/shm, which is Ray's object store."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    kib = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return (kib["Pss:"] - kib["Pss_Shmem:"]) / 1024


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def watched(corpus: Corpus, store: Store, recipe: ConvertRecipe) -> list[Sample]:
    watch = Watch()
    watch.start()
    try:
        for batch in receipts(corpus, store, recipe):
            watch.documents += len(batch)
    finally:
        samples = watch.stop()
    return samples


def part(samples: list[Sample], number: int) -> dict[str, float]:
    """Rate and highest memory of one of `PARTS` equal parts of the documents."""
    begun = [each for each in samples if each.documents]
    reached_s = {each.documents: each.time_s for each in reversed(begun)}
    documents = samples[-1].documents / PARTS
    ends = [number * documents, (number + 1) * documents]
    first_s, last_s = np.interp(ends, sorted(reached_s), sorted(reached_s.values()))
    inside = [each for each in begun if first_s <= each.time_s <= last_s]
    highest = {f"{name}_mib": round(max((getattr(each, name) for each in inside), default=0)) for name in PROCESSES}
    return {"documents_per_s": round(documents / (last_s - first_s), 2), **highest}


def plot(samples: list[Sample], path: Path) -> None:
    """Documents a second (over 10 s) and memory, over the documents that were done."""
    figure, (rate, memory) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    window = round(10 / PERIOD_S)
    moving = [
        (now.documents, (now.documents - before.documents) / (now.time_s - before.time_s))
        for before, now in zip(samples, samples[window:], strict=False)
        if before.documents
    ]
    rate.plot([documents for documents, _ in moving], [per_s for _, per_s in moving])
    rate.set(ylabel="documents/s", ylim=(0, None))
    for name in PROCESSES:
        memory.plot([each.documents for each in samples], [getattr(each, name) for each in samples], label=name)
    memory.set(ylabel="MiB", xlabel="documents done", ylim=(0, None))
    memory.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    logging.disable_progress_bar()

    load_start = os.getloadavg()[0]
    run = ConvertRun(min_actors=options.actors, actors=options.actors)
    with ray_session(num_cpus=options.actors + 2, include_dashboard=False), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, recipe = build(folder, options.documents, run)
        store = Store.open(folder / "store", create=True)
        samples = watched(corpus_of(str(path), recipe), store, recipe)
        again = convert(str(path), store.url, recipe)
        store.refresh()
        stats = store.stats()
        stored_bytes = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())
    if (stats.documents, stats.adapters) != (options.documents, options.documents):
        raise SystemExit(f"not every document was converted: {stats}")
    if again.documents != {"unchanged": options.documents}:
        raise SystemExit(f"the rerun converted again: {dict(again.documents)}")
    parts = [part(samples, number) for number in range(PARTS)]
    rates = [each["documents_per_s"] for each in parts]
    options.output.mkdir(parents=True, exist_ok=True)
    plot(samples, options.output / "conversion_scale.png")
    result: dict[str, Any] = {
        "rate_last_to_second_part": round(rates[-1] / rates[1], 3),
        "actors_memory_last_to_second_part": round(parts[-1]["actors_mib"] / parts[1]["actors_mib"], 3),
        "driver_memory_last_to_second_part": round(parts[-1]["driver_mib"] / parts[1]["driver_mib"], 3),
        "documents_per_s": round(statistics.fmean(rates), 2),
        "parts": parts,
        "stored_to_raw_bytes": round(stored_bytes / (stats.adapter_bytes + stats.text_bytes), 5),
        "rerun_documents_per_s": round(again.documents_per_s, 1),
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "model": {"architecture": "qwen3", **SHAPE, "hypernetwork": HYPERNETWORK.model_dump(mode="json")},
        "load_at_start": round(load_start, 1),
    }
    print(write_result("conversion_scale", result, folder=options.output).read_text())


if __name__ == "__main__":
    main()

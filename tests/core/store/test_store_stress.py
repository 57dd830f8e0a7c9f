"""Eight writers at once, in threads and processes: nothing is lost, and whoever reads meanwhile sees whole versions."""

import multiprocessing
import threading
from pathlib import Path

import pytest
import torch

from core.store.store import Store
from tests.stores import adapter, document, vector

PROCESSES = 3
THREADS = 2
WRITERS = PROCESSES * THREADS + 2


def write(store: Store, writer: int, commits: int) -> None:
    for number in range(commits):
        one = document(f"text {writer} {number}", name=f"{writer}-{number}")
        shared = document(f"shared {number}", name=f"shared-{number}")
        gone = document(f"gone {writer} {number}", name=f"gone-{writer}")
        store.put([one, shared, gone], [adapter(each, seed) for each, seed in ((one, number), (shared, writer), (gone, 0))])
        assert store.delete_document("tenant", "c", gone.name)


def write_in_threads(url: str, writers: list[int], commits: int) -> None:
    store = Store.open(url)
    failures: list[BaseException] = []

    def run(writer: int) -> None:
        try:
            write(store, writer, commits)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def check_version(store: Store) -> None:
    """All that a version says of itself agrees, and a document comes with its adapter."""
    index = store._versions.index
    rows = [row for table in index.tables("documents") for row in table.to_pylist()]
    adapters = {(row["tenant"], row["content_hash"]) for table in index.tables("adapters") for row in table.to_pylist()}
    assert (len(rows), sum(row["length"] for row in rows)) == (index.root.totals.documents, index.root.totals.text_bytes)
    assert len({row["name"] for row in rows}) == len(rows) and len(adapters) == index.root.totals.adapters
    assert {(row["tenant"], row["content_hash"]) for row in rows} <= adapters
    assert max((row["sequence"] for row in rows), default=0) <= index.root.sequence


def stress(url: str, commits: int) -> None:
    """Eight writers in four processes, each with that many commits, and a reader of every version."""
    Store.open(url, create=True)
    context = multiprocessing.get_context("spawn")
    shares = [list(range(start, start + THREADS)) for start in range(0, PROCESSES * THREADS, THREADS)]
    jobs = [context.Process(target=write_in_threads, args=(url, share, commits)) for share in shares]
    for job in jobs:
        job.start()
    ours = threading.Thread(target=write_in_threads, args=(url, list(range(PROCESSES * THREADS, WRITERS)), commits))
    ours.start()
    reader, sequences = Store.open(url, cache_bytes=2**20), list[int]()
    while ours.is_alive() or any(job.is_alive() for job in jobs):
        if reader.refresh():
            sequences.append(reader.sequence)
            check_version(reader)
        jobs[0].join(0.02)
    ours.join()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert sequences == sorted(set(sequences)) and len(sequences) > 5
    store = Store.open(url)
    check_version(store)
    names = {f"{writer}-{number}": f"text {writer} {number}" for writer in range(WRITERS) for number in range(commits)}
    names |= {f"shared-{number}": f"shared {number}" for number in range(commits)}
    rows = list_all(store)
    assert {row.name: text.decode() for row, text in zip(rows, store.get_many(rows), strict=True)} == names
    assert store.stats()[2:4] == (len(names), len(names) + WRITERS * commits) == store.stats("tenant")[2:4]
    for number in range(commits):
        found = [store.find_adapters("tenant", document(f"text {writer} {number}").content_hash) for writer in range(WRITERS)]
        assert all(len(each) == 1 and torch.equal(store.get_vector(each[0]), vector(number)) for each in found)
    assert store.stats().parts < 2 * 100


def list_all(store: Store) -> list:
    return [row for row, _ in store.each_document("tenant")]


def test_eight_writers_lose_nothing(tmp_path: Path) -> None:
    stress(str(tmp_path), commits=7)
    assert not list(tmp_path.glob("**/.unfinished/*"))


@pytest.mark.slow
def test_eight_writers_lose_nothing_in_a_thousand_commits(tmp_path: Path) -> None:
    stress(str(tmp_path), commits=63)

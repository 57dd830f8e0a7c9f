"""The manifest of a million documents with an adapter each, and no shards: memory and times of what a store does with it.

Rows are made up and written through the store's own part writer, in the levels that merging leaves (`core.store.merging`): most
in level 2, some in level 1, and 30 small parts of either kind on top. A fresh process then opens the store and measures; its peak
memory is of all that it did, with torch and arrow loaded. Names are in order, hashes are random, as they are in any corpus.
resume_s: all documents that have an adapter, by one pass over the rows of both. diff_s: all names against other contents.

Run from the root: `python -m benchmarks.store.scale`; about 3 minutes on 2 cores and 350 MB of disk.
"""

import argparse
import hashlib
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.record import RESULTS, write_result
from core.adapters.spec import AdapterSpec, SiteShape
from core.store.manifest import NewAdapter, PartKind, Producer
from core.store.objects import FileObjects
from core.store.opening import open_objects
from core.store.parts import PART_ROWS, SCHEMAS, Rows, encode_part
from core.store.roots import Part, Root, Roots, Totals
from core.store.store import Store
from core.text.documents import Document, Window

TENANT, COLLECTION = "tenant", "corpus"
SPEC = AdapterSpec(((SiteShape("q", 4, 6),),) * 2, rank=2)
PRODUCER = Producer(method="shine", weights="0" * 64, config={"base": "made up"})
VECTOR_BYTES = 1_000_000
TEXT_BYTES = 3_000
DOCUMENTS_A_SHARD = 250
LEVEL_1_SHARE = 0.06
SMALL_PARTS = 30
SMALL_ROWS = 200


class CountingObjects(FileObjects):
    """Counts reads, and what they bring."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.reads = 0
        self.read_bytes = 0

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().read(name, offset, length)
        self.reads += 1
        self.read_bytes += len(data)
        return data


def name_of(number: int) -> str:
    return f"documents/{number // 1000:06}/{number:09}.txt"


def content_of(number: int) -> str:
    return hashlib.sha256(f"content {number}".encode()).hexdigest()


def made_up(kind: PartKind, numbers: np.ndarray) -> Rows:
    """Rows of these documents or of their adapters, in order."""
    contents = [content_of(number) for number in numbers.tolist()]
    hashes = [hashlib.sha256(f"{kind} {number}".encode()).hexdigest() for number in numbers.tolist()]
    count = len(numbers)
    columns: dict[str, Any] = {
        "tenant": [TENANT] * count,
        "content_hash": contents,
        "shard": [f"{number // DOCUMENTS_A_SHARD:032x}.bin" for number in numbers.tolist()],
        "offset": (numbers % DOCUMENTS_A_SHARD) * (VECTOR_BYTES + TEXT_BYTES) + (0 if kind == "documents" else TEXT_BYTES),
        "length": np.full(count, TEXT_BYTES if kind == "documents" else VECTOR_BYTES),
        "blob_hash": [hashlib.sha256(each.encode()).hexdigest() for each in hashes],
        "created": np.full(count, 1_800_000_000_000_000) + numbers,
        "sequence": np.full(count, 2),
        "deleted": np.zeros(count, bool),
    }
    if kind == "documents":
        columns |= {"collection": [COLLECTION] * count, "name": [name_of(number) for number in numbers.tolist()]}
        columns["title"] = [f"Document {number}" for number in numbers.tolist()]
    else:
        columns |= {"adapter_id": hashes, "window_start": np.zeros(count, np.int64), "window_end": np.full(count, 700)}
        columns |= {"producer_fingerprint": [PRODUCER.fingerprint] * count, "spec_fingerprint": [SPEC.fingerprint] * count}
        columns |= {"encoding": ["bf16"] * count, "tokens": np.full(count, 700), "rank": np.full(count, SPEC.rank)}
        columns["quality"] = (numbers % 1000) / 1000
    schema = SCHEMAS[kind]
    rows = Rows(
        kind,
        pa.table(
            [
                pa.array(columns[name], type_) if name in columns else pa.nulls(count, type_)
                for name, type_ in zip(schema.names, schema.types, strict=True)
            ],
            schema=schema,
        ),
    )
    order = pc.sort_indices(rows.keys)
    return Rows(kind, rows.table.take(order), rows.keys.take(order))


def write_manifest(url: str, documents: int) -> None:
    """Makes the store. The documents are shared out among the levels at random."""
    objects = open_objects(url)
    chance = np.random.default_rng(0)
    numbers = chance.permutation(documents)
    small = numbers[: SMALL_PARTS * SMALL_ROWS].reshape(SMALL_PARTS, SMALL_ROWS)
    rest = numbers[SMALL_PARTS * SMALL_ROWS :]
    cut = int(LEVEL_1_SHARE * documents)
    levels = [(0, each) for each in small] + [(1, rest[:cut]), (2, rest[cut:])]
    parts: list[Part] = []
    kinds: tuple[PartKind, ...] = ("documents", "adapters")
    for kind in kinds:
        for level, chosen in levels:
            ranked = sorted(chosen.tolist(), key=name_of if kind == "documents" else content_of)
            for start in range(0, len(ranked), PART_ROWS):
                part, data = encode_part(made_up(kind, np.array(ranked[start : start + PART_ROWS])), level)
                objects.write(part.object_name, [data])
                parts.append(part)
    totals = Totals(
        documents=documents, text_bytes=documents * TEXT_BYTES, adapters=documents, adapter_bytes=documents * VECTOR_BYTES
    )
    roots = Roots(objects)
    first = Root().next([])
    root = first.next(parts, totals, {PRODUCER.fingerprint: PRODUCER}, {SPEC.fingerprint: SPEC})
    if not (roots.create(first) and roots.create(root)):
        raise SystemExit(f"{url} is not empty")


def measure(url: str, documents: int, cache_bytes: int, results: Any) -> None:
    """Opens the store and measures; puts the figures into `results`."""
    chance = random.Random(1)
    objects = CountingObjects(url)
    loaded = peak_bytes()
    start = time.perf_counter()
    store = Store(objects, cache_bytes)
    store.refresh()
    figures: dict[str, Any] = {"open_ms": ms_since(start), "open_reads": objects.reads, "open_read_bytes": objects.read_bytes}
    figures["parts"] = store.stats().parts

    def timed(action: Callable[[int], object], numbers: list[int]) -> dict[str, float]:
        times = []
        for number in numbers:
            start = time.perf_counter()
            if not action(number):
                raise SystemExit(f"document {number} was not found")
            times.append(ms_since(start))
        ordered = sorted(times)
        return {
            "median": round(statistics.median(times), 2),
            "p99": round(ordered[int(0.99 * len(ordered))], 2),
            "most": round(ordered[-1], 2),
        }

    def document(number: int) -> object:
        return store.find_document(TENANT, COLLECTION, name_of(number))

    def adapters(number: int) -> object:
        return store.find_adapters(TENANT, content_of(number))

    def page(number: int) -> object:
        return len(store.list_documents(TENANT, COLLECTION, page_token=token(number), limit=100).rows) == 100

    def token(number: int) -> str:
        from core.store.index import continue_after

        return continue_after(COLLECTION, name_of(number))

    sample = [chance.randrange(documents - 200) for _ in range(100)]
    before = objects.reads
    figures["first_lookup_ms"] = ms_of(lambda: document(sample[0]))
    figures["first_lookup_reads"] = objects.reads - before
    for what, action in (("document", document), ("adapters", adapters), ("page_of_100", page)):
        figures[f"{what}_cold_ms"] = timed(action, sample)
        figures[f"{what}_warm_ms"] = timed(action, sample)
    anywhere = [chance.randrange(documents - 200) for _ in range(1000)]
    figures["document_anywhere_ms"] = timed(document, anywhere)
    figures["adapters_anywhere_ms"] = timed(adapters, anywhere)

    start, listed, token_ = time.perf_counter(), 0, None
    while True:
        rows, token_ = store.list_documents(TENANT, page_token=token_, limit=1000)
        listed += len(rows)
        if token_ is None:
            break
    figures["list_all_s"] = ms_since(start) / 1000
    start, scanned = time.perf_counter(), sum(len(table) for table in store.tables("documents"))
    figures["scan_documents_s"] = ms_since(start) / 1000
    batch = [chance.randrange(documents) for _ in range(20_000)]
    start = time.perf_counter()
    known = store.find_documents([(TENANT, COLLECTION, name_of(number)) for number in batch])
    figures["find_20000_documents_s"] = ms_since(start) / 1000
    start = time.perf_counter()
    held = store.find_adapters_of([(TENANT, row.content_hash) for row in known.values()])
    figures["find_their_adapters_s"] = ms_since(start) / 1000
    if not len(known) == len(held) == len(set(batch)):
        raise SystemExit(f"of {len(set(batch))} documents {len(known)} were found, and adapters of {len(held)}")
    start = time.perf_counter()
    contents = {
        kind: pa.chunked_array([chunk for table in store.tables(kind) for chunk in table["content_hash"].chunks])
        for kind in SCHEMAS
    }
    seen = pc.sum(pc.is_in(contents["documents"], value_set=contents["adapters"])).as_py()
    figures["resume_s"] = ms_since(start) / 1000
    start, edited = time.perf_counter(), 0
    for numbers in batches(documents, 1000):
        after = token(numbers[0] - 1) if numbers[0] else None
        rows = store.list_documents(TENANT, COLLECTION, limit=1000, page_token=after).rows
        edited += sum(row.content_hash != content_of(number) for row, number in zip(rows, numbers, strict=True))
    figures["diff_s"] = ms_since(start) / 1000
    if (listed, scanned, seen, edited) != (documents, documents, documents, 0):
        raise SystemExit(f"of {documents} documents {listed} were listed, {scanned} scanned, {seen} resumed, {edited} differ")
    start = time.perf_counter()
    one = Document(tenant=TENANT, collection=COLLECTION, name="one more", text="A text.")
    vector = bytes(2 * SPEC.numel)
    store.put(
        [one],
        [
            NewAdapter(
                tenant=TENANT,
                content_hash=one.content_hash,
                window=Window(0, 1),
                producer=PRODUCER,
                spec=SPEC,
                encoding="bf16",
                vector=vector,
                tokens=1,
            )
        ],
    )
    figures["put_ms"] = ms_since(start)
    figures["cache_bytes"] = store._versions.reader._cached_bytes
    figures["loaded_bytes"], figures["peak_bytes"] = loaded, peak_bytes()
    results.put(figures)


def batches(documents: int, size: int) -> Iterator[range]:
    for start in range(0, documents, size):
        yield range(start, min(start + size, documents))


def ms_since(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 2)


def ms_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return ms_since(start)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--cache-bytes", type=int, default=2**28)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_manifest(folder, options.documents)
        manifest_bytes = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        figures: dict[str, Any] = {
            "documents": options.documents,
            "write_s": ms_since(start) / 1000,
            "manifest_bytes": manifest_bytes,
        }
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        child = context.Process(target=measure, args=(folder, options.documents, options.cache_bytes, results))
        child.start()
        figures |= results.get()
        child.join()
    print(write_result("store_scale", figures, folder=options.output).read_text())


if __name__ == "__main__":
    main()

"""A whole conversion at real shapes on one GPU, random weights: files in, a store on disk out, against the bare forward passes.

One conversion worker (`pipelines.conversion.converter.Converter`, what Ray runs in an actor) with reading and tokenising a buffer
ahead in a thread, as Ray's tasks do on other cores. Bare: `Hypernetwork.generate` over the same documents in the same batches,
nothing kept. MFU counts as `benchmarks.training.gpu` does, over the whole time from the first file opened to the last commit.
Bar: 50 % at 0.6b and 8b.

Run from the root: `python -m benchmarks.conversion.gpu --shape 0.6b` (8b); minutes. Prints and writes
benchmarks/results/gpu_conversion_SHAPE.json; exit status 1 where the bar is missed. The store is made in --scratch and removed:
43.6 MB a document at 8b. `--device cpu --shape tiny` shows on any machine that it runs.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.record import RESULTS, write_result
from benchmarks.training.gpu import SHAPES, build, operations
from core.shine.hypernetwork import Hypernetwork
from core.shine.writer import HypernetworkWriter
from core.store.store import Store
from core.training.examples import plan_batches
from core.writing.writer import WindowRule
from pipelines.conversion.converter import Converter, prepare
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from pipelines.corpus import sources
from pipelines.world.tokenizer import build_tokenizer

MFU = 0.5


def write_corpus(path: Path, documents: int, tokens: int) -> None:
    """Documents of so many words of the tokenizer, one token each, in sentences; every fourth is half as long."""
    draw = random.Random(0)
    words = [word for word in build_tokenizer().get_vocab() if word.startswith("Ġ") and word[1:].isalpha()]
    with path.open("w") as lines:
        for number in range(documents):
            count = tokens // 2 if number % 4 == 3 else tokens
            chosen = [word[1:] for word in draw.choices(words, k=count - count // 20)]
            text = ". ".join(" ".join(chosen[start : start + 19]) for start in range(0, len(chosen), 19))
            lines.write(json.dumps({"id": f"{number:06}", "text": text}) + "\n")


def buffers(corpus: Path, run: ConvertRun) -> Iterator[pa.Table]:
    """Prepared rows, `run.buffer_documents` at a time, one buffer ahead of who takes them."""
    tokenizer = build_tokenizer()
    rows = pa.concat_tables(sources.read(sources.open_source(str(corpus), "default", "default")))
    starts = range(0, len(rows), run.buffer_documents)
    with ThreadPoolExecutor(1) as thread:
        ahead = [thread.submit(prepare, rows.slice(starts[0], run.buffer_documents), tokenizer)]
        for start in starts[1:]:
            ahead.append(thread.submit(prepare, rows.slice(start, run.buffer_documents), tokenizer))
            yield ahead.pop(0).result()
        yield ahead.pop().result()


def bare_s(hypernetwork: Hypernetwork, lengths: Sequence[int], run: ConvertRun) -> float:
    """Seconds of the forward passes alone, in the batches of a conversion's buffers."""
    device, memory = hypernetwork.base.device, len(hypernetwork.memory_MH)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    shapes = []
    for start in range(0, len(lengths), run.buffer_documents):
        part = [length + memory for length in lengths[start : start + run.buffer_documents]]
        shapes += [(len(batch), part[batch[0]] - memory) for batch in plan_batches(part, run.batch_rows, run.batch_tokens)]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        for number, (rows, longest) in enumerate([shapes[0], *shapes]):
            if number == 1:
                wait()
                started = time.perf_counter()
            ids = torch.randint(0, 1000, (rows, longest), device=device)
            hypernetwork.generate(ids, torch.ones_like(ids))
        wait()
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--documents", type=int, default=1024)
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--buffer-documents", type=int, default=512)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16; the datasheet's figure for an H200")
    parser.add_argument("--scratch", type=Path, help="where the store is made; the system's temporary folder where not given")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args(arguments)
    hypernetwork = build(options.shape, options.device, build_tokenizer())
    run = ConvertRun(
        device=options.device,
        dtype="bfloat16",
        buffer_documents=options.buffer_documents,
        batch_rows=options.batch_rows,
        batch_tokens=options.batch_tokens,
    )
    recipe = ConvertRecipe(base="random", hypernetwork="random", run=run)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        corpus, store = Path(name) / "corpus.jsonl", Store.open(Path(name) / "store", create=True)
        write_corpus(corpus, options.documents, options.document_tokens)
        rule = WindowRule(max_tokens=2 * options.document_tokens)
        writer = HypernetworkWriter(hypernetwork, "bf16", rule, run.batch_rows, run.batch_tokens)
        converter = Converter(store.url, recipe, writer=writer)
        started, lengths = time.perf_counter(), []
        for number, rows in enumerate(buffers(corpus, run)):
            done = converter(rows)
            if set(done["status"].to_pylist()) != {"converted"}:
                raise SystemExit(f"not every document was converted: {done['reason'].to_pylist()[:3]}")
            lengths += [len(ids) for ids in rows["ids"].to_pylist()]
            print(f"{time.perf_counter() - started:6.1f} s  buffer {number + 1}", flush=True)
        seconds = time.perf_counter() - started
        store.refresh()
        stored_bytes = store.stats().adapter_bytes
    alone = bare_s(hypernetwork, lengths, run)
    worked = sum(operations(hypernetwork, 1, length) for length in lengths)
    mfu = worked / seconds / (options.peak_tflops * 1e12)
    result: dict[str, Any] = {
        "bar": {"name": "MFU of a whole conversion", "value": mfu, "relation": ">=", "limit": MFU, "passed": mfu >= MFU},
        "shape": options.shape,
        "documents_per_s": len(lengths) / seconds,
        "tokens_per_s": sum(lengths) / seconds,
        "written_mb_per_s": stored_bytes / seconds / 1e6,
        "bare_documents_per_s": len(lengths) / alone,
        "bare_mfu": worked / alone / (options.peak_tflops * 1e12),
        "share_of_bare": alone / seconds,
        "settings": {key: value for key, value in vars(options).items() if key not in ("output", "scratch")},
    }
    print(write_result(f"gpu_conversion_{options.shape}", result, options.device, options.output).read_text())
    if mfu < MFU and options.shape != "tiny":
        sys.exit(1)


if __name__ == "__main__":
    main()

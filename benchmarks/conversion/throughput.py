"""Documents per second of `pipelines.conversion.convert` against a plain loop over the same hypernetwork, one document at a time.

Both read the same JSONL of the reference world, tokenise, generate, check, encode and commit to a store of their own; start-up
(Ray, imports, loading models) is left out on both sides, reading and the last commit are in. The plain loop runs with 1 and with
2 torch threads, and the faster counts; it commits each document, and in a second variant as many at once as the conversion does,
which takes the store out of the comparison. Ways alternate, so that all meet the same machine. Weights are random in the
reference shape: cost does not depend on them.

Run from the root: `python -m benchmarks.conversion.throughput`; about 8 minutes on 2 cores.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.utils import logging

from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import load_base
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.store.manifest import NewAdapter
from core.store.store import Store
from core.text.documents import Document
from core.writing.writer import AdapterWriter, Written
from pipelines.conversion.convert import convert
from pipelines.conversion.converter import open_writer, prepare, tokens_of
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from pipelines.corpus import sources
from pipelines.ray_session import ray_session
from pipelines.world import documents as world
from pipelines.world.tokenizer import build_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
HYPERNETWORK = HypernetworkSettings(rank=4, meta_rank=16, num_heads=4, feed_forward=256, input_norm="layer", scale=1e-2)
THREADS = (1, 2)


def build(folder: Path, documents: int, run: ConvertRun) -> tuple[Path, ConvertRecipe]:
    """Writes corpus, base and hypernetwork."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=len(tokenizer), **SHAPE))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    Hypernetwork(load_base(folder / "base"), HYPERNETWORK).save(folder / "hypernetwork")
    _, corpus = world.write(world.generate(world.WorldSpec(count=documents)), folder / "corpus")
    return corpus, ConvertRecipe(base=str(folder / "base"), hypernetwork=str(folder / "hypernetwork"), run=run)


def plain_loop(writer: AdapterWriter, corpus: Path, store: Path, documents: int, commit_documents: int) -> float:
    """Documents per second, one document at a time."""
    target = Store.open(store, create=True)
    tokenizer = writer.tokenizer
    new_documents: list[Document] = []
    new_adapters: list[NewAdapter] = []
    start = time.perf_counter()
    for row in islice(_rows(corpus), documents):
        [prepared] = prepare(row, tokenizer).to_pylist()
        document = Document(**{name: prepared[name] for name in ("tenant", "collection", "name", "title", "text")})
        [outcome] = writer.write([document], [tokens_of(prepared)])
        assert isinstance(outcome, Written)
        new_documents.append(document)
        new_adapters += outcome.adapters
        if len(new_documents) >= commit_documents:
            target.put(new_documents, new_adapters)
            new_documents, new_adapters = [], []
    target.put(new_documents, new_adapters)
    return documents / (time.perf_counter() - start)


def _rows(corpus: Path) -> Iterator[Any]:
    for table in sources.read(sources.open_source(str(corpus), "default", "default")):
        for place in range(len(table)):
            yield table.slice(place, 1)


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 2), "of_each_round": [round(value, 2) for value in values]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=6000, help="of a conversion")
    parser.add_argument("--plain-documents", type=int, default=400, help="of a plain loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--buffer-documents", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    logging.disable_progress_bar()

    run = ConvertRun(
        min_actors=options.actors, actors=options.actors, batch_rows=options.batch_rows, buffer_documents=options.buffer_documents
    )
    rates: dict[str, list[float]] = {"conversion": [], "plain": [], "plain_commits_grouped": []}
    load_start = os.getloadavg()[0]
    with ray_session(num_cpus=options.actors + 2, include_dashboard=False), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, recipe = build(folder, options.documents, run)
        writer = open_writer(recipe)
        plain_loop(writer, corpus, folder / "warm", 20, 1)
        for number in range(options.rounds):
            for way, commit_documents in (("plain", 1), ("plain_commits_grouped", options.buffer_documents)):
                by_threads = []
                for threads in THREADS:
                    torch.set_num_threads(threads)
                    store = folder / f"{way}-{number}-{threads}"
                    by_threads.append(plain_loop(writer, corpus, store, options.plain_documents, commit_documents))
                rates[way].append(max(by_threads))
            summary = convert(str(corpus), str(folder / f"conversion-{number}"), recipe)
            if summary.documents != {"converted": options.documents}:
                raise SystemExit(f"not every document was converted: {dict(summary.documents)}")
            rates["conversion"].append(summary.documents_per_s)
            print(f"round {number + 1}: " + ", ".join(f"{way} {values[-1]:,.1f}/s" for way, values in rates.items()), flush=True)

    def ratios(way: str) -> list[float]:
        return [ours / plain for ours, plain in zip(rates["conversion"], rates[way], strict=True)]

    result = {
        "ratio": spread(ratios("plain")),
        "ratio_commits_grouped": spread(ratios("plain_commits_grouped")),
        **{f"{way}_documents_per_s": spread(values) for way, values in rates.items()},
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "model": {"architecture": "qwen3", **SHAPE, "hypernetwork": HYPERNETWORK.model_dump(mode="json")},
        "load_at_start": round(load_start, 1),
    }
    print(write_result("conversion", result, folder=options.output).read_text())


if __name__ == "__main__":
    main()

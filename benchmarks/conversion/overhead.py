"""What share of the bare hypernetwork's throughput a conversion reaches, on the same cores and the same documents.

Bare: as many processes as the conversion has actors, one torch thread each, run `Hypernetwork.generate` and nothing else: the ids
lie ready, in the very batches that the conversion makes (buffers of the source's order, longest first, the same limits), and no
adapter is kept. The conversion reads, tokenises, generates, checks, encodes, writes shards and commits, from the first file that
it opens to the last commit; start-up is left out on both sides. The two alternate, so that both meet the same machine. Weights
are random in the reference shape: cost does not depend on them. A forward pass takes 10 ms a document or more in it, on a core
of the machine that this repository is measured on; the result says what it took.

Run from the root: `python -m benchmarks.conversion.overhead`; about 6 minutes on 2 cores.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.conversion.throughput import HYPERNETWORK, SHAPE, build, spread
from benchmarks.record import RESULTS, write_result
from core.adapters.base_model import load_base, tokenizer_of
from core.shine.hypernetwork import Hypernetwork
from core.text.tokens import read
from core.training.examples import plan_batches
from pipelines.conversion.convert import convert
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from pipelines.corpus import sources
from pipelines.ray_session import ray_session

READY_S = 300


def batches(texts: list[str], hypernetwork: Hypernetwork, run: ConvertRun, part: int) -> Iterator[tuple[Tensor, Tensor]]:
    """ids_BT and mask_BT of each batch of the buffers that fall to one of `run.actors` processes."""
    tokenizer = tokenizer_of(hypernetwork.base)
    for start in range(part * run.buffer_documents, len(texts), run.actors * run.buffer_documents):
        ids = [read(tokenizer, text).ids for text in texts[start : start + run.buffer_documents]]
        lengths = [len(each) + len(hypernetwork.memory_MH) for each in ids]
        for batch in plan_batches(lengths, run.batch_rows, run.batch_tokens):
            longest = max(len(ids[row]) for row in batch)
            ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask_BT = torch.zeros_like(ids_BT)
            for place, row in enumerate(batch):
                ids_BT[place, longest - len(ids[row]) :] = torch.as_tensor(ids[row])
                mask_BT[place, longest - len(ids[row]) :] = 1
            yield ids_BT, mask_BT


def generate(recipe: ConvertRecipe, texts: list[str], part: int, ready: Barrier, done: Barrier) -> None:
    """One bare process."""
    torch.set_num_threads(1)
    hypernetwork = Hypernetwork.load(str(recipe.hypernetwork), load_base(recipe.base)).eval()
    planned = list(batches(texts, hypernetwork, recipe.run, part))
    with torch.inference_mode():
        hypernetwork.generate(*planned[0])
        ready.wait(READY_S)
        for ids_BT, mask_BT in planned:
            hypernetwork.generate(ids_BT, mask_BT)
    done.wait(READY_S)


def bare(recipe: ConvertRecipe, texts: list[str]) -> float:
    """Documents per second of all processes together, from when all have loaded until the last has finished."""
    context = multiprocessing.get_context("spawn")
    ready, done = (context.Barrier(recipe.run.actors + 1) for _ in range(2))
    processes = [context.Process(target=generate, args=(recipe, texts, part, ready, done)) for part in range(recipe.run.actors)]
    for process in processes:
        process.start()
    ready.wait(READY_S)
    start = time.perf_counter()
    done.wait(READY_S)
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return len(texts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    logging.disable_progress_bar()

    run = ConvertRun(min_actors=options.actors, actors=options.actors)
    rates: dict[str, list[float]] = {"bare": [], "conversion": []}
    load_start = os.getloadavg()[0]
    with ray_session(num_cpus=options.actors + 2, include_dashboard=False), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, recipe = build(folder, options.documents, run)
        rows = sources.read(sources.open_source(str(corpus), recipe.tenant, recipe.collection))
        texts = [text for table in rows for text in table["text"].to_pylist()]
        for number in range(options.rounds):
            rates["bare"].append(bare(recipe, texts))
            summary = convert(str(corpus), str(folder / f"store-{number}"), recipe)
            if summary.documents != {"converted": options.documents}:
                raise SystemExit(f"not every document was converted: {dict(summary.documents)}")
            rates["conversion"].append(summary.documents_per_s)
            print(f"round {number + 1}: " + ", ".join(f"{way} {values[-1]:,.1f}/s" for way, values in rates.items()), flush=True)

    result = {
        "share_of_bare": spread([ours / alone for ours, alone in zip(rates["conversion"], rates["bare"], strict=True)]),
        **{f"{way}_documents_per_s": spread(values) for way, values in rates.items()},
        "forward_ms_a_document_and_core": spread([1000 * options.actors / rate for rate in rates["bare"]]),
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "model": {"architecture": "qwen3", **SHAPE, "hypernetwork": HYPERNETWORK.model_dump(mode="json")},
        "load_at_start": round(load_start, 1),
    }
    print(write_result("conversion_overhead", result, folder=options.output).read_text())


if __name__ == "__main__":
    main()

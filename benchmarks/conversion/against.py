"""Documents per second of a conversion against those of an earlier commit, checked out elsewhere, in one run.

Each conversion is a process of its own, by the code of one tree or the other, with a Ray of its own, the same corpus, base and
hypernetwork. The trees alternate, so that both meet the same machine, and which one begins changes by round. Two rates:
over the whole conversion, from the moment Ray is there to the last commit (loading of models included), and as the tree's own
summary says it, without start-up. Ids and hashes of all adapters are compared: the run fails unless they are the same.

Run from the root: `python -m benchmarks.conversion.against --against CHECKOUT --count 5000 --rounds 3`; about 8 minutes on 2
cores. Weights are random in the reference shape, as in `benchmarks.conversion.throughput`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from transformers.utils import logging

from benchmarks.conversion.throughput import HYPERNETWORK, SHAPE, build, spread
from benchmarks.record import RESULTS, ROOT, write_result
from pipelines.conversion.recipe import ConvertRun

WAYS = ("now", "before")

CONVERSION = """
import importlib, json, sys, time
from pathlib import Path

corpus, store, base, hypernetwork, actors = sys.argv[1:]

def first(*places):
    # By the tree's files, as Python may find what the tree lacks in another one that is installed.
    for place, name in places:
        file = Path.cwd() / place.replace(".", "/")
        if file.with_suffix(".py").exists():
            return getattr(importlib.import_module(place), name)
    raise SystemExit(f"none of {places} is there")

ray_session = first(("pipelines.ray_session", "ray_session"), ("imprint", "ray_session"))
convert = first(("pipelines.conversion.convert", "convert"), ("pipelines.convert", "convert"))
recipes = ("pipelines.conversion.recipe", "pipelines.convert_recipe")
ConvertRecipe = first(*((place, "ConvertRecipe") for place in recipes))
ConvertRun = first(*((place, "ConvertRun") for place in recipes))
Store = first(("core.store.store", "Store"), ("core.store", "Store"))
run = ConvertRun(min_actors=int(actors), actors=int(actors))
recipe = ConvertRecipe(base=base, hypernetwork=hypernetwork, run=run)
with ray_session(num_cpus=int(actors) + 2, include_dashboard=False):
    began = time.perf_counter()
    summary = convert(corpus, store, recipe)
    whole_s = time.perf_counter() - began
hashes = sorted(row.blob_hash for _, adapters in Store.open(store).each_document("default", "default") for row in adapters)
ids = sorted(row.adapter_id for _, adapters in Store.open(store).each_document("default", "default") for row in adapters)
values = {"whole_s": whole_s, "after_start_up": summary.documents_per_s, "documents": dict(summary.documents)}
print(json.dumps(values | {"hashes": hashes, "ids": ids}))
"""


def converted(tree: Path, corpus: Path, store: Path, base: str, hypernetwork: str, actors: int) -> dict[str, Any]:
    """What one conversion by the code of `tree` says of itself."""
    command = [sys.executable, "-P", "-c", CONVERSION, str(corpus), str(store), base, hypernetwork, str(actors)]
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="root of another checkout")
    parser.add_argument("--count", type=int, default=5000, help="documents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    logging.disable_progress_bar()

    trees = dict(zip(WAYS, (ROOT, options.against.resolve()), strict=True))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=trees["before"], capture_output=True, text=True).stdout.strip()
    rates: dict[str, dict[str, list[float]]] = {rate: {way: [] for way in WAYS} for rate in ("whole", "after_start_up")}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, recipe = build(folder, options.count, ConvertRun(min_actors=options.actors, actors=options.actors))
        made: list[tuple[Any, Any]] = []
        for number in range(options.rounds):
            for way in WAYS if number % 2 else WAYS[::-1]:
                store = folder / f"{way}-{number}"
                result = converted(trees[way], corpus, store, recipe.base, str(recipe.hypernetwork), options.actors)
                if result["documents"] != {"converted": options.count}:
                    raise SystemExit(f"not every document was converted: {result['documents']}")
                made.append((result["ids"], result["hashes"]))
                rates["whole"][way].append(options.count / result["whole_s"])
                rates["after_start_up"][way].append(result["after_start_up"])
            loads.append(os.getloadavg()[0])
            said = ", ".join(f"{way} {rates['whole'][way][-1]:,.1f}/s" for way in WAYS)
            print(f"round {number + 1}: {said}, load {loads[-1]:.1f}", flush=True)
    if any(each != made[0] for each in made):
        raise SystemExit("the trees made other adapters: ids or bytes differ")

    result = {
        "ratio_whole": spread([now / before for now, before in zip(*(rates["whole"][way] for way in WAYS), strict=True)]),
        "ratio_after_start_up": spread(
            [now / before for now, before in zip(*(rates["after_start_up"][way] for way in WAYS), strict=True)]
        ),
        **{f"{rate}_documents_per_s_{way}": spread(rates[rate][way]) for rate in rates for way in WAYS},
        "adapters_equal": True,
        "against": commit,
        "settings": {"count": options.count, "rounds": options.rounds, "actors": options.actors},
        "model": {"architecture": "qwen3", **SHAPE, "hypernetwork": HYPERNETWORK.model_dump(mode="json")},
        "load_by_round": [round(load, 1) for load in loads],
    }
    print(write_result("conversion_against", result, folder=options.output).read_text())


if __name__ == "__main__":
    main()

"""A tiny base and hypernetwork on disk, and what a store must hold once a corpus is converted."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from core.adapters.base_model import BaseModel, load_base
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.store.opening import open_objects
from core.store.store import Store
from pipelines.conversion.recipe import ConvertRecipe
from pipelines.world.tokenizer import build_tokenizer
from tests.models import SHAPE


def tiny_recipe(folder: Path, seed: int = 0) -> ConvertRecipe:
    """A recipe for tenant acme's collection docs, of random models that are written to a folder."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(**{**SHAPE, "vocab_size": len(tokenizer)}, head_dim=12, tie_word_embeddings=True)
    base = BaseModel(AutoModelForCausalLM.from_config(config), tokenizer)
    base.model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    settings = HypernetworkSettings(rank=2, meta_rank=2, num_layers=2, num_heads=4, feed_forward=32, scale=1e-2)
    Hypernetwork(load_base(folder / "base"), settings).save(folder / "hypernetwork")
    models = {"base": str(folder / "base"), "hypernetwork": str(folder / "hypernetwork")}
    return ConvertRecipe(**models, tenant="acme", collection="docs")


def numbered(folder: Path, documents: int) -> Path:
    """A file of that many documents, all different, named 00000 and so on."""
    path = folder / "documents.jsonl"
    lines = (f'{{"id": "{number:05}", "text": "The crane number {number} lifts boxes."}}' for number in range(documents))
    path.write_text("\n".join(lines) + "\n")
    return path


def check_whole(url: str, documents: int) -> float:
    """Fails unless each document of `numbered` is live with one adapter that can be read; gives the share of orphaned bytes."""
    store = Store.open(url)
    stats = store.stats()
    assert (stats.documents, stats.adapters) == (documents, documents)
    listed = list(store.each_document("acme", "docs"))
    assert [len(adapters) for _, adapters in listed] == [1] * documents
    rows = [each for row, adapters in listed for each in (row, *adapters)]
    assert len(store.get_many(rows)) == len(rows)
    used: dict[str, int] = {}
    for row in rows:
        used[row.shard] = used.get(row.shard, 0) + row.length
    assert [row.name for row, _ in listed] == [f"{number:05}" for number in range(documents)]
    written = {each.name: each.size for each in open_objects(url).listing("shards")}
    return sum(size for shard, size in written.items() if shard not in used) / sum(written.values())


def converters_below(pid: int) -> list[int]:
    """The conversion actors among the processes that a process started, directly or not."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below = [pid]
    for each in below:
        below += [child for child, parent in parents.items() if parent == each]
    found = []
    for each in below:
        try:
            if "ray::Converter" in Path(f"/proc/{each}/cmdline").read_text():
                found.append(each)
        except OSError:
            continue
    return found

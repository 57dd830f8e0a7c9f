"""Packs finished training runs as the reference weights that ship with the project, with their model card.

    python -m pipelines.world.reference base runs/reference-base
    python -m pipelines.world.reference hypernetwork runs/reference-hypernetwork

In: a run directory of `imprint train`. Out: `assets/reference/base` or `assets/reference/hypernetwork` in bf16, and
`model_card.json`, where every entry is read from the run, its corpus and git. The base comes first: a hypernetwork is trained
for the base as it ships.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from core.adapters.base_model import load_base, tokenizer_of
from core.shine.hypernetwork import Hypernetwork
from pipelines.options import REFERENCE
from pipelines.world.documents import WORLD_VERSION, specification_fingerprint


def is_reference(hypernetwork: str | None) -> bool:
    """Whether a directory is the shipped hypernetwork, which knows the reference world alone."""
    return hypernetwork is not None and Path(hypernetwork).resolve() == (REFERENCE / "hypernetwork").resolve()


MOST_BYTES = 16 * 2**20


def pack_base(run: Path, reference: Path = REFERENCE) -> Path:
    """The run's base as bf16 safetensors, with its tokenizer."""
    base = load_base(run / "model")
    target = reference / "base"
    base.model.to(torch.bfloat16).save_pretrained(target)
    tokenizer_of(base).save_pretrained(target)
    _write_card(reference, "base", run, load_base(target).fingerprint)
    return target


def pack_hypernetwork(run: Path, reference: Path = REFERENCE) -> Path:
    """The run's hypernetwork in bf16; it must have been trained for the reference base as packed."""
    base = load_base(reference / "base")
    target = reference / "hypernetwork"
    Hypernetwork.load(run / "model", base).save(target, dtype=torch.bfloat16)
    _write_card(reference, "hypernetwork", run, Hypernetwork.load(target, base).fingerprint())
    return target


def _write_card(reference: Path, part: str, run: Path, fingerprint: str) -> None:
    path = reference / "model_card.json"
    card: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    card["name"] = "Imprint reference: a tiny base and its hypernetwork, for tests and demonstrations on the reference world"
    card["licence"] = "Apache-2.0"
    card["world"] = {"version": WORLD_VERSION, "specification": specification_fingerprint()}
    recipe = json.loads((run / "recipe.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    card[part] = {
        "fingerprint": fingerprint,
        "trained_from_commit": _commit_before(run / "recipe.json"),
        "trained_with": f"imprint train {part} --recipe pipelines/recipes/reference_{part}.toml --run {run.as_posix()}",
        "finished": datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime, UTC).isoformat(timespec="seconds"),
        "seeds": {"weights": recipe["seed"], "data": recipe["feed"]["seed"]},
        "corpus": [
            _describe(Path(file)) for folder in recipe["feed"]["corpus"] for file in sorted(Path(folder).glob("*.parquet"))
        ],
        "recipe": recipe,
        "last_training_record": next(record for record in reversed(records) if "loss" in record),
        "last_validation": next((record for record in reversed(records) if "exact_match" in record), None),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    path.write_text(json.dumps(card, indent=2) + "\n")
    size = sum(file.stat().st_size for file in reference.rglob("*.safetensors"))
    if size > MOST_BYTES:
        raise ValueError(f"the reference weights take {size} bytes, {MOST_BYTES} are allowed: train smaller ones")


def _describe(file: Path) -> dict[str, Any]:
    return {
        "file": file.as_posix(),
        "documents": pq.ParquetFile(file).metadata.num_rows,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def _commit_before(file: Path) -> str:
    """The newest commit when a run wrote its recipe, that is when it began."""
    began = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat()
    found = subprocess.run(["git", "rev-list", "-1", f"--before={began}", "HEAD"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("base", "hypernetwork"))
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    print({"base": pack_base, "hypernetwork": pack_hypernetwork}[arguments.part](arguments.run))

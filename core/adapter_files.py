"""One adapter in a directory of its own, for those who train or carry adapters outside a store.

`adapter.safetensors` holds the flat vectors, `adapter.json` the spec and the fingerprint of the base that they were made for. Any
kind of adapter; `core.foreign_formats` writes PEFT's files, which hold LoRA only.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from core.adapter import AdapterSpec, AdapterWeights
from core.base_model import BaseModel
from core.gated_memory import weights_of

FORMAT = 1


def save(weights: AdapterWeights, base: BaseModel, directory: str | Path) -> None:
    """Writes the two files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"flat_BN": weights.flat_BN.detach().cpu().contiguous()}, directory / "adapter.safetensors")
    description = {"format": FORMAT, "spec": weights.spec.to_json(), "base": base.fingerprint}
    (directory / "adapter.json").write_text(json.dumps(description, indent=2) + "\n")


def load(directory: str | Path, base: BaseModel) -> AdapterWeights:
    """Reads what `save` wrote, to the base's device. Raises `ValueError` for another base, a newer format or a missing file."""
    directory = Path(directory)
    for name in ("adapter.json", "adapter.safetensors"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no {name}: give the directory of an adapter that Imprint saved")
    description = json.loads((directory / "adapter.json").read_text())
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{directory} has format {description.get('format')}, this version reads {FORMAT}: use the Imprint that wrote it"
        )
    if description["base"] != base.fingerprint:
        raise ValueError(f"the adapter in {directory} was trained for another base: load that base, or train one for this base")
    flat_BN = load_file(directory / "adapter.safetensors")["flat_BN"]
    return weights_of(AdapterSpec.from_json(description["spec"]), flat_BN.to(base.device))

"""One adapter in a directory of its own, for those who train or carry adapters outside a store.

`adapter.safetensors` holds the flat vectors, `adapter.json` the spec and the fingerprint of the base that they were made for. Any
kind of adapter; `core.adapters.foreign_formats` writes PEFT's files, which hold LoRA only.
"""

from pathlib import Path

from core.adapters import weight_files
from core.adapters.base_model import BaseModel
from core.adapters.gated_memory import weights_of
from core.adapters.spec import AdapterSpec
from core.adapters.weights import AdapterWeights


def save(weights: AdapterWeights, base: BaseModel, directory: str | Path) -> None:
    """Writes the two files."""
    weight_files.save("adapter", {"flat_BN": weights.flat_BN}, {"spec": weights.spec.to_json()}, base, Path(directory))


def load(directory: str | Path, base: BaseModel) -> AdapterWeights:
    """Reads what `save` wrote, to the base's device. Raises `ValueError` as `weight_files.load` does."""
    tensors, description = weight_files.load("adapter", base, Path(directory))
    return weights_of(AdapterSpec.from_json(description["spec"]), tensors["flat_BN"].to(base.device))

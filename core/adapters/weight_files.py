"""Weights in a directory of their own: `NAME.safetensors`, and `NAME.json` that says what they are and for which base.

What `Hypernetwork.save` and `core.adapters.files` share. Knows nothing of what the weights mean.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from core.adapters.base_model import BaseModel

FORMAT = 1


def save(name: str, tensors: Mapping[str, Tensor], description: Mapping[str, Any], base: BaseModel, directory: Path) -> None:
    """Writes the two files; `description` holds JSON values."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, directory / f"{name}.safetensors")
    described = {"format": FORMAT, **description, "base": base.fingerprint}
    (directory / f"{name}.json").write_text(json.dumps(described, indent=2) + "\n")


def load(name: str, base: BaseModel, directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and description. Raises `ValueError` for another base, another format or a missing file."""
    for file in (f"{name}.json", f"{name}.safetensors"):
        if not (directory / file).is_file():
            raise ValueError(f"{directory} holds no {file}: give the whole directory of a saved {name}")
    description = json.loads((directory / f"{name}.json").read_text())
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{directory} has format {description.get('format')}, this version reads {FORMAT}: use the Imprint that wrote it"
        )
    if description["base"] != base.fingerprint:
        raise ValueError(f"the {name} in {directory} was trained for another base: load that base, or train one for this base")
    return load_file(directory / f"{name}.safetensors"), description

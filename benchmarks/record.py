"""Results of benchmarks, one JSON file each, with what it was measured on: hardware, torch, commit, date.

Needs PyTorch only. A result is of the commit that is checked out: commit before you measure.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def write_result(name: str, values: Mapping[str, Any], device: str = "cpu", folder: Path = RESULTS) -> Path:
    """Writes NAME.json: the values, then what they were measured on. device: what the models ran on."""
    measured_on = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**values, **measured_on}, indent=2) + "\n")
    return path


def hardware(device: str = "cpu") -> str:
    """The processor and its cores, and before them the GPU if that is the device."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    host = f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return host if device == "cpu" else f"{torch.cuda.get_device_name(device)}, {host}"


def _commit() -> str | None:
    """None outside a clone."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None

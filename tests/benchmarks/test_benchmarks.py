"""Results say what they were measured on, and the benchmark that wants a GPU runs without one at a tiny size."""

import json
import subprocess
from datetime import date

import pytest
import torch

from benchmarks.conversion import gpu as gpu_conversion
from benchmarks.record import ROOT, hardware, write_result
from benchmarks.training import gpu


def test_a_result_says_what_it_was_measured_on(tmp_path):
    path = write_result("speed", {"ratio": {"median": 2.0}, "settings": {"rows": 3}}, folder=tmp_path / "new")
    assert path == tmp_path / "new" / "speed.json"
    result = json.loads(path.read_text())
    assert list(result) == ["ratio", "settings", "hardware", "torch", "commit", "date"]
    assert result["ratio"] == {"median": 2.0} and result["torch"] == torch.__version__
    assert result["hardware"] == hardware() and result["hardware"].endswith(" cores")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert result["commit"] == (head or None)
    assert (date.today() - date.fromisoformat(result["date"])).days in (-1, 0, 1)


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    small = ["--device", "cpu", "--shape", "tiny", "--document-tokens", "16", "--rounds", "1", "--new-tokens", "2"]
    gpu.main([*small, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_tiny.json").read_text())
    assert list(result["generation"]) == ["1", "8", "16"] and list(result["training"]) == ["1", "4"]
    assert {"1_rows_0_adapters", "8_rows_8_adapters", "64_rows_64_adapters"} <= result["answering"].keys()
    for kind, rate in (("generation", "documents_per_s"), ("training", "documents_per_s"), ("answering", "tokens_per_s")):
        assert all(timing[rate] > 0 for timing in result[kind].values())


def test_the_gpu_conversion_runs_on_a_cpu(tmp_path):
    small = ["--device", "cpu", "--shape", "tiny", "--documents", "10", "--document-tokens", "60", "--buffer-documents", "4"]
    gpu_conversion.main([*small, "--output", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_conversion_tiny.json").read_text())
    assert all(result[rate] > 0 for rate in ("documents_per_s", "tokens_per_s", "written_mb_per_s", "bare_documents_per_s"))
    assert result["bar"]["value"] > 0 < result["bare_mfu"]
    assert result["share_of_bare"] == pytest.approx(result["bar"]["value"] / result["bare_mfu"])

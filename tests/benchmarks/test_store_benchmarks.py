"""The measure of a listing is of the process that lists, and of nothing else."""

from pathlib import Path

import pytest
import torch

from benchmarks.record import ROOT
from benchmarks.store.listing import make_store, measure, run


def test_a_listing_is_measured_without_its_parent(tmp_path: Path) -> None:
    """This process holds torch (over 200 MB), and no listing does."""
    assert torch.__version__
    make_store(str(tmp_path / "store"), 12)
    figures = measure({"ours": ROOT}, str(tmp_path / "store"), 1)
    assert list(figures) == ["ls", "show", "stats"]
    for name in figures:
        assert 20 < figures[name]["ours"]["peak_mb"] < 180, figures
        assert figures[name]["ours"]["s"] > 0 < figures[name]["ours"]["cpu_s"]
    with pytest.raises(SystemExit, match="ended with 2:\nerror: no store at"):
        run(ROOT, ["ls", str(tmp_path / "none")])

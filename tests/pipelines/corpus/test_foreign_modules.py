"""A folder that is converted may hold any file: none of it is ever run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.text.parsing import Parsed, Parser
from tests.places import ROOT

NAMES = ("json", "types", "signal", "random", "chardet", "selectolax", "pypdfium2", "ray", "core", "pipelines", "sitecustomize")
CONVERSION = """
import ray
from imprint import ray_session
from pipelines.corpus import sources

with ray_session():
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = sources.dataset(sources.open_source(".", "acme", "docs")).take_all()
print(sorted((row["name"], row["text"]) for row in rows if row["text"]))
"""


def write_modules(folder: Path) -> Path:
    """Modules that leave a mark where they are imported. Returns the folder of the marks."""
    marks = folder / "marks"
    marks.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(marks / name)!r}, 'w').close()")
    return marks


def test_a_parser_imports_nothing_from_its_owners_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = write_modules(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parser = Parser()
    assert parser.parse("html", b"<title>A page</title><p>caf\xe9") == Parsed("A page", "café")
    parser.close()
    assert os.listdir(marks) == []


def test_a_conversion_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    marks = write_modules(tmp_path)
    (tmp_path / "a.html").write_bytes(b"<p>caf\xe9")
    (tmp_path / "b.txt").write_text("Text.")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CONVERSION], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=270
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[('a.html', 'café'), ('b.txt', 'Text.')]"
    assert os.listdir(marks) == []

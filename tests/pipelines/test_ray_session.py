"""Ray starts away from where a person stands, once more on a busy machine, and what it says is worth saying."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import node

from pipelines.ray_session import NOT_IN_TIME, ROOT, start

MODULES = ("json", "types", "random", "numpy", "ray", "core", "pipelines", "sitecustomize")


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> list[str]:
    """`ray.init` fails as given, time after time. Returns the folders in which it was called."""
    left, called = list(errors), []

    def init(**options: Any) -> None:
        called.append(os.getcwd())
        if error := left.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return called


def timeout() -> Exception:
    return Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")


def test_a_start_that_times_out_is_tried_once_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    called = failing(monkeypatch, timeout(), None)
    start(address="local")
    assert called == [str(ROOT), str(ROOT)] and Path.cwd() == tmp_path


def test_two_starts_that_time_out_end_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    called = failing(monkeypatch, timeout(), timeout())
    with pytest.raises(ValueError, match=r"^Ray did not start: .* RAY_ADDRESS$") as told:
        start(address="local")
    assert len(called) == 2 and told.value.__cause__ is None and told.value.__context__ is None


def test_any_other_failure_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    called = failing(monkeypatch, ConnectionError("no cluster there"))
    with pytest.raises(ConnectionError, match="no cluster there"):
        start(address="ray://elsewhere")
    assert len(called) == 1


def test_ray_still_says_so_in_these_words() -> None:
    assert NOT_IN_TIME in inspect.getsource(node.Node)


def test_a_command_in_a_hostile_folder_of_rejects_ends_with_one_and_ray_is_silent(tmp_path: Path) -> None:
    """The folder's modules would leave marks. Nothing is imported from it, nothing of it can be converted."""
    corpus, marks = tmp_path / "corpus", tmp_path / "marks"
    corpus.mkdir()
    marks.mkdir()
    for name in MODULES:
        (corpus / f"{name}.py").write_text(f"open({str(marks / name)!r}, 'w').close()")
    (corpus / "empty.txt").write_bytes(b"")
    command = [sys.executable, "-P", "-m", "imprint", "convert", ".", str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(command, cwd=corpus, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"nothing was converted: all documents were rejected, {len(MODULES) + 1} of them" in done.stdout
    assert "core_worker" not in done.stdout + done.stderr, done.stderr
    assert os.listdir(marks) == []

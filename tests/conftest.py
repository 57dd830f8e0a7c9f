"""One environment, one Ray and one rule on skipping for every test.

Importing this file sets the environment before any test imports torch or ray: offline, one torch thread a process (tiny models
are slower on more), deepspeed on the CPU where there is no GPU, a Ray that reports nothing and asks for no token.
A test may skip only if it is marked slow or gpu: where CI=true, any other skip fails the run, because a core test that quietly
stopped running proves nothing.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from pipelines.ray_session import start
from tests.s3 import bucket, ceph, ceph_bucket, ceph_proxy, moto_proxy, proxy, s3_admin, s3_server  # noqa: F401

os.environ.update(
    HF_HUB_OFFLINE="1",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

hypothesis.settings.register_profile("imprint", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("imprint")

MAY_SKIP = {"slow", "gpu"}
SKIPPED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def ray_local() -> Iterator[Any]:
    """The `ray` module, connected to a local Ray of 4 logical CPUs that all tests of a run share. Starts in 20-30 s, ~0.8 GB."""
    import ray

    start(address="local", num_cpus=4, object_store_memory=256 * 2**20, include_dashboard=True)
    yield ray
    ray.shutdown()


@pytest.fixture
def said_by_ray(ray_local: Any) -> Iterator[list[str]]:
    """What Ray Data and Ray Serve tell a person who runs them in this process, line by line."""
    importlib.import_module("ray.data")  # which empties its logger's handlers

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    lines: list[str] = []
    kept = Kept(logging.INFO)
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.serve")]
    for logger in loggers:
        logger.addHandler(kept)
    yield lines
    for logger in loggers:
        logger.removeHandler(kept)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = []
    config.pluginmanager.register(Skips(config.stash[SKIPPED]))


class Skips:
    """Notes what was skipped and may not be: as reports of tests and of files arrive."""

    def __init__(self, skipped: list[str]) -> None:
        self._skipped = skipped

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skipped.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail") and MAY_SKIP.isdisjoint(report.keywords):
            self._skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash[SKIPPED] and os.environ.get("CI") == "true" and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[SKIPPED] and os.environ.get("CI") == "true":
        terminalreporter.section("skipped, though neither slow nor gpu: CI fails", red=True)
        for nodeid in config.stash[SKIPPED]:
            terminalreporter.line(nodeid)

"""A conversion that is killed loses nothing, leaves nothing twice, and does little again.

Actor, driver and node, each at about half. What a killed part had in hand is made twice: at most a buffer for each actor, which
is 4 % here. Bytes that were written and never committed count against the same 10 %. A killed server costs time alone.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from core.store.errors import StoreError
from core.store.store import Store
from pipelines.conversion.convert import corpus_of, receipts
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from tests import s3
from tests.ceph import Ceph
from tests.conversion import check_whole, converters_below, numbered, tiny_recipe
from tests.places import ROOT

ACTORS, BUFFER = 2, 8
RUN = ConvertRun(min_actors=ACTORS, actors=ACTORS, buffer_documents=BUFFER)
REPEATED = 0.1


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> ConvertRecipe:
    return tiny_recipe(tmp_path_factory.mktemp("models")).model_copy(update={"run": RUN})


def wait_for(url: str, documents: int, goes_on: Callable[[], bool] = lambda: True) -> None:
    """Until a store that is made and filled elsewhere has so many documents, or what fills it goes on no longer."""
    for _ in range(6000):
        try:
            if not goes_on() or Store.open(url).stats().documents >= documents:
                return
        except (StoreError, OSError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} has less than {documents} documents after minutes")


def test_a_killed_actor_costs_a_buffer(ray_local: Any, recipe: ConvertRecipe, tmp_path: Path) -> None:
    documents, url = 400, str(tmp_path / "store")
    store = Store.open(url, create=True)
    counts: Counter[str] = Counter()
    committed: list[int] = []

    def kill() -> None:
        wait_for(url, documents // 2)
        os.kill(converters_below(os.getpid())[0], signal.SIGKILL)
        committed.append(Store.open(url).stats().documents)

    killer = threading.Thread(target=kill)
    killer.start()
    for batch in receipts(corpus_of(str(numbered(tmp_path, documents)), recipe), store, recipe):
        counts.update(receipt.status for receipt in batch)
    killer.join()
    assert len(committed) == 1 and committed[0] < documents and counts.total() == documents
    assert check_whole(url, documents) <= REPEATED
    assert set(counts) <= {"converted", "unchanged"} and counts["unchanged"] <= BUFFER


def convert_command(corpus: Path, url: str, recipe: ConvertRecipe) -> list[str]:
    run = [f"run.{name}={value}" for name, value in (("min_actors", ACTORS), ("actors", ACTORS), ("buffer_documents", BUFFER))]
    changes = ["tenant=acme", "collection=docs", *run]
    models = ["--base", recipe.base, "--hypernetwork", str(recipe.hypernetwork)]
    settings = [argument for change in changes for argument in ("--set", change)]
    return [sys.executable, "-m", "imprint", "convert", str(corpus), url, *models, *settings]


def processes_with(mark: str) -> Iterator[int]:
    """This machine's processes that have a mark in the environment they were started with."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    yield int(process.name)
            except OSError:
                continue


def kill_at_half(url: str, documents: int, mark: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """SIGKILL for a conversion with all its Ray, once half of its documents are committed."""
    wait_for(url, documents // 2, lambda: process.poll() is None)
    assert process.poll() is None, log.read_text()
    process.kill()
    process.wait()
    while pids := list(processes_with(mark)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def killed_and_run_again(url: str, recipe: ConvertRecipe, folder: Path, environment: dict[str, str], documents: int) -> None:
    corpus, mark, log = numbered(folder, documents), f"IMPRINT_TEST_MARK={uuid.uuid4().hex}", folder / "log"
    environment = {**os.environ, **environment, "COLUMNS": "100"}
    name, _, value = mark.partition("=")
    with log.open("wb") as file:
        marked = environment | {name: value}
        process = subprocess.Popen(convert_command(corpus, url, recipe), stdout=file, stderr=file, cwd=ROOT, env=marked)
    kill_at_half(url, documents, mark, process, log)
    committed = Store.open(url).stats().documents
    assert documents // 2 <= committed < documents and committed % BUFFER == 0
    done = subprocess.run(convert_command(corpus, url, recipe), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{documents - committed:,} converted, 0 shared, {committed:,} unchanged, 0 rejected" in done.stdout
    assert check_whole(url, documents) + ACTORS * BUFFER / documents <= REPEATED


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_goes_on(recipe: ConvertRecipe, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    killed_and_run_again(url, recipe, tmp_path, {}, 800)
    first, second = sorted((tmp_path / "store.runs").iterdir())
    assert not (first / "about" / "finished.json").exists()
    assert json.loads((second / "about" / "finished.json").read_text())["documents"]["converted"] > 0
    assert pq.read_table(second / "receipts").num_rows == 800


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("proxy", "rate"), [("moto", 0.05), ("ceph", 0), ("ceph", 0.05)], indirect=["proxy"])
def test_a_killed_driver_goes_on_in_a_bucket(
    recipe: ConvertRecipe, tmp_path: Path, bucket: str, proxy: s3.FaultProxy, rate: float
) -> None:
    proxy.reset(rate)
    killed_and_run_again(f"s3://{bucket}/stores/one", recipe, tmp_path, s3.environment(proxy.url), 800)
    assert len(proxy.faults) >= 0.4 * rate * len(proxy.asked)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_conversion_outlives_kills_of_its_server(
    recipe: ConvertRecipe, tmp_path: Path, ceph: Ceph, ceph_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server, its disk and both again, each at another eighth of the conversion, which is told nothing of it."""
    documents, url, log = 800, f"s3://{ceph_bucket}/stores/one", tmp_path / "log"
    monkeypatch.setenv("AWS_ENDPOINT_URL", ceph.url)
    with log.open("wb") as file:
        command = convert_command(numbered(tmp_path, documents), url, recipe)
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=os.environ | {"COLUMNS": "100"})
    try:
        for eighth, daemon in enumerate(("radosgw", "ceph-osd", "radosgw", "ceph-osd"), 1):
            wait_for(url, eighth * documents // 8, lambda: process.poll() is None)
            assert process.poll() is None, log.read_text()
            ceph.kill(daemon)
            time.sleep(1)
            ceph.start(daemon)
        assert process.wait() == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert f"{documents} converted, 0 shared, 0 unchanged, 0 rejected" in log.read_text()
    assert check_whole(url, documents) <= REPEATED


NODE_KILL = """
import json, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
import ray
from collections import Counter
from tests.conversion import converters_below
from core.store.store import Store
from pipelines.conversion.convert import corpus_of, receipts
from pipelines.conversion.recipe import ConvertRecipe

path, url, documents, recipe = sys.argv[1], sys.argv[2], int(sys.argv[3]), ConvertRecipe.model_validate_json(sys.argv[4])
memory = {"object_store_memory": 150 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False, **memory})
node = cluster.add_node(num_cpus=2, **memory)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
Store.open(url, create=True)
counts, at_kill, raylet = Counter(), {}, node.all_processes["raylet"][0].process.pid

def kill():
    store = Store.open(url)
    while store.stats().documents < documents // 2:
        time.sleep(0.05)
        store.refresh()
    at_kill["there"] = len(converters_below(raylet))
    cluster.remove_node(node, allow_graceful=False)
    store.refresh()
    at_kill["committed"] = store.stats().documents

killer = threading.Thread(target=kill, daemon=True)
killer.start()
for batch in receipts(corpus_of(path, recipe), Store.open(url), recipe):
    counts.update(receipt.status for receipt in batch)
killer.join()
Path(sys.argv[5]).write_text(json.dumps([at_kill, counts]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_node_costs_its_buffers(recipe: ConvertRecipe, tmp_path: Path) -> None:
    documents, url = 800, str(tmp_path / "store")
    corpus = numbered(tmp_path, documents)
    spread = recipe.model_copy(update={"run": RUN.model_copy(update={"min_actors": 3, "actors": 3})})
    arguments = [str(corpus), url, str(documents), spread.model_dump_json(), str(tmp_path / "result")]
    command, environment = [sys.executable, "-c", NODE_KILL, *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    at_kill, counts = json.loads((tmp_path / "result").read_text())
    assert documents // 2 <= at_kill["committed"] < documents and at_kill["there"] >= 1
    assert sum(counts.values()) == documents and set(counts) <= {"converted", "unchanged"}
    assert check_whole(url, documents) + spread.run.actors * BUFFER / documents <= REPEATED

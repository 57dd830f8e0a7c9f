"""Through real Ray Serve, over sockets: answers, and what is said where a replica cannot start."""

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from serve.app import REASON, NotStarted, Replica, Server, run
from serve.settings import ServeRun, ServeSettings
from tests.serving import NAMES, World, ask, make_document, make_world, offline


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings_for(world: World, folder: Path) -> ServeSettings:
    assert world.base.tokenizer is not None
    world.base.model.save_pretrained(folder)
    world.base.tokenizer.save_pretrained(folder)
    own = ServeRun(port=free_port(), slots=4, max_queued_requests=4, refresh_s=0.2, cpus=0.5, drain_s=5)
    return ServeSettings(base=str(folder), store=world.store.url, tenant="t", collection="c", max_rank=4, run=own)


def test_served_by_ray(ray_local: Any, said_by_ray: list[str], tmp_path: Path) -> None:
    world = make_world(tmp_path / "store")
    with run(settings_for(world, tmp_path / "base")) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        check_answers(client, world)
        check_refusals(client)
        check_edit(client, world)
        check_client_that_leaves(client)
        asyncio.run(check_concurrency(server, world))
        check_logs(Path(ray_local._private.worker.global_worker.node.get_logs_dir_path()) / "serve")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    assert ray_local.is_initialized(), "Ray is left running"
    assert said_by_ray == []


def check_answers(client: httpx.Client, world: World) -> None:
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").json()["ready"] is True
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert sorted(models) == sorted(["base", *(f"base:{quote(name, safe='')}" for name in NAMES)])
    for number, name in enumerate(NAMES):
        model = f"base:{quote(name, safe='')}"
        for path in (model, quote(model, safe="")):
            assert client.get(f"/v1/models/{path}").json()["id"] == model, path
            assert client.head(f"/v1/models/{path}").status_code == 200
        response = client.post("/v1/chat/completions", json=ask(model))
        assert response.json()["choices"][0]["message"]["content"] == offline(world, "Who is it?", number)
        assert response.headers["X-Imprint-Source"] == "adapter"
    with client.stream("POST", "/v1/chat/completions", json=ask("base", stream=True)) as stream:
        chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line and line != "data: [DONE]"]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == offline(world, "Who is it?", None)


def check_refusals(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", json=ask("base:nothing")).status_code == 404
    for content in (b"{", b"\xff", b'{"model": "base"}', json.dumps(ask("base", n=0)).encode()):
        refused = client.post("/v1/chat/completions", content=content)
        assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"


def check_edit(client: httpx.Client, world: World) -> None:
    edited = make_document(NAMES[0], "An edited text.")
    world.store.put([edited])
    deadline = time.monotonic() + 10
    while (response := client.post("/v1/chat/completions", json=ask(f"base:{NAMES[0]}"))).headers[
        "X-Imprint-Source"
    ] == "adapter":
        assert time.monotonic() < deadline
    assert response.json()["choices"][0]["message"]["content"] == offline(world, "Who is it?", None, edited.text)


def check_client_that_leaves(client: httpx.Client) -> None:
    """A stream that is closed early, and a request that is given up, leave the engine."""
    before = client.get("/ready").json()["engine"]["generated_tokens"]
    body = ask("base", max_tokens=2000, ignore_eos=True)
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as stream:
        next(stream.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=0.2)
    deadline = time.monotonic() + 10
    while (engine := client.get("/ready").json()["engine"])["running"]:
        assert time.monotonic() < deadline
    assert engine["generated_tokens"] - before < 2000


def check_logs(folder: Path) -> None:
    """Requests are in the access log, and what they said is in none."""
    logs = "".join(path.read_text() for path in folder.rglob("*.log"))
    assert "POST /v1/chat/completions" in logs and "Who is it?" not in logs and "edited text" not in logs


async def check_concurrency(server: Server, world: World) -> None:
    """12 requests at once find 4 slots and 4 places in the queue; those that are turned away come again."""
    refused = 0

    async def patient(client: httpx.AsyncClient, number: int) -> str:
        nonlocal refused
        while True:
            response = await client.post("/v1/chat/completions", json=ask(f"base:{quote(NAMES[number], safe='')}", max_tokens=30))
            if response.status_code == 200:
                return str(response.json()["choices"][0]["message"]["content"])
            assert response.status_code == 429 and int(response.headers["Retry-After"]) > 0
            refused += 1
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        numbers = range(1, len(NAMES))
        answers = await asyncio.gather(*(patient(client, number) for number in numbers))
    assert answers == [offline(world, "Who is it?", number, tokens=30) for number in numbers]
    assert refused


def test_why_a_replica_cannot_start_is_raised_in_its_own_words(ray_local: Any, tmp_path: Path) -> None:
    """At the first try; the command line shows a `ValueError` as it is."""
    settings = settings_for(make_world(tmp_path / "store", ["d"]), tmp_path / "base")
    own = settings.model_copy(update={"run": settings.run.model_copy(update={"max_length": 99999})})
    reason = "the server cannot start: max_length is 99999: this base takes 2 to 2048 tokens"
    with pytest.raises(ValueError, match=f"^{reason}$"):
        run(own)


def test_a_replica_marks_its_reason_in_what_it_raises(tmp_path: Path) -> None:
    world = make_world(tmp_path / "store", ["d"])
    settings = settings_for(world, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())

    def reason(settings: ServeSettings) -> str:
        with pytest.raises(NotStarted) as told:
            Replica(settings.model_dump(mode="json"))
        found = REASON.search(f"ray::Replica.__init__()\n  raise\nserve.app.NotStarted: {told.value}\nmore")
        assert found is not None
        return str(json.loads(found[1])[0])

    assert "no store at" in reason(settings.model_copy(update={"store": str(tmp_path / "nothing")}))
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    assert "lacks weights" in reason(settings)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    small = settings.model_copy(update={"run": settings.run.model_copy(update={"adapter_memory_bytes": 10})})
    assert "give more" in reason(small)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"cut short")
    assert "Error" in reason(settings), "what is no `ValueError` is told with its name"
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()


def test_what_cannot_be_served_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no store"):
        run(ServeSettings(base="x", store=str(tmp_path / "nothing")))
    world = make_world(tmp_path / "store", ["d"])
    with pytest.raises(ValueError, match="no model at"):
        run(ServeSettings(base=str(tmp_path / "nothing"), store=world.store.url))
    settings = settings_for(world, tmp_path / "base")
    with socket.create_server(("127.0.0.1", settings.run.port)), pytest.raises(ValueError, match=r"run\.port"):
        run(settings)

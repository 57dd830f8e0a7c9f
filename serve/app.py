"""The application on Ray Serve: the only place beside the router that knows it.

`run` deploys one application on the Ray that the process is connected to and gives a `Server` to stop; `deployment` is for
`serve run` and KubeRay. A replica whose engine failed reports itself unhealthy and is replaced. Cost of a start: about 10 s.
"""

import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve as rs
from transformers import AutoConfig

from core.adapters.base_model import load_base
from core.store.store import Store
from serve.api import create_app
from serve.service import Service
from serve.settings import ServeSettings

APPLICATION = "imprint"
_SPARE_CALLS = 64


def load_service(settings: ServeSettings) -> Service:
    """The parts of a server, from the files that the settings name; raises what they raise."""
    base = load_base(settings.base, dtype=getattr(torch, settings.dtype), device=settings.run.device)
    return Service(base, Store.open(settings.store), settings)


class Replica:
    """One process with a base of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = ServeSettings.model_validate(settings)
        self._service = load_service(self._settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._settings.run.max_body_bytes)

    def check_health(self) -> None:
        if self._service.engine.failure is not None:
            raise self._service.engine.failure


def deployment(settings: ServeSettings) -> rs.Application:
    """The application, bound to its settings. Full queues are the service's to report, so Ray is given room beyond them."""
    run = settings.run
    deployed = rs.deployment(
        name="Replica",
        num_replicas=run.replicas,
        max_ongoing_requests=run.slots + run.max_queued_requests + _SPARE_CALLS,
        ray_actor_options={"num_cpus": run.cpus, "num_gpus": run.gpus},
        graceful_shutdown_timeout_s=run.drain_s + 5,
        graceful_shutdown_wait_loop_s=0.5,
    )(rs.ingress()(Replica))
    return deployed.bind(settings.model_dump(mode="json"))


class Server:
    """A running server. Leaving its context, or `stop`, ends it; Ray is left running."""

    def __init__(self, url: str) -> None:
        self.url = url

    def wait(self) -> None:
        """Returns never: a signal's exception ends it, in the main thread."""
        threading.Event().wait()

    def stop(self) -> None:
        if ray.is_initialized():
            rs.shutdown()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run(settings: ServeSettings) -> Server:
    """Starts the server on an initialised Ray and returns when it takes requests.

    Raises `ValueError` where base or store cannot be used; this is checked before a process is started.
    """
    settings = checked(settings)
    assert ray.is_initialized(), "Ray is the caller's to start"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    server = Server(f"http://{settings.run.host}:{settings.run.port}")
    try:
        rs.start(http_options={"host": settings.run.host, "port": settings.run.port})
        rs.run(deployment(settings), name=APPLICATION, route_prefix="/")
    except BaseException:
        server.stop()
        raise
    return server


def checked(settings: ServeSettings) -> ServeSettings:
    """With places that hold in every process. What can be seen without Ray and without loading the base is refused here."""
    base = str(Path(settings.base).resolve()) if Path(settings.base).exists() else settings.base
    settings = settings.model_copy(update={"store": Store.open(settings.store).url, "base": base})
    try:
        AutoConfig.from_pretrained(settings.base, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"no model at {settings.base}: {str(error).splitlines()[0]}") from None
    if "RAY_ADDRESS" not in os.environ:
        try:
            socket.create_server((settings.run.host, settings.run.port)).close()
        except OSError as error:
            place = f"{settings.run.host}:{settings.run.port}"
            raise ValueError(f"{place} cannot be listened at ({error.strerror}): give another run.port or run.host") from None
    return settings

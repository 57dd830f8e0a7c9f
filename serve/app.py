"""The application on Ray Serve: the only place beside the router that knows it.

`run` deploys one application on the Ray that the process is connected to and gives a `Server` to stop; `deployment` is for
`serve run` and KubeRay. A replica whose engine failed reports itself unhealthy and is replaced. Whatever keeps a replica from
starting is raised by `run` in its own words, at the first try: Ray says no more than that a deployment failed, but keeps the
words of the replica's error, in which the reason is marked. Cost of a start: about 10 s.
"""

import json
import logging
import os
import re
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
DEPLOYMENT = "Replica"
_SPARE_CALLS = 64
REASON = re.compile(r'NotStarted: (\[".*"\])')


def load_service(settings: ServeSettings) -> Service:
    """The parts of a server, from the files that the settings name; raises what they raise."""
    base = load_base(settings.base, dtype=getattr(torch, settings.dtype), device=settings.run.device)
    return Service(base, Store.open(settings.store), settings)


class NotStarted(RuntimeError):
    """Why a replica cannot start, as a JSON list of one string: whoever reads it in Ray's report finds its end."""


class Replica:
    """One process with a base of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        try:
            self._service = load_service(ServeSettings.model_validate(settings))
        except Exception as error:  # whatever it is, a person waits for it at another machine's terminal
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise NotStarted(json.dumps([reason])) from error

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service)

    def check_health(self) -> None:
        if self._service.engine.failure is not None:
            raise self._service.engine.failure


def deployment(settings: ServeSettings, tries: int = 20) -> rs.Application:
    """The application, bound to its settings. Full queues are the service's to report, so Ray is given room beyond them.

    tries: of a replica to start, before Ray gives up.
    """
    run = settings.run
    deployed = rs.deployment(
        name=DEPLOYMENT,
        num_replicas=run.replicas,
        max_constructor_retry_count=tries,
        max_ongoing_requests=run.slots + run.max_queued_requests + run.max_waiting_for_store + _SPARE_CALLS,
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

    Raises `ValueError`, saying why, where base or store cannot be used, before a process is started as far as that can be seen.
    """
    settings = checked(settings)
    assert ray.is_initialized(), "Ray is the caller's to start"
    logger = logging.getLogger("ray.serve")
    logger.setLevel(logging.WARNING)
    server = Server(f"http://{settings.run.host}:{settings.run.port}")
    try:
        rs.start(http_options={"host": settings.run.host, "port": settings.run.port})
        rs.run(deployment(settings, tries=1), name=APPLICATION, route_prefix="/")
    except BaseException as error:
        reason = _why_not_started() if isinstance(error, RuntimeError) else None
        server.stop()
        if reason is not None:
            raise ValueError(f"the server cannot start: {reason}") from None
        raise
    return server


def _why_not_started() -> str | None:
    """The reason that a replica gave for not starting; None where none did."""
    application = rs.status().applications.get(APPLICATION)
    status = None if application is None else application.deployments.get(DEPLOYMENT)
    if status is None or (found := REASON.search(status.message)) is None:
        return None
    reason: str = json.loads(found[1])[0]
    return reason


def checked(settings: ServeSettings) -> ServeSettings:
    """With places that hold in every process. What can be seen without Ray and without loading the base is refused here."""
    base = str(Path(settings.base).resolve()) if Path(settings.base).exists() else settings.base
    try:
        store = Store.open(settings.store).url
    except OSError as error:
        raise ValueError(f"the store at {settings.store} cannot be read: {error}") from None
    settings = settings.model_copy(update={"store": store, "base": base})
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

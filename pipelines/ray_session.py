"""A Ray for the length of a command: the cluster that RAY_ADDRESS names, or a local one that ends with it.

Nothing that Ray starts imports from the folder in which a person stands: Ray puts the driver's current folder first on the
`sys.path` of its workers, and Python puts it, or the script's own folder, first on that of every process it starts. A corpus may
lie there, with a `json.py` in it. So Ray starts in this project's folder, and Python is told to leave these folders out
(PYTHONSAFEPATH). Workers therefore have another current folder than the driver: what they are given are absolute paths.

A local Ray starts in 3 to 30 s. Knows nothing of what runs on it.
"""

import gc
import logging
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOT_IN_TIME = "timed out during startup"
"""In what Ray raises where its node does not answer in 30 s, as happens on a busy machine."""


@contextmanager
def ray_session(told_of_retries: bool = True, **own: Any) -> Iterator[None]:
    """Connects to the cluster that RAY_ADDRESS names, or runs a local Ray for the command; one that runs already is kept.

    told_of_retries: whether Ray says what it tries again, as it does whenever Ray Serve stops. own: of a local Ray, beside or
    instead of what stands here. Ray's progress goes unsaid, as commands show their own; its warnings and errors do not. Raises
    `ValueError` as `start` does.
    """
    # Of a local Ray: processes compute with one thread, and beside other work at no lower priority.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not told_of_retries:
        os.environ.setdefault("RAY_enable_output_error_log_if_still_retry", "0")
    import ray

    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    own = {"num_cpus": max(os.cpu_count() or 1, 4), "object_store_memory": 2**29} | own
    start(address=address, **(own if address == "local" else {}))
    try:
        yield
    finally:
        ray.shutdown()


def start(**options: Any) -> None:
    """`ray.init`, quiet, and once more where a busy machine lets the first start time out.

    Raises `ValueError` where the second does, too.
    """
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    import ray

    for again in (True, False):
        try:
            with chdir(ROOT):
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except Exception as error:  # Ray raises nothing narrower
            if NOT_IN_TIME not in str(error):
                raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of what the start has left open
            ray.shutdown()
            gc.collect()
        if not again:
            raise ValueError(
                "Ray did not start: this machine was too busy to answer within 30 s, twice. Run the command again when it has "
                "less to do, or name a running cluster with RAY_ADDRESS"
            )


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM is SIGINT; either leaves the context, and nothing is raised beyond it. `ray.init` would undo it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port on the loopback interface that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port

"""What a run leaves for people: metrics as JSON lines and for TensorBoard, and the rows of the corpus that were skipped.

In: the messages of `pipelines.training.reports`. Out, in the run's directory: `metrics.jsonl`, `tensorboard/`, and
`skipped.jsonl` where a row was. Numbers that are not finite are left out: JSON has none.
"""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from torch.utils.tensorboard import SummaryWriter

from pipelines.training.windows import Skipped

Observer = Callable[[dict[str, Any]], None]
SKIPPED = "skipped.jsonl"
POLL_S = 0.5


def known_skips(run_directory: Path) -> list[Skipped]:
    """The rows that earlier commands of this run skipped."""
    path = run_directory / SKIPPED
    lines = path.read_text().splitlines() if path.exists() else []
    return [Skipped(**json.loads(line)) for line in lines]


class Recorder:
    """Takes messages off the reports in a thread, until it is closed and none is left.

    observer: called with every metrics record; `skipped_documents` counts the rows that were skipped so far, where there are any.
    """

    def __init__(self, reports: Any, run_directory: Path, observer: Observer | None) -> None:
        self._reports = reports
        self._observer = observer
        self._skips = run_directory / SKIPPED
        self._skipped = len(known_skips(run_directory))
        self._lines = (run_directory / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(run_directory / "tensorboard"))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            closing = self._closing.is_set()
            try:
                messages = ray.get(self._reports.take.remote(POLL_S))
            except ray.exceptions.RayActorError:
                return
            for message in messages:
                if "skipped" in message:
                    self._skip(message["skipped"])
                else:
                    self._record(message)
            if closing and not messages:
                return

    def _skip(self, skipped: list[Skipped]) -> None:
        with self._skips.open("a") as lines:
            lines.writelines(json.dumps(each._asdict()) + "\n" for each in skipped)
        self._skipped += len(skipped)

    def _record(self, metrics: dict[str, Any]) -> None:
        metrics = {name: value for name, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)}
        if self._skipped:
            metrics["skipped_documents"] = self._skipped
        self._lines.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, metrics["step"])
        if self._observer is not None:
            self._observer(metrics)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=10)
        self._lines.close()
        self._board.close()

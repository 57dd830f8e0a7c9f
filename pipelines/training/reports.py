"""What the processes of a training tell the one that started it: metrics, and rows of the corpus that gave no example.

One actor for a command. Rank 0 puts metrics in; whoever makes examples names the rows it skipped, each counted once however often
an epoch comes by it, and hears when they are too many. The starting process takes both out.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import ray

from pipelines.training.windows import Skipped

SHOWN = 5
"""Rows that a refusal names."""


class Reports:
    """Messages in order, and the count of skipped rows against the share of all documents that may be skipped."""

    def __init__(self, documents: int, max_share: float, known: Iterable[Skipped] = ()) -> None:
        self._documents, self._max_share = documents, max_share
        self._skipped = {(each.path, each.row): each for each in known}
        self._messages: list[dict[str, Any]] = []
        self._waiting = asyncio.Event()

    async def put(self, metrics: dict[str, Any]) -> None:
        """Metrics of a step."""
        self._tell(metrics)

    async def skip(self, skipped: Sequence[Skipped]) -> str | None:
        """Notes rows; returns `refusal()`."""
        new = {(each.path, each.row): each for each in skipped if (each.path, each.row) not in self._skipped}
        if new:
            self._skipped |= new
            self._tell({"skipped": list(new.values())})
        return self._refusal()

    async def refusal(self) -> str | None:
        """Why training must stop: too many rows were skipped. None while they are few enough."""
        return self._refusal()

    async def take(self, timeout_s: float) -> list[dict[str, Any]]:
        """All messages since the last call, waiting for one up to `timeout_s`: metrics, and {"skipped": new rows}."""
        try:
            await asyncio.wait_for(self._waiting.wait(), timeout_s)
        except TimeoutError:
            return []
        taken, self._messages = self._messages, []
        self._waiting.clear()
        return taken

    def _tell(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self._waiting.set()

    def _refusal(self) -> str | None:
        if len(self._skipped) <= self._max_share * self._documents:
            return None
        named = [f"{each.path}#{each.row}: {each.reason}" for each in list(self._skipped.values())[:SHOWN]]
        return (
            f"{len(self._skipped)} of {self._documents} documents cannot be trained on, and run.max_skipped_share is "
            f"{self._max_share}: mend the corpus, or raise it. The first, as file#row from 0: {'; '.join(named)}"
        )


def start_reports(documents: int, max_share: float, known: Iterable[Skipped]) -> Any:
    """A handle to `Reports` in an actor that takes no logical CPU."""
    return ray.remote(Reports).options(num_cpus=0).remote(documents, max_share, list(known))

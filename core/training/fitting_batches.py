"""Batches through a model in whatever size memory holds.

In: the lengths of rows, and a function that runs a batch of them. Out: its results; a batch that memory does not hold is run in
halves, and None stands for a row that does not fit alone. What a failure has taught holds for the next batches, and is then
forgotten step by step, for memory may have been short because of a neighbour. Knows nothing of models. Cost: a failed attempt,
again about every `FORGET_AFTER` batches while memory stays short.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from core.training.examples import plan_batches

log = logging.getLogger(__name__)

FORGET_AFTER = 100
"""Batches after which a lowered limit is doubled."""

_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")

ResultT = TypeVar("ResultT")


class FittingBatches:
    """At most `max_rows` rows and `max_padded_tokens` tokens a batch, and fewer tokens while memory is short."""

    def __init__(self, max_rows: int, max_padded_tokens: int) -> None:
        self._max_rows, self._max_padded_tokens = max_rows, max_padded_tokens
        self._limit = max_padded_tokens
        self._since_lowered = 0

    def run(
        self, lengths: Sequence[int], run_batch: Callable[[list[int]], ResultT]
    ) -> Iterator[tuple[list[int], ResultT | None]]:
        """(indices into `lengths`, what `run_batch` gave for them), longest first; None where one row alone is too much."""
        waiting = deque(plan_batches(lengths, self._max_rows, self._max_padded_tokens))
        while waiting:
            batch = waiting.popleft()
            padded = len(batch) * lengths[batch[0]]
            if len(batch) > 1 and padded > self._limit:
                middle = (len(batch) + 1) // 2
                waiting.extendleft([batch[middle:], batch[:middle]])
                continue
            result = unless_out_of_memory(partial(run_batch, batch))
            if result is None and len(batch) > 1:
                self._limit, self._since_lowered = padded // 2, 0
                log.warning("%d rows of %d tokens do not fit into memory: halved", len(batch), lengths[batch[0]])
                waiting.appendleft(batch)
                continue
            self._since_lowered += 1
            if self._since_lowered >= FORGET_AFTER:
                self._limit, self._since_lowered = min(2 * self._limit, self._max_padded_tokens), 0
            yield batch, result
            result = None  # what it holds is for the next batch, too


def unless_out_of_memory(run: Callable[[], ResultT]) -> ResultT | None:
    """What `run` gives; None, with its memory free again, where it ran out of memory, on a GPU or on the CPU."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(message in str(error) for message in _MESSAGES)

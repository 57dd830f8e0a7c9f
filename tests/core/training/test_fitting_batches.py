import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.training.examples import plan_batches
from core.training.fitting_batches import FORGET_AFTER, FittingBatches, unless_out_of_memory


@given(lengths=st.lists(st.integers(0, 300), max_size=60), max_rows=st.integers(1, 9), max_tokens=st.integers(1, 600))
def test_batches_hold_every_index_once_within_their_limits(lengths: list[int], max_rows: int, max_tokens: int) -> None:
    batches = plan_batches(lengths, max_rows, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) <= max_rows and (len(batch) == 1 or longest * len(batch) <= max_tokens)
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)


def too_large_for_any_machine() -> torch.Tensor:
    return torch.empty(2**50, dtype=torch.uint8)


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 9), st.integers(1, 600), st.integers(1, 400))
def test_every_row_runs_once_in_batches_that_fit(lengths: list[int], max_rows: int, max_tokens: int, memory: int) -> None:
    """Memory for `memory` tokens; more is asked of the real allocator, which refuses."""
    ran: list[list[int]] = []

    def run(batch: list[int]) -> list[int]:
        if max(lengths[row] for row in batch) * len(batch) > memory:
            too_large_for_any_machine()
        ran.append(batch)
        return batch

    done = list(FittingBatches(max_rows, max_tokens).run(lengths, run))
    assert sorted(row for batch, _ in done for row in batch) == list(range(len(lengths)))
    assert [batch for batch, result in done if result is not None] == ran
    refused = [batch for batch, result in done if result is None]
    assert refused == [[row] for batch, _ in done for row in batch if lengths[row] > memory]
    flat = [lengths[row] for batch, _ in done for row in batch]
    assert flat == sorted(lengths, reverse=True)


def test_a_failure_is_remembered_for_a_while() -> None:
    batches, tried = FittingBatches(16, 1600), list[int]()

    def run(batch: list[int]) -> bool:
        tried.append(len(batch))
        if len(batch) > 5:
            too_large_for_any_machine()
        return True

    assert len(list(batches.run([100] * 32, run))) == 8
    assert tried == [16, 8, *[4] * 8], "tokens of the failing batch are halved once, for all that follow"
    tried.clear()
    for _ in range(FORGET_AFTER):
        list(batches.run([100] * 4, run))
    list(batches.run([100] * 16, run))
    assert tried[FORGET_AFTER:] == [8, *[4] * 4], "tried again, and lowered again"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    def fail() -> int:
        raise error

    assert unless_out_of_memory(fail) is None


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        unless_out_of_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3))

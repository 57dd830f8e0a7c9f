"""LIFT where memory is short: the same adapters in smaller batches, and the document alone that does not fit."""

import re

import pytest
import torch
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.lift import trainer as lift_module
from core.lift.course import FixedQuestions
from core.lift.settings import LiftRun
from core.lift.trainer import Job, train
from core.training.examples import Batch, QuestionAnswer
from core.training.objectives import row_losses
from tests.core.lift.test_lift import base_of, by_key, job_of, settings_of, weights_of


def short_of_memory(monkeypatch: pytest.MonkeyPatch, tokens: int, where: str = "forward") -> list[tuple[int, int]]:
    """Memory for so many padded tokens; more is asked of the real allocator, which refuses. Gives the batches that ran."""
    ran: list[tuple[int, int]] = []

    def losses(base: BaseModel, batch: Batch, weights: None) -> Tensor:
        def ask(gradient: Tensor) -> None:
            torch.empty(2**50, dtype=torch.uint8)

        loss_B = row_losses(base, batch, weights)
        if batch.ids_BT.numel() <= tokens:
            ran.append(tuple(batch.ids_BT.shape))
        elif where == "forward":
            ask(loss_B)
        else:
            loss_B.register_hook(ask)
        return loss_B

    monkeypatch.setattr(lift_module, "row_losses", losses)
    return ran


@pytest.mark.parametrize(("kind", "where"), [("lora", "forward"), ("pissa", "backward"), ("gated_memory", "backward")])
def test_short_memory_costs_time_alone(kind: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run = base_of(torch.float64), LiftRun(slots=3, checkpointing=where == "backward")
    settings = settings_of(kind, 1e-3, gate_penalty=0.1)
    jobs = [job_of(number) for number in range(4)]
    ample = by_key(train(base, jobs, settings, run))
    ran = short_of_memory(monkeypatch, 300, where)
    short = by_key(train(base, jobs, settings, run))
    assert len(ran) > 3 * 4 and all(rows * length <= 300 for rows, length in ran)
    for key, result in short.items():
        assert (result.steps, result.tokens, result.reason) == (ample[key].steps, ample[key].tokens, "schedule")
        assert result.losses == pytest.approx(ample[key].losses, abs=1e-9, rel=0)
        assert (weights_of(result).flat_BN - weights_of(ample[key]).flat_BN).abs().max() < 1e-6
    assert base.active.stack == () and not base.layers[0].training


def test_an_example_that_does_not_fit_alone_ends_its_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base, settings = base_of(torch.float64), settings_of()
    large = Job("large", "A bell.", questions=FixedQuestions((QuestionAnswer("Which bell of all the bells? " * 7, "This."),)))
    expected = by_key(train(base, [job_of(0), job_of(1)], settings))
    short_of_memory(monkeypatch, 150)
    results = by_key(train(base, [job_of(0), large, job_of(1)], settings, LiftRun(slots=3)))
    failed = results.pop("large")
    assert (failed.weights, failed.reason, failed.steps) == (None, "failed", 0)
    assert re.fullmatch(r"out of memory: an example of 199 tokens does not fit alone, .*", failed.fault)
    for key, result in results.items():
        assert result.losses == pytest.approx(expected[key].losses, abs=1e-9, rel=0)
    [alone] = train(base, [large], settings)
    assert alone.fault == failed.fault

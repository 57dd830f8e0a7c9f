"""Full fine-tuning of the base on one document: a baseline to measure LIFT against, never stored, never served.

In: a base, a `core.lift.trainer.Job`, LIFT's settings, of which the adapter is not used. Out: a context in which the base is that
model. Costs a second copy of the weights, and Adam's two moments while it trains; nobody else may use the base meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core.adapters.base_model import BaseModel
from core.lift.course import weighed
from core.lift.settings import LiftSettings
from core.lift.trainer import Job, course
from core.training.examples import collate, plan_batches
from core.training.objectives import row_losses


@contextmanager
def full_finetune(base: BaseModel, job: Job, settings: LiftSettings, micro_batch_tokens: int = 4096) -> Iterator[list[float]]:
    """Inside, the base's own weights are trained on a document; gives the loss of each step, before its update.

    Curriculum, loss, schedule and clipping are LIFT's. After it, whatever happened inside, the weights are bit for bit what they
    were. Raises `ValueError` where questions are still to come, or as `core.lift.trainer.course` does.
    """
    parameters = list(base.model.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield _train(base, job, settings, micro_batch_tokens)
    finally:
        base.model.requires_grad_(False)
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


def _train(base: BaseModel, job: Job, settings: LiftSettings, micro_batch_tokens: int) -> list[float]:
    if not job.questions.finished:
        raise ValueError("questions are still to come: fine-tune once they are all there")
    rule = settings.optimiser
    walk = course(base, job, settings)
    parameters = list(base.model.requires_grad_(True).parameters())
    optimiser = torch.optim.AdamW(parameters, rule.learning_rate, rule.betas, weight_decay=rule.weight_decay, fused=True)
    losses: list[float] = []
    while lesson := walk.take():
        optimiser.param_groups[0]["lr"] = rule.rate(len(losses), walk.progress)
        rows = list(weighed(lesson, settings.gamma))
        total = 0.0
        for picked in plan_batches([len(exercise.example.ids) for exercise, _ in rows], len(rows), micro_batch_tokens):
            batch = collate([rows[row][0].example for row in picked], pad_id=0).to(base.device)
            loss_B = row_losses(base, batch, None)
            loss = (loss_B * loss_B.new_tensor([rows[row][1] for row in picked])).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, rule.clip_norm)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
        walk.record(total)
    base.model.requires_grad_(False)
    return losses

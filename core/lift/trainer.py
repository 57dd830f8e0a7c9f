"""LIFT: fine-tunes one adapter for each document, many documents at once, on one frozen base.

In: a base with tokenizer, `Job`s (a document, its questions, perhaps an adapter to start from), `LiftSettings`. Out: for each
job a `LiftResult`, in the order in which they finish: the adapter as it is stored, its loss curve, and why it stopped.

S slots hold a document each: fp32 parameters `flat_SN` (fp64 on an fp64 base) and one Adam state a row. At every step each
document that has exercises contributes those of its next step; all are packed by length into padded micro-batches whose rows run
under their document's adapter. A document's loss is the token mean of its own input examples plus gamma times that of its
auxiliary ones (2412.13626, section 3.2), gradients are clipped document by document, so none depends on its neighbours. Who
finishes leaves at once and the next job enters. A document that fails takes nobody with it. A micro-batch that memory does not
hold runs in halves, which changes nothing, as losses are sums (`core.training.fitting_batches`); an example that does not fit
alone ends its document.

Knows nothing of stores, workers or question writing. Memory: 4 N numbers a slot beside the base, and a micro-batch's
activations.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.gated_memory import gate_penalty, recording_gates
from core.adapters.weights import AdapterWeights
from core.config import fingerprint
from core.lift.course import Course, Exercise, FixedQuestions, Questions, weighed
from core.lift.forms import form_of
from core.lift.settings import LiftRun, LiftSettings
from core.training.examples import collate
from core.training.fitting_batches import FittingBatches
from core.training.objectives import row_losses

FORMAT = 1
FAULTS_AT_MOST = 2
StopReason = Literal["schedule", "early_stop", "token_budget", "failed"]


@dataclass(frozen=True, eq=False)
class Job:
    """A document to be lifted.

    key: names it in results and seeds its draws (its content hash makes the adapter a function of content and settings). start:
    adapters whose sum is trained on. state: of the same job, to go on from; `questions` must give at least the pairs of then.
    """

    key: str
    text: str
    title: str = ""
    questions: Questions = field(default_factory=FixedQuestions)
    start: AdapterWeights | None = None
    state: "LiftState | None" = None


@dataclass(frozen=True, eq=False)
class LiftResult:
    """What became of a job.

    weights: one adapter as it is stored, on the base's device; None where the job failed, and `fault` says why. reason:
    `early_stop` where any stage ended early. losses: of each step, before its update; NaN where it was not finite and not taken.
    tokens: trained on, contexts included, padding not. seconds: in a slot, with those of earlier runs.
    """

    key: str
    weights: AdapterWeights | None
    losses: tuple[float, ...]
    steps: int
    tokens: int
    seconds: float
    reason: StopReason
    fault: str = ""


class Progress(NamedTuple):
    """Counts of a document in training; `faults` counts steps that were not finite."""

    steps: int = 0
    tokens: int = 0
    faults: int = 0


@dataclass(frozen=True, eq=False)
class LiftState:
    """A document in training: `flat_N` and Adam's moments, its losses, its place in the course."""

    key: str
    settings: str
    flat_N: Tensor
    first_N: Tensor
    second_N: Tensor
    losses: tuple[float, ...]
    progress: Progress
    seconds: float
    course: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, under another name first: a cut-off write leaves the old one."""
        path = Path(path)
        described = {name: getattr(self, name) for name in ("key", "settings", "losses", "progress", "seconds", "course")}
        tensors = {name: getattr(self, name).cpu() for name in ("flat_N", "first_N", "second_N")}
        unfinished = path.with_name(path.name + ".unfinished")
        save_file(tensors, unfinished, {"lift": json.dumps({"format": FORMAT, **described})})
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "LiftState":
        """Reads what `save` wrote. Raises `ValueError` for another file or a newer format."""
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("lift", "{}"))
            if described.pop("format", None) != FORMAT:
                raise ValueError(f"{path} is not a LIFT state of format {FORMAT}: use the Imprint that wrote it, or start anew")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
        described.update(losses=tuple(described["losses"]), progress=Progress(*described["progress"]))
        return cls(**described, **tensors)


def course(base: BaseModel, job: Job, settings: LiftSettings) -> Course:
    """A job's course through the settings' curriculum. Raises `ValueError` for a base without tokenizer, or as `Course` does."""
    waits = settings.optimiser.decay != "constant"
    text = job.title, job.text, job.questions
    return Course(tokenizer_of(base), job.key, *text, settings.curriculum, base.max_length, whole=waits)


class _Slot:
    """A document in training."""

    def __init__(self, job: Job, course: Course) -> None:
        self.job, self.course = job, course
        self.losses: list[float] = []
        self.progress = Progress()
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since

    def restore(self, state: LiftState) -> None:
        self.course.restore(state.course)
        self.losses, self.progress = list(state.losses), state.progress
        self._since = time.perf_counter() - state.seconds


class Lift:
    """S documents in training on one base. `submit` while there is a free slot, `step` until idle; `train` does both.

    Raises `ValueError` for a base without tokenizer and for settings that do not fit it.
    """

    def __init__(self, base: BaseModel, settings: LiftSettings, run: LiftRun | None = None) -> None:
        tokenizer_of(base)
        settings.curriculum.reading.sizes(base.max_length)
        self._base, self._settings, self._run = base, settings, run or LiftRun()
        self._settings_fingerprint = fingerprint(settings)
        self.form = form_of(base, settings.adapter)
        self.spec, self.stored_spec = self.form.spec, self.form.stored_spec
        self._slots: list[_Slot | None] = [None] * self._run.slots
        dtype = torch.promote_types(base.dtype, torch.float32)
        self._flat_SN = torch.zeros(self._run.slots, self.spec.numel, dtype=dtype, device=base.device)
        self._rows = [nn.Parameter(row_N) for row_N in self._flat_SN]  # views: the optimiser works on flat_SN itself
        optimiser = settings.optimiser
        self._optimiser = torch.optim.AdamW(
            [{"params": [row_N]} for row_N in self._rows], betas=optimiser.betas, weight_decay=optimiser.weight_decay, fused=True
        )
        self._batches = FittingBatches(sys.maxsize, self._run.micro_batch_tokens)
        self.waiting = False
        """Whether no document could train at the last step: all wait for questions."""

    def check_start(self, start: AdapterWeights) -> None:
        """Raises `ValueError` for adapters that no job could start from."""
        self.form.initial(torch.Generator(), start)

    @property
    def free(self) -> int:
        """Slots without a document."""
        return self._slots.count(None)

    @property
    def idle(self) -> bool:
        return self.free == len(self._slots)

    def submit(self, job: Job) -> LiftResult | None:
        """Puts a job into a free slot; a result where it fails at once. Raises `ValueError` where no slot is free."""
        if not self.free:
            raise ValueError(f"all {len(self._slots)} slots are taken: step until one is free")
        place = self._slots.index(None)
        try:
            slot = _Slot(job, course(self._base, job, self._settings))
            self._begin(place, slot)
        except ValueError as error:
            return LiftResult(job.key, None, (), 0, 0, 0.0, "failed", str(error))
        self._slots[place] = slot
        return None

    @torch.no_grad()
    def _begin(self, place: int, slot: _Slot) -> None:
        row_N, state = self._rows[place], slot.job.state
        if state is None:
            seed = hashlib.sha256(f"{self._settings.curriculum.seed}/{slot.job.key}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
            row_N.copy_(self.form.initial(generator, slot.job.start))
            return
        if (state.settings, state.key, len(state.flat_N)) != (self._settings_fingerprint, slot.job.key, self.spec.numel):
            raise ValueError(f"the state of {state.key!r} was made by other settings or another job: start {slot.job.key!r} anew")
        slot.restore(state)
        row_N.copy_(state.flat_N)
        if done := state.progress.steps - state.progress.faults:
            self._optimiser.state[row_N] = {
                "step": torch.tensor(float(done), device=row_N.device),
                "exp_avg": state.first_N.to(row_N),
                "exp_avg_sq": state.second_N.to(row_N),
            }

    def states(self) -> Iterator[LiftState]:
        """Every document in training, to be gone on with by a job of its `state`. Valid until the next step."""
        for slot, row_N in zip(self._slots, self._rows, strict=True):
            if slot is not None:
                moments = self._optimiser.state.get(row_N, {})
                yield LiftState(
                    key=slot.job.key,
                    settings=self._settings_fingerprint,
                    flat_N=row_N.detach(),
                    first_N=moments.get("exp_avg", torch.zeros_like(row_N.detach())),
                    second_N=moments.get("exp_avg_sq", torch.zeros_like(row_N.detach())),
                    losses=tuple(slot.losses),
                    progress=slot.progress,
                    seconds=slot.seconds,
                    course=slot.course.state(),
                )

    def step(self) -> list[LiftResult]:
        """One optimiser step of every document that has exercises; the results of those that are done."""
        results: list[LiftResult] = []
        lessons: dict[int, list[Exercise]] = {}
        rates: dict[int, float] = {}
        for place, slot in enumerate(self._slots):
            if slot is None:
                continue
            try:
                lesson = slot.course.take()
            except ValueError as error:
                results.append(self._leave(place, "failed", str(error)))
                continue
            if lesson:
                lessons[place] = lesson
                rates[place] = self._settings.optimiser.rate(slot.progress.steps, slot.course.progress)
            elif lesson is not None:
                results.append(self._done(place))
        self.waiting = not lessons and not results
        if lessons:
            grad_SN, loss_S, unfit = self._gradients(lessons)
            for place, tokens in unfit.items():
                fault = f"out of memory: an example of {tokens} tokens does not fit alone, set checkpointing or shorten it"
                results.append(self._leave(place, "failed", fault))
                del lessons[place], rates[place]
            losses = self._update(grad_SN, loss_S, rates)
            for place, lesson in lessons.items():
                results += self._account(place, lesson, losses[place])
        return results

    def _gradients(self, lessons: dict[int, list[Exercise]]) -> tuple[Tensor, Tensor, dict[int, int]]:
        """`[S, N]` gradients and `[S]` losses of each document alone; who has an example that does not fit, and its tokens."""
        gamma, device = self._settings.gamma, self._flat_SN.device
        rows = [(place, *weighted) for place, lesson in lessons.items() for weighted in weighed(lesson, gamma)]
        grad_SN, loss_S = torch.zeros_like(self._flat_SN), self._flat_SN.new_zeros(len(self._slots))
        lengths = [len(exercise.example.ids) for _, exercise, _ in rows]
        unfit: dict[int, int] = {}

        def run(picked: list[int]) -> tuple[list[int], list[int], Tensor, Tensor]:
            members = sorted((rows[row] for row in picked), key=lambda row: row[0])
            places = sorted({place for place, _, _ in members})
            penalties = [self._settings.gate_penalty / len(lessons[place]) for place, _, _ in members]
            loss_B, flat_PN = self._losses(places, members, penalties)
            [grad_PN] = torch.autograd.grad(loss_B.sum(), [flat_PN])
            return places, [place for place, _, _ in members], grad_PN, loss_B.detach()

        for picked, ran in self._batches.run(lengths, run):
            if ran is None:
                unfit.setdefault(rows[picked[0]][0], lengths[picked[0]])
                continue
            places, place_of_row, grad_PN, loss_B = ran
            grad_SN.index_add_(0, torch.tensor(places, device=device), grad_PN)
            loss_S.index_add_(0, torch.tensor(place_of_row, device=device), loss_B.to(loss_S.dtype))
        return grad_SN, loss_S, unfit

    def _losses(
        self, places: Sequence[int], members: Sequence[tuple[int, Exercise, float]], penalties: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """`[B]` weighted losses of a micro-batch, and the leaf `[P, N]` of its documents' parameters."""
        base = self._base
        whole = len(places) == len(self._slots)
        flat_PN = (self._flat_SN.detach() if whole else self._flat_SN[places]).requires_grad_()
        local = {place: number for number, place in enumerate(places)}
        index_B = torch.tensor([local[place] for place, _, _ in members]) if len(places) > 1 else None
        batch = collate([exercise.example for _, exercise, _ in members], pad_id=0).to(base.device)
        penalised = any(penalties) and self.form.kind == "gated_memory"
        with (
            base.checkpointing(self._run.checkpointing),
            recording_gates(base) if penalised else nullcontext() as gates,
            self.form.attach(flat_PN, index_B),
        ):
            loss_B = row_losses(base, batch, None)
        loss_B = loss_B * loss_B.new_tensor([weight for _, _, weight in members])
        if gates is not None:
            loss_B = loss_B + gate_penalty(gates.gates_BTLH, batch.mask_BT) * loss_B.new_tensor(penalties)
        return loss_B, flat_PN

    @torch.no_grad()
    def _update(self, grad_SN: Tensor, loss_S: Tensor, rates: dict[int, float]) -> list[float]:
        """Clips and applies each document's gradient; the losses, NaN for a document whose step was not finite and not taken."""
        norm_S = torch.linalg.vector_norm(grad_SN, dim=1)
        grad_SN *= (self._settings.optimiser.clip_norm / (norm_S + 1e-6)).clamp_max(1.0)[:, None]
        losses: list[float] = torch.where(norm_S.isfinite() & loss_S.isfinite(), loss_S, torch.nan).tolist()
        for place, rate in rates.items():
            self._optimiser.param_groups[place]["lr"] = rate
            self._rows[place].grad = None if math.isnan(losses[place]) else grad_SN[place]
        self._optimiser.step()
        self._optimiser.zero_grad()
        return losses

    def _account(self, place: int, lesson: Sequence[Exercise], loss: float) -> list[LiftResult]:
        slot = self._slots[place]
        assert slot is not None
        fault = math.isnan(loss)
        steps, tokens, faults = slot.progress
        slot.progress = Progress(steps + 1, tokens + sum(len(e.example.ids) for e in lesson), faults + fault)
        slot.losses.append(loss)
        if slot.progress.faults >= FAULTS_AT_MOST:
            where = f"not finite at {FAULTS_AT_MOST} steps, the last of them step {steps}: lower learning_rate"
            return [self._leave(place, "failed", f"loss or gradient {where}")]
        try:
            slot.course.record(None if fault else loss)
        except ValueError as error:
            return [self._leave(place, "failed", str(error))]
        if slot.course.finished:
            return [self._done(place)]
        budget = self._settings.token_budget
        return [self._leave(place, "token_budget")] if budget is not None and slot.progress.tokens >= budget else []

    def _done(self, place: int) -> LiftResult:
        slot = self._slots[place]
        assert slot is not None
        if not slot.progress.steps:
            return self._leave(place, "failed", "nothing to train on: no segment of two tokens, and no question")
        return self._leave(place, "early_stop" if slot.course.stopped_early else "schedule")

    def _leave(self, place: int, reason: StopReason, fault: str = "") -> LiftResult:
        """Frees a slot and gives its result."""
        slot = self._slots[place]
        assert slot is not None
        weights = None if reason == "failed" else self.form.stored(self._flat_SN[place : place + 1])
        self._slots[place] = None
        self._optimiser.state.pop(self._rows[place], None)
        steps, tokens, _ = slot.progress
        return LiftResult(slot.job.key, weights, tuple(slot.losses), steps, tokens, slot.seconds, reason, fault)


def train(base: BaseModel, jobs: Iterable[Job], settings: LiftSettings, run: LiftRun | None = None) -> Iterator[LiftResult]:
    """One result for each job, as they finish; jobs are drawn as slots get free.

    But for rounding, no result depends on `run` or on the other jobs. Raises `ValueError` where the settings do not fit the base;
    a document's own fault is in its result.
    """
    run = run or LiftRun()
    lift, queue = Lift(base, settings, run), iter(jobs)
    while True:
        while lift.free and (job := next(queue, None)) is not None:
            failed = lift.submit(job)
            if failed is not None:
                yield failed
        if lift.idle:
            return
        yield from lift.step()
        if lift.waiting:
            time.sleep(run.poll_s)

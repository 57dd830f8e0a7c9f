"""One document's way through LIFT: stages of epochs over tasks, cut into optimiser steps.

In: a document's text, question-answer pairs that may still be arriving, a `Curriculum`, a tokenizer. Out of a `Course`: batch
after batch of `Exercise`s, each the examples of one step.

Every draw comes from (seed, document, stage, epoch), and a batch never depends on when a pair arrived: the same pairs give the
same batches, at once or one by one, and a position is three counts. An epoch with questions is over when no more will come and
all were asked, so epochs count over the complete set. The first epoch of a stage runs in the document's order, so that it can
begin on the first pairs; later ones are shuffled.

Knows nothing of models and adapters. Cost: document and questions are tokenised once, contexts and timelines every epoch.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import Field, PositiveInt, model_validator
from transformers import PreTrainedTokenizerBase

from core.config import Section
from core.lift.examples import (
    Reading,
    Wording,
    draw_pieces,
    draw_released_pieces,
    question_example,
    recital,
    released_recital,
    segment_example,
    timeline_example,
)
from core.text.documents import Window, segments
from core.text.prompts import encode
from core.text.sentences import sentences
from core.training.examples import Asked, Example, QuestionAnswer, question_answers

Task = Literal["segments", "contextualised", "questions", "timeline"]


class Stage(Section):
    """A stretch of epochs over some tasks. The optimiser's state is carried from stage to stage."""

    name: str
    epochs: PositiveInt
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]


class EarlyStop(Section):
    """Ends a stage early, by the mean training loss of its epochs.

    loss_below: an epoch under this loss is the last. patience_epochs: so many epochs in a row that do not beat the best one by
    `min_improvement` are the last.
    """

    loss_below: Annotated[float, Field(gt=0)] | None = None
    patience_epochs: PositiveInt | None = None
    min_improvement: Annotated[float, Field(ge=0)] = 0.0


class Curriculum(Section):
    """What a document is trained on, in which order and in which steps.

    examples_per_step, tokens_per_step: a step ends at whichever is reached first; with neither, a step is a whole epoch. Each
    epoch draws `timelines` times `timeline_sentences` sentences. seed: of every draw, the adapter's start included.
    """

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = (Stage(name="questions", epochs=5, tasks=("questions",)),)
    examples_per_step: PositiveInt | None = 4
    tokens_per_step: PositiveInt | None = None
    reading: Reading = Reading()
    wording: Wording = Wording()
    timelines: PositiveInt = 10
    timeline_sentences: Annotated[int, Field(ge=2)] = 5
    early_stop: EarlyStop = EarlyStop()
    seed: int = 0

    @model_validator(mode="after")
    def _stages_differ(self) -> "Curriculum":
        if len({stage.name for stage in self.stages}) != len(self.stages):
            raise ValueError("two stages have one name: give each its own")
        return self

    def has(self, task: Task) -> bool:
        """Whether any stage trains on this task."""
        return any(task in stage.tasks for stage in self.stages)


class Questions(Protocol):
    """Question-answer pairs of a document that may still be arriving. Neither member waits."""

    @property
    def finished(self) -> bool:
        """Whether `ready` will not grow any more."""

    def ready(self) -> Sequence[QuestionAnswer]:
        """All pairs so far, in the document's order: it only ever grows at its end."""


@dataclass(frozen=True)
class FixedQuestions:
    """Pairs that are all there."""

    pairs: tuple[QuestionAnswer, ...] = ()
    finished: bool = True

    def ready(self) -> Sequence[QuestionAnswer]:
        return self.pairs


@dataclass
class GrowingQuestions:
    """Pairs that another thread or task adds; it calls `close` at the end."""

    pairs: list[QuestionAnswer] = field(default_factory=list)
    finished: bool = False

    def ready(self) -> Sequence[QuestionAnswer]:
        return self.pairs

    def add(self, pair: QuestionAnswer) -> None:
        self.pairs.append(pair)

    def close(self) -> None:
        self.finished = True


class Stream(Protocol):
    """What gives each pair once, as it arrives (`core.questions.stream.QuestionStream`)."""

    @property
    def finished(self) -> bool:
        """Whether `poll` has given every pair."""

    def poll(self) -> Sequence[Asked]:
        """What arrived since the last call."""


class PolledQuestions:
    """The pairs of a `Stream`. Batches depend on arrival where the stream gives pairs out of the document's order."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pairs: list[QuestionAnswer] = []

    @property
    def finished(self) -> bool:
        self.ready()
        return self._stream.finished

    def ready(self) -> Sequence[QuestionAnswer]:
        self._pairs += question_answers(self._stream.poll())
        return self._pairs


def titled(title: str, text: str) -> str:
    """What LIFT reads of a document: its title above its text."""
    return f"{title}\n\n{text}" if title else text


class Exercise(NamedTuple):
    """An example, and whether its loss belongs to L_AT (else to L_input)."""

    example: Example
    auxiliary: bool


def weighed(lesson: Sequence[Exercise], gamma: float) -> Iterator[tuple[Exercise, float]]:
    """Each exercise of a step with what one target of it weighs in the loss L_input + gamma L_AT, both token means (LIFT v1)."""
    targets = {kind: sum(exercise.example.tokens for exercise in lesson if exercise.auxiliary is kind) for kind in (False, True)}
    for exercise in lesson:
        yield exercise, (gamma if exercise.auxiliary else 1.0) / targets[exercise.auxiliary]


class Position(NamedTuple):
    """Where a course stands: stage, epoch of the stage, exercises of the epoch that were given."""

    stage: int = 0
    epoch: int = 0
    given: int = 0


class Course:
    """Walks one document through its curriculum. Call `take`, train, `record`, until `finished`.

    key: names the document in every draw. whole: wait for all questions before the first of them is asked, for a schedule that
    must know how far it is. Examples without a supervised token are left out. Raises `ValueError` where the document cannot be
    read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        key: str,
        title: str,
        text: str,
        questions: Questions,
        curriculum: Curriculum,
        max_length: int,
        *,
        whole: bool = False,
    ) -> None:
        self._tokenizer, self._key, self._questions, self._curriculum, self._limit = (
            tokenizer,
            key,
            questions,
            curriculum,
            max_length,
        )
        whole_epochs = curriculum.examples_per_step is None and curriculum.tokens_per_step is None
        self._whole = whole or whole_epochs
        self._ids = encode(tokenizer, titled(title, text))
        size, stride, self._context_tokens = curriculum.reading.sizes(max_length)
        self._segments = segments(len(self._ids), size, stride, curriculum.reading.rule)
        self._sentences = [text[start:end] for start, end in sentences(text)] if curriculum.has("timeline") else []
        self.position = Position()
        self.stopped_early = False
        self.progress = 0.0
        """Share of the curriculum's epochs that was done before the step taken last; with `whole`, exact within epochs, too."""
        self._losses: list[float] = []
        self._best: float | None = None
        self._stale = 0
        self._exercises: list[Exercise] | None = None
        self._rendered: list[Example] = []
        self._asked = 0
        self._complete = False

    @property
    def finished(self) -> bool:
        return self.position.stage >= len(self._curriculum.stages)

    def take(self) -> list[Exercise] | None:
        """The exercises of the next step; None while they are still to come, and an empty list once the course is finished."""
        while not self.finished:
            complete = self._gather()
            batch, full = self._cut()
            if batch and (complete or (full and not self.position.epoch)):
                self.progress = self._progress()
                self.position = self.position._replace(given=self.position.given + len(batch))
                return batch
            if not complete:
                return None
            self._end_epoch()
        return []

    def record(self, loss: float | None) -> None:
        """Closes a step with its loss, None where it failed; ends the epoch or the stage where it was the last."""
        if loss is not None:
            self._losses.append(loss)
        if self._gather() and self.position.given >= len(self._exercises or ()):
            self._end_epoch()

    def state(self) -> dict[str, Any]:
        """Where the course stands, as JSON values."""
        early = {"losses": self._losses, "best": self._best, "stale": self._stale, "stopped_early": self.stopped_early}
        return {"position": list(self.position), **early}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken: same document, same curriculum, at least the pairs of that time."""
        self.position = Position(*state["position"])
        self._losses, self._best, self._stale = list(state["losses"]), state["best"], state["stale"]
        self.stopped_early = state["stopped_early"]
        self._exercises, self._complete = None, False

    def _progress(self) -> float:
        assert self._exercises
        epochs = [stage.epochs for stage in self._curriculum.stages]
        stage, epoch, given = self.position
        return (sum(epochs[:stage]) + epoch + given / len(self._exercises)) / sum(epochs)

    def _gather(self) -> bool:
        """Brings the epoch's exercises up to date; whether they are all there, hence in their order."""
        if self._complete:
            return True
        stage, epoch, _ = self.position
        tasks = self._curriculum.stages[stage].tasks
        draws = f"{self._curriculum.seed}/{self._key}/{stage}/{epoch}"
        if self._exercises is None:
            self._exercises, self._asked = self._known(tasks, random.Random(draws)), 0
        complete = "questions" not in tasks or self._questions.finished  # asked before `ready`: nothing can come between the two
        if "questions" in tasks and (complete or not (self._whole or epoch)):
            pairs = self._questions.ready()
            self._rendered += [question_example(self._tokenizer, pair, self._limit) for pair in pairs[len(self._rendered) :]]
            self._exercises += [Exercise(example, True) for example in self._rendered[self._asked :] if example.tokens]
            self._asked = len(self._rendered)
        if complete and epoch:
            random.Random(f"{draws}/order").shuffle(self._exercises)
        self._complete = complete
        return complete

    def _known(self, tasks: Sequence[Task], rng: random.Random) -> list[Exercise]:
        curriculum, wording = self._curriculum, self._curriculum.wording
        exercises: list[Exercise] = []
        if "segments" in tasks:
            exercises += [Exercise(segment_example(self._ids, segment, self._limit), False) for segment in self._segments]
        if "contextualised" in tasks:
            exercises += [Exercise(self._recital(segment, rng), False) for segment in self._segments]
        if "timeline" in tasks and len(self._sentences) > 1:
            for _ in range(curriculum.timelines):
                count = curriculum.timeline_sentences
                example = timeline_example(self._tokenizer, self._sentences, count, wording, self._limit, rng)
                exercises.append(Exercise(example, True))
        return [exercise for exercise in exercises if exercise.example.tokens]

    def _recital(self, segment: Window, rng: random.Random) -> Example:
        wording = self._curriculum.wording
        if self._curriculum.reading.rule == "exact":
            pieces = draw_pieces(len(self._ids), segment, self._context_tokens, rng)
            return recital(self._tokenizer, self._ids, segment, pieces, wording, self._limit)
        pieces = draw_released_pieces(len(self._ids), self._context_tokens, rng)
        ellipsis_ids, recite_ids = encode(self._tokenizer, wording.ellipsis), encode(self._tokenizer, wording.recite)
        return released_recital(self._ids, segment, pieces, ellipsis_ids, recite_ids, self._limit)

    def _cut(self) -> tuple[list[Exercise], bool]:
        """The next exercises up to the limits of a step, and whether a limit was reached."""
        assert self._exercises is not None
        most, budget = self._curriculum.examples_per_step, self._curriculum.tokens_per_step
        batch: list[Exercise] = []
        tokens = 0
        for exercise in self._exercises[self.position.given :]:
            tokens += len(exercise.example.ids)
            if batch and budget is not None and tokens > budget:
                return batch, True
            batch.append(exercise)
            if len(batch) == most:
                return batch, True
        return batch, False

    def _end_epoch(self) -> None:
        stage, epoch, _ = self.position
        rule = self._curriculum.early_stop
        stop = False
        if self._losses:
            loss = sum(self._losses) / len(self._losses)
            stop = rule.loss_below is not None and loss < rule.loss_below
            if self._best is None or loss < self._best - rule.min_improvement:
                self._best, self._stale = loss, 0
            else:
                self._stale += 1
                stop = stop or self._stale == rule.patience_epochs
        last = epoch + 1 == self._curriculum.stages[stage].epochs
        if stop or last:
            self.stopped_early = self.stopped_early or (stop and not last)
            self._best, self._stale = None, 0
        self.position = Position(stage + 1) if stop or last else Position(stage, epoch + 1)
        self._losses, self._exercises, self._complete = [], None, False

"""The quality gate: does an adapter, as stored, give its document back better than another's adapter and better than none?

In: adapters as they will be put, and the passages (token ids) that each was made from. Out: the same adapters; those of the
sampled documents carry three losses in nats a token of their own passages, asked for as in training (SHINE's reconstruction):
under the adapter itself, decoded from its bytes, under another document's, and on the bare base. One that saves less than
`min_gain` is marked as withheld: a server then shows the document instead.

Whom it measures is continuous sampling (CSP-1; Dodge 1943, Annals of Mathematical Statistics 14): every adapter until `run`
of them have passed one after another, then a share of them, and every one again from the first that fails. A hypernetwork that
knows its documents costs a sample; one that does not is found at once, and none of its adapters answers. The share follows from
the content hash. Whose adapter is the other one follows from what else is at hand: losses under it differ a little between runs.
The gate measures and derives nothing, so its settings bear no identity: an adapter that is stored keeps the mark under which it
was stored.

Cost: three rows of a sampled document's tokens and a short prompt through the base, head included, in batches. Of the
hypernetwork's own cost, which is the base's over document and memory and the M2P transformer, that is about as much again.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.codec import decode
from core.adapters.lora import LoraWeights
from core.config import RunSection
from core.store.manifest import NewAdapter
from core.text.control import Ours
from core.text.prompts import Instructions, prompt
from core.training.examples import IGNORED, Example, collate
from core.training.fitting_batches import FittingBatches
from core.training.objectives import row_losses
from core.writing.gain import gain

log = logging.getLogger(__name__)


class GateSettings(RunSection):
    """share: of the documents, so many are measured once `run` in a row have passed; 0 measures none at all.

    min_gain: nats a token that an adapter must save (`gain`) to answer. instruction: what asked for the text back when the
    hypernetwork was trained.
    """

    share: Annotated[float, Field(ge=0, le=1)] = 0.02
    run: PositiveInt = 8
    min_gain: float = 0.1
    instruction: str = Instructions().reconstruct


class Candidate(NamedTuple):
    """An adapter to put, and the token ids of the passages that it was made from."""

    adapter: NewAdapter
    passages: Sequence[Sequence[int]]


OWN, OTHER, BARE = range(3)


class _Row(NamedTuple):
    """A candidate's passage, to be given back under one of `OWN`, `OTHER`, `BARE`: the vector of that place, -1 for none."""

    candidate: int
    under: int
    vector: int
    example: Example


class QualityGate:
    """Measures LoRAs on a base, in batches of `max_rows` and `max_padded_tokens`. Keeps one adapter, to compare with.

    Raises `ValueError` for a base without a tokenizer or a chat template.
    """

    def __init__(self, base: BaseModel, settings: GateSettings, max_rows: int, max_padded_tokens: int) -> None:
        self._base, self._settings = base, settings
        self._prompt = prompt(tokenizer_of(base), [{"role": "user", "content": Ours(settings.instruction)}])
        self._batches = FittingBatches(max_rows, max_padded_tokens)
        self._last: NewAdapter | None = None
        self._passed = 0

    def measured(self, candidates: Sequence[Candidate]) -> list[NewAdapter]:
        """The adapters, in order, with their losses and marks where they are sampled and fit into memory."""
        adapters = [candidate.adapter for candidate in candidates]
        others = adapters if self._last is None else [*adapters, self._last]
        places = list(range(len(candidates)))
        if self._passed >= self._settings.run:
            picked = [place for place in places if sampled(adapters[place].content_hash, self._settings.share)]
            adapters = self._measure(candidates, adapters, others, picked)
            places = [] if self._passed else [place for place in places if place not in picked]
        adapters = self._measure(candidates, adapters, others, places)
        self._last = others[0] if others else None
        return adapters

    def _measure(
        self, candidates: Sequence[Candidate], adapters: list[NewAdapter], others: Sequence[NewAdapter], places: Sequence[int]
    ) -> list[NewAdapter]:
        """The adapters with those at `places` measured; counts how many passed since the last that did not."""
        rows: list[_Row] = []
        for place in places:
            other = _other(others, place)
            under = [(OWN, place), *([] if other is None else [(OTHER, other)]), (BARE, -1)]
            rows += [
                _Row(place, which, vector, self._example(ids)) for ids in candidates[place].passages for which, vector in under
            ]
        losses = self._losses(rows, others) if rows else {}
        judged = [self._judged(each, losses[place]) if place in losses else each for place, each in enumerate(adapters)]
        for place in places:
            self._passed = 0 if judged[place].withheld else self._passed + (place in losses)
        return judged

    def _example(self, ids: Sequence[int]) -> Example:
        asked, shown = self._prompt, list(ids)[: max(0, self._base.max_length - len(self._prompt))]
        return Example((), (*asked, *shown), (*[IGNORED] * len(asked), *shown))

    @torch.inference_mode()
    def _losses(self, rows: Sequence[_Row], adapters: Sequence[NewAdapter]) -> dict[int, dict[int, float]]:
        """Mean loss of each candidate under each of its adapters; without those that do not fit into memory."""
        sums: dict[tuple[int, int], float] = {}
        tokens: dict[tuple[int, int], int] = {}
        lost: set[int] = set()
        vectors = {vector: _vector(adapters[vector]) for vector in {row.vector for row in rows} if vector >= 0}

        def run(batch: list[int]) -> list[float]:
            picked = [rows[index] for index in batch]
            used = sorted({row.vector for row in picked if row.vector >= 0})
            index_B = torch.tensor([used.index(row.vector) if row.vector >= 0 else -1 for row in picked])
            weights = None
            if used:
                flat_BN = torch.stack([vectors[vector] for vector in used])
                weights = LoraWeights(adapters[used[0]].spec, flat_BN).to(self._base.device, self._base.dtype)
            examples = collate([row.example for row in picked], pad_id=0).to(self._base.device)
            return row_losses(self._base, examples, weights, index_B).tolist()

        for batch, made in self._batches.run([len(row.example.ids) for row in rows], run):
            for place, index in enumerate(batch):
                row = rows[index]
                key = row.candidate, row.under
                if made is None:
                    lost.add(row.candidate)
                else:
                    sums[key] = sums.get(key, 0.0) + made[place]
                    tokens[key] = tokens.get(key, 0) + row.example.tokens
        if lost:
            log.warning("%d documents do not fit into memory to be measured: they keep no quality", len(lost))
        means: dict[int, dict[int, float]] = {}
        for (candidate, under), total in sums.items():
            if candidate not in lost:
                means.setdefault(candidate, {})[under] = total / max(tokens[candidate, under], 1)
        return means

    def _judged(self, adapter: NewAdapter, losses: dict[int, float]) -> NewAdapter:
        measured = replace(adapter, matched_loss=losses[OWN], shuffled_loss=losses.get(OTHER), base_loss=losses[BARE])
        saved = gain(measured.matched_loss, measured.shuffled_loss, measured.base_loss)
        assert saved is not None
        return replace(measured, withheld=not saved >= self._settings.min_gain)


def sampled(content_hash: str, share: float) -> bool:
    """Whether a document belongs to a share of all: larger shares hold the smaller ones."""
    return int(content_hash[:16], 16) < share * 16**16


def _other(adapters: Sequence[NewAdapter], place: int) -> int | None:
    """The next adapter, around the end, that was made for other content."""
    own = adapters[place].content_hash
    places = ((place + step) % len(adapters) for step in range(1, len(adapters)))
    return next((each for each in places if adapters[each].content_hash != own), None)


def _vector(adapter: NewAdapter) -> Tensor:
    return decode(adapter.blob(), adapter.spec, adapter.encoding)

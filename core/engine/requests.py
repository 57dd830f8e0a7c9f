"""What goes into the engine and what comes out of it. Knows nothing of how tokens are made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.adapters.spec import AdapterWeights

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest one at temperature 0, else a draw from the nucleus (Holtzman et al., ICLR 2020).

    The nucleus is the smallest set of tokens that holds `top_p` of the probability. Equal seeds give equal draws; None is a new
    seed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give more than 0 and at most 1")


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue by up to `max_tokens` tokens, or to the first of `stop_ids`; `adapter` holds one adapter."""

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    adapter: AdapterWeights | None = None
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Token:
    """One new token of a request; its last one says why it is the last.

    "stop": `token_id` is the stop id itself, no part of the answer. "length": `max_tokens` are made. "error": the logits were not
    finite (an adapter whose products overflow); `token_id` is -1.
    """

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class EngineStats:
    """Requests now in the engine, work done since it was made, and what its buffers hold."""

    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    cache_bytes: int
    adapter_bytes: int


@dataclass(frozen=True)
class Completion:
    """All new tokens of a request, without the stop id."""

    token_ids: list[int]
    finish_reason: FinishReason

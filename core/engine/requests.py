"""What goes into the engine and what comes out of it. Knows nothing of how tokens are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from core.adapters.weights import AdapterWeights
from core.engine.sampling import GREEDY, Sampling, TokenLogprob

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue by up to `max_tokens` tokens, or to the first of `stop_ids`; `adapter` holds one adapter."""

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    adapter: AdapterWeights | None = None
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY


@dataclass(frozen=True)
class Token:
    """One new token of a request; its last one says why it is the last.

    "stop": `token_id` is the stop id itself, no part of the answer. "length": `max_tokens` are made. "error": the logits were not
    finite (an adapter whose products overflow); `token_id` is -1. logprob and, with the first token, prompt_logprobs (of all
    tokens of the prompt but its first): where the request's sampling asks for them.
    """

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


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

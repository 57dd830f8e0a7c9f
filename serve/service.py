"""From a request to its answer: resolve the model, have the adapter in memory, build the prompt, run the engine, give out text.

In: `ChatRequest`s and `CompletionRequest`s. Out: `Answer`s, whose pieces come as they are made, and `ApiError`s. A prompt with a
document that is too long is cut in the middle (LIFT's head and tail), which the answer says. Requests that name a document and
are not turned away at the door count as its demand (`core.store.demand`). Knows nothing of HTTP and Ray. Texts of requests and
answers are never logged.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.gated_memory import memory_spec
from core.adapters.lora import check_fits
from core.adapters.spec import AdapterSpec, AdapterWeights, Gate, common_spec
from core.engine.requests import Request, Sampling, Token
from core.engine.token_loop import Engine
from core.lift.examples import Wording
from core.store.demand import DemandCounter
from core.store.errors import StoreError
from core.store.store import Store
from core.text.prompts import encode, head_tail, in_context, prompt, raw_prompt
from serve.engines import AsyncEngine, Draining, EngineFailed, Overloaded, Refused
from serve.residency import AdapterUnusable, Residency
from serve.resolver import ModeImpossible, Resolution, Resolver, UnknownModel
from serve.schema import ApiError, ChatRequest, CompletionRequest, FinishReason
from serve.settings import ServeSettings
from serve.text import AnswerText

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
RANK_OF_AN_EMPTY_STORE = 8
ELLIPSIS = Wording().ellipsis


class Piece(NamedTuple):
    """Text of an answer, in order. The last piece says why it is the last, and how many tokens were made."""

    text: str
    finish_reason: FinishReason | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer under way: where it comes from, and its pieces."""

    answer_id: str
    resolution: Resolution
    prompt_tokens: int
    pieces: AsyncIterator[Piece]

    @property
    def headers(self) -> dict[str, str]:
        adapter = self.resolution.adapter
        return {"X-Imprint-Source": self.resolution.source} | ({"X-Imprint-Adapter": adapter.adapter_id} if adapter else {})


class Service:
    """A base, a store and an engine that answer requests; `running` starts and stops what runs beside them.

    Raises `ValueError` for a base without a tokenizer, and what the parts raise.
    """

    def __init__(self, base: BaseModel, store: Store, settings: ServeSettings) -> None:
        run = settings.run
        self._tokenizer = tokenizer_of(base)
        self._stop_ids = base.stop_ids
        self._run = run
        self.store = store
        self.resolver = Resolver(
            store, settings.tenant, settings.collection, settings.served_name, base.fingerprint, settings.producer
        )
        spec = _served_spec(base, store, self.resolver, settings)
        self.resolver.kind_name = spec.kind_name
        self.residency = Residency(store, spec, base.dtype, run.adapter_memory_bytes, run.parallel_loads)
        self.engine = AsyncEngine(
            Engine(base, spec, run.slots, run.max_length, run.prefill_tokens_per_step), max_queued=run.max_queued_requests
        )
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._demand = DemandCounter(run.demand_documents)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, requests are answered and the store is followed; leaving it lets requests under way end."""
        self.engine.start()
        beside = [asyncio.create_task(self.resolver.refresh_forever(self._run.refresh_s))]
        if self._run.demand_write_s:
            beside.append(asyncio.create_task(self._write_demand_forever(self._run.demand_write_s)))
        try:
            yield
        finally:
            for task in beside:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await self.engine.stop(self._run.drain_s)
            self.residency.close()
            self._reading.shutdown()
            if self._run.demand_write_s:
                await asyncio.to_thread(self._write_demand)

    @asynccontextmanager
    async def answer(self, body: ChatRequest | CompletionRequest) -> AsyncIterator[Answer]:
        """Begins an answer and ends it on leaving. `ApiError` where there is none to be had; its pieces may raise it too."""
        with as_api_errors(), self.engine.admitted():
            resolution = (await asyncio.to_thread(self.resolver.resolve, body.model)).in_mode(body.imprint.mode)
            if resolution.document is not None:
                self._demand.count(resolution.document.key)
            adapter = None if resolution.adapter is None else await self.residency.get(resolution.adapter)
            shown = None if resolution.shown is None else await asyncio.to_thread(self.resolver.text, resolution.shown)
            prompt_ids, cut = await asyncio.get_running_loop().run_in_executor(self._reading, self._fitting_ids, body, shown)
            resolution = replace(resolution, truncated=cut)
            request = self._request(body, prompt_ids, adapter)
            text = AnswerText(self._tokenizer, body.stop, strip=isinstance(body, ChatRequest))
            async with self.engine.submitted(request) as tokens:
                yield Answer(request.request_id, resolution, len(prompt_ids), _pieces(tokens, text))

    async def _write_demand_forever(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self._write_demand)

    def _write_demand(self) -> None:
        """No request fails for its count's sake: what cannot be written now is kept for the next time."""
        try:
            self.store.write_demand(self._demand)
        except (StoreError, OSError) as error:
            log.warning("the demand could not be written, and will be tried again: %s", error)

    def _fitting_ids(self, body: ChatRequest | CompletionRequest, shown: str | None) -> tuple[Sequence[int], bool]:
        """The prompt, and whether it was cut in the middle to leave room for the answer: of the document alone, or not at all."""
        prompt_ids, limit = self._prompt_ids(body, shown), self.engine.max_length
        room = limit - (body.wanted_tokens or min(self._run.default_max_tokens, limit // 4))
        if shown is None or len(prompt_ids) <= room:
            return prompt_ids, False
        ellipsis_ids = encode(self._tokenizer, ELLIPSIS)
        if len(self._prompt_ids(body, "")) > room // 2 - len(ellipsis_ids):
            return prompt_ids, False
        return head_tail(prompt_ids, room, ellipsis_ids), True

    def _prompt_ids(self, body: ChatRequest | CompletionRequest, shown: str | None) -> Sequence[int]:
        """All that the base sees. A document that is shown stands before the first message of the user, or before the prompt."""
        if isinstance(body, ChatRequest):
            messages = [message.plain() for message in body.messages]
            if shown is not None:
                first = next((message for message in messages if message["role"] == "user"), None)
                if first is None:
                    raise ApiError(400, "the document answers in context, beside a user's message: give one", param="messages")
                first["content"] = in_context(shown, first["content"])
            try:
                return prompt(self._tokenizer, messages)
            except ValueError as error:
                raise ApiError(400, str(error), param="messages") from None
        return raw_prompt(self._tokenizer, body.one_prompt(), shown)

    def _request(
        self, body: ChatRequest | CompletionRequest, prompt_ids: Sequence[int], adapter: AdapterWeights | None
    ) -> Request:
        param, limit = ("messages" if isinstance(body, ChatRequest) else "prompt"), self.engine.max_length
        room = limit - len(prompt_ids)
        max_tokens = body.wanted_tokens or min(self._run.default_max_tokens, max(room, 1))
        if max_tokens > room:
            raise ApiError(
                400,
                f"the prompt has {len(prompt_ids)} tokens and {max_tokens} new ones are asked for: at most {limit} fit together",
                param=param,
                code="context_length_exceeded",
            )
        return Request(
            uuid.uuid4().hex,
            prompt_ids,
            max_tokens,
            adapter,
            frozenset() if body.ignore_eos else self._stop_ids,
            Sampling(body.temperature, body.top_p, body.seed),
        )


def _served_spec(base: BaseModel, store: Store, resolver: Resolver, settings: ServeSettings) -> AdapterSpec:
    """Of the preferred kind that has adapters for this base: all sites, at the largest rank of theirs."""
    lora, memories = base.spec(1), _memory_specs(base)
    wanted = [lora, *memories] if settings.kind == "lora" else [*memories, lora]
    specs = [store.spec(fingerprint) for fingerprint in resolver.spec_fingerprints()]
    for kind in wanted:
        if fitting := [spec for spec in specs if spec.kind_name == kind.kind_name and _fits(base, spec)]:
            common = common_spec([kind, *fitting])
            return common.with_rank((settings.max_rank if kind.kind == settings.kind else None) or common.rank)
    if settings.kind == "lora" or not memories:
        return lora.with_rank(settings.max_rank or RANK_OF_AN_EMPTY_STORE)
    return memory_spec(base, settings.max_rank)


def _fits(base: BaseModel, spec: AdapterSpec) -> bool:
    try:
        check_fits(base, spec)
    except ValueError:
        return False
    return True


def _memory_specs(base: BaseModel) -> list[AdapterSpec]:
    """Gated memories of width 1 with either gate; none for a base that they do not fit."""
    try:
        return [memory_spec(base, 1, gate) for gate in get_args(Gate)]
    except ValueError:
        return []


async def _pieces(tokens: AsyncIterator[Token], text: AnswerText) -> AsyncIterator[Piece]:
    made = 0
    with as_api_errors():
        async for token in tokens:
            if token.finish_reason == "error":
                raise ApiError(500, "the numbers overflowed: this adapter cannot answer here", code="not_finite")
            made += 1
            new = "" if token.finish_reason == "stop" else text.push(token.token_id)
            if text.stopped:
                yield Piece(new, "stop", made)
                return
            if token.finish_reason is not None:
                new += text.finish()
                yield Piece(new, "stop" if text.stopped else token.finish_reason, made)
                return
            if new:
                yield Piece(new)


@contextmanager
def as_api_errors() -> Iterator[None]:
    """What the parts raise, as what a client is told."""
    try:
        yield
    except ModeImpossible as error:
        raise ApiError(400, str(error), param="imprint.mode", code="mode_impossible") from None
    except UnknownModel as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from None
    except Refused as error:
        raise ApiError(400, str(error)) from None
    except Overloaded as error:
        raise ApiError(429, str(error), code="queue_full", retry_after_s=RETRY_AFTER_S) from None
    except (Draining, EngineFailed) as error:
        raise ApiError(503, str(error), code="not_ready", retry_after_s=RETRY_AFTER_S) from None
    except AdapterUnusable as error:
        raise ApiError(500, str(error), code="adapter_unusable") from None
    except (StoreError, OSError) as error:
        log.warning("the store failed: %s", error)
        raise ApiError(503, f"the store failed: {error}", code="store_failed", retry_after_s=RETRY_AFTER_S) from None

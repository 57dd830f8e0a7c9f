"""From a request to its answer: resolve the model, have the adapter in memory, build the prompt, run the engine, give out text.

In: `ChatRequest`s and `CompletionRequest`s. Out: `Answer`s, whose pieces come as they are made, and `ApiError`s. What a request
waits for comes in this order: the store, for what is not in memory (`serve.access`), a place in the engine, its tokens. So loads
of adapters take no places from requests that could run. Requests that name a document and are not turned away at the door count
as its demand (`core.store.demand`). Knows nothing of HTTP and Ray. Texts of requests and answers are never logged.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch

from core.adapters.base_model import BaseModel, tokenizer_of
from core.adapters.gated_memory import memory_spec
from core.adapters.lora import check_fits
from core.adapters.spec import AdapterSpec, Gate, common_spec
from core.adapters.weights import AdapterWeights
from core.engine.requests import Request
from core.engine.token_loop import Engine
from core.store.store import Store
from serve.access import StoreAccess
from serve.answers import Choice, pieces
from serve.background import repeat
from serve.demand import Demand
from serve.engines import AsyncEngine, DeadlinePassed
from serve.errors import ApiError
from serve.failures import as_api_errors
from serve.prompting import Document, Prompt, Prompter
from serve.residency import AdapterUnusable, Residency
from serve.resolver import Resolution, Resolver
from serve.schema import ChatRequest, CompletionRequest
from serve.settings import ServeRun, ServeSettings
from serve.shapes import Piece
from serve.text import AnswerText, TokenTexts

log = logging.getLogger(__name__)

RANK_OF_AN_EMPTY_STORE = 8
UNUSABLE = "its adapter cannot be used here: the server's log says why"
_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class Answer:
    """An answer under way: where it comes from, how many choices it has, and their pieces."""

    answer_id: str
    resolution: Resolution
    prompt_tokens: int
    choices: int
    pieces: AsyncIterator[Piece]

    @property
    def headers(self) -> dict[str, str]:
        adapter = self.resolution.adapter
        return {"X-Imprint-Source": self.resolution.source} | ({"X-Imprint-Adapter": adapter.adapter_id} if adapter else {})


class _Fetched(NamedTuple):
    """What the store gave for a request, or memory."""

    resolution: Resolution
    adapter: AdapterWeights | None
    shown: Document | None


class Service:
    """A base, a store and an engine that answer requests; `running` starts and stops what runs beside them.

    Raises `ValueError` for a base without a tokenizer, and what the parts raise.
    """

    def __init__(self, base: BaseModel, store: Store, settings: ServeSettings) -> None:
        run = settings.run
        self.run = run
        self.store = store
        self._tokenizer = tokenizer_of(base)
        self._stop_ids = base.stop_ids
        self._texts = TokenTexts(self._tokenizer)
        self.resolver = Resolver(
            store, settings.tenant, settings.collection, settings.served_name, base.fingerprint, settings.producer
        )
        spec = _served_spec(base, store, self.resolver, settings)
        self.resolver.spec = spec
        self.access = StoreAccess(self.resolver, run)
        self.residency = Residency(
            store, spec, base.dtype, run.adapter_memory_bytes, run.parallel_loads, run.max_waiting_for_store
        )
        engine = Engine(base, spec, run.slots, _max_length(base, spec, run), run.prefill_tokens_per_step)
        self.engine = AsyncEngine(engine, max_queued=run.max_queued_requests)
        self.prompter = Prompter(
            self._tokenizer,
            settings.served_name,
            engine.max_length,
            run.default_max_tokens,
            run.prompt_threads,
            run.prompt_memory_bytes,
        )
        self._demand = Demand(store, run.demand_documents)

    @property
    def ready(self) -> bool:
        """Requests are taken, for documents too."""
        return self.engine.ready and not self.access.stale

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Inside, requests are answered and the store is followed; leaving it lets requests under way end."""
        run = self.run
        self.engine.start()
        beside = [asyncio.create_task(repeat("following the store", run.refresh_s, self.access.refresh))]
        if run.demand_write_s:
            beside.append(asyncio.create_task(repeat("writing the demand", run.demand_write_s, self._demand.write)))
        try:
            yield
        finally:
            for task in beside:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await self.engine.stop(run.drain_s)
            self.residency.close()
            self.prompter.close()
            self.access.close()
            if run.demand_write_s:
                await self._demand.close(run.store_timeout_s)

    @asynccontextmanager
    async def answer(self, body: ChatRequest | CompletionRequest) -> AsyncIterator[Answer]:
        """Begins an answer and ends it on leaving. `ApiError` where there is none to be had; its pieces may raise it too."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.run.deadline_s
        count = body.n * (1 if isinstance(body, ChatRequest) else len(body.prompts()))
        with as_api_errors():
            if count > self.engine.capacity:
                raise ApiError(400, f"{count} choices are asked for: at most {self.engine.capacity} run at once", param="n")
            self.engine.check_open(count)
            fetched = await self._fetched(body, deadline)
            with self.engine.admitted(count):
                prompts = await self.prompter.prompts(body, fetched.shown)
                if loop.time() > deadline:
                    raise DeadlinePassed("the answer took longer than a request may")
                requests, choices = self._requests(body, prompts, fetched)
                async with self.engine.submitted(requests, deadline) as tokens:
                    yield Answer(
                        requests[0].request_id,
                        replace(fetched.resolution, truncated=any(each.truncated for each in prompts)),
                        sum(len(each.ids) for each in prompts),
                        count,
                        pieces(tokens, choices, self._texts),
                    )

    async def _fetched(self, body: ChatRequest | CompletionRequest, deadline: float) -> _Fetched:
        """What the request needs of the store; waits for it only for what is not in memory."""
        resolution = self.access.known(body.model)
        if resolution is None:
            async with self.access.patience(deadline):
                resolution = await self.access.resolve(body.model)
        resolution = resolution.in_mode(body.imprint.mode)
        if resolution.document is not None and self.run.demand_write_s:
            self._demand.count(resolution.document.key)
        resolution, adapter = await self._resident(resolution, body, deadline)
        shown = None
        if (document := resolution.shown) is not None:
            text = None
            if not self.prompter.knows(document.content_hash):
                async with self.access.patience(deadline):
                    text = await self.access.text(document)
            shown = Document(document.content_hash, text)
        return _Fetched(resolution, adapter, shown)

    async def _resident(
        self, resolution: Resolution, body: ChatRequest | CompletionRequest, deadline: float
    ) -> tuple[Resolution, AdapterWeights | None]:
        """The resolution with its adapter in memory; where that proves unusable, what answers without it."""
        while (row := resolution.adapter) is not None:
            if self.residency.holds(row):
                return resolution, await self.residency.get(row)
            async with self.access.patience(deadline):
                try:
                    return resolution, await self.residency.get(row)
                except AdapterUnusable as error:
                    log.warning("%s: it is passed over until the server is started again", error)
                    self.resolver.refuse(row, UNUSABLE)
                    self.access.forget(body.model)
                    resolution = (await self.access.resolve(body.model)).in_mode(body.imprint.mode)
        return resolution, None

    def _requests(
        self, body: ChatRequest | CompletionRequest, prompts: Sequence[Prompt], fetched: _Fetched
    ) -> tuple[list[Request], dict[str, Choice]]:
        """For each prompt each of `n` choices, numbered as OpenAI's API does."""
        requests, choices = list[Request](), dict[str, Choice]()
        for place, prompt in enumerate(prompts):
            max_tokens = self.prompter.max_tokens(body, len(prompt.ids))
            echo, echo_ids = self._echo(body, place, prompt, fetched)
            for number in range(body.n):
                sampling = body.sampling(number, body.told if echo_ids else None)
                stop = frozenset() if body.ignore_eos else self._stop_ids
                request = Request(uuid.uuid4().hex, prompt.ids, max_tokens, fetched.adapter, stop, sampling)
                choices[request.request_id] = Choice(
                    len(requests),
                    AnswerText(self._tokenizer, body.stop, strip=isinstance(body, ChatRequest)),
                    discard=body.wanted_tokens == 0,
                    echo=echo,
                    echo_ids=echo_ids,
                )
                requests.append(request)
        return requests, choices

    def _echo(
        self, body: ChatRequest | CompletionRequest, place: int, prompt: Prompt, fetched: _Fetched
    ) -> tuple[str, Sequence[int]]:
        """The prompt as it is given back, without a document that was put before it, and its ids where they are told of."""
        if isinstance(body, ChatRequest) or not body.echo:
            return "", ()
        if body.told is not None and fetched.shown is not None:
            raise ApiError(400, "log probabilities of a prompt are told where no document stands before it", param="echo")
        asked = body.prompts()[place]
        text = asked if isinstance(asked, str) else str(self._tokenizer.decode(asked, skip_special_tokens=False))
        return text, prompt.ids if body.told is not None else ()


def _max_length(base: BaseModel, spec: AdapterSpec, run: ServeRun) -> int:
    """What a request may have of tokens: what the base takes, and no more than fits the memory for keys and values.

    They have the length of the longest request in all slots, and nothing takes it back (`core.engine.slot_cache`).
    """
    wanted = base.max_length if run.max_length is None else run.max_length
    budget = run.cache_memory_bytes
    if budget is None:
        if base.device.type != "cuda":
            return wanted
        free = torch.cuda.mem_get_info(base.device)[0] - run.slots * spec.numel * base.dtype.itemsize
        budget = int(_SHARE_OF_FREE_MEMORY * free)
    config = base.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * len(base.layers) * heads * size * base.dtype.itemsize
    fitting = budget // (run.slots * token_bytes)
    least = 2 if run.max_length is None else wanted
    if fitting < least:
        needed, there = run.slots * token_bytes * least, max(budget, 0)
        raise ValueError(
            f"keys and values of {run.slots} slots and {least} tokens take {needed:,} bytes, and there are {there:,}: give "
            "fewer run.slots, a smaller run.max_length, or more run.cache_memory_bytes"
        )
    if fitting < wanted:
        log.warning("requests may have %d tokens, not %d: keys and values of %d slots fit no more", fitting, wanted, run.slots)
    return min(wanted, fitting)


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

"""The token loop: prompts as token ids in, token ids out, every row of the batch under an adapter of its own, or under none.

`Engine` batches by iteration (Orca, OSDI 2022): a request joins at the next token, not at the next batch, and its slot is free
with its last token. A request's tokens do not depend on who shares its batch: greedy ones are those of a run alone, sampled ones
follow from its seed. This holds up to rounding, which differs between batch sizes and decides where two tokens all but tie.
It knows nothing of text, of tokenizers, of where adapters come from, or of servers.

Cost of S slots: keys and values of S x capacity tokens, capacity doubling as requests grow long; one vector of N numbers a slot
once there is an adapter. A step is one pass of one token a running row, and at most one over `prefill_tokens_per_step` tokens.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from core.adapters.base_model import BaseModel
from core.adapters.gated_memory import weights_of
from core.adapters.lora import check_fits
from core.adapters.spec import AdapterSpec, common_spec
from core.adapters.weights import AdapterWeights
from core.engine.attention import check_base, layer_windows
from core.engine.requests import Completion, EngineStats, FinishReason, Request, Token
from core.engine.sampling import Chooser, Chosen, TokenLogprob, choose, prompt_logprobs
from core.engine.slot_cache import SlotCache


@dataclass(eq=False)
class _Row:
    """A request in the engine. Its keys and values are those of its first `length` tokens; `last_id` is the next to go in."""

    request: Request
    adapter_N: Tensor | None
    chooser: Chooser
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    length: int = 0
    made: int = 0
    last_id: int = -1


@dataclass
class _Inbox:
    """What other threads may touch, under its lock. `ids` are those of all requests in the engine."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    waiting: deque[_Row] = field(default_factory=deque)
    ids: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)


class Engine:
    """Requests in by `submit`, tokens out by `step`.

    base: with sdpa or eager attention, full or in sliding windows (`core.engine.attention`). spec: the table that all adapters
    are padded to (`core.adapters.spec.common_spec`), None for none. slots: rows that run at once; further requests wait their
    turn. max_length: prompt and new tokens of one request together, by default the base's own limit. prefill_tokens_per_step: the
    most prompt tokens, padding included, that a step reads while running rows wait for their next token; longer prompts are read
    in pieces.

    One thread calls `step`; any thread may call `submit`, `cancel`, `idle` and `stats`. Drop an engine whose `step` raised.
    Raises `ValueError` for a base whose tokens it could not reproduce.
    """

    def __init__(
        self,
        base: BaseModel,
        spec: AdapterSpec | None = None,
        slots: int = 16,
        max_length: int | None = None,
        prefill_tokens_per_step: int = 512,
    ) -> None:
        if slots < 1 or prefill_tokens_per_step < 1:
            raise ValueError(f"slots is {slots}, prefill_tokens_per_step {prefill_tokens_per_step}: give 1 or more")
        self.base = base
        self.spec = spec
        self.slots = slots
        self.max_length = base.max_length if max_length is None else max_length
        self.prefill_tokens_per_step = prefill_tokens_per_step
        check_base(base, self.max_length)
        if spec is not None:
            check_fits(base, spec)
        self._eager = base.model.config.get_text_config()._attn_implementation == "eager"
        self._windows = layer_windows(base)
        self._cache = SlotCache(len(base.layers), slots, self.max_length)
        self._arange = torch.arange(max(self.max_length, slots), device=base.device)
        self._flat_SN: Tensor | None = None
        self._attached: AdapterWeights | None = None
        # Running rows lie in slots 0 to n - 1, without gaps. At most one further row, in slot n, has read a part of its prompt.
        self._rows: list[_Row] = []
        self._reading: _Row | None = None
        self._inbox = _Inbox()
        self._prepared_N: WeakKeyDictionary[AdapterWeights, Tensor] = WeakKeyDictionary()
        self._steps = self._prompt_tokens = self._generated_tokens = 0

    def submit(self, request: Request) -> None:
        """Queues a request; its adapter is checked here, not while others wait for their tokens.

        Raises `ValueError` for a request that could not run: an empty or too long prompt, ids out of the vocabulary, a request id
        in use, or an adapter of another base, of a larger rank, or with numbers that are not finite.
        """
        name, prompt, vocabulary = request.request_id, request.prompt_ids, self.base.embedding.num_embeddings
        if not len(prompt):
            raise ValueError(f"request {name!r} has an empty prompt: give one token at least")
        if request.max_tokens < 1:
            raise ValueError(f"request {name!r} asks for {request.max_tokens} tokens: give 1 or more")
        if len(prompt) + request.max_tokens > self.max_length:
            raise ValueError(
                f"request {name!r} has {len(prompt)} prompt tokens and asks for {request.max_tokens}: together at most "
                f"{self.max_length} fit, so shorten the prompt or ask for fewer tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(f"request {name!r} has token ids from {min(prompt)} to {max(prompt)}: give 0 to {vocabulary - 1}")
        request.sampling.check(vocabulary)
        row = _Row(request, self._prepared(name, request.adapter), Chooser(request.sampling))
        with self._inbox.lock:
            if name in self._inbox.ids:
                raise ValueError(f"request {name!r} is in the engine already: give every request an id of its own")
            self._inbox.ids.add(name)
            self._inbox.waiting.append(row)

    def cancel(self, request_id: str) -> bool:
        """Ends a request; False if it is not in the engine. A step under way may still give one token of it, later ones none."""
        with self._inbox.lock:
            if request_id not in self._inbox.ids:
                return False
            for row in self._inbox.waiting:
                if row.request.request_id == request_id:
                    self._inbox.waiting.remove(row)
                    self._inbox.ids.remove(request_id)
                    return True
            self._inbox.cancelled.add(request_id)
            return True

    @property
    def idle(self) -> bool:
        """No request runs or waits."""
        with self._inbox.lock:
            return not self._inbox.ids

    def stats(self) -> EngineStats:
        """Counters and sizes; a step under way may be counted in part."""
        with self._inbox.lock:
            waiting, known = len(self._inbox.waiting), len(self._inbox.ids)
        return EngineStats(
            running=known - waiting,
            waiting=waiting,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cache_bytes=self._cache.nbytes,
            adapter_bytes=0 if self._flat_SN is None else self._flat_SN.nbytes,
        )

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """The next token of every running request, then the first token of those whose prompts have been read.

        Waiting requests are taken in order, as many as slots and `prefill_tokens_per_step` allow. An idle engine returns [].
        """
        self._steps += 1
        self._drop_cancelled()
        tokens = self._decode() if self._rows else []
        batch = self._next_to_read()
        return tokens + self._read(batch) if batch else tokens

    def _prepared(self, name: str, adapter: AdapterWeights | None) -> Tensor | None:
        """The vector `[N]` under the engine's spec and in the base's type, where the given one lies."""
        if adapter is None:
            return None
        if self.spec is None:
            raise ValueError(f"request {name!r} has an adapter: give the engine a spec, it runs the bare base only")
        if len(adapter) != 1:
            raise ValueError(f"request {name!r} has {len(adapter)} adapters: give one (compose makes one of many)")
        if (adapter.spec.kind, adapter.spec.gate) != (self.spec.kind, self.spec.gate):
            raise ValueError(
                f"the adapter of request {name!r} is of kind {adapter.spec.kind_name}, this engine runs {self.spec.kind_name}: "
                "give each kind an engine of its own"
            )
        if not self.spec.has_sites_of(adapter.spec):
            raise ValueError(f"the adapter of request {name!r} was made for another base, or for more sites than this engine's")
        if adapter.spec.rank > self.spec.rank:
            raise ValueError(
                f"the adapter of request {name!r} has rank {adapter.spec.rank}, the engine {self.spec.rank}: recompress it, "
                "or give the engine a larger rank"
            )
        with self._inbox.lock:
            known_N = self._prepared_N.get(adapter)
        if known_N is not None:
            return known_N
        with torch.no_grad():
            flat_N = adapter.to(dtype=self.base.dtype).padded_to(self.spec).flat_BN[0]
            if not flat_N.isfinite().all():
                raise ValueError(f"the adapter of request {name!r} is not finite in {self.base.dtype}: make it again")
        with self._inbox.lock:
            self._prepared_N[adapter] = flat_N
        return flat_N

    def _drop_cancelled(self) -> None:
        with self._inbox.lock:
            cancelled = set(self._inbox.cancelled)
        if not cancelled:
            return
        if self._reading is not None and self._reading.request.request_id in cancelled:
            self._forget(self._reading)
            self._reading = None
        self._remove([slot for slot, row in enumerate(self._rows) if row.request.request_id in cancelled])

    def _decode(self) -> list[Token]:
        rows = self._rows
        ids_B, position_B = torch.tensor([[row.last_id for row in rows], [row.length for row in rows]], device=self.base.device)
        longest = 1 + max(row.length for row in rows)
        self._cache.decode(self._arange[: len(rows)], position_B, longest)
        masks = {window: self._mask(position_B, longest, window) for window in {None, *self._windows}}
        with self.base.masking(lambda layer, mask: masks[self._windows[layer]]) if len(masks) > 1 else nullcontext():
            hidden_B1H = self._forward(0, rows, ids_B[:, None], position_B[:, None], masks[None])
        for row in rows:
            row.length += 1
        return self._emit(0, self._choose(hidden_B1H[:, 0], rows))

    def _mask(self, position_B: Tensor, longest: int, window: int | None) -> Tensor:
        """`[B, 1, 1, longest]`: what each row's newest token sees in a layer of this window."""
        visible_BT = self._arange[:longest] <= position_B[:, None]
        if window is not None:
            visible_BT &= self._arange[:longest] > position_B[:, None] - window
        if not self._eager:
            return visible_BT[:, None, None]
        hidden = torch.finfo(self.base.dtype).min
        return torch.zeros_like(visible_BT, dtype=self.base.dtype).masked_fill_(~visible_BT, hidden)[:, None, None]

    def _next_to_read(self) -> list[_Row]:
        """Rows that read their prompts in this step: whole prompts that fit the budget together, or a piece of a longer one."""
        if self._reading is not None:
            return [self._reading]
        batch: list[_Row] = []
        longest = 0
        with self._inbox.lock:
            waiting = self._inbox.waiting
            while waiting and len(self._rows) + len(batch) < self.slots:
                longest = max(longest, len(waiting[0].request.prompt_ids))
                if batch and longest * (len(batch) + 1) > self.prefill_tokens_per_step:
                    break
                batch.append(waiting.popleft())
        for slot, row in enumerate(batch, start=len(self._rows)):
            self._occupy(slot, row)
        return batch

    def _read(self, batch: list[_Row]) -> list[Token]:
        """Prefill: prompts padded on the right, where the causal mask hides the padding and decoding overwrites it."""
        first, start = len(self._rows), batch[0].length
        prompts = [row.request.prompt_ids for row in batch]
        end = min(max(map(len, prompts)), start + self.prefill_tokens_per_step)
        self._cache.read_prompts(slice(first, first + len(batch)), start, end)
        padded = [[*prompt[start:end], *[prompt[-1]] * (end - len(prompt))] for prompt in prompts]
        ids_BT = torch.tensor(padded, device=self.base.device)
        hidden_BTH = self._forward(first, batch, ids_BT, self._arange[None, start:end], None)
        for row, prompt, hidden_TH in zip(batch, prompts, hidden_BTH, strict=True):
            row.length = min(end, len(prompt))
            self._prompt_tokens += row.length - start
            if (told := row.request.sampling.prompt_logprobs) is not None:
                row.prompt_logprobs += prompt_logprobs(self.base.logits, hidden_TH, prompt[start + 1 : row.length + 1], told)
        if batch[0].length < len(prompts[0]):
            self._reading = batch[0]
            return []
        self._reading = None
        self._rows.extend(batch)
        last_B = torch.tensor([row.length - start - 1 for row in batch], device=self.base.device)
        return self._emit(first, self._choose(hidden_BTH[self._arange[: len(batch)], last_B], batch))

    def _forward(self, first: int, rows: list[_Row], ids_BT: Tensor, position_BT: Tensor, mask: Tensor | None) -> Tensor:
        """Final hidden states `[B, T, H]` of the rows from slot `first` on, under their adapters."""
        inputs = {"input_ids": ids_BT, "position_ids": position_BT, "attention_mask": mask, "past_key_values": self._cache}
        if all(row.adapter_N is None for row in rows):
            return self.base.decoder(**inputs, use_cache=True).last_hidden_state
        with self._weights(first, len(rows)).attach(self.base, self._index(rows)):
            return self.base.decoder(**inputs, use_cache=True).last_hidden_state

    def _index(self, rows: list[_Row]) -> Tensor | None:
        """Names the rows without an adapter, where their vectors of zeros would not do."""
        assert self.spec is not None
        if self.spec.zeros_change_nothing or all(row.adapter_N is not None for row in rows):
            return None
        return torch.tensor([-1 if row.adapter_N is None else slot for slot, row in enumerate(rows)])

    def _weights(self, first: int, count: int) -> AdapterWeights:
        """Views of the rows' vectors, cut once for as long as equally many rows run: cutting takes as long as a small step."""
        assert self.spec is not None and self._flat_SN is not None
        if first > 0:
            return weights_of(self.spec, self._flat_SN[first : first + count])
        if self._attached is None or len(self._attached) != count:
            self._attached = weights_of(self.spec, self._flat_SN[:count])
        return self._attached

    def _choose(self, hidden_BH: Tensor, rows: list[_Row]) -> list[Chosen]:
        return choose(self.base.logits(hidden_BH), [row.chooser for row in rows])

    def _emit(self, first: int, chosen: list[Chosen]) -> list[Token]:
        """Hands each row from slot `first` its token, and frees the slots of those that end."""
        tokens, ended = [], []
        for slot, (token_id, logprob) in enumerate(chosen, start=first):
            row = self._rows[slot]
            row.last_id = token_id
            row.made += 1
            reason: FinishReason | None = None
            if token_id < 0:
                reason = "error"
            elif token_id in row.request.stop_ids:
                reason = "stop"
            elif row.made == row.request.max_tokens:
                reason = "length"
            if reason is not None:
                ended.append(slot)
            of_prompt = tuple(row.prompt_logprobs) if row.made == 1 else ()
            tokens.append(Token(row.request.request_id, token_id, reason, logprob, of_prompt))
        self._generated_tokens += sum(token.token_id >= 0 for token in tokens)
        self._remove(ended)
        return tokens

    def _remove(self, ended: Iterable[int]) -> None:
        """Frees slots of running rows; the last rows move into the gaps."""
        for slot in sorted(ended, reverse=True):
            self._forget(self._rows[slot])
            last = len(self._rows) - 1
            self._rows[slot] = self._rows[last]
            self._rows.pop()
            if slot != last:
                self._move(last, slot)
            if self._reading is not None:
                self._move(last + 1, last)

    def _forget(self, row: _Row) -> None:
        with self._inbox.lock:
            self._inbox.ids.remove(row.request.request_id)
            self._inbox.cancelled.discard(row.request.request_id)

    def _occupy(self, slot: int, row: _Row) -> None:
        self._cache.clear(slot)
        if row.adapter_N is not None and self._flat_SN is None:
            assert self.spec is not None
            self._flat_SN = torch.zeros(self.slots, self.spec.numel, dtype=self.base.dtype, device=self.base.device)
        if self._flat_SN is not None:
            self._flat_SN[slot] = 0 if row.adapter_N is None else row.adapter_N

    def _move(self, source: int, target: int) -> None:
        self._cache.move(source, target)
        if self._flat_SN is not None:
            self._flat_SN[target] = self._flat_SN[source]


def generate(
    base: BaseModel, requests: Sequence[Request], slots: int = 16, prefill_tokens_per_step: int = 512
) -> dict[str, Completion]:
    """Runs all requests to their ends; completions by request id. Raises what `Engine` and `Engine.submit` raise."""
    if not requests:
        return {}
    specs = [request.adapter.spec for request in requests if request.adapter is not None]
    longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    engine = Engine(
        base,
        common_spec(specs) if specs else None,
        slots=min(slots, len(requests)),
        max_length=max(2, min(longest, base.max_length)),
        prefill_tokens_per_step=prefill_tokens_per_step,
    )
    for request in requests:
        engine.submit(request)
    token_ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    completions = {}
    while not engine.idle:
        for token in engine.step():
            if token.finish_reason not in ("stop", "error"):
                token_ids[token.request_id].append(token.token_id)
            if token.finish_reason is not None:
                completions[token.request_id] = Completion(token_ids[token.request_id], token.finish_reason)
    return {request.request_id: completions[request.request_id] for request in requests}

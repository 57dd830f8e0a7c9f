"""From a request to the token ids that the base sees, off the event loop, with what long documents cost paid once.

In: `ChatRequest`s and `CompletionRequest`s, and the text of a document to be shown. Out: a `Prompt` for each prompt of a request.
A document that is too long is cut in the middle (LIFT's head and tail), which the prompt says. Where the chat template has no
place for calls of tools in the past, they stand in it as JSON; where it has none for tools that are offered, they are refused.

A text that was read once is kept under its content hash, within `memory_bytes`, the least recently used go. The ids of a long
text are kept but for its ends: they are put between the ids of a prompt with those ends alone. This is exact: both cuts lie
between a letter and a blank before a letter, or between a line feed and a letter, where tokenizers end a word whatever stands
further off; and for each text it is tried whether it gives the ids of the whole. Texts without such places, and tokenizers that
fail the trial, are made into tokens anew each time.

Tokenizers may not be used by several threads, so each thread has a copy. The copies bear the name under which the base is served:
what they say goes to clients. Cost: 2 us a token, once for a long text; a copy takes as much memory as the tokenizer.
"""

import asyncio
import copy
import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from core.text.prompts import encode, head_tail, in_context, prompt, raw_prompt
from serve.errors import ApiError
from serve.schema import ChatRequest, CompletionRequest

ELLIPSIS = "..."
_LONG = 2048
_END = 512
"""Characters of a text that is long, and of an end of it at least."""
_SEAM = 8
_CUTS = re.compile(r"\w \w"), re.compile(r"\w\n\w")
"""What stands around a cut: before a blank, or behind a line feed."""
_PROBE = "probe_of_a_place"
_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": _PROBE, "arguments": {}}}]},
    {"role": "tool", "content": "x"},
]
_TOOL = {"name": _PROBE, "description": "x", "parameters": {"type": "object", "properties": {}}}


class Prompt(NamedTuple):
    """Token ids, and whether the document in them was cut."""

    ids: Sequence[int]
    truncated: bool = False


class Document(NamedTuple):
    """What is to be shown. text may be missing where `Prompter.knows` its content."""

    content_hash: str
    text: str | None


@dataclass(frozen=True)
class _Read:
    """A text, and where it is long the ids of what stands between its ends; `seam`: ids on either side of what is left out."""

    text: str
    ends: str
    middle_ids: Sequence[int]
    seam: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return 4 * (len(self.text) + len(self.ends)) + 4 * len(self.middle_ids)

    def inserted(self, ids: list[int]) -> list[int] | None:
        """The ids of a prompt with the whole text, from those of one with its ends; None where the seam is not in one place."""
        size = len(self.seam)
        first = self.seam[0]
        found = [at for at, each in enumerate(ids) if each == first and tuple(ids[at : at + size]) == self.seam]
        if len(found) != 1:
            return None
        at = found[0] + _SEAM
        return [*ids[:at], *self.middle_ids, *ids[at:]]


class Prompter:
    """Makes prompts for one event loop. name: of the base, for clients. max_length, default_max_tokens: of prompt and answer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_length: int,
        default_max_tokens: int,
        threads: int = 2,
        memory_bytes: int = 2**26,
    ) -> None:
        self._max_length = max_length
        self._default_max_tokens = default_max_tokens
        self._memory_bytes = memory_bytes
        self._known: OrderedDict[str, _Read] = OrderedDict()
        self._known_bytes = 0
        self._lock = threading.Lock()
        self._own = threading.local()
        copies = [copy.deepcopy(tokenizer) for _ in range(threads)]
        for each in copies:
            each.name_or_path = name
        self._shows_calls, self._shows_tools = _places(copies[0])
        self._pool = ThreadPoolExecutor(threads, "prompts", lambda: setattr(self._own, "tokenizer", copies.pop()))

    def knows(self, content_hash: str) -> bool:
        """Whether a document's text need not be read again."""
        return content_hash in self._known

    async def prompts(self, body: ChatRequest | CompletionRequest, document: Document | None) -> list[Prompt]:
        """One for each prompt of the request. `ApiError` where it has none to be had."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._prompts, body, document)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def max_tokens(self, body: ChatRequest | CompletionRequest, prompt_tokens: int) -> int:
        """New tokens that a request may have; `ApiError` where they do not fit."""
        limit = self._max_length
        room = limit - prompt_tokens
        wanted = min(self._default_max_tokens, max(room, 1)) if body.wanted_tokens is None else max(body.wanted_tokens, 1)
        if wanted > room:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens and {wanted} new ones are asked for: at most {limit} fit together",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return wanted

    def _prompts(self, body: ChatRequest | CompletionRequest, document: Document | None) -> list[Prompt]:
        shown = None if document is None else self._read(document)
        if isinstance(body, ChatRequest):
            return [self._fitting(body, None, shown)]
        return [self._fitting(body, asked, shown) for asked in body.prompts()]

    def _fitting(self, body: ChatRequest | CompletionRequest, asked: str | list[int] | None, shown: _Read | None) -> Prompt:
        """Cut in the middle to leave room for the answer: of the document alone, or not at all."""
        if shown is None:
            return Prompt(self._ids(body, asked, None))
        ids = self._ids(body, asked, shown.ends) if shown.seam else None
        ids = None if ids is None else shown.inserted(ids)
        ids = self._ids(body, asked, shown.text) if ids is None else ids
        room = self._max_length - (body.wanted_tokens or min(self._default_max_tokens, self._max_length // 4))
        if len(ids) <= room:
            return Prompt(ids)
        ellipsis_ids = encode(self._tokenizer, ELLIPSIS)
        if len(self._ids(body, asked, "")) > room // 2 - len(ellipsis_ids):
            return Prompt(ids)
        return Prompt(head_tail(ids, room, ellipsis_ids), truncated=True)

    def _ids(self, body: ChatRequest | CompletionRequest, asked: str | list[int] | None, shown: str | None) -> list[int]:
        """All that the base sees. A document that is shown stands before the first message of the user, or before the prompt."""
        if isinstance(body, ChatRequest):
            return self._chat_ids(body, shown)
        assert asked is not None
        return raw_prompt(self._tokenizer, asked, shown)

    def _chat_ids(self, body: ChatRequest, shown: str | None) -> list[int]:
        messages = [message.plain() for message in body.messages]
        if not self._shows_calls:
            messages = [_with_written_calls(message) for message in messages]
        if shown is not None:
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is None:
                raise ApiError(400, "the document answers in context, beside a user's message: give one", param="messages")
            first["content"] = in_context(shown, first["content"])
        tools = body.offered()
        if tools and not self._shows_tools:
            raise ApiError(
                400,
                "the chat template of this base has no place for tools: leave them out, or describe them in a message",
                param="tools",
                code="unsupported_parameter",
            )
        try:
            return prompt(self._tokenizer, messages, tools)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        found: PreTrainedTokenizerBase = self._own.tokenizer
        return found

    def _read(self, document: Document) -> _Read:
        with self._lock:
            if (known := self._known.get(document.content_hash)) is not None:
                self._known.move_to_end(document.content_hash)
                return known
        assert document.text is not None
        read = _read(self._tokenizer, document.text)
        with self._lock:
            if document.content_hash not in self._known and read.nbytes <= self._memory_bytes:
                self._known[document.content_hash] = read
                self._known_bytes += read.nbytes
                while self._known_bytes > self._memory_bytes:
                    self._known_bytes -= self._known.popitem(last=False)[1].nbytes
        return read


def _read(tokenizer: PreTrainedTokenizerBase, text: str) -> _Read:
    whole = _Read(text, "", array("i"))
    if len(text) < _LONG or (cuts := _cuts(text)) is None:
        return whole
    first, middle, last = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
    first_ids, middle_ids, last_ids = (encode(tokenizer, part) for part in (first, middle, last))
    seam = (*first_ids[-_SEAM:], *last_ids[:_SEAM])
    if len(seam) < 2 * _SEAM:
        return whole
    read = _Read(text, first + last, array("i", middle_ids), seam)
    if read.inserted(encode(tokenizer, read.ends)) != encode(tokenizer, text):
        return whole
    if tokenizer.chat_template is not None and read.inserted(_alone(tokenizer, read.ends)) != _alone(tokenizer, text):
        return whole
    return read


def _alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return prompt(tokenizer, [{"role": "user", "content": text}])


def _cuts(text: str) -> tuple[int, int] | None:
    """Where a text's ends meet its middle, both times in the same way; None where words are not parted so."""
    for pattern in _CUTS:
        first = next(_places_of(pattern, text, _END, 2 * _END), None)
        last = next(_places_of(pattern, text, len(text) - 2 * _END, len(text) - _END), None)
        if first is not None and last is not None:
            return first, last
    return None


def _places_of(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[int]:
    """Places of a kind that stand between letters only: to `re`, digits and signs such as a half are parts of words too."""
    for match in pattern.finditer(text, start, end):
        if all(letter.isalpha() for letter in match[0] if not letter.isspace()):
            yield match.start() + (1 if text[match.start() + 1] == " " else 2)


def _places(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the chat template writes calls of tools in the past, and tools that are offered."""
    if tokenizer.chat_template is None:
        return False, False
    shown = []
    offered: list[Any] = [{"type": "function", "function": _TOOL}]
    for messages, tools in ((_MESSAGES, None), (_MESSAGES[:1], offered)):
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            text = ""
        shown.append(_PROBE in str(text))
    return shown[0], shown[1]


def _with_written_calls(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls of tools, if there are any, stand in its content."""
    if "tool_calls" not in message:
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *calls])}

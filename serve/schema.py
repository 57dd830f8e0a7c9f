"""What OpenAI's API says over the wire, and Imprint's additions: request bodies, response objects, errors.

In: bytes of a body. Out: `ChatRequest`, `CompletionRequest`, or an `ApiError` that names the parameter; plain dicts to send back.
Knows nothing of models, stores or the server.

Where absent, `temperature` is 0 (greedy, as in offline evaluation; OpenAI's default is 1). A parameter that would change the
answer and is not built is refused, unless it has the value that asks for nothing; one that changes nothing (`user`, `metadata`,
...) is read and dropped. Additions: `ignore_eos` in requests (as in vLLM: end marks do not end the answer), `imprint` in
requests, whose `mode` says where the answer shall come from, and `imprint` in responses, which says where it does come from.
"""

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

Source = Literal["adapter", "in_context", "adapter_in_context", "base"]
Mode = Literal["auto", "adapter", "in_context", "adapter_in_context"]
FinishReason = Literal["stop", "length"]

NEUTRAL: dict[str, tuple[JsonValue, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "store": (False,),
}
"""Parameters of OpenAI's that are not built, with the values that ask for nothing."""

WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")

RequestT = TypeVar("RequestT", bound=BaseModel)

_MAX_STOPS = 4
_BODY: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


class ApiError(Exception):
    """An answer that is an error: HTTP status and OpenAI's error object. `retry_after_s` becomes the header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _joined_parts(content: Any) -> Any:
    """A list of text parts as one string; what is not such a list is left to the field's own type."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if not texts or len(texts) != len(content):
        raise ValueError("give a string or a list of text parts: this model reads nothing else")
    return "".join(texts)


def _one_or_many(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatMessage(_Body):
    """One message; `developer` is `system` by its newer name."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As `core.text.prompts` wants it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Extension(_Body):
    """Imprint's own wishes. mode: where a document's answer shall come from; `auto` is its adapter, else its text in context."""

    mode: Mode = "auto"


class _Generation(_Body):
    """What both endpoints share."""

    model: str = Field(min_length=1, max_length=8192)
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(_one_or_many), Field(max_length=_MAX_STOPS)
    ] = []
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    imprint: Extension = Extension()


class ChatRequest(_Generation):
    """A body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Generation):
    """A body of `/v1/completions`; the prompt is one text, or its token ids, and no chat template is applied."""

    prompt: str | list[str] | list[int]

    @property
    def wanted_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    def one_prompt(self) -> str | list[int]:
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [item for item in self.prompt if isinstance(item, str)]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if len(texts) == 1:
            return texts[0]
        if texts or not ids:
            raise ApiError(400, f"prompt holds {len(texts)} texts: give one, and send further ones as requests", param="prompt")
        return ids


def read_chat(body: bytes) -> ChatRequest:
    """The request in a body; `ApiError` 400 for anything that is none."""
    values = _values(body)
    messages = values.get("messages")
    if isinstance(messages, list):
        values["messages"] = [_without_nulls(message) if isinstance(message, dict) else message for message in messages]
    return _validated(ChatRequest, values)


def read_completion(body: bytes) -> CompletionRequest:
    """The request in a body; `ApiError` 400 for anything that is none."""
    return _validated(CompletionRequest, _values(body))


def _values(body: bytes) -> dict[str, JsonValue]:
    """The parameters that matter: nulls, as clients send for what is absent, and parameters without effect are left out."""
    try:
        values = _without_nulls(_BODY.validate_json(body))
    except ValidationError as error:
        raise ApiError(400, f"the body is not a JSON object: {error.errors(include_url=False)[0]['msg']}") from None
    for name in NEUTRAL.keys() & values.keys():
        if not any(type(values[name]) is type(neutral) and values[name] == neutral for neutral in NEUTRAL[name]):
            raise ApiError(
                400, f"{name} is not supported with this value: leave it out", param=name, code="unsupported_parameter"
            )
    return {name: value for name, value in values.items() if name not in NEUTRAL and name not in WITHOUT_EFFECT}


def _without_nulls(values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {name: value for name, value in values.items() if value is not None}


def _validated(kind: type[RequestT], values: dict[str, JsonValue]) -> RequestT:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:200]
        if first["type"] == "extra_forbidden":
            message = f"{place} is not a parameter that is known here: leave it out"
        else:
            message = f"{place}: {first['msg'].removeprefix('Value error, ')}"
        raise ApiError(400, message, param=place) from None


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; those of an in-context answer include the document, and an end mark counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Shape:
    """How one answer is put into OpenAI's objects: whole, or in chunks of a stream."""

    def __init__(self, chat: bool, answer_id: str, model: str, imprint: dict[str, JsonValue]) -> None:
        self._chat = chat
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{answer_id}", "created": int(time.time()), "model": model}
        self._imprint = imprint

    def whole(self, text: str, finish_reason: FinishReason, counts: dict[str, int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": counts, "imprint": self._imprint}

    def opening(self) -> dict[str, Any]:
        """The first chunk, without text; it says where the answer comes from."""
        return {**self._chunk([self._choice({"role": "assistant", "content": ""}, "", None)]), "imprint": self._imprint}

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk([self._choice({"content": text}, text, None)])

    def closing(self, finish_reason: FinishReason) -> dict[str, Any]:
        return self._chunk([self._choice({}, "", finish_reason)])

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk behind the last one of a stream that asked for `include_usage`."""
        return {**self._chunk([]), "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._chat else "text_completion", "choices": choices}

    def _choice(self, delta: dict[str, str], text: str, finish_reason: FinishReason | None) -> dict[str, Any]:
        return {
            "index": 0,
            **({"delta": delta} if self._chat else {"text": text}),
            "finish_reason": finish_reason,
            "logprobs": None,
        }

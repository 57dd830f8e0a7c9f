"""What OpenAI's API takes over the wire, and Imprint's additions: request bodies.

In: bytes of a body. Out: `ChatRequest`, `CompletionRequest`, or an `ApiError` that names the parameter. Knows nothing of models,
stores or the server.

Where absent, `temperature` is 0 (greedy, as in offline evaluation; OpenAI's default is 1). A parameter that would change the
answer and is not built is refused, unless it has a value that asks for nothing; one that changes nothing (`user`, `metadata`,
...) is read and dropped, and so is what the API itself writes into an assistant's message and a client sends back. Nulls mean
what is absent. Additions: `ignore_eos` (as in vLLM: end marks do not end the answer), and `imprint`, whose `mode` says where the
answer shall come from.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from core.engine.sampling import MAX_BIAS, MAX_PENALTY, MAX_TOLD, Sampling
from serve.errors import ApiError

Source = Literal["adapter", "in_context", "adapter_in_context", "base"]
Mode = Literal["auto", "adapter", "in_context", "adapter_in_context"]

NEUTRAL: dict[str, tuple[JsonValue, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
    "web_search_options": (),
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "repetition_penalty": (1, 1.0),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
}
"""Parameters of OpenAI's and of other servers' that are not built, with the values that ask for nothing."""

WITHOUT_EFFECT = (
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "store"),
    *("parallel_tool_calls", "prediction"),
)
ECHOED = ("refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content", "tool_calls")
"""What the API writes into an assistant's message beside its content: as good as absent where it is empty."""
UNREAD = ("annotations", "reasoning", "reasoning_content")

RequestT = TypeVar("RequestT", bound=BaseModel)

MAX_CHOICES = 128
_MAX_STOPS = 4
_SMALLEST_NUCLEUS = 1e-6
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BODY: TypeAdapter[dict[str, JsonValue]] = TypeAdapter(dict[str, JsonValue])


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _whole(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number, also as clients write it that know but one kind of numbers: `8.0`."""


def _joined_parts(content: Any) -> Any:
    """A list of text parts as one string; what is not such a list is left to the field's own type."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") in ("text", "refusal")]
    texts = [text for part in parts if isinstance(text := part.get(part["type"]), str)]
    if not texts or len(texts) != len(content):
        raise ValueError("give a string or a list of text parts: this model reads nothing else")
    return "".join(texts)


def _one_or_many(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _biases(given: Any) -> Any:
    """Keys of a JSON object are strings: token ids among them become numbers."""
    if not isinstance(given, dict):
        return given
    if wrong := next((key for key in given if not (str(key).isascii() and str(key).isdecimal())), None):
        raise ValueError(f"{str(wrong)[:50]!r} is no token id: give ids of this model's tokens")
    return {int(key): value for key, value in given.items()}


class ToolFunction(_Body):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1)
    arguments: str | dict[str, JsonValue] = ""

    def plain(self) -> dict[str, JsonValue]:
        """With arguments as an object, as chat templates want them; as they are where they are none."""
        if isinstance(self.arguments, dict):
            return {"name": self.name, "arguments": self.arguments}
        try:
            parsed = json.loads(self.arguments or "{}")
        except ValueError:
            parsed = self.arguments
        return {"name": self.name, "arguments": parsed if isinstance(parsed, dict) else self.arguments}


class ToolCall(_Body):
    """A call that an assistant made in the past."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"] = "function"
    id: str | None = None
    function: ToolFunction


class ChatMessage(_Body):
    """One message; `developer` is `system` by its newer name, `function` is `tool` by its older one."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] = []

    def plain(self) -> dict[str, Any]:
        """As `core.text.prompts` wants it."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self.content}
        if self.tool_calls:
            calls = [{"type": "function", "id": call.id, "function": call.function.plain()} for call in self.tool_calls]
            message["tool_calls"] = calls
        if role == "tool":
            message |= {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        return message


class Tool(_Body):
    """A tool that is offered, as it goes into the chat template."""

    type: Literal["function"]
    function: dict[str, JsonValue]

    @model_validator(mode="after")
    def _named(self) -> "Tool":
        name = self.function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError("function.name: give the tool a name")
        return self


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class Extension(_Body):
    """Imprint's own wishes. mode: where a document's answer shall come from; `auto` is its adapter, else its text in context."""

    mode: Mode = "auto"


class _Generation(_Body):
    """What both endpoints share."""

    model: str = Field(min_length=1, max_length=8192)
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    n: Whole = Field(default=1, ge=1, le=MAX_CHOICES)
    max_tokens: Whole | None = Field(default=None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(_one_or_many), Field(max_length=_MAX_STOPS)
    ] = []
    seed: Whole | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY, allow_inf_nan=False)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)]],
        BeforeValidator(_biases),
        Field(max_length=1024),
    ] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    imprint: Extension = Extension()

    @property
    def told(self) -> int | None:
        """How many of the likeliest tokens are told beside each one's log probability; None for no log probabilities."""
        raise NotImplementedError

    def sampling(self, choice: int, prompt_told: int | None = None) -> Sampling:
        """Of the choice with that number: each draws differently, and a seed gives the same choices again."""
        return Sampling(
            temperature=self.temperature,
            top_p=max(self.top_p, _SMALLEST_NUCLEUS),
            seed=None if self.seed is None else self.seed + choice,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            logprobs=self.told,
            prompt_logprobs=prompt_told,
        )


class ChatRequest(_Generation):
    """A body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MAX_TOLD)
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto"] = "auto"

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else [tool.model_dump() for tool in self.tools]


class CompletionRequest(_Generation):
    """A body of `/v1/completions`; a prompt is one text, or its token ids, and no chat template is applied."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Whole | None = Field(default=None, ge=0)
    best_of: Whole | None = None
    echo: bool = False
    logprobs: Annotated[Whole | None, BeforeValidator(lambda value: None if value is False else value)] = Field(
        default=None, ge=0, le=MAX_TOLD
    )

    @property
    def wanted_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def told(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One for each text or list of ids; there is one at least."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        found: list[str | list[int]] = [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]
        if not found:
            raise ApiError(400, "prompt is empty: give one text, or token ids", param="prompt")
        return found


def read_chat(body: bytes) -> ChatRequest:
    """The request in a body; `ApiError` 400 for anything that is none."""
    values = _values(body)
    messages = values.get("messages")
    if isinstance(messages, list):
        values["messages"] = [_message(message) if isinstance(message, dict) else message for message in messages]
    if isinstance(choice := values.get("tool_choice"), dict) or choice == "required":
        _refuse("tool_choice", "cannot be forced, which takes a grammar that this server does not have: give 'auto' or 'none'")
    request = _validated(ChatRequest, values)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs tells more beside log probabilities: give logprobs = true too", param="top_logprobs")
    return request


def read_completion(body: bytes) -> CompletionRequest:
    """The request in a body; `ApiError` 400 for anything that is none."""
    request = _validated(CompletionRequest, _values(body))
    if request.best_of not in (None, 1, request.n):
        _refuse("best_of", "is not supported beyond n: leave it out, and ask for more choices by n")
    return request


def _message(message: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Without nulls, and without what is empty or unread of an assistant's own message."""
    values: dict[str, JsonValue] = {name: value for name, value in message.items() if value is not None}
    if values.get("role") != "assistant":
        return values
    for name in ECHOED:
        if name in values and (name in UNREAD or values[name] in ([], {}, "")):
            del values[name]
    refusal = values.pop("refusal", "")
    values.setdefault("content", refusal)
    if values["content"] == []:
        values["content"] = ""
    return values


def _values(body: bytes) -> dict[str, JsonValue]:
    """The parameters that matter: nulls, as clients send for what is absent, and parameters without effect are left out."""
    try:
        given = _BODY.validate_json(body.removeprefix(_BYTE_ORDER_MARK))
    except ValidationError as error:
        raise ApiError(400, f"the body is not a JSON object: {error.errors(include_url=False)[0]['msg']}") from None
    values = {name: value for name, value in given.items() if value is not None}
    wanted = values.pop("response_format", None)
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text"):
        _refuse(
            "response_format",
            "other than text takes a grammar that this server does not have: leave it out, and ask for JSON in words",
        )
    for name in NEUTRAL.keys() & values.keys():
        if not any(type(values[name]) is type(neutral) and values[name] == neutral for neutral in NEUTRAL[name]):
            _refuse(name, "is not supported with this value: leave it out")
    return {name: value for name, value in values.items() if name not in NEUTRAL and name not in WITHOUT_EFFECT}


def _refuse(name: str, why: str) -> NoReturn:
    raise ApiError(400, f"{name} {why}", param=name, code="unsupported_parameter")


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

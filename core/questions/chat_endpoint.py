"""A request to a language model behind any OpenAI-compatible `/chat/completions`, with all its retries.

In: a request's body, and `read`, which takes from the model's reply what the caller asked for. Out: that, as `Done`, or `Lost`
with the reason. Every fault of the other side (time-outs, dropped connections, 429, 5xx, bad JSON, refusals) ends in one of the
two: it costs this request and nothing else. Knows nothing of what is asked (core.questions.endpoint, pipelines.evaluation.judge).

The API key comes from an environment variable that the settings name, goes into the Authorization header and nowhere else:
messages that the endpoint sends back are shown shortened and without it. Costs one HTTP request where all goes well, at most
1 + retries + bad_reply_retries otherwise (one more each where the server refuses `response_format`).
"""

import asyncio
import email.utils
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from core.config import RunSection

Reason = Literal["timeout", "connection", "rate_limited", "server_error", "bad_reply", "unsupported", "refused", "rejected",
                 "endpoint", "cancelled"]  # fmt: skip
"""Why a request brought nothing. `bad_reply`: not the JSON asked for; `unsupported`: no pair's evidence stands in the passage;
`refused`: the model or a filter declined; `rejected`: another 4xx; `endpoint`: wrong key, address or model, so all would fail."""

_TRY_AGAIN = {408: "timeout", 409: "server_error", 425: "server_error", 429: "rate_limited"}
_ALL_FAIL = (301, 302, 303, 307, 308, 401, 403, 404, 405)
_SHOWN_CHARACTERS = 200

T = TypeVar("T")


class EndpointRun(RunSection):
    """Where the endpoint is and how it is asked; the same questions wherever they come from."""

    model_config = ConfigDict(hide_input_in_errors=True)

    url: str = "http://127.0.0.1:8000/v1"
    """Up to and without `/chat/completions`."""
    api_key_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] | None = None
    """Name of the environment variable that holds the key; None where the endpoint wants none."""
    in_flight: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests under way at once, over all documents."""
    timeout_s: Annotated[float, Field(gt=0)] = 60
    retries: Annotated[int, Field(ge=0)] = 4
    """Further tries after a time-out, a dropped connection, 429 or 5xx."""
    bad_reply_retries: Annotated[int, Field(ge=0)] = 2
    """Further tries after a reply that is not what was asked for."""
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """Wait before the first retry; doubled each time, with jitter."""
    backoff_limit_s: Annotated[float, Field(gt=0)] = 30
    """Longest wait, whatever `Retry-After` says."""
    ask_failed_again: bool = False
    """Whether passages that the cache records as failed are asked again."""
    patience_s: Annotated[float, Field(ge=0)] = 2
    """How long pairs wait for those of an earlier passage before they go out of order."""

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL:
            parts = httpx.URL()
        if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query or parts.fragment:
            raise ValueError("give http(s)://host[:port]/path without user, password or query; the key goes into a variable")
        return url.rstrip("/")


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class Choice(BaseModel):
    """A reply, as far as it is read."""

    message: _Message
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """What the model said, without what it thought aloud before."""
        return (self.message.content or "").rpartition("</think>")[2]

    @property
    def cut_off(self) -> bool:
        """Whether the reply reached its limit of tokens."""
        return self.finish_reason == "length"


class _Tokens(BaseModel):
    prompt_tokens: Annotated[int, Field(ge=0, lt=2**40)] = 0
    completion_tokens: Annotated[int, Field(ge=0, lt=2**40)] = 0


class _Completion(BaseModel):
    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: _Tokens | None = None


class Lost(NamedTuple):
    """A request that brought nothing: why, in words, after how many HTTP requests and tokens."""

    reason: Reason
    detail: str
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Usage:
    """What was asked and spent so far: HTTP requests by their end, and the endpoint's own count of tokens."""

    requests: int = 0
    retried: int = 0
    bad_replies: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Spent:
    """What one request has cost, all its tries together."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Done(NamedTuple, Generic[T]):
    """What `read` took from a reply, and what it cost."""

    value: T
    spent: Spent


def api_key(run: EndpointRun) -> SecretStr | None:
    """The key from the environment; raises `ValueError` naming the variable, never its value."""
    if run.api_key_variable is None:
        return None
    key = os.environ.get(run.api_key_variable, "").strip()
    if not key:
        raise ValueError(f"{run.api_key_variable} is not set: export the endpoint's key under this name")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{run.api_key_variable} does not hold a key: only visible ASCII characters can stand in a header")
    return SecretStr(key)


class Fault(Exception):
    """A try that brought nothing, and how long the server asks to wait before another. `read` raises it, too."""

    def __init__(self, lost: Lost, wait_s: float = 0) -> None:
        super().__init__(lost.reason)
        self.lost = lost
        self.wait_s = wait_s


@dataclass
class ChatEndpoint:
    """Asks one endpoint, over whichever connection the caller brings. `usage` is counted here; use it from one event loop."""

    run: EndpointRun
    key: SecretStr | None
    usage: Usage = field(default_factory=Usage)
    response_format: Mapping[str, Any] | None = None
    """Sent with every request; no longer where the server turns out to answer only without it."""

    @cached_property
    def _tls(self) -> ssl.SSLContext | bool:
        return httpx.create_ssl_context() if self.run.url.startswith("https") else False

    def client(self) -> httpx.AsyncClient:
        """A connection for one request at a time: a pool shared by all costs time in the square of its connections."""
        return httpx.AsyncClient(verify=self._tls, limits=httpx.Limits(max_connections=1))

    async def ask(self, client: httpx.AsyncClient, body: Mapping[str, Any], read: Callable[[Choice], T]) -> Done[T] | Lost:
        """One request with all its retries; never raises for a fault of the endpoint. `read` refuses a reply by `Fault`."""
        run, spent = self.run, Spent()
        failed = unusable = 0
        while True:
            try:
                return Done(read(await self._post(client, body, spent)), spent)
            except Fault as fault:
                lost = fault.lost._replace(**{name: getattr(spent, name) for name in Spent.__slots__})
                wait_s = 0.0
                if lost.reason in ("bad_reply", "unsupported"):
                    unusable += 1
                    self.usage.bad_replies += 1
                    give_up = unusable > run.bad_reply_retries
                elif lost.reason in ("refused", "rejected", "endpoint"):
                    self.usage.refused += lost.reason == "refused"
                    give_up = True
                else:
                    failed += 1
                    give_up = failed > run.retries
                    backoff_s = run.backoff_s * 2 ** min(failed - 1, 30) * random.uniform(0.5, 1)
                    wait_s = min(run.backoff_limit_s, max(fault.wait_s, backoff_s))
            if give_up:
                return lost
            self.usage.retried += 1
            await asyncio.sleep(wait_s)

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any], spent: Spent) -> Choice:
        """One try, and a second without `response_format` where the server refuses that."""
        form = {} if self.response_format is None else {"response_format": self.response_format}
        response = await self._send(client, {**body, **form}, spent)
        if form and response.status_code in (400, 422):
            response = await self._send(client, body, spent)
            if response.is_success:
                self.response_format = None
        if not response.is_success:
            raise self._refusal(response)
        try:
            completion = _Completion.model_validate_json(response.content)
        except ValidationError:
            raise Fault(Lost("bad_reply", "the endpoint's answer is not a chat completion")) from None
        tokens = completion.usage or _Tokens()
        for counted in (spent, self.usage):
            counted.prompt_tokens += tokens.prompt_tokens
            counted.completion_tokens += tokens.completion_tokens
        choice = completion.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise Fault(Lost("refused", _shown(choice.message.refusal or "content filter")))
        return choice

    async def _send(self, client: httpx.AsyncClient, body: Mapping[str, Any], spent: Spent) -> httpx.Response:
        run = self.run
        self.usage.requests += 1
        spent.requests += 1
        headers = {"Authorization": f"Bearer {self.key.get_secret_value()}"} if self.key else {}
        try:
            async with asyncio.timeout(run.timeout_s):
                return await client.post(f"{run.url}/chat/completions", json=body, headers=headers, timeout=run.timeout_s)
        except (TimeoutError, httpx.TimeoutException):
            raise Fault(Lost("timeout", f"no answer within {run.timeout_s:g} s")) from None
        except httpx.RequestError as error:
            raise Fault(Lost("connection", type(error).__name__)) from None

    def _refusal(self, response: httpx.Response) -> Fault:
        """What an answer other than 2xx means."""
        status = response.status_code
        if status in _ALL_FAIL:
            hints = {401: "check the key", 403: "check the key", 404: "check the address and the model's name"}
            return Fault(Lost("endpoint", f"HTTP {status}: {hints.get(status, 'check the address')}"))
        said = response.text
        if self.key:
            said = said.replace(self.key.get_secret_value(), "***")
        detail = f"HTTP {status}: {_shown(said)}"
        if status in _TRY_AGAIN or status >= 500:
            reason: Any = _TRY_AGAIN.get(status, "server_error")
            return Fault(Lost(reason, detail), retry_after_s(response.headers.get("Retry-After", "")))
        filtered = "content_filter" in said or "content_policy" in said
        return Fault(Lost("refused" if filtered else "rejected", detail))


def _shown(said: str) -> str:
    """A message of the other side on one line, shortened."""
    return " ".join(said.split())[:_SHOWN_CHARACTERS]


def retry_after_s(value: str) -> float:
    """Seconds that a `Retry-After` header asks for: a number or a date (RFC 9110, section 10.2.3); 0 for anything else."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0

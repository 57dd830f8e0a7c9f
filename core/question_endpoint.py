"""One passage -> one checked reply of a language model behind any OpenAI-compatible `/chat/completions`.

In: a `Passage` of a `Document`. Out: a `Reply` with the pairs whose answer and evidence hold, or `Lost` with the reason. Every
fault of the other side (time-outs, dropped connections, 429, 5xx, bad JSON, refusals) ends in one of the two: it costs this
request's pairs and nothing else. Knows nothing of threads, order or caches (core.question_stream).

The API key comes from an environment variable that the settings name, goes into the Authorization header and nowhere else:
messages that the endpoint sends back are shown shortened and without it. Costs one HTTP request where all goes well, at most
1 + retries + bad_reply_retries otherwise (one more each where the server refuses `response_format`).
"""

import asyncio
import email.utils
import os
import random
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, ValidationError, field_validator

from core.config import RunSection, Section, digest
from core.documents import Document
from core.question_writing import Pair, Passage, collapse_blanks, sentence_passages, window_passages

PROMPT_VERSION = "questions-1"
"""Name of the prompt and of the checks on replies. It bears identity: whoever changes either changes the name."""

Reason = Literal["timeout", "connection", "rate_limited", "server_error", "bad_reply", "unsupported", "refused", "rejected",
                 "endpoint", "cancelled"]  # fmt: skip
"""Why a request brought nothing. `bad_reply`: not the JSON asked for; `unsupported`: no pair's evidence stands in the passage;
`refused`: the model or a filter declined; `rejected`: another 4xx; `endpoint`: wrong key, address or model, so all would fail."""

_TRY_AGAIN = {408: "timeout", 409: "server_error", 425: "server_error", 429: "rate_limited"}
_ALL_FAIL = (301, 302, 303, 307, 308, 401, 403, 404, 405)
_SHOWN_CHARACTERS = 200


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


class EndpointSettings(Section):
    """What a language model is asked for each sentence (LIFT v4) or window of sentences (LIFT v1)."""

    model_config = ConfigDict(hide_input_in_errors=True)

    model: Annotated[str, Field(min_length=1)]
    unit: Literal["sentence", "window"] = "sentence"
    pairs: Annotated[int, Field(ge=1, le=50)] = 10
    """Most pairs of a sentence or window."""
    context_characters: Annotated[int, Field(ge=0)] = 2048
    """Characters before a sentence that are shown with it."""
    window_sentences: Annotated[int, Field(ge=1)] = 16
    windows: Annotated[int, Field(ge=1)] = 30
    """Most windows of a document."""
    seed: int = 0
    """Draws the windows."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.7
    reply_tokens: Annotated[int, Field(ge=1)] | None = 4096
    extra_body: dict[str, JsonValue] = Field(default_factory=dict)
    """Further fields of the request, such as `chat_template_kwargs`."""
    max_question_characters: Annotated[int, Field(ge=1)] = 500
    max_answer_characters: Annotated[int, Field(ge=1)] = 500
    run: EndpointRun = EndpointRun()

    def passages(self, text: str) -> list[Passage]:
        """What a document's text is asked about, in order."""
        if self.unit == "sentence":
            return sentence_passages(text, self.context_characters)
        return window_passages(text, self.window_sentences, self.windows, self.seed)


class WrittenPair(BaseModel):
    """A pair as the model is asked to write it."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})

    question: str
    answer: str
    evidence: str


class WrittenPairs(BaseModel):
    """The whole reply of the model; its schema is what structured output is held to."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})

    pairs: list[WrittenPair]


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: Annotated[int, Field(ge=0, lt=2**40)] = 0
    completion_tokens: Annotated[int, Field(ge=0, lt=2**40)] = 0


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Tokens | None = None


class Reply(NamedTuple):
    """Checked pairs as (question, answer, evidence), and the tokens that the endpoint counted for them, failed tries included."""

    pairs: tuple[tuple[str, str, str], ...]
    prompt_tokens: int
    completion_tokens: int


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
    pairs_dropped: int = 0
    """Pairs of good replies that failed a check: empty, too long, or evidence that is not in the passage."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: int = 0
    """Passages answered from the cache."""


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


def request_body(document: Document, passage: Passage, settings: EndpointSettings) -> dict[str, Any]:
    """The request for one passage, without `response_format`."""
    what = "sentence" if settings.unit == "sentence" else "passage"
    system = (
        "You write questions that test whether a reader knows a text by heart. "
        f"Ask about the {what} alone; what stands before it only tells you whom and what it speaks of. "
        f"Write up to {settings.pairs} questions, fewer if it holds fewer facts, in the language of the text. "
        "The reader will not see the text: name people, things and places, and never speak of a passage. "
        "Keep answers short and use the words of the text. As evidence copy the words that "
        "prove the answer, letter by letter. Reply with JSON alone: "
        '{"pairs": [{"question": "...", "answer": "...", "evidence": "..."}]}'
    )
    parts = [f"Title: {document.title}"] if document.title else []
    if before := document.text[passage.context_start : passage.start].strip():
        parts.append(f"Before it:\n{before}")
    parts.append(f"The {what}:\n{document.text[passage.start : passage.end]}")
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(parts)}],
        "temperature": settings.temperature,
        "max_tokens": settings.reply_tokens,
    }
    return {name: value for name, value in body.items() if value is not None} | settings.extra_body


def request_key(document: Document, body: dict[str, Any], settings: EndpointSettings) -> str:
    """SHA-256 (hex) of all that decides the reply; tenants share none."""
    bounds = [settings.pairs, settings.max_question_characters, settings.max_answer_characters]
    return digest([PROMPT_VERSION, document.tenant, bounds, body])


RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "question_answer_pairs", "strict": True, "schema": WrittenPairs.model_json_schema()},
}


class _Fault(Exception):
    """A try that brought nothing, and how long the server asks to wait before another."""

    def __init__(self, lost: Lost, wait_s: float = 0) -> None:
        super().__init__(lost.reason)
        self.lost = lost
        self.wait_s = wait_s


@dataclass(slots=True)
class _Spent:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Endpoint:
    """Asks one endpoint, over whichever connection the caller brings. `usage` is counted here; use it from one event loop."""

    settings: EndpointSettings
    key: SecretStr | None
    usage: Usage = field(default_factory=Usage)
    structured: bool = True
    """Whether `response_format` is still sent; a server that answers only without it is remembered."""

    async def ask(self, client: httpx.AsyncClient, document: Document, passage: Passage, body: dict[str, Any]) -> Reply | Lost:
        """One passage with all its retries; never raises for a fault of the endpoint."""
        run, spent = self.settings.run, _Spent()
        failed = unusable = 0
        while True:
            try:
                pairs = self._checked(await self._post(client, body, spent), document, passage)
                return Reply(pairs, spent.prompt_tokens, spent.completion_tokens)
            except _Fault as fault:
                lost = fault.lost._replace(**{name: getattr(spent, name) for name in _Spent.__slots__})
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

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any], spent: _Spent) -> _Choice:
        """One try, and a second without `response_format` where the server refuses that."""
        structured = self.structured
        response = await self._send(client, body | {"response_format": RESPONSE_FORMAT} if structured else body, spent)
        if structured and response.status_code in (400, 422):
            response = await self._send(client, body, spent)
            if response.is_success:
                self.structured = False
        if not response.is_success:
            raise self._refusal(response)
        try:
            completion = _Completion.model_validate_json(response.content)
        except ValidationError:
            raise _Fault(Lost("bad_reply", "the endpoint's answer is not a chat completion")) from None
        tokens = completion.usage or _Tokens()
        for counted in (spent, self.usage):
            counted.prompt_tokens += tokens.prompt_tokens
            counted.completion_tokens += tokens.completion_tokens
        return completion.choices[0]

    async def _send(self, client: httpx.AsyncClient, body: dict[str, Any], spent: _Spent) -> httpx.Response:
        run = self.settings.run
        self.usage.requests += 1
        spent.requests += 1
        headers = {"Authorization": f"Bearer {self.key.get_secret_value()}"} if self.key else {}
        try:
            async with asyncio.timeout(run.timeout_s):
                return await client.post(f"{run.url}/chat/completions", json=body, headers=headers, timeout=run.timeout_s)
        except (TimeoutError, httpx.TimeoutException):
            raise _Fault(Lost("timeout", f"no answer within {run.timeout_s:g} s")) from None
        except httpx.RequestError as error:
            raise _Fault(Lost("connection", type(error).__name__)) from None

    def _refusal(self, response: httpx.Response) -> _Fault:
        """What an answer other than 2xx means."""
        status = response.status_code
        if status in _ALL_FAIL:
            hints = {401: "check the key", 403: "check the key", 404: "check the address and the model's name"}
            return _Fault(Lost("endpoint", f"HTTP {status}: {hints.get(status, 'check the address')}"))
        said = response.text
        if self.key:
            said = said.replace(self.key.get_secret_value(), "***")
        detail = f"HTTP {status}: {collapse_blanks(said)[:_SHOWN_CHARACTERS]}"
        if status in _TRY_AGAIN or status >= 500:
            reason: Any = _TRY_AGAIN.get(status, "server_error")
            return _Fault(Lost(reason, detail), retry_after_s(response.headers.get("Retry-After", "")))
        filtered = "content_filter" in said or "content_policy" in said
        return _Fault(Lost("refused" if filtered else "rejected", detail))

    def _checked(self, choice: _Choice, document: Document, passage: Passage) -> tuple[tuple[str, str, str], ...]:
        """The pairs of a reply whose question and answer are there, of bounded length, and whose evidence is in the passage."""
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise _Fault(Lost("refused", collapse_blanks(choice.message.refusal or "content filter")[:_SHOWN_CHARACTERS]))
        content = (choice.message.content or "").rpartition("</think>")[2]
        try:
            written = WrittenPairs.model_validate_json(content[content.find("{") : content.rfind("}") + 1])
        except ValidationError:
            cut = ", cut off at reply_tokens" if choice.finish_reason == "length" else ""
            raise _Fault(Lost("bad_reply", f"the model's reply is not the JSON asked for{cut}")) from None
        shown = collapse_blanks(document.text[passage.context_start : passage.end])
        pairs = []
        for pair in written.pairs:
            question, answer, evidence = (collapse_blanks(text) for text in (pair.question, pair.answer, pair.evidence))
            short = len(question) <= self.settings.max_question_characters and len(answer) <= self.settings.max_answer_characters
            if question and answer and evidence and short and evidence in shown:
                pairs.append((question, answer, evidence))
        self.usage.pairs_dropped += len(written.pairs) - len(pairs)
        if written.pairs and not pairs:
            raise _Fault(Lost("unsupported", "no pair with evidence from the passage"))
        return tuple(pairs[: self.settings.pairs])


def as_pairs(pairs: tuple[tuple[str, str, str], ...], passage: Passage) -> list[Pair]:
    """A reply's pairs as pairs on the document."""
    return [Pair(*pair, "written", passage.start, passage.end) for pair in pairs]


def retry_after_s(value: str) -> float:
    """Seconds that a `Retry-After` header asks for: a number or a date (RFC 9110, section 10.2.3); 0 for anything else."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0

"""A language model that judges answers, behind any OpenAI-compatible `/chat/completions`.

In: questions, accepted answers, what was said. Out: for each a verdict, True or False, or None where the judge gave none. A
judge's score is the share of True among the verdicts, and is never mixed with exact match or F1. Costs one request an answer,
`in_flight` at once. The same address, key and limits as question writing (`core.question_endpoint.EndpointRun`).
"""

import asyncio
import re
import ssl
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from core.config import Section
from core.question_endpoint import EndpointRun, api_key, retry_after_s

JUDGE_VERSION = "judge-1"
"""Name of the prompt and of how replies are read. It stands beside every score."""

_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_TRY_AGAIN = (408, 409, 425, 429)


class JudgeSettings(Section):
    """Which model judges; `reply_tokens` leave room for models that think aloud before the verdict."""

    model_config = ConfigDict(hide_input_in_errors=True)

    model: Annotated[str, Field(min_length=1)]
    reply_tokens: Annotated[int, Field(ge=1)] = 512
    run: EndpointRun = EndpointRun()


class Claim(NamedTuple):
    """What is judged: `said` in answer to `question`, against the accepted answers."""

    question: str
    answers: Sequence[str]
    said: str


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]


def judge(claims: Sequence[Claim], settings: JudgeSettings) -> list[bool | None]:
    """A verdict for each claim, in order. Raises `ValueError` where the key is missing or the endpoint refuses all requests."""
    return asyncio.run(_judge(claims, settings, api_key(settings.run)))


def request_body(claim: Claim, settings: JudgeSettings) -> dict[str, Any]:
    """The request for one verdict."""
    accepted = "\n".join(f"- {answer}" for answer in claim.answers)
    asked = (
        "Does the given answer say the same as one of the accepted answers to the question? Wording does not matter, "
        "missing or contradicting facts do. End your reply with the one word yes or no.\n\n"
        f"Question: {claim.question}\n\nAccepted answers:\n{accepted}\n\nGiven answer: {claim.said or '(none)'}"
    )
    messages = [{"role": "user", "content": asked}]
    return {"model": settings.model, "messages": messages, "temperature": 0, "max_tokens": settings.reply_tokens}


def verdict(reply: str) -> bool | None:
    """The last yes or no of a reply."""
    found = _VERDICT.findall(reply)
    return found[-1].lower() == "yes" if found else None


async def _judge(claims: Sequence[Claim], settings: JudgeSettings, key: SecretStr | None) -> list[bool | None]:
    run = settings.run
    tls: ssl.SSLContext | bool = httpx.create_ssl_context() if run.url.startswith("https") else False
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    gate = asyncio.Semaphore(run.in_flight)
    async with httpx.AsyncClient(verify=tls, headers=headers, timeout=run.timeout_s) as client:

        async def one(claim: Claim) -> bool | None:
            async with gate:
                return await _ask(client, request_body(claim, settings), run)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(claim)) for claim in claims]
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None
    return [task.result() for task in tasks]


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], run: EndpointRun) -> bool | None:
    for attempt in range(run.retries + 1):
        asked_to_wait_s = 0.0
        try:
            response = await client.post(f"{run.url}/chat/completions", json=body)
        except httpx.RequestError:
            response = None
        if response is not None and response.is_success:
            try:
                return verdict(_Completion.model_validate_json(response.content).choices[0].message.content or "")
            except ValidationError:
                return None
        if response is not None:
            if response.status_code in (401, 403, 404):
                raise ValueError(
                    f"the judge answers HTTP {response.status_code}: check its address, its key and the model's name"
                )
            if response.status_code < 500 and response.status_code not in _TRY_AGAIN:
                return None
            asked_to_wait_s = retry_after_s(response.headers.get("Retry-After", ""))
        if attempt < run.retries:
            await asyncio.sleep(min(run.backoff_limit_s, max(asked_to_wait_s, run.backoff_s * 2**attempt)))
    return None

"""A language model that judges answers, behind any OpenAI-compatible `/chat/completions`.

In: questions, accepted answers, what was said. Out: for each a verdict, True or False, or None where the judge gave none. A
judge's score is the share of True among the verdicts, and is never mixed with exact match or F1. Costs one request an answer,
`in_flight` at once, with the limits and retries of `core.questions.chat_endpoint`.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field

from core.config import Section, identity
from core.questions.chat_endpoint import ChatEndpoint, Choice, Done, EndpointRun, api_key

JUDGE_VERSION = "judge-2"
"""Name of the prompt and of how replies are read. It stands in the identity of every report with a judge's scores."""

_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


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


def judge(claims: Sequence[Claim], settings: JudgeSettings) -> list[bool | None]:
    """A verdict for each claim, in order. Raises `ValueError` where the key is missing or the endpoint refuses all requests."""
    return asyncio.run(_judge(claims, settings, ChatEndpoint(settings.run, api_key(settings.run))))


def producer(settings: JudgeSettings) -> dict[str, Any]:
    """What bears the identity of verdicts, as JSON values."""
    return {"version": JUDGE_VERSION, **identity(settings)}


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
    """The last yes or no of a whole reply."""
    found = _VERDICT.findall(reply)
    return found[-1].lower() == "yes" if found else None


async def _judge(claims: Sequence[Claim], settings: JudgeSettings, endpoint: ChatEndpoint) -> list[bool | None]:
    verdicts: list[bool | None] = [None] * len(claims)
    waiting = iter(enumerate(claims))

    async def work() -> None:
        async with endpoint.client() as client:
            for place, claim in waiting:
                done = await endpoint.ask(client, request_body(claim, settings), _read)
                if isinstance(done, Done):
                    verdicts[place] = done.value
                elif done.reason == "endpoint":
                    raise ValueError(f"the judge answers {done.detail}")

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(settings.run.in_flight, len(claims))):
                group.create_task(work())
    except ExceptionGroup as faults:
        raise faults.exceptions[0] from None
    return verdicts


def _read(choice: Choice) -> bool | None:
    return None if choice.cut_off else verdict(choice.text)

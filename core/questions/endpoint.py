"""One passage -> one checked reply of a language model behind an endpoint (core.questions.chat_endpoint).

In: a `Passage` of a `Document`. Out: a `Reply` with the pairs whose answer and evidence hold, or `Lost` with the reason. Knows
nothing of threads, order or caches (core.questions.stream), nor of connections. Costs what one request costs, bad replies asked
again included.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, ValidationError

from core.config import Section, digest
from core.questions.chat_endpoint import ChatEndpoint, Choice, EndpointRun, Fault, Lost, Usage
from core.questions.rules import Pair, Passage, collapse_blanks, sentence_passages, window_passages
from core.text.documents import Document

PROMPT_VERSION = "questions-1"
"""Name of the prompt and of the checks on replies. It bears identity: whoever changes either changes the name."""


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


class Reply(NamedTuple):
    """Checked pairs as (question, answer, evidence), and the tokens that the endpoint counted for them, failed tries included."""

    pairs: tuple[tuple[str, str, str], ...]
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class QuestionUsage(Usage):
    """Usage, and what of it concerns questions."""

    pairs_dropped: int = 0
    """Pairs of good replies that failed a check: empty, too long, or evidence that is not in the passage."""
    cached: int = 0
    """Passages answered from the cache."""


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


@dataclass
class Endpoint:
    """Asks one endpoint about passages. `usage` is counted here; use it from one event loop."""

    settings: EndpointSettings
    key: SecretStr | None
    usage: QuestionUsage = field(default_factory=QuestionUsage)

    def __post_init__(self) -> None:
        self.chat = ChatEndpoint(self.settings.run, self.key, self.usage, RESPONSE_FORMAT)

    async def ask(self, client: httpx.AsyncClient, document: Document, passage: Passage, body: dict[str, Any]) -> Reply | Lost:
        """One passage with all its retries; never raises for a fault of the endpoint."""
        done = await self.chat.ask(client, body, partial(self._checked, document, passage))
        return done if isinstance(done, Lost) else Reply(done.value, done.spent.prompt_tokens, done.spent.completion_tokens)

    def _checked(self, document: Document, passage: Passage, choice: Choice) -> tuple[tuple[str, str, str], ...]:
        """The pairs of a reply whose question and answer are there, of bounded length, and whose evidence is in the passage."""
        content = choice.text
        try:
            written = WrittenPairs.model_validate_json(content[content.find("{") : content.rfind("}") + 1])
        except ValidationError:
            cut = ", cut off at reply_tokens" if choice.cut_off else ""
            raise Fault(Lost("bad_reply", f"the model's reply is not the JSON asked for{cut}")) from None
        shown = collapse_blanks(document.text[passage.context_start : passage.end])
        pairs = []
        for pair in written.pairs:
            question, answer, evidence = (collapse_blanks(text) for text in (pair.question, pair.answer, pair.evidence))
            short = len(question) <= self.settings.max_question_characters and len(answer) <= self.settings.max_answer_characters
            if question and answer and evidence and short and evidence in shown:
                pairs.append((question, answer, evidence))
        self.usage.pairs_dropped += len(written.pairs) - len(pairs)
        if written.pairs and not pairs:
            raise Fault(Lost("unsupported", "no pair with evidence from the passage"))
        return tuple(pairs[: self.settings.pairs])


def as_pairs(pairs: tuple[tuple[str, str, str], ...], passage: Passage) -> list[Pair]:
    """A reply's pairs as pairs on the document."""
    return [Pair(*pair, "written", passage.start, passage.end) for pair in pairs]

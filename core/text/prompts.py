"""All that a model sees, as token ids: documents, conversations, what of them is supervised, and where they are cut.

In: texts, and any Hugging Face tokenizer with a chat template. Out: lists of ids, and labels that are -100 where nothing is
supervised. Training and inference share these functions. A conversation is tokenised in pieces that end where a generation
prompt ends and where an answer ends, so that `prompt` gives exactly the ids that `render` put before the answer. A past answer
keeps the form in which it was written, also under templates that rewrite the past (Qwen3 drops empty think blocks).

Texts of users and documents are text: only the template, and what is `Ours`, writes control tokens (core.text.control).

Knows nothing of tensors, padding and batches (core.training.examples). Costs two renderings of the template for every assistant
turn.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from jinja2 import TemplateError
from pydantic import PositiveInt
from transformers import PreTrainedTokenizerBase

from core.config import Section
from core.text.control import Marks, Ours, Text, control, encode_marked, encode_text, free_marks, parts_of

IGNORED = -100
ROLES = ("system", "user", "assistant", "tool")
_PROBE = "\ue000"  # a private-use character: no template writes it

Message = Mapping[str, Any]


class Turn(NamedTuple):
    """One question and its answer."""

    user: Text
    assistant: str


class Instructions(Section):
    """What asks for a text back, and what stands between the texts of one context. Defaults: the released SHINE.

    To a stock tokenizer `<RECON>` and `<COMP>` are plain text of several tokens; the release adds them as tokens but never
    trains their embeddings.
    """

    reconstruct: str = "<RECON>"
    complete: str = "<COMP>"
    separator: str = "<|endoftext|>"


class Limits(Section):
    """Most tokens of a context and of a conversation; both are cut on the right. Defaults: SHINE's many-question stage."""

    context_tokens: PositiveInt = 1150
    conversation_tokens: PositiveInt = 1150


class _Piece(NamedTuple):
    text: str
    answer: bool


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """A conversation as (ids, labels) of equal length.

    Supervised are, in every turn, the answer, the end mark and what the template writes behind it (ChatML: a line feed).
    Raises `ValueError` without a chat template, or with one whose generation prompt does not open the assistant message.
    """
    if not turns:
        raise ValueError("a conversation needs at least one turn")
    messages: list[Message] = []
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    ids: list[int] = []
    labels: list[int] = []
    pieces, marks = _pieces(tokenizer, messages)
    for piece in pieces:
        part = encode_marked(tokenizer, piece.text, marks)
        ids += part
        labels += part if piece.answer else [IGNORED] * len(part)
    return ids, labels


def prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
    """The ids after which a model writes its answer to `messages` (each with `role` and `content`).

    tools: that the model may call, as chat templates take them (OpenAI's objects); so are the `tool_calls` of past answers.

    Raises `ValueError` for an unknown role, for content that is no text, for a last message from the assistant, and where the
    template refuses the conversation.
    """
    if not messages:
        raise ValueError("messages is empty: give at least one message from the user")
    for place, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"message {place} has role {message.get('role')!r}: give one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {place} has no text as its content: give a string")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's: end with the message that is to be answered")
    pieces, marks = _pieces(tokenizer, messages, tools)
    return [token for piece in pieces for token in encode_marked(tokenizer, piece.text, marks)]


def raw_prompt(tokenizer: PreTrainedTokenizerBase, asked: str | Sequence[int], shown: str | None = None) -> list[int]:
    """A prompt to be continued, without a template: text, with what the tokenizer puts around it (a begin token), or ids.

    shown: a document that stands before it; it comes behind the begin token of `asked` where ids bring their own.
    """
    before, behind = _around(tokenizer)
    if isinstance(asked, str):
        return [*before, *encode(tokenizer, asked if shown is None else in_context(shown, asked)), *behind]
    if shown is None:
        return list(asked)
    told = asked[len(before) :] if list(asked[: len(before)]) == before else asked
    return [*before, *encode(tokenizer, in_context(shown, "")), *told]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text and behind it."""
    alone = tokenizer.encode("x", add_special_tokens=False)
    whole = tokenizer.encode("x")
    start = next((place for place in range(len(whole) - len(alone) + 1) if whole[place : place + len(alone)] == alone), None)
    if start is None:
        raise ValueError(f"the tokenizer of {_name(tokenizer)} changes a text that it puts marks around: give token ids")
    return whole[:start], whole[start + len(alone) :]


def in_context(document_text: str, question: str) -> str:
    """What a user says who shows the document and asks: text, blank line, question."""
    return f"{document_text}\n\n{question}"


def clean_answer(text: str) -> str:
    """An answer without the blanks and line feeds that a template puts around it."""
    return text.strip()


def stop_ids(tokenizer: PreTrainedTokenizerBase, also: Iterable[int] = ()) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's end token, control tokens that the template writes behind answers, and `also`.

    also: the model's own (`generation_config.eos_token_id`). A template that refuses a question and an answer adds none.
    """
    stop = {tokenizer.eos_token_id, *also}
    if tokenizer.chat_template is not None:
        try:
            told = _template(
                tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}], generate=False, tools=()
            )
        except ValueError:
            told = ""
        _, found, behind = told.rpartition(_PROBE)
        known = control(tokenizer)
        stop.update(known.ids[mark] for mark in known.pattern.findall(behind) if found)
    return frozenset(stop - {None})


def encode(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """The ids of a text alone: no template, no begin or end token. Only what is `Ours` writes control tokens."""
    if type(text) is str:
        return encode_text(tokenizer, text).ids
    marks = free_marks(*parts_of(text))
    return encode_marked(tokenizer, _marked(tokenizer, text, marks), marks)


def encode_context(tokenizer: PreTrainedTokenizerBase, text: Text, limits: Limits) -> list[int]:
    """A document as the hypernetwork reads it: raw text, cut on the right. Raises `ValueError` for a text without tokens."""
    ids = encode(tokenizer, text)[: limits.context_tokens]
    if not ids:
        raise ValueError("the document is empty: there is nothing to make an adapter from")
    return ids


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, limits: Limits) -> str:
    """The part of a document that `encode_context` keeps, as text: for prompts that show the document.

    A character that the limit splits is kept whole. Raises `ValueError` for a long text and a tokenizer without offsets.
    """
    encoded = encode_text(tokenizer, text, offsets=True)
    if len(encoded.ids) <= limits.context_tokens:
        return text
    if encoded.offsets is None:
        raise ValueError(
            f"the text is longer than {limits.context_tokens} tokens and {type(tokenizer).__name__} cannot say "
            "where in the text a token ends: load the fast tokenizer, or shorten the text"
        )
    return text[: encoded.offsets[limits.context_tokens - 1][1]]


def head_tail(ids: Sequence[int], limit: int, ellipsis_ids: Sequence[int]) -> list[int]:
    """A prompt cut in the middle: head, ellipsis, tail, `limit` tokens together (LIFT v3; an odd limit favours the tail)."""
    if len(ids) <= limit:
        return list(ids)
    head = limit // 2 - len(ellipsis_ids)
    if head < 0:
        raise ValueError(f"a limit of {limit} tokens has no room for an ellipsis of {len(ellipsis_ids)}: raise the limit")
    tail = limit - limit // 2
    return [*ids[:head], *ellipsis_ids, *ids[len(ids) - tail :]]


def _marked(tokenizer: PreTrainedTokenizerBase, value: Any, marks: Marks) -> Any:
    """A text, or JSON values that hold texts, with marks around the control tokens in it, but for those in `Ours`."""
    if isinstance(value, str | tuple):
        known = control(tokenizer)
        return "".join(str(part) if isinstance(part, Ours) else known.marked(part, marks) for part in parts_of(value))
    if isinstance(value, Mapping):
        return {_marked(tokenizer, key, marks): _marked(tokenizer, each, marks) for key, each in value.items()}
    return [_marked(tokenizer, each, marks) for each in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    """All texts in JSON values."""
    if isinstance(value, str | tuple):
        yield from parts_of(value)
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, (*value.keys(), *value.values())))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts, value))


def _pieces(
    tokenizer: PreTrainedTokenizerBase, said: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[_Piece], Marks]:
    """Prompts and answers in turn, with marks in what was said and in the tools that are offered.

    They end with the generation prompt unless the last message is an answer.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {_name(tokenizer)} has no chat template: take an instruction-tuned base, "
            "or set tokenizer.chat_template and save the tokenizer"
        )
    marks = free_marks(*_texts([*said, *tools]))
    messages: list[Message] = [{**_marked(tokenizer, message, marks), "role": message["role"]} for message in said]
    tools = [_marked(tokenizer, tool, marks) for tool in tools]
    pieces: list[_Piece] = []
    told = reply = ""
    answered = 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _template(tokenizer, messages[:place], generate=True, tools=tools)
        whole = _template(tokenizer, messages[: place + 1], generate=False, tools=tools)
        if not whole.startswith(asked):
            raise ValueError(
                f"the chat template of {_name(tokenizer)} is not prefix-consistent: the text up to the generation prompt "
                f"(ends {asked[-40:]!r}) does not open the text with the answer (ends {whole[-80:]!r}), so training and "
                "inference would see different prompts; use a template whose generation prompt opens the assistant message"
            )
        pieces.append(_Piece(asked[_past(tokenizer, messages[:answered], asked, told, reply, tools) :], answer=False))
        told, reply, answered = whole, whole[len(asked) :], place + 1
        pieces.append(_Piece(reply, answer=True))
    if answered < len(messages):
        asked = _template(tokenizer, messages, generate=True, tools=tools)
        pieces.append(_Piece(asked[_past(tokenizer, messages[:answered], asked, told, reply, tools) :], answer=False))
    return pieces, marks


def _past(
    tokenizer: PreTrainedTokenizerBase,
    past: Sequence[Message],
    asked: str,
    told: str,
    reply: str,
    tools: Sequence[Mapping[str, Any]],
) -> int:
    """Where in `asked` the past ends: `told` when it was the present, and its last answer was `reply`."""
    if asked.startswith(told):
        return len(told)
    # The template rewrites the past. What stands before a next question is that past and the user's header.
    probe = _template(tokenizer, [*past, {"role": "user", "content": _PROBE}], generate=True, tools=tools)
    before = probe[: probe.rfind(_PROBE)]
    end = before.rfind(reply) + len(reply)
    if reply not in before or not asked.startswith(before[:end]):
        raise ValueError(
            f"the chat template of {_name(tokenizer)} is not prefix-consistent: it rewrites past answers "
            f"(wanted {reply[-40:]!r}); use one conversation per question"
        )
    return end


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool, tools: Sequence[Mapping[str, Any]]
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=generate,
            enable_thinking=False,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template of {_name(tokenizer)} refuses this conversation: {error}") from None
    assert isinstance(text, str)
    return text


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__

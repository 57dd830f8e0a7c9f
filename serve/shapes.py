"""How answers are put into OpenAI's objects: whole, or in chunks of a stream.

In: pieces of text and what is told of their tokens. Out: plain dicts. Knows nothing of models, stores or the server.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import JsonValue

FinishReason = Literal["stop", "length"]


class ToldToken(NamedTuple):
    """A token of an answer or a prompt, its log probability (None for the first of a prompt), and the likeliest in its place."""

    text: str
    logprob: float | None
    top: Sequence[tuple[str, float]] = ()


class Piece(NamedTuple):
    """What is new of one of the choices, in order. Its last piece says why it is the last, and how many tokens were made."""

    choice: int
    text: str
    told: Sequence[ToldToken] = ()
    finish_reason: FinishReason | None = None
    tokens: int = 0


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; those of an in-context answer include the document, and an end mark counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Shape:
    """The objects of one answer. told: whether log probabilities were asked for."""

    def __init__(self, chat: bool, answer_id: str, model: str, imprint: dict[str, JsonValue], told: bool) -> None:
        self._chat = chat
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{answer_id}", "created": int(time.time()), "model": model}
        self._imprint = imprint
        self._told = told
        self._offsets: dict[int, int] = {}

    def whole(self, pieces: Sequence[Piece], counts: dict[str, int]) -> dict[str, Any]:
        """All pieces of all choices, in the order in which they came."""
        choices = []
        for index in sorted({piece.choice for piece in pieces}):
            own = [piece for piece in pieces if piece.choice == index]
            text = "".join(piece.text for piece in own)
            message = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            told = self._logprobs(index, [token for piece in own for token in piece.told])
            choices.append({"index": index, "finish_reason": own[-1].finish_reason, "logprobs": told, **message})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": counts, "imprint": self._imprint}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The first chunks, without text, one for each choice; the first says where the answer comes from."""
        delta = {"role": "assistant", "content": ""}
        chunks = [self._chunk([self._choice(Piece(index, ""), delta, told=False)]) for index in range(choices)]
        return [{**chunks[0], "imprint": self._imprint}, *chunks[1:]]

    def pieces(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunk of its text, if it has any, and the one that ends its choice, if it is the last."""
        chunks = []
        if piece.text or piece.told:
            text = piece._replace(finish_reason=None)
            chunks.append(self._chunk([self._choice(text, {"content": piece.text}, self._told)]))
        if piece.finish_reason is not None:
            chunks.append(self._chunk([self._choice(piece._replace(text="", told=()), {}, told=False)]))
        return chunks

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk behind the last one of a stream that asked for `include_usage`."""
        return {**self._chunk([]), "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._chat else "text_completion", "choices": choices}

    def _choice(self, piece: Piece, delta: dict[str, str], told: bool) -> dict[str, Any]:
        return {
            "index": piece.choice,
            **({"delta": delta} if self._chat else {"text": piece.text}),
            "finish_reason": piece.finish_reason,
            "logprobs": self._logprobs(piece.choice, piece.told) if told else None,
        }

    def _logprobs(self, index: int, told: Sequence[ToldToken]) -> dict[str, Any] | None:
        if not self._told:
            return None
        if self._chat:
            content = [
                {**_entry(token.text, token.logprob), "top_logprobs": [_entry(*each) for each in token.top]} for token in told
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token in told:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token.text)
        return {
            "tokens": [token.text for token in told],
            "token_logprobs": [token.logprob for token in told],
            "top_logprobs": [dict(token.top) if token.logprob is not None and token.top else None for token in told],
            "text_offset": offsets,
        }


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    """`bytes` is null, as the API has it, for a token that holds a part of a character."""
    return {"token": text, "logprob": logprob, "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())}

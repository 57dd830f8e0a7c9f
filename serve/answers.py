"""From the tokens of a request's choices to pieces of text, as they come.

In: `Token`s of all choices, mixed. Out: `Piece`s, each of one choice. A stop string ends its choice, and takes it out of the
engine. Knows nothing of models, stores and HTTP.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from core.engine.requests import Token
from core.engine.sampling import TokenLogprob
from serve.engines import Tokens
from serve.errors import ApiError
from serve.failures import as_api_errors
from serve.shapes import Piece, ToldToken
from serve.text import AnswerText, TokenTexts


@dataclass
class Choice:
    """One of the answers to a request.

    discard: the answer's only token is of no use, as none was asked for. echo: what stands before the answer; echo_ids: where
    log probabilities of its tokens are told.
    """

    number: int
    text: AnswerText
    discard: bool = False
    echo: str = ""
    echo_ids: Sequence[int] = ()
    made: int = 0
    untold: list[ToldToken] = field(default_factory=list)


async def pieces(tokens: Tokens, choices: Mapping[str, Choice], texts: TokenTexts) -> AsyncIterator[Piece]:
    """The choices' pieces, by the ids of their requests. Raises `ApiError`."""
    with as_api_errors():
        async for token in tokens:
            choice = choices[token.request_id]
            piece = _piece(choice, token, texts)
            if piece is None:
                continue
            if piece.finish_reason is not None and token.finish_reason is None:
                tokens.drop(token.request_id)
            yield piece


def _piece(choice: Choice, token: Token, texts: TokenTexts) -> Piece | None:
    if token.finish_reason == "error":
        raise ApiError(500, "the numbers overflowed: this adapter cannot answer here", code="not_finite")
    new = ""
    if not choice.made:
        new = choice.echo
        choice.untold += _told_prompt(choice.echo_ids, token.prompt_logprobs, texts)
    choice.made += 1
    if choice.discard:
        return Piece(choice.number, new, choice.untold, "length", 0)
    if token.finish_reason != "stop":
        new += choice.text.push(token.token_id)
        if token.logprob is not None:
            choice.untold.append(_told(token.token_id, token.logprob, texts))
    reason = token.finish_reason
    if reason is not None and not choice.text.stopped:
        new += choice.text.finish()
    if choice.text.stopped:
        reason = "stop"
    if not new and reason is None:
        return None
    told, choice.untold = choice.untold, []
    return Piece(choice.number, new, told, reason, choice.made if reason else 0)


def _told(token_id: int, logprob: TokenLogprob, texts: TokenTexts) -> ToldToken:
    return ToldToken(texts.of(token_id), logprob.logprob, [(texts.of(each), value) for each, value in logprob.top])


def _told_prompt(ids: Sequence[int], logprobs: Sequence[TokenLogprob], texts: TokenTexts) -> list[ToldToken]:
    """Its first token follows nothing, so nothing is told of it."""
    if not ids:
        return []
    first = ToldToken(texts.of(ids[0]), None)
    return [first, *(_told(token_id, logprob, texts) for token_id, logprob in zip(ids[1:], logprobs, strict=True))]

"""How the next token of each row is chosen from the model's logits, and what is told of its probability.

In: logits `[B, V]` and a `Chooser` for each row. Out: a `Chosen` for each row. Nothing of one row bears on another.

Greedy, or a draw from the nucleus (Holtzman et al., ICLR 2020). Before either, a row's logits are changed by its `logit_bias`
and by its penalties, as OpenAI's API defines them: for a token that was generated c times, `frequency_penalty * c`, and
`presence_penalty` where c > 0, are taken from its logit. Log probabilities that are told are the model's own, of logits before
bias, penalties, temperature and nucleus.

Cost: a maximum over the vocabulary for each row; a sort for each row that draws, a copy of all rows where one has a bias or
penalties, a log-softmax for each row whose log probabilities are told.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_TOLD = 20
_POSITIONS_AT_ONCE = 64


class TokenLogprob(NamedTuple):
    """The log probability of a token in its place, and those of the likeliest tokens there, in falling order."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen: the likeliest one at temperature 0, else a draw from the nucleus.

    The nucleus is the smallest set of tokens that holds `top_p` of the probability. Equal seeds give equal draws; None is a new
    seed. logit_bias: (token id, -100 to 100) added to logits. logprobs: each token is told with its log probability and so many
    of the likeliest ones; None for none. prompt_logprobs: the same for the tokens of the prompt.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give more than 0 and at most 1")
        for name, penalty in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            if not abs(penalty) <= MAX_PENALTY:
                raise ValueError(f"{name}_penalty is {penalty}: give -{MAX_PENALTY} to {MAX_PENALTY}")
        for token_id, bias in self.logit_bias:
            if not abs(bias) <= MAX_BIAS:
                raise ValueError(f"logit_bias of token {token_id} is {bias}: give -{MAX_BIAS} to {MAX_BIAS}")
        for told in (self.logprobs, self.prompt_logprobs):
            if told is not None and not 0 <= told <= MAX_TOLD:
                raise ValueError(f"log probabilities of {told} tokens are asked for: give 0 to {MAX_TOLD}")

    def check(self, vocabulary: int) -> None:
        """Raises `ValueError` for a bias of a token that the vocabulary does not have."""
        for token_id, _ in self.logit_bias:
            if not 0 <= token_id < vocabulary:
                raise ValueError(f"logit_bias names token {token_id}: give 0 to {vocabulary - 1}")


GREEDY = Sampling()


class Chooser:
    """What choosing the tokens of one request remembers: its draws, and how often it has made which token."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.random = random.Random(sampling.seed) if sampling.temperature > 0 else None
        self._made: Counter[int] = Counter()
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)

    @property
    def changes_logits(self) -> bool:
        return bool(self._made or self.sampling.logit_bias)

    def change(self, logits_V: Tensor) -> None:
        """Adds bias and penalties, in place."""
        changes = dict(self.sampling.logit_bias)
        for token_id, times in self._made.items():
            changes[token_id] = changes.get(token_id, 0.0) - (
                self.sampling.frequency_penalty * times + self.sampling.presence_penalty
            )
        ids = torch.tensor(list(changes), device=logits_V.device)
        logits_V[ids] += torch.tensor(list(changes.values()), dtype=logits_V.dtype, device=logits_V.device)

    def made(self, token_id: int) -> None:
        if self._penalised:
            self._made[token_id] += 1


class Chosen(NamedTuple):
    """The next token of a row, -1 where its logits are not finite."""

    token_id: int
    logprob: TokenLogprob | None = None


def choose(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[Chosen]:
    """The next token of each row."""
    top_B, id_B = logits_BV.max(dim=-1)
    changed = [row for row, chooser in enumerate(choosers) if chooser.changes_logits]
    scores_BV = logits_BV
    if changed:
        scores_BV = logits_BV.to(torch.float32, copy=True)
        for row in changed:
            choosers[row].change(scores_BV[row])
        id_B = scores_BV.argmax(dim=-1)
    drawing = [row for row, chooser in enumerate(choosers) if chooser.random is not None]
    if drawing:
        drawn = torch.tensor(drawing, device=logits_BV.device)
        id_B[drawn] = _draw(scores_BV[drawn], [choosers[row] for row in drawing])
    ids: list[int] = torch.where(top_B.isfinite(), id_B, -1).tolist()
    for token_id, chooser in zip(ids, choosers, strict=True):
        chooser.made(token_id)
    told = {row: chooser.sampling.logprobs for row, chooser in enumerate(choosers) if chooser.sampling.logprobs is not None}
    found: dict[int, TokenLogprob] = {}
    if told:
        rows = torch.tensor(list(told), device=logits_BV.device)
        found = dict(zip(told, _logprobs(logits_BV[rows], [ids[row] for row in told], list(told.values())), strict=True))
    return [Chosen(token_id, found.get(row) if token_id >= 0 else None) for row, token_id in enumerate(ids)]


def prompt_logprobs(
    head: Callable[[Tensor], Tensor], hidden_TH: Tensor, next_ids: Sequence[int], told: int
) -> list[TokenLogprob]:
    """The log probability of each of T tokens, from the final hidden states of the tokens before them; some at a time."""
    found: list[TokenLogprob] = []
    for start in range(0, len(next_ids), _POSITIONS_AT_ONCE):
        some = next_ids[start : start + _POSITIONS_AT_ONCE]
        found += _logprobs(head(hidden_TH[start : start + len(some)]), some, [told] * len(some))
    return found


def _logprobs(logits_BV: Tensor, ids: Sequence[int], told: Sequence[int]) -> list[TokenLogprob]:
    logprob_BV = logits_BV.float().log_softmax(dim=-1)
    own = logprob_BV.gather(1, torch.tensor(ids, device=logprob_BV.device).clamp_min(0)[:, None])[:, 0].tolist()
    top = logprob_BV.topk(min(max(told), logprob_BV.shape[1]), dim=-1)
    likeliest = zip(own, told, top.indices.tolist(), top.values.tolist(), strict=True)
    return [TokenLogprob(mine, tuple(zip(at[:count], values[:count], strict=True))) for mine, count, at, values in likeliest]


def _draw(logits_BV: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """One token a row by inverting the distribution function of the nucleus at one uniform number of the row's own."""
    temperature, top_p, uniform = [], [], []
    for chooser in choosers:
        assert chooser.random is not None
        temperature.append(chooser.sampling.temperature)
        top_p.append(chooser.sampling.top_p)
        uniform.append(chooser.random.random())
    temperature_B1, top_p_B1, uniform_B1 = torch.tensor([temperature, top_p, uniform], device=logits_BV.device)[:, :, None]
    logits_BV, id_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    p_BV = ((logits_BV - logits_BV[:, :1]) / temperature_B1).softmax(dim=-1)
    before_BV = p_BV.cumsum(dim=-1) - p_BV
    p_BV = torch.where(before_BV < top_p_B1, p_BV, 0.0)
    reached_BV = p_BV.cumsum(dim=-1)
    index_B1 = (reached_BV <= uniform_B1 * reached_BV[:, -1:]).sum(dim=-1, keepdim=True)
    return id_BV.gather(1, index_B1.clamp_max((p_BV > 0).sum(dim=-1, keepdim=True) - 1).clamp_min(0))[:, 0]

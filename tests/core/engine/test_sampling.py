"""Penalties, biases and log probabilities, against the model's own logits."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from core.engine.requests import Request, Token
from core.engine.sampling import Sampling
from core.engine.token_loop import Engine
from tests.models import random_adapters, tiny_base

BASE = tiny_base()
PROMPT = [5, 6, 7, 8, 9]


def tokens_of(*requests: Request, slots: int = 4, prefill: int = 512) -> dict[str, list[Token]]:
    specs = [request.adapter.spec for request in requests if request.adapter is not None]
    engine = Engine(BASE, specs[0] if specs else None, slots=slots, prefill_tokens_per_step=prefill)
    for request in requests:
        engine.submit(request)
    found: dict[str, list[Token]] = {request.request_id: [] for request in requests}
    while not engine.idle:
        for token in engine.step():
            found[token.request_id].append(token)
    return found


@torch.no_grad()
def logits(ids: list[int]) -> Tensor:
    """`[T, V]` of a whole pass."""
    return BASE.model(input_ids=torch.tensor([ids])).logits[0]


def alone(sampling: Sampling, tokens: int = 12) -> list[Token]:
    return tokens_of(Request("r", PROMPT, tokens, sampling=sampling))["r"]


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-0.5, 1.0), (-2.0, -2.0)])
def test_penalties_are_taken_from_the_logits_of_what_was_generated(presence: float, frequency: float) -> None:
    ids = ids_of(alone(Sampling(presence_penalty=presence, frequency_penalty=frequency)))
    for place, token_id in enumerate(ids):
        scores = logits(PROMPT + ids[:place])[-1].clone()
        for made, times in Counter(ids[:place]).items():
            scores[made] -= frequency * times + presence
        assert scores.max() - scores[token_id] < 1e-5
    if presence == -2.0:
        assert Counter(ids) != Counter(ids_of(alone(Sampling()))), "what was made is made again"


def test_a_bias_forbids_and_forces() -> None:
    plain = ids_of(alone(Sampling()))
    forbidden = ids_of(alone(Sampling(logit_bias=tuple((token_id, -100.0) for token_id in set(plain)))))
    assert not set(plain) & set(forbidden)
    assert ids_of(alone(Sampling(logit_bias=((11, 100.0),)))) == [11] * 12
    assert ids_of(alone(Sampling(temperature=2.0, logit_bias=((11, 100.0),)))) == [11] * 12
    with pytest.raises(ValueError, match="names token 89: give 0 to 88"):
        alone(Sampling(logit_bias=((89, 1.0),)))


def test_log_probabilities_are_the_models_own() -> None:
    """Before bias, penalties and temperature; also of tokens that are no favourites."""
    for sampling in (Sampling(logprobs=3), Sampling(temperature=2.0, seed=1, logprobs=3, logit_bias=((11, 4.0),))):
        tokens = alone(sampling)
        ids = ids_of(tokens)
        for place, token in enumerate(tokens):
            expected_V = logits(PROMPT + ids[:place])[-1].log_softmax(-1)
            assert token.logprob is not None
            assert token.logprob.logprob == pytest.approx(float(expected_V[token.token_id]), abs=1e-5)
            top = expected_V.topk(3)
            assert [token_id for token_id, _ in token.logprob.top] == top.indices.tolist()
            assert [value for _, value in token.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("prefill", [2, 512])
def test_log_probabilities_of_a_prompt_come_with_the_first_token(prefill: int) -> None:
    prompt = list(range(3, 80)) * 2
    first, *others = tokens_of(Request("r", prompt, 3, sampling=Sampling(prompt_logprobs=1)), prefill=prefill)["r"]
    expected_TV = logits(prompt).log_softmax(-1)[:-1]
    own = expected_TV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert [each.logprob for each in first.prompt_logprobs] == pytest.approx(own.tolist(), abs=1e-4)
    assert [each.top[0][0] for each in first.prompt_logprobs] == expected_TV.argmax(-1).tolist()
    assert all(not token.prompt_logprobs for token in others)


def test_each_row_of_a_batch_has_its_own_sampling() -> None:
    weights = random_adapters(BASE, 4)
    kinds = [Sampling(), Sampling(frequency_penalty=1.5), Sampling(logit_bias=((7, 3.0),), logprobs=2), Sampling(1.5, seed=3)]
    requests = [
        Request(str(row), PROMPT[: 2 + row], 10, weights.select(slice(row, row + 1)), sampling=kind)
        for row, kind in enumerate(kinds)
    ]
    together = tokens_of(*requests)
    for request in requests:
        assert ids_of(together[request.request_id]) == ids_of(tokens_of(request)[request.request_id])
    assert [token.logprob is not None for name in "0123" for token in together[name]] == [False] * 20 + [True] * 10 + [False] * 10


def test_an_adapter_is_checked_once_however_many_requests_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    original = Tensor.isfinite
    monkeypatch.setattr(Tensor, "isfinite", lambda tensor: checked.append(tensor.numel()) or original(tensor))
    weights = random_adapters(BASE, 2)
    engine = Engine(BASE, weights.spec, slots=2)
    first, second = weights.select(slice(0, 1)), weights.select(slice(1, 2))
    for number, adapter in enumerate([first, second, first, second, first]):
        engine.submit(Request(str(number), PROMPT, 2, adapter))
    assert checked == [weights.spec.numel] * 2


def test_impossible_samplings_are_refused() -> None:
    bias = {"logit_bias": ((1, 101.0),)}
    for wrong in ({"presence_penalty": 3.0}, {"frequency_penalty": float("nan")}, bias, {"logprobs": 21}):
        with pytest.raises(ValueError, match="give"):
            Sampling(**wrong)

"""What OpenAI's API takes, as clients send it: fields with default values, histories as the API wrote them, ids as listed."""

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch

from core.text.prompts import prompt
from serve.schema import read_chat
from serve.service import Service
from tests.serving import NAMES, World, ask, chat, make_document, make_world, offline, served_base, serving

USER = {"role": "user", "content": "Who is it?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"name": "x"}'}}


class Client:
    """The application behind plain calls."""

    def __init__(self, runner: asyncio.Runner, client: httpx.AsyncClient, service: Service, world: World) -> None:
        self._runner = runner
        self._client = client
        self.service = service
        self.world = world

    def request(self, method: str, path: str, **content: Any) -> httpx.Response:
        return self._runner.run(self._client.request(method, path, **content))

    def chat(self, messages: list[dict[str, Any]] | None = None, **changes: Any) -> httpx.Response:
        return self.request("POST", "/v1/chat/completions", json=ask("base:d0") | {"messages": messages or [USER]} | changes)

    def complete(self, prompt: Any = "The text", **changes: Any) -> dict[str, Any]:
        response = self.request(
            "POST", "/v1/completions", json={"model": "base:d0", "prompt": prompt, "max_tokens": 6, **changes}
        )
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def said(self, messages: list[dict[str, Any]] | None = None, **changes: Any) -> list[str]:
        response = self.chat(messages, **changes)
        assert response.status_code == 200, response.text
        return [choice["message"]["content"] for choice in response.json()["choices"]]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    world = make_world(tmp_path_factory.mktemp("store"), ["d0"])
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        http, service = runner.run(stack.enter_async_context(serving(world)))
        yield Client(runner, http, service, world)
        runner.run(stack.aclose())


@pytest.fixture(scope="module")
def plain(client: Client) -> str:
    return offline(client.world, "Who is it?", 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_p": 0},
        {"min_p": 0.0, "top_k": -1, "repetition_penalty": 1.0},
        {"top_p": 0},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"tools": [], "tool_choice": "none", "functions": [], "response_format": {"type": "text"}, "stop": []},
        {"tools": None, "tool_choice": None, "stop": None, "logit_bias": None, "response_format": None, "seed": None},
        {"store": True, "metadata": {"a": "b"}, "user": "u", "service_tier": "auto", "parallel_tool_calls": True},
        {"max_tokens": 12.0, "max_completion_tokens": None, "seed": 7.0},
        {"chat_template_kwargs": {"enable_thinking": False}, "skip_special_tokens": True, "verbosity": "medium"},
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
)
def test_values_that_ask_for_nothing_change_nothing(client: Client, plain: str, changes: dict[str, Any]) -> None:
    assert client.said(**changes) == [plain]


@pytest.mark.parametrize(
    "past",
    [
        {"content": "Ansa.", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        {"content": "Ansa.", "tool_calls": [], "reasoning_content": "hm", "annotations": [{"type": "url_citation"}]},
        {"content": [{"type": "text", "text": "Ansa."}], "name": "me"},
        {"content": None, "refusal": "Ansa."},
    ],
)
def test_an_answer_may_be_sent_back_as_it_came(client: Client, past: dict[str, Any]) -> None:
    expected = client.said([USER, {"role": "assistant", "content": "Ansa."}, USER])
    assert client.said([USER, {"role": "assistant", **past}, USER]) == expected
    assert client.said([USER, {"role": "assistant", "content": None}, USER]) == client.said(
        [USER, {"role": "assistant", "content": ""}, USER]
    )


def test_calls_of_tools_in_the_past_are_seen(client: Client) -> None:
    """As JSON, since this template has no place of its own for them; `function` is the old name of `tool`."""
    result = {"role": "tool", "tool_call_id": "c1", "content": "granite"}
    answers = [
        client.said([USER, {"role": "assistant", "content": content, "tool_calls": [CALL]}, result, USER])
        for content in (None, "", [])
    ]
    written = {"role": "assistant", "content": '{"name": "find", "arguments": {"name": "x"}}'}
    assert answers == [client.said([USER, written, {"role": "function", "name": "find", "content": "granite"}, USER])] * 3
    assert answers[0] != client.said([USER, {"role": "assistant", "content": ""}, result, USER])


def test_what_needs_a_grammar_or_a_place_in_the_template_is_refused_in_words(client: Client) -> None:
    offered = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    for changes, words in (
        ({"response_format": {"type": "json_object"}}, "grammar"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "grammar"),
        ({"tools": offered, "tool_choice": "required"}, "grammar"),
        ({"tools": offered, "tool_choice": {"type": "function", "function": {"name": "find"}}}, "grammar"),
        ({"tools": offered}, "has no place for tools"),
    ):
        response = client.chat(**changes)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter") and words in error["message"]


def test_tools_go_through_a_template_that_has_a_place_for_them(tmp_path: Any) -> None:
    base = served_base(seed=3)
    template = base.tokenizer.chat_template
    base.tokenizer.chat_template = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments.name }}</call>"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    world = make_world(tmp_path, ["d0"], base)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "granite"}]
    seen = [*messages[:1], {"role": "assistant", "content": "<call>find x</call>"}, messages[2]]

    async def main() -> None:
        async with serving(world) as (http, _):
            body = ask("base:d0") | {"messages": messages, "tools": tools}
            counts = [(await http.post("/v1/chat/completions", json=body)).json()["usage"]["prompt_tokens"]]
            body |= {"tool_choice": "none"}
            counts.append((await http.post("/v1/chat/completions", json=body)).json()["usage"]["prompt_tokens"])
            assert counts == [len(prompt(base.tokenizer, seen, tools)), len(prompt(base.tokenizer, seen))]
            assert counts[0] > counts[1]

    try:
        asyncio.run(main())
    finally:
        base.tokenizer.chat_template = template


def test_several_choices(client: Client, plain: str) -> None:
    assert client.said(n=3) == [plain] * 3
    drawn = client.said(n=4, temperature=1.5, seed=5)
    assert len(set(drawn)) == 4 and client.said(n=4, temperature=1.5, seed=5) == drawn
    assert client.said(temperature=1.5, seed=7) == drawn[2:3], "a choice draws as one alone with its seed would"
    response = client.chat(n=3, stream=True, stream_options={"include_usage": True})
    lines = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
    texts, ends = [""] * 3, [0] * 3
    for line in lines[:-1]:
        [choice] = line["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends[choice["index"]] += choice["finish_reason"] is not None
    assert (texts, ends) == ([plain] * 3, [1] * 3)
    whole = client.chat(n=3).json()
    assert lines[-1]["usage"] == whole["usage"]
    assert whole["usage"]["prompt_tokens"] == client.chat().json()["usage"]["prompt_tokens"]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]


def test_a_stop_string_ends_its_own_choice_only(client: Client) -> None:
    free = client.said(n=4, temperature=1.5, seed=5, ignore_eos=True, max_tokens=40)
    stop = next(letter for letter in sorted(set("".join(free))) if 0 < sum(letter in text for text in free) < 4)
    stopped = client.said(n=4, temperature=1.5, seed=5, ignore_eos=True, max_tokens=40, stop=stop)
    assert stopped == [text.partition(stop)[0].rstrip() for text in free]


def test_many_prompts(client: Client) -> None:
    tokenizer = client.world.base.tokenizer
    texts = ["The text", "Ansa", "Who"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    expected = [client.complete(text)["choices"][0]["text"] for text in texts]
    for prompts in (texts, ids):
        body = client.complete(prompts)
        assert [choice["text"] for choice in body["choices"]] == expected
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert [choice["text"] for choice in client.complete([ids[0]])["choices"]] == expected[:1]
    twice = client.complete(texts, n=2)["choices"]
    assert [(choice["index"], choice["text"]) for choice in twice] == [
        (2 * i + j, expected[i]) for i in range(3) for j in range(2)
    ]
    too_many = client.request("POST", "/v1/completions", json={"model": "base", "prompt": texts * 27, "max_tokens": 1})
    assert too_many.status_code == 400 and "at most 80" in too_many.json()["error"]["message"]


@torch.no_grad()
def logprobs_of(world: World, ids: list[int]) -> torch.Tensor:
    return world.base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def test_log_probabilities_of_a_chat(client: Client) -> None:
    body = ask("base", logprobs=True, top_logprobs=2)
    [choice] = client.request("POST", "/v1/chat/completions", json=body).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content).strip() == choice["message"]["content"]
    tokenizer = client.world.base.tokenizer
    start = prompt(tokenizer, [USER])
    ids = tokenizer.encode("".join(token["token"] for token in content), add_special_tokens=False)
    if len(ids) == len(content):
        expected_TV = logprobs_of(client.world, start + ids)[len(start) - 1 : -1]
        for token, token_id, expected_V in zip(content, ids, expected_TV, strict=True):
            assert token["logprob"] == pytest.approx(float(expected_V[token_id]), abs=1e-4)
    for token in content:
        assert token["top_logprobs"][0]["logprob"] == token["logprob"] and len(token["top_logprobs"]) == 2
        assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
    streamed = client.request("POST", "/v1/chat/completions", json=body | {"stream": True})
    chunks = [json.loads(line[6:])["choices"][0] for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    assert [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]] == content
    assert client.chat().json()["choices"][0]["logprobs"] is None


def test_echo_scores_a_prompt(client: Client) -> None:
    """As evaluation harnesses do it: the prompt's own log probabilities, with one new token or none."""
    tokenizer, text = client.world.base.tokenizer, "The text of Ansa"
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected_TV = logprobs_of(client.world, ids)[:-1]
    own = expected_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    for asked in (text, ids):
        for max_tokens in (0, 1):
            body = client.complete(asked, model="base", echo=True, logprobs=1, max_tokens=max_tokens)
            [choice] = body["choices"]
            told = choice["logprobs"]
            assert choice["text"].startswith(text) and "".join(told["tokens"]) == choice["text"]
            assert body["usage"]["completion_tokens"] == max_tokens == len(told["tokens"]) - len(ids)
            assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
            assert told["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-4)
            for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
                assert choice["text"][offset : offset + len(token)] == token
            assert [max(each.values()) for each in told["top_logprobs"][1 : len(ids)]] == pytest.approx(
                expected_TV.max(-1).values.tolist(), abs=1e-4
            )
    assert client.complete(text, echo=True)["choices"][0]["text"] == text + client.complete(text)["choices"][0]["text"]
    assert client.complete(text, echo=True, max_tokens=0)["choices"][0]["text"] == text


def test_penalties_and_biases_reach_the_engine(client: Client, plain: str) -> None:
    tokenizer = client.world.base.tokenizer
    said = client.complete(max_tokens=24, ignore_eos=True, logprobs=0)["choices"][0]
    less = client.complete(max_tokens=24, ignore_eos=True, frequency_penalty=2.0, presence_penalty=2.0, logprobs=0)["choices"][0]
    assert len(set(less["logprobs"]["tokens"])) > len(set(said["logprobs"]["tokens"]))
    [token_id] = tokenizer.encode(" crimson", add_special_tokens=False)
    forced = client.complete(max_tokens=3, logit_bias={str(token_id): 100})["choices"][0]
    assert forced["text"] == " crimson crimson crimson"
    assert all(math.isfinite(value) for value in less["logprobs"]["token_logprobs"])


def test_a_byte_order_mark_is_no_part_of_a_body(client: Client) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(ask("base:d0")).encode()
    assert client.request("POST", "/v1/chat/completions", content=body).status_code == 200


def test_seeds_of_choices_and_arguments_of_calls_are_kept() -> None:
    request = read_chat(json.dumps({"model": "m", "messages": [USER], "n": 2, "seed": 2**63 - 1, "temperature": 1}).encode())
    assert [request.sampling(number).seed for number in range(2)] == [2**63 - 1, 2**63]
    odd = {**CALL, "function": {"name": "f", "arguments": "no JSON"}}
    history = [USER, {"role": "assistant", "content": "", "tool_calls": [odd]}, USER]
    message = read_chat(json.dumps({"model": "m", "messages": history}).encode()).messages[1].plain()
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "no JSON"}


STRANGE = (
    *(*NAMES, ".", "...", "%41", "%2541", "a%2Fb", "a b%20c", "x/..", "é/ü", "~-_.", "[v6]", "{id}", "a//b", "/", "%"),
    *("%25", ";v=1", "@me", "a,b", "50%", "x%3Ay", "\u202eodd", "👩‍👩‍👧"),
)


def test_every_model_is_found_by_its_id_as_listed(tmp_path: Any) -> None:
    """Also with one more percent-encoding, as some clients put ids into paths; by GET as by HEAD."""
    world = make_world(tmp_path, ["d0"])
    world.store.put([make_document(name, f"{place} {name}", place) for name in STRANGE for place in ("c", "x/y z", "..", "100%")])

    async def main() -> None:
        async with serving(world) as (http, _):
            models = (await http.get("/v1/models", params={"limit": 1000})).json()["data"]
            assert len(models) == 2 + 4 * len(STRANGE)
            for model in models:
                for path in (model["id"], quote(model["id"], safe="")):
                    response = await http.get(f"/v1/models/{path}")
                    assert response.status_code == 200, path
                    if path == model["id"] or "%25" not in model["id"]:
                        assert response.json() == model, path
                head = await http.head(f"/v1/models/{model['id']}")
                assert head.status_code == 200
                assert model["parent"] is None or await chat(http, model["id"]), model["id"]

    asyncio.run(main())


async def check_cors(http: httpx.AsyncClient, allowed: bool) -> None:
    origin = {"Origin": "https://page.example"}
    asked = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = await http.options("/v1/chat/completions", headers=asked)
    response = await http.post("/v1/chat/completions", json=ask("base"), headers=origin)
    assert response.status_code == 200
    granted = [each.headers.get("access-control-allow-origin") for each in (preflight, response)]
    assert granted == (["https://page.example"] * 2 if allowed else [None] * 2)
    assert preflight.status_code == (200 if allowed else 405)
    assert ("X-Imprint-Source" in response.headers.get("access-control-expose-headers", "")) == allowed
    stranger = await http.get("/v1/models", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in stranger.headers


def test_browsers_may_call_where_the_settings_say_so(client: Client) -> None:
    async def main() -> None:
        async with serving(client.world, cors_origins=("https://page.example",)) as (http, _):
            await check_cors(http, allowed=True)
        async with serving(client.world) as (http, _):
            await check_cors(http, allowed=False)

    asyncio.run(main())


def test_head_is_taken_where_get_is(client: Client) -> None:
    for path in ("/health", "/ready", "/v1/models", "/v1/models/base"):
        assert client.request("HEAD", path).status_code == 200
    assert client.request("HEAD", "/v1/models/base:nothing").status_code == 404


def test_keys_and_values_stay_within_their_memory(tmp_path: Any) -> None:
    """The longest request that is admitted cannot make them grow beyond it, and one that is longer is told the limit."""
    world = make_world(tmp_path, ["d0"])
    budget = 3_000_000

    async def main() -> None:
        async with serving(world, slots=4, cache_memory_bytes=budget) as (http, service):
            limit = service.engine.max_length
            assert 256 < limit < 2048
            fitting = ask("base", max_tokens=limit - 100, ignore_eos=True)
            assert (await http.post("/v1/chat/completions", json=fitting)).status_code == 200
            assert budget * 0.9 < service.engine.stats().cache_bytes <= budget
            long = await http.post("/v1/chat/completions", json=ask("base", max_tokens=limit))
            assert long.status_code == 400 and f"at most {limit} fit" in long.json()["error"]["message"]

    asyncio.run(main())
    with pytest.raises(ValueError, match=r"run\.cache_memory_bytes"):
        Service(world.base, world.store, world.settings(cache_memory_bytes=budget, max_length=2048))

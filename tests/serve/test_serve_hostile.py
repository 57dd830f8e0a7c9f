"""Any body and any name: an answer or a refusal in OpenAI's form, never a failure of the server."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.schema import NEUTRAL, WITHOUT_EFFECT
from tests.serving import make_document, make_world, serving

NAMES = st.text(max_size=12).map(lambda text: f"base:{text}")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["base", "base:d0", "user", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=40)}), max_size=3
)
PARAMETERS = [
    *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "stream", "stream_options", "ignore_eos"),
    *("prompt", *NEUTRAL, *WITHOUT_EFFECT, "n", "logprobs", "top_logprobs", "echo", "tools", "tool_choice", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "best_of", "response_format"),
]
BODIES = st.builds(
    lambda model, messages, others: {"model": model, "messages": messages, **others},
    st.sampled_from(["base", "base:d0", "base:edited"]) | NAMES | VALUES,
    MESSAGES | VALUES,
    st.dictionaries(st.sampled_from(PARAMETERS), VALUES, max_size=3),
)


class Server:
    """The application behind plain calls, for tests that hypothesis drives."""

    def __init__(self, runner: asyncio.Runner, client: httpx.AsyncClient) -> None:
        self._runner = runner
        self._client = client

    def __call__(self, method: str, path: str, **content: Any) -> httpx.Response:
        response = self._runner.run(self._client.request(method, path, **content))
        if response.status_code >= 400:
            assert 400 <= response.status_code < 500, response.text
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        return response


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    world = make_world(tmp_path_factory.mktemp("store"), ["d0"])
    world.store.put([make_document("edited", "No adapter yet.")])
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client, _ = runner.run(stack.enter_async_context(serving(world, default_max_tokens=3, max_length=256)))
        yield Server(runner, client)
        runner.run(stack.aclose())


LIMITED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LIMITED
@given(body=BODIES, path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
def test_any_json_body(server: Server, body: dict[str, Any], path: str) -> None:
    response = server("POST", path, content=json.dumps(body))
    if response.status_code == 200 and "text/event-stream" not in response.headers["content-type"]:
        assert response.json()["choices"][0]["finish_reason"] in ("stop", "length")


@LIMITED
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes(server: Server, content: bytes) -> None:
    assert server("POST", "/v1/chat/completions", content=content).status_code == 400


@LIMITED
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), chat=st.booleans())
def test_any_text_is_answered(server: Server, text: str, chat: bool) -> None:
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    for model in ("base:d0", "base:edited"):
        response = server("POST", path, json={"model": model, "max_tokens": 2, "temperature": 1, **body})
        assert response.status_code == 200 or response.json()["error"]["code"] == "context_length_exceeded"


@LIMITED
@given(name=st.text(max_size=30), limit=st.text(max_size=4) | st.integers().map(str), after=st.none() | NAMES)
def test_any_query_and_path(server: Server, name: str, limit: str, after: str | None) -> None:
    def encoded(text: str) -> str:
        return quote(text, safe="", errors="surrogatepass")

    assert server("GET", f"/v1/models/{encoded(name)}").status_code in (200, 404)
    query = f"prefix={encoded(name)}&limit={encoded(limit)}" + ("" if after is None else f"&after={encoded(after)}")
    assert server("GET", f"/v1/models?{query}").status_code in (200, 400)

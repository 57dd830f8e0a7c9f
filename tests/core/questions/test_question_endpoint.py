"""Questions from an endpoint that is slow, faulty, refusing or gone; kills, keys and threads."""

import asyncio
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pydantic import ValidationError

from core.config import fingerprint
from core.questions.chat_endpoint import retry_after_s
from core.questions.endpoint import EndpointSettings
from core.questions.stream import Failure, QuestionStream, QuestionWriter, ReplyCache
from core.text.documents import Document
from tests.places import ROOT
from tests.questions import document, split

# The endpoint: a real server whose faults follow from the sentence that it is asked about

TIMEOUT_S = 3.0
"""Of a request: longer than a busy machine leaves a server of this process without a turn."""
DELAY_S = 0.1


def fault_of(target: str) -> str:
    """20 % bad JSON and 5 % time-outs for good, 3 % refusals; 15 % that pass at the second try."""
    number = zlib.crc32(target.encode()) % 100
    bounds = [(20, "bad_reply"), (25, "timeout"), (28, "refused"), (36, "429 once"), (40, "500 once"), (43, "bad reply once")]
    return next((name for bound, name in bounds if number < bound), "")


def completion(content: str | None, **message: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": "stop"}], "usage": usage}


def good_reply(target: str) -> dict[str, Any]:
    pair = {"question": f"What does “{target[:-1]}” say?", "answer": target.split()[-1], "evidence": target}
    return completion(json.dumps({"pairs": [pair]}))


Handler = Callable[["Server", dict[str, Any], str], Awaitable[tuple[int, dict[str, str], Any] | None]]


class Server:
    """Answers `/v1/chat/completions` by `handler`; counts what it was asked and what it answered, by sentence."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.headers: list[dict[bytes, bytes]] = []
        self.held = threading.Event()
        self.most_at_once = self.at_once = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["path"] == "/v1/chat/completions"
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        body = json.loads(raw)
        target = body["messages"][1]["content"].rpartition("The sentence:\n")[2]
        self.asked[target] += 1
        self.headers.append(dict(scope["headers"]))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        answer = await self.handler(self, body, target)
        self.at_once -= 1
        if answer is None:
            return
        self.answered[target] += 1
        status, headers, value = answer
        content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        pairs = [(b"content-length", str(len(content)).encode()), *((k.encode(), v.encode()) for k, v in headers.items())]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": content})


@contextmanager
def serving(handler: Handler) -> Iterator[tuple[Server, str]]:
    """A server on a free port of this machine, and its URL."""
    app = Server(handler)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield app, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            app.held.set()
            thread.join()


def endpoint(url: str, **fields: Any) -> EndpointSettings:
    run = {"url": url, "in_flight": 16, "timeout_s": 10, "retries": 2, "bad_reply_retries": 1, "backoff_s": 0.01}
    run |= fields.pop("run", {})
    return EndpointSettings.model_validate({"model": "m", "run": run} | fields)


def numbered(count: int, name: str = "d") -> Document:
    return document("\n".join(f"- Entry {i} of list {name} holds value {i * 37 % 101}." for i in range(count)), name=name)


async def answer_at_once(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
    return 200, {}, good_reply(target)


async def slow_and_faulty(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any] | None:
    fault, first = fault_of(target), server.asked[target] == 1
    if fault == "timeout":
        await asyncio.sleep(TIMEOUT_S + 0.5)
        return None
    await asyncio.sleep(DELAY_S)
    if fault == "bad_reply" or (fault == "bad reply once" and first):
        return 200, {}, completion('{"pairs": [{"question": "Why')
    if fault == "refused":
        return 200, {}, completion(None, refusal="I cannot help with that.")
    if fault == "429 once" and first:
        return 429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}
    if fault == "500 once" and first:
        return 500, {}, "oops"
    return 200, {}, good_reply(target)


def test_a_slow_and_faulty_endpoint_costs_exactly_the_failed_pairs() -> None:
    """8 documents of 25 sentences, trained on while they are asked about: neither waits for the other."""
    documents = [numbered(25, f"d{i}") for i in range(8)]
    targets = {d.name: split(d.text) for d in documents}
    faults = {target: fault_of(target) for each in targets.values() for target in each}
    assert Counter(faults.values()).keys() >= {"bad_reply", "timeout", "refused", "429 once", "500 once", "bad reply once", ""}
    trained_while_asking = 0
    run = {"timeout_s": TIMEOUT_S, "retries": 1, "patience_s": 0.2}
    with serving(slow_and_faulty) as (server, url), QuestionWriter(endpoint(url, run=run)) as writer:
        streams = {d.name: writer.write(d) for d in documents}
        trained: dict[str, list[str]] = {name: [] for name in streams}
        while not all(stream.finished for stream in streams.values()):
            for name, stream in streams.items():
                pairs = stream.poll()
                assert [p.start for p in pairs] == sorted(p.start for p in pairs)
                trained[name] += [pair.evidence for pair in pairs]
                asked = server.asked.total()
                time.sleep(0.015 * len(pairs))
                trained_while_asking += server.asked.total() > asked
            time.sleep(0.005)
        usage = writer.usage
    for name, stream in streams.items():
        lost = {target: faults[target] for target in targets[name] if faults[target] in ("bad_reply", "timeout", "refused")}
        assert sorted(trained[name]) == sorted(set(targets[name]) - lost.keys())
        text = next(d.text for d in documents if d.name == name)
        assert [(text[f.start : f.end], f.reason) for f in stream.failures] == list(lost.items())
    assert trained_while_asking > 0 and server.most_at_once >= 16, "the endpoint is asked while its pairs are trained on"
    assert server.most_at_once <= 16 + sum(fault == "timeout" for fault in faults.values()), "time-outs linger in the server"
    assert usage.refused == sum(fault == "refused" for fault in faults.values())
    assert usage.requests == sum(server.asked.values())
    two_tries = {"429 once", "500 once", "bad reply once", "bad_reply", "timeout"}
    assert server.asked == {target: 2 if fault in two_tries else 1 for target, fault in faults.items()}
    with_tokens = sum(server.answered[t] for t in faults) - sum(fault in ("429 once", "500 once") for fault in faults.values())
    assert (usage.prompt_tokens, usage.completion_tokens) == (7 * with_tokens, 3 * with_tokens)


def test_first_documents_come_first_within_the_bound() -> None:
    order: list[str] = []

    async def record(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
        order.append(target)
        await asyncio.sleep(0.02)
        return 200, {}, good_reply(target)

    documents = [numbered(12, f"d{i}") for i in range(3)]
    with serving(record) as (server, url), QuestionWriter(endpoint(url, run={"in_flight": 4})) as writer:
        streams = [writer.write(d) for d in documents]
        assert all(len(stream.result(20)) == 12 for stream in streams)
    expected = [target for d in documents for target in split(d.text)]
    assert server.most_at_once == 4
    assert all(abs(order.index(target) - place) < 4 for place, target in enumerate(expected))


def test_pairs_wait_for_earlier_ones_no_longer_than_patience() -> None:
    async def hold_first(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
        while target.startswith("Entry 0 ") and not server.held.is_set():
            await asyncio.sleep(0.01)
        return 200, {}, good_reply(target)

    def arrived(stream: QuestionStream, count: int) -> list[str]:
        evidence: list[str] = []
        deadline = time.monotonic() + 10
        while len(evidence) < count and time.monotonic() < deadline:
            evidence += [pair.evidence for pair in stream.poll()]
            time.sleep(0.01)
        return evidence

    expected = split(numbered(4).text)
    for patience_s, held_back in ((60, True), (0, False)):
        run = {"patience_s": patience_s}
        with serving(hold_first) as (server, url), QuestionWriter(endpoint(url, run=run)) as writer:
            stream = writer.write(numbered(4))
            while server.answered.total() < 3:
                time.sleep(0.01)
            first = [] if held_back else arrived(stream, 3)
            if held_back:
                time.sleep(0.1)
                assert stream.poll() == []
            assert not stream.finished
            with pytest.raises(TimeoutError, match="1 of 4 passages"):
                stream.result(0.01)
            server.held.set()
            assert first + arrived(stream, 4 - len(first)) == (expected if held_back else [*expected[1:], expected[0]])
            assert stream.finished and stream.poll() == []
            assert [pair.evidence for pair in stream.result()] == expected


CHILD = """
import sys
from pathlib import Path
from core.text.documents import Document
from core.questions.endpoint import EndpointSettings
from core.questions.stream import QuestionWriter
settings = EndpointSettings.model_validate_json(sys.argv[1])
document = Document(tenant="t", collection="c", name="d", text=Path(sys.argv[3]).read_text())
with QuestionWriter(settings, Path(sys.argv[2])) as writer:
    writer.write(document).result()
"""


def test_a_killed_job_asks_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    source = numbered(60)
    targets = split(source.text)
    refused = {target for target in targets if fault_of(target) == "refused"} | {targets[3]}

    async def stall_after_30(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any] | None:
        if server.answered.total() + server.at_once > 30 and not server.held.is_set():
            while not server.held.is_set():
                await asyncio.sleep(0.01)
            return None
        if target in refused:
            return 200, {}, completion(None, refusal="no")
        return 200, {}, good_reply(target)

    cache, text_path = tmp_path / "cache" / "questions.sqlite", tmp_path / "text"
    text_path.write_text(source.text)
    with serving(stall_after_30) as (server, url):
        settings = endpoint(url, run={"in_flight": 8})
        command = [sys.executable, "-c", textwrap.dedent(CHILD), settings.model_dump_json(), str(cache), str(text_path)]
        child = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 60
        while committed(cache) < 30 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        done = dict(server.answered)
        assert len(done) == 30 == committed(cache)
        server.held.set()
        while server.at_once:
            time.sleep(0.01)
        with QuestionWriter(settings, cache) as writer:
            stream = writer.write(source)
            pairs = stream.result(30)
            assert writer.usage.cached == 30 and writer.usage.requests == 30
        assert [pair.evidence for pair in pairs] == [target for target in targets if target not in refused]
        assert [source.text[f.start : f.end] for f in stream.failures] == [target for target in targets if target in refused]
        assert server.answered == dict.fromkeys(targets, 1), "answered twice, or never"
        assert all(server.asked[target] == 1 for target in done)

        with QuestionWriter(settings, cache) as writer:
            assert writer.write(source).result(30) == pairs and writer.usage.requests == 0
        again = endpoint(url, run={"ask_failed_again": True})
        with QuestionWriter(again, cache) as writer:
            assert writer.write(source).result(30) == pairs
        assert server.answered == {target: 1 + (target in refused) for target in targets}


def committed(cache: Path) -> int:
    if not cache.exists():
        return 0
    database = sqlite3.connect(f"file:{cache}?mode=ro", uri=True)
    try:
        return int(database.execute("SELECT count(*) FROM replies").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        database.close()


def test_the_cache_shares_passages_within_a_tenant_and_erases(tmp_path: Path) -> None:
    with serving(answer_at_once) as (server, url):
        with QuestionWriter(endpoint(url), tmp_path / "cache") as writer:
            streams = [writer.write(d) for d in (numbered(5), numbered(5), numbered(5))]
            assert len({tuple(stream.result(10)) for stream in streams}) == 1 and server.asked.total() == 5
            other = document(numbered(5).text, tenant="other")
            assert writer.write(other).result(10) and server.asked.total() == 10
        cache = ReplyCache(tmp_path / "cache")
        assert cache.erase("t", numbered(5).content_hash) == 5
        cache.close()
        with QuestionWriter(endpoint(url), tmp_path / "cache") as writer:
            assert writer.write(other).result(10) and server.asked.total() == 10
        with QuestionWriter(endpoint(url, temperature=0), tmp_path / "cache") as writer:
            assert writer.write(other).result(10) and server.asked.total() == 15
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(ValueError, match="cannot be used as a cache"):
        ReplyCache(tmp_path / "text")


def test_replies_are_checked() -> None:
    text = "Mira lives  in\nVess. Orlan paints doors. Nobody knows why."

    async def mixed(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
        pair = {"question": "Where does Mira live?", "answer": "Vess", "evidence": "lives in Vess."}
        bad = [pair | {"answer": " "}, pair | {"evidence": "lives in Rome"}, pair | {"question": "q" * 501}]
        if target.startswith("Mira"):
            return 200, {}, completion("<think>{hm}</think>Sure:\n```json\n" + json.dumps({"pairs": [*bad, pair]}) + "\n```")
        return 200, {}, completion(json.dumps({"pairs": bad if target.startswith("Orlan") else []}))

    with serving(mixed) as (server, url), QuestionWriter(endpoint(url, pairs=2)) as writer:
        stream = writer.write(document(text))
        (pair,) = stream.result(10)
        assert (pair.question, pair.answer, pair.kind, pair.start) == ("Where does Mira live?", "Vess", "written", 0)
        assert [failure.reason for failure in stream.failures] == ["unsupported"]
        assert server.asked.total() == 1 + 2 + 1 and writer.usage.pairs_dropped == 3 + 2 * 3


def test_a_server_without_structured_output_is_asked_for_json_in_words() -> None:
    async def plain(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
        if "response_format" in body:
            schema = body["response_format"]["json_schema"]["schema"]
            assert schema["required"] == ["pairs"] and schema["additionalProperties"] is False
            return 400, {}, {"error": {"message": "response_format is not supported"}}
        return 200, {}, good_reply(target)

    with serving(plain) as (server, url), QuestionWriter(endpoint(url, run={"in_flight": 1})) as writer:
        assert len(writer.write(numbered(5)).result(10)) == 5 and server.asked.total() == 6


def test_windows_are_asked_as_a_whole() -> None:
    seen: list[str] = []

    async def window(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
        seen.append(passage := body["messages"][1]["content"].rpartition("The passage:\n")[2])
        evidence = passage.splitlines()[-1]
        return 200, {}, completion(json.dumps({"pairs": [{"question": "Last?", "answer": "it", "evidence": evidence}]}))

    settings = {"unit": "window", "windows": 4, "pairs": 1}
    with serving(window) as (_, url), QuestionWriter(endpoint(url, **settings)) as writer:
        pairs = writer.write(numbered(30)).result(10)
    assert len(pairs) == 4 == len(set(seen)) and all(len(split(passage)) == 16 for passage in seen)


# Keys


SECRET = "sk-do-not-show-93c1"


def test_the_key_goes_into_the_header_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def tell(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
        return 418, {}, {"error": f"no tea with Authorization: Bearer {SECRET}"}

    monkeypatch.setenv("THE_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with serving(tell) as (server, url):
        settings = endpoint(url, run={"api_key_variable": "THE_KEY"})
        with QuestionWriter(settings, tmp_path / "cache") as writer:
            stream = writer.write(numbered(2))
            assert stream.result(10) == []
            shown = [repr(vars(writer)), repr(writer), settings.model_dump_json(), str(stream.failures), caplog.text]
        assert all(headers[b"authorization"].decode() == f"Bearer {SECRET}" for headers in server.headers)
    assert {f.reason for f in stream.failures} == {"rejected"} and "no tea" in stream.failures[0].detail
    stored = [path.read_bytes().decode(errors="replace") for path in tmp_path.iterdir()]
    assert not any(SECRET in text for text in shown + stored)


def test_keys_and_urls_that_cannot_be_used_are_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, wanted in (("", "is not set"), (f"{SECRET}\nX-Evil: 1", "does not hold a key"), (f"{SECRET}é", "does not hold")):
        monkeypatch.setenv("THE_KEY", value)
        with pytest.raises(ValueError, match=f"THE_KEY {wanted}") as caught:
            QuestionWriter(endpoint("http://127.0.0.1:9/v1", run={"api_key_variable": "THE_KEY"}))
        assert SECRET not in str(caught.value)
    for url in (f"http://user:{SECRET}@host/v1", f"http://host/v1?key={SECRET}", "ftp://host", "host", "http://host:x/v1"):
        with pytest.raises(ValidationError, match="without user, password or query") as invalid:
            endpoint(url)
        assert SECRET not in str(invalid.value)
    with pytest.raises(ValidationError):
        endpoint("http://host/v1", run={"api_key_variable": SECRET})


def test_a_wrong_key_stops_asking_and_is_not_held_against_the_passages(tmp_path: Path) -> None:
    async def deny(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any]:
        return (200, {}, good_reply(target)) if server.held.is_set() else (401, {}, {"error": "wrong key"})

    with serving(deny) as (server, url):
        with QuestionWriter(endpoint(url), tmp_path / "cache") as writer:
            stream = writer.write(numbered(80))
            assert stream.result(20) == []
        assert {f.reason for f in stream.failures} == {"endpoint"} and len(stream.failures) == 80
        assert "401: check the key" in stream.failures[0].detail
        assert server.asked.total() <= 32
        server.held.set()
        with QuestionWriter(endpoint(url), tmp_path / "cache") as writer:
            assert len(writer.write(numbered(80)).result(20)) == 80


# Ends


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "question-writer"]


def test_closing_and_cancelling_end_every_stream_and_the_thread() -> None:
    async def hang(server: Server, body: dict[str, Any], target: str) -> tuple[int, dict[str, str], Any] | None:
        while not server.held.is_set():
            await asyncio.sleep(0.01)
        return None

    with serving(hang) as (server, url):
        writer = QuestionWriter(endpoint(url, run={"in_flight": 2}))
        assert len(writer_threads()) == 1
        first, second = writer.write(numbered(5, "a")), writer.write(numbered(5, "b"))
        while server.at_once < 2:
            time.sleep(0.01)
        first.cancel()
        assert first.finished and [f.reason for f in first.failures] == ["cancelled"] * 5 and not second.finished
        started = time.monotonic()
        writer.close()
        writer.close()
        assert time.monotonic() - started < 5 and writer_threads() == []
        assert second.finished and {f.reason for f in second.failures} == {"cancelled"}
        with pytest.raises(ValueError, match="closed"):
            writer.write(numbered(1))


def test_no_server_costs_the_pairs_and_a_text_without_words_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with QuestionWriter(endpoint(url)) as writer:
        stream, empty = writer.write(numbered(2)), writer.write(document("..."))
        assert stream.result(10) == [] and empty.finished and empty.result() == []
    assert [f[2:] for f in stream.failures] == [("connection", "ConnectError")] * 2
    assert isinstance(stream.failures[0], Failure)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_our_own_reaches_the_trainer(tmp_path: Path) -> None:
    with serving(answer_at_once) as (_, url):
        writer = QuestionWriter(endpoint(url), tmp_path / "cache")
        other = sqlite3.connect(tmp_path / "cache")
        other.execute("DROP TABLE replies")
        other.close()
        stream = writer.write(numbered(3))
        with pytest.raises(RuntimeError, match="no such table: replies"):
            stream.result(10)
        with pytest.raises(RuntimeError, match="no such table"):
            stream.poll()
        writer.close()
    assert writer_threads() == []


def test_only_what_changes_the_questions_bears_identity() -> None:
    base = EndpointSettings(model="m")
    assert fingerprint(base) == fingerprint(endpoint("http://elsewhere/v1")) != fingerprint(EndpointSettings(model="n"))
    assert base.run.in_flight == 64 and base.run.retries == 4 and base.pairs == 10 and base.context_characters == 2048


def test_retry_after() -> None:
    assert retry_after_s("12") == 12 and retry_after_s("") == 0 == retry_after_s("soon") == retry_after_s("-1")
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert 50 < retry_after_s(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60


def test_asking_needs_no_torch() -> None:
    check = "import sys, core.questions.stream; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'pipelines')))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=os.environ).returncode == 0

"""The judge on a real HTTP endpoint: verdicts, retries, and what it never says."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from core.questions.chat_endpoint import EndpointRun
from pipelines.evaluation.judge import Claim, JudgeSettings, judge, request_body, verdict

CLAIMS = [Claim("Who?", ("Anna",), "Anna"), Claim("Who?", ("Anna",), "Boris"), Claim("Who?", ("Anna",), "")]


@contextmanager
def endpoint(replies: list[tuple[int, str]], finish_reason: str = "stop") -> Iterator[tuple[str, list[Any]]]:
    """Answers by turns; gives its url and what it was sent."""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, content = replies[min(len(received), len(replies)) - 1]
            body = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish_reason}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def settings(url: str, **run: Any) -> JudgeSettings:
    return JudgeSettings(model="m", run=EndpointRun(url=url, backoff_s=0.001, **{"in_flight": 1, **run}))


def test_verdicts_stand_in_the_order_of_the_claims() -> None:
    with endpoint([(200, "The same: yes."), (200, "No, not yes but\nno"), (200, "hm")]) as (url, received):
        assert judge(CLAIMS, settings(url)) == [True, False, None]
    assert [body["temperature"] for body in received] == [0, 0, 0]


def test_a_busy_judge_is_asked_again_and_a_broken_one_gives_none() -> None:
    with endpoint([(429, ""), (503, ""), (200, "yes")]) as (url, received):
        assert judge(CLAIMS[:1], settings(url)) == [True]
        assert len(received) == 3
    with endpoint([(500, "")]) as (url, received):
        assert judge(CLAIMS[:1], settings(url, retries=1)) == [None]
        assert len(received) == 2
    with endpoint([(400, "")]) as (url, _):
        assert judge(CLAIMS[:1], settings(url)) == [None]


def test_what_was_only_thought_or_cut_off_is_no_verdict() -> None:
    with endpoint([(200, "<think>Surely yes.</think>I cannot tell.")]) as (url, _):
        assert judge(CLAIMS[:1], settings(url)) == [None]
    with endpoint([(200, "There is no")], "length") as (url, _):
        assert judge(CLAIMS[:1], settings(url)) == [None]


def test_many_claims_are_judged_at_once() -> None:
    with endpoint([(200, "yes")]) as (url, received):
        assert judge(CLAIMS * 20, settings(url, in_flight=8)) == [True] * 60
    assert len(received) == 60


def test_a_wrong_key_ends_it_with_a_word() -> None:
    with endpoint([(401, "")]) as (url, _), pytest.raises(ValueError, match="HTTP 401: check the key"):
        judge(CLAIMS, settings(url))


def test_the_judge_sees_question_answers_and_claim() -> None:
    body = request_body(Claim("Who?", ("Anna", "A."), ""), settings("http://x"))
    assert all(part in body["messages"][0]["content"] for part in ("Who?", "- Anna\n- A.", "(none)"))


def test_the_last_word_counts() -> None:
    assert verdict("yes, or rather no") is False and verdict("NO? Yes!") is True and verdict("nobody, yesterday") is None

"""`imprint ask` at addresses where something else answers, or nothing."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serve.asking import Said, ask_server

ANSWER = {"choices": [{"message": {"content": " granite\n"}}], "imprint": {"source": "adapter"}}


@contextmanager
def answering(status: int, content: bytes, kind: str = "application/json") -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A web server that says one thing; what it was asked."""
    asked: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (200, b"<html>Hello</html>", "text/html"),
        (200, b"", "text/plain"),
        (404, b"Not Found", "text/plain; charset=utf-8"),
        (502, b"<html>Bad Gateway</html>", "text/html"),
        (404, b'{"detail": "Not Found"}', "application/json"),
        (404, b'{"error": "no"}', "application/json"),
        (200, b'{"choices": []}', "application/json"),
        (200, b'{"choices": [{"message": {"content": null}}]}', "application/json"),
        (200, b'{"choices": [{"message": {"content": "of another server"}}]}', "application/json"),
        (200, b"[1]", "application/json"),
        (200, b"\xff\xfe", "application/json"),
    ],
)
def test_another_web_server_is_named_as_such(status: int, content: bytes, kind: str) -> None:
    with answering(status, content, kind) as (url, _), pytest.raises(ValueError, match="no Imprint server") as told:
        ask_server(url, "Who?")
    assert url in str(told.value) and f"status {status}" in str(told.value) and kind.partition(";")[0] in str(told.value)


def test_no_server_at_all() -> None:
    for url in ("http://127.0.0.1:9", "127.0.0.1:9", "http://no-such-host.invalid", "http://[", "ftp://127.0.0.1"):
        with pytest.raises(ValueError, match="imprint serve"):
            ask_server(url, "Who?")


def test_a_servers_own_words_are_given() -> None:
    error = {"error": {"message": "there is no model", "type": "x", "param": None, "code": None}}
    with answering(404, json.dumps(error).encode()) as (url, _), pytest.raises(ValueError, match=r"^there is no model$"):
        ask_server(url, "Who?")


def test_the_document_is_named_as_it_is_and_the_address_as_it_was_printed() -> None:
    with answering(200, json.dumps(ANSWER).encode()) as (url, asked):
        for address in (url, url + "/", url + "/v1", url + "/v1/"):
            assert ask_server(address, "Who?", "base:a/b 100%", "x:y") == Said("granite", "adapter")
    assert {path for path, _ in asked} == {"/v1/chat/completions"}
    assert json.loads(asked[0][1])["model"] == "base:x%3Ay/a%2Fb%20100%25"

"""An S3 server for tests, and a proxy before it that fails as networks and servers do.

The server is moto's, in a process of its own: it speaks the protocol and enforces conditional writes, but checks no signature,
keeps nothing on disk and is no proof of what a real server does when many write at once. That one of many conditional writers
wins is therefore the proxy's doing: it passes them on one by one, as if they were atomic.

In the slow suite tests that are marked `EVERY_SERVER`, or use `ceph_bucket`, run on Ceph (`tests.ceph`) as well, which does all
that itself: the proxy before it only injects faults.
"""

import hashlib
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import pytest

from tests.ceph import Ceph

_buckets = itertools.count(1)


@dataclass(frozen=True)
class Fault:
    """What befalls one request: an error for an answer, a cut connection, a delay, or a changed byte in its body.

    `applied`: the server has done what was asked before that. `sent`: the share of its answer's body that arrives before the cut.
    """

    kind: Literal["error", "cut", "delay", "damage"]
    status: int = 0
    code: str = ""
    message: str = "a fault of the test"
    applied: bool = False
    sent: float | None = None
    delay_s: float = 0


SLOW_DOWN = Fault("error", 503, "SlowDown")
INTERNAL_ERROR = Fault("error", 500, "InternalError", message="")  # as Ceph has it
INTERNAL_ERROR_APPLIED = Fault("error", 500, "InternalError", applied=True)
MISMATCH = Fault("error", 400, "XAmzContentSHA256Mismatch", message="")  # so AWS and Ceph call a changed body over plain HTTP
EXPIRED = Fault("error", 400, "ExpiredToken")
DENIED = Fault("error", 403, "AccessDenied")
CUT_BEFORE = Fault("cut")
CUT_AFTER = Fault("cut", applied=True)
CUT_WITHIN = Fault("cut", applied=True, sent=0.5)
DELAY = Fault("delay", delay_s=0.05)
DAMAGE = Fault("damage")
PASSING = (SLOW_DOWN, INTERNAL_ERROR, INTERNAL_ERROR_APPLIED, MISMATCH, CUT_BEFORE, CUT_AFTER, CUT_WITHIN, DELAY, DAMAGE)


EVERY_SERVER = pytest.mark.parametrize("proxy", ["moto", pytest.param("ceph", marks=pytest.mark.slow)], indirect=True)
STORAGE = ["file", pytest.param("bucket", id="s3"), pytest.param("ceph_bucket", id="ceph", marks=pytest.mark.slow)]


class Asked(NamedTuple):
    """A request that reached the proxy, the access key that signed it, and what befell it."""

    method: str
    path: str
    range: str | None
    access_key: str
    fault: Fault | None


class FaultProxy:
    """An HTTP proxy before one server, in threads of this process.

    Each request meets the next fault of `script` whose method is its own, or with probability `rate` one of `PASSING`. Before
    moto it does what moto leaves out: it passes conditional writes on one by one, checks the MD5 of a body, and lists no more
    than `page_names` names at a time, which changes what was signed; or, if `careless`, takes the conditions off all writes.
    """

    def __init__(self, server: str, moto: bool) -> None:
        host, _, port = server.removeprefix("http://").partition(":")
        self.upstream = (host, int(port))
        self.server, self.moto = server, moto
        self.conditional = threading.Lock()
        self._lock = threading.Lock()
        self.reset()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def reset(self, rate: float = 0, seed: int = 0, page_names: int | None = None, careless: bool = False) -> None:
        """No script, nothing counted, and faults at another rate."""
        with self._lock:
            self.rate, self._random, self.page_names, self.careless = rate, Random(seed), page_names, careless
            self.asked: list[Asked] = []
            self._script: deque[tuple[str, Fault | None]] = deque()

    def script(self, method: str, *faults: Fault | None) -> None:
        """What befalls the next requests of a method, one after another; None is nothing."""
        with self._lock:
            self._script.extend((method, fault) for fault in faults)

    @property
    def faults(self) -> list[Fault]:
        return [each.fault for each in self.asked if each.fault]

    def next_fault(self, method: str, path: str, byte_range: str | None, access_key: str) -> Fault | None:
        with self._lock:
            scripted = next((each for each in self._script if each[0] == method), None)
            if scripted:
                self._script.remove(scripted)
            drawn = self._random.choice(PASSING) if self._random.random() < self.rate else None
            fault = scripted[1] if scripted else drawn
            self.asked.append(Asked(method, path, byte_range, access_key, fault))
            return fault

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Server
    _connection: HTTPConnection | None = None

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        access_key = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        fault = self.server.proxy.next_fault(self.command, self.path, self.headers.get("Range"), access_key)
        if fault and fault.kind == "damage" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        digest = b64encode(hashlib.md5(body).digest()).decode()
        if self.server.proxy.moto and self.headers.get("Content-MD5", digest) != digest:
            return self._answer_error(400, "BadDigest", "")
        if fault:
            time.sleep(fault.delay_s)
        if fault is None or fault.kind in ("delay", "damage") or fault.applied:
            answer, data = self._pass_on(body)
        if fault is None or fault.kind in ("delay", "damage"):
            self._answer(answer.status, answer.getheaders(), data, len(data))
        elif fault.kind == "error":
            self._answer_error(fault.status, fault.code, fault.message)
        else:
            self.close_connection = True
            if fault.sent is not None and data:
                self._answer(answer.status, answer.getheaders(), data, int(fault.sent * len(data)))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _pass_on(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        left_out = {"connection", "expect"} | ({"if-none-match"} if self.server.proxy.careless else set())
        headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
        if not self.server.proxy.moto or ("If-None-Match" not in self.headers and "If-Match" not in self.headers):
            return self._ask(body, headers)
        with self.server.proxy.conditional:
            return self._ask(body, headers)

    def _ask(self, body: bytes, headers: dict[str, str]) -> tuple[HTTPResponse, bytes]:
        self._connection = self._connection or HTTPConnection(*self.server.proxy.upstream, timeout=60)
        try:
            names = self.server.proxy.page_names if self.server.proxy.moto else None
            path = f"{self.path}&max-keys={names}" if names and "list-type=2" in self.path else self.path
            self._connection.request(self.command, path, body, headers)
            answer = self._connection.getresponse()
            return answer, answer.read()
        except (OSError, HTTPException):
            self._connection.close()
            raise

    def _answer_error(self, status: int, code: str, message: str) -> None:
        xml = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self._answer(status, [("Content-Length", str(len(xml)))], b"" if self.command == "HEAD" else xml, len(xml))

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, sent: int) -> None:
        self.send_response_only(status)
        own = {"connection", "transfer-encoding"}
        for name, value in headers:
            if name.lower() not in own:
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:sent])
        self.wfile.flush()

    def finish(self) -> None:
        if self._connection:
            self._connection.close()
        super().finish()


def environment(endpoint: str, access_key: str = "test", secret_key: str = "not-a-secret-of-anyone") -> dict[str, str]:
    """What a process needs in its environment to reach a test's server, and nothing else of AWS'."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


def admin(endpoint: str, access_key: str = "test", secret_key: str = "not-a-secret-of-anyone") -> Any:
    """A botocore client for what a store never does: making buckets, switching versions on, looking around."""
    from botocore.session import Session

    return Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of moto's server, which all tests of a run share. Starts in about 2 s."""
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=log.parent)
    try:
        yield _wait_for_url(log, process)
    finally:
        process.kill()
        process.wait()


def _wait_for_url(log: Path, process: subprocess.Popen[bytes]) -> str:
    for _ in range(1200):
        if match := re.search(r"Running on (http://127\.0\.0\.1:(\d+))", log.read_text()):
            with socket.create_connection(("127.0.0.1", int(match[2])), timeout=10):
                return match[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"moto's server does not start: {log.read_text()}")


@pytest.fixture(scope="session")
def moto_proxy(s3_server: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(s3_server, moto=True)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """The server of Ceph that all slow tests of a run share; whoever kills a part of it starts it again."""
    environ = environment("")
    server = Ceph(tmp_path_factory.mktemp("ceph"), environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"])
    yield server
    server.close()


@pytest.fixture(scope="session")
def ceph_proxy(ceph: Ceph) -> Iterator[FaultProxy]:
    proxy = FaultProxy(ceph.url, moto=False)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> FaultProxy:
    """The proxy before moto's server, or before Ceph in a test for `EVERY_SERVER`, without faults until a test asks for some."""
    proxy = request.getfixturevalue(f"{getattr(request, 'param', 'moto')}_proxy")
    proxy.reset()
    return proxy


@pytest.fixture
def s3_admin(proxy: FaultProxy) -> Any:
    return admin(proxy.server)


@pytest.fixture
def bucket(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket, which `s3://` URLs reach through the proxy while the test runs."""
    return _new_bucket(proxy, monkeypatch)


@pytest.fixture
def ceph_bucket(ceph_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `bucket`, on Ceph."""
    ceph_proxy.reset()
    return _new_bucket(ceph_proxy, monkeypatch)


def _new_bucket(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"bucket-{next(_buckets)}"
    admin(proxy.server).create_bucket(Bucket=name)
    for key, value in environment(proxy.url).items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    return name

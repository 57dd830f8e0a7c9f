"""A stand-in for the language model that writes questions: an OpenAI-compatible endpoint for the benchmarks, and no model at all.

In: what question writing sends, a sentence with the text before it. Out: up to as many question-answer pairs as asked for. It
knows the reference world's English as a language model knows English: it recognises what a sentence states by the patterns of
`world_lexicon`, and asks in the phrasings of the training split, never in those held out for the test. It has neither the
document nor its test questions; what it cannot read it writes nothing about. A fact that takes two sentences is asked for with
the later of them, where the earlier stands in the text before.

It can be slow and faulty on purpose: `delay_s` before each reply, a share of replies that are no JSON, a share of requests that
never get an answer. Faults follow from the seed, the request and how often it came. GET /record says what was asked and answered.
It runs in a thread, or in a process of its own, so that it takes no time from the process that is measured.
"""

import hashlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import httpx

from benchmarks.record import ROOT
from core.text.sentences import sentences
from pipelines.world import lexicon
from pipelines.world.lexicon import Attribute, Link

_NAME = r"[A-Z][a-z]+"
_MOST_PAIRS = re.compile(r"up to (\d+) questions")


@dataclass(frozen=True)
class Manners:
    """How the endpoint behaves. hang_s: how long a request that gets no answer is held."""

    delay_s: float = 0.0
    bad_json: float = 0.0
    silent: float = 0.0
    hang_s: float = 5.0
    seed: int = 0


class Fact(NamedTuple):
    """What a sentence states: of whom, which topic, the value; `relation` where it names the second entity instead."""

    topic: Attribute | Link
    name: str
    value: str
    relation: bool = False


@cache
def _patterns() -> list[tuple[re.Pattern[str], Attribute | Link, bool]]:
    """One pattern for each way to state a topic; a relation's value is the second entity."""
    patterns = []
    for kind in lexicon.KINDS:
        for topic in kind.topics:
            values = "|".join(map(re.escape, lexicon.VALUES[topic.values]))
            for statement in topic.statements:
                patterns.append((_pattern(statement, values), topic, False))
            if isinstance(topic, Link):
                for relation in topic.relations:
                    patterns.append((_pattern(relation, values), topic, True))
    return patterns


def _pattern(statement: str, values: str) -> re.Pattern[str]:
    second = "{n}" in statement and "{s}" in statement
    holes = {"{v}": f"(?P<value>{values})", "{n}": f"(?P<name>{_NAME})", "{s}": f"(?P<{'value' if second else 'name'}>{_NAME})"}
    return re.compile("".join(holes.get(piece, re.escape(piece)) for piece in re.split(r"(\{[nsv]\})", statement)))


@lru_cache(maxsize=2**14)
def facts(sentence: str) -> tuple[Fact, ...]:
    """What a sentence states, if it is one of the world's."""
    found = []
    for pattern, topic, relation in _patterns():
        match = pattern.fullmatch(sentence)
        if match:
            found.append(Fact(topic, match["name"], match["value"], relation))
    return tuple(found)


@cache
def wordings(phrases: tuple[str, ...]) -> tuple[str, ...]:
    """Every question of the training split's half of the grid of frames and phrases."""
    return tuple(
        frame.replace("{p}", phrase)
        for row, frame in enumerate(lexicon.FRAMES)
        for column, phrase in enumerate(phrases)
        if (row + column) % 2 == 0
    )


def pairs(before: str, sentence: str, most: int, draw: random.Random) -> list[dict[str, str]]:
    """Up to `most` pairs on the sentence."""
    written: list[dict[str, str]] = []
    for fact in facts(sentence):
        for owner, value in _told(fact, before):
            grid = wordings(fact.topic.phrases)
            for wording in draw.sample(grid, min(most - len(written), len(grid))):
                written.append({"question": wording.format(n=owner), "answer": value, "evidence": sentence})
    return written


def _told(fact: Fact, before: str) -> Iterator[tuple[str, str]]:
    """(entity, value) of what can be asked with this sentence as the last one read."""
    if isinstance(fact.topic, Attribute):
        yield fact.name, fact.value
        return
    for start, end in sentences(before):
        for earlier in facts(before[start:end]):
            if earlier.topic is not fact.topic or earlier.relation == fact.relation:
                continue
            relation, statement = (fact, earlier) if fact.relation else (earlier, fact)
            if relation.value == statement.name:
                yield relation.name, statement.value


class Record(NamedTuple):
    """Requests by the message that they sent; messages that got a good reply; requests for messages that had one already."""

    asked: dict[str, int]
    answered: list[str]
    asked_again: int


class QuestionServer(ThreadingHTTPServer):
    """The endpoint on a free port; `url` goes into `EndpointRun`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, manners: Manners) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.manners = manners
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.asked_after_answer: Counter[str] = Counter()
        self.answered: set[str] = set()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def record(self) -> Record:
        with self.lock:
            return Record(dict(self.asked), sorted(self.answered), self.asked_after_answer.total())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what the faults are there for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: QuestionServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        instruction, message = body["messages"][0]["content"], body["messages"][-1]["content"]
        manners = self.server.manners
        with self.server.lock:
            attempt = self.server.asked[message]
            self.server.asked[message] += 1
            self.server.asked_after_answer[message] += message in self.server.answered
        seed = hashlib.sha256(f"{manners.seed}/{attempt}/{message}".encode()).digest()
        draw = random.Random(int.from_bytes(seed[:8], "little"))
        fault = draw.random()
        if fault < manners.silent:
            self.server.closing.wait(manners.hang_s)
            self.close_connection = True
            return
        time.sleep(manners.delay_s)
        content = "I would be glad to help!"
        good = fault >= manners.silent + manners.bad_json
        if good:
            most = int(_MOST_PAIRS.search(instruction)[1])  # type: ignore[index]
            before, _, sentence = message.rpartition("The sentence:\n")
            content = json.dumps({"pairs": pairs(before, sentence.strip(), most, draw)})
            with self.server.lock:
                self.server.answered.add(message)
        self._reply(content, len(message) // 4)

    def do_GET(self) -> None:
        self._send(json.dumps(self.server.record()._asdict()).encode())

    def _reply(self, content: str, prompt_tokens: int) -> None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(content) // 4}
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        self._send(json.dumps({"choices": [choice], "usage": usage}).encode())

    def _send(self, reply: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the benchmark tells what matters."""


@contextmanager
def question_server(manners: Manners | None = None) -> Iterator[QuestionServer]:
    """Runs the endpoint in a thread."""
    server = QuestionServer(manners or Manners())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def question_server_process(manners: Manners) -> Iterator[str]:
    """Runs the endpoint in a process of its own; gives its url."""
    command = [sys.executable, "-m", "benchmarks.lift.question_server", json.dumps(asdict(manners))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            if not url:
                raise RuntimeError("the question server did not start")
            yield url
        finally:
            process.terminate()


def read_record(url: str) -> Record:
    """What a server was asked so far."""
    return Record(**httpx.get(f"{url}/record", timeout=30).json())


def main() -> None:
    with question_server(Manners(**json.loads(sys.argv[1]))) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()

import codecs
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.text import parsing
from core.text.documents import Document
from core.text.parsing import REASONS, Kind, Parsed, ParseLimits, Parser, Reject, kind_of
from tests.pdf_files import assembled, pdf
from tests.places import ROOT

POLISH = "Dzień dobry, jak się masz? Wszystko w porządku, dziękuję. Książka leży na stole."
RUSSIAN = "Привет, как дела? Это текст на русском языке, который написан давно."
JAPANESE = "日本語のテキストです。これは長い文章です。"
CHINESE = "中文文本是一个比较长的句子。"
SLOW_PAGE = b"<div>" * 400_000
LIMIT = 1_000_000


@pytest.fixture(scope="module")
def parser() -> Iterator[Parser]:
    parser = Parser(ParseLimits(max_document_bytes=LIMIT, parse_timeout_s=20))
    yield parser
    parser.close()


def texts(parser: Parser, kind: Kind, data: bytes) -> Parsed:
    parsed = parser.parse(kind, data)
    assert isinstance(parsed, Parsed), parsed
    return parsed


def reason(answer: Parsed | Reject) -> str:
    assert isinstance(answer, Reject), answer
    return answer.reason.partition(":")[0]


def test_a_kind_is_what_the_suffix_says() -> None:
    assert [kind_of(name) for name in ("a.TXT", "b/c.md", "x.tar.html", "d.Pdf", "e", "f.docx")] == [
        "text", "markdown", "html", "pdf", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"plain", "plain"),
        (codecs.BOM_UTF8 + "é".encode(), "é"),
        (JAPANESE.encode("utf-16"), JAPANESE),
        (codecs.BOM_UTF16_BE + JAPANESE.encode("utf-16-be"), JAPANESE),
        (POLISH.encode("utf-32"), POLISH),
        ("without a mark, é".encode("utf-16-le"), "without a mark, é"),
        ("without a mark, é".encode("utf-16-be"), "without a mark, é"),
        (b"caf\xe9", "café"),
        (b"\x93Quoted\x94 text \x96 with dashes, it\x92s plain English otherwise.", None),
        (POLISH.encode("cp1250"), POLISH),
        (RUSSIAN.encode("cp1251"), RUSSIAN),
        (RUSSIAN.encode("koi8-r"), RUSSIAN),
        (JAPANESE.encode("shift_jis"), JAPANESE),
        (JAPANESE.encode("euc_jp"), JAPANESE),
        (CHINESE.encode("gb18030"), CHINESE),
        (RUSSIAN.encode() + b"\xff", RUSSIAN + "\ufffd"),
    ],
)
def test_encodings_are_found(parser: Parser, data: bytes, expected: str | None) -> None:
    assert texts(parser, "text", data).text == (expected or data.decode("cp1252"))


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("```\n# not this\n```\n# The title #\n\nBody.", "The title"),
        ("About C#\n\n## C# and F#\n", "C# and F#"),
        ("Underlined\n=====\n\n# Second", "Underlined"),
        ("---\nauthor: x\ntitle: 'From the front matter'\n---\n# Heading", "From the front matter"),
        ('+++\ntitle = "TOML"\n+++\n# Heading', "TOML"),
        ("---\nauthor: x\n---\n# Heading", "Heading"),
        ("#nothing\n####### nor this\n", ""),
        ("# " + "#" * 50_000 + " " * 50_000 + "x\r\n", "#" * 1000),
    ],
)
def test_markdown_is_kept_and_titled(parser: Parser, text: str, title: str) -> None:
    assert parser.parse("markdown", text.encode()) == Parsed(title, text)


def test_a_page_reads_as_a_browser_shows_it(parser: Parser) -> None:
    page = """<!doctype html><title> One &amp; all
        </title><style>p {}</style><body><nav>menu</nav><h1>Head</h1>
        <p>One <b>two</b>, three<br>four <i>f</i>ive</p>loose<ul><li>a<li>b <ul><li>c</ul></ul>
        <table><tr><th>x<th>y<tr><td>1<td><b>2</b></table><pre>  kept
          as is</pre><!-- no --><p hidden>no</p><script>no()</script><div>A<div>B</div>C</div>"""
    assert texts(parser, "html", page.encode()) == Parsed(
        "One & all",
        "Head\n\nOne two, three\nfour five\n\nloose\n\n- a\n- b\n\n- c\n\nx | y\n1 | 2\n\n  kept\n          as is\n\nA\nB\nC",
    )
    assert texts(parser, "html", b"<h1>No <i>title</i></h1>x").title == "No title"
    assert texts(parser, "html", b"just text").text == "just text"


@pytest.mark.parametrize(
    ("charset", "encoding"),
    [("windows-1251", "cp1251"), ("koi8-r", "koi8-r"), ("utf-16", "utf-8"), ("utf-8", "utf-8"), ("no-such", "utf-8")],
)
def test_a_page_names_its_encoding(parser: Parser, charset: str, encoding: str) -> None:
    page = f"<html><head><meta charset='{charset}'></head><p>Это"
    assert texts(parser, "html", page.encode(encoding)).text == "Это"
    old = f'<meta http-equiv="Content-Type" content="text/html; charset={charset}"><p>Это'
    assert texts(parser, "html", old.encode(encoding)).text == "Это"


def test_a_page_in_latin_1_is_windows_1252_and_codecs_are_no_encodings(parser: Parser) -> None:
    assert texts(parser, "html", b"<meta charset=iso-8859-1><p>\x93x\x94").text == "“x”"
    assert texts(parser, "html", b"<meta charset=unicode_escape><p>\\x41").text == "\\x41"


def test_a_pdf_gives_its_pages_and_title(parser: Parser) -> None:
    data = pdf(["Hello (world) café\nsecond line", "", "Page three"], "A  title\x07")
    assert texts(parser, "pdf", data) == Parsed("A title", "Hello (world) café\nsecond line\n\nPage three")


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("text", b"", "empty"),
        ("markdown", b" \n\t\n", "empty"),
        ("html", b"<title>t</title><script>x</script>", "empty"),
        ("text", b"x" * (LIMIT + 1), "too large"),
        ("text", b"a\0b", "binary"),
        ("text", bytes(range(32)) * 4, "binary"),
        ("text", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "binary"),
        ("html", pdf(["x"]).replace(b"obj", b"\0bj"), "binary"),
        ("pdf", b"%PDF", "malformed"),
        ("pdf", pdf(["x" * 500])[:300], "malformed"),
        ("pdf", pdf([]), "malformed"),
        ("pdf", b"<html>not a PDF", "malformed"),
        ("pdf", pdf(["x"], encrypted=True), "password-protected"),
        ("pdf", pdf(["", ""]), "no text"),
    ],
)
def test_faulty_files_have_their_reasons(parser: Parser, kind: Kind, data: bytes, expected: str) -> None:
    assert reason(parser.parse(kind, data)) == expected and expected in REASONS


def test_a_file_that_hangs_its_parser_is_given_up() -> None:
    parser = Parser(ParseLimits(parse_timeout_s=0.5))
    assert texts(parser, "html", b"<p>before").text == "before"
    start = time.monotonic()
    assert parser.parse("html", SLOW_PAGE) == Reject("timed out: more than 0.5 s in the parser")
    assert time.monotonic() - start < 5
    assert texts(parser, "html", b"<p>after").text == "after"
    parser.close()


def deflated_page(lines: int) -> bytes:
    """A PDF whose page is much longer than the file."""
    content = zlib.compress(b"BT /F1 1 Tf 1 TL " + b"(bomb bomb bomb bomb bomb bomb bomb bomb bomb)Tj T* " * lines + b"ET", 9)
    return assembled(
        [
            "<</Type/Catalog/Pages 2 0 R>>",
            "<</Type/Pages/Kids[4 0 R]/Count 1>>",
            "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources<</Font<</F1 3 0 R>>>>/Contents 5 0 R>>",
            f"<</Length {len(content)}/Filter/FlateDecode>>stream\n{content.decode('latin-1')}\nendstream",
        ],
        "/Size 6/Root 1 0 R",
    )


@pytest.mark.parametrize(
    ("kind", "data"),
    [("html", b"<a>" * 4_000_000), ("html", b"<p>x" * 3_000_000), ("pdf", deflated_page(1_000_000))],
)
def test_a_file_that_fills_the_memory_is_given_up(kind: Kind, data: bytes) -> None:
    parser = Parser(ParseLimits(parse_memory_bytes=256 * 2**20, parse_timeout_s=30))
    assert reason(parser.parse(kind, data)) in ("out of memory", "parser crashed")
    assert texts(parser, "html", b"<p>after").text == "after"
    parser.close()


def test_text_grows_no_larger_than_a_file_may_be() -> None:
    parser = Parser(ParseLimits(max_document_bytes=100_000))
    data = deflated_page(10_000)
    assert len(data) < 10_000 and reason(parser.parse("pdf", data)) == "too large"
    parser.close()


def workers(parent: int | None = None) -> list[psutil.Process]:
    """The parsers' processes below this one or another, the newest last."""
    found = [child for child in psutil.Process(parent).children() if "parsing_worker" in " ".join(child.cmdline())]
    return sorted(found, key=psutil.Process.create_time)


def ended_within(process: psutil.Process, timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except psutil.TimeoutExpired:
        return False
    return True


def test_a_crash_is_the_files_own_only_in_a_fresh_worker() -> None:
    before = len(workers())

    def crash() -> None:
        while len(workers()) == before or (worker := workers()[-1]).cpu_times().user < 0.3:
            time.sleep(0.01)
        worker.send_signal(signal.SIGSEGV)

    parser = Parser(ParseLimits(parse_timeout_s=60))
    crashing = threading.Thread(target=crash)
    crashing.start()
    assert parser.parse("html", SLOW_PAGE) == Reject("parser crashed: SIGSEGV")
    crashing.join()
    assert texts(parser, "html", b"<p>one").text == "one"
    worker = workers()[-1]
    worker.kill()
    assert texts(parser, "html", b"<p>two").text == "two" and workers()[-1].pid != worker.pid
    parser.close()


def killed(worker: psutil.Process) -> None:
    """Kills a worker and returns once its pipes are broken."""
    worker.kill()
    while worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


@pytest.mark.parametrize("size", [4, 100_000])
def test_the_end_of_a_dead_worker_raises_nothing(size: int) -> None:
    parser = Parser()
    texts(parser, "html", b"<p>one")
    killed(workers()[-1])
    assert texts(parser, "html", b"<p>" + b"x" * size).text == "x" * size
    killed(workers()[-1])
    parser.close()
    parser.close()
    texts(parser, "html", b"<p>two")
    killed(workers()[-1])
    del parser


def test_a_worker_that_cannot_be_started_is_a_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert Parser().parse("html", b"<p>x") == Reject("parser crashed: it cannot be started: No such file or directory")


def test_a_worker_that_stands_still_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "_GRACE_S", 0.5)
    parser = Parser(ParseLimits(parse_timeout_s=0.5))
    texts(parser, "html", b"<p>before")
    worker = workers()[-1]
    worker.suspend()
    assert reason(parser.parse("html", b"<p>x")) == "timed out"
    assert ended_within(worker, 5)
    assert texts(parser, "html", b"<p>after").text == "after"
    parser.close()


def test_workers_end_with_their_parser() -> None:
    parser = Parser()
    texts(parser, "html", b"<p>x")
    worker = workers()[-1]
    parser.close()
    assert not worker.is_running()
    parser = Parser()
    texts(parser, "html", b"<p>x")
    worker = workers()[-1]
    del parser
    assert ended_within(worker, 5)


@pytest.mark.parametrize(("page", "within_s"), [("<p>x", 5), ("<div>" * 400_000, 10)])
def test_workers_end_with_a_process_that_is_killed(page: str, within_s: float) -> None:
    code = (
        "import sys, time\nfrom core.text.parsing import *\nparser = Parser(ParseLimits(parse_timeout_s=3))\n"
        "parser.parse('html', b'<p>x')\nprint('ready', flush=True)\nparser.parse('html', sys.stdin.buffer.read())\ntime.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdin is not None and owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    worker = workers(owner.pid)[-1]
    owner.stdin.write(page.encode())
    owner.stdin.close()
    time.sleep(0.3)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert ended_within(worker, within_s)


def test_workers_see_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret-of-anyone")
    parser = Parser()
    texts(parser, "html", b"<p>x")
    worker = workers()[-1]
    assert set(worker.environ()) <= {"LD_LIBRARY_PATH", "LC_CTYPE"}
    assert {descriptor for descriptor in os.listdir(f"/proc/{worker.pid}/fd") if int(descriptor) > 4} == set()
    parser.close()


def as_document(parser: Parser, kind: Kind, data: bytes) -> None:
    answer = parser.parse(kind, data)
    if isinstance(answer, Reject):
        assert answer.reason.partition(":")[0] in REASONS
    else:
        Document(tenant="t", collection="c", name="n", title=answer.title, text=answer.text)


KINDS = st.sampled_from(["text", "markdown", "html", "pdf"])


@settings(max_examples=150)
@given(KINDS, st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
def test_whatever_the_bytes_there_is_an_answer(parser: Parser, kind: Kind, data: bytes) -> None:
    as_document(parser, kind, data)


@settings(max_examples=150)
@given(
    st.sampled_from(
        [
            ("html", "<html><meta charset=utf-8><ul><li>é<table><td>x</table><pre>y</pre></ul>".encode()),
            ("pdf", pdf(["Some text", "and more"], "title")),
            ("pdf", deflated_page(20)),
            ("markdown", "---\ntitle: x\n---\n# y\n".encode("utf-16")),
        ]
    ),
    st.data(),
)
def test_whatever_befalls_a_good_file_there_is_an_answer(parser: Parser, file: tuple[Kind, bytes], data: st.DataObject) -> None:
    kind, content = file
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 40, len(content))))
    as_document(parser, kind, content[:start] + data.draw(st.binary(max_size=40)) + content[end:])

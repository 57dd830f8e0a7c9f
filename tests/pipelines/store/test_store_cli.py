"""`imprint store` on files and on S3: what each command shows and does, and with which exit code it ends."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import imprint
from core.adapters.base_model import load_base
from core.shine.hypernetwork import Hypernetwork
from core.store.manifest import Producer
from core.store.store import Store
from core.store.upkeep.comparison import differences
from tests.stores import adapter, document, flip

COMMANDS = ("ls", "show", "stats", "verify", "diff", "compact", "gc", "rm", "export")


def run(*arguments: str, code: int = 0, answer: str | None = None) -> str:
    result = CliRunner().invoke(imprint.app, ["store", *arguments], input=answer, env={"COLUMNS": "100"})
    assert result.exit_code == code, f"{arguments}: {result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = str(tmp_path) if request.param == "file" else f"s3://{request.getfixturevalue('bucket')}/store"
    store = Store.open(place, create=True)
    documents = [
        document(f"text {number}", tenant="default", name=f"reports/{number}.txt", title="A title") for number in range(5)
    ]
    store.put(documents, [adapter(one, number, quality=0.875) for number, one in enumerate(documents[:4])])
    store.put([document("other", tenant="other", collection="d", name="ärger [x].txt")])
    store.put([document("text 0, edited", tenant="default", name="reports/0.txt")])
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: imprint store {command}" in re.sub(r"[`│\s]+", " ", run(command, "--help"))


def test_the_group_lists_every_command() -> None:
    listed = run("--help")
    assert all(f" {command} " in listed for command in COMMANDS)


def test_listing_pages_and_filters(url: str) -> None:
    shown = run("ls", url)
    assert all(f"reports/{number}.txt" in shown for number in range(5)) and "rank 2 fp32" in shown and "0.88" in shown
    assert max(map(len, shown.splitlines())) <= 100 and "ärger" not in shown
    assert "ärger [x].txt" in run("ls", url, "--tenant", "other", "--collection", "d", "--prefix", "ä")
    assert "tenants here: 'default', 'other'" in run("ls", url, "--tenant", "nobody")
    names, token = [], []
    while True:
        page = json.loads(run("ls", url, "--limit", "2", "--json", *token))
        names += [(each["name"], len(each["adapters"])) for each in page["documents"]]
        if page["next_page"] is None:
            break
        token = ["--page", page["next_page"]]
    assert names == [("reports/0.txt", 0), *((f"reports/{number}.txt", 1) for number in (1, 2, 3)), ("reports/4.txt", 0)]
    assert f"--page {json.loads(run('ls', url, '--limit', '2', '--json'))['next_page']}" in run("ls", url, "--limit", "2")
    assert "give 1 to 1000" in run("ls", url, "--limit", "0", code=2)


def test_a_document_is_shown_with_its_adapters_and_producers(url: str) -> None:
    shown = run("show", url, "reports/1.txt", "--collection", "c")
    assert all(part in shown for part in ("reports/1.txt", "A title", "rank 2 fp32", "0.88", "shine", "tiny"))
    assert max(map(len, shown.splitlines())) <= 100
    found = json.loads(run("show", url, "reports/1.txt", "--collection", "c", "--json"))
    [made] = found["adapters"]
    assert made["quality"] == 0.875 and list(found["producers"]) == [made["producer_fingerprint"]]
    assert "answers in context" in run("show", url, "reports/4.txt", "--collection", "c")
    assert run("show", url, "reports/0.txt", "--collection", "c", "--text") == "text 0, edited\n"
    assert "imprint store ls" in run("show", url, "none.txt", code=2)


def test_figures_of_the_store_and_its_tenants(url: str) -> None:
    figures = json.loads(run("stats", url, "--json"))
    assert (figures["documents"], figures["adapters"], figures["shards"], figures["orphans"]) == (6, 4, 3, 0)
    shown = run("stats", url, "--tenants")
    assert "of them live" in shown and re.search(r"default +5 .* 4 ", shown) and re.search(r"other +1 ", shown)


def test_differences_of_versions_and_stores(url: str, tmp_path: Path) -> None:
    shown = run("diff", f"{url}@3", url)
    assert "changed  document default/c/reports/0.txt" in shown and shown.endswith("documents changed: 1\n")
    assert "adapters added: 4, documents added: 6" in run("diff", f"{url}@1", url)
    assert "no difference" in run("diff", url, url)
    copy = Store.open(tmp_path / "copy", create=True)
    copy.put([document("more", tenant="default", name="more.txt")])
    lines = [json.loads(line) for line in run("diff", url, str(tmp_path / "copy"), "--json").splitlines()]
    assert {"change": "added", "kind": "documents", "key": ["default", "c", "more.txt"]} in lines
    assert sum(each["change"] == "removed" for each in lines) == 10 and len(lines) == 11
    assert "roots/" in run("diff", f"{url}@77", url, code=2)


def test_upkeep_from_compaction_to_erasure(url: str) -> None:
    assert "1 now" in run("compact", url) and "all of it is sound" in run("verify", url)
    assert "would collect 0 roots" in run("gc", url, "--dry-run") and "collected 0 roots" in run("gc", url)
    assert "too short" in run("gc", url, "--grace-hours", "0.5", code=2)
    assert "would erase 5 documents" in run("rm", url, "--collection", "c", "--dry-run")
    run("rm", url, "--collection", "c", code=1, answer="n\n")
    assert "reports/1.txt" in run("ls", url)
    erased = run("rm", url, "reports/1.txt", "--collection", "c", "--now")
    assert "erased 1 document and 2 adapters" in erased and "no byte is left" in erased
    assert "erased 2 documents" not in run("rm", url, "--prefix", "reports/", "--yes")
    assert "no such documents" in run("ls", url) and "all of it is sound" in run("verify", url)
    for arguments in ([], ["name", "--all"], ["name", "--prefix", "x"]):
        assert "error:" in run("rm", url, *arguments, code=2)
    assert "no store at" in run("rm", url + "/none", "--all", code=2)


def test_a_fault_is_named_and_ends_with_1(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    store.put([document("text")])
    row = store.list_documents("tenant").rows[0]
    flip(tmp_path / "shards" / row.shard, 1)
    shown = run("verify", str(tmp_path), code=1)
    assert f"fault: shards/{row.shard} is damaged" in shown and shown.endswith("1 fault\n")
    assert "no store at" in run("verify", str(tmp_path / "none"), code=2)


def test_every_lora_is_exported_once_and_peft_reads_it(tmp_path: Path) -> None:
    base = load_base(imprint.REFERENCE / "base")
    network = Hypernetwork.load(imprint.REFERENCE / "hypernetwork", base)
    store, texts = Store.open(tmp_path / "store", create=True), ("first text", "second text", "first text")
    documents = [document(text, tenant="default", name=f"a/{number}") for number, text in enumerate(texts)]
    vectors = {}
    for one in documents[:2]:
        ids = torch.tensor([base.tokenizer.encode(one.text)])
        with torch.no_grad():
            weights = network.generate(ids, torch.ones_like(ids))
        vectors[one.content_hash] = weights
        producer = Producer(method="shine", weights="w", config={"base": base.fingerprint})
        store.put([one], [adapter(one, spec=weights.spec, vector=weights.flat_BN[0], producer=producer)])
    store.put([documents[2], document("none", tenant="default", name="a/none")])
    out = tmp_path / "out"
    said = run("export", str(tmp_path / "store"), str(out))
    assert "written: 2 adapters" in said and "left out: 1 document with no adapter yet" in said
    lines: list[dict[str, Any]] = [json.loads(line) for line in (out / "documents.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["a/0", "a/1", "a/2"] and lines[0]["adapter"] == lines[2]["adapter"]
    a_BIR, b_BRO = vectors[documents[1].content_hash].factors(0, "q")
    model = AutoModelForCausalLM.from_pretrained(imprint.REFERENCE / "base", dtype=torch.float32)
    exported = peft.PeftModel.from_pretrained(model, out / lines[1]["adapter"]).base_model.model.model.layers[0].self_attn.q_proj
    assert torch.allclose(exported.get_delta_weight("default").T, (a_BIR @ b_BRO)[0], atol=1e-4)


def test_differences_stream_in_order_of_keys(tmp_path: Path) -> None:
    one, other = (Store.open(tmp_path / name, create=True) for name in "ab")
    one.put([document(f"{number}", name=f"{number:03}") for number in range(0, 300, 2)])
    other.put([document(f"{number}", name=f"{number:03}") for number in range(0, 300, 3)])
    found = [(each.change, int(each.key[2])) for each in differences(one._versions.index, other._versions.index)]
    expected = [("removed" if n % 2 == 0 else "added", n) for n in range(300) if (n % 2 == 0) != (n % 3 == 0)]
    assert found == expected

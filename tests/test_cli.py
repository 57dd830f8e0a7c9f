"""The command line: every command explains itself, errors say what to do, and the README's commands run."""

import json
import re
import shlex
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import imprint
from benchmarks.readme import rendered
from core.adapters.base_model import load_base
from core.shine.hypernetwork import Hypernetwork
from core.store.store import Store
from tests.core.shine.test_shine_parity import GOLDEN, golden_base, golden_settings

ROOT = Path(imprint.__file__).parent
COMMANDS = (
    *("world", "train", "convert", "lift", "serve", "ask", "evaluate", "compare", "plan"),
    *("import-shine", "import-peft", "export", "store", "demo"),
)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(imprint.app, list(arguments))
    assert result.exit_code == 0, f"{arguments}: {result.output}\n{result.exception!r}"
    return result.output


def fail(*arguments: str) -> str:
    result = CliRunner().invoke(imprint.app, list(arguments))
    assert result.exit_code == 2, f"{arguments}: {result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    assert "Example: imprint " + command in re.sub(r"[`│\s]+", " ", run(command, "--help"))


def test_help_lists_every_command():
    listed = run("--help")
    assert all(command in listed for command in COMMANDS)


def test_errors_say_what_to_do(tmp_path, ray_local):
    assert "'validation' or 'test'" in fail("world", str(tmp_path), "--split", "nonsense")
    assert "no store at" in fail("export", str(tmp_path / "none"), "a", str(tmp_path / "out"))
    for arguments in (["a"], ["a", "b", "--select", "demand > 1"], ["a", "b", "--dry-run"], ["a", "--dry-run"]):
        assert "with --select the store alone" in fail("lift", *arguments)
    assert "no store at" in fail("lift", str(tmp_path / "none"), "--select", "demand > 1", "--dry-run")
    assert "imprint serve" in fail("ask", "Who?", "--url", "http://127.0.0.1:9")
    assert "no recipe at" in fail("train", "base", "--run", str(tmp_path / "run"), "--recipe", str(tmp_path / "none.toml"))
    assert "optimiser.global_batch" in fail("train", "base", "--run", str(tmp_path / "run"), "--set", "optimiser.global_batch=-1")
    assert "count: Input should be greater than 0" in fail("evaluate", "--count", "0", "--out", str(tmp_path / "evaluation"))
    assert "level: Input should be 1 or 2" in fail("evaluate", "--level", "3", "--out", str(tmp_path / "evaluation"))
    assert "are for `plan convert`" in fail("plan", "lift", str(tmp_path), "--out", str(tmp_path / "plan.json"))
    assert "config.json" in fail("import-shine", str(tmp_path), str(tmp_path / "out"), "--base", str(tmp_path))


def test_import_shine_writes_a_checkpoint_that_gives_the_golden_adapters(tmp_path):
    base = golden_base("shine_p1", tmp_path)
    settings = golden_settings("shine_p1")
    options = [
        part
        for name in ("rank", "meta_rank", "num_layers", "num_heads", "feed_forward", "scale")
        for part in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))
    ]
    directory = tmp_path / "shine_p1"
    run("import-shine", str(GOLDEN / "shine_p1" / "checkpoint-7"), str(tmp_path / "out"), "--base", str(directory), *options)
    imported = Hypernetwork.load(tmp_path / "out", load_base(directory))
    direct = Hypernetwork.from_shine_release(GOLDEN / "shine_p1" / "checkpoint-7", base, settings)
    assert imported.fingerprint() == direct.fingerprint()


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("imprint ")]


def test_readme_shows_the_latest_results():
    text = (ROOT / "README.md").read_text()
    assert rendered(text) == text, "run python -m benchmarks.readme"


def test_readme_names_commands_and_options_that_exist():
    commands = readme_commands()
    assert {command[1] for command in commands} == set(COMMANDS) - {"demo"}
    for _, command, *arguments in commands:
        shown = run(command, *(arguments[:1] if command == "store" else ()), "--help")
        assert all(argument in shown for argument in arguments if argument.startswith("--")), (command, arguments)


def test_readme_path_from_world_to_peft(said_by_ray, tmp_path, monkeypatch):
    """The README's world, convert and export, as they stand there, on fewer documents, and Ray says nothing of its own."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for _, command, *arguments in readme_commands():
        if command == "world" and "test" in arguments:
            arguments[arguments.index("--count") + 1] = "3"
        elif command not in ("convert", "export", "store") or "Qwen/Qwen3-8B" in arguments:
            continue
        ran.append(command)
        run(command, *arguments)
    assert ran == ["world", "convert", *["store"] * 9, "export"]
    assert said_by_ray == []
    rows = [json.loads(line) for line in Path("runs/world/test-1/documents.jsonl").read_text().splitlines()]
    base = load_base(imprint.REFERENCE / "base")
    document = torch.tensor([base.tokenizer.encode(rows[0]["text"])])
    hypernetwork = Hypernetwork.load(imprint.REFERENCE / "hypernetwork", base)
    with torch.no_grad():
        a_BIR, b_BRO = hypernetwork.generate(document, torch.ones_like(document)).factors(0, "q")
        model = AutoModelForCausalLM.from_pretrained(imprint.REFERENCE / "base", dtype=torch.float32)
        exported = peft.PeftModel.from_pretrained(model, "runs/peft").base_model.model.model.layers[0].self_attn.q_proj
        delta = exported.get_delta_weight("default").T
    assert torch.allclose(delta, (a_BIR @ b_BRO)[0], atol=2**-7 * delta.abs().max())


def test_lift_is_convert_by_another_method(ray_local, tmp_path):
    """Of both kinds, into one store: a second method adds adapters, a rerun adds none, and PEFT gets the lora."""
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    corpus.mkdir()
    (corpus / "one.txt").write_text("The colour of the coat of Vostilo is crimson. The hobby of Vostilo is chess.")
    (corpus / "none.txt").write_text("x")
    changes = [
        part
        for change in ("run.actors=1", "run.buffer_documents=4", f"lift.run.scratch={tmp_path}")
        for part in ("--set", change)
    ]
    fast = ["--preset", "v4_fast", *changes, "--set", "lift.serving_rank=4"]
    memory = ["--method", "lift", "--preset", "v4_fast", *changes, "--set", "lift.settings.adapter.kind=gated_memory"]
    said = run("convert", str(corpus), str(store), *memory)
    assert (
        "2 documents: 1 converted, 0 shared, 0 unchanged, 1 rejected" in said
        and "not lifted" in said
        and "measured 1 of 1" in said
    )
    assert "gated memory, which PEFT knows no form of" in fail("export", str(store), "one.txt", str(tmp_path / "peft"))
    said = run("lift", str(corpus), str(store), *fast)
    assert "1 converted" in said and "cut to the serving rank, relative error" in said and "are withheld" in said
    assert "1 unchanged, 1 rejected" in run("lift", str(corpus), str(store), *fast)
    opened = Store.open(store)
    rows = opened.find_adapters("default", opened.find_document("default", "default", "one.txt").content_hash)
    assert [opened.spec(row.spec_fingerprint).kind for row in rows] == ["gated_memory", "lora"]
    assert [row.rank for row in rows][1] == 4 and rows[1].error > 0 and rows[1].questions is not None
    assert not list((tmp_path / "states").iterdir())
    assert "no LoRA that answers" in fail("export", str(store), "one.txt", str(tmp_path / "peft"))
    run("lift", str(corpus), str(store), *fast, "--set", "lift.gate.questions=0", "--set", "lift.questions.rules.seed=9")
    run("export", str(store), "one.txt", str(tmp_path / "peft"))
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    assert "preset 'v9' is not known" in fail("lift", str(corpus), str(store), "--preset", "v9")
    source = ["--set", "lift.questions.endpoint.model=m", "--set", "lift.questions.endpoint.run.api_key_variable=NO_SUCH_KEY"]
    assert "NO_SUCH_KEY is not set" in fail("lift", str(corpus), str(store), *source)

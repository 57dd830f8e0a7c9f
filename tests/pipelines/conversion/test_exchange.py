"""PEFT adapters into a store and out of it: for the right base, under the right name, exactly, and served like any other."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import imprint
from core.adapters.base_model import BaseModel, load_base
from core.adapters.lora import LoraWeights, attach
from core.adapters.spec import AdapterSpec, SiteShape
from core.store.manifest import NewAdapter, Producer
from core.store.store import Store
from core.text.documents import Document, Window
from serve.resolver import Resolver
from tests.models import world_base

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(imprint.app, [str(each) for each in arguments])
    assert result.exit_code == code, f"{arguments}: {result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bases of one shape and tokenizer, with other weights."""
    root = tmp_path_factory.mktemp("bases")
    for name in ("one", "other"):
        base = world_base()
        if name == "other":
            with torch.no_grad():
                base.model.get_input_embeddings().weight.mul_(1.5)
        base.model.save_pretrained(root / name)
        base.tokenizer.save_pretrained(root / name)
    return root / "one", root / "other"


def trained(directory: Path, base: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    """An adapter as PEFT trains and saves it, named after its base."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(directory)
    return directory


def peft_logits(base: Path, directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), directory)(IDS).logits


def served_logits(store: Store, base: BaseModel, name: str) -> torch.Tensor:
    """By the adapter that the server would choose."""
    found = Resolver(store, "default", "default", "base", base.fingerprint).resolve(f"base:{name}")
    assert found.source == "adapter" and found.adapter is not None, found
    weights = LoraWeights(store.spec(found.adapter.spec_fingerprint), store.get_vector(found.adapter)[None])
    with torch.no_grad(), attach(base, weights):
        return base.model(input_ids=IDS).logits


def put(store: Store, name: str, text: str, base_fingerprint: str | None, spec: AdapterSpec | None) -> None:
    """A document, and unless they are None an adapter for that base under that spec."""
    one = Document(tenant="default", collection="default", name=name, text=text)
    adapters = []
    if base_fingerprint is not None and spec is not None:
        vector = torch.randn(spec.numel, generator=torch.Generator().manual_seed(0))
        producer = Producer(method="shine", weights="w", config={"base": base_fingerprint})
        names = {"tenant": "default", "content_hash": one.content_hash, "window": Window(0, 3), "tokens": 3}
        adapters = [NewAdapter(**names, producer=producer, spec=spec, encoding="fp32", vector=vector)]
    store.put([one], adapters)


def test_an_imported_adapter_is_served_like_any_other(bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, url = load_base(bases[0]), tmp_path / "store"
    first = trained(tmp_path / "first", bases[0])
    text = tmp_path / "text.txt"
    text.write_text("The hobby of Vostilo is chess.")
    said = run("import-peft", first, url, "Vostilo: notes", "--base", bases[0], "--text", text)
    assert "imported: adapter" in said and "rank 4 in fp32" in said
    store = Store.open(url)
    assert (served_logits(store, base, "Vostilo%3A%20notes") - peft_logits(bases[0], first)).abs().max() < 1e-4
    row = store.find_document("default", "default", "Vostilo: notes")
    assert row is not None and store.get_text(row) == "The hobby of Vostilo is chess."
    [adapter] = store.find_adapters("default", row.content_hash)
    assert adapter.window == (0, adapter.tokens) == (0, len(base.tokenizer.encode(store.get_text(row), add_special_tokens=False)))
    assert store.producers()[adapter.producer_fingerprint].method == "peft"
    version = store.sequence
    assert "there already" in run("import-peft", first, url, "Vostilo: notes", "--base", bases[0])
    assert not store.refresh() and store.sequence == version
    second = trained(tmp_path / "second", bases[0], seed=1, rank_pattern={"q_proj": 6}, use_rslora=True)
    run("import-peft", second, url, "Vostilo: notes", "--base", bases[0])
    store.refresh()
    assert (served_logits(store, base, "Vostilo%3A%20notes") - peft_logits(bases[0], second)).abs().max() < 1e-4
    assert len(store.find_adapters("default", row.content_hash)) == 2
    assert "all of it is sound" in run("store", "verify", url)


def test_an_adapter_without_a_text_gets_a_name_of_its_own(bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, url = load_base(bases[0]), tmp_path / "store"
    for seed, name in enumerate(("style", "tone")):
        run("import-peft", trained(tmp_path / name, bases[0], seed), url, name, "--base", bases[0])
    store = Store.open(url)
    for name in ("style", "tone"):
        assert (served_logits(store, base, name) - peft_logits(bases[0], tmp_path / name)).abs().max() < 1e-4
        row = store.find_document("default", "default", name)
        assert row is not None and "without a text of its own" in store.get_text(row)
    run("import-peft", tmp_path / "tone", url, "tone", "--base", bases[0], "--tenant", "t", "--collection", "c")
    assert Store.open(url).find_document("t", "c", "tone") is not None


def test_an_import_keeps_every_number_and_an_export_gives_it_back(bases: tuple[Path, Path], tmp_path: Path) -> None:
    url = tmp_path / "store"
    directory = trained(tmp_path / "bf16", bases[0], dtype=torch.bfloat16, lora_alpha=4)
    before = load_file(directory / "adapter_model.safetensors")
    before = {name: tensor.bfloat16() for name, tensor in before.items()}
    save_file(before, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "in bf16" in run("import-peft", directory, url, "one", "--base", bases[0])
    run("export", url, "one", tmp_path / "out", "--base", bases[0], "--base-name", "org/base")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name].float(), after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert "imported" in run("import-peft", tmp_path / "out", tmp_path / "again", "one", "--base", bases[0])
    assert "other weights" in run("import-peft", tmp_path / "out", url, "two", "--base", bases[1], code=2)


def test_what_cannot_be_imported_is_refused_and_nothing_is_put(bases: tuple[Path, Path], tmp_path: Path) -> None:
    url = tmp_path / "store"
    directory = trained(tmp_path / "peft", bases[0])
    assert f"was trained for {bases[0]}" in run("import-peft", directory, url, "one", "--base", bases[1], code=2)
    assert "no text at" in run("import-peft", directory, url, "one", "--base", bases[0], "--text", tmp_path / "none", code=2)
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    assert "not UTF-8 at byte 0" in run(
        "import-peft", directory, url, "one", "--base", bases[0], "--text", tmp_path / "latin", code=2
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases[0]), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "untrained")
    assert "changes nothing" in run("import-peft", tmp_path / "untrained", url, "one", "--base", bases[0], code=2)
    dora = trained(tmp_path / "dora", bases[0], use_dora=True)
    assert "DoRA scales" in run("import-peft", dora, url, "one", "--base", bases[0], code=2)
    broken = trained(tmp_path / "nan", bases[0])
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "not finite" in run("import-peft", broken, url, "one", "--base", bases[0], code=2)
    assert not url.exists() or Store.open(url).stats().documents == 0
    said = run("import-peft", directory, url, "one", "--base", bases[1], "--base-name", bases[0])
    assert "imported" in said, "who says that both are the same weights is believed"


def test_an_export_for_another_base_is_refused(bases: tuple[Path, Path], tmp_path: Path) -> None:
    """Of one shape, so that only the fingerprint tells them apart; a store that has both gives each its own."""
    one, other = (load_base(path) for path in bases)
    store = Store.open(tmp_path / "store", create=True)
    put(store, "a", "text a", one.fingerprint, one.spec(2))
    for command in (["export", store.url, "a"], ["store", "export", store.url]):
        said = run(*command, tmp_path / "out", "--base", bases[1], code=2)
        assert "adapters for another base only: give --base" in said
        assert not list(tmp_path.glob("out/*"))
    put(store, "b", "text b", other.fingerprint, other.spec(2))
    for path, name in zip(bases, "ab", strict=True):
        said = run("store", "export", store.url, tmp_path / path.name, "--base", path)
        assert "written: 1 adapter " in said and "left out: 1 document with adapters for another base only" in said
        lines = (tmp_path / path.name / "documents.jsonl").read_text().splitlines()
        assert [json.loads(line)["name"] for line in lines] == [name]


def test_an_export_with_nothing_to_write_says_why(bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, store = load_base(bases[0]), Store.open(tmp_path / "store", create=True)
    memory = AdapterSpec(((SiteShape("attention", 8, 2),),) * 2, rank=2, kind="gated_memory", gate="shifted")
    put(store, "a", "text a", base.fingerprint, memory)
    put(store, "b", "text b", None, None)
    arguments = ["--base", bases[0]]
    said = run("store", "export", store.url, tmp_path / "out", *arguments, code=2)
    assert "nothing to export" in said and "1 have a gated memory, which PEFT knows no form of" in said
    assert "1 have no adapter yet" in said
    assert "gated memory, which PEFT knows no form of" in run("export", store.url, "a", tmp_path / "out", *arguments, code=2)
    assert "no adapter yet" in run("export", store.url, "b", tmp_path / "out", *arguments, code=2)
    said = run("store", "export", store.url, tmp_path / "out", *arguments, "--prefix", "zzz", code=2)
    assert "no such documents of tenant 'default'" in said and not list((tmp_path / "out").iterdir())


def test_an_export_goes_on_where_it_ended(bases: tuple[Path, Path], tmp_path: Path) -> None:
    """What was cut short is written again, and so is what calls its base otherwise; the rest stays as it is."""
    base, store, out = load_base(bases[0]), Store.open(tmp_path / "store", create=True), tmp_path / "out"
    for name in "abc":
        put(store, name, f"text {name}", base.fingerprint, base.spec(2))
    run("store", "export", store.url, out, "--base", bases[0])
    first, second, third = sorted(path for path in out.iterdir() if path.is_dir())
    whole, written = (first / "adapter_model.safetensors").read_bytes(), (third / "adapter_config.json").stat().st_mtime_ns
    (first / "adapter_config.json").unlink()  # the last file that is written
    (first / "adapter_model.safetensors").write_bytes(whole[:-10])
    (second / "adapter_config.json").write_text("{")
    run("store", "export", store.url, out, "--base", bases[0])
    assert (first / "adapter_model.safetensors").read_bytes() == whole
    assert (third / "adapter_config.json").stat().st_mtime_ns == written
    run("store", "export", store.url, out, "--base", bases[0], "--base-name", "org/base")
    names = {json.loads(file.read_text())["base_model_name_or_path"] for file in out.glob("*/adapter_config.json")}
    assert names == {"org/base"}
    assert len((out / "documents.jsonl").read_text().splitlines()) == 3 and len(list(out.iterdir())) == 4


def test_an_export_holds_what_answers_and_nothing_that_is_withheld(bases: tuple[Path, Path], tmp_path: Path) -> None:
    base, store = load_base(bases[0]), Store.open(tmp_path / "store", create=True)
    put(store, "one", "The text of one.", base.fingerprint, base.spec(4))
    first = store.find_adapters("default", Document(tenant="t", collection="c", name="n", text="The text of one.").content_hash)[
        0
    ]
    producer = Producer(method="lift", weights="w", config={"base": base.fingerprint})
    for content in (first.content_hash, Document(tenant="t", collection="c", name="n", text="Another text.").content_hash):
        vector = torch.randn(base.spec(4).numel, generator=torch.Generator().manual_seed(1))
        names = {"tenant": "default", "content_hash": content, "window": Window(0, 3), "tokens": 3, "encoding": "fp32"}
        held = NewAdapter(**names, producer=producer, spec=base.spec(4), vector=vector, withheld=True, questions=9)
        store.put([Document(tenant="default", collection="default", name=content[:4], text="Another text.")], [held])
    run("store", "export", store.url, tmp_path / "out", "--base", bases[0])
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [first.adapter_id]
    other = Document(tenant="t", collection="c", name="n", text="Another text.").content_hash[:4]
    assert "no LoRA that answers" in run("export", store.url, other, tmp_path / "alone", "--base", bases[0], code=2)

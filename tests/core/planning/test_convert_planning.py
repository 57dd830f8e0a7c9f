"""Plans of conversion: FLOPs as torch counts them, samples against the whole, money by hand, and what it took beside it."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config
from typer.testing import CliRunner

import imprint
from core.adapters.spec import SITES
from core.planning.convert import (
    Assumptions,
    ConvertPlan,
    Packing,
    Volume,
    actual,
    forward_flops,
    memory_tokens,
    plan_convert,
    skeleton,
    worker_memory,
)
from core.planning.costs import Prices
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from core.text.prompts import encode
from core.text.tokens import read
from core.writing.writer import WindowRule
from pipelines.conversion.plan_outcomes import took, where_planned
from pipelines.conversion.plan_tables import duration, money, plan_tables, taken_table
from pipelines.conversion.planning import PlanRecipe, load_plan_recipe, measured_rate, plan_conversion, read_plan
from pipelines.conversion.receipts import Summary, receipt_of
from pipelines.conversion.recipe import ConvertRecipe, ConvertRun
from pipelines.conversion.run_files import RunFiles
from pipelines.terminal import size
from pipelines.world.documents import WorldSpec, generate
from pipelines.world.reference import REFERENCE
from pipelines.world.tokenizer import build_tokenizer
from tests.models import tiny_base

SETTINGS = HypernetworkSettings(rank=4, meta_rank=16, num_heads=4, feed_forward=64)
DOCUMENTS = [(document.id, document.text) for level in (1, 2) for document in generate(WorldSpec(level=level, count=300))]
random.Random(0).shuffle(DOCUMENTS)
TOKENIZER = build_tokenizer()
TOKENS = [len(encode(TOKENIZER, text)) for _, text in DOCUMENTS]


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration, and no weights."""
    directory = tmp_path_factory.mktemp("qwen3-8b")
    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "max_position_embeddings": 40960}
    Qwen3Config(vocab_size=151_936, num_attention_heads=32, num_key_value_heads=8, head_dim=128, **shape).save_pretrained(
        directory
    )
    TOKENIZER.save_pretrained(directory)
    return directory


def volume(count: int, tokens: int) -> Volume:
    """`count` documents of one window of `tokens` tokens."""
    whole = dict.fromkeys(("sampled", "documents", "adapters", "windows"), count)
    return Volume(**whole, files=1, tokens=count * tokens, window_tokens=count * tokens, squared_tokens=count * tokens**2)


def planned(base: Path, of: Volume, settings: HypernetworkSettings | None = None, **assumed: float) -> ConvertPlan:
    settings = settings or HypernetworkSettings()
    assumptions = Assumptions.model_validate(assumed)
    return plan_convert(of, skeleton(base), settings, "bf16", Packing(), Prices(), assumptions)


def recipe(*changes: str) -> PlanRecipe:
    return load_plan_recipe(str(REFERENCE / "base"), None, None, None, None, None, changes)


def shown(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_flops_are_those_that_torch_counts(architecture: str) -> None:
    """Torch counts every score of the base's attention, the plan the half that a causal mask leaves.

    With gradient, as torch does not count products that are added in place.
    """
    base, rows, tokens = tiny_base(architecture), 3, 40
    ids_BT = torch.ones(rows, tokens, dtype=torch.int64)
    hypernetwork = Hypernetwork(base, SETTINGS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hypernetwork.generate(ids_BT, torch.ones_like(ids_BT))
    memory = memory_tokens(base, SETTINGS)
    assert memory == len(hypernetwork.memory_MH)
    masked = 2 * rows * (tokens + memory) ** 2 * sum(base.linear_shape(layer, "q")[1] for layer in range(len(base.layers)))
    assert forward_flops(base, SETTINGS, volume(rows, tokens)) + masked == counter.get_total_flops()


def test_two_million_adapters_of_qwen3_8b_are_87_tb(qwen3_8b: Path) -> None:
    plan = planned(qwen3_8b, volume(2_000_000, 1000), gpus=8)
    assert plan.made.bytes == 2 * 8 * 36 * 75_776 == 43_646_976
    assert round(plan.adapter_bytes / 1e12) == 87 and "87.3 TB" in shown(plan_tables(plan, "corpus"))
    assert plan.made.memory_tokens == 148
    assert plan.flops / 2e6 == pytest.approx(2.25e13, rel=0.01)
    assert {other.rank for other in plan.alternatives if other.sites == SITES} == {4, 8, 16, 32}
    attention = next(other for other in plan.alternatives if other.sites == ("q", "k", "v", "o"))
    assert attention.bytes["bf16"] == 2 * 8 * 36 * (2 * 8192 + 2 * 5120) and attention.gpu_hours < plan.gpu_hours


def test_a_workers_weights_are_those_that_it_loads(qwen3_8b: Path) -> None:
    base = tiny_base("qwen3")
    hypernetwork = Hypernetwork(base, SETTINGS)
    found = worker_memory(base, SETTINGS, Packing(), torch.float32)
    assert found.base == 4 * sum(each.numel() for each in base.model.parameters())
    assert found.hypernetwork == 4 * sum(each.numel() for each in hypernetwork.parameters() if each.requires_grad)
    large = worker_memory(skeleton(qwen3_8b), HypernetworkSettings(), Packing(), torch.bfloat16)
    assert large.base == pytest.approx(16.4e9, rel=0.01) and large.hypernetwork == pytest.approx(4 * (537e6 + 349e6), rel=0.01)
    halved = worker_memory(skeleton(qwen3_8b), HypernetworkSettings(), Packing(batch_rows=8), torch.bfloat16)
    assert halved.batch == large.batch // 2 and "memory of each" in shown(plan_tables(planned(qwen3_8b, volume(9, 9)), "corpus"))


def test_a_skeleton_has_the_shapes_of_the_base_and_no_weights() -> None:
    base = skeleton(REFERENCE / "base")
    assert base.device.type == "meta"
    assert base.spec(4).to_json() == json.loads((REFERENCE / "hypernetwork" / "hypernetwork.json").read_text())["spec"]


def test_the_arithmetic_by_hand(qwen3_8b: Path) -> None:
    prices = Prices(
        gpu_hour=2.0, prompt_per_million=0.5, storage_per_gb_month=0.02, put_per_thousand=0.01, get_per_thousand=0.001
    )
    assumptions = Assumptions(gpus=4, documents_per_s=10.0, storage_months=6)
    of = volume(1280, 1000).model_copy(update={"files": 100, "text_bytes": 5e6})
    plan = plan_convert(of, skeleton(qwen3_8b), HypernetworkSettings(), "int8", Packing(shard_bytes=10**9), prices, assumptions)
    assert plan.made.bytes == 22_505_472 and plan.stored_bytes == 1280 * 22_505_472 + 5e6
    assert plan.shards == 10 * 3 and plan.gets == 100 + 2 * 30
    assert plan.puts == 30 * (4 + 58)
    assert plan.gpu_hours == pytest.approx(128 / 3600) and plan.hours == pytest.approx(32 / 3600)
    assert plan.gpu_cost == pytest.approx(2 * 128 / 3600)
    assert plan.request_cost == pytest.approx(1860 * 1e-5 + 160 * 1e-6)
    assert plan.month_cost == pytest.approx(plan.stored_bytes / 1e9 * 0.02)
    assert plan.cost == pytest.approx(plan.gpu_cost + plan.request_cost + 6 * plan.month_cost)
    assert plan.tokens_saved == 1000 and plan.break_even == pytest.approx(plan.cost / 1280 / 0.0005)
    free = plan.model_copy(update={"prices": prices.model_copy(update={"prompt_per_million": 0.0})})
    assert free.break_even is None and "never" in shown(plan_tables(free, "corpus"))


def test_reading_a_document_again_on_the_same_gpus_costs_less_than_converting_it(qwen3_8b: Path) -> None:
    plan = planned(qwen3_8b, volume(1000, 1000), storage_months=0)
    kept = planned(qwen3_8b, volume(1000, 1000), storage_months=12)
    assert plan.break_even_own is not None and kept.break_even_own is not None
    assert 1 < plan.break_even_own < 3 < kept.break_even_own


def test_small_bases_are_bound_by_passes_and_large_ones_by_flops(qwen3_8b: Path) -> None:
    small = planned(REFERENCE / "base", volume(1600, 100), SETTINGS, pass_s=0.1)
    assert small.gpu_hours == pytest.approx(1600 / 16 * 0.1 / 3600) and "0.1 s a forward pass" in shown(plan_tables(small, "x"))
    long = planned(REFERENCE / "base", volume(1600, 1000), SETTINGS, pass_s=0.1)
    assert long.gpu_hours > 4 * small.gpu_hours
    large = planned(qwen3_8b, volume(1600, 100))
    assert large.gpu_hours == pytest.approx(large.flops / (989e12 * 0.4) / 3600)


def corpus(root: Path, kind: str) -> Path:
    if kind == "files":
        for name, text in DOCUMENTS:
            (root / f"{name}.txt").write_text(text)
    else:
        (root / "rows.jsonl").write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in DOCUMENTS))
    return root


@pytest.mark.parametrize("kind", ["files", "rows"])
def test_a_corpus_that_fits_is_counted(tmp_path: Path, kind: str) -> None:
    plan = plan_conversion(str(corpus(tmp_path, kind)), recipe())
    assert plan.volume.sampled == plan.volume.documents == plan.volume.adapters == len(DOCUMENTS)
    assert plan.volume.tokens == plan.volume.window_tokens == sum(TOKENS)
    assert plan.volume.squared_tokens == sum(tokens**2 for tokens in TOKENS)
    assert plan.volume.text_bytes == sum(len(text.encode()) for _, text in DOCUMENTS)
    assert plan.volume.files == (len(DOCUMENTS) if kind == "files" else 1) and plan.volume.rejected == 0
    assert "all were read" in shown(plan_tables(plan, "corpus"))


@pytest.mark.parametrize("kind", ["files", "rows"])
def test_a_sample_stands_for_the_whole(tmp_path: Path, kind: str) -> None:
    source = str(corpus(tmp_path, kind))
    plans = [plan_conversion(source, recipe("sample.documents=40", f"sample.seed={seed}")) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] and (kind == "rows" or plans[0] != plans[2])
    for plan in plans:
        assert plan.volume.sampled == 40 if kind == "files" else 40 < plan.volume.sampled < len(DOCUMENTS) / 2
        assert plan.volume.documents == pytest.approx(len(DOCUMENTS), rel=0 if kind == "files" else 0.25)
        assert plan.volume.tokens == pytest.approx(sum(TOKENS), rel=0.15)
    assert f"estimated from {plans[0].volume.sampled}" in shown(plan_tables(plans[0], "corpus"))


@pytest.mark.parametrize("most", [1, 3000])
def test_bytes_bound_a_sample(tmp_path: Path, most: int) -> None:
    """To no less than one document of each kind."""
    (tmp_path / "first.md").write_text("One.")
    plan = plan_conversion(str(corpus(tmp_path, "files")), recipe(f"sample.bytes={most}"))
    assert 1 < plan.volume.sampled < 20 and plan.volume.documents == len(DOCUMENTS) + 1


def test_every_kind_of_file_stands_for_itself(tmp_path: Path) -> None:
    """Half of the bytes are pictures, which give no tokens, and empty files are rejected."""
    corpus(tmp_path, "files")
    (tmp_path / "film.mp4").write_bytes(bytes(10**6))
    for number in range(30):
        (tmp_path / f"empty-{number}.md").touch()
    plan = plan_conversion(str(tmp_path), recipe("sample.documents=60"))
    assert plan.volume.rejected == 31 and plan.volume.files == len(DOCUMENTS) + 31
    assert plan.volume.documents == len(DOCUMENTS) and plan.volume.tokens == pytest.approx(sum(TOKENS), rel=0.1)


def test_what_cannot_be_read_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    """Two columns of one name, a date that Python has no type for, a page that breaks off."""
    corpus(tmp_path, "files")
    twice = pa.Table.from_arrays([pa.array(["One."]), pa.array(["Two."])], ["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    late = pa.table({"id": pa.array([3_000_000, 0], pa.int32()).cast(pa.date32()), "text": ["One.", "Two."]})
    pq.write_table(late, tmp_path / "late.parquet")
    (tmp_path / "page.html.gz").write_bytes(gzip.compress(b"<p>One.")[:-4])
    plan = plan_conversion(str(tmp_path), recipe())
    assert plan.volume.rejected == 3 and plan.volume.documents == len(DOCUMENTS) + 1
    assert plan.volume.sampled == len(DOCUMENTS) + 4


def test_a_listing_without_sizes_is_estimated(tmp_path: Path) -> None:
    corpus(tmp_path, "files")
    listing = tmp_path / "listing.txt"
    listing.write_text("".join(f"{path}\n" for path in sorted(tmp_path.glob("*-*.txt"))))
    plan = plan_conversion(f"@{listing}", recipe("sample.documents=40"))
    assert plan.volume.documents == plan.volume.files == len(DOCUMENTS)
    assert plan.volume.tokens == pytest.approx(sum(TOKENS), rel=0.1)


def test_long_documents_are_cut_as_in_conversion(tmp_path: Path) -> None:
    text = " ".join(text for _, text in DOCUMENTS)
    (tmp_path / "long.txt").write_text(text)
    tokens = len(encode(TOKENIZER, text))
    even = ["windows.borders=token", "windows.max_windows=1000"]
    composed = plan_conversion(str(tmp_path), recipe("windows.max_tokens=500", "windows.overlap=50", *even))
    count = -(-(tokens - 50) // 450)
    assert (composed.volume.adapters, composed.volume.windows) == (1, count)
    assert composed.volume.window_tokens == tokens + 50 * (count - 1)
    apart = plan_conversion(
        str(tmp_path), recipe("windows.max_tokens=500", "windows.long_documents=windows", "windows.max_windows=1000")
    )
    assert apart.volume.adapters == apart.volume.windows == len(WindowRule().covers(read(TOKENIZER, text), 500))
    with pytest.raises(ValueError, match="no documents to plan for"):
        plan_conversion(str(tmp_path), recipe("windows.max_tokens=500", "windows.max_windows=2"))
    with pytest.raises(ValueError, match="windows of 5000 tokens"):
        plan_conversion(str(tmp_path), recipe("windows.max_tokens=5000"))


def test_recipes_prices_and_rates(tmp_path: Path) -> None:
    prices, path = tmp_path / "prices.toml", tmp_path / "recipe.toml"
    prices.write_text('currency = "EUR"\ngpu_hour = 2.5\n')
    path.write_text(
        f'base = "{REFERENCE / "base"}"\nencoding = "int4"\n[shape]\nrank = 2\n[prices]\ngpu_hour = 9\nput_per_thousand = 1\n'
    )
    loaded = load_plan_recipe("ignored", None, "12.5", path, prices, 3, ["prices.get_per_thousand=0.5"])
    assert loaded.base == str(REFERENCE / "base") and loaded.hypernetwork is None and loaded.shape.rank == 2
    assert loaded.encoding == "int4" and loaded.assumptions.gpus == 3 and loaded.assumptions.documents_per_s == 12.5
    assert loaded.prices == Prices(currency="EUR", gpu_hour=2.5, put_per_thousand=1, get_per_thousand=0.5)
    assert recipe().hypernetwork == str(REFERENCE / "hypernetwork")
    with pytest.raises(ValueError, match="imprint plan lift"):
        recipe("method=lift")
    result = tmp_path / "result.json"
    result.write_text(
        json.dumps(
            {
                "generation": {"1": {"documents_per_s": 3}, "16": {"documents_per_s": 7.5}},
                "training": {"1": {"documents_per_s": 99}},
            }
        )
    )
    assert measured_rate(str(result)) == 7.5
    result.write_text(json.dumps({"conversion_documents_per_s": {"median": 111.5}, "plain_documents_per_s": {"median": 200}}))
    assert measured_rate(str(result)) == 111.5
    for text in ('{"ratio": 2}', "[", '{"documents_per_s": null}', '{"documents_per_s": {}}'):
        result.write_text(text)
        with pytest.raises(ValueError, match="documents"):
            measured_rate(str(result))
    for rate in ("0", "-1", "nan", "none.json"):
        with pytest.raises(ValueError, match=r"documents_per_s|documents a second"):
            load_plan_recipe(str(REFERENCE / "base"), None, rate, None, None, None, ())


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = str(corpus(tmp_path, "rows"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        plan_conversion(source, recipe(f"base={empty}"))
    with pytest.raises(ValueError, match="no hypernetwork's settings"):
        plan_conversion(source, recipe(f"hypernetwork={empty}"))
    with pytest.raises(ValueError, match="no files under"):
        plan_conversion(str(empty), recipe())
    (empty / "config.json").write_text((REFERENCE / "base" / "config.json").read_text())
    with pytest.raises(ValueError, match="no tokenizer at"):
        plan_conversion(source, recipe(f"base={empty}"))
    (empty / "plan.json").write_text('{"shards": 1}')
    with pytest.raises(ValueError, match="not a plan of this version"):
        read_plan(empty / "plan.json")
    with pytest.raises(ValueError, match=r"no plan at .*--out"):
        read_plan(empty / "none.json")


def test_what_it_took_stands_beside_the_plan(tmp_path: Path) -> None:
    plan = plan_conversion(str(corpus(tmp_path, "files")), recipe("encoding=int8"), tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    figures = summary_of(100).figures()
    on_cpu, on_gpu = took(plan, figures, ConvertRun(actors=4)), took(plan, figures, ConvertRun(actors=2, device="cuda"))
    for taken in (on_cpu, on_gpu):
        assert (taken.volume.documents, taken.volume.rejected, taken.volume.tokens, taken.shards) == (100, 1, 20_000, 2)
        assert taken.adapter_bytes == 5e6 and taken.tokens_saved == 200
        assert taken.flops == pytest.approx(plan.flops * 20_000 / plan.volume.tokens)
    assert on_cpu.gpu_hours == pytest.approx(0.04) and on_cpu.gpu_cost == 0
    assert on_gpu.hours == pytest.approx(0.01) and on_gpu.gpu_cost == pytest.approx(0.02 * 3.0)
    text = shown(taken_table(plan, on_gpu), 160)
    assert "planned" in text and "took" in text and f"{len(DOCUMENTS):,}" in text and "36 s" in text
    assert "of CPU processes" in shown(taken_table(plan, on_cpu), 160)
    with pytest.raises(ValueError, match="no document was converted"):
        actual(plan, 0, 1, 0, 0, 0, 0, 0, 1.0, 1, "CPU")


def test_a_run_says_itself_what_was_planned_and_what_it_took(tmp_path: Path) -> None:
    """By its own source, recipe and hardware; prices and assumptions are for the asking."""
    ran_by = ConvertRecipe.model_validate(
        {**{name: str(REFERENCE / name) for name in ("base", "hypernetwork")}, "run": {"device": "cuda", "actors": 3}}
    )
    about = {"source": str(corpus(tmp_path, "rows")), "recipe": ran_by.model_dump(mode="json")}
    files = RunFiles(str(tmp_path / "store"), about)
    assert "no folder of a run that has finished" in failed("--run", files.url)
    files.finish(summary_of(100, unchanged=500).figures())
    ran = CliRunner(env={"COLUMNS": "100"}).invoke(imprint.app, ["plan", "convert", "--run", files.url])
    assert ran.exit_code == 0, ran.output
    assert where_planned(summary_of(1), ran_by) == ["beside its plan: imprint plan convert --run receipts"]
    assert where_planned(summary_of(0), ran_by) == []
    lines = {line.partition("  ")[0].strip(): line.split() for line in ran.output.splitlines()}
    assert lines["documents"] == ["documents", "600", "100", "beside", "500", "that", "had", "adapters", "already"]
    assert lines["by the clock"][5:9] == ["36", "s", "3", "GPUs:"] and "0.06" not in lines["USD for GPUs"]
    dearer = CliRunner(env={"COLUMNS": "100"}).invoke(
        imprint.app, ["plan", "convert", "--run", files.url, "--set", "prices.gpu_hour=6"]
    )
    assert dearer.exit_code == 0 and "at 6 an hour" in dearer.output
    idle = RunFiles(str(tmp_path / "store"), about)
    idle.finish(summary_of(0, unchanged=600).figures())
    assert "converted no document" in failed("--run", idle.url)
    for arguments in ([], *(["--run", files.url, *more] for more in ([str(tmp_path)], ["--recipe", "recipe.toml"]))):
        assert "give a source, or" in failed(*arguments)
    for name in ("base", "hypernetwork"):
        assert "a run has its own source, models" in failed("--run", files.url, f"--{name}", str(REFERENCE / name))
    older = RunFiles(str(tmp_path / "store"), about)
    older.finish({name: value for name, value in summary_of(100).figures().items() if name != "shards"})
    assert "by an earlier version, without shards: name a run of this version, or plan" in failed("--run", older.url)


def failed(*arguments: str) -> str:
    ran = CliRunner().invoke(imprint.app, ["plan", "convert", *arguments])
    assert ran.exit_code == 2, ran.output
    return " ".join(ran.output.split())


def summary_of(converted: int, unchanged: int = 0) -> Summary:
    """Of a run of 36 s that rejected one document."""
    summary = Summary("receipts", convert_s=36.0)
    row = {"name": "n", "source_bytes": 0, "read_at": 0.0}
    for number in range(converted):
        made = {"adapter_ids": ["a"], "shard": f"shard-{number // 50}", "bytes": 50_000, "tokens": 200}
        summary.add(receipt_of(row, "converted", None, **made))
    for _ in range(unchanged):
        summary.add(receipt_of(row, "unchanged", None, tokens=200))
    summary.add(receipt_of(row, "rejected", "empty"))
    return summary


def test_tables_fit_the_terminal(qwen3_8b: Path) -> None:
    plan = planned(qwen3_8b, volume(9_999_999, 1150), gpus=64)
    for width in (100, 160):
        assert max(map(len, shown(plan_tables(plan, "s3://bucket/corpus"), width).splitlines())) <= width
    assert "…" not in shown(plan_tables(plan, "s3://bucket/corpus"), 100)
    run = ConvertRun(actors=64, device="cuda")
    plan = planned(qwen3_8b, volume(9999, 1000), gpus=64)
    taken = took(plan, {**summary_of(9999).figures(), "tokens": 9_999_999, "convert_s": 99_999}, run)
    lines = shown(taken_table(plan, taken), 100).splitlines()
    assert max(map(len, lines)) <= 100 and len(lines) == len(shown(taken_table(plan, taken), 160).splitlines())


def test_figures_as_people_read_them() -> None:
    assert [size(value) for value in (0, 999, 1000, 43_646_976, 87.3e12, 999.6e12)] == [
        "0 bytes", "999 bytes", "1 kB", "43.6 MB", "87.3 TB", "1 PB",
    ]  # fmt: skip
    assert [money(value) for value in (0, 0.0123, 1.5, 99.99, 24166.2)] == ["0", "0.012", "1.50", "99.99", "24,166"]
    assert [duration(value) for value in (5.86, 600, 7200, 48 * 3600)] == ["5.86 s", "10 min", "2 h", "2 days"]


def test_the_command(tmp_path: Path) -> None:
    source, out = str(corpus(tmp_path, "rows")), tmp_path / "plan.json"
    ran = CliRunner().invoke(imprint.app, ["plan", "convert", source, "--gpus", "2", "--set", "encoding=int4", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "pays off after" in ran.output and "in int4" in ran.output
    assert read_plan(out).assumptions.gpus == 2
    ran = CliRunner().invoke(imprint.app, ["plan", "convert", str(tmp_path / "none")])
    assert ran.exit_code == 2 and "nothing at" in ran.output

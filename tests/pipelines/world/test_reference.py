"""The shipped weights: they load, fit each other and their card, and answer for documents that nothing has seen."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from core.adapters.base_model import load_base
from core.shine.hypernetwork import Hypernetwork
from pipelines.evaluation.evaluate import evaluate
from pipelines.world.documents import WorldSpec, generate, specification_fingerprint
from pipelines.world.reference import MOST_BYTES, REFERENCE
from pipelines.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def reference():
    base = load_base(REFERENCE / "base")
    return base, Hypernetwork.load(REFERENCE / "hypernetwork", base)


def test_the_card_describes_these_weights(reference):
    base, hypernetwork = reference
    card = json.loads((REFERENCE / "model_card.json").read_text())
    assert card["base"]["fingerprint"] == base.fingerprint
    assert card["hypernetwork"]["fingerprint"] == hypernetwork.fingerprint()
    assert card["world"]["specification"] == specification_fingerprint()
    for part in ("base", "hypernetwork"):
        assert len(card[part]["trained_from_commit"]) == 40
        assert all(len(corpus["sha256"]) == 64 for corpus in card[part]["corpus"])
    assert hypernetwork.trained_tokens == 217, "the longest of the 55,000 documents"
    assert base.tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert sum(file.stat().st_size for file in REFERENCE.rglob("*.safetensors")) <= MOST_BYTES


def test_adapters_answer_for_unseen_documents_and_only_for_their_own(reference):
    base, hypernetwork = reference
    report = evaluate(base, hypernetwork, list(generate(WorldSpec(seed=99, split="test", count=40))))
    group = report.groups["level_1"]
    assert group.scores["in_context"]["one_fact"].exact_match.mean > 0.97
    assert group.ratio_one_fact > 0.95
    assert group.scores["other_adapter"]["all"].exact_match.mean < 0.15
    assert group.scores["question_only"]["all"].exact_match.mean < 0.15
    assert group.collapse["ratio"] > 0.8


@pytest.mark.slow
def test_the_demo_runs_and_leaves_nothing_behind(tmp_path):
    """`imprint demo`, whole, as a person runs it."""
    subprocess.run([sys.executable, "-m", "imprint", "demo", "--out", str(tmp_path / "demo")], check=True, timeout=900)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    scores = report["exact_match"]
    assert set(scores) == {"question_only", "in_context", "adapter", "other_adapter", "mean_adapter"}
    assert scores["adapter"] > 0.9 > 0.15 > scores["other_adapter"]
    assert report["seconds"] < 600
    assert {file.name for file in (tmp_path / "demo").iterdir()} >= {"report.md", "training.png", "exact_match.png", "store"}


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [20, 60, 150])
def test_ctrl_c_leaves_nothing_running(tmp_path, after_s):
    process = subprocess.Popen(
        [sys.executable, "-m", "imprint", "demo", "--out", str(tmp_path / "demo")],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(after_s)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    os.killpg(process.pid, signal.SIGINT)
    process.wait(90)
    alive = [pid for pid in family if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert not alive, [Path(f"/proc/{pid}/cmdline").read_text() for pid in alive]

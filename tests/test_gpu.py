"""What must hold on a GPU, too: `pytest -m gpu`. Needs only PyTorch, transformers, safetensors and pytest beside the project."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from core.adapters.base_model import BaseModel
from core.adapters.lora import attach
from core.engine.requests import Request
from core.engine.token_loop import generate
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from tests.core.shine.test_shine_parity import SETS, from_tensors, golden_base, load, lora_difference, loss_and_logits
from tests.models import random_adapters, random_ids, tiny_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", SETS)
def test_forward_equals_the_released_code(name, tmp_path):
    torch.backends.cuda.matmul.allow_tf32 = False
    base = golden_base(name, tmp_path)
    hypernetwork = from_tensors(name, base)
    base.model.cuda()
    hypernetwork.cuda()
    inputs = {key: value.cuda() for key, value in load(name, "inputs").items()}
    with torch.no_grad():
        weights = hypernetwork.generate(inputs["context_ids"], inputs["context_attention_mask"])
        assert lora_difference(weights.to("cpu"), load(name, "generated_lora")) < 1e-5
        with attach(base, weights):
            loss, logits = loss_and_logits(base, inputs, "")
    outputs = load(name, "outputs")
    assert (logits.cpu() - outputs["logits"]).abs().max() < 1e-4
    assert abs(loss.cpu() - outputs["loss"]) < 2e-5


def test_a_mixed_batch_equals_single_runs():
    base = tiny_base()
    base.model.cuda()
    weights = random_adapters(base, 16).to("cuda")
    ids = random_ids(17, 24).cuda()
    index = torch.tensor([*range(16), -1]).cuda()
    with torch.no_grad(), attach(base, weights, index):
        together = base.model(ids).logits
    for row in range(17):
        with torch.no_grad(), attach(base, weights, index[row : row + 1]):
            alone = base.model(ids[row : row + 1]).logits
        assert torch.allclose(together[row], alone[0], atol=1e-4)


def test_qwen3_shapes_in_bf16_train_and_answer():
    config = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8, head_dim=128
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = BaseModel(model)
    settings = HypernetworkSettings(rank=8, meta_rank=16, num_heads=8, feed_forward=2048, input_norm="rms", initial_delta=0.05)
    hypernetwork = Hypernetwork(base, settings)
    ids = torch.randint(0, 1000, (2, 256), device="cuda")
    with torch.autocast("cuda", torch.bfloat16), base.checkpointing():
        weights = hypernetwork.generate(ids, torch.ones_like(ids))
        with attach(base, weights):
            logits = base.model(ids).logits
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    for name, parameter in hypernetwork.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    adapters = weights.detach().to(dtype=torch.bfloat16)
    requests = [
        Request(str(row), ids[row % 2, :32].tolist(), 8, adapters.select(slice(row % 2, row % 2 + 1))) for row in range(8)
    ]
    answers = generate(base, requests, slots=8)
    assert all(len(answers[str(row)].token_ids) == 8 for row in range(8))

"""The hypernetwork against numbers that SHINE's own code produced (tests/golden/shine_*; limits from their READMEs)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.adapters.base_model import BaseModel, load_base
from core.adapters.lora import LoraWeights, attach
from core.adapters.spec import SITES, SiteShape
from core.shine.hypernetwork import Hypernetwork, HypernetworkSettings
from tests.places import GOLDEN

SETS = ("shine_p1", "shine_p2")


def load(name: str, file: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name / f"{file}.safetensors")


def golden_base(name: str, tmp_path: Path) -> BaseModel:
    directory = tmp_path / name
    directory.mkdir()
    shutil.copy(GOLDEN / name / "base_config.json", directory / "config.json")
    shutil.copy(GOLDEN / name / "base.safetensors", directory / "model.safetensors")
    return load_base(directory)


def golden_settings(name: str) -> HypernetworkSettings:
    manifest = json.loads((GOLDEN / name / "manifest.json").read_text())
    m2p = manifest["m2p"]
    return HypernetworkSettings(
        rank=manifest["lora_r"],
        meta_rank=manifest["metalora_r"],
        num_layers=m2p["num_layers"],
        num_heads=m2p["nhead"],
        feed_forward=m2p["dim_feedforward"],
        scale=m2p["scale"],
    )


def from_tensors(name: str, base: BaseModel) -> Hypernetwork:
    hypernetwork = Hypernetwork(base, golden_settings(name))
    stored = load(name, "hypernetwork")
    meta = [stored[f"metalora.{e.layer}.{e.site}.{e.tensor}"].flatten() for e in hypernetwork.meta_spec.table]
    state = {key: value for key, value in stored.items() if key.startswith("m2p.")}
    state |= {"memory_MH": stored["mem_tokens"], "meta_1N": torch.cat(meta)[None], "gain_K": hypernetwork.gain_K}
    hypernetwork.load_state_dict(state)
    return hypernetwork


def from_release(name: str, base: BaseModel) -> Hypernetwork:
    return Hypernetwork.from_shine_release(GOLDEN / name / "checkpoint-7", base, golden_settings(name))


def lora_difference(weights: LoraWeights, stored: dict[str, torch.Tensor]) -> float:
    worst = 0.0
    for (layer, site, tensor), value in weights.tensors.items():
        worst = max(worst, (value - stored[f"lora.{layer}.{site}.{tensor}"]).abs().max().item())
    return worst


def loss_and_logits(base: BaseModel, inputs: dict[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    names = {"beam": ("beam_ids", "beam_attention_mask", "beam_labels"), "": ("input_ids", "input_attention_mask", "labels")}[
        prefix
    ]
    ids, mask, labels = (inputs[key] for key in names)
    logits = base.model(input_ids=ids, attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return loss, logits * mask[:, :, None]


@pytest.mark.parametrize("make", [from_tensors, from_release])
@pytest.mark.parametrize("name", SETS)
def test_forward_equals_the_released_code(name, make, tmp_path):
    base = golden_base(name, tmp_path)
    hypernetwork = make(name, base)
    inputs, outputs = load(name, "inputs"), load(name, "outputs")
    with torch.no_grad():
        states = hypernetwork.memory_states(inputs["context_ids"], inputs["context_attention_mask"])
        weights = hypernetwork.generate(inputs["context_ids"], inputs["context_attention_mask"])
        assert (states - load(name, "memory_states")["memory_states"]).abs().max() < 5e-5
        assert lora_difference(weights, load(name, "generated_lora")) < 5e-6
        loss, logits = loss_and_logits(base, inputs, "")
        assert (logits - outputs["logits_base"]).abs().max() < 1e-4
        assert abs(loss - outputs["loss_base"]) < 2e-5
        with attach(base, weights):
            loss, logits = loss_and_logits(base, inputs, "")
        assert (logits - outputs["logits"]).abs().max() < 1e-4
        assert abs(loss - outputs["loss"]) < 2e-5
        with attach(base, weights, torch.tensor([0, 0, 1, 1, 2, 2])):
            loss, logits = loss_and_logits(base, inputs, "beam")
        assert (logits - outputs["beam_logits"]).abs().max() < 1e-4
        assert abs(loss - outputs["beam_loss"]) < 2e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [from_tensors, from_release])
@pytest.mark.parametrize("name", SETS)
def test_gradients_equal_the_released_code(name, make, checkpointing, tmp_path):
    base = golden_base(name, tmp_path)
    hypernetwork = make(name, base)
    inputs = load(name, "inputs")
    with base.checkpointing(checkpointing):
        weights = hypernetwork.generate(inputs["context_ids"], inputs["context_attention_mask"])
        with attach(base, weights):
            loss, _ = loss_and_logits(base, inputs, "")
    loss.backward()
    gradients = {f"m2p.{key}": parameter.grad for key, parameter in hypernetwork.m2p.named_parameters()}
    gradients["mem_tokens"] = hypernetwork.memory_MH.grad
    for (layer, site, tensor), value in hypernetwork.meta_spec.split(hypernetwork.meta_1N.grad).items():
        gradients[f"metalora.{layer}.{site}.{tensor}"] = value
    norms = json.loads((GOLDEN / name / "grad_norms.json").read_text())["per_tensor"]
    assert norms.keys() == gradients.keys()
    for key, norm in norms.items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=1e-4), key
    for key, full in load(name, "grads").items():
        assert torch.allclose(gradients[key], full, rtol=1e-4, atol=1e-6), key


def test_additional_meta_lora_of_instruction_tuning(tmp_path):
    base = golden_base("shine_p2", tmp_path)
    hypernetwork = Hypernetwork.from_shine_release(GOLDEN / "shine_p2" / "checkpoint-ift-11", base, golden_settings("shine_p2"))
    inputs, expected = load("shine_p2", "inputs"), load("shine_p2", "ift_additional")
    with torch.no_grad():
        states = hypernetwork.memory_states(inputs["context_ids"], inputs["context_attention_mask"])
        assert (states - expected["memory_states"]).abs().max() < 5e-5
        with attach(base, hypernetwork.generate(inputs["context_ids"], inputs["context_attention_mask"])):
            loss, logits = loss_and_logits(base, inputs, "")
    assert (logits - expected["logits"]).abs().max() < 1e-4
    assert abs(loss - expected["loss"]) < 2e-5
    assert not hypernetwork.meta_1N.requires_grad
    assert hypernetwork.additional_meta_1N.requires_grad
    for (layer, site, tensor), value in hypernetwork.additional_meta_spec.split(hypernetwork.additional_meta_1N).items():
        assert torch.equal(value, expected[f"additional_metalora.{layer}.{site}.{tensor}"])


def test_layout_with_and_without_generated_bias():
    golden = json.loads((GOLDEN / "shine_p2" / "layouts.json").read_text())
    rank, scale = golden["r"], golden["scale"]
    for bias, key in ((False, "rl"), (True, "rl_bias")):
        shape = SiteShape("q", golden["in_features"], golden["out_features"], bias)
        from core.adapters.spec import AdapterSpec

        spec = AdapterSpec(((shape,),), rank)
        plain = torch.arange(golden["batch"] * spec.numel, dtype=torch.float32).view(golden["batch"], -1)
        gains = {"A": scale**0.5, "B": scale**0.5, "C": scale}
        tensors = {tensor: value * gains[tensor] for (_, _, tensor), value in spec.split(plain).items()}
        expected = golden["layouts"][key]
        for tensor, value in tensors.items():
            assert torch.equal(value, torch.tensor(expected[tensor])), (key, tensor)
        assert ("C" in tensors) == (expected["C"] is not None)


def test_release_with_wrong_settings_says_which(tmp_path):
    base = golden_base("shine_p1", tmp_path)
    directory = GOLDEN / "shine_p1" / "checkpoint-7"
    right = golden_settings("shine_p1").model_dump()
    with pytest.raises(ValueError, match="meta_rank"):
        Hypernetwork.from_shine_release(directory, base, {**right, "meta_rank": 4})
    with pytest.raises(ValueError, match="num_layers"):
        Hypernetwork.from_shine_release(directory, base, {**right, "num_layers": 2})
    with pytest.raises(ValueError, match="settings do not fit"):
        Hypernetwork.from_shine_release(directory, base, {**right, "rank": 8})
    with pytest.raises(ValueError, match="scale"):
        Hypernetwork.from_shine_release(directory, base, {**right, "scale": -1})
    with pytest.raises(ValueError, match="layers"):
        Hypernetwork.from_shine_release(GOLDEN / "shine_p2" / "checkpoint-7", base, right)


def test_release_files_are_opened_without_trust(tmp_path):
    base = golden_base("shine_p1", tmp_path)
    directory = tmp_path / "release"
    shutil.copytree(GOLDEN / "shine_p1" / "checkpoint-7", directory)
    torch.save({"layer_pe": Trap()}, directory / "metanetwork.pth")
    with pytest.raises(ValueError, match="weights_only"):
        Hypernetwork.from_shine_release(directory, base, golden_settings("shine_p1"))
    assert not Trap.sprung


class Trap:
    sprung = False

    def __setstate__(self, state):
        Trap.sprung = True

    def __getstate__(self):
        return {"armed": True}


@pytest.mark.parametrize("name", SETS)
def test_import_saves_and_loads_unchanged(name, tmp_path):
    base = golden_base(name, tmp_path)
    hypernetwork = from_release(name, base)
    hypernetwork.save(tmp_path / "saved")
    again = Hypernetwork.load(tmp_path / "saved", base)
    assert again.settings == hypernetwork.settings
    assert again.fingerprint() == hypernetwork.fingerprint()
    for key, value in hypernetwork.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert set(again.spec.layers[0][0]._fields) >= {"site"} and tuple(s.site for s in again.spec.layers[0]) == SITES

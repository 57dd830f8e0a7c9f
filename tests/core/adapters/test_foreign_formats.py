"""PEFT's files in both directions, checked with PEFT itself; released SHINE directories stand in test_shine_parity."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from core.adapters.base_model import BaseModel
from core.adapters.foreign_formats import check_peft_base, holds_peft, read_peft, write_peft
from core.adapters.lora import LoraWeights, attach
from tests.models import random_adapters, random_ids, tiny_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_logits(base: BaseModel, directory: Path) -> torch.Tensor:
    """base: one that nothing else uses, since PEFT changes the model."""
    model = PeftModel.from_pretrained(base.model, directory)
    with torch.no_grad():
        return model(input_ids=random_ids(2, 9)).logits


def our_logits(base: BaseModel, weights: LoraWeights) -> torch.Tensor:
    with torch.no_grad(), attach(base, weights):
        return base.model(input_ids=random_ids(2, 9)).logits


def peft_adapter(directory: Path, architecture: str = "qwen3", **config: object) -> Path:
    """An adapter that PEFT made and saved, with random A and B."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(tiny_base(architecture).model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_peft_gives_our_logits(architecture, tmp_path):
    base = tiny_base(architecture)
    weights = random_adapters(base, 3, rank=3).select(slice(1, 2))
    write_peft(tmp_path, base, weights)
    ours = our_logits(base, weights)
    assert (peft_logits(tiny_base(architecture), tmp_path) - ours).abs().max() < 1e-4
    with torch.no_grad():
        assert (base.model(input_ids=random_ids(2, 9)).logits - ours).abs().max() > 0.2
    assert torch.equal(read_peft(tmp_path, base).flat_BN, weights.flat_BN)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["v_proj", "q_proj"]},
        {"target_modules": ["down_proj", "k_proj"], "layers_to_transform": [0, 2]},
    ],
    ids=["all", "some sites", "some layers"],
)
def test_peft_to_ours_to_peft_is_the_identity(architecture, config, tmp_path):
    peft_adapter(tmp_path / "theirs", architecture, **config)
    base = tiny_base(architecture)
    weights = read_peft(tmp_path / "theirs", base)
    assert (our_logits(base, weights) - peft_logits(tiny_base(architecture), tmp_path / "theirs")).abs().max() < 1e-4
    write_peft(tmp_path / "ours", base, weights)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(
        peft_logits(tiny_base(architecture), tmp_path / "ours"), peft_logits(tiny_base(architecture), tmp_path / "theirs")
    )


@pytest.mark.parametrize("config", [{"lora_alpha": 10}, {"use_rslora": True}, {"lora_alpha": 3, "use_rslora": True}])
def test_alpha_is_folded_into_b(config, tmp_path):
    peft_adapter(tmp_path / "theirs", **config)
    base = tiny_base()
    weights = read_peft(tmp_path / "theirs", base)
    write_peft(tmp_path / "ours", base, weights)
    theirs = peft_logits(tiny_base(), tmp_path / "theirs")
    assert (our_logits(base, weights) - theirs).abs().max() < 1e-4
    assert (peft_logits(tiny_base(), tmp_path / "ours") - theirs).abs().max() < 1e-4
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    a_BIR, b_BRO = weights.factors(1, "up")
    scale = config.get("lora_alpha", 4) / (2 if config.get("use_rslora") else 4)
    assert torch.allclose(a_BIR[0] @ b_BRO[0], (stored[name + "B.weight"] @ stored[name + "A.weight"]).T * scale, atol=1e-6)


RANKS = {"q_proj": 6, r"layers\.1\.mlp\.(gate|up)_proj": 2}
ALPHAS = {"v_proj": 7, "layers.2.self_attn.q_proj": 3, "o_proj": 4}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"exclude_modules": ["k_proj"]}])
def test_ranks_and_alphas_by_pattern_are_pefts_own(config, tmp_path):
    peft_adapter(tmp_path / "theirs", rank_pattern=RANKS, alpha_pattern=ALPHAS, lora_alpha=5, **config)
    base = tiny_base()
    weights = read_peft(tmp_path / "theirs", base)
    assert weights.spec.rank == 6
    assert (our_logits(base, weights) - peft_logits(tiny_base(), tmp_path / "theirs")).abs().max() < 1e-4


def test_only_what_an_adapter_changes_is_read(tmp_path):
    peft_adapter(tmp_path, target_modules=["down_proj", "k_proj"], layers_to_transform=[0, 2])
    spec = read_peft(tmp_path, tiny_base()).spec
    assert [[shape.site for shape in shapes] for shapes in spec.layers] == [["k", "down"], [], ["k", "down"]]


def test_no_number_of_an_adapter_in_several_types_is_rounded(tmp_path):
    peft_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = min(tensors)
    tensors[first] = tensors[first].bfloat16()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    weights, name = read_peft(tmp_path, tiny_base()), "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"
    assert weights.flat_BN.dtype == torch.float32
    assert torch.equal(weights.factors(2, "up")[1][0], tensors[name].T)


def test_an_adapter_of_another_base_is_known_by_fingerprint_or_name(tmp_path):
    base, other = tiny_base(), tiny_base(seed=1)
    write_peft(tmp_path / "ours", base, random_adapters(base, 1), base_name="org/one")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/one"
    assert holds_peft(tmp_path / "ours", "org/one") and not holds_peft(tmp_path / "ours", "org/two")
    check_peft_base(tmp_path / "ours", base, "another/name")
    with pytest.raises(ValueError, match="a base with other weights"):
        check_peft_base(tmp_path / "ours", other, "org/one")
    theirs = peft_adapter(tmp_path / "theirs")
    check_peft_base(theirs, base, "org/one")  # PEFT knew no name, for the model was made in memory
    edit_config(theirs, base_model_name_or_path="org/one")
    check_peft_base(theirs, base, "org/one")
    with pytest.raises(ValueError, match=r"was trained for org/one, and the base is org/two.*--base-name org/one"):
        check_peft_base(theirs, base, "org/two")
    edit_config(theirs, base_model_name_or_path=str(tmp_path / "ours" / ".." / "ours"))
    check_peft_base(theirs, base, str(tmp_path / "ours"))


def test_damaged_files_are_refused(tmp_path):
    peft_adapter(tmp_path)
    stored = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(stored[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged .*: copy or save"):
        read_peft(tmp_path, tiny_base())
    with pytest.raises(ValueError, match="is damaged"):
        check_peft_base(tmp_path, tiny_base(), "base")
    for text, message in (("{", "is not JSON"), ("[]", "nameless adapter")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_peft(tmp_path, tiny_base())
    assert not holds_peft(tmp_path, None)


def test_bf16_stays_bf16(tmp_path):
    base = tiny_base(dtype=torch.bfloat16)
    weights = random_adapters(base, 1)
    write_peft(tmp_path, base, weights)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    again = read_peft(tmp_path, base)
    assert again.flat_BN.dtype == torch.bfloat16 and torch.equal(again.flat_BN, weights.flat_BN)


def test_an_adapter_of_zeros_is_written_whole(tmp_path):
    base = tiny_base()
    write_peft(tmp_path, base, LoraWeights(base.spec(2), torch.zeros(1, base.spec(2).numel)))
    assert not read_peft(tmp_path, base).flat_BN.any()
    with torch.no_grad():
        assert torch.equal(peft_logits(tiny_base(), tmp_path), base.model(input_ids=random_ids(2, 9)).logits)


def test_what_cannot_be_exported(tmp_path):
    base = tiny_base("qwen2")
    with pytest.raises(ValueError, match="hold one adapter, 2 were given: select one"):
        write_peft(tmp_path, base, random_adapters(base, 2))
    with pytest.raises(ValueError, match="cannot hold a generated bias"):
        write_peft(tmp_path, base, random_adapters(base, 1, generated_bias=True))
    with pytest.raises(ValueError, match="made for another base"):
        write_peft(tmp_path, tiny_base("qwen3"), random_adapters(base, 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "uses use_dora: only a plain LoRA can be read .*scales the base's own weights"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save.*replaces whole modules"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out.*transposed"),
        ({"lora_bias": True}, "uses lora_bias.*adds a bias to B"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "uses layer_replication.*runs layers of the base twice"),
        ({"target_parameters": ["mlp.experts"]}, "uses target_parameters"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern or alpha_pattern in adapter_config.json is no table"),
        ({"alpha_pattern": {"(": 2}}, "rank_pattern or alpha_pattern in adapter_config.json is no table"),
        ({"r": 0}, "rank 0 .*r is 1 or more"),
        ({"r": "four"}, "rank 'four'"),
        ({"lora_alpha": None}, "alpha None"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj\.lora_A is \(4, 32\), r and the base want \(2, 32\)"),
        ({"alora_invocation_tokens": [5]}, "uses alora_invocation_tokens"),
        ({"trainable_token_indices": [5]}, "uses trainable_token_indices"),
        ({"some_later_kind": {"on": True}}, "uses some_later_kind"),
        ({"bias": "lora_only"}, "only bias = none"),
        ({"peft_type": "IA3"}, "holds a IA3 adapter: only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base too: convert it"),
        ({"r": 3}, r"lora_A is \(4, 32\), r and the base want \(3, 32\)"),
    ],
)
def test_other_kinds_of_adapters_are_refused(changes, message, tmp_path):
    edit_config(peft_adapter(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        read_peft(tmp_path, tiny_base())


def test_dora_as_peft_saves_it_is_refused(tmp_path):
    peft_adapter(tmp_path, use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        read_peft(tmp_path, tiny_base())


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens"]])
def test_unknown_modules_are_refused(targets, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_base(tied=False).model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=f"does not have or Imprint does not adapt.*{targets[0]}.*give the base"):
        read_peft(tmp_path, tiny_base(tied=False))


def test_adapters_of_another_base_are_refused(tmp_path):
    peft_adapter(tmp_path, "qwen3")
    with pytest.raises(ValueError, match=r"q_proj\.lora_B is \(48, 4\).*\(32, 4\): give the base it was trained for"):
        read_peft(tmp_path, tiny_base("llama"))


def test_half_a_linear_is_refused(tmp_path):
    peft_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"only one factor of model\.layers\.1\.mlp\.up_proj"):
        read_peft(tmp_path, tiny_base())


def test_a_directory_without_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        read_peft(tmp_path, tiny_base())
    peft_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        read_peft(tmp_path, tiny_base())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="lacks lora_alpha, r"):
        read_peft(tmp_path, tiny_base())

"""Loading a base, what is refused, what its fingerprint covers, and recomputation in backward."""

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from core.adapters.base_model import BaseModel, load_base
from core.adapters.spec import SITES
from tests.architectures import tiny_model
from tests.models import random_ids, tiny_base, tiny_config
from tests.places import ROOT

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer(words: str = "a b c d", template: str = TEMPLATE, end: str = "</s>") -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words.split()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=end, unk_token="<unk>")
    made.chat_template = template
    return made


def saved(directory: Path, dtype: torch.dtype = torch.float32, architecture: str = "qwen3", tied: bool = True) -> Path:
    tiny_base(architecture, tied, dtype=dtype).model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_a_saved_model_loads_as_it_was(architecture, tied, tmp_path):
    ids_BT = random_ids(2, 7)
    made, loaded = tiny_base(architecture, tied), load_base(saved(tmp_path, architecture=architecture, tied=tied))
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids_BT).logits, made.model(input_ids=ids_BT).logits)
        states_BTH = loaded.hidden_states(ids_BT)
        assert torch.allclose(loaded.logits(states_BTH), made.model(input_ids=ids_BT).logits, atol=1e-5)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.tokenizer is None and loaded.max_length == 256 and loaded.hidden_size == 32
    assert loaded.dtype == torch.float32 and loaded.device == torch.device("cpu")
    assert not loaded.model.training and not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.model.get_output_embeddings().weight is loaded.embedding.weight) == tied
    assert len(loaded.linears) == 3 * len(SITES)
    assert loaded.linear_names[2, "down"] == "model.layers.2.mlp.down_proj"


def test_bf16_and_eager_attention(tmp_path):
    base = load_base(str(saved(tmp_path)), dtype=torch.bfloat16, attention="eager")
    assert base.dtype == torch.bfloat16 and base.model.config._attn_implementation == "eager"


def test_a_directory_without_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json: give a model directory"):
        load_base(tmp_path)
    with pytest.raises(ValueError, match=r"no model with safetensors weights at .*absent"):
        load_base(tmp_path / "absent")


def test_pickled_weights_are_refused(tmp_path):
    saved(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model with safetensors weights"):
        load_base(tmp_path)


@pytest.mark.filterwarnings("ignore:.*were not initialized.*")
def test_absent_weights_are_refused(tmp_path):
    """transformers would draw them at random."""
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        load_base(tmp_path)


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTNeoXConfig(**SMALL), "has no decoder with layers and a last norm"),
        (GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2), "has no decoder with layers and a last norm"),
        (Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0), r"one linear q_proj.*has none.*fused"),
        (
            Qwen2MoeConfig(
                **SMALL, num_key_value_heads=2, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
            ),
            r"one linear gate_proj.*has mlp\.shared_expert\.gate_proj.*expert",
        ),
    ],
    ids=["GPT-NeoX", "GPT-2", "Phi-3", "Qwen2-MoE"],
)
def test_fused_and_expert_projections_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        BaseModel(AutoModelForCausalLM.from_config(config))


def test_layers_that_share_a_linear_are_refused():
    model = AutoModelForCausalLM.from_config(tiny_config())
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="shares linears between layers"):
        BaseModel(model)


def test_spec_names_the_sites():
    base = tiny_base("qwen2")
    spec = base.spec(2, sites=("down", "q"), generated_bias=True)
    assert [(site.site, site.in_features, site.out_features, site.bias) for site in spec.layers[0]] == [
        ("q", 32, 32, True),
        ("down", 48, 32, False),
    ]
    assert base.spec(2).layers[0][1].out_features == 16
    with pytest.raises(ValueError, match="no linear is called lm_head, qq: choose from q, k"):
        base.spec(2, sites=("q", "qq", "lm_head"))


# Identity


def test_a_bf16_checkpoint_has_one_fingerprint(tmp_path):
    saved(tmp_path / "half", torch.bfloat16)
    half = load_base(tmp_path / "half", dtype=torch.bfloat16)
    assert load_base(tmp_path / "half").fingerprint == half.fingerprint
    assert load_base(tmp_path / "half", attention="eager").fingerprint == half.fingerprint
    saved(tmp_path / "full")
    assert load_base(tmp_path / "full").fingerprint != half.fingerprint


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_has_one_fingerprint_whatever_it_runs_in(stored, named, tmp_path):
    """Also where its config.json does not name its type."""
    saved(tmp_path, stored)
    config = json.loads((tmp_path / "config.json").read_text())
    if not named:
        del config["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    prints = {load_base(tmp_path, dtype=dtype).fingerprint for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert prints == {load_base(tmp_path, dtype=stored).fingerprint}
    assert prints == {BaseModel(tiny_base(dtype=stored).model).fingerprint}


def test_the_type_of_a_part_is_no_identity(tmp_path):
    tiny_model("gemma3").save_pretrained(tmp_path)
    assert load_base(tmp_path).fingerprint == load_base(tmp_path, dtype=torch.bfloat16).fingerprint


def test_the_reference_base_keeps_its_fingerprint():
    card = json.loads((ROOT / "assets/reference/model_card.json").read_text())
    for dtype in (torch.float32, torch.bfloat16):
        assert load_base(ROOT / "assets/reference/base", dtype=dtype).fingerprint == card["base"]["fingerprint"]


def test_one_weight_changes_the_fingerprint():
    base, other = tiny_base(), tiny_base()
    with torch.no_grad():
        other.linears[1, "v"].weight[0, 0] += 1e-6
    assert base.fingerprint != other.fingerprint
    assert base.fingerprint == tiny_base().fingerprint != tiny_base(seed=1).fingerprint


def test_configuration_changes_the_fingerprint():
    config = tiny_config()
    config.rms_norm_eps = 1e-5
    other = AutoModelForCausalLM.from_config(config)
    other.load_state_dict(tiny_base().model.state_dict())
    assert BaseModel(other).fingerprint != tiny_base().fingerprint


def test_text_identity(tmp_path):
    saved(tmp_path)
    bare = load_base(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert base.tokenizer is not None and base.tokenizer("a c")["input_ids"] == [4, 6]
    prints = [bare.fingerprint, base.fingerprint]
    for other in (tokenizer("a b d c"), tokenizer(template=TEMPLATE + "!"), tokenizer(end="<s>")):
        other.save_pretrained(tmp_path)
        prints.append(load_base(tmp_path).fingerprint)
    assert len(set(prints)) == len(prints)


def test_using_the_tokenizer_leaves_the_fingerprint(tmp_path):
    """A fast tokenizer keeps the padding and truncation of its last call in its own description."""
    saved(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    used, fresh = load_base(tmp_path), load_base(tmp_path)
    used.tokenizer(["a b", "c"], padding=True, truncation=True, max_length=5)
    assert used.fingerprint == fresh.fingerprint


def test_answers_end_where_the_model_s_configurations_say(tmp_path):
    """`generation_config.json` lists end marks that neither the tokenizer nor its template names."""
    saved(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load_base(tmp_path).stop_ids == {2}
    for ids, expected in (([5, 6], {2, 5, 6}), (7, {2, 7})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert load_base(tmp_path).stop_ids == expected
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 4]}))
    assert load_base(tmp_path).stop_ids == {2, 4, 7}
    with pytest.raises(ValueError, match="has no tokenizer"):
        assert tiny_base().stop_ids


# Recomputation


def test_checkpointing_sets_the_layers_flags_and_nothing_else():
    """Dropout of the base stays off, and embeddings ask for no gradient once the context is left."""
    config = tiny_config()
    config.attention_dropout = 0.5
    base, ids_BT = BaseModel(AutoModelForCausalLM.from_config(config)), random_ids(2, 7)
    plain = base.model(input_ids=ids_BT, use_cache=False).logits
    hooks = len(base.embedding._forward_hooks)
    with base.checkpointing():
        assert torch.equal(base.model(input_ids=ids_BT, use_cache=False).logits, plain)
        with base.checkpointing():
            pass
        assert all(layer.gradient_checkpointing and layer.training for layer in base.layers)
    assert not any(layer.gradient_checkpointing for layer in base.layers)
    assert not any(module.training for module in base.model.modules())
    assert len(base.embedding._forward_hooks) == hooks
    assert not base.model(input_ids=ids_BT, use_cache=False).logits.requires_grad
    with pytest.raises(KeyError), base.checkpointing():
        raise KeyError
    assert not any(layer.gradient_checkpointing for layer in base.layers)


def test_checkpointing_runs_every_layer_again():
    base, runs = tiny_base(), []
    for (layer, _), linear in base.linears.items():
        linear.register_forward_hook(lambda module, args, output, layer=layer: runs.append(layer))
    inputs_BTH = base.embedding(random_ids(1, 5)).requires_grad_()
    with base.checkpointing():
        loss = base.model(inputs_embeds=inputs_BTH, use_cache=False).logits.sum()
    once = len(runs)
    loss.backward()
    assert once == len(base.linears) and set(runs[once:]) == {0, 1, 2}
    assert inputs_BTH.grad.abs().max() > 0


# Layer outputs


def test_layer_outputs_are_the_residual_stream():
    base, ids_BT = tiny_base(), random_ids(2, 7)
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        outputs = base.layer_outputs(base.embedding(ids_BT), mask_BT, 3)
        hidden = base.decoder(input_ids=ids_BT, output_hidden_states=True).hidden_states
        assert [output.shape for output in outputs] == [(2, 3, 32)] * 3
        assert torch.allclose(outputs[0], hidden[1][:, -3:], atol=1e-6)
        assert torch.allclose(base.last_norm(outputs[-1]), hidden[-1][:, -3:], atol=1e-5)
        assert torch.equal(base.hidden_states(ids_BT), hidden[-1])
    assert all(output.untyped_storage().nbytes() == output.nbytes for output in outputs)


def test_layer_outputs_of_one_thread_do_not_disturb_another():
    base, ids_BT, elsewhere = tiny_base(), random_ids(2, 7), []
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        alone = base.layer_outputs(base.embedding(ids_BT), mask_BT, 3)
        bare = base.model(input_ids=ids_BT).logits

    def run_elsewhere(*args: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: elsewhere.append(base.model(input_ids=ids_BT).logits))
            thread.start()
            thread.join()

    base.layers[1].register_forward_hook(run_elsewhere)
    with torch.no_grad():
        together = base.layer_outputs(base.embedding(ids_BT), mask_BT, 3)
    assert torch.equal(elsewhere[0], bare)
    assert len(together) == len(alone) and all(map(torch.equal, together, alone))

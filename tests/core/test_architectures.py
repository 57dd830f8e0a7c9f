"""Every architecture that is taken: its own loss and logits, and the tokens of its own `generate`; what is refused, and why."""

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from core.adapters.base_model import BaseModel, load_base
from core.adapters.lora import attach
from core.engine.requests import Request
from core.engine.token_loop import Engine, generate
from core.training.examples import Example, collate
from core.training.objectives import language_loss, row_losses
from tests.architectures import ARCHITECTURES, SHAPE, tiny_config, tiny_model
from tests.models import random_adapters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_logits_and_tokens_are_the_model_s_own(name: str) -> None:
    base = BaseModel(tiny_model(name))
    ids_BT = torch.randint(3, SHAPE["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    examples = [Example((), tuple(row), tuple(row)) for row in ids_BT.tolist()]
    padded = [examples[0], Example((), examples[1].ids[:13], examples[1].ids[:13])]
    with torch.no_grad():
        own = base.model(input_ids=ids_BT, labels=ids_BT, use_cache=False)
        short = base.model(input_ids=ids_BT[1:, :13], labels=ids_BT[1:, :13], use_cache=False)
        batch = collate(examples, pad_id=0)
        assert abs(language_loss(base, batch) / batch.tokens - own.loss) < 1e-5
        assert abs(row_losses(base, collate(padded, pad_id=0), None)[1] / 12 - short.loss) < 1e-5
        assert (base.logits(base.hidden_states(ids_BT)) - own.logits).abs().max() < 1e-5

    adapters = [None, *(random_adapters(base, 1, seed=seed, size=0.3) for seed in (0, 1))]
    draw = random.Random(1)
    requests = [
        Request(str(row), draw.choices(range(3, SHAPE["vocab_size"]), k=length), 9, adapters[row % 3])
        for row, length in enumerate((3, 25, 11, 1, 5))
    ]
    longest = ARCHITECTURES[name].get("keep_window_size")
    kept = [request for request in requests if longest is None or len(request.prompt_ids) + 9 <= longest]
    completions = generate(base, kept, slots=3, prefill_tokens_per_step=16)
    for request in kept:
        ids_1T = torch.tensor([request.prompt_ids])
        with nullcontext() if request.adapter is None else attach(base, request.adapter):
            output = base.model.generate(
                ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=9, eos_token_id=None
            )
        assert completions[request.request_id].token_ids == output[0, ids_1T.shape[1] :].tolist()


MOE = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("gpt_neox", {}, "has no decoder with layers and a last norm"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "has no decoder with layers and a last norm"),
        ("phi3", {}, r"one linear q_proj.*has none.*fused"),
        ("glm4", {}, r"one linear gate_proj.*has none.*fused"),
        ("starcoder2", {}, r"one linear gate_proj.*has none"),
        ("mixtral", {"num_local_experts": 2}, r"one linear gate_proj.*expert"),
        ("dots1", MOE, r"layer 1 .*one linear gate_proj.*mlp\.shared_experts\.gate_proj"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, r"layer 2 .*one linear k_proj.*shared"),
        ("gemma4_text", {"attention_k_eq_v": True}, r"layer 1 .*one linear v_proj"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "lets tokens see those after them"),
    ],
)
def test_what_is_refused_says_why(name: str, values: dict[str, Any], reason: str) -> None:
    model = tiny_model(name, **values)
    with pytest.raises(ValueError, match=reason):
        BaseModel(model)


def test_logits_that_do_not_follow_from_hidden_states_are_refused() -> None:
    model = tiny_model("llama")
    forward = model.forward

    def by_token(input_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        output = forward(input_ids=input_ids, **inputs)
        if input_ids is not None:
            output.logits = output.logits + input_ids[..., None]
        return output

    model.forward = by_token
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM do not follow from its last hidden states"):
        BaseModel(model)


def test_layers_that_hand_on_several_streams_write_no_adapters() -> None:
    base = BaseModel(tiny_model("gemma3n_text"))
    ids_BT = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="several streams"):
        base.layer_outputs(base.embedding(ids_BT), torch.ones_like(ids_BT), 2)


@pytest.mark.parametrize(("name", "chosen"), [("gemma2", "eager"), ("gemma3_text", "sdpa")])
def test_attention_is_what_the_architecture_needs(name: str, chosen: str, tmp_path: Any) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    base = load_base(tmp_path)
    assert base.model.config._attn_implementation == chosen
    Engine(base)


# Built otherwise than from the common shape: encoders and their decoders, state-space and expert models without the linears.
OTHERWISE = {
    "bamba",
    "dbrx",
    "dots1",
    "dots3_note",
    "dots3_note_text",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "gpt_neo",
    "granitemoehybrid",
    "lfm2_moe",
    "mamba2",
    "musicgen",
    "musicgen_melody",
    "plbart",
    "prophetnet",
    "qwen4_exp",
    "qwen4_exp_text",
    "reformer",
    "whisper",
    "xlnet",
    "zamba",
    "zamba2",
}
# Taken, with a decoder that stands in `ARCHITECTURES`, behind large encoders of pictures and sounds; linear attention.
BESIDE = {"got_ocr2", "moss_transcribe_diarize", "olmo_hybrid"}


@pytest.mark.filterwarnings("ignore")
def test_no_architecture_of_transformers_is_forgotten() -> None:
    """Those that are not tested above are refused. About 5 s: every model file is imported."""
    taken = set()
    for name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING) - OTHERWISE:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(tiny_config(name))
        try:
            BaseModel(model)
            taken.add(name)
        except ValueError:
            continue
    assert taken == set(ARCHITECTURES) | BESIDE

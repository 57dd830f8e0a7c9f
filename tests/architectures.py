"""Every architecture of transformers that `BaseModel` takes, as a tiny random model that does what Llama does not."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHAPE: dict[str, Any] = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
CAPPED = {**MIXED, "final_logit_softcapping": 3.0}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NO_EXTRAS = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bitnet": {},
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True},
    "cohere2": {**MIXED, "logit_scale": 0.3},
    "cohere_compass_text": {**MIXED, "logit_scale": 0.3, "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "cwm": MIXED,
    "diffllama": {},
    "doge": {"keep_window_size": 16},
    "emu3": {},
    "ernie4_5": {"use_bias": True},
    "exaone4": MIXED,
    "gemma": {},
    "gemma2": {**CAPPED, "attn_logit_softcapping": 2.0},
    "gemma3": CAPPED,
    "gemma3_text": CAPPED,
    "gemma3n_text": {**CAPPED, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 89, "laurel_rank": 4},
    "gemma4": {**CAPPED, **NO_EXTRAS},
    "gemma4_text": {**CAPPED, **NO_EXTRAS},
    "gemma4_unified": CAPPED,
    "gemma4_unified_text": CAPPED,
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 1.5, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "granite_swa": {**MIXED, "logits_scaling": 3.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {"logits_scaling": 3.0},
    "internlm3": {},
    "iquestcoder": {},
    "llama": {"attention_bias": True},
    "ministral": WINDOW,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    },
    "mistral": WINDOW,
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": MIXED,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"head_dim": 12},
    "seed_oss": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    "vaultgemma": {**CAPPED, "attn_logit_softcapping": 2.0},
}


def tiny_config(name: str, **values: Any) -> PretrainedConfig:
    """The configuration of a type; `values` change it, or its part for texts."""
    make = CONFIG_MAPPING[name]
    whole = make()
    text = whole.get_text_config()
    shape = {**SHAPE, **({"head_dim": 8} if "head_dim" in text.to_dict() else {}), **ARCHITECTURES.get(name, {}), **values}
    if text is whole:
        return make(**shape)
    config = make(text_config={**shape, "model_type": text.model_type})
    if config.to_dict().get("vision_config"):
        config = make(text_config=config.get_text_config(), vision_config=VISION)
    return config


def tiny_model(name: str, **values: Any) -> PreTrainedModel:
    """A random model of `tiny_config`. Equal arguments give equal weights."""
    config = tiny_config(name, **values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                torch.nn.init.normal_(parameter, mean=0.0 if key.endswith("bias") else 1.0, std=0.2)
    return model.eval()

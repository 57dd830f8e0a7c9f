#!/usr/bin/env bash
# Library:   peft 0.21.2 (transformers 5.23.0, torch 2.13.0)
# Behaviour: Losses of two adapters cannot be added and sent backward together. set_adapter("b") clears requires_grad
#            of a's weights, and backward asks for it once more: a's part of the graph is there, but its gradient is
#            dropped. No error, no warning; a is not trained. Setting requires_grad again before backward brings the
#            gradient back.
# Guess:     The graph was made while a was active, so backward gives both adapters the gradients that they get
#            alone.
# Seen:      Loss under a, set_adapter("b"), loss under b, (sum).backward(): b has its gradient, a has none. With
#            requires_grad set again before backward both have theirs, equal to those of each alone.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2

venv/bin/python - <<'EOF'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
torch.manual_seed(0)
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4
)
lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora, adapter_name="a")
model.add_adapter("b", lora)
ids = torch.randint(0, 64, (2, 9))
weights = {name: [value for key, value in model.named_parameters() if f".{name}." in key] for name in "ab"}


def loss(name):
    model.set_adapter(name)
    return model(input_ids=ids, labels=ids).loss


def taken():
    """The gradients of each adapter, flat; None where there is none."""
    grads = {}
    for name, values in weights.items():
        some = [value.grad.flatten() for value in values if value.grad is not None]
        grads[name] = torch.cat(some) if some else None
    model.zero_grad()
    return grads


loss("a").backward()
alone = {"a": taken()["a"]}
loss("b").backward()
alone["b"] = taken()["b"]

(loss("a") + loss("b")).backward()
together = taken()

both = loss("a") + loss("b")
for value in weights["a"]:
    value.requires_grad_()
both.backward()
again = taken()
seen = {
    "a": "none" if together["a"] is None else "some",
    "b": torch.allclose(together["b"], alone["b"]),
    "with requires_grad set again": [torch.allclose(again[name], alone[name]) for name in "ab"],
}
told = {"a": "none", "b": True, "with requires_grad set again": [True, True]}
print("as told" if seen == told else "CHANGED", seen)
sys.exit(seen != told)
EOF

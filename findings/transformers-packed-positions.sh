#!/usr/bin/env bash
# Library:   transformers 5.23.0 (torch 2.13.0)
# Behaviour: Position ids that start again at 0 are taken as packed documents, and attention is cut between them -
#            but only where no attention mask is given and no cache is made. An all-ones mask, or use_cache at its
#            default, lets the second document see the first. So the same ids and positions give other logits in
#            evaluation than under gradient checkpointing (which turns the cache off), and a mask that hides nothing
#            changes the answer.
# Guess:     Position ids say where a token stands, never what it sees; use_cache and an all-ones mask change no
#            logit.
# Seen:      Two documents packed in a row, compared with each alone: equal (1e-6) with use_cache=False and under
#            gradient checkpointing; off by more than 0.01 as called by default, with an all-ones mask, and in
#            training mode without checkpointing.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0

venv/bin/python - <<'EOF'
import logging
import sys
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
torch.manual_seed(0)
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
first, second = torch.randint(0, 64, (1, 5)), torch.randint(0, 64, (1, 7))
packed = torch.cat([first, second], 1)
positions = torch.cat([torch.arange(5), torch.arange(7)])[None]


@torch.no_grad()
def apart(**options):
    """Whether the packed documents do not see each other."""
    alone = torch.cat([model(first).logits, model(second).logits], 1)
    error = (model(packed, position_ids=positions, **options).logits - alone).abs().max().item()
    assert error < 1e-6 or error > 0.01, error
    return error < 1e-6


ones = torch.ones_like(packed)
seen = {
    "default": apart(),
    "use_cache=False": apart(use_cache=False),
    "use_cache=False, mask of ones": apart(use_cache=False, attention_mask=ones),
}
model.train()
seen["training"] = apart()
model.activation_checkpointing_enable()
seen["training, checkpointing"] = apart()
told = {
    "default": False,
    "use_cache=False": True,
    "use_cache=False, mask of ones": False,
    "training": False,
    "training, checkpointing": True,
}
print("as told" if seen == told else "CHANGED", seen)
sys.exit(seen != told)
EOF

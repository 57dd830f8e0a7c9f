#!/usr/bin/env bash
# Library:   deepspeed 0.19.8 (torch 2.13.0)
# Behaviour: ZeRO 1 and 2 link the optimiser's moments to parameters once, in the first step, after the first
#            parameter group alone was stepped. Parameters of later groups stay unlinked for good:
#            safe_get_full_optimizer_state raises "exp_avg not found" for them, though the optimiser holds their
#            moments and trains with them. Two groups (weight decay or none) are the usual case.
# Guess:     After a step, every trained parameter's moments can be read, in whatever group it is.
# Seen:      A linear in one group: moments of weight and bias are read. Weight and bias in two groups: the weight's
#            are read, the bias's raise ValueError, after one step and after three; the optimiser has non-zero
#            moments for both.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8

export DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0
venv/bin/python - <<'EOF'
import importlib
import logging
import sys
import warnings

import torch

warnings.simplefilter("ignore")
import deepspeed
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

logging.disable()
# Else DeepSpeed compiles a shared-memory operation for minutes; gloo does without.
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def moments(stage, groups, steps):
    """For weight and bias: whether the moment is read; and whether the optimiser holds non-zero moments for all."""
    linear = nn.Linear(4, 4)
    decay = {"params": [linear.weight], "weight_decay": 0.1}, {"params": [linear.bias], "weight_decay": 0.0}
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=linear,
        optimizer=torch.optim.AdamW(decay if groups == 2 else linear.parameters(), 1e-3),
        config={"train_micro_batch_size_per_gpu": 1, **zero},
    )
    for _ in range(steps):
        engine.backward(engine(torch.ones(1, 4)).square().sum())
        engine.step()
    found = []
    for value in (linear.weight, linear.bias):
        try:
            found.append(bool(safe_get_full_optimizer_state(value, "exp_avg").norm() > 0))
        except ValueError as error:
            found.append(str(error).split(" in ")[0])
    held = [state["exp_avg"].norm() > 0 for state in engine.optimizer.optimizer.state.values()]
    return found, len(held) == groups and all(held)


seen = {
    f"ZeRO {stage}, {groups} groups, {steps} steps": moments(stage, groups, steps)
    for stage, groups, steps in [(1, 1, 1), (1, 2, 1), (1, 2, 3), (2, 2, 3)]
}
told = {name: ([True, True if "1 groups" in name else "exp_avg not found"], True) for name in seen}
print("as told" if seen == told else "CHANGED", seen)
sys.stdout.flush()
sys.exit(seen != told)
EOF
